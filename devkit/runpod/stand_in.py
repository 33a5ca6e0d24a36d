"""The stand-in's HTTP side: REST API v2, the catalog, Pods' logs, the way to endpoints' queues. Threads, loopback network."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Self

from aiohttp import ClientSession, web

from devkit.control_plane.server import Bell, Server
from devkit.runpod.account import Account, Refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from devkit.engine.build import Engine

KEY: Final = "rpa_account"

_TITLES: Final = {400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found"}
_TICK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Call:
    """A request and what became of it. `operation` is such as `POST serverless`; `done`: it was carried out.

    Status 0: it got no answer.
    """

    operation: str
    path: str
    body: Any
    done: bool
    status: int
    answer: Any


@dataclass(slots=True)
class _Fault:
    operation: str
    status: int
    times: int
    after: int
    done: bool
    detail: str


class Cut(Exception):  # noqa: N818 - what `watch` raises to end a connection without an answer
    """The client shall get no answer."""


class RunPodStandIn:
    """Listens from construction until `close`; a context manager. `folder` is for volumes and machines.

    `watch(operation, phase)` is called with the phase "before" a request is carried out and "after", in the server's threads;
    it may raise `Cut`.
    """

    def __init__(self, folder: Path, engine: Engine | None = None) -> None:
        self.account = Account(folder, engine, lambda: self.url)
        self.watch: Callable[[str, str], object] = lambda _, __: None
        self._calls: list[Call] = []
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        routes = [
            web.route("*", "/v2/{kind}", self._rest),
            web.get("/v2/catalog/{what}", self._catalog),
            web.get("/v2/pods/{id}/logs", self._logs),
            web.get("/v2/serverless/{id}/workers", self._workers),
            web.route("*", "/v2/{kind}/{id}", self._rest),
            web.route("*", "/jobs/v2/{id}/{tail:.+}", self._jobs),
        ]
        self._server = Server(routes, Bell(), 0)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every machine, then stop listening."""
        self.account.workers_may_start.set()
        self.account.close()
        self._server.close()

    def environ(self) -> dict[str, str]:
        """Return the environment for a command of the account."""
        return {
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_API_BASE_URL": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    @property
    def calls(self) -> list[Call]:
        """Return every finished request, in order."""
        with self._lock:
            return list(self._calls)

    def operations(self, *, changing: bool = True) -> list[str]:
        """Return the operations that were carried out; with `changing` only those that may change something."""
        return [call.operation for call in self.calls if call.done and not (changing and call.operation.startswith("GET"))]

    def billed(self) -> dict[str, int]:
        """Return what exists, see `Account.billed`."""
        return self.account.billed()

    def fault(
        self, operation: str, status: int, *, times: int = 1, after: int = 0, done: bool = False, detail: str = ""
    ) -> None:
        """Answer the next `times` requests of an operation (`*`: any) with a status, after `after` others; 0: not at all.

        `done`: the request is carried out all the same.
        """
        with self._lock:
            self._faults.append(_Fault(operation, status, times, after, done, detail or f"status {status} on purpose"))

    def clear_faults(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults = []

    # --- routes

    async def _rest(self, request: web.Request) -> web.StreamResponse:
        kind, thing_id = request.match_info["kind"], request.match_info.get("id")
        if kind not in self.account.things:
            return _problem(404, "no such path")
        operation = f"{request.method} {kind}"

        def carry_out(body: Any) -> tuple[int, Any]:  # noqa: ANN401 - JSON
            account = self.account
            match request.method, thing_id:
                case "GET", None:
                    return 200, account.shown(kind)
                case "POST", None:
                    return 201, account.create(kind, body)
                case "GET", str(found):
                    return 200, account.one(kind, found)
                case "PATCH", str(found):
                    return 200, account.update(kind, found, body)
                case "DELETE", str(found):
                    account.delete(kind, found)
                    return 204, None
            raise Refused(405, "The requested method is not allowed for this path.")

        return await self._answer(request, operation, carry_out)

    async def _catalog(self, request: web.Request) -> web.StreamResponse:
        what, include = request.match_info["what"], request.query.get("include", "")

        def carry_out(_: Any) -> tuple[int, Any]:  # noqa: ANN401 - JSON
            market = self.account.market
            if what == "gpus":
                if ("AVAILABILITY" in include) != ("product" in request.query):
                    raise Refused(400, "product is required with include=AVAILABILITY, and valid only with it")
                return 200, {"gpus": market.gpus_shown(available=bool(include))}
            if what == "cpus":
                return 200, {"cpus": market.cpus_shown()}
            if what == "datacenters":
                return 200, {"dataCenters": market.centres_shown(include)}
            raise Refused(404, "no such catalog")

        return await self._answer(request, f"GET catalog/{what}", carry_out)

    async def _workers(self, request: web.Request) -> web.StreamResponse:
        endpoint_id = request.match_info["id"]
        return await self._answer(request, "GET workers", lambda _: (200, self.account.workers(endpoint_id)))

    async def _answer(
        self, request: web.Request, operation: str, carry_out: Callable[[Any], tuple[int, Any]]
    ) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else None
        fault = self._due(operation)

        def work() -> tuple[int, Any]:
            """In a thread, so that it is done and recorded even where its client is gone."""
            done, status, answer = False, 0, None
            with contextlib.suppress(Cut):
                self.watch(operation, "before")
                status, answer = (fault.status, None) if fault else (0, None)
                if fault is None or fault.done:
                    try:
                        self._authorise(request)
                        status, answer = carry_out(body)
                        done = True
                    except Refused as exc:
                        status, answer = exc.status, _problem_of(exc.status, exc.detail, exc.errors)
                if fault:
                    status, answer = fault.status, _problem_of(fault.status, fault.detail, [])
                try:
                    self.watch(operation, "after")
                except Cut:
                    status, answer = 0, None
            with self._lock:
                self._calls.append(Call(operation, request.path_qs, body, done, status, answer))
            return status, answer

        status, answer = await asyncio.to_thread(work)
        if status == 0:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError
        if status == 204:  # noqa: PLR2004 - no content
            return web.Response(status=204)
        kind = "application/json" if status < 400 else "application/problem+json"  # noqa: PLR2004 - an error
        headers = {"Retry-After": "1"} if status == 429 else {}  # noqa: PLR2004 - too many requests
        return web.Response(status=status, text=json.dumps(answer), content_type=kind, headers=headers)

    def _authorise(self, request: web.Request) -> None:
        """Allow the account's key everything. Allow a Pod's key only to show and end its own Pod."""
        key = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if key == KEY:
            return
        if key.removeprefix("rpa_") not in self.account.pods:
            raise Refused(401, "invalid API key")
        if not request.path.endswith(f"/pods/{key.removeprefix('rpa_')}"):
            raise Refused(403, "access denied")

    def _due(self, operation: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fnmatchcase(operation, fault.operation):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        """Send a Pod's log as server-sent events, each with its line's number as its id."""
        pod = self.account.pods.get(request.match_info["id"])
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return _problem(401, "invalid API key")
        if pod is None:
            return _problem(404, "resource not found")
        try:
            await asyncio.to_thread(self.watch, "GET logs", "before")
        except Cut:
            return _problem(500, "cut")
        since = request.headers.get("Last-Event-ID", "")
        number = int(since) + 1 if since.isdecimal() else 0
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while request.match_info["id"] in self.account.pods:
            for line_number, line in pod.lines(number):
                number = line_number + 1
                said = json.dumps({"source": "container", "line": line, "ts": str(line_number)})
                await response.write(f"id: {line_number}\ndata: {said}\n\n".encode())
            await asyncio.sleep(_TICK_S)
        return response

    async def _jobs(self, request: web.Request) -> web.StreamResponse:
        """Pass a client's request on to the endpoint's queue."""
        machines = self.account.endpoints.get(request.match_info["id"])
        if machines is None:
            return _problem(404, "endpoint not found")
        tail, raw = request.match_info["tail"], await request.read()
        operation = f"{request.method} {tail.partition('/')[0]}"
        fault = self._due(operation)
        try:
            await asyncio.to_thread(self.watch, operation, "before")
            if fault and not fault.done:
                return _problem(fault.status, fault.detail)
            url, key = f"{machines.plane.url}/{tail}", {"Authorization": f"Bearer {KEY}"}
            async with ClientSession() as session, session.request(request.method, url, data=raw, headers=key) as passed:
                answer = web.Response(status=passed.status, body=await passed.read(), content_type="application/json")
            await asyncio.to_thread(self.watch, operation, "after")
        except Cut:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError from None
        if operation != "GET status":
            with self._lock:
                self._calls.append(
                    Call(operation, request.path, None, answer.status == http.HTTPStatus.OK, answer.status, None)
                )
        return _problem(fault.status, fault.detail) if fault else answer


def _problem_of(status: int, detail: str, errors: list[str]) -> dict[str, Any]:
    problem: dict[str, Any] = {"title": _TITLES.get(status, "Error"), "status": status, "detail": detail}
    return {**problem, "errors": errors} if errors else problem


def _problem(status: int, detail: str) -> web.Response:
    text = json.dumps(_problem_of(status, detail, []))
    return web.Response(status=status, text=text, content_type="application/problem+json")
