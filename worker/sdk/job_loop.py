"""Control when the RunPod SDK takes a job, and shut down without losing one. Touches the network, through the SDK.

The SDK's loop (`rp_scale.JobScaler`, read in 1.12.0) costs jobs or GPU time, so a subclass takes its place. The SDK's
sleeps up to a second between two jobs, and up to a tenth before a job; on SIGTERM it waits up to 90 s for both of its polls,
and drops a job that arrives on them; it drops a stop signal that comes before a job's task exists; it does not resend a result
whose connection breaks; it drops a job whose JSON it cannot read, or whose fields it cannot keep. See docs/decisions/005.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import re
import signal
import time
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
from runpod.http_client import get_auth_header
from runpod.serverless.modules import rp_scale
from runpod.serverless.modules.rp_http import send_result
from runpod.serverless.modules.rp_job import _job_get_url, get_stop_signals, handle_job

from worker.base.clock import within
from worker.base.retry import TRANSIENT, pause_s
from worker.errors import InputNotJson, InternalError, ResultRefused
from worker.sdk.progress_posts import ProgressPosts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from worker.base.clock import RunningClock
    from worker.boot import Worker
    from worker.errors import WorkerError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_POLL_S = 90.0
# Results may be sent more slowly than they are made, so their number needs a limit.
_AT_MOST = 8
# A job that is on its way when the worker leaves: RunPod's answer takes a round trip, and an idle worker's second costs little.
_ARRIVAL_S = 1.5
# A job may contain 10 MB.
_BODY_S = 30.0
# No poll and no result is under way for longer, in time that the worker runs.
_OLD_S = 600.0
# The wait for results that are on their way when another one asks for a new worker.
_SETTLE_S = 120.0
_PAUSES_S = (0.5, 1.0, 2.0, 5.0)
# RunPod holds a poll until there is a job. If it answers an empty poll sooner than this, a pause follows.
_HELD_S = 1.0
_IDLE_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)
# A result is worth the GPU time it took.
_POST_PATIENCE_S = 60.0
# For each attempt: a connection may be accepted and then be silent. A result may have 20 MB.
_ATTEMPT_S = 20.0
_SLOWEST_BYTES_PER_S = 1_000_000
_POST_PAUSES_S = (0.3, 5.0)  # the first, and the longest
# The result itself is wrong. 404 means a job that RunPod has given up.
_REFUSED = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY})
# The fields that the worker and the SDK need. The SDK turns every field into an attribute, and fails on names such as `self`.
_FIELDS = ("id", "input", "s3Config", "webhook", "batchId")
_NO_LIMIT = aiohttp.ClientTimeout(total=None)


def _sdk_connections(**options: Any) -> aiohttp.ClientSession:  # noqa: ANN401 - aiohttp's own
    """Return the job loop's connections: the SDK's, without its limit of ten minutes, which would count a freeze."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=get_auth_header(), timeout=_NO_LIMIT, **options
    )


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK has no types
    """The SDK's loop in production mode. `take_the_place` has the SDK run this one.

    Guarantees: the next job is requested as soon as the engine is free, while the last result is still being sent. After
    SIGTERM no job is taken, accepted jobs are answered, then the loop ends. RunPod is asked to replace the worker with the last
    result, after the others have arrived.

    After a freeze (`clock`) RunPod is polled over new connections at once, because the old ones may be silently dead. A job
    that still arrives on an old poll also counts.

    A worker that `has_failed` before its first poll makes that poll all the same: a job that waits is told why.
    """

    def __init__(self, config: dict[str, Any], clock: RunningClock, has_failed: Callable[[], bool] = lambda: False) -> None:
        super().__init__(config)
        self._clock = clock
        self._has_failed = has_failed
        self._runs = False
        self._has_polled = False
        self._loop: asyncio.AbstractEventLoop
        self._session: aiohttp.ClientSession | None = None
        self._posts: aiohttp.ClientSession | None = None
        self._own: aiohttp.ClientSession | None = None
        self._closing: dict[aiohttp.ClientSession, asyncio.Task[None]] = {}
        self._at_engine: str | None = None
        self._polls = 0
        self._lingering: set[asyncio.Task[None]] = set()
        self._thawed = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._taken: dict[str, asyncio.Task[None]] = {}
        self._without_result: set[str] = set()
        self._replacing = False
        self._last: str | None = None
        self._moved = asyncio.Event()
        self._free = asyncio.Event()
        self._leaving = asyncio.Event()
        self._gone = asyncio.Event()
        # What the SDK's own `monitor_stop_signals` and `handle_job` call.
        self.stop_signals_fetcher, self.stop_signals_fetcher_timeout = self._stops, None
        self.jobs_handler = self._handle

    def take_the_place(self) -> None:
        """Have `runpod.serverless.start`, given this loop's own config, run this loop in place of a `JobScaler`."""
        rp_scale.JobScaler = lambda _: self

    @property
    def session(self) -> aiohttp.ClientSession:
        """Return the connections to RunPod, with its key, while jobs are taken."""
        assert self._session is not None  # noqa: S101 - a job came over it
        return self._session

    async def run(self) -> None:
        """Take jobs and do them until the worker leaves."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.leave)
        self._clock.on_thaw(self._tell_thaw)
        self._free.set()
        self._runs = True  # first: who fails from now on calls `leave_soon`, and who failed before is seen below
        if not self.is_alive() or self._has_failed():  # the signal came before its handler
            self.leave()
        await super().run()

    async def run_jobs(self, _: aiohttp.ClientSession) -> None:
        """Return when the worker is gone. The SDK looks for jobs here ten times a second; ours start as they come in."""
        await self._gone.wait()

    def _tell_thaw(self, _: float) -> None:
        with contextlib.suppress(RuntimeError):  # the SDK's loop has ended
            self._loop.call_soon_threadsafe(self._connect_anew)

    def _connect_anew(self) -> None:
        """Send everything from now on over new connections. Data on the old ones may still arrive."""
        for session in (self._posts, self._own):
            if session:
                self._closing[session] = asyncio.create_task(self._close_later(session), name="close-old-connections")
        self._posts, self._own = None, _sdk_connections()
        self._session = self._own
        self._thawed.set()
        self._thawed = asyncio.Event()

    async def _close_later(self, session: aiohttp.ClientSession) -> None:
        """Close connections from before a freeze once nothing can be under way on them."""
        with contextlib.suppress(TimeoutError):
            async with within(_OLD_S, self._clock):
                await self._gone.wait()
        await session.close()
        del self._closing[session]

    def engine_free(self, job_id: str) -> None:
        """Note that the engine is done with this job, so that the next may be requested. May be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the SDK's loop has ended
            self._loop.call_soon_threadsafe(self._release, job_id)

    def _release(self, job_id: str) -> None:
        if self._at_engine == job_id:
            self._at_engine = None
        if self._at_engine is None and len(self._taken) < _AT_MOST:
            self._free.set()

    def leave(self) -> None:
        """Take no more jobs, answer those that were taken, then end the SDK's loop.

        Call it on its thread; repeated calls do nothing.
        """
        if self._leaving.is_set():
            return
        log.info("leaving: %s", f"{_jobs(len(self._taken))} to finish first" if self._taken else "no job to finish")
        self._leaving.set()
        self._end_if_done()

    def leave_soon(self) -> None:
        """Leave because the worker has failed. From any thread, also before the loop runs."""
        if self._runs:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.leave)

    async def is_last(self, job_id: str, *, asks: bool) -> bool:
        """Return whether this job's result must ask RunPod for another worker. Called on the SDK's loop.

        After a result asks for replacement, no more jobs are taken; the last result delivered carries `refresh_worker`. RunPod
        may stop the pod as soon as it is asked, and with it everything that is under way. So results on their way are waited
        for, and a job that still works will ask in place of this one. If the wait ends without success, nobody asks, and the
        worker leaves all the same.
        """
        self._without_result.discard(job_id)
        if asks:
            self._replacing = True
            self.leave()
        if not self._replacing:
            return False
        self._last = job_id
        try:
            async with within(_SETTLE_S, self._clock):
                while self._polls or self._taken.keys() - {job_id}:
                    if self._without_result or self._last != job_id:
                        return False
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            log.warning(
                "another result is still being sent after %g s: exiting without asking RunPod for a new worker", _SETTLE_S
            )
            return False
        return True

    def _end_if_done(self) -> None:
        # The worker must not exit while a poll has no answer: the answer may be a job.
        if self._leaving.is_set() and not (self._taken or self._polls or self._ending or self._owes_a_poll):
            self._ending = self._loop.create_task(self._end())

    @property
    def _owes_a_poll(self) -> bool:
        return self._has_failed() and not self._has_polled

    async def _end(self) -> None:
        for session in (*self._closing, self._own, self._posts):
            if session:
                await session.close()
        self._gone.set()
        self.kill_worker()

    async def get_jobs(self, session: aiohttp.ClientSession) -> None:
        """Take jobs, one whenever the engine is free, and start each at once. Return when the worker is gone.

        After refused or broken polls, and after polls that RunPod does not hold, it polls more and more slowly. The SDK would
        not pause.
        """
        self._session, failures, idle = self._session or session, 0, 0
        # The debt is looked at last: the worker may fail, and leave, while this waits.
        while await _ends_before(self._leaving, self._free.wait()) or self._owes_a_poll:
            self._polls += 1
            self._has_polled = True
            began_s = self._loop.time()
            try:
                jobs = await self._ask()
                for job in jobs:
                    await self._begin_or_answer(self.session, job)
                idle = 0 if jobs or self._loop.time() - began_s >= _HELD_S else idle + 1
                failures = 0
            except Exception as exc:  # noqa: BLE001 - whatever it is, without jobs there is nothing else to do
                log.warning("cannot poll RunPod for a job (%s)", str(exc) or type(exc).__name__)
                failures += 1
            finally:
                self._poll_over()
            for count, pauses_s in ((failures, _PAUSES_S), (idle, _IDLE_PAUSES_S)):
                if count:
                    await _ends_before(self._leaving, asyncio.sleep(pauses_s[min(count, len(pauses_s)) - 1]))
        self._end_if_done()
        await self._gone.wait()

    def _poll_over(self) -> None:
        self._polls -= 1
        self._moved.set()
        self._end_if_done()

    async def _in_time(self, poll: Awaitable[Answer]) -> Answer:
        """Return what a poll brings. Raises `TimeoutError` after the time that it may take.

        A freeze does not count: what came meanwhile may wait in the socket.
        """
        async with within(_POLL_S, self._clock):
            return await poll

    async def _ask(self) -> list[dict[str, Any]]:
        """Return the result of one poll: a job, or none. If the worker leaves meanwhile, a job that is already on its way.

        After a freeze return none at once. A job that later arrives on the poll is handled like any other.
        """
        line = _Poll(self.session)
        poll = asyncio.create_task(self._in_time(line.poll()))
        thawed = self._thawed
        await _ends_first(poll, self._leaving, thawed)
        if thawed.is_set() and not (poll.done() or self._leaving.is_set()):
            self._polls += 1
            task = asyncio.create_task(self._linger(poll, line), name="old-poll")
            self._lingering.add(task)
            task.add_done_callback(self._lingering.discard)
            return []
        return await self._brought(poll, line)

    async def _brought(self, poll: asyncio.Task[bytes], line: _Poll) -> list[dict[str, Any]]:
        try:
            body = await poll if poll.done() else await _rest_of_poll(poll, line)
        except TimeoutError:
            return []
        return await self._read(body) if body else []

    async def _linger(self, poll: asyncio.Task[bytes], line: _Poll) -> None:
        """Take what an old poll brings until it ends: a job that RunPod has handed out would be lost with it."""
        try:
            await _ends_first(poll, self._leaving)
            for job in await self._brought(poll, line):
                await self._begin_or_answer(self.session, job)
        except Exception as exc:  # noqa: BLE001 - after a freeze this is expected, and there is a new poll
            log.debug("the poll from before the freeze ended (%s)", str(exc) or type(exc).__name__)
        finally:
            self._poll_over()

    async def _read(self, body: bytes) -> list[dict[str, Any]]:
        """Return the job in a poll's answer. Answer one whose JSON Python cannot read, if it has an id. Raises `ValueError`."""
        try:
            job = json.loads(body)
        except (ValueError, RecursionError) as exc:
            job_id = await asyncio.to_thread(_id_in, body)
            if job_id is None:
                raise
            await self._answer(job_id, InputNotJson(str(exc).partition(";")[0]))
            return []
        if not isinstance(job, dict) or not isinstance(job.get("id"), str) or not job["id"]:
            raise ValueError("its answer is no job with an id")
        return [{"input": None, **{name: job[name] for name in _FIELDS if name in job}}]

    async def _begin_or_answer(self, session: aiohttp.ClientSession, job: dict[str, Any]) -> None:
        try:
            await self._begin(session, job)
        except Exception:
            log.exception("job %s could not be started", job["id"])
            self._over(job)
            await self._answer(job["id"], InternalError())

    async def _answer(self, job_id: str, error: WorkerError) -> None:
        """Post an error as the result of a job that no handler has. Log failures."""
        log.warning("job %s: failed before it began: %s [%s]", job_id, error, error.code)
        result = {"error": str(error), "output": {"code": error.code, "retryable": error.retryable}}
        try:
            await send_result(self._posting(), result, {"id": job_id})
        except Exception:
            log.exception("job %s: its result could not be sent", job_id)

    async def _begin(self, session: aiohttp.ClientSession, job: dict[str, Any]) -> None:
        """Start a job as the SDK's `run_jobs` does."""
        job_id = job["id"]
        if earlier := self._taken.get(job_id):
            if not earlier.cancelling():
                log.warning("job %s arrived again while it is running; it runs once", job_id)
                return
            # It was stopped, and posts nothing: the one that came is another attempt.
            await asyncio.wait({earlier})
            await asyncio.sleep(0)  # its callbacks, which record it as running, come first
        self._free.clear()
        self._at_engine = job_id
        self._without_result.add(job_id)
        await self.jobs_queue.put(job)  # `handle_job` reports it as done
        self.jobs_queue.get_nowait()
        self.job_progress.add(job)
        task = self._taken[job_id] = self.jobs_tasks[job_id] = asyncio.create_task(self.handle_job(session, job))
        task.add_done_callback(lambda _: self._over(job))

    def _over(self, job: dict[str, Any]) -> None:
        """Note that a job has ended. A task that is cancelled before its first step runs none of its code, no `finally`."""
        job_id = job["id"]
        if self.jobs_tasks.pop(job_id, None):
            self.jobs_queue.task_done()
            self.job_progress.remove(job)
        self._taken.pop(job_id, None)
        self._without_result.discard(job_id)
        self._moved.set()
        self._release(job_id)
        self._end_if_done()

    async def _stops(self, session: aiohttp.ClientSession) -> list[str]:
        """Return the jobs that RunPod wants stopped.

        Raises TimeoutError when the worker is gone, and the SDK asks again or ends.
        """
        self._session = self._session or session
        poll = asyncio.create_task(self._in_time(get_stop_signals(self._session)))
        if not await _ends_first(poll, self._gone, self._thawed):
            poll.cancel()
            raise TimeoutError
        ids: list[str] = await poll
        return ids

    async def _handle(self, _: aiohttp.ClientSession, config: Mapping[str, Any], job: dict[str, Any]) -> None:
        """Run one job as the SDK does, and send its result until it arrives."""
        try:
            await handle_job(self._posting(), config, job)
        except (aiohttp.ClientError, OSError):
            log.exception("job %s: its result could not be sent", job["id"])
        except Exception:
            log.exception("job %s: ended without a result", job["id"])
            await self._answer(job["id"], InternalError())

    def _posting(self) -> aiohttp.ClientSession:
        """Return the connections for results. They are kept, so that no result waits for a handshake."""
        if self._posts is None:
            self._posts = _sdk_connections(middlewares=(say_refused, partial(send_again, clock=self._clock)))
        return self._posts


async def say_refused(
    request: aiohttp.ClientRequest, send: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
) -> aiohttp.ClientResponse:
    """For the job loop, send a small result if RunPod refuses one: otherwise the client would see a job that never ends."""
    response = await send(request)
    if response.status not in _REFUSED:
        return response
    error = ResultRefused(response.status)
    log.error("%s [%s]", error, error.code)
    response.release()
    told = {"error": str(error), "output": {"code": error.code, "retryable": error.retryable}}
    await request.update_body(json.dumps(told).encode())
    return await send(request)


async def send_again(
    request: aiohttp.ClientRequest,
    send: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]],
    clock: Callable[[], float] = time.monotonic,
) -> aiohttp.ClientResponse:
    """For the job loop, send a request until its answer is not a transient failure, for at most a minute."""
    deadline = clock() + _POST_PATIENCE_S
    for attempt in itertools.count(1):
        last = clock() > deadline
        try:
            async with within(_ATTEMPT_S + int(request.headers.get("Content-Length", 0)) / _SLOWEST_BYTES_PER_S, clock):
                response = await send(request)
                await response.read()  # the answer's body may be what does not arrive
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as exc:
            if last:
                raise
            reason = str(exc) or type(exc).__name__
        else:
            if last or not (response.status in TRANSIENT or response.status >= HTTPStatus.INTERNAL_SERVER_ERROR):
                return response
            reason = f"status {response.status}"
            response.release()
        log.warning("RunPod did not take a result (%s); sending it again", reason)
        await asyncio.sleep(pause_s(attempt, *_POST_PAUSES_S))
    raise AssertionError("the deadline ends the loop")


async def _ends_first(task: asyncio.Task[Any], *events: asyncio.Event) -> bool:
    """For the job loop, return True when the task is done, or False when one of the events is set. The task continues."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait((*waiting, task), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        task.cancel()
        raise
    finally:
        for each in waiting:
            each.cancel()
    return task.done()


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


async def _ends_before(event: asyncio.Event, coro: Coroutine[Any, Any, Any]) -> bool:
    """For the job loop, return whether `coro` ends before the event is set. Otherwise cancel it."""
    task = asyncio.create_task(coro)
    if event.is_set() or not await _ends_first(task, event) or event.is_set():
        task.cancel()
        return False
    return True


class _Poll:
    """One poll of the job loop for a job. It remembers whether its answer has begun to arrive."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.answering = False

    async def poll(self) -> bytes:
        """Return the answer's body, empty if there is no job. Raises `aiohttp.ClientError`; `ValueError` if it is no JSON."""
        async with self._session.get(_job_get_url(1), timeout=_NO_LIMIT) as response:
            self.answering = True
            # 400: RunPod's answer to a worker that FlashBoot put aside, says the SDK.
            if response.status in {HTTPStatus.NO_CONTENT, HTTPStatus.BAD_REQUEST}:
                return b""
            response.raise_for_status()
            body = await response.read()
            if body and response.content_type != "application/json":
                raise ValueError(f"it answered with {response.content_type}")
            return body


# Brackets, and texts with the following colon if they are keys.
_TOKENS = re.compile(rb'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]]', re.DOTALL)


def _id_in(body: bytes) -> str | None:
    """Return the `id` of a polled job whose JSON contains something that Python does not read, or None."""
    depth, is_id = 0, False
    for token in _TOKENS.finditer(body):
        text = token[0]
        if text in b"{[":
            depth += 1
        elif text in b"}]":
            depth -= 1
        elif is_id and depth == 1:
            return token[1].decode("ascii", "replace")
        is_id = depth == 1 and token[1] == b"id" and token[2] is not None
    return None


async def _rest_of_poll(poll: asyncio.Task[bytes], line: _Poll) -> bytes:
    """For the job loop, return what a poll still brings: take an answer that is on its way, then cancel the poll."""
    await asyncio.wait((poll,), timeout=_ARRIVAL_S)
    if line.answering:
        await asyncio.wait((poll,), timeout=_BODY_S)
    if poll.done():
        return await poll
    poll.cancel()
    return b""


def job_config(worker: Worker) -> dict[str, Any]:
    """Return the SDK's config for a job loop that takes RunPod's jobs and posts their progress."""

    async def handle(job: dict[str, Any]) -> dict[str, Any]:
        async with ProgressPosts(job, lambda: loop.session) as posts:
            engine_free = partial(loop.engine_free, job["id"])
            try:
                result = await worker.loop.run(worker.handler.handle(job, posts.tell, engine_free))
            except asyncio.CancelledError:
                if worker.handler.refreshes:
                    loop.leave()
                raise
        if await loop.is_last(job["id"], asks=result.pop("refresh_worker", False)):
            result["refresh_worker"] = True  # the SDK turns it into `stopPod`
        return result

    made = {"handler": handle}
    loop = JobLoop(made, worker.clock, lambda: worker.failed)
    loop.take_the_place()
    worker.leave = loop.leave_soon
    return made
