"""What a workflow names as the editor saves it, read without an engine: the same models that the converted graph names."""

from __future__ import annotations

import json
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from devkit.editor import node, subgraph, ui
from devkit.engine.cache import cache_root
from devkit.local_worker import PROJECT
from devkit.recorded import recorded_pairs, recording
from scripts.make_catalog import fetch_wheel, templates
from worker.editor.convert import convert
from worker.editor.embedded_models import embedded_models
from worker.errors import RequestError, UiWorkflowInvalid, UnknownNodes
from worker.fetch.http import Network
from worker.fetch.hub import Hub
from worker.graph.graph import needed_nodes, parse_graph
from worker.graph.model_names import named_models
from worker.models.sources import Sources
from worker.plan.document import PlanDocument, UnreadableDocument, read_document
from worker.plan.naming_graph import naming_graph
from worker.seed.errors import SeedUsage
from worker.seed.selection import Selection

if TYPE_CHECKING:
    from pathlib import Path

CLASSIC, MODERN = "1.32.9", "1.58.1"
HOSTS = ("huggingface.co", "civitai.com")


def found(workflow: dict[str, Any], frontend: str = MODERN) -> dict[str, tuple[str, ...]]:
    """The models of a workflow in the editor's format, with the folders that their loaders read."""
    return {model.name: model.folders for model in named_models(parse_graph(naming_graph(workflow, frontend)))}


def wanted(workflow: dict[str, Any]) -> set[str]:
    """The models that a job with this workflow may need."""
    return {models[0].name for models in PlanDocument.read(workflow).names()}


MUTED, BYPASSED = 2, 4


def pipeline(*, modern: bool = True, mode: int = 0) -> dict[str, Any]:
    """A subgraph that promotes its loader's widget, an instance that holds another file, and every way not to count."""
    loader = node(
        20,
        "UNETLoader",
        ["old.safetensors", "default"],
        inputs={"unet_name*": ("COMBO", 1)} if modern else {},
        outputs=("MODEL",),
    )
    unseen = node(21, "VAELoader", ["inner_muted.safetensors"], mode=MUTED)
    kept = node(22, "VAELoader", ["inner.safetensors"], outputs=("VAE",))
    definition = subgraph(
        "load",
        *(loader, unseen, kept),
        links=[(1, -10, 0, 20, 0), (2, 20, 0, -20, 0)] if modern else [(2, 20, 0, -20, 0)],
        inputs=[("unet_name", "COMBO", [1])] if modern else [],
        outputs=[("MODEL", "MODEL", [2])],
    )
    proxies = {} if modern else {"proxyWidgets": [["20", "unet_name"]]}
    instance = node(2, "load", ["new.safetensors"], outputs=("MODEL",), mode=mode, properties=proxies)
    return ui(
        instance,
        node(3, "PrimitiveNode", ["primitive.safetensors", "fixed"], outputs=("COMBO",)),
        node(
            4,
            "LoraLoaderModelOnly",
            ["stale.safetensors", 1.0],
            inputs={"model": ("MODEL", 1), "lora_name*": ("COMBO", 2)},
            outputs=("MODEL",),
        ),
        node(5, "LoraLoaderModelOnly", ["muted.safetensors", 1.0], mode=MUTED),
        node(6, "LoraLoaderModelOnly", ["bypassed.safetensors", 1.0], mode=BYPASSED),
        node(7, "Reroute", inputs={"": ("*", 3)}, outputs=("MODEL",)),
        node(8, "MarkdownNote", ["put noted.safetensors"]),
        node(9, "Note", ["noted.safetensors"]),
        links=[(1, 2, 0, 4, 0), (2, 3, 0, 4, 1), (3, 4, 0, 7, 0)],
        definitions={"subgraphs": [definition]},
    )


@pytest.mark.parametrize("modern", [True, False], ids=["by an input", "by proxyWidgets"])
def test_only_what_runs_counts_with_the_value_that_it_runs_with(modern: bool) -> None:  # noqa: FBT001 - a parameter of the test
    assert found(pipeline(modern=modern)) == {
        "new.safetensors": ("diffusion_models", "unet"),
        "inner.safetensors": ("vae",),
        "primitive.safetensors": ("loras",),
    }


def test_what_is_inside_a_muted_or_bypassed_subgraph_does_not_count() -> None:
    for mode in (MUTED, BYPASSED):
        assert list(found(pipeline(mode=mode))) == ["primitive.safetensors"]


def test_two_instances_have_a_model_each() -> None:
    workflow = pipeline()
    workflow["nodes"].append(node(12, "load", ["other.safetensors"], outputs=("MODEL",)))
    assert {"new.safetensors", "other.safetensors"} <= found(workflow).keys()
    assert "old.safetensors" not in found(workflow)


def test_old_files_name_no_widgets_and_custom_nodes_save_objects() -> None:
    assert found(
        ui(
            node(1, "DualCLIPLoader", ["a.safetensors", "b.safetensors", "flux"]),
            node(2, "VAELoader", ["taesd"]),
            node(3, "Strange", [1, "s.pth"]),
            node(4, "VHS_Like", {"lora_name": "l.safetensors", "video": "v.mp4"}),
            node(5, "Power Lora Loader (rgthree)", [{}, {"on": True, "lora": "on.sft"}, {"on": False, "lora": "off.sft"}]),
            node(6, "CLIPTextEncode", ["a cat, embedding:cats"]),
        )
    ) == {
        "a.safetensors": ("text_encoders", "clip"),
        "b.safetensors": ("text_encoders", "clip"),
        "taesd_encoder": ("vae_approx",),
        "taesd_decoder": ("vae_approx",),
        "s.pth": (),
        "l.safetensors": ("loras",),
        "on.sft": ("loras",),
        "cats": ("embeddings",),
    }


def test_an_input_that_takes_links_only_has_no_place_among_the_values() -> None:
    strange = node(1, "Strange", ["x.safetensors", 3], inputs={"text": ("STRING", None), "lora_name*": ("COMBO", None)})
    assert found(ui(strange)) == {"x.safetensors": ("loras",)}


def test_what_the_worker_could_not_convert_is_refused_as_it_would_refuse_it() -> None:
    for workflow in (ui(node(1, "Anything Everywhere")), ui(node(1, "A"), node(1, "B"))):
        with pytest.raises(UiWorkflowInvalid):
            naming_graph(workflow)


def test_where_the_dialects_differ_the_models_of_both_are_wanted() -> None:
    promoted = pipeline(modern=False)
    assert "new.safetensors" in found(promoted, MODERN)
    assert "old.safetensors" in found(promoted, CLASSIC)
    assert wanted(promoted) == {*found(promoted, MODERN), *found(promoted, CLASSIC)}
    muted = pipeline(mode=MUTED)
    assert "new.safetensors" not in found(muted, MODERN)
    assert "new.safetensors" in found(muted, CLASSIC)
    assert "new.safetensors" in wanted(muted)


def test_a_model_is_wanted_once_where_the_dialects_agree() -> None:
    (models,) = [models for models in PlanDocument.read(pipeline()).names() if models[0].name == "new.safetensors"]
    assert len(models) == 1


def branches(*, end: str) -> dict[str, dict[str, Any]]:
    """A picture from one checkpoint, a loader that nobody takes from, and a branch from another that ends in some node."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "used.safetensors"}},
        "2": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 2]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": "loose.safetensors"}},
        "5": {"class_type": "UNETLoader", "inputs": {"unet_name": "branch.safetensors"}},
        "6": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["5", 0], "lora_name": "lora.safetensors"}},
        "7": {"class_type": end, "inputs": {"model": ["6", 0]}},
    }


@pytest.mark.parametrize(
    ("end", "more"),
    [
        ("KSampler", set()),
        ("SomeonesLoader", set()),
        ("SomeonesNode", {"branch.safetensors", "lora.safetensors"}),
        ("Picture Uploader", {"branch.safetensors", "lora.safetensors"}),
        ("PreviewAny", {"branch.safetensors", "lora.safetensors"}),
    ],
)
def test_a_branch_that_ends_in_no_output_is_not_wanted(end: str, more: set[str]) -> None:
    assert wanted(branches(end=end)) == {"used.safetensors"} | more


def test_of_a_piece_without_any_output_all_models_are_wanted() -> None:
    graph = branches(end="KSampler")
    del graph["3"]
    assert wanted(graph) == {"used.safetensors", "loose.safetensors", "branch.safetensors", "lora.safetensors"}


def test_a_bypassed_end_of_the_editors_format_takes_its_branch_with_it() -> None:
    workflow = ui(
        node(1, "UNETLoader", ["used.safetensors"], outputs=("MODEL",)),
        node(2, "PreviewAny", inputs={"source": ("*", 1)}),
        node(3, "UNETLoader", ["unplugged.safetensors"], outputs=("MODEL",)),
        node(4, "KSampler", inputs={"model": ("MODEL", 2)}, outputs=("LATENT",)),
        node(5, "PreviewAny", inputs={"source": ("*", 3)}, mode=BYPASSED),
        links=[(1, 1, 0, 2, 0), (2, 3, 0, 4, 0), (3, 4, 0, 5, 0)],
    )
    assert wanted(workflow) == {"used.safetensors"}


def test_the_seeder_reads_the_same_names(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    wants = Selection(Sources.read(), Hub("http://127.0.0.1:9", Network()), (), None, threading.Event())
    path.write_text(json.dumps(pipeline()).replace("new.safetensors", "z_image_turbo_bf16.safetensors"))
    items = {item.name: item for item in wants.read([str(path)])}
    assert set(items) == {"z_image_turbo_bf16.safetensors", "inner.safetensors", "primitive.safetensors"}
    assert str(items["z_image_turbo_bf16.safetensors"].spec).startswith("diffusion_models/")
    path.write_text(json.dumps(ui(node(1, "A"), node(1, "B"))))
    with pytest.raises(SeedUsage, match="two nodes with the id 1"):
        wants.read([str(path)])


def webp(text: bytes) -> bytes:
    """An animated picture as ComfyUI saves it, as far as its metadata goes."""
    head = struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 0x0110, 2, len(text), 8 + 2 + 12 + 4) + bytes(4)
    exif = head + text + bytes(len(text) % 2)
    body = b"WEBP" + struct.pack("<4sI", b"EXIF", len(exif)) + exif
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_picture_of_any_kind_is_read_with_what_it_carries(tmp_path: Path) -> None:
    path = tmp_path / "made.webp"
    wants = Selection(Sources.read(), Hub("http://127.0.0.1:9", Network()), (), None, threading.Event())
    path.write_bytes(webp(b"workflow:" + json.dumps(pipeline()).encode()))
    names = {"new.safetensors", "inner.safetensors", "primitive.safetensors"}
    assert {models[0].name for models in PlanDocument.read(read_document(str(path))).names()} == names
    assert {item.name for item in wants.read([str(path)])} == names
    path.write_bytes(webp(b"nothing:{}"))
    with pytest.raises(UnreadableDocument, match="PNG, WEBP, MP4 or WEBM"):
        read_document(str(path))


# In these, ComfyUI's frontend hands an instance's values to the wrong widgets and sends a number as the checkpoint.
BROKEN_THERE = {"3d_hunyuan3d-v2.1.json", "3d_hunyuan3d_image_to_model.json"}


def test_official_templates_name_what_their_converted_graphs_name() -> None:
    info = json.loads((PROJECT / "tests/ui/object_info_modern.json").read_text())
    compared = 0
    for name, workflow in templates(fetch_wheel(cache_root() / "wheels")):
        if name in BROKEN_THERE:
            continue
        try:
            converted = convert(workflow, info).graph
        except (UnknownNodes, UiWorkflowInvalid):
            continue  # its classes are not among the recorded ones, or only a browser can make its inputs
        exact = {(model.name, model.folders) for model in named_models(parse_graph(converted))}
        read = {(model.name, model.folders) for model in named_models(parse_graph(naming_graph(workflow)))}
        assert read == exact, name
        compared += 1
    assert compared > 400


def test_every_model_of_an_official_template_is_known_by_the_template_itself() -> None:
    """None is another dialect's reading of the file: a template of a newer ComfyUI is not read as an older editor would."""
    sources = Sources.read()
    looked_at = 0
    for name, workflow in templates(fetch_wheel(cache_root() / "wheels")):
        if embedded_models(workflow):
            known_here = sources.with_workflow(workflow, HOSTS)
            for models in PlanDocument.read(workflow).names():
                first = models[0]
                assert any(known_here.find(file, first.folders) for file in first.file_names), (name, first)
            looked_at += 1
    assert looked_at > 250


@pytest.mark.parametrize("path", recorded_pairs().values(), ids=list(recorded_pairs()))
def test_a_recorded_pair_wants_what_its_job_needs(path: Path) -> None:
    """Nothing that the outputs of the recorded graph need is missed. Run with WORKFLOW_PAIRS=FOLDER, see devkit/recorded.py."""
    pair, info = recording(path)
    try:
        graph = parse_graph(pair["api"])
    except RequestError:
        pytest.skip("the editor sent what is no graph")
    outputs = [node_id for node_id, each in graph.items() if info[each["class_type"]]["output_node"]]
    needed = needed_nodes(graph, outputs)
    assert {model.name for model in named_models(graph) if model.node_id in needed} <= wanted(pair["ui"])
