"""A ComfyUI that answers what none should: a real little server in its place, whose answers the test chooses."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from worker.engine.client import ComfyClient
from worker.errors import EngineAnswerInvalid, WorkerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    Run = Callable[[Coroutine[Any, Any, Any]], Any]

GRAPH: dict[str, Any] = {"1": {"class_type": "SaveImage", "inputs": {}}}
ODD = [
    b"",
    b"no json",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"{}",
    b'{"queue_running": 1}',
    b'{"node_errors": [1]}',
    b"[" * 100_000,
]


class OddEngine:
    """Answers each path with what `answers` has for its beginning: a status and a body."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.events: list[str] = []
        self._sockets: list[web.WebSocketResponse] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/ws":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            self._sockets.append(socket)
            async for _ in socket:
                pass
            return socket
        if request.path == "/prompt" and request.path not in self.answers:
            prompt_id = (await request.json())["prompt_id"]
            for event in self.events:
                for socket in self._sockets:
                    await socket.send_str(event.replace("PROMPT", prompt_id))
            return web.json_response({"prompt_id": prompt_id, "number": 1, "node_errors": {}})
        for start, (status, body) in self.answers.items():
            if request.path.startswith(start):
                return web.Response(status=status, body=body.replace(b"PROMPT", request.path.rpartition("/")[2].encode()))
        return web.json_response({})


@asynccontextmanager
async def odd_engine() -> AsyncIterator[tuple[OddEngine, ComfyClient]]:
    engine = OddEngine()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    client = ComfyClient(f"{host}:{port}", silence_s=0.05)
    await client.open()
    try:
        yield engine, client
    finally:
        await client.close()
        await runner.cleanup()


@pytest.mark.parametrize("body", [*ODD, b'{"error": {"type": "x"}}'])
def test_a_failure_of_comfyui_itself_is_an_engine_error_that_a_retry_may_help(body: bytes, run_async: Run) -> None:
    async def scenario() -> None:
        async with odd_engine() as (engine, client):
            engine.answers = {"/prompt": (500, body), "/queue": (200, b'{"queue_running": [], "queue_pending": []}')}
            with pytest.raises(EngineAnswerInvalid) as caught:
                await client.run(GRAPH, timeout_s=10)
            assert caught.value.retryable
            assert not client.holds_prompt

    run_async(scenario())


@pytest.mark.parametrize("path", ["/prompt", "/history", "/queue"])
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", ODD)
def test_no_answer_is_a_defect_of_the_worker(body: bytes, status: int, path: str, run_async: Run) -> None:
    async def scenario() -> None:
        async with odd_engine() as (engine, client):
            engine.answers = {path: (status, body)}
            with pytest.raises(WorkerError):
                await client.run(GRAPH, timeout_s=0.3)

    run_async(scenario())


@pytest.mark.parametrize("body", ODD)
def test_no_description_of_a_class_is_a_defect_of_the_worker(body: bytes, run_async: Run) -> None:
    async def scenario() -> None:
        async with odd_engine() as (engine, client):
            engine.answers = {"/object_info": (200, body)}
            for ask in (client.choices("A", "b"), client.object_info(["A", "B"])):
                try:
                    await ask
                except EngineAnswerInvalid as exc:
                    assert "/object_info/" in str(exc)  # noqa: PT017 - some of these bodies are only empty

    run_async(scenario())


def test_messages_of_an_odd_shape_do_not_end_the_listener(run_async: Run) -> None:
    image = {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}

    def event(kind: str, **data: Any) -> str:
        return json.dumps({"type": kind, "data": {"prompt_id": "PROMPT", **data}})

    async def scenario() -> None:
        async with odd_engine() as (engine, client):
            engine.events = [
                "[" * 100_000,
                json.dumps({"type": "executing", "data": {"prompt_id": ["x"], "node": "1"}}),
                event("executed", node={"a": 1}, output=image),
                event("progress", node="1", value=10**400, max=1),
                event("executed", node="1", output=image),
                event("execution_success"),
            ]
            listener = client._listener
            assert (await client.run(GRAPH, timeout_s=10)).outputs == {"1": image}
            assert client._listener is listener
            assert not client._deaf

    run_async(scenario())


def test_a_success_without_outputs_asks_the_history(run_async: Run) -> None:
    image = {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}
    entry = json.dumps({"PROMPT": {"outputs": {"1": image}, "status": {"status_str": "success"}}}).encode()

    async def scenario() -> None:
        async with odd_engine() as (engine, client):
            engine.events = [json.dumps({"type": "execution_success", "data": {"prompt_id": "PROMPT"}})]
            engine.answers = {"/history": (200, entry)}
            assert (await client.run(GRAPH, timeout_s=10)).outputs == {"1": image}

    run_async(scenario())
