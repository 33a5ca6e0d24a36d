"""One job's life as RunPod tells it: what is posted about it, and what a client then sees. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
PostKind = Literal["progress", "result", "stream"]

FINAL: Final = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
_STOPPED: Final = frozenset({"CANCELLED", "TIMED_OUT"})
_NOTHING: Final = object()


@dataclass(frozen=True, slots=True)
class Post:
    """One POST of a worker about a job. `answer`: the HTTP status it got, 0 where the connection was cut instead."""

    kind: PostKind
    pod_id: str
    at_s: float
    size_bytes: int
    answer: int


@dataclass(frozen=True, slots=True)
class Update:
    """One progress update that arrived; `late`: after a result, which leaves the job IN_PROGRESS for ever."""

    value: Any
    pod_id: str
    at_s: float
    late: bool


@dataclass(frozen=True, slots=True)
class Ping:
    """One heartbeat. `problem`: the fitness check that failed and why, when the worker reports itself unhealthy."""

    pod_id: str
    at_s: float
    job_ids: tuple[str, ...]
    sdk_version: str
    problem: str | None


def read_post(raw: bytes) -> dict[str, Any]:
    """Parse a posted body. Raises ValueError unless it is a JSON object (NaN is no JSON) whose `error` is a text."""
    body = json.loads(raw, parse_constant=_refuse)
    if isinstance(body, dict) and isinstance(body.get("error", ""), str):
        return body
    raise ValueError("the body must be a JSON object, its error a string")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Job:
    """A job and everything that happened to it. Whoever changes it holds the board's lock.

    Times are of the monotonic clock. `takes`: the pods that got it; `deliveries` counts those that were gone by then as well.
    `lost`: a result was refused as too large or malformed; clients see COMPLETED without output. `stop_pod`: a result asked for
    the worker to be replaced.
    """

    def __init__(self, payload: dict[str, Any], limit_bytes: int, timeout_s: float, now_s: float) -> None:
        self.id: str = payload["id"]
        self.payload = payload
        self.limit_bytes = limit_bytes
        self.timeout_s = timeout_s
        self.status: Status = "IN_QUEUE"
        self.takes: list[str] = []
        self.deliveries = 0
        self.posts: list[Post] = []
        self.updates: list[Update] = []
        self.retries = 0
        self.lost = False
        self.stop_pod = False
        self._output: Any = _NOTHING
        self._error: str | None = None
        self._submitted_s = now_s
        self._taken_s: float | None = None
        self._ended_s: float | None = None

    @property
    def answers(self) -> int:
        """Return how many results arrived, including lost ones. Those answered 5xx do not count: the SDK sends them again."""
        return sum(post.kind == "result" and post.answer in {200, 400} for post in self.posts)

    def take(self, pod_id: str, now_s: float) -> None:
        """Give it to a worker."""
        self.status = "IN_PROGRESS"
        self.takes.append(pod_id)
        self.deliveries += 1
        self._taken_s = now_s

    def untake(self) -> None:
        """Take it back: the worker never got it."""
        self.takes.pop()
        self._wait_again()

    def retry(self) -> None:
        """Queue it again: its worker is gone."""
        self.retries += 1
        self._output = _NOTHING
        self._wait_again()

    def _wait_again(self) -> None:
        self.status = "IN_QUEUE"
        self._taken_s = None

    def progress(self, update: Update) -> None:
        """Show this as the output of a running job. After the result it sets the job to IN_PROGRESS (runpod-python #250)."""
        self.updates.append(update)
        if self.status not in _STOPPED and self.status != "IN_QUEUE":  # queued anew: the update is a former worker's
            self.status = "IN_PROGRESS"
            self._output = update.value

    def finish(self, body: dict[str, Any], now_s: float) -> None:
        """Record the result: FAILED if it has an error, with the rest as output."""
        self.stop_pod = self.stop_pod or bool(body.get("stopPod"))
        if self.status not in _STOPPED:
            self.status = "FAILED" if body.get("error") else "COMPLETED"
            self._output = body.get("output", _NOTHING)
            self._error = body.get("error") or None
            self._ended_s = now_s

    def lose(self, now_s: float) -> None:
        """Refuse the result: the client is told COMPLETED, and nothing else (runpod-python #309)."""
        self.lost = True
        self.finish({}, now_s)

    def stop(self, status: Literal["CANCELLED", "TIMED_OUT"], now_s: float) -> None:
        """End it for the client or the clock. Later posts of the worker change nothing."""
        self.status = status
        self._output = _NOTHING
        self._ended_s = now_s

    def to_status(self, now_s: float) -> dict[str, Any]:
        """Return the answer of GET /status. The times are in milliseconds."""
        shown: dict[str, Any] = {"id": self.id, "status": self.status}
        if self._taken_s is not None:
            shown["delayTime"] = round((self._taken_s - self._submitted_s) * 1000)
            shown["executionTime"] = round(((self._ended_s or now_s) - self._taken_s) * 1000)
            shown["workerId"] = self.takes[-1]
        if self._output is not _NOTHING:
            shown["output"] = self._output
        if self._error is not None:
            shown["error"] = self._error
        return shown
