"""Node classes that ComfyUI does not have: all named at once, in either format, before anything is fetched."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from devkit.editor import node, ui
from devkit.local_worker import free_port
from worker.comfyui_data import is_older, known
from worker.editor.convert import convert
from worker.engine.client import ComfyClient
from worker.errors import UnknownNodes
from worker.graph.rejection import NodeOrigin, node_origins, unknown_nodes
from worker.plan.document import PlanDocument, installed_release

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from devkit.engine.build import Engine
    from devkit.local_worker import LocalWorker

    Load = Callable[[str], dict[str, Any]]

CORE = {"cnr_id": "comfy-core"}
NEWEST_OF_ALL = {"cnr_id": "comfy-core", "ver": "99.1.0"}
NODES = [
    ("BrandNewNode", NEWEST_OF_ALL),
    ("FromAPack", {"cnr_id": "some-pack", "ver": "1.2"}),
    ("FromARepository", {"aux_id": "user/repo"}),
    ("Nobodys", {}),
]
SENTENCE = (
    "but the workflow needs 99.1.0 or newer for BrandNewNode (node 21): use an image with that ComfyUI, or remove the nodes "
    "from the workflow. The workflow needs node classes that this ComfyUI does not have: FromAPack (node 22) from some-pack "
    "1.2; FromARepository (node 23) from user/repo; Nobodys (node 24); install their custom nodes in the image or on the "
    "volume, or remove the nodes from the workflow."
)


# --- the sentence -------------------------------------------------------------------------------


def said(comfyui: str | None, *nodes: tuple[str, dict[str, str]]) -> UnknownNodes:
    return unknown_nodes((NodeOrigin(name, str(at), saved) for at, (name, saved) in enumerate(nodes, 1)), comfyui)


@pytest.mark.parametrize("saved", [{}, CORE], ids=["in an exported graph", "as the editor saved it"])
def test_a_class_of_a_newer_comfyui_is_no_custom_node(saved: dict[str, str]) -> None:
    assert str(said("0.3.75", ("LTXVAudioVAELoader", saved))) == (
        "This image has ComfyUI 0.3.75, but the workflow needs 0.33.0 or newer for LTXVAudioVAELoader (node 1): "
        "use an image with that ComfyUI, or remove the nodes from the workflow."
    )


def test_the_release_that_saved_a_node_has_its_class() -> None:
    assert said("0.3.75", ("LTXVAudioVAELoader", CORE | {"ver": "0.10.0"})).wanted == "0.10.0"
    assert said("0.3.75", ("LTXVAudioVAELoader", CORE | {"ver": "0.10.0"}), ("LoadDA3Model", {})).wanted == "0.33.0", "for both"
    assert said("0.33.0", ("SAM3DBody_Loader", CORE)).wanted == "", "saved by 0.33.0 itself, before that was released"
    assert "needs a newer one for QwenImage21Cache (node 1)" in str(said("0.33.0", ("QwenImage21Cache", {})))


def test_a_comfyui_that_does_not_tell_its_version_is_told_what_is_wanted() -> None:
    assert str(said(None, ("LTXVAudioVAELoader", {}))).startswith(
        "This image has a ComfyUI of unknown version, but the workflow needs 0.33.0 or newer for"
    )


def test_a_class_that_is_gone_or_did_not_load_is_said_to_be_so() -> None:
    gone, off = said("0.33.0", ("IdeogramV1", {})), said("0.33.0", ("IdeogramV3", {}))
    assert str(gone) == (
        "This image has ComfyUI 0.33.0, which no longer has IdeogramV1 (node 1): "
        "replace the nodes with their successors, or remove them from the workflow."
    )
    assert "runs without some of its own node classes: IdeogramV3 (node 1); check whether COMFY_ARGS turns them off" in str(off)
    assert str(said("0.3.75", ("IdeogramV1", {}))) == str(said("0.3.75", ("IdeogramV1", CORE))), "it had that one"
    assert (gone.details(), off.details()) == (["IdeogramV1 (node 1)"], ["IdeogramV3 (node 1)"])


def test_a_pack_that_took_a_name_of_comfyui_is_a_pack() -> None:
    assert said("0.3.75", ("LTXVAudioVAELoader", {"cnr_id": "some-pack"})).nodes == [
        "LTXVAudioVAELoader (node 1) from some-pack"
    ]


def test_a_class_is_named_once() -> None:
    graph = {key: {"class_type": "A", "inputs": {}} for key in ("1", "2")}
    assert [str(each) for each in node_origins(graph)] == ["A (node 1)"]


# --- before anything else -----------------------------------------------------------------------


def exported(workflow: dict[str, Any]) -> dict[str, Any]:
    """A graph with nodes of all kinds that this ComfyUI does not have, none of which leads to an output."""
    more = {str(at): {"class_type": name, "inputs": {}, "_meta": saved} for at, (name, saved) in enumerate(NODES, 21)}
    return {**workflow, **more}


def saved() -> dict[str, Any]:
    return ui(*(node(at, name, properties=saved) for at, (name, saved) in enumerate(NODES, 21)))


def refused(worker: LocalWorker, workflow: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = worker.runsync({"workflow": workflow, **more})
    assert answer["status"] == "FAILED", answer
    return answer


def test_both_formats_say_the_same_of_all_of_them(worker: LocalWorker, engine: Engine, workflow: Load) -> None:
    answers = [refused(worker, exported(workflow("text_to_image"))), refused(worker, saved())]
    expected = f"This image has ComfyUI {installed_release(engine.comfyui_dir)}, {SENTENCE}"
    for answer in answers:
        assert answer["error"] == expected
    assert all(f"{expected} [unknown_nodes]" in worker.log() for _ in answers)


def test_nothing_is_fetched_for_a_graph_that_cannot_run(worker: LocalWorker, workflow: Load) -> None:
    graph = exported(workflow("text_to_image"))
    loader = next(each for each in graph.values() if each["class_type"] == "VAELoader")
    loader["inputs"]["vae_name"] = "nowhere.safetensors"
    entry = {"folder": "vae", "name": "nowhere.safetensors", "source": "hf://org/none/nowhere.safetensors"}
    assert refused(worker, graph, models=[entry])["error"].endswith(SENTENCE), "and not that the source cannot be reached"


def test_a_class_that_comfyui_replaces_runs(worker: LocalWorker, engine: Engine, workflow: Load) -> None:
    graph = workflow("text_to_image")
    graph["50"] = {"class_type": "T2IAdapterLoader", "inputs": {"t2i_adapter_name": "unused.safetensors"}}
    answer = worker.runsync({"workflow": graph})
    if is_older(installed_release(engine.comfyui_dir) or "", "0.33.0"):
        assert "T2IAdapterLoader (node 50)" in answer["error"]
    else:
        assert answer["status"] == "COMPLETED", answer


def test_comfyui_is_asked_once_for_a_class_that_it_has(run_async: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    asked: list[str] = []

    async def object_info(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        asked.append(name)
        return web.json_response({name: {}} if name in {"A", "B", "New"} else {})

    async def replacements(_: web.Request) -> web.Response:
        return web.json_response({"Old": [{"new_node_id": "New"}], "Older": [{"new_node_id": "NotHere"}]})

    async def ask() -> None:
        app = web.Application()
        app.add_routes([web.get("/object_info/{name}", object_info), web.get("/node_replacements", replacements)])
        runner = web.AppRunner(app)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        client = ComfyClient(f"127.0.0.1:{port}")
        assert await client.lacks({"A", "B"}) == (frozenset(), frozenset())
        assert await client.lacks({"A"}) == (frozenset(), frozenset())
        assert sorted(asked) == ["A", "B"]
        assert await client.lacks({"A", "C", "Old", "Older"}) == (frozenset({"C", "Older"}), frozenset({"Old"}))
        assert await client.lacks({"C"}) == (frozenset({"C"}), frozenset()), "what is not there is asked for again"
        assert asked.count("A") == 1
        await asyncio.gather(client.close(), runner.cleanup())

    run_async(ask())


# --- without an engine --------------------------------------------------------------------------


def test_a_plan_says_what_a_release_lacks() -> None:
    graph = {
        "1": {"class_type": "QwenImage21Cache", "inputs": {}},
        "2": {"class_type": "LTXVAudioVAELoader", "inputs": {}},
        "3": {"class_type": "KSampler", "inputs": {}},
        "4": {"class_type": "Nobodys", "inputs": {}},
    }
    wanted = PlanDocument(graph)
    older_one, newest = wanted.lacking("0.3.75"), wanted.lacking()
    assert older_one is not None
    assert newest is not None
    assert older_one.details() == ["QwenImage21Cache (node 1)", "LTXVAudioVAELoader (node 2)"]
    assert newest.details() == ["QwenImage21Cache (node 1)"]
    assert wanted.lacking("0.47.1") is None, "nobody looked at that one"
    assert PlanDocument({"3": graph["3"], "4": graph["4"]}).lacking() is None, "what packs bring is not known here"


def test_of_a_saved_workflow_only_what_runs_counts() -> None:
    workflow = ui(node(1, "LoadDA3Model", mode=2), node(2, "Note", ["x"]), node(3, "KSampler"))
    assert PlanDocument(workflow).lacking("0.3.75") is None
    workflow["nodes"][0]["mode"] = 0
    lacking = PlanDocument(workflow).lacking("0.3.75")
    assert lacking is not None
    assert lacking.details() == ["LoadDA3Model (node 1)"]


def test_the_release_is_read_from_the_folder_of_a_comfyui(tmp_path: Path, engine: Engine) -> None:
    assert installed_release(tmp_path) is None
    (tmp_path / "comfyui_version.py").write_text('# made\n__version__ = "0.46.0"\n')
    assert installed_release(tmp_path) == "0.46.0"
    assert not is_older(installed_release(engine.comfyui_dir) or "", "0.3.75")


def test_a_conversion_without_the_version_still_names_all() -> None:
    with pytest.raises(UnknownNodes) as caught:
        convert(saved(), {})
    assert len(caught.value.details()) == len(NODES)
    assert json.dumps(caught.value.details())
    assert known().newest in known().frontends
