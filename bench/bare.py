"""The references: ComfyUI alone, and the RunPod SDK alone, each spoken to as leanly as can be. Touches processes, loopback."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, Self

from websockets.sync.client import connect

from devkit.engine.build import engine_args
from devkit.local_worker import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from devkit.engine.build import Engine

_START_TIMEOUT_S = 120.0
_POLL_S = 0.01
_KEPT_ALIVE_S = 4.0
"""uvicorn closes a connection that was idle for 5 s."""

_SDK_ALONE = """
import base64, os, runpod
pictures = [base64.b64encode(os.urandom(size)).decode() for size in {sizes}]
async def handler(job):
    return {{"images": [{{"filename": "a.png", "type": "base64", "data": data}} for data in pictures]}}
if __name__ == "__main__":
    runpod.serverless.start({{"handler": handler}})
"""

_WORKER_COMFYUI = """
import sys
sys.path[:0] = [{tree!r}, {tree!r} + "/src"]
import runpod, handler
handler.COMFY_HOST = {address!r}
if __name__ == "__main__":
    runpod.serverless.start({{"handler": handler.handler}})
"""


class Endpoint:
    """One kept-alive HTTP connection that posts JSON and reads the answer."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._connect()

    def _connect(self) -> None:
        self._connection.close()
        self._connection.connect()
        assert self._connection.sock is not None  # noqa: S101 - just connected
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._used_at = time.monotonic()

    def post(self, path: str, body: object) -> Any:  # noqa: ANN401 - JSON
        """Post and decode; raises for anything but 200."""
        if time.monotonic() - self._used_at > _KEPT_ALIVE_S:
            self._connect()
        self._connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = self._connection.getresponse()
        content = response.read()
        self._used_at = time.monotonic()
        if response.status != http.client.OK:
            raise RuntimeError(f"{path} answered {response.status}: {content[:500]!r}")
        return json.loads(content)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when something accepts connections there."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(_POLL_S)
        else:
            return
    raise RuntimeError(f"nothing serves on port {port}; exit status {process.poll()}")


class BareEngine:
    """ComfyUI without a worker; `base_dir/models` holds the weights themselves. `args` in place of the CPU engine's flags."""

    def __init__(self, engine: Engine, base_dir: Path, args: Sequence[str] | None = None) -> None:
        base_dir.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._client_id = uuid.uuid4().hex
        argv = [engine.python, "main.py", "--listen", "127.0.0.1", "--port", str(self._port), "--disable-auto-launch"]
        self._process = subprocess.Popen(
            [*map(str, argv), "--base-directory", str(base_dir), *(engine_args(engine) if args is None else args)],
            cwd=engine.comfyui_dir,
            env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        try:
            wait_for_port(self._port, self._process)
        except BaseException:
            self.__exit__()
            raise
        self._socket = connect(f"ws://127.0.0.1:{self._port}/ws?clientId={self._client_id}", max_size=None, compression=None)
        self._http = Endpoint(self._port)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, graph: object) -> None:
        """Queue the graph and return when the websocket says that the prompt has left the queue."""
        answer = self._http.post("/prompt", {"prompt": graph, "client_id": self._client_id})
        for message in self._socket:
            if isinstance(message, str) and '"executing"' in message:
                data = json.loads(message)["data"]
                if data["node"] is None and data["prompt_id"] == answer["prompt_id"]:
                    return


class BareSdk:
    """The SDK's local API in front of a handler that returns at once, with pictures of these sizes in bytes."""

    def __init__(self, sizes: Sequence[int] = (), code: str | None = None) -> None:
        port = free_port()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                code or _SDK_ALONE.format(sizes=list(sizes)),
                "--rp_serve_api",
                "--rp_api_host",
                "127.0.0.1",
                "--rp_api_port",
                str(port),
            ],
            env={**environ, "RUNPOD_LOG_LEVEL": "INFO"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._port = port

    def __enter__(self) -> Self:
        wait_for_port(self._port, self._process)
        self._http = Endpoint(self._port)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, job_input: object) -> Any:  # noqa: ANN401 - JSON
        """Run one `runsync`."""
        return self._http.post("/runsync", {"input": job_input})


class WorkerComfyui(BareSdk):
    """The handler of a checkout of runpod-workers/worker-comfyui, behind the same SDK, in front of a ComfyUI that runs."""

    def __init__(self, tree: Path, address: str) -> None:
        super().__init__(code=_WORKER_COMFYUI.format(tree=str(tree), address=address))
