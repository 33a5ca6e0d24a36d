"""The main job as a client sees it: the RunPod SDK's local API in front, the real ComfyUI behind, weights on a volume."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devkit.local_worker import PROJECT, LocalWorker, engine_environ, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]

PNG = b"\x89PNG\r\n\x1a\n"
TINY: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
}


def pictures(answer: dict[str, Any]) -> list[bytes]:
    assert answer["status"] == "COMPLETED", answer
    return [base64.b64decode(item["data"], validate=True) for item in answer["output"]["images"]]


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(PNG)
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def input_picture() -> str:
    return base64.b64encode((PROJECT / "devkit/workflows/in.png").read_bytes()).decode()


def test_a_text_to_image_workflow_whose_weights_lie_on_the_volume(worker: LocalWorker, workflow: Load) -> None:
    graph = workflow("text_to_image")
    answer = worker.runsync({"workflow": graph})
    (picture,) = pictures(answer)
    assert size(picture) == (128, 128)
    (item,) = answer["output"]["images"]
    assert item["type"] == "base64"
    assert item["media_type"] == "image/png"
    assert item["size_bytes"] == len(picture)
    assert graph[item["node_id"]]["class_type"] == "SaveImage"


def test_the_same_seed_gives_the_same_file_and_another_prompt_another(worker: LocalWorker, workflow: Load) -> None:
    graph = workflow("text_to_image")
    encoder = next(node for node in graph.values() if node["class_type"] == "CLIPTextEncode")
    first = pictures(worker.runsync({"workflow": graph}))
    text, encoder["inputs"]["text"] = encoder["inputs"]["text"], "a green bicycle"
    other = pictures(worker.runsync({"workflow": graph}))
    encoder["inputs"]["text"] = text
    again = pictures(worker.runsync({"workflow": graph}))
    assert first == again
    assert first != other


def test_the_same_seed_gives_the_same_file_in_another_worker(
    worker: LocalWorker, engine: Engine, workflow: Load, tmp_path: Path, volume: Path
) -> None:
    graph = workflow("text_to_image")
    with LocalWorker(engine, tmp_path, volume) as other:
        other.wait_ready()
        assert pictures(other.runsync({"workflow": graph})) == pictures(worker.runsync({"workflow": graph}))


def test_of_cached_outputs_only_the_one_whose_file_is_gone_is_made_again(worker: LocalWorker) -> None:
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "kept"}}
    graph = {**TINY, "2": saved, "3": {**saved, "inputs": {"images": ["1", 0], "filename_prefix": "lost"}}}
    first = worker.runsync({"workflow": graph})["output"]
    kept, lost = (worker.base_dir / "output" / item["filename"] for item in first["images"])
    written_at = kept.stat().st_mtime_ns
    lost.unlink()
    again = worker.runsync({"workflow": graph})["output"]
    assert [item["node_id"] for item in again["images"]] == ["2", "3"]
    assert "errors" not in again
    assert lost.exists()
    assert kept.stat().st_mtime_ns == written_at
    assert len(list(kept.parent.glob("kept_*"))) == 1


def test_a_picture_in_a_picture_out(worker: LocalWorker, workflow: Load) -> None:
    job = {"workflow": workflow("scale_image"), "images": [{"name": "in.png", "image": input_picture()}]}
    (picture,) = pictures(worker.runsync(job))
    assert size(picture) == (96, 48)
    assert not (worker.base_dir / "input" / "in.png").exists()
    assert pictures(
        worker.runsync({**job, "images": [{"name": "in.png", "image": f"data:image/png;base64,{input_picture()}"}]})
    )


def test_without_its_picture_the_same_job_is_refused(worker: LocalWorker, workflow: Load) -> None:
    answer = worker.runsync({"workflow": workflow("scale_image")})
    assert "Workflow validation failed" in answer["error"]
    assert "in.png" in answer["error"]


def changed(graph: dict[str, Any], class_type: str, **inputs: Any) -> dict[str, Any]:
    graph = json.loads(json.dumps(graph))
    node = next(node for node in graph.values() if node["class_type"] == class_type)
    node["inputs"].update(inputs)
    return graph


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no workflow": ({}, ["Missing 'workflow' parameter"]),
    "an empty graph": ({"workflow": {}}, ["no nodes"]),
    "a list": ({"workflow": [1]}, ["Workflow validation failed"]),
    "an empty workflow of the editor's": ({"workflow": {"nodes": [], "links": []}}, ["no nodes"]),
    "an unknown node": ({"workflow": {**TINY, "3": {"class_type": "NoSuchNode", "inputs": {}}}}, ["NoSuchNode", "install"]),
    "a link to nowhere": ({"workflow": changed(TINY, "SaveImage", images=["99", 0])}, ["99", "node 2"]),
    "a link to no such slot": ({"workflow": changed(TINY, "SaveImage", images=["1", 5])}, ["node 2", "slot"]),
    "a link of one element": ({"workflow": changed(TINY, "SaveImage", images=["1"])}, ["node 2", "images"]),
    "a cycle": ({"workflow": changed(TINY, "EmptyImage", width=["1", 0])}, ["cycle"]),
    "a value out of range": ({"workflow": changed(TINY, "EmptyImage", width=0)}, ["width", "smaller than min"]),
    "no output node": ({"workflow": {"1": TINY["1"]}}, ["output node"]),
    "NaN": ({"workflow": changed(TINY, "EmptyImage", width=float("nan"))}, ["NaN", "width", "node 1"]),
    "a file of the system": (
        {"workflow": {**TINY, "3": {"class_type": "LoadImage", "inputs": {"image": "/etc/passwd"}}}},
        ["/etc/passwd", "leaves its folder"],
    ),
    "a path upwards": (
        {"workflow": {**TINY, "3": {"class_type": "LoadImage", "inputs": {"image": "../../secret.png [input]"}}}},
        ["leaves its folder"],
    ),
    "an output prefix upwards": ({"workflow": changed(TINY, "SaveImage", filename_prefix="../../x")}, ["leaves its folder"]),
    "images that are no list": ({"workflow": TINY, "images": "x"}, ["'images' must be a list of objects"]),
    "an image that is not base64": (
        {"workflow": TINY, "images": [{"name": "a.png", "image": "%%%"}]},
        ["'a.png' is not base64"],
    ),
    "an image that was not sent": (
        {
            "workflow": {
                "1": {"class_type": "LoadImage", "inputs": {"image": "zz.png"}},
                "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "zz"}},
            },
            "images": [{"name": "a.png", "image": "QQ=="}],
        },
        ["Invalid image file: zz.png; send it in 'images' or 'files' under that name, as 'a.png' was"],
    ),
    "an image name upwards": ({"workflow": TINY, "images": [{"name": "../a.png", "image": "QQ=="}]}, ["leaves its folder"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_sentence_and_the_next_job_is_served(name: str, worker: LocalWorker) -> None:
    job, expected = BAD[name]
    answer = worker.runsync(job)
    assert answer["status"] == "FAILED"
    for part in expected:
        assert part in answer["error"]
    assert "Traceback" not in answer["error"]
    assert "\n" not in answer["error"]
    assert pictures(worker.runsync({"workflow": TINY}))


def test_a_missing_model_is_named_with_its_folder_and_what_is_like_it(worker: LocalWorker, workflow: Load) -> None:
    graph = changed(workflow("text_to_image"), "UNETLoader", unet_name="tiny_sd3_v2.safetensors")
    error = worker.runsync({"workflow": graph})["error"]
    assert "'tiny_sd3_v2.safetensors' in models/diffusion_models" in error
    assert "'tiny_sd3.safetensors'" in error


def test_a_model_added_to_the_volume_later_is_seen_by_the_next_job_that_names_it(
    worker: LocalWorker, workflow: Load, volume: Path
) -> None:
    folder = volume / "models" / "diffusion_models"
    added = folder / "later" / "added.safetensors"
    graph = changed(workflow("text_to_image"), "UNETLoader", unet_name="later/added.safetensors")
    assert worker.runsync({"workflow": graph})["status"] == "FAILED"
    added.parent.mkdir()
    shutil.copy(folder / "tiny_sd3.safetensors", added)
    assert pictures(worker.runsync({"workflow": graph}))
    shutil.rmtree(added.parent)
    assert "added.safetensors" in worker.runsync({"workflow": graph})["error"]


def test_a_name_as_windows_spells_it_means_the_same_file(worker: LocalWorker, workflow: Load) -> None:
    graph = workflow("text_to_image_subfolder")
    expected = pictures(worker.runsync({"workflow": graph}))
    windows = changed(graph, "UNETLoader", unet_name="sub\\dir\\tiny_sd3_b.safetensors")
    assert len(pictures(worker.runsync({"workflow": windows}))) == len(expected)


def test_an_output_of_two_whose_branch_cannot_run_is_named_beside_the_other(worker: LocalWorker) -> None:
    graph = {
        **TINY,
        "5": {"class_type": "LoadImage", "inputs": {"image": "gone.png"}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
    }
    answer = worker.runsync({"workflow": graph})
    assert len(pictures(answer)) == 1
    assert "gone.png" in answer["output"]["errors"][0]


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"8": ("PreviewImage", ["77", 0])}, ["input 'images' of node 8 (PreviewImage) comes from node 77"]),
        ({"7": ("ImageInvert", ["77", 0]), "8": ("PreviewImage", ["7", 0])}, ["node 7", "node 77", "no output of node 8"]),
        ({"8": ("PreviewImage", ["1", "0"])}, ["takes output '0' of node 1"]),
        ({"8": ("PreviewImage", [1, 0])}, ['["1", 0]']),
        (
            {"7": ("ImageInvert", ["9", 0]), "9": ("ImageInvert", ["7", 0]), "8": ("PreviewImage", ["7", 0])},
            ["cycle, nodes 7 -> 9 -> 7", "no output of node 8"],
        ),
        ({"7": ("ImageInvert", ["9", 0]), "9": ("ImageInvert", ["7", 0])}, []),
        ({"7": ("ImageInvert", ["77", 0])}, []),
        ({"7": ("EmptyImage", ["77", 0])}, []),
    ],
)
def test_a_branch_with_a_broken_link_costs_its_own_output_only(
    others: dict[str, tuple[str, Any]], says: list[str], worker: LocalWorker
) -> None:
    inputs = {"ImageInvert": "image", "PreviewImage": "images", "EmptyImage": "no_such_input"}
    branch = {node_id: {"class_type": name, "inputs": {inputs[name]: source}} for node_id, (name, source) in others.items()}
    answer = worker.runsync({"workflow": {**TINY, **branch}})
    assert len(pictures(answer)) == 1
    errors = " | ".join(answer["output"].get("errors", ()))
    assert bool(errors) is bool(says)
    for part in says:
        assert part in errors


def test_a_broken_link_where_no_class_looks_for_one_does_not_stop_comfyui(worker: LocalWorker) -> None:
    """ComfyUI follows it all the same, and left alone the thread that runs its prompts ends there."""
    broken = changed(TINY, "EmptyImage", extra=["77", 0])
    answer = worker.runsync({"workflow": broken})
    assert "input 'extra' of node 1 (EmptyImage) comes from node 77" in answer["error"]
    second = {"3": broken["1"], "4": changed(TINY, "SaveImage", images=["3", 0])["2"]}
    assert len(pictures(worker.runsync({"workflow": {**TINY, **second}}))) == 2
    assert pictures(worker.runsync({"workflow": TINY}))


def test_a_workflow_with_previews_only_succeeds_without_images(worker: LocalWorker, workflow: Load) -> None:
    answer = worker.runsync({"workflow": workflow("preview_image")})
    assert answer["output"] == {"images": [], "status": "success_no_images"}


def test_a_node_that_raises_is_named_with_its_message(worker: LocalWorker, workflow: Load) -> None:
    graph = changed(workflow("text_to_image"), "EmptySD3LatentImage", batch_size=4096, width=16384, height=16384)
    error = worker.runsync({"workflow": graph})["error"]
    assert error.startswith("Job processing failed: Workflow execution error: Node Type: ")
    assert "Node ID: " in error
    assert "Traceback" not in error


def comfyui_pid(worker: LocalWorker) -> int:
    """ComfyUI's process: a child of whichever thread of the worker started it last."""
    for children in Path(f"/proc/{worker.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            if "main.py" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return int(pid)
    raise AssertionError("ComfyUI is not a child of the worker")


def test_killing_comfyui_mid_job_names_the_signal_and_the_next_job_succeeds(worker: LocalWorker, workflow: Load) -> None:
    graph = changed(workflow("text_to_image"), "KSampler", steps=10000, seed=7)
    answers: list[dict[str, Any]] = []
    job = threading.Thread(target=lambda: answers.append(worker.runsync({"workflow": graph})))
    mark = len(worker.log())
    job.start()
    deadline = time.monotonic() + 60
    while "got prompt" not in worker.log()[mark:]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(comfyui_pid(worker), signal.SIGKILL)
    job.join(60)
    (answer,) = answers
    assert answer["status"] == "FAILED"
    assert "SIGKILL" in answer["error"]
    assert pictures(worker.runsync({"workflow": TINY}))


def test_run_answers_at_once_and_status_has_the_result(worker: LocalWorker) -> None:
    started = worker._post("/run", {"input": {"workflow": TINY}}, 30)
    assert started["status"] == "IN_PROGRESS"
    assert pictures(worker._post(f"/status/{started['id']}", {}, 60))


def worker_command(environ: dict[str, str], *argv: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "COMFY"))}
    return subprocess.run(
        [sys.executable, "-m", "worker", *argv],
        env={**clean, **environ},
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"COMFYUI_DIR": "/nowhere"}, "/nowhere/main.py does not exist: set COMFYUI_DIR"),
        ({"COMFYUI_PORT": "x", "REFRESH_WORKER": "y"}, "REFRESH_WORKER must be true or false"),
        ({"COMFY_ARGS": ""}, "--cpu"),
        ({"COMFY_ARGS": "--cpu --no-such-flag"}, "ComfyUI did not start: it exited with code 2"),
    ],
)
def test_what_cannot_start_ends_with_one_line_and_a_status(
    environ: dict[str, str], text: str, engine: Engine, tmp_path: Path
) -> None:
    if environ.get("COMFY_ARGS") == "" and any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    base = {**engine_environ(engine, tmp_path, free_port()), "VOLUME_PATH": str(tmp_path)}
    done = worker_command({**base, **environ}, "--rp_serve_api", "--rp_api_port", str(free_port()))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert text in last
    assert "Traceback" not in done.stderr


def test_with_nothing_to_serve_it_says_how_to_serve(engine: Engine, tmp_path: Path) -> None:
    done = worker_command(engine_environ(engine, tmp_path, free_port()))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "--rp_serve_api" in done.stderr


def test_a_mistyped_command_is_named_with_those_there_are() -> None:
    done = worker_command({}, "docter")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "'docter'" in done.stderr
    assert "convert, doctor, plan, seed, settings" in done.stderr


def test_the_images_test_input_is_run_once_and_leaves_a_picture(engine: Engine, tmp_path: Path) -> None:
    shutil.copy(PROJECT / "image/test_input.json", tmp_path)
    environ = {
        **engine_environ(engine, tmp_path / "base", free_port()),
        "VOLUME_PATH": str(tmp_path),
        "PYTHONPATH": str(PROJECT),
    }
    done = worker_command(environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "completed successfully" in done.stdout
    (picture,) = (tmp_path / "base/output").glob("self-test_*.png")
    assert size(picture.read_bytes()) == (64, 64)


def test_the_log_accounts_for_the_cold_start_and_names_the_lines_people_look_for(worker: LocalWorker) -> None:
    log = worker.log()
    for line in ("worker-comfyui: Starting ComfyUI", "worker-comfyui - Starting handler...", "cold start "):
        assert line in log
    assert "engine" in log[log.index("cold start ") :].splitlines()[0]
