"""What runs in the stand-in: the workers of an endpoint while it has jobs, and Pods. Touches processes, disk, loopback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.local_worker import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from devkit.engine.build import Engine

_LOOK_S: Final = 0.2
_END_TIMEOUT_S: Final = 20.0


class EndpointMachines:
    """An endpoint's queue, and a worker for it while there are jobs. It has one worker at most, whatever its maximum is."""

    def __init__(self, endpoint_id: str, engine: Engine | None, folder: Path, may_start: threading.Event) -> None:
        self.plane = ControlPlane(endpoint_id=endpoint_id)
        self._engine = engine
        self._folder = folder
        self._may_start = may_start
        self._volume: Path | None = None
        self._environ: dict[str, str] = {}
        self._most = 0
        self._mount: Callable[[], object] | None = None
        self._worker: ProductionWorker | None = None
        self._count = 0
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._scale, name=f"scale-{endpoint_id}", daemon=True)
        self._thread.start()

    def configure(self, volume: Path | None, environ: Mapping[str, str], most: int, mount: Callable[[], object] | None) -> None:
        """Take an endpoint's settings; a worker that is started from now on has them. `mount` is called before it starts."""
        self._volume, self._environ, self._most, self._mount = volume, dict(environ), most, mount

    @property
    def running(self) -> int:
        """Return how many workers there are."""
        return int(self._worker is not None)

    @property
    def log(self) -> str:
        """Return the newest worker's output."""
        worker = self._worker
        return worker.log() if worker else ""

    def close(self) -> None:
        """End the worker, then the queue."""
        self._closing.set()
        self._thread.join(_END_TIMEOUT_S)
        self.stop()
        self.plane.close()

    def stop(self) -> None:
        """End the worker, as scaling to zero does."""
        with self._lock:
            if self._worker is not None:
                self._worker.stop(_END_TIMEOUT_S)
                self._worker = None

    def _scale(self) -> None:
        while not self._closing.wait(_LOOK_S):
            waiting = any(job.status()["status"] == "IN_QUEUE" for job in self.plane.jobs)
            if waiting and self._worker is None and self._most and self._engine is not None and self._may_start.is_set():
                self._start(self._engine)

    def _start(self, engine: Engine) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self._count += 1
            folder = self._folder / f"worker-{self._count}"
            folder.mkdir(parents=True)
            volume = self._volume or folder / "no-volume"
            worker = ProductionWorker(
                self.plane, engine, folder, volume, self._environ, pod_id=f"{self.plane.endpoint_id}-{self._count}"
            )
            if self._mount is not None:
                self._mount()
            worker.start()
            self._worker = worker


class PodMachine:
    """A Pod: its image's entry point is taken to run what `args` says, as this project's image does.

    A container whose command ends is started again, as in RunPod's Pods.
    """

    def __init__(self, args: str, environ: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.log_path = folder / "pod.log"
        self.log_path.touch()
        self._command = shlex.split(args)
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "HF_", "CIVITAI_"))},
            "HOME": str(folder),
            **environ,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self.starts = 0
        self._thread = threading.Thread(target=self._run, name="pod", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it and everything it started."""
        self._closing.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
        self._thread.join(_END_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self.starts += 1
            with self.log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", *self._command], cwd=PROJECT, env=self._environ, stdout=output, stderr=output
                )
            self._process.wait()
            self._closing.wait(_LOOK_S)

    def wait_gone(self, timeout_s: float) -> None:
        """Return once the Pod was removed; TimeoutError."""
        if not self._closing.wait(timeout_s):
            raise TimeoutError(f"the Pod was not removed within {timeout_s:g} s: {self.log_path.read_text('utf-8')[-2000:]}")
        self._thread.join(_END_TIMEOUT_S)

    def lines(self, start: int) -> list[tuple[int, str]]:
        """Return the complete lines of its log from a number on, each with its number."""
        text = self.log_path.read_text("utf-8", "replace")
        whole = text[: text.rfind("\n") + 1].splitlines()
        return list(enumerate(whole))[start:]


def now() -> str:
    """Return the time as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def no_value() -> dict[str, Any]:
    """Return a Pod's fields that mean nothing here."""
    return {
        "actions": [],
        "ports": [],
        "cudaVersion": None,
        "ssh": {"proxy": None, "direct": None},
        "template": None,
        "locked": False,
        "globalNetworking": {"enabled": False},
        "runtime": None,
        "startedAt": None,
    }
