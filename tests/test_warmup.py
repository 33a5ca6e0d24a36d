"""What is warm when the first job comes: as the worker's own log and ComfyUI's tell it; and what is kept of a job for that."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devkit import nodes
from devkit.engine.build import engine_args
from devkit.local_worker import PROJECT, LocalWorker
from worker.graph.graph import parse_graph
from worker.graph.model_names import named_models
from worker.graph.paths import check_paths
from worker.settings import Settings
from worker.store.layout import Layout
from worker.warmup.loading_graph import loading_part, runnable_part
from worker.warmup.read_ahead import WeightsReader
from worker.warmup.warmup import Warmup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]

WORKFLOWS = sorted(path.stem for path in (PROJECT / "devkit/workflows").glob("*.json"))


# --- what is kept of a graph


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_kept_part_is_a_graph_and_stays_the_same(name: str, workflow: Load) -> None:
    part = loading_part(workflow(name))
    if part is None:
        return
    assert loading_part(part) == part
    graph = parse_graph(runnable_part(part))
    check_paths(graph)
    assert set(named_models(graph)) == set(named_models(part))
    assert any(node["class_type"] == "PreviewAny" for node in graph.values())


def test_a_text_to_image_job_keeps_everything_but_its_content(workflow: Load) -> None:
    part = loading_part(workflow("text_to_image_lora"))
    assert part
    kinds = sorted(node["class_type"] for node in part.values())
    assert kinds == sorted(
        ["UNETLoader", "CLIPLoader", "VAELoader", "LoraLoader", "EmptySD3LatentImage", "KSampler", "VAEDecode"]
        + ["CLIPTextEncode"] * 2
    )
    sampler = next(node["inputs"] for node in part.values() if node["class_type"] == "KSampler")
    assert (sampler["steps"], sampler["seed"], sampler["sampler_name"]) == (1, 0, "euler")


@given(st.text(min_size=1), st.integers(1), st.dictionaries(st.text(min_size=1), st.text(min_size=1), max_size=3))
def test_no_text_seed_title_id_or_unknown_input_of_a_job_is_kept(text: str, seed: int, more: dict[str, str]) -> None:
    graph = json.loads((PROJECT / "devkit/workflows/text_to_image.json").read_text())
    plain = loading_part(graph)
    for node in graph.values():
        node["_meta"] = {"title": text}
        for name in ("text", "seed"):
            if name in node["inputs"]:
                node["inputs"][name] = text if name == "text" else seed
        node["inputs"] |= {f"x-{name}": value for name, value in more.items()}
    renamed = json.loads(json.dumps(graph))
    for node in renamed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [f"{text}{value[0]}", value[1]]
    assert loading_part({f"{text}{node_id}": node for node_id, node in renamed.items()}) == plain


def test_a_text_that_comes_from_another_node_is_not_needed(workflow: Load) -> None:
    graph = workflow("text_to_image")
    plain = loading_part(graph)
    graph["said"] = {"class_type": "SomebodysPrompts", "inputs": {"secret": "x"}}
    encoder = next(node for node in graph.values() if node["class_type"] == "CLIPTextEncode")
    encoder["inputs"]["text"] = ["said", 0]
    assert loading_part(graph) == plain


def test_what_hangs_on_a_node_that_is_not_kept_is_not_kept_either(workflow: Load) -> None:
    part = loading_part(workflow("image_to_image"))
    assert part
    assert not {"LoadImage", "VAEEncode", "KSampler", "VAEDecode"} & {node["class_type"] for node in part.values()}
    ends = [node["inputs"]["source"][0] for node in runnable_part(part).values() if node["class_type"] == "PreviewAny"]
    assert "UNETLoader" in {part[node_id]["class_type"] for node_id in ends}


def test_a_link_under_a_fixed_name_in_a_node_that_has_no_such_input() -> None:
    graph = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": "a.safetensors", "seed": ["2", 0]}},
        "2": {"class_type": "Unknown", "inputs": {}},
    }
    assert loading_part(graph) is None


# --- a worker


def cold_start(worker: LocalWorker) -> str:
    return next(line for line in worker.log().splitlines() if "cold start" in line)


def until(true: Callable[[], object]) -> None:
    for _ in range(12_000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came true")


def test_the_next_worker_has_read_and_loaded_what_the_last_job_used(
    worker: LocalWorker, engine: Engine, volume: Path, workflow: Load, tmp_path: Path
) -> None:
    record = Layout(volume).used("endpoint-1")
    graph = workflow("text_to_image")
    environ = {"WARMUP_WORKFLOW": "auto", "RUNPOD_ENDPOINT_ID": "endpoint-1"}
    (tmp_path / "first").mkdir()
    with LocalWorker(engine, tmp_path / "first", volume, environ) as first:
        first.wait_ready()
        assert "warm-up" not in cold_start(first)
        assert first.runsync({"workflow": graph})["status"] == "COMPLETED"
        until(record.is_file)
    models = [
        "models/diffusion_models/tiny_sd3.safetensors",
        "models/text_encoders/tiny_clip_l.pt",
        "models/vae/tiny_taesd3_vae.safetensors",
    ]
    kept = json.loads(record.read_text())
    assert sorted(kept["files"]) == models
    prompts = [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    assert not any(text in record.read_text() for text in prompts if text)

    for name in models:
        with (volume / name).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (tmp_path / "second").mkdir()
    with LocalWorker(engine, tmp_path / "second", volume, environ) as second:
        second.wait_ready()
        assert "; warm " in cold_start(second)
        assert "(9 nodes), critical" in cold_start(second)
        ran = second.runsync({"workflow": graph})
    assert ran["status"] == "COMPLETED"
    again = worker.runsync({"workflow": graph})
    assert [item["data"] for item in ran["output"]["images"]] == [item["data"] for item in again["output"]["images"]]


def slow_graph(seconds: float) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "FaultSleep", "inputs": {"image": ["1", 0], "seconds": seconds, "seed": 0}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }


def with_warm_up(engine: Engine, folder: Path, graph: object, **environ: str) -> LocalWorker:
    (folder / "warmup.json").write_text(json.dumps(graph))
    settings = {
        "COMFY_ARGS": " ".join([*engine_args(engine), *nodes.FLAGS]),
        "WARMUP_WORKFLOW": str(folder / "warmup.json"),
        **environ,
    }
    local = LocalWorker(engine, folder, folder / "volume", settings)
    nodes.install(local.base_dir)
    return local


def test_a_warm_up_that_hangs_is_given_up_and_jobs_are_served(engine: Engine, tmp_path: Path) -> None:
    local = with_warm_up(engine, tmp_path, slow_graph(3.0), WARMUP_TIMEOUT_S="1")
    with local:
        local.wait_ready()
        assert "the warm-up workflow failed" in local.log()
        assert "(failed)" in cold_start(local)
        assert local.runsync({"workflow": slow_graph(0.0)})["status"] == "COMPLETED"


def test_a_worker_leaves_at_once_in_the_middle_of_its_warm_up(engine: Engine, tmp_path: Path) -> None:
    local = with_warm_up(engine, tmp_path, slow_graph(600.0))
    with local:
        until(lambda: "got prompt" in local.log())
        os.kill(local.pid, signal.SIGTERM)
        assert local.wait_exit(20) == 128 + signal.SIGTERM
        assert "cold start" not in local.log()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nodes": [], "links": []}', '{"1": {"class_type": "No", "inputs": {}}}'])
def test_a_warm_up_that_is_none_is_said(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "w.json").write_text(text)
    settings = Settings.from_env({"WARMUP_WORKFLOW": str(tmp_path / "w.json"), "VOLUME_PATH": str(tmp_path / "none")})

    class NoModels:
        def located(self, names: object) -> list[Path]:
            del names
            return []

    warmup = Warmup(settings)
    warmup.begin()
    warmup.linked(NoModels())  # type: ignore[arg-type]  # the one question that it asks
    graph = warmup.graph.result(20)
    warmup.stop()
    assert (graph is None) == ("No" not in text)
    assert bool([line for line in caplog.messages if "no warm-up" in line]) == (graph is None)


def test_what_was_downloaded_for_a_job_is_read_though_the_job_s_models_were_asked_for_before(
    tmp_path: Path, workflow: Load
) -> None:
    read: queue.SimpleQueue[list[Path]] = queue.SimpleQueue()

    class Noting(WeightsReader):
        def warm(self, files: Iterable[Path]) -> None:
            read.put(list(files))

    class OneModel:
        def located(self, names: object) -> list[Path]:
            return [tmp_path / "a"] if names else []

    warmup = Warmup(Settings.from_env({"VOLUME_PATH": str(tmp_path / "none")}), Noting(lambda: 0))
    warmup.begin()
    warmup.linked(OneModel())  # type: ignore[arg-type]  # the one question that it asks
    models = list(named_models(workflow("text_to_image")))
    warmup.job(models)  # while ComfyUI boots: the file may not be there yet
    warmup.job(models)
    warmup.fetched()
    warmup.job(models)
    warmup.job(models)
    warmup._work.put(lambda: read.put([]))
    assert [read.get(timeout=20) for _ in range(3)] == [[tmp_path / "a"], [tmp_path / "a"], []]
    warmup.stop()
