"""What the SDK in a worker talks to: job-take, job-stop, job-done, job-stream, ping. Loopback network."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import WeakSet

from aiohttp import web

from devkit.control_plane.board import REFUSED
from devkit.control_plane.jobs import read_post
from devkit.control_plane.server import peer_is_gone

if TYPE_CHECKING:
    from devkit.control_plane.board import Board, Poll, PollRoute
    from devkit.control_plane.faults import Book, Fault, FaultRoute
    from devkit.control_plane.jobs import Job, PostKind
    from devkit.control_plane.server import Bell

T = TypeVar("T", "Job", str)

_SILENT_S: Final = 3600.0
_NOTHING_TO_SAY: Final = 204


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and what to do when the worker never gets it."""

    response: web.Response
    undo: Callable[[], None] = lambda: None
    job_id: str = ""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WorkerApi:
    """The routes under an endpoint's address that workers use. `key` is the raw Authorization header of each request."""

    def __init__(self, board: Board, book: Book, bell: Bell, key: str, poll_s: float) -> None:
        self._board = board
        self._book = book
        self._bell = bell
        self._key = key
        self._poll_s = poll_s
        self._connections: defaultdict[str, WeakSet[asyncio.BaseTransport]] = defaultdict(WeakSet)
        self._silent: WeakSet[asyncio.BaseTransport] = WeakSet()

    def silence(self, pod_id: str) -> None:
        """Answer nothing more on the connections that a pod has now, as when a router forgot them: nobody closes them."""
        self._silent |= self._connections.pop(pod_id, WeakSet())

    def routes(self, root: str) -> list[web.RouteDef]:
        """Return the routes for the server."""
        return [
            web.get(f"{root}/job-take/{{pod}}", self._authorised(self._take)),
            web.get(f"{root}/job-take-batch/{{pod}}", self._authorised(self._take)),
            web.get(f"{root}/job-stop/{{pod}}", self._authorised(self._stop)),
            web.post(f"{root}/job-done/{{pod}}/{{job}}", self._authorised(self._done)),
            web.post(f"{root}/job-stream/{{pod}}/{{job}}", self._authorised(self._stream)),
            web.get(f"{root}/ping/{{pod}}", self._authorised(self._ping)),
        ]

    def _authorised(self, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") != self._key:
                return web.json_response({"error": "unauthorized"}, status=401)
            connection = request.transport
            assert connection is not None  # noqa: S101 - a request that comes has one
            await self._heard(connection)
            self._connections[request.match_info["pod"]].add(connection)
            response = await handler(request)
            await self._heard(connection)
            return response

        return handle

    async def _heard(self, connection: asyncio.BaseTransport) -> None:
        """Return at once, or never where the connection was silenced; the client's end ends it."""
        if connection in self._silent:
            await asyncio.Event().wait()

    # --- long polls

    async def _take(self, request: web.Request) -> web.StreamResponse:
        batch_size = int(request.query.get("batch_size", "0"))

        def attempt(poll: Poll) -> list[Job]:
            jobs = self._board.take(poll, batch_size or 1)
            for job in jobs:
                asyncio.get_running_loop().call_later(job.timeout_s, self._board.stop, job, "TIMED_OUT", job.deliveries)
            return jobs

        def show(jobs: list[Job]) -> object:
            return [job.payload for job in jobs] if batch_size else jobs[0].payload

        return await self._poll(request, "take", attempt, self._board.put_back, show)

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        def undo(job_ids: list[str]) -> None:
            self._board.signal_again(request.match_info["pod"], job_ids)

        return await self._poll(request, "stop", self._board.signals, undo, lambda job_ids: {"jobsToStop": job_ids})

    async def _poll(
        self,
        request: web.Request,
        route: PollRoute,
        attempt: Callable[[Poll], list[T]],
        undo: Callable[[list[T]], None],
        show: Callable[[list[T]], object],
    ) -> web.StreamResponse:
        """Hold a request until there is something for it, and take that back when it does not arrive."""

        async def act() -> Reply:
            found = await self._hold(request, route, attempt, undo)
            if not found:
                return Reply(web.Response(status=_NOTHING_TO_SAY))
            first = found[0]
            return Reply(web.json_response(show(found)), lambda: undo(found), first if isinstance(first, str) else first.id)

        return await self._answer(request, route, act)

    async def _hold(
        self, request: web.Request, route: PollRoute, attempt: Callable[[Poll], list[T]], undo: Callable[[list[T]], None]
    ) -> list[T]:
        """Return what `attempt` finds. Nothing if the poll's time is over, it was ended, or its worker is gone."""
        with self._board.poll(request.match_info["pod"], route) as poll:
            found: list[T] = []

            def over() -> bool:
                nonlocal found
                if poll.ended:
                    return True
                found = attempt(poll)
                # Looked at after the attempt: a worker that died before this job was submitted is found out in any case.
                if peer_is_gone(request):
                    undo(found)
                    found = []
                    return True
                return bool(found)

            await self._bell.wait_for(over, self._poll_s)
            return found

    # --- posts

    async def _done(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = read_post(raw)
        except ValueError:
            body = None
        if body is not None and body.get("status") == "IN_PROGRESS":
            value = body.get("output")
            return await self._post(request, "progress", lambda job, pod_id: self._progress(job, pod_id, len(raw), value))
        return await self._post(request, "result", lambda job, pod_id: self._result(job, pod_id, len(raw), body))

    def _progress(self, job: Job, pod_id: str, size_bytes: int, value: object) -> web.Response:
        if size_bytes > job.limit_bytes:
            self._board.note_post(job, "progress", pod_id, size_bytes, REFUSED)
            return _refused()
        self._board.post_progress(job, pod_id, size_bytes, value)
        return web.Response()

    def _result(self, job: Job, pod_id: str, size_bytes: int, body: dict[str, object] | None) -> web.Response:
        if body is None or size_bytes > job.limit_bytes:
            self._board.post_result(job, pod_id, size_bytes, None)
            return _refused()
        self._board.post_result(job, pod_id, size_bytes, body)
        return web.Response()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()

        def note(job: Job, pod_id: str) -> web.Response:
            self._board.note_post(job, "stream", pod_id, len(raw), 200)
            return web.Response()

        return await self._post(request, "stream", note)

    async def _post(
        self, request: web.Request, kind: PostKind, accept: Callable[[Job, str], web.Response]
    ) -> web.StreamResponse:
        """Answer a post whose body is here; one that a fault befalls is recorded as well."""
        pod_id, raw = request.match_info["pod"], await request.read()
        try:
            job = self._board.find(request.match_info["job"])
        except LookupError:
            return web.json_response({"error": "job not found"}, status=404)

        async def act() -> Reply:
            return Reply(accept(job, pod_id))

        return await self._answer(
            request, kind, act, lambda status: self._board.note_post(job, kind, pod_id, len(raw), status), job.id
        )

    # --- heartbeat

    async def _ping(self, request: web.Request) -> web.StreamResponse:
        query = request.query

        async def act() -> Reply:
            ids = tuple(filter(None, query.get("job_id", "").split(",")))
            problem = f"{query.get('check')}: {query.get('reason')}" if query.get("status") == "unhealthy" else None
            self._board.ping(request.match_info["pod"], ids, query.get("runpod_version", ""), problem)
            return Reply(web.Response())

        return await self._answer(request, "ping", act)

    # --- how a request ends

    async def _answer(
        self,
        request: web.Request,
        route: FaultRoute,
        act: Callable[[], Awaitable[Reply]],
        note_refusal: Callable[[int], None] = lambda _: None,
        job_id: str = "",
    ) -> web.StreamResponse:
        fault = self._book.take(route, request.match_info["pod"], job_id)
        if fault and (answer := await self._instead(fault, request, note_refusal)) is not None:
            return answer
        reply = await act()
        if fault and fault.kind == "lose":
            return _cut(request)
        if fault and fault.kind == "garble":
            return web.Response(text=fault.body.replace("$ID", reply.job_id), content_type=fault.content_type)
        try:
            if fault:
                await asyncio.sleep(fault.delay_s)
            await reply.response.prepare(request)
            await reply.response.write_eof()
        except (ConnectionError, asyncio.CancelledError) as exc:  # the worker is gone: the next one is to get what it did not
            reply.undo()
            if isinstance(exc, asyncio.CancelledError):
                raise
        return reply.response

    async def _instead(
        self, fault: Fault, request: web.Request, note_refusal: Callable[[int], None]
    ) -> web.StreamResponse | None:
        """Return the worker's answer if nothing is done, or None if everything is done."""
        match fault.kind:
            case "status":
                note_refusal(fault.status)
                if fault.body:
                    return web.Response(text=fault.body, status=fault.status, content_type=fault.content_type)
                return web.json_response({"error": "a fault that was asked for"}, status=fault.status)
            case "drop":
                note_refusal(0)
                return _cut(request)
            case "silent":
                note_refusal(0)
                await self._bell.wait_for(lambda: peer_is_gone(request), _SILENT_S)
                return _cut(request)
        return None


def _refused() -> web.Response:
    return web.json_response({"error": "json is invalid or too large"}, status=REFUSED)


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
