"""The service that runs a job: an endpoint of RunPod, or a worker's local API. Network, threads."""

from __future__ import annotations

import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from client.errors import (
    AnswerUnreadable,
    EndpointUnknown,
    JobError,
    JobOverdue,
    JobUnknown,
    KeyMissing,
    ServiceError,
    ServiceFailed,
    TooManyRequests,
    Unreachable,
    UsageError,
)
from client.plain import fits_a_header
from client.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Mapping

ENDPOINTS: Final = "https://api.runpod.ai/v2"
FINAL: Final = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})

_REQUEST_TIMEOUT_S: Final = 60.0  # an answer of 10 MB takes time over a slow line
_CANCEL_TIMEOUT_S: Final = 10.0
_PATIENCE_S: Final = 60.0  # how long an endpoint may fail while a job runs
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 3.0
_SLOWER: Final = 1.3
_TICK_S: Final = 0.5
_FOREVER_S: Final = 24 * 3600.0  # RunPod itself keeps no job longer
_CAPACITY_AFTER_S: Final = 20.0
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class News:
    """A job's state. `progress` is the worker's, `queue` is RunPod's report on workers while the job waits."""

    status: str
    waited_s: float
    job_id: str | None = None
    progress: Mapping[str, Any] | None = None
    queue: str | None = None
    trouble: str | None = None


Watch = Callable[[News], None]
"""Receives the job's state, at least twice a second."""


class Service(Protocol):
    """Runs one job."""

    def run(self, job: Mapping[str, Any], watch: Watch, timeout_s: float | None) -> dict[str, Any]:
        """Return the final answer: `id`, `status`, and `output` or `error`. Raises a `ServiceError` or a `JobError`.

        `KeyboardInterrupt` may be raised at any time. `abandon` says what then happens to the job.
        """
        ...

    def abandon(self) -> str:
        """Stop the job if possible. Return what was done, as the middle of a sentence. Raises nothing."""
        ...

    def aftermath(self, error: Exception) -> str | None:
        """Return what may continue after `error` ended `run`, as a sentence. None if the error says it all."""
        ...


@dataclass(slots=True)
class Endpoint:
    """An endpoint through RunPod's API: POST run, GET status until it ends, POST cancel."""

    wire: Wire
    job_id: str | None = None
    _sending: bool = field(default=False, init=False)
    _over: bool = field(default=False, init=False)

    @classmethod
    def of(cls, endpoint_id: str, environ: Mapping[str, str], job_id: str | None = None) -> Endpoint:
        """Return the endpoint of this id, with key and base address from the environment, as in RunPod's own client.

        Raises `KeyMissing`, and `UsageError` for an invalid id or key.
        """
        name = _checked_id(endpoint_id, "--endpoint")
        job = None if job_id is None else _checked_id(job_id, "--job")
        key = environ.get("RUNPOD_API_KEY", "").strip()
        if not key:
            raise KeyMissing
        if not fits_a_header(key):
            raise UsageError(
                "RUNPOD_API_KEY has a blank, a line break or another character in it that no key has: copy it again"
            )
        base = environ.get("RUNPOD_ENDPOINT_BASE_URL") or ENDPOINTS
        return cls(Wire(f"{base.rstrip('/')}/{name}", key), job)

    def run(self, job: Mapping[str, Any], watch: Watch, timeout_s: float | None) -> dict[str, Any]:
        """Send the job, or take up the one whose id is set, and follow it."""
        began = time.monotonic()
        answer: dict[str, Any] = {}
        if self.job_id is None:
            watch(News("SENDING", 0.0))
            answer = self._submit(job, watch, began)
        return self._follow(answer, watch, began, timeout_s or _FOREVER_S)

    def _submit(self, job: Mapping[str, Any], watch: Watch, began: float) -> dict[str, Any]:
        """Send the job.

        Retry only after 429, which says that it was not accepted: after other errors there might be two jobs.
        """
        pause_s = 1.0
        self._sending = True
        while True:
            try:
                answer = self.wire.post("/run", job, _REQUEST_TIMEOUT_S)
                break
            except TooManyRequests as exc:
                waited_s = time.monotonic() - began
                if waited_s > _PATIENCE_S:
                    raise TooManyRequests(exc.where, waited_s) from None
                watch(News("SENDING", waited_s, trouble="too many requests, trying again"))
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 10.0)
        if not isinstance(answer.get("id"), str):
            raise AnswerUnreadable(self.wire.base, "no job's id")
        self.job_id, self._sending = answer["id"], False
        return answer

    def _follow(self, answer: dict[str, Any], watch: Watch, began: float, timeout_s: float) -> dict[str, Any]:
        pause_s, ok_at, queue = _FIRST_PAUSE_S, time.monotonic(), None
        trouble: str | None = None
        while answer.get("status") not in FINAL:
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                raise JobOverdue(timeout_s, self.job_id, self.abandon())
            if answer.get("status") == "IN_QUEUE" and waited_s > _CAPACITY_AFTER_S:
                queue = self._capacity() or queue
            self._wait(pause_s, lambda: self._news(answer, began, queue, trouble), watch)  # noqa: B023 - called before the next turn
            try:
                found = self.wire.get(f"/status/{self._job}", _REQUEST_TIMEOUT_S)
            except EndpointUnknown:
                self._over = True
                raise JobUnknown(str(self.job_id)) from None
            except (ServiceFailed, TooManyRequests, Unreachable) as exc:
                trouble, pause_s = "no answer, trying again", min(pause_s * 2, 10.0)
                if time.monotonic() - ok_at > _PATIENCE_S:
                    raise exc from None
                continue
            ok_at, trouble = time.monotonic(), None
            pause_s = _FIRST_PAUSE_S if _moved(answer, found) else min(pause_s * _SLOWER, _LONGEST_PAUSE_S)
            answer = found
        self._over = True
        watch(self._news(answer, began, None, None))
        return answer

    def _news(self, answer: Mapping[str, Any], began: float, queue: str | None, trouble: str | None) -> News:
        progress = answer.get("output")
        shown = progress if isinstance(progress, dict) and answer.get("status") == "IN_PROGRESS" else None
        status = str(answer.get("status") or "IN_QUEUE")
        return News(status, time.monotonic() - began, self.job_id, shown, queue if status == "IN_QUEUE" else None, trouble)

    def _wait(self, seconds: float, news: Callable[[], News], watch: Watch) -> None:
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            watch(news())
            time.sleep(min(left_s, _TICK_S))

    def _capacity(self) -> str | None:
        """Return the endpoint's report on its workers, to explain why a job waits."""
        try:
            workers = self.wire.get("/health", _CANCEL_TIMEOUT_S).get("workers")
        except ServiceError:
            return None
        if not isinstance(workers, dict):
            return None
        said = [f"{count} {kind}" for kind, count in workers.items() if isinstance(count, int) and count]
        return f"workers: {', '.join(said)}" if said else "no worker is running"

    def abandon(self) -> str:
        """Have RunPod cancel the job."""
        if self._over:
            return "it had already ended"
        if self.job_id is None:
            return (
                "it had just been sent and may run all the same: look at the endpoint's requests"
                if self._sending
                else "it was not sent"
            )
        cancel = f'curl -X POST -H "Authorization: Bearer $RUNPOD_API_KEY" {self.wire.base}/cancel/{self._job}'
        try:
            answer = self.wire.post(f"/cancel/{self._job}", None, _CANCEL_TIMEOUT_S)
        except ServiceError as exc:
            return f"it could not be cancelled and may still run ({exc}): {cancel}"
        except KeyboardInterrupt:
            return f"whether it was cancelled is not known: {cancel}"
        self._over = True
        if answer.get("status") in FINAL - {"CANCELLED"}:
            return "it had already ended"
        return "it was cancelled"

    def aftermath(self, error: Exception) -> str | None:
        """Return how to take up the job again, or that it may run although no answer came, which costs money."""
        if self._over or isinstance(error, JobError):
            return None
        if self.job_id is not None:
            return f"The job may still run: take it up again with --job {self.job_id}"
        if self._sending and not (isinstance(error, ServiceError) and not error.may_have_arrived):
            return "The request may have arrived: look at the endpoint's requests before you send it again."
        return None

    @property
    def _job(self) -> str:
        """Return the job's id as a part of a path."""
        return urllib.parse.quote(str(self.job_id), safe="")


def _checked_id(text: str, option: str) -> str:
    """Return an id as a part of a path. Raises `UsageError`, without the text: it may be a pasted key."""
    if not text.strip("/ "):
        raise UsageError(f"{option} is empty: copy the id from RunPod's console")
    if not _ID.fullmatch(text.strip("/")):
        raise UsageError(f"{option} takes an id alone, such as abc123def456: copy it from RunPod's console")
    return text.strip("/")


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return (before.get("status"), before.get("output")) != (after.get("status"), after.get("output"))


@dataclass(slots=True)
class LocalWorkerApi:
    """A worker's local API, which the SDK serves: one request and its answer. No progress, no cancelling."""

    wire: Wire
    _sent: bool = field(default=False, init=False)

    def run(self, job: Mapping[str, Any], watch: Watch, timeout_s: float | None) -> dict[str, Any]:
        """Send POST runsync in a thread, so that the wait can be shown and interrupted."""
        began = time.monotonic()
        limit_s = timeout_s or _FOREVER_S
        answers: list[dict[str, Any] | BaseException] = []
        done = threading.Event()

        def ask() -> None:
            try:
                answers.append(self.wire.post("/runsync", job, limit_s + _REQUEST_TIMEOUT_S))
            except BaseException as exc:  # noqa: BLE001 - raised in the waiting thread
                answers.append(exc)
            done.set()

        self._sent = True
        threading.Thread(target=ask, name="runsync", daemon=True).start()
        while not done.wait(_TICK_S):
            waited_s = time.monotonic() - began
            watch(News("IN_PROGRESS", waited_s))
            if waited_s > limit_s:
                raise JobOverdue(limit_s, None, self.abandon())
        self._sent = False
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]

    def abandon(self) -> str:
        """Do nothing: the SDK's local API has no way to cancel."""
        return "the worker still runs it, because its local API cannot cancel" if self._sent else "it had already ended"

    def aftermath(self, error: Exception) -> str | None:  # noqa: ARG002 - of the Service
        """Return None: nothing continues that costs money."""
        return None
