"""Workers as real processes that die where a test says: `python -m devkit.fleet '<JSON>'`; `Fleet` starts and hears them.

The JSON is a list of workers. Each is forked from one process that has everything imported, so that sixteen of them cost what
one does, and says on standard output, a JSON line for each: `step` (the named points of `DownloadHooks`, and `waiting` and
`moving` from its progress, once each), then `done` or `error`; `gone` is said for it when its process has ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from worker.errors import WorkerError
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.fetch.ranges import RangeTuning
from worker.model_spec import HubFile, ModelSpec, Source, UrlSource
from worker.store.layout import Layout
from worker.store.store import DownloadHooks, LockTiming, Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import ModelProgress

PROJECT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024
FAST = {
    "heartbeat_s": 0.25,
    "stale_s": 1.5,
    "quiet_s": 0.5,
    "look_s": 0.2,
    "poll_s": 0.1,
    "attempt_s": 0.2,
    "patience_s": 60.0,
    "lone_patience_s": 0.3,
    "report_every_s": 0.2,
}
SMALL = {
    "connections": 2,
    "request_bytes": MIB,
    "smallest_bytes": MIB // 2,
    "buffer_bytes": 128 * 1024,
    "unsaved_bytes": MIB,
    "patience_s": 60.0,
    "handover_s": 0.0,
    "stuck_s": 5.0,
}

STEPS = [
    "asking",
    "locked",
    "claimed",
    "bytes",
    "fetched",
    "settled",
    "hashed",
    "replacing",
    "replaced",
    "seal_half_written",
    "sealed",
]
"""The steps of a download, in order, as `DownloadHooks` names them."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of a fleet. It kills itself at the step `die_at` of `DownloadHooks`, and stops (SIGSTOP) at `stop_at`."""

    name: str
    root: str
    endpoint: str
    source: str
    sha256: str | None = None
    folder: str = "checkpoints"
    model: str = "model.safetensors"
    die_at: str | None = None
    stop_at: str | None = None
    timing: dict[str, float] = field(default_factory=lambda: FAST)
    tuning: dict[str, float] = field(default_factory=lambda: SMALL)


def _as_json(worker: Worker) -> dict[str, Any]:
    return {name: getattr(worker, name) for name in Worker.__dataclass_fields__}


# --- in the workers' processes ------------------------------------------------------------------


def _say(worker: Worker, event: str, **more: str | int) -> None:
    line = json.dumps({"worker": worker.name, "event": event, "pid": os.getpid(), "at_s": time.monotonic(), **more})
    os.write(1, f"{line}\n".encode())


class _Deadly(DownloadHooks):
    """Says each step once, and ends or stops the process where it should."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._said: set[str] = set()

    def at(self, step: str) -> None:
        """Say it, and obey."""
        if step in self._said:
            return
        self._said.add(step)
        _say(self._worker, "step", step=step)
        if step == self._worker.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self._worker.stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)


class _Listener:
    """Says when a worker waits for another one, and when its own download gets on."""

    def __init__(self, hooks: _Deadly) -> None:
        self._hooks = hooks
        self._done_bytes: int | None = None

    def __call__(self, progress: ModelProgress) -> None:
        if progress.phase == "waiting" and progress.by:
            self._hooks.at("waiting")
        if progress.phase == "downloading":
            if self._done_bytes is not None and progress.done_bytes > self._done_bytes:
                self._hooks.at("moving")
            self._done_bytes = progress.done_bytes


def _source_of(worker: Worker) -> Source:
    if worker.source.startswith("http"):
        return UrlSource(worker.source)
    org, name, path = worker.source.split("/", 2)
    return HubFile(f"{org}/{name}", path)


def _run(worker: Worker) -> None:
    network = Network(credentials(worker.endpoint, None, None), read_timeout_s=30)
    hooks = _Deadly(worker)
    store = Store(
        Layout(Path(worker.root)),
        Hub(worker.endpoint, network),
        worker.name,
        tuning=RangeTuning(**worker.tuning),  # type: ignore[arg-type] # JSON has one kind of number
        timing=LockTiming(**worker.timing),
        hooks=hooks,
    )
    try:
        spec = ModelSpec(worker.folder, worker.model, _source_of(worker), worker.sha256)
        found = store.ensure(spec, _Listener(hooks))
    except WorkerError as exc:
        _say(worker, "error", code=exc.code, text=str(exc))
    else:
        _say(worker, "done", how=found.how, bytes_fetched=found.bytes_fetched, path=str(found.path))


def main() -> None:
    """Fork the workers that the command line describes, and wait for them."""
    faulthandler.register(signal.SIGUSR1)
    children: dict[int, Worker] = {}
    for values in json.loads(sys.argv[1]):
        worker = Worker(**values)
        child = os.fork()
        if child == 0:
            try:
                _run(worker)
            finally:
                os._exit(0)
        children[child] = worker
    for _ in range(len(children)):
        child, _status = os.waitpid(-1, 0)
        _say(children[child], "gone")


# --- in the test --------------------------------------------------------------------------------


class Fleet:
    """The workers, running; a context manager that ends them all."""

    def __init__(self, *workers: Worker) -> None:
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._running = {worker.name for worker in workers}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "devkit.fleet", json.dumps([_as_json(worker) for worker in workers])],
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        # A worker that hangs in a dead volume ends minutes after its kill, and keeps the pipe open until then.
        self._listener.join(1)

    def _listen(self) -> None:
        if self._process.stdout is None:
            raise RuntimeError("the fleet has no standard output")
        for line in self._process.stdout:
            event = json.loads(line)
            with self._changed:
                if event["event"] in {"done", "error", "gone"}:
                    self._running.discard(event["worker"])
                self.events.append(event)
                self._changed.notify_all()

    def wait_for(self, happened: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> dict[str, Any]:
        """Return the first event for which `happened` is true."""

        def found() -> dict[str, Any] | None:
            return next((event for event in self.events if happened(event)), None)

        with self._changed:
            if not self._changed.wait_for(lambda: found() or not self._running, timeout_s) or (event := found()) is None:
                raise AssertionError(f"it never happened; events: {self.events}")
            return event

    def wait_step(self, step: str, of: str | None = None) -> dict[str, Any]:
        """Return the first arrival at a step, of any worker or of the named one."""
        return self.wait_for(lambda event: event.get("step") == step and of in {None, event["worker"]})

    def wait_ended(self, timeout_s: float = 120) -> list[dict[str, Any]]:
        """Return every `done` and `error`, once all workers have ended."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, timeout_s):
                os.killpg(self._process.pid, signal.SIGUSR1)  # each says on standard error where it is
                self._changed.wait(1)
                raise AssertionError(f"the fleet did not end; events: {self.events}")
            return [event for event in self.events if event["event"] in {"done", "error"}]

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Signal one worker."""
        os.kill(pid, number)


if __name__ == "__main__":
    main()
