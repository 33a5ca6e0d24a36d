"""What clients talk to at api.runpod.ai: run, runsync, status, cancel, purge-queue, health. Loopback network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Literal

from aiohttp import web

from devkit.control_plane.jobs import FINAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from devkit.control_plane.board import Board
    from devkit.control_plane.jobs import Job
    from devkit.control_plane.server import Bell

Via = Literal["run", "runsync"]

_WAIT_MS: Final = range(1_000, 300_001)
_DEFAULT_WAIT_MS: Final = "90000"


class ClientApi:
    """The routes under an endpoint's address that clients use, with any API key but none.

    `submit(fields, via)` makes a job of a request's fields. `limits_bytes`: how large a request may be.
    """

    def __init__(
        self, board: Board, bell: Bell, submit: Callable[[dict[str, Any], Via], Job], limits_bytes: dict[Via, int]
    ) -> None:
        self._board = board
        self._bell = bell
        self._submit = submit
        self._limits_bytes = limits_bytes

    def routes(self, root: str) -> list[web.RouteDef]:
        """Return the routes for the server."""
        return [
            web.post(f"{root}/run", self._run),
            web.post(f"{root}/runsync", self._runsync),
            web.get(f"{root}/status/{{job}}", self._status),
            web.post(f"{root}/cancel/{{job}}", self._cancel),
            web.post(f"{root}/purge-queue", self._purge),
            web.get(f"{root}/health", self._health),
        ]

    async def _run(self, request: web.Request) -> web.StreamResponse:
        return self._shown(await self._submitted(request, "run"))

    async def _runsync(self, request: web.Request) -> web.StreamResponse:
        wait = request.query.get("wait", _DEFAULT_WAIT_MS)
        if not wait.isdecimal() or int(wait) not in _WAIT_MS:
            raise _error(web.HTTPBadRequest, f"wait must be from {_WAIT_MS[0]} to {_WAIT_MS[-1]} ms")
        job = await self._submitted(request, "runsync")
        await self._bell.wait_for(lambda: job.status in FINAL, int(wait) / 1000)
        return self._shown(job)

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return self._shown(self._job(request))

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        self._board.stop(job, "CANCELLED")
        return web.json_response({"id": job.id, "status": job.status})

    async def _purge(self, request: web.Request) -> web.StreamResponse:
        _authorise(request)
        return web.json_response({"removed": self._board.purge(), "status": "completed"})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        _authorise(request)
        return web.json_response(self._board.health())

    async def _submitted(self, request: web.Request, via: Via) -> Job:
        _authorise(request)
        raw = await request.read()
        if len(raw) > self._limits_bytes[via]:
            raise _error(web.HTTPBadRequest, f"the request exceeds {self._limits_bytes[via]} bytes")
        try:
            fields = json.loads(raw)
        except ValueError as exc:
            raise _error(web.HTTPBadRequest, f"the request is not JSON: {exc}") from exc
        if not isinstance(fields, dict) or "input" not in fields:
            raise _error(web.HTTPBadRequest, "the request must be a JSON object with the key 'input'")
        return self._submit(fields, via)

    def _job(self, request: web.Request) -> Job:
        _authorise(request)
        try:
            return self._board.find(request.match_info["job"])
        except LookupError as exc:
            raise _error(web.HTTPNotFound, "job not found") from exc

    def _shown(self, job: Job) -> web.Response:
        return web.json_response(self._board.shown(job))


def _authorise(request: web.Request) -> None:
    """Check the key. The documentation shows it both with `Bearer` and raw."""
    if not request.headers.get("Authorization", "").removeprefix("Bearer").strip():
        raise _error(web.HTTPUnauthorized, "unauthorized")


def _error(kind: type[web.HTTPError], message: str) -> web.HTTPError:
    return kind(text=json.dumps({"error": message}), content_type="application/json")
