"""A job whose models are not there yet: fetched from a hub (a stand-in), once, shown, and run on the real engine."""

from __future__ import annotations

import base64
import os
import shutil
import threading
import unicodedata
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.models import make_volume
from devkit.hub import hub_process
from devkit.local_worker import LocalWorker, WorkerExitedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.engine.build import Engine
    from devkit.hub import RemoteHub

    Load = Callable[[str], dict[str, Any]]

REPO = "org/tiny"
PRIVATE = "org/private"


@pytest.fixture(scope="module")
def hub(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteHub]:
    """A hub with the tiny weights in a public and in a private repository."""
    folder = tmp_path_factory.mktemp("hub")
    weights = make_volume(engine, folder / "weights") / "models"
    for repo in (REPO, PRIVATE):
        shutil.copytree(weights, folder / "root" / repo, copy_function=os.link)
    with hub_process(folder / "root", "--private", PRIVATE, "--token", f"hf_opensesame={PRIVATE}") as running:
        yield running


@pytest.fixture(scope="module")
def empty_worker(engine: Engine, hub: RemoteHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorker]:
    """A worker on a volume that holds nothing but an operator's manifest, which fetches on demand."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "volume").mkdir()
    (folder / "volume" / "models.toml").write_text(
        f'[[model]]\nsource = "hf://{REPO}/diffusion_models/tiny_sd3.safetensors"\nfolder = "diffusion_models"\n\n'
        f'[[model]]\nsource = "hf://{REPO}/text_encoders/tiny_clip_l.pt"\nfolder = "text_encoders"\n\n'
        f'[[model]]\nsource = "hf://{REPO}/vae/tiny_taesd3_vae.safetensors"\nfolder = "vae"\n'
    )
    environ = {"HF_ENDPOINT": hub.endpoint, "MODEL_LOADING": "on_demand"}
    with LocalWorker(engine, folder, folder / "volume", environ) as local:
        local.wait_ready()
        yield local


def picture(answer: dict[str, Any]) -> bytes:
    assert answer["status"] == "COMPLETED", answer
    return base64.b64decode(answer["output"]["images"][0]["data"])


def hub_file(hub: RemoteHub) -> bytes:
    """The tiny VAE, as the hub has it."""
    with urllib.request.urlopen(f"{hub.endpoint}/{REPO}/resolve/main/vae/tiny_taesd3_vae.safetensors", timeout=60) as answer:
        data: bytes = answer.read()
    return data


def changed(graph: dict[str, Any], class_type: str, **inputs: Any) -> dict[str, Any]:
    next(node for node in graph.values() if node["class_type"] == class_type)["inputs"].update(inputs)
    return graph


def test_jobs_on_an_empty_volume_fetch_their_models_once_and_give_the_same_picture(
    empty_worker: LocalWorker, worker: LocalWorker, hub: RemoteHub, workflow: Load
) -> None:
    hub.clear_log()
    answers: list[dict[str, Any]] = []

    def send() -> None:
        answers.append(empty_worker.runsync({"workflow": workflow("text_to_image")}))

    jobs = [threading.Thread(target=send) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    expected = picture(worker.runsync({"workflow": workflow("text_to_image")}))
    assert [picture(answer) for answer in answers] == [expected] * 3
    root = empty_worker.folder / "volume"
    for name in ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors"):
        size = (root / "models" / name).stat().st_size
        assert hub.bytes_sent(f"*{name}") in range(size, size + 2), "the body once, and at most a first byte to look"
        assert (root / ".worker" / "seals" / f"{name}.json").is_file()


def test_a_request_names_where_its_model_is_from(empty_worker: LocalWorker, workflow: Load) -> None:
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name="mine/of_the_request.safetensors")
    entry = {
        "folder": "vae",
        "name": "mine/of_the_request.safetensors",
        "source": f"hf://{REPO}/vae/tiny_taesd3_vae.safetensors",
    }
    assert picture(empty_worker.runsync({"workflow": graph, "models": [entry]}))


@pytest.mark.parametrize("here", ["NFC", "NFD"])
def test_accents_are_written_in_either_way(empty_worker: LocalWorker, hub: RemoteHub, workflow: Load, here: Any) -> None:
    """By hand on the volume as a Mac writes them, or fetched as the request writes them; ComfyUI compares letter by letter."""
    there: Any = "NFD" if here == "NFC" else "NFC"
    name = f"é が {here}.safetensors"
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name=unicodedata.normalize(here, f"hand {name}"))
    source = hub_file(hub)
    by_hand = empty_worker.folder / "volume/models/vae" / unicodedata.normalize(there, f"hand {name}")
    by_hand.parent.mkdir(parents=True, exist_ok=True)
    by_hand.write_bytes(source)
    hub.clear_log()
    assert picture(empty_worker.runsync({"workflow": graph}))
    assert hub.bytes_sent("*vae*") == 0
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name=unicodedata.normalize(here, f"fetched {name}"))
    entry = {
        "folder": "vae",
        "name": unicodedata.normalize(there, f"fetched {name}"),
        "source": f"hf://{REPO}/vae/tiny_taesd3_vae.safetensors",
    }
    assert picture(empty_worker.runsync({"workflow": graph, "models": [entry]}))


def test_the_editors_own_metadata_names_where_a_model_is_from(empty_worker: LocalWorker, workflow: Load) -> None:
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name="drawn.safetensors")
    address = f"https://huggingface.co/{REPO}/blob/main/vae/tiny_taesd3_vae.safetensors?download=true"
    node = {
        "id": 1,
        "type": "VAELoader",
        "mode": 0,
        "widgets_values": ["drawn.safetensors"],
        "properties": {"models": [{"name": "drawn.safetensors", "url": address, "directory": "vae"}]},
    }
    answer = empty_worker.runsync({"workflow": graph, "extra_pnginfo": {"workflow": {"nodes": [node], "links": []}}})
    assert b"drawn.safetensors" in picture(answer), "the editor's workflow is embedded in the picture"


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"folder": "vae", "name": "x.safetensors", "source": "https://evil.example/x.safetensors"}, ["evil.example"]),
        ({"folder": "vae", "name": "x.ckpt", "source": f"hf://{REPO}/x.ckpt"}, [".ckpt"]),
        ({"folder": "vae", "name": "../x.safetensors", "source": f"hf://{REPO}/x.safetensors"}, ["../x.safetensors"]),
        ({"folder": "vae", "name": "x.safetensors", "source": "hf://nonsense"}, ["hf://org/repo/path"]),
        ({"folder": "vae", "name": "x.safetensors", "source": f"hf://{REPO}/nope.safetensors"}, [REPO, "nope.safetensors"]),
        ({"folder": "vae", "name": "x.safetensors", "source": "hf://org/absent/x.safetensors"}, ["org/absent", "HF_TOKEN"]),
        (
            {"folder": "vae", "name": "x.safetensors", "source": f"hf://{PRIVATE}/vae/tiny_taesd3_vae.safetensors"},
            [PRIVATE, "HF_TOKEN"],
        ),
        ({"folder": "vae", "name": "x.safetensors", "source": f"hf://{REPO}/vae/tiny_taesd3_vae.safetensors@v9"}, [REPO, "v9"]),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing_behind(
    entry: dict[str, str], parts: list[str], empty_worker: LocalWorker, workflow: Load
) -> None:
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name="x.safetensors")
    answer = empty_worker.runsync({"workflow": graph, "models": [entry]})
    assert answer["status"] == "FAILED"
    for part in parts:
        assert part in answer["error"]
    assert "Traceback" not in answer["error"]
    assert not list((empty_worker.folder / "volume").rglob("x.*"))


def test_a_job_with_an_unknown_model_fetches_nothing_for_it(empty_worker: LocalWorker, hub: RemoteHub, workflow: Load) -> None:
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name="nobody_knows.safetensors")
    graph = changed(graph, "UNETLoader", unet_name="not_yet.safetensors")
    entry = {
        "folder": "diffusion_models",
        "name": "not_yet.safetensors",
        "source": f"hf://{REPO}/diffusion_models/tiny_sd3.safetensors",
    }
    hub.clear_log()
    error = empty_worker.runsync({"workflow": graph, "models": [entry]})["error"]
    assert "'nobody_knows.safetensors' in models/vae" in error
    assert hub.bytes_sent("*") == 0


def test_a_copy_that_was_cut_off_is_named_and_runs_when_it_is_whole(
    engine: Engine, empty_worker: LocalWorker, workflow: Load, tmp_path: Path
) -> None:
    whole = (make_volume(engine, tmp_path / "weights") / "models/vae/tiny_taesd3_vae.safetensors").read_bytes()
    copy = empty_worker.folder / "volume/models/vae/copied.safetensors"
    copy.parent.mkdir(parents=True, exist_ok=True)
    graph = changed(workflow("text_to_image"), "VAELoader", vae_name="copied.safetensors")
    copy.write_bytes(whole[:-1])
    answer = empty_worker.runsync({"workflow": graph})
    assert answer["status"] == "FAILED"
    assert f"{copy} has {len(whole) - 1} bytes, but its header says {len(whole)}" in answer["error"]
    copy.write_bytes(whole)
    assert picture(empty_worker.runsync({"workflow": graph}))


def test_an_embedding_that_nobody_knows_is_left_to_comfyui_which_runs_without_it(
    empty_worker: LocalWorker, workflow: Load
) -> None:
    graph = changed(workflow("text_to_image"), "CLIPTextEncode", text="a cat, embedding:no_such_thing")
    assert picture(empty_worker.runsync({"workflow": graph}))


def test_a_private_repository_opens_with_the_token_and_the_whole_manifest_is_there_before_the_first_job(
    engine: Engine, hub: RemoteHub, tmp_path: Path, workflow: Load
) -> None:
    environ = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_opensesame",
        "MODEL_LOADING": "eager",
        "MODELS": "\n".join(
            f"{name.split('/')[0]}=hf://{PRIVATE}/{name}"
            for name in (
                "diffusion_models/tiny_sd3.safetensors",
                "text_encoders/tiny_clip_l.pt",
                "vae/tiny_taesd3_vae.safetensors",
            )
        ),
    }
    (tmp_path / "volume").mkdir()
    with LocalWorker(engine, tmp_path, tmp_path / "volume", environ) as local:
        local.wait_ready()
        assert (tmp_path / "volume" / "models" / "vae" / "tiny_taesd3_vae.safetensors").is_file()
        assert picture(local.runsync({"workflow": workflow("text_to_image")}))
        assert "hf_opensesame" not in local.log()
    assert not hub.leaks


def test_without_a_volume_the_containers_disk_serves_and_the_log_says_so(
    engine: Engine, hub: RemoteHub, tmp_path: Path, workflow: Load
) -> None:
    models = (
        f"{name.split('/')[0]}=hf://{REPO}/{name}"
        for name in ("diffusion_models/tiny_sd3.safetensors", "vae/tiny_taesd3_vae.safetensors")
    )
    environ = {
        "HF_ENDPOINT": hub.endpoint,
        "MODELS": " ".join([*models, f"text_encoders=hf://{REPO}/text_encoders/tiny_clip_l.pt"]),
    }
    with LocalWorker(engine, tmp_path, tmp_path / "no-volume", environ) as local:
        local.wait_ready()
        assert picture(local.runsync({"workflow": workflow("text_to_image")}))
        assert local.log().count("There is no network volume at") in {1, 2}, "at the start, and with the first model"
        assert "are lost with it" in local.log()
    assert not (tmp_path / "no-volume").exists()


def test_a_required_volume_that_is_not_there_ends_the_start(engine: Engine, tmp_path: Path) -> None:
    environ = {"REQUIRE_VOLUME": "true", "MODEL_LOADING": "on_demand"}
    with LocalWorker(engine, tmp_path, tmp_path / "no-volume", environ) as local:
        with pytest.raises(WorkerExitedError):
            local.wait_ready()
        last = local.log().splitlines()[-1]
        assert last.startswith(f"error: There is no network volume at {tmp_path / 'no-volume'}: attach one")
        assert last.endswith("[volume_missing]")
        assert "container's disk" not in local.log()
        assert "Traceback" not in local.log()


@pytest.mark.parametrize(
    ("models", "parts"),
    [
        (f"vae=hf://{REPO}/vae/absent.safetensors", [REPO, "vae/absent.safetensors"]),
        ("vae=nowhere ../x=hf://a/b/c.safetensors", ["MODELS", "nowhere", "'..'"]),
    ],
)
def test_with_eager_loading_a_manifest_that_cannot_be_had_is_one_line_and_a_status(
    models: str, parts: list[str], engine: Engine, hub: RemoteHub, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    environ = {"HF_ENDPOINT": hub.endpoint, "MODEL_LOADING": "eager", "MODELS": models}
    with LocalWorker(engine, tmp_path, tmp_path / "volume", environ) as local:
        with pytest.raises(WorkerExitedError):
            local.wait_ready()
        last = local.log().splitlines()[-1]
        assert last.startswith("error: ")
        for part in parts:
            assert part in last
        assert "Traceback" not in local.log()


def test_a_wrong_manifest_on_the_volume_is_said_at_start_and_to_the_job_that_needs_it(
    engine: Engine, hub: RemoteHub, tmp_path: Path, workflow: Load
) -> None:
    make_volume(engine, tmp_path / "volume")
    (tmp_path / "volume" / "models.toml").write_text('[[model]]\nsource = "hf://org"\nfolder = "vae"\n')
    with LocalWorker(engine, tmp_path, tmp_path / "volume", {"HF_ENDPOINT": hub.endpoint}) as local:
        local.wait_ready()
        assert "models.toml" in local.log()
        assert picture(local.runsync({"workflow": workflow("text_to_image")}))
        graph = changed(workflow("text_to_image"), "VAELoader", vae_name="absent.safetensors")
        error = local.runsync({"workflow": graph})["error"]
        assert "models.toml" in error
        assert "line 2" in error
        given = {"models": [entry_for("absent.safetensors")]}
        assert picture(local.runsync({"workflow": graph, **given})), "the request says where it is from"


TINY: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
}


def with_loader(name: str, *, wired: bool) -> dict[str, Any]:
    """A picture without models, beside a loader that an output takes from or that nobody needs."""
    loader = {"class_type": "VAELoader", "inputs": {"vae_name": name}}
    decoder = {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 0], "vae": ["3", 0]}}
    shown = {"5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}}
    return {**TINY, "3": loader, "4": decoder, **(shown if wired else {})}


def entry_for(name: str, repo: str = REPO) -> dict[str, str]:
    return {"folder": "vae", "name": name, "source": f"hf://{repo}/vae/tiny_taesd3_vae.safetensors"}


def test_a_model_that_no_output_needs_is_not_fetched_and_one_that_an_output_needs_is(
    empty_worker: LocalWorker, hub: RemoteHub
) -> None:
    hub.clear_log()
    job = {"models": [entry_for("loose.safetensors")]}
    assert picture(empty_worker.runsync({**job, "workflow": with_loader("loose.safetensors", wired=False)}))
    assert hub.bytes_sent("*") == 0
    loose = empty_worker.folder / "volume/models/vae/loose.safetensors"
    assert not loose.exists()
    assert picture(empty_worker.runsync({**job, "workflow": with_loader("loose.safetensors", wired=True)}))
    assert loose.is_file()


def test_a_model_that_only_a_dropped_output_needs_is_not_fetched(empty_worker: LocalWorker, hub: RemoteHub) -> None:
    hub.clear_log()
    graph = with_loader("dropped.safetensors", wired=True)
    graph["4"]["inputs"]["pixels"] = ["77", 0]
    answer = empty_worker.runsync({"workflow": graph, "models": [entry_for("dropped.safetensors")]})
    assert picture(answer)
    (error,) = answer["output"]["errors"]
    assert "comes from node 77" in error
    assert hub.bytes_sent("*") == 0


def test_a_model_that_no_output_needs_fails_no_job(empty_worker: LocalWorker) -> None:
    cut = empty_worker.folder / "volume/models/vae/cut.safetensors"
    cut.parent.mkdir(parents=True, exist_ok=True)
    cut.write_bytes((1 << 20).to_bytes(8, "little") + b"{}")
    private = [entry_for("gated.safetensors", PRIVATE)]
    for name, models in (("gated.safetensors", private), ("nobody_knows.safetensors", []), (cut.name, [])):
        assert picture(empty_worker.runsync({"workflow": with_loader(name, wired=False), "models": models}))
        answer = empty_worker.runsync({"workflow": with_loader(name, wired=True), "models": models})
        assert name == "nobody_knows.safetensors" or answer["status"] == "FAILED", "the same, where it is needed"
    cut.unlink()


def test_nothing_is_fetched_for_a_graph_that_comfyui_refuses_for_another_reason(
    engine: Engine, hub: RemoteHub, tmp_path: Path, workflow: Load
) -> None:
    (tmp_path / "volume").mkdir()
    names = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")
    models = " ".join(f"{name.split('/')[0]}=hf://{REPO}/{name}" for name in names)
    environ = {
        "HF_ENDPOINT": hub.endpoint,
        "MODELS": models,
        "MODEL_LOADING": "on_demand",
        "INPUT_URL_ALLOW_PRIVATE": "127.0.0.1",
    }
    with LocalWorker(engine, tmp_path, tmp_path / "volume", environ) as local:
        local.wait_ready()
        hub.clear_log()
        image = {"name": "in.png", "url": f"{hub.endpoint}/{REPO}/resolve/main/{names[0]}"}
        for wrong in ({"steps": "many"}, {"sampler_name": "none"}, {"model": ["99", 0]}, {"cfg": -1}):
            graph = changed(workflow("text_to_image"), "KSampler", **wrong)
            answer = local.runsync({"workflow": graph, "images": [image]})
            assert answer["status"] == "FAILED", answer
            assert next(iter(wrong)) in answer["error"] or "99" in answer["error"], answer
            assert "needs the model" not in str(answer)
        assert hub.requests == []
        graph = changed(workflow("text_to_image"), "KSampler")
        assert picture(local.runsync({"workflow": graph}))
