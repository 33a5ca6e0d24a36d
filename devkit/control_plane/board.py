"""All jobs of the endpoint, who waits for one, and what each pod is to be told. Pure, shared by threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from devkit.control_plane.jobs import FINAL, Job, Ping, Post, PostKind, Update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PollRoute = Literal["take", "stop"]

ACCEPTED: Final = 200
REFUSED: Final = 400
TICK_S: Final = 0.05


@dataclass(slots=True, eq=False)
class Poll:
    """A request that is held open until there is something to say, or until it is `ended`."""

    pod_id: str
    route: PollRoute
    ended: bool = False


class Board:
    """The state of the endpoint. `on_change` is called after every change, in the thread that made it."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.jobs: dict[str, Job] = {}
        self.pings: list[Ping] = []
        self.retired: set[str] = set()
        self._on_change = on_change
        self._queue: deque[Job] = deque()
        self._signals: defaultdict[str, list[str]] = defaultdict(list)
        self._polls: list[Poll] = []

    @contextlib.contextmanager
    def _change(self) -> Iterator[float]:
        """Hold the lock, then tell everybody who waits; gives the time."""
        with self.changed:
            yield time.monotonic()
            self.changed.notify_all()
        self._on_change()

    def wait_until(self, happened: Callable[[], bool], timeout_s: float) -> bool:
        """Return once `happened()`, or whether it has when the time is over. Asked at every change, and every 50 ms."""
        end_s = time.monotonic() + timeout_s
        with self.changed:
            while not (found := happened()) and (left_s := end_s - time.monotonic()) > 0:
                self.changed.wait(min(left_s, TICK_S))
        return found

    # --- jobs

    def submit(self, payload: dict[str, Any], limit_bytes: int, timeout_s: float) -> Job:
        """Put a job at the queue's end. ValueError for an id that is taken."""
        with self._change() as now_s:
            if payload["id"] in self.jobs:
                raise ValueError(f"there is a job {payload['id']!r} already")
            job = self.jobs[payload["id"]] = Job(payload, limit_bytes, timeout_s, now_s)
            self._queue.append(job)
            return job

    def shown(self, job: Job) -> dict[str, Any]:
        """Return what a client sees of it now."""
        with self.changed:
            return job.to_status(time.monotonic())

    def find(self, job_id: str) -> Job:
        """Return the job of this id. Raises LookupError."""
        with self.changed:
            if job_id not in self.jobs:
                raise LookupError(f"there is no job {job_id!r}")
            return self.jobs[job_id]

    def take(self, poll: Poll, count: int) -> list[Job]:
        """Return up to `count` jobs from the front, if it is this poll's turn.

        None for a pod that RunPod would have stopped.
        """
        with self.changed:
            line = (p for p in self._polls if p.route == "take" and not p.ended and p.pod_id not in self.retired)
            if not self._queue or next(line, None) is not poll:
                return []
            with self._change() as now_s:
                jobs = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
                for job in jobs:
                    job.take(poll.pod_id, now_s)
            return jobs

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Return jobs that their worker never got to where they were."""
        with self._change():
            for job in reversed([job for job in jobs if job.status == "IN_PROGRESS"]):
                job.untake()
                self._queue.appendleft(job)

    def requeue(self, job: Job) -> None:
        """Give a job that a worker has not finished to the next one. ValueError for any other."""
        with self._change():
            if job.status != "IN_PROGRESS":
                raise ValueError(f"job {job.id!r} is {job.status}: only a job IN_PROGRESS can be given to another worker")
            job.retry()
            self._queue.appendleft(job)

    def stop(self, job: Job, status: Literal["CANCELLED", "TIMED_OUT"], delivery: int | None = None) -> None:
        """End an unfinished job and signal its worker; with a `delivery`, only while that is the one that runs."""
        with self._change() as now_s:
            if job.status in FINAL or (delivery is not None and (delivery, "IN_PROGRESS") != (job.deliveries, job.status)):
                return
            if job in self._queue:
                self._queue.remove(job)
            else:
                self._signals[job.takes[-1]].append(job.id)
            job.stop(status, now_s)

    def purge(self) -> int:
        """End every job that waits in the queue; returns how many there were."""
        with self.changed:
            waiting = list(self._queue)
            for job in waiting:
                self.stop(job, "CANCELLED")
            return len(waiting)

    # --- what workers post

    def note_post(self, job: Job, kind: PostKind, pod_id: str, size_bytes: int, answer: int) -> None:
        """Record a post that changes nothing, for whatever reason."""
        with self._change() as now_s:
            job.posts.append(Post(kind, pod_id, now_s, size_bytes, answer))

    def post_progress(self, job: Job, pod_id: str, size_bytes: int, value: Any) -> None:  # noqa: ANN401 - any JSON
        """Record a progress update."""
        with self._change() as now_s:
            job.progress(Update(value, pod_id, now_s, late=job.answers > 0))
            job.posts.append(Post("progress", pod_id, now_s, size_bytes, ACCEPTED))

    def post_result(self, job: Job, pod_id: str, size_bytes: int, body: dict[str, Any] | None) -> None:
        """Record a result. Return None for a refused one."""
        with self._change() as now_s:
            if job in self._queue:  # given up for dead, requeued, and here is its answer
                self._queue.remove(job)
            if body is None:
                job.lose(now_s)
            else:
                job.finish(body, now_s)
            if job.stop_pod:
                self.retired.add(pod_id)
            job.posts.append(Post("result", pod_id, now_s, size_bytes, REFUSED if body is None else ACCEPTED))

    def ping(self, pod_id: str, job_ids: tuple[str, ...], sdk_version: str, problem: str | None) -> None:
        """Record a heartbeat."""
        with self._change() as now_s:
            self.pings.append(Ping(pod_id, now_s, job_ids, sdk_version, problem))

    # --- what workers wait for

    @contextlib.contextmanager
    def poll(self, pod_id: str, route: PollRoute) -> Iterator[Poll]:
        """Record that a request is held."""
        poll = Poll(pod_id, route)
        with self._change():
            self._polls.append(poll)
        try:
            yield poll
        finally:
            with self._change():
                self._polls.remove(poll)

    def is_polling(self, pod_id: str) -> bool:
        """Return whether the pod waits for a job."""
        with self.changed:
            return any(poll.pod_id == pod_id and poll.route == "take" and not poll.ended for poll in self._polls)

    def end_polls(self, pod_id: str | None) -> None:
        """Answer this pod's held requests (None: every pod's) with nothing, as when their time is over."""
        with self._change():
            for poll in self._polls:
                poll.ended = poll.ended or pod_id in {None, poll.pod_id}

    def signals(self, poll: Poll) -> list[str]:
        """Return the ids of the jobs that the poll's pod must stop. Each is returned once."""
        with self.changed:
            return self._signals.pop(poll.pod_id, [])

    def signal_again(self, pod_id: str, job_ids: list[str]) -> None:
        """Note that the pod never got these."""
        with self._change():
            self._signals[pod_id] = job_ids + self._signals[pod_id]

    # --- what the endpoint looks like

    def health(self) -> dict[str, dict[str, int]]:
        """Return the answer of GET /health."""
        with self.changed:
            jobs = list(self.jobs.values())
            running = {job.takes[-1] for job in jobs if job.status == "IN_PROGRESS"}
            waiting = {poll.pod_id for poll in self._polls if poll.route == "take"}
        counted = {"completed": "COMPLETED", "failed": "FAILED", "inProgress": "IN_PROGRESS", "inQueue": "IN_QUEUE"}
        return {
            "jobs": {
                **{name: sum(job.status == status for job in jobs) for name, status in counted.items()},
                "retried": sum(job.retries for job in jobs),
            },
            "workers": {"idle": len(waiting - running), "running": len(running)},
        }
