"""A worker that takes its job while ComfyUI boots: what it does meanwhile, and what the job hears if ComfyUI never comes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args
from devkit.engine.models import make_volume
from devkit.hub import Hub
from devkit.local_worker import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]

RECORD = PROJECT / "image/record_definitions.py"
BOOTS = 100
AT_ONCE = 4
LONG_S = 600.0
"""Longer than any test runs: what is not ended waits for ever."""

DIES = """
import sys, time
print("loading node packs")
time.sleep(float(sys.argv[-1]))
print("no kernel image is available for the device", flush=True)
sys.exit(3)
"""
NEVER_ANSWERS = f"import time; time.sleep({LONG_S})"
TINY = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
}


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    """An endpoint whose polls are held longer than the test runs."""
    with ControlPlane(poll_s=LONG_S) as plane:
        yield plane


class Pods:
    """Pods of one endpoint whose ComfyUI is a program of a few lines."""

    def __init__(self, plane: ControlPlane, engine: Engine, folder: Path, program: str) -> None:
        self._plane = plane
        self._engine = engine
        self._folder = folder
        (folder / "comfyui").mkdir(parents=True)
        (folder / "comfyui/main.py").write_text(program)
        (folder / "volume").mkdir()

    def start(self, name: str, **environ: str) -> ProductionWorker:
        """Start a pod. What it runs for ComfyUI gets COMFY_ARGS as its last arguments."""
        home = self._folder / name
        home.mkdir()
        stand_in = {"COMFYUI_DIR": str(self._folder / "comfyui"), "COMFYUI_PYTHON": sys.executable, "COMFY_ARGS": "--cpu"}
        pod = ProductionWorker(self._plane, self._engine, home, self._folder / "volume", {**stand_in, **environ}, pod_id=name)
        pod.start()
        return pod


@pytest.mark.timeout(1800)
def test_each_of_a_hundred_jobs_hears_why_comfyui_did_not_start(plane: ControlPlane, engine: Engine, tmp_path: Path) -> None:
    pods = Pods(plane, engine, tmp_path, DIES)
    jobs = [plane.submit({"workflow": TINY}) for _ in range(BOOTS)]

    def boot(number: int) -> int:
        # At once, before the SDK can ask for a job, and later, when it has one.
        pod = pods.start(f"pod-{number}", COMFY_ARGS=f"--cpu {(0, 3)[number % 2]}")
        try:
            return pod.wait_exit(120)
        finally:
            pod.stop()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(boot, range(BOOTS))) == [1] * BOOTS
    results = [job.result(1) for job in jobs]
    assert {result["status"] for result in results} == {"FAILED"}
    assert {result["output"]["code"] for result in results} == {"engine_start_failed"}
    assert all("exited with code 3" in result["error"] for result in results)
    assert {result["output"]["details"][-1] for result in results} == {"no kernel image is available for the device"}
    assert [(job.answers, len(job.takes), job.stop_pod) for job in jobs] == [(1, 1, True)] * BOOTS


def test_a_request_that_is_wrong_in_itself_is_answered_while_comfyui_boots(
    plane: ControlPlane, engine: Engine, tmp_path: Path
) -> None:
    pod = Pods(plane, engine, tmp_path, NEVER_ANSWERS).start("pod-1")
    wrong = [
        ({}, "workflow_missing"),
        ({"workflow": {"1": {"class_type": "A", "inputs": {"a": ["2", 0]}}}}, "workflow_invalid"),
        ({"workflow": TINY, "images": [{"name": "a.png", "url": "http://10.0.0.1/x"}]}, "input_url_refused"),
        ({"workflow": TINY, "outputs": ["7"]}, "field_invalid"),
        ({"workflow": TINY, "models": [{"no": "model"}]}, "model_spec_invalid"),
    ]
    for sent, code in wrong:
        assert plane.submit(sent).result(120)["output"]["code"] == code
    assert "cold start" not in pod.log()
    assert pod.stop(timeout_s=30) == 0


def test_with_take_jobs_ready_no_job_is_taken_before_comfyui_answers(
    plane: ControlPlane, engine: Engine, tmp_path: Path
) -> None:
    pod = Pods(plane, engine, tmp_path, DIES).start("pod-1", COMFY_ARGS="--cpu 4", TAKE_JOBS="ready")
    job = plane.submit({})
    assert pod.wait_exit(120) == 1
    assert job.takes == []
    assert "no kernel image is available" in pod.log()


def test_an_idle_worker_that_boots_leaves_at_once(plane: ControlPlane, engine: Engine, tmp_path: Path) -> None:
    pod = Pods(plane, engine, tmp_path, NEVER_ANSWERS).start("pod-1")
    plane.wait_polling("pod-1", 120)
    assert pod.stop(timeout_s=30) == 0
    assert "leaving: no job to finish" in pod.log()


def test_a_job_that_is_stopped_while_comfyui_boots_is_over(plane: ControlPlane, engine: Engine, tmp_path: Path) -> None:
    pod = Pods(plane, engine, tmp_path, NEVER_ANSWERS).start("pod-1")
    job = plane.submit({"workflow": TINY})
    plane.wait_until(lambda: f"job {job.id}: started" in pod.log(), 120)
    plane.cancel(job.id)
    plane.wait_until(lambda: f"job {job.id}: cancelled" in pod.log(), 60)
    assert plane.submit({}).result(60)["output"]["code"] == "workflow_missing"
    assert job.answers == 0


def test_a_worker_that_is_told_to_leave_while_it_boots_does_the_job_that_it_has(
    plane: ControlPlane, engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    with ProductionWorker(plane, engine, tmp_path, tmp_path / "volume") as pod:
        job = plane.submit({"workflow": TINY})
        plane.wait_until(lambda: f"job {job.id}: started" in pod.log(), 120)
        assert "cold start" not in pod.log()
        os.kill(pod.pid, signal.SIGTERM)
        assert job.result(120)["status"] == "COMPLETED", pod.log_tail()
        assert pod.wait_exit(60) == 0
    assert job.answers == 1


@pytest.fixture
def hub(engine: Engine, tmp_path: Path) -> Iterator[Hub]:
    """A hub that has the models of a text-to-image job."""
    weights = make_volume(engine, tmp_path / "weights") / "models"
    shutil.copytree(weights, tmp_path / "root/org/tiny", copy_function=os.link)
    with Hub(tmp_path / "root") as hub:
        yield hub


def from_hub(hub: Hub) -> dict[str, str]:
    names = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")
    models = " ".join(f"{name.split('/')[0]}=hf://org/tiny/{name}" for name in names)
    return {"HF_ENDPOINT": hub.endpoint, "MODELS": models, "MODEL_LOADING": "on_demand"}


def test_a_job_s_missing_models_come_while_comfyui_boots(
    plane: ControlPlane, engine: Engine, tmp_path: Path, hub: Hub, workflow: Load
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    for name, ahead in (("first", False), ("second", True)):
        (tmp_path / name).mkdir()
        with ProductionWorker(plane, engine, tmp_path / name, volume, from_hub(hub), pod_id=name) as pod:
            job = plane.submit({"workflow": workflow("text_to_image")})
            assert job.result(180)["status"] == "COMPLETED", pod.log_tail()
            log = pod.log()
            assert (log.index(": waits for") < log.index("cold start")) == ahead
            plane.wait_until(lambda: any((volume / ".worker/definitions").glob("*.json")), 60)
        shutil.rmtree(volume / "models")
        shutil.rmtree(volume / ".worker/seals", ignore_errors=True)


def test_the_first_worker_on_an_empty_volume_knows_from_its_image_what_a_job_needs(
    plane: ControlPlane, engine: Engine, tmp_path: Path, hub: Hub, workflow: Load
) -> None:
    comfyui = tmp_path / "comfyui"
    shutil.copytree(engine.comfyui_dir, comfyui)
    subprocess.run([sys.executable, RECORD, comfyui, engine.python, *engine_args(engine)], check=True)
    for name in ("volume", "pod"):
        (tmp_path / name).mkdir()
    environ = {**from_hub(hub), "COMFYUI_DIR": str(comfyui)}
    with ProductionWorker(plane, engine, tmp_path / "pod", tmp_path / "volume", environ) as pod:
        job = plane.submit({"workflow": workflow("text_to_image")})
        assert job.result(180)["status"] == "COMPLETED", pod.log_tail()
        log = pod.log()
    assert log.index(": waits for") < log.index("cold start")
