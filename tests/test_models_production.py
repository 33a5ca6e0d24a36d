"""A job that waits for models, as RunPod's clients see it: progress, then the result; cancelled, the wait ends."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.models import make_volume
from devkit.hub import Hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]

REPO = "org/tiny"
NAMES = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")


@pytest.fixture(scope="module")
def hub(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    weights = make_volume(engine, folder / "weights") / "models"
    shutil.copytree(weights, folder / "root" / REPO, copy_function=os.link)
    with Hub(folder / "root") as running:
        yield running


@pytest.fixture(scope="module")
def pod(engine: Engine, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProductionWorker]:
    """A worker in production mode on an empty volume, which fetches what jobs name."""
    folder = tmp_path_factory.mktemp("pod")
    (folder / "volume").mkdir()
    models = " ".join(f"{name.split('/')[0]}=hf://{REPO}/{name}" for name in NAMES)
    environ = {"HF_ENDPOINT": hub.endpoint, "MODELS": models, "MODEL_LOADING": "on_demand"}
    with ControlPlane() as plane, ProductionWorker(plane, engine, folder, folder / "volume", environ) as worker:
        worker.wait_ready()
        yield worker


def test_a_cancelled_job_stops_waiting_and_the_next_one_goes_on_with_what_it_left(
    pod: ProductionWorker, hub: Hub, workflow: Load
) -> None:
    hub.fault("stall", file="*tiny_sd3.safetensors", after_bytes=1 << 20, count=None)
    job = pod.plane.submit({"workflow": workflow("text_to_image")})
    hub.wait_stalled(1, 30)
    pod.plane.wait_until(lambda: any(update.value["max"] for update in job.updates))
    pod.plane.cancel(job.id)
    pod.plane.wait_until(lambda: "cancelled after" in pod.log())
    hub.clear_faults()
    hub.release()

    second = pod.plane.submit({"workflow": workflow("text_to_image")})
    result = second.result(90)
    assert result["status"] == "COMPLETED", result
    assert len(result["output"]["images"]) == 1
    assert (second.answers, second.late_updates) == (1, [])
    assert job.status()["status"] == "CANCELLED"


def test_progress_shows_bytes_rate_and_file(pod: ProductionWorker) -> None:
    job = next(job for job in pod.plane.jobs if job.updates)
    output = next(update.value for update in job.updates if update.value["max"])
    assert output["type"] == "download"
    assert 0 <= output["value"] <= output["max"]
    assert output["file"] in NAMES
    assert "MB" in output["text"]
    assert {"percent", "bytes_per_s"} <= set(output)
