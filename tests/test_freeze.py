"""A worker that is frozen and thawed, as FlashBoot does with idle pods: the real SDK and ComfyUI, all processes stopped."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args
from devkit.engine.models import make_volume
from devkit.hub import Hub
from devkit.shifted_clock import ShiftedClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.engine.build import Engine

FROZEN_S = 8.0
"""Longer than the worker's limits below, and than what a busy machine makes its clock's ticks late."""


def job(colour: int, seconds: float = 0.0) -> dict[str, Any]:
    """A picture of one colour, which takes a while."""
    return {
        "workflow": {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": colour}},
            "2": {"class_type": "FaultSleep", "inputs": {"image": ["1", 0], "seconds": seconds, "seed": colour}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "frozen"}},
        },
        "timeout_s": FROZEN_S - 1,
    }


def tiny(colour: int) -> dict[str, Any]:
    """A picture of one colour."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "frozen"}},
    }


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    with ControlPlane(poll_s=600.0) as plane:
        yield plane


@pytest.fixture
def pod(plane: ControlPlane, engine: Engine, tmp_path: Path) -> Iterator[ProductionWorker]:
    """A pod whose limits are shorter than the freezes."""
    (tmp_path / "volume").mkdir()
    flags = " ".join([*engine_args(engine), *nodes.FLAGS])
    limits = {"COMFY_HANG_TIMEOUT_S": f"{FROZEN_S - 2:g}", "COMFY_START_TIMEOUT_S": "60"}
    worker = ProductionWorker(plane, engine, tmp_path, tmp_path / "volume", {"COMFY_ARGS": flags, **limits})
    nodes.install(worker.base_dir)
    worker.start()
    yield worker
    plane.thaw_pod(cut=False)
    worker.stop()


def freeze(plane: ControlPlane, seconds: float = FROZEN_S) -> None:
    assert plane.freeze_pod() >= 2  # the worker and its ComfyUI
    time.sleep(seconds)
    plane.thaw_pod()


def completed(plane: ControlPlane, pod: ProductionWorker, colour: int) -> float:
    """Have one job done, and return how long it took."""
    began = time.monotonic()
    handle = plane.submit(job(colour))
    assert handle.result(120)["status"] == "COMPLETED", pod.log_tail()
    return time.monotonic() - began


def test_an_idle_worker_that_was_frozen_takes_the_next_job_over_new_connections(
    plane: ControlPlane, pod: ProductionWorker
) -> None:
    pod.wait_ready()
    completed(plane, pod, 1)
    for colour in (2, 3):
        plane.wait_polling()
        freeze(plane)
        plane.wait_polling(timeout_s=60)
        completed(plane, pod, colour)
    plane.wait_until(lambda: pod.log().count("this worker was frozen for") == 2, 60)
    assert "hung" not in pod.log()
    assert [handle.answers for handle in plane.jobs] == [1, 1, 1]


def test_a_job_that_was_frozen_at_work_is_done_and_its_limits_do_not_count_the_freeze(
    plane: ControlPlane, pod: ProductionWorker
) -> None:
    pod.wait_ready()
    handle = plane.submit(job(4, seconds=3))
    plane.wait_until(lambda: "got prompt" in pod.log(), 60)
    freeze(plane)
    assert handle.result(120)["status"] == "COMPLETED", pod.log_tail()
    assert handle.answers == 1
    assert "is replaced" not in pod.log()
    completed(plane, pod, 5)


def test_a_job_that_came_in_while_the_worker_was_frozen_is_done_once(plane: ControlPlane, pod: ProductionWorker) -> None:
    pod.wait_ready()
    plane.freeze_pod()
    handle = plane.submit(job(7))  # RunPod answers the poll that it holds: the job waits in the frozen worker's socket
    time.sleep(FROZEN_S)
    plane.thaw_pod(cut=False)
    assert handle.result(120)["status"] == "COMPLETED", pod.log_tail()
    completed(plane, pod, 8)
    assert [each.answers for each in plane.jobs] == [1, 1]
    assert all(len(each.takes) == 1 for each in plane.jobs)


@pytest.mark.parametrize("monotonic", [True, False], ids=["clock-went-on", "clock-stood-still"])
def test_a_job_in_the_socket_of_a_worker_that_was_frozen_for_an_hour_is_done_once(
    plane: ControlPlane, engine: Engine, tmp_path: Path, *, monotonic: bool
) -> None:
    clock = ShiftedClock(tmp_path / "ahead")
    (tmp_path / "volume").mkdir()
    with ProductionWorker(plane, engine, tmp_path, tmp_path / "volume", clock.environ) as pod:
        pod.wait_ready()
        for colour in (9, 10):
            plane.wait_polling(timeout_s=60)
            plane.freeze_pod()
            handle = plane.submit({"workflow": tiny(colour)})
            plane.wait_until(lambda handle=handle: bool(handle.takes), 60)  # type: ignore[misc]  # mypy infers no default
            clock.jump(3600, monotonic=monotonic)
            plane.thaw_pod(cut=False)
            assert handle.result(120)["status"] == "COMPLETED", pod.log_tail()
            assert handle.answers == 1
            freezes = colour - 8
            # The line follows the job where the clock's thread is late.
            plane.wait_until(lambda freezes=freezes: pod.log().count("this worker was frozen for") == freezes, 60)  # type: ignore[misc]


def test_a_download_that_was_frozen_with_its_connections_cut_goes_on(
    plane: ControlPlane, engine: Engine, tmp_path: Path, workflow: Callable[[str], dict[str, Any]]
) -> None:
    weights = make_volume(engine, tmp_path / "weights") / "models"
    shutil.copytree(weights, tmp_path / "root/org/tiny", copy_function=os.link)
    names = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")
    models = " ".join(f"{name.split('/')[0]}=hf://org/tiny/{name}" for name in names)
    (tmp_path / "volume").mkdir()
    with Hub(tmp_path / "root") as hub:
        clock = ShiftedClock(tmp_path / "ahead")
        environ = {"HF_ENDPOINT": hub.endpoint, "MODELS": models, "MODEL_LOADING": "on_demand", **clock.environ}
        with ProductionWorker(plane, engine, tmp_path, tmp_path / "volume", environ) as pod:
            pod.wait_ready()
            hub.fault("stall", file="*tiny_sd3.safetensors", after_bytes=1 << 20, count=None)
            handle = plane.submit({"workflow": workflow("text_to_image")})
            hub.wait_stalled(1, 60)
            assert plane.freeze_pod() >= 2
            clock.jump(3600, monotonic=True)
            hub.clear_faults()  # the stalled answers stay so: their connections are dead without a word
            plane.thaw_pod()
            assert handle.result(180)["status"] == "COMPLETED", pod.log_tail()
            hub.release()
    assert handle.answers == 1
    assert not list((tmp_path / "volume/.worker/partial").glob("*"))


def test_a_worker_that_was_frozen_while_it_boots_comes_up(plane: ControlPlane, pod: ProductionWorker) -> None:
    plane.wait_until(lambda: "Starting ComfyUI (pid" in pod.log(), 60)
    handle = plane.submit(job(6))
    freeze(plane)
    assert handle.result(180)["status"] == "COMPLETED", pod.log_tail()
    assert handle.answers == 1
