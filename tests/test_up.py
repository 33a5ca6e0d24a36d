"""`python -m worker up` against a stand-in of RunPod, with the real worker and the CPU engine behind the endpoint."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.models import make_volume
from devkit.hub import Hub
from devkit.local_worker import PROJECT
from devkit.runpod import RunPodStandIn
from devkit.runpod.stand_in import Cut
from devkit.s3 import RunPodProxy, S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devkit.engine.build import Engine

NAMES = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")
IMAGE = "ghcr.io/you/comfyui-volume-worker:1.0.0"
PNG = b"\x89PNG\r\n\x1a\n"
NOTHING = {"volumes": 0, "pods": 0, "endpoints": 0, "workers": 0}
RUN_TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def hub(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    weights = make_volume(engine, folder / "weights") / "models"
    shutil.copytree(weights, folder / "root/org/tiny", copy_function=os.link)
    with Hub(folder / "root") as running:
        yield running


@dataclass
class Desk:
    """Somebody with an account, a workflow and a list of its models."""

    folder: Path
    runpod: RunPodStandIn
    hub: Hub
    more: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> Path:
        path = self.folder / "models.toml"
        entries = [f'[[models]]\nfolder = "{name.partition("/")[0]}"\nsource = "hf://org/tiny/{name}"\n' for name in NAMES]
        path.write_text("".join(entries))
        return path

    @property
    def environ(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "HF_", "CIVITAI_"))}
        state = {"XDG_STATE_HOME": str(self.folder / "state"), "HF_ENDPOINT": self.hub.endpoint}
        return {**own, **self.runpod.environ(), **state, **self.more}

    def start(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "up", *argv],
            cwd=PROJECT,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *argv: str, status: int = 0) -> str:
        process = self.start(*argv)
        said, _ = process.communicate(timeout=RUN_TIMEOUT_S)
        assert process.returncode == status, said
        return said

    def up(self, *argv: str) -> list[str]:
        workflow = str(PROJECT / "devkit/workflows/text_to_image.json")
        return [workflow, str(self.models), "--name", "tiny", "--image", IMAGE, "--output", str(self.folder / "out"), *argv]

    @property
    def pictures(self) -> list[Path]:
        return sorted((self.folder / "out").glob("*.png"))

    def jobs(self) -> list[str]:
        machines = list(self.runpod.account.endpoints.values())
        return [job.status()["status"] for machine in machines for job in machine.plane.jobs]


@pytest.fixture
def desk(engine: Engine, hub: Hub, tmp_path: Path) -> Iterator[Desk]:
    with RunPodStandIn(tmp_path / "runpod", engine) as runpod:
        yield Desk(tmp_path, runpod, hub)


def test_from_a_workflow_to_a_picture_and_back(desk: Desk) -> None:
    assert desk.run(*desk.up("--dry-run")).count("EU-RO-1") >= 2
    assert desk.runpod.operations() == []
    said = desk.run(*desk.up("--yes"))
    assert [path.read_bytes()[:8] for path in desk.pictures] == [PNG]
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 1}
    assert desk.runpod.operations() == [
        "POST network-volumes",
        "POST serverless",
        "POST pods",
        "DELETE pods",
        "POST run",
    ]
    assert all("seeded" in said.partition(f"{name}: seeded")[1] for name in NAMES)
    # The second run asks nobody, makes nothing, and sends nothing.
    before = len(desk.runpod.operations())
    desk.run(*desk.up())
    assert len(desk.runpod.operations()) == before
    # The next picture is the printed command.
    curl = next(line.strip() for line in said.splitlines() if line.strip().startswith("curl "))
    answer = subprocess.run(
        ["bash", "-c", curl], env=desk.environ, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=True
    )
    assert json.loads(answer.stdout)["status"] == "COMPLETED"
    assert "at most 3" in desk.run("status", "--name", "tiny")
    desk.run("down", "--name", "tiny", "--yes")
    assert desk.runpod.billed() == {**NOTHING, "volumes": 1}
    desk.run("down", "--name", "tiny", "--yes", "--volume-too")
    assert desk.runpod.billed() == NOTHING
    assert "nothing is billed" in desk.run("status", "--name", "tiny")


KILLS = [
    (operation, phase)
    for operation in (
        "POST network-volumes",
        "POST serverless",
        "POST pods",
        "GET logs",
        "DELETE pods",
        "POST run",
        "GET status",
    )
    for phase in ("before", "after")
    if (operation, phase) != ("GET logs", "after")
]


@dataclass
class Killer:
    """Kills a process at one request, before it is carried out or after; the request gets no answer."""

    operation: str
    phase: str
    process: subprocess.Popen[str] | None = None
    killed: bool = False

    def __call__(self, operation: str, phase: str) -> None:
        if self.process is not None and not self.killed and (operation, phase) == (self.operation, self.phase):
            self.killed = True
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            raise Cut


def kill_at(desk: Desk, argv: list[str], operation: str, phase: str) -> None:
    """Run `up` and kill it at this request."""
    killer = Killer(operation, phase)
    desk.runpod.watch = killer
    killer.process = desk.start(*argv)
    said, _ = killer.process.communicate(timeout=RUN_TIMEOUT_S)
    desk.runpod.watch = lambda _, __: None
    assert killer.killed, said
    assert killer.process.returncode == -signal.SIGKILL


@pytest.mark.timeout(1500)  # twenty runs, one after another
def test_killed_at_each_of_its_steps_and_run_again(desk: Desk) -> None:
    """One deployment that is killed at every request which changes anything: same end, nothing doubled, nothing left."""
    desk.runpod.account.workers_may_start.clear()
    for operation, phase in KILLS:
        if (operation, phase) == ("GET status", "after"):
            # Not sooner: the job of the run that was killed after `POST run` is queued until the next run clears the queue.
            desk.runpod.account.workers_may_start.set()
        kill_at(desk, desk.up("--yes"), operation, phase)
        there = desk.runpod.billed()
        assert max(there["volumes"], there["pods"], there["endpoints"]) <= 1
    desk.run(*desk.up("--yes"))
    assert [path.read_bytes()[:8] for path in desk.pictures] == [PNG]
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 1}
    done = desk.runpod.operations()
    assert (done.count("POST network-volumes"), done.count("POST serverless")) == (1, 1)
    assert desk.jobs().count("COMPLETED") == 1
    assert set(desk.jobs()) <= {"COMPLETED", "CANCELLED"}
    for operation in ("DELETE serverless", "DELETE network-volumes"):
        for phase in ("before", "after"):
            if operation == "DELETE serverless" or phase == "before":
                kill_at(desk, ["down", "--name", "tiny", "--yes", "--volume-too"], operation, phase)
    kill_at(desk, ["down", "--name", "tiny", "--yes", "--volume-too"], "DELETE network-volumes", "after")
    desk.run("down", "--name", "tiny", "--yes", "--volume-too")
    assert desk.runpod.billed() == NOTHING
    assert not list((desk.folder / "state").rglob("*.json"))


def test_a_deployment_is_found_by_its_name_where_its_state_is_lost(desk: Desk) -> None:
    desk.run(*desk.up("--yes", "--no-picture"))
    shutil.rmtree(desk.folder / "state")
    desk.run(*desk.up("--yes", "--no-picture"))
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 0}
    shutil.rmtree(desk.folder / "state")
    desk.run("down", "--name", "tiny", "--yes", "--volume-too")
    assert desk.runpod.billed() == NOTHING


def test_the_pod_ends_itself_where_nobody_comes_back(desk: Desk) -> None:
    """Killed while its Pod works, and never run again: the Pod removes itself when it is done."""
    desk.runpod.account.pod_environ["UP_LINGER_S"] = "0"
    kill_at(desk, desk.up("--yes"), "GET logs", "before")
    account = desk.runpod.account
    with account.lock:
        machine = next(iter(account.pods.values()))
    machine.wait_gone(RUN_TIMEOUT_S)
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 0}
    volume = next(iter(account.things["network-volumes"]))
    assert all((account.volume_folder(volume) / "models" / name).is_file() for name in NAMES)


def test_through_s3(desk: Desk) -> None:
    with S3Server() as server, RunPodProxy(server.endpoint_url, keys=["user_devkit"]) as proxy:

        def mount(volume_id: str, folder: Path) -> None:
            """What S3 has is what a worker's mount has."""
            for entry in server.client.list_objects_v2(Bucket=volume_id).get("Contents", ()):
                path = folder / entry["Key"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(server.client.get_object(Bucket=volume_id, Key=entry["Key"])["Body"].read())

        desk.runpod.account.on_volume = server.bucket
        desk.runpod.account.before_worker = mount
        desk.more = {"RUNPOD_S3_ACCESS_KEY_ID": "user_devkit", "RUNPOD_S3_SECRET_ACCESS_KEY": "rps_devkit"}
        desk.run(*desk.up("--yes", "--s3-endpoint", proxy.endpoint_url))
        assert [path.read_bytes()[:8] for path in desk.pictures] == [PNG]
        assert "POST pods" not in desk.runpod.operations()
        assert proxy.count("UploadPart") >= len(NAMES)


def events(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_for_programs(desk: Desk) -> None:
    found = events(desk.run(*desk.up("--yes", "--json", "--no-picture")))
    assert [event["step"] for event in found if event["event"] == "step"] == ["volume", "endpoint", "models"]
    assert {event["model"] for event in found if event["event"] == "ended"} == set(NAMES)
    plan = next(event for event in found if event["event"] == "plan")
    assert plan["datacenter"] == "EU-RO-1"
    assert {model["state"] for model in plan["models"]} == {"fetch"}
    done = next(event for event in found if event["event"] == "done")
    assert done["url"] in shlex.split(done["curl"])[2]
    down = events(desk.run("down", "--name", "tiny", "--yes", "--json", "--volume-too"))
    assert len(down[-1]["removed"]["volumes"]) == 1
