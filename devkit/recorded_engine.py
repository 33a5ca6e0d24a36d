"""A stand-in for ComfyUI that repeats what a real one said: answers and websocket events. Touches the loopback network.

A recording is one file for a version of ComfyUI. It has the answer of /system_stats, and exchanges by name: the body of a
`POST /prompt` (without the client's id), its status and answer. Of a prompt that was taken, it also has the events in order and
the entry in /history. Only repeated progress events, tracebacks and the current inputs of a failed node are left out.

Where versions differ in what they take, this one refuses what the strictest refuses: a prompt id that is no canonical UUID.
"""

from __future__ import annotations

import json
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

_INTERRUPTED = "execution_interrupted"


@dataclass(frozen=True, slots=True)
class Recording:
    """What one version of ComfyUI said."""

    version: str
    system_stats: Mapping[str, Any]
    exchanges: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Return the recording in a file."""
        return cls(**json.loads(path.read_text("utf-8")))


@asynccontextmanager
async def recorded_engine(recording: Recording, exchange: str) -> AsyncIterator[RecordedEngine]:
    """Serve one exchange of a recording on a free port of the loopback for as long as the context lasts."""
    engine = RecordedEngine(recording, recording.exchanges[exchange])
    runner = web.AppRunner(engine.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine.address = "{}:{}".format(*runner.addresses[0][:2])
    try:
        yield engine
    finally:
        await runner.cleanup()


@dataclass(slots=True)
class RecordedEngine:
    """One exchange being served. `taken` has the bodies of each `POST /prompt`; `silent` sends no event over the websocket."""

    recording: Recording
    exchange: Mapping[str, Any]
    address: str = ""
    silent: bool = False
    taken: list[Mapping[str, Any]] = field(default_factory=list)
    _sockets: dict[str, web.WebSocketResponse] = field(default_factory=dict)
    _ended: bool = False

    def app(self) -> web.Application:
        """Return the routes that a client of ComfyUI uses."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/system_stats", self._system_stats),
                web.get("/ws", self._websocket),
                web.post("/prompt", self._prompt),
                web.get("/history/{id}", self._history),
                web.post("/history", self._accepted),
                web.get("/queue", self._queue),
                web.post("/queue", self._accepted),
                web.post("/interrupt", self._interrupt),
            ]
        )
        return app

    async def _system_stats(self, _: web.Request) -> web.Response:
        return web.json_response(self.recording.system_stats)

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._sockets[request.query["clientId"]] = socket
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
        return socket

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.taken.append(body)
        if not _canonical(body.get("prompt_id")):
            return web.json_response(_refusal_of_the_id(), status=400)
        status, answer = self.exchange["status"], self.exchange["answer"]
        if status == web.HTTPOk.status_code:
            answer = {**answer, "prompt_id": body["prompt_id"]}
            await self._send(body["client_id"], _until_interrupted(self._events()))
            self._ended = _INTERRUPTED not in {event["type"] for event in self._events()}
        return web.json_response(answer, status=status)

    async def _history(self, request: web.Request) -> web.Response:
        there = self._ended and self.taken and request.match_info["id"] == self.taken[-1]["prompt_id"]
        return web.json_response({request.match_info["id"]: self.exchange["history"]} if there else {})

    async def _queue(self, _: web.Request) -> web.Response:
        running = [[0, body["prompt_id"], body["prompt"], {}, []] for body in self.taken[-1:] if not self._ended]
        return web.json_response({"queue_running": running, "queue_pending": []})

    async def _interrupt(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not self._ended and self.taken and body.get("prompt_id") == self.taken[-1]["prompt_id"]:
            self._ended = True
            events = self._events()
            await self._send(self.taken[-1]["client_id"], events[len(_until_interrupted(events)) :])
        return web.Response()

    async def _accepted(self, request: web.Request) -> web.Response:
        await request.json()
        return web.Response()

    def _events(self) -> Sequence[Mapping[str, Any]]:
        """Return the recorded events, of the prompt that was taken last."""
        recorded = json.dumps(self.exchange.get("events") or [])
        return json.loads(recorded.replace(self.exchange["answer"]["prompt_id"], self.taken[-1]["prompt_id"]))  # type: ignore[no-any-return]  # as it was recorded

    async def _send(self, client_id: str, events: Sequence[Mapping[str, Any]]) -> None:
        for event in () if self.silent else events:
            await self._sockets[client_id].send_str(json.dumps(event))


def _until_interrupted(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    kinds = [event["type"] for event in events]
    return events[: kinds.index(_INTERRUPTED)] if _INTERRUPTED in kinds else events


def _canonical(prompt_id: object) -> bool:
    try:
        return isinstance(prompt_id, str) and str(uuid.UUID(prompt_id)) == prompt_id
    except ValueError:
        return False


def _refusal_of_the_id() -> dict[str, Any]:
    return {
        "error": {
            "type": "invalid_prompt_id",
            "message": "prompt_id must be a valid UUID",
            "details": "",
            "extra_info": {},
        },
        "node_errors": {},
    }
