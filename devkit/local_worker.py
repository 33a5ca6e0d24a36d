"""A worker started as a user would start it, on the CPU engine, and spoken to over HTTP. Touches processes, disk, loopback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from devkit.engine.build import engine_args
from devkit.engine.start_files import start_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devkit.engine.build import Engine

PROJECT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0
JOB_TIMEOUT_S = 600.0
_POLL_S = 0.01
_PORTS = range(20_000, 30_000)  # Linux gives none of them to an outgoing connection or to a server that asks for any port
_claims: list[socket.socket] = []
_SPAWNED = re.compile(r"Starting ComfyUI \(pid (\d+)\)")


class WorkerExitedError(RuntimeError):
    """The worker ended before it served; the end of its log is the message."""


def free_port() -> int:
    """Return a TCP port that nobody listens on, and that no other process of the kit is given while this one lives.

    Raises `OSError` when all are taken.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        # The name of an abstract socket is free again when the process ends, however it ends.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0comfyui-volume-worker/port/{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
        else:
            _claims.append(claim)
            return port
    raise OSError(errno.EADDRINUSE, f"the ports {_PORTS.start} to {_PORTS.stop - 1} are all taken")


def engine_environ(engine: Engine, base_dir: Path, port: int) -> dict[str, str]:
    """Return the worker's settings for the CPU engine. ComfyUI keeps models, inputs and outputs under `base_dir`."""
    return {
        "COMFYUI_DIR": str(engine.comfyui_dir),
        "COMFYUI_PYTHON": str(engine.python),
        "COMFYUI_BASE_DIR": str(base_dir),
        "COMFYUI_PORT": str(port),
        "COMFY_ARGS": shlex.join(engine_args(engine)),
        "START_FILES": str(start_files(engine)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


class LocalWorker:
    """`python -m worker --rp_serve_api` as a child of ours, with its output in a log file.

    A context manager: it is started on entry and gone on exit, with everything it started.
    """

    def __init__(
        self, engine: Engine, folder: Path, volume: Path, environ: Mapping[str, str] | None = None, port: int | None = None
    ) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.log_path = folder / "worker.log"
        self.base_dir = folder / "comfyui"
        self._environ = {
            **_own_environ(),
            **engine_environ(engine, self.base_dir, free_port()),
            "VOLUME_PATH": str(volume),
            **(environ or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def comfyui_port(self) -> str:
        """Return the port of its ComfyUI."""
        return self._environ["COMFYUI_PORT"]

    @property
    def pid(self) -> int:
        """Return the worker's process id."""
        assert self._process is not None  # noqa: S101 - asked for after start
        return self._process.pid

    def arguments(self) -> list[str]:
        """Return the worker's arguments, after its own name."""
        return ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(self.port)]

    def start(self) -> None:
        """Start the process; returns at once."""
        self.base_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker", *self.arguments()],
                cwd=PROJECT,
                env=self._environ,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when it takes jobs. Raises `WorkerExitedError` or `TimeoutError`, with the log's end."""
        assert self._process is not None  # noqa: S101 - called after start
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise WorkerExitedError(f"the worker ended with status {self._process.returncode}:\n{self.log_tail()}")
            if self.serves():
                return
        raise TimeoutError(f"the worker was not ready within {timeout_s:g} s:\n{self.log_tail()}")

    def serves(self) -> bool:
        """Return whether it takes jobs by now. Frequent calls are slowed down here."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        time.sleep(_POLL_S)
        return False

    def runsync(self, job_input: object, timeout_s: float = JOB_TIMEOUT_S) -> dict[str, Any]:
        """Send one job and return RunPod's whole answer: `id`, `status`, and `output` or `error`."""
        return self._post("/runsync", {"input": job_input}, timeout_s)

    def _post(self, path: str, body: object, timeout_s: float) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def log(self) -> str:
        """Return the output of the worker and ComfyUI so far."""
        return self.log_path.read_text("utf-8", "replace")

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def comfyui_pid(self) -> int:
        """Return the process id of the last ComfyUI that it started."""
        return int(_SPAWNED.findall(self.log())[-1])

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        """Return its exit status, once it has ended by itself. Raises TimeoutError."""
        assert self._process is not None  # noqa: S101 - called after start
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the worker did not end within {timeout_s:g} s:\n{self.log_tail()}") from None

    def stop(self, timeout_s: float = 20.0) -> int:
        """End the worker as a container's end does: SIGTERM, then SIGKILL. Returns its exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(timeout_s)


def _own_environ() -> dict[str, str]:
    """Return our environment without variables that make a local worker believe it is on RunPod, or use an account."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "HF_", "CIVITAI_"))}
