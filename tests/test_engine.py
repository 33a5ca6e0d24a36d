"""The client against the real engine: gaps, silence, cancellation, timeouts, death. Faults come from a proxy in between."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect

from devkit.cutting_proxy import CuttingProxy
from devkit.engine.models import make_volume
from devkit.local_worker import engine_environ, free_port
from worker.engine.client import ComfyClient, Reconnect
from worker.engine.engine import Engine, is_gpu_fault
from worker.engine.process import EngineCommand, EngineProcess
from worker.errors import (
    EngineDied,
    EngineHung,
    EngineStalled,
    EngineStartFailed,
    EngineUnreachable,
    GpuFault,
    NodeFailed,
    PromptFatal,
    RunLost,
    RunTimedOut,
    WorkflowRejected,
)
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path

    from devkit.engine.build import Engine as Kit

    Load = Callable[[str], dict[str, Any]]
    Run = Callable[[Coroutine[Any, Any, Any]], Any]

TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def settings(engine: Kit, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    base = tmp_path_factory.mktemp("engine")
    make_volume(engine, base)
    return Settings.from_env(engine_environ(engine, base, free_port()))


@pytest.fixture(scope="module")
def command(settings: Settings) -> EngineCommand:
    return EngineCommand.of(settings, dict(os.environ))


@pytest.fixture(scope="module")
def address(settings: Settings, command: EngineCommand) -> Iterator[str]:
    """A running ComfyUI of this module's own."""
    process = EngineProcess.spawn(command)
    address = f"127.0.0.1:{settings.comfyui_port}"

    async def up() -> None:
        client = ComfyClient(address)
        while not await client.answers():
            assert not process.exited.done(), process.last_lines
            await asyncio.sleep(0.05)
        await client.close()

    asyncio.run(asyncio.wait_for(up(), TIMEOUT_S))
    yield address
    process.stop()


@asynccontextmanager
async def proxied(address: str, **options: Any) -> AsyncIterator[tuple[CuttingProxy, ComfyClient]]:
    async with CuttingProxy(address) as proxy:
        client = ComfyClient(proxy.address, **options)
        await client.open()
        try:
            yield proxy, client
        finally:
            await client.close()


def tiny(colour: int) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
    }


def sampling(workflow: Load, steps: int, seed: int) -> dict[str, Any]:
    graph = workflow("text_to_image")
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    sampler["inputs"].update(steps=steps, seed=seed)
    return graph


class Started:
    """Resolves at a run's first sampling step."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def __call__(self, _: object) -> None:
        self.event.set()


def test_a_cut_websocket_loses_nothing(address: str, workflow: Load, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address) as (proxy, client):
            started = Started()
            run = asyncio.create_task(client.run(sampling(workflow, 60, 11), timeout_s=TIMEOUT_S, on_progress=started))
            await started.event.wait()
            before = proxy.connections
            proxy.cut()
            result = await run
            assert [output["images"][0]["type"] for output in result.outputs.values()] == ["output"]
            assert proxy.connections > before

    run_async(scenario())


def test_a_websocket_cut_at_every_step_still_ends_each_run_once(address: str, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address, reconnect=Reconnect(50, 0.01)) as (proxy, client):

            async def cut_for_ever(pause_s: float) -> None:
                while True:
                    proxy.cut()
                    await asyncio.sleep(pause_s)

            finished = 0
            for number in range(20):
                # On a busy machine nothing gets through between two cuts, so they become rarer until something does.
                cutter = asyncio.create_task(cut_for_ever(0.005 if finished else 0.005 * 2 ** min(number, 9)))
                try:
                    result = await client.run(tiny(1000 + number), timeout_s=TIMEOUT_S)
                    assert len(result.outputs) == 1
                    finished += 1
                except EngineUnreachable:
                    # Every one of a few attempts to hand the prompt in, or to ask for it, was cut as well.
                    continue
                finally:
                    cutter.cancel()
            result = await client.run(tiny(999), timeout_s=TIMEOUT_S)
            assert len(result.outputs) == 1
            assert finished > 0

    run_async(scenario())


def test_silence_is_broken_by_asking(address: str, workflow: Load, run_async: Run) -> None:
    """The socket stays open and nothing comes through: the history has the result all the same."""

    async def scenario() -> None:
        async with proxied(address, silence_s=0.2) as (proxy, client):
            started = Started()
            run = asyncio.create_task(client.run(sampling(workflow, 30, 12), timeout_s=TIMEOUT_S, on_progress=started))
            await started.event.wait()
            proxy.hold_websockets()
            assert len((await run).outputs) == 1

    run_async(scenario())


def test_a_websocket_that_went_deaf_is_replaced_before_the_next_run(address: str, run_async: Run) -> None:
    """A half-open socket ends late on ComfyUI's side and takes the name of the newer one with it, which then hears nothing."""

    async def scenario() -> None:
        async with proxied(address, silence_s=0.2) as (proxy, client):
            old = client._client_id
            other = await connect(f"ws://{proxy.address}/ws?clientId={old}")
            await other.close()  # ComfyUI forgets the name
            assert len((await client.run(tiny(60), timeout_s=TIMEOUT_S)).outputs) == 1, "from the history"
            result = await client.run(tiny(61), timeout_s=TIMEOUT_S)
            assert len(result.outputs) == 1
            assert set(result.node_s) == {"1", "2"}, "the websocket says again what happens"
            assert client._client_id != old
            assert proxy.connections > 1

    run_async(scenario())


def test_a_prompt_that_comfyui_forgot_is_lost_not_awaited_for_ever(address: str, workflow: Load, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address, silence_s=0.1) as (_, client), proxied(address) as (_, other):
            started = Started()
            busy = asyncio.create_task(other.run(sampling(workflow, 10000, 13), timeout_s=TIMEOUT_S, on_progress=started))
            await started.event.wait()
            waiting = asyncio.create_task(client.run(tiny(1), timeout_s=TIMEOUT_S))
            (prompt_id,) = await _until(lambda: list(client._runs))
            while not await client._place(prompt_id):
                await asyncio.sleep(0.01)
            await client._ask("POST", "/queue", {"delete": [prompt_id]})
            with pytest.raises(RunLost):
                await waiting
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)

    run_async(scenario())


async def _until(condition: Callable[[], Any]) -> Any:
    while not (value := condition()):
        await asyncio.sleep(0.005)
    return value


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_job_that_is_given_up_leaves_the_engine_idle(how: str, address: str, workflow: Load, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address) as (_, client):
            started = Started()
            timeout_s = 3.0 if how == "timeout" else TIMEOUT_S
            run = asyncio.create_task(client.run(sampling(workflow, 10000, 14), timeout_s=timeout_s, on_progress=started))
            await started.event.wait()
            if how == "cancel":
                run.cancel()
            with pytest.raises(RunTimedOut if how == "timeout" else asyncio.CancelledError):
                await run
            _, queue = await client._ask("GET", "/queue")
            assert queue == {"queue_running": [], "queue_pending": []}
            assert client._runs == {}

    run_async(scenario())


def test_a_queued_job_that_is_given_up_leaves_the_queue(address: str, workflow: Load, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address) as (_, client):
            started = Started()
            busy = asyncio.create_task(client.run(sampling(workflow, 10000, 15), timeout_s=TIMEOUT_S, on_progress=started))
            await started.event.wait()
            waiting = asyncio.create_task(client.run(tiny(2), timeout_s=TIMEOUT_S))
            await _until(lambda: len(client._runs) == 2)
            prompt_id = list(client._runs)[1]
            while not await client._place(prompt_id):
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            _, queue = await client._ask("GET", "/queue")
            assert len(queue["queue_running"]) == 1
            assert queue["queue_pending"] == []
            busy.cancel()
            with pytest.raises(asyncio.CancelledError):
                await busy

    run_async(scenario())


def test_an_engine_that_refuses_connections_is_named_and_served_again_when_it_is_back(address: str, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address, reconnect=Reconnect(2, 0.01)) as (proxy, client):
            proxy.refusing = True
            proxy.cut()
            with pytest.raises(EngineUnreachable, match="not reachable after multiple retries"):
                await client.run(tiny(3), timeout_s=TIMEOUT_S)
            proxy.refusing = False
            assert len((await client.run(tiny(4), timeout_s=TIMEOUT_S)).outputs) == 1

    run_async(scenario())


def test_runs_at_once_each_get_their_own_outputs(address: str, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address) as (_, client):
            results = await asyncio.gather(*(client.run(tiny(5000 + n), timeout_s=TIMEOUT_S) for n in range(5)))
            names = [result.outputs["2"]["images"][0]["filename"] for result in results]
            assert len(set(names)) == 5

    run_async(scenario())


def test_a_cached_graph_returns_its_files_again(address: str, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address) as (_, client):
            first = await client.run(tiny(77), timeout_s=TIMEOUT_S)
            assert await client.run(tiny(77), timeout_s=TIMEOUT_S) == first

    run_async(scenario())


def test_refusals_and_failures_are_told_apart(address: str, workflow: Load, run_async: Run) -> None:
    async def scenario() -> None:
        async with proxied(address) as (_, client):
            with pytest.raises(WorkflowRejected):
                await client.run({"1": tiny(1)["1"]}, timeout_s=TIMEOUT_S)
            graph = workflow("text_to_image")
            next(node for node in graph.values() if node["class_type"] == "EmptySD3LatentImage")["inputs"]["batch_size"] = 4096
            next(node for node in graph.values() if node["class_type"] == "EmptySD3LatentImage")["inputs"]["width"] = 16384
            next(node for node in graph.values() if node["class_type"] == "EmptySD3LatentImage")["inputs"]["height"] = 16384
            with pytest.raises(NodeFailed):
                await client.run(graph, timeout_s=TIMEOUT_S)

    run_async(scenario())


def test_a_choice_out_of_a_long_list_is_answered_with_what_is_like_it(address: str, workflow: Load, run_async: Run) -> None:
    """ComfyUI leaves lists of more than 20 choices out of its refusal."""

    async def scenario() -> None:
        async with proxied(address) as (_, client):
            graph = sampling(workflow, 1, 70)
            next(node for node in graph.values() if node["class_type"] == "KSampler")["inputs"]["sampler_name"] = "eulr"
            with pytest.raises(WorkflowRejected, match="'eulr' is no choice for 'sampler_name', which takes 'euler'"):
                await client.run(graph, timeout_s=TIMEOUT_S)

    run_async(scenario())


def test_a_killed_engine_ends_its_run_with_the_cause_and_comes_back(
    settings: Settings, command: EngineCommand, workflow: Load, run_async: Run, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    argv = tuple(str(port) if part == str(settings.comfyui_port) else part for part in command.argv)
    own = EngineCommand(argv, command.cwd, command.environ)
    own_settings = Settings.from_env({"COMFYUI_PORT": str(port)})

    async def scenario() -> None:
        engine = Engine(own_settings, own, EngineProcess.spawn(own))
        await engine.start()
        started = Started()
        run = asyncio.create_task(engine.run(sampling(workflow, 10000, 16), timeout_s=TIMEOUT_S, on_progress=started))
        await started.event.wait()
        first = engine._process.pid
        os.kill(first, signal.SIGSEGV)
        with pytest.raises(EngineDied, match="SIGSEGV") as caught:
            await run
        assert caught.value.details()
        assert len((await engine.run(tiny(6), timeout_s=TIMEOUT_S)).outputs) == 1
        assert engine._process.pid != first
        await engine.stop()
        assert engine._process.exited.done()

    with caplog.at_level(logging.INFO, "worker"):
        run_async(scenario())
    assert "ComfyUI was killed by SIGSEGV" in caplog.text
    assert "ComfyUI is back" in caplog.text


@asynccontextmanager
async def supervised(settings: Settings, command: EngineCommand, environ: dict[str, str]) -> AsyncIterator[Engine]:
    """An engine of the test's own, with these settings beside its port."""
    port = free_port()
    argv = tuple(str(port) if part == str(settings.comfyui_port) else part for part in command.argv)
    own = EngineCommand(argv, command.cwd, command.environ)
    engine = Engine(Settings.from_env({"COMFYUI_PORT": str(port), **environ}), own, EngineProcess.spawn(own))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def nested(levels: int) -> Any:
    value: Any = "end"
    for _ in range(levels):
        value = [value]
    return value


def test_a_workflow_that_ends_the_thread_that_runs_workflows_costs_one_job(
    settings: Settings, command: EngineCommand, run_async: Run
) -> None:
    """What the worker refuses, handed to ComfyUI as it is: a kilobyte that its copying does not survive."""

    async def scenario() -> None:
        async with supervised(settings, command, {}) as engine:
            for levels in (490, 900):  # dies while it runs; dies before the queue says that it runs
                deep = tiny(60)
                deep["2"]["inputs"]["more"] = nested(levels)
                process = engine._process
                with pytest.raises(PromptFatal, match="RecursionError") as caught:
                    await engine.run(deep, timeout_s=TIMEOUT_S)
                assert not caught.value.retryable
                assert engine._deaths == 0  # no fault of the engine's
                assert len((await engine.run(tiny(61), timeout_s=TIMEOUT_S)).outputs) == 1
                assert engine._process is not process

    run_async(scenario())


def test_an_engine_that_queues_and_runs_nothing_is_replaced_whatever_ended_its_thread(
    settings: Settings, command: EngineCommand, run_async: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.process._PROMPTS_ENDED", re.compile("a thread that ends without a word"))

    async def scenario() -> None:
        async with supervised(settings, command, {}) as engine:
            engine._client._silence_s = 0.5
            graph = tiny(62)
            graph["2"]["inputs"]["more"] = nested(900)
            other = ComfyClient(engine.address)
            await other._ask("POST", "/prompt", {"prompt": graph, "client_id": "another"})
            await other.close()
            with pytest.raises(EngineStalled) as caught:
                await engine.run(tiny(63), timeout_s=TIMEOUT_S)
            assert caught.value.retryable
            assert len((await engine.run(tiny(63), timeout_s=TIMEOUT_S)).outputs) == 1

    run_async(scenario())


def test_a_prompt_that_a_living_engine_lost_has_it_replaced(
    settings: Settings, command: EngineCommand, run_async: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.process._PROMPTS_ENDED", re.compile("a thread that ends without a word"))

    async def scenario() -> None:
        async with supervised(settings, command, {}) as engine:
            engine._client._silence_s = 0.5
            graph = tiny(64)
            graph["2"]["inputs"]["more"] = nested(900)
            with pytest.raises(RunLost):
                await engine.run(graph, timeout_s=TIMEOUT_S)
            assert len((await engine.run(tiny(65), timeout_s=TIMEOUT_S)).outputs) == 1

    run_async(scenario())


def test_an_engine_that_answers_no_question_is_replaced(settings: Settings, command: EngineCommand, run_async: Run) -> None:
    async def scenario() -> None:
        async with supervised(settings, command, {"COMFY_HANG_TIMEOUT_S": "2"}) as engine:
            questions: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                lambda: engine.choices("KSampler", "sampler_name"),
                lambda: engine.object_info({"KSampler", "SaveImage"}),
            ]
            for ask in questions:
                stopped = engine._process
                os.kill(stopped.pid, signal.SIGSTOP)
                with pytest.raises(EngineHung):
                    await ask()
                assert stopped.exited.done()
                assert await ask()

    run_async(scenario())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later", True),
        ("CUDA error: out of memory", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("Sizes of tensors must match", False),
    ],
)
def test_which_errors_of_a_node_mean_that_the_gpu_is_lost(message: str, *, expected: bool) -> None:
    assert is_gpu_fault(message) is expected


class FaultyClient:
    """A client whose engine's GPU just failed: what no CPU can be made to do."""

    async def run(self, *_: object, **__: object) -> None:
        raise NodeFailed("KSampler", "7", "CUDA error: an illegal memory access was encountered")


def test_after_a_gpu_fault_the_process_is_replaced(settings: Settings, tmp_path: Path, run_async: Run) -> None:
    own = EngineCommand((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path, dict(os.environ))

    async def scenario() -> None:
        process = EngineProcess.spawn(own)
        engine = Engine(settings, own, process)
        engine._client = FaultyClient()  # type: ignore[assignment]  # see there
        engine._up.set()
        with pytest.raises(GpuFault, match="illegal memory access"):
            await engine.run(tiny(1), timeout_s=TIMEOUT_S)
        assert process.exited.done()

    run_async(scenario())


class HoldingClient:
    """One whose ComfyUI does not let go of what was given up."""

    holds_prompt = True

    async def run(self, *_: object, **__: object) -> None:
        raise RunTimedOut(1.0)

    def fail_all(self, _: object) -> None:
        """No run is open."""

    async def close(self) -> None:
        """No connection is."""


def another(engine: Engine, process: EngineProcess) -> bool:
    return engine._process is not process


def test_engines_that_are_replaced_for_a_job_that_was_given_up_are_no_deaths(
    settings: Settings, tmp_path: Path, run_async: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = EngineCommand((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path, dict(os.environ))

    async def ready(self: Engine) -> None:
        self._up.set()

    monkeypatch.setattr(Engine, "_await_ready", ready)
    monkeypatch.setattr(Engine, "_new_client", lambda _: HoldingClient())
    gone: list[bool] = []

    async def scenario() -> None:
        engine = Engine(settings, own, EngineProcess.spawn(own), lambda: gone.append(True))
        await engine.start()
        for _ in range(5):
            process = engine._process
            with pytest.raises(RunTimedOut):
                await engine.run(tiny(1), timeout_s=TIMEOUT_S)
            await _until(partial(another, engine, process))
        assert not gone
        assert engine._deaths == 0
        await engine.stop()

    run_async(scenario())


def test_an_engine_that_does_not_come_back_fails_the_jobs_that_wait_for_it(tmp_path: Path, run_async: Run) -> None:
    """The first run serves, the second exits: a real little program in ComfyUI's place, told apart by a file."""
    program = tmp_path / "main.py"
    program.write_text(
        "import pathlib, sys\n"
        "from aiohttp import web\n"
        "mark = pathlib.Path(__file__).with_name('ran')\n"
        "if mark.exists(): sys.exit('second start fails')\n"
        "mark.touch()\n"
        "async def stats(request): return web.json_response({})\n"
        "async def prompt(request): import os; os._exit(7)\n"
        "async def ws(request):\n"
        "    socket = web.WebSocketResponse(); await socket.prepare(request)\n"
        "    async for _ in socket: pass\n"
        "    return socket\n"
        "app = web.Application()\n"
        "app.add_routes([web.get('/system_stats', stats), web.post('/prompt', prompt), web.get('/ws', ws)])\n"
        "web.run_app(app, host='127.0.0.1', port=int(sys.argv[sys.argv.index('--port') + 1]))\n"
    )
    settings = Settings.from_env(
        {
            "COMFYUI_DIR": str(tmp_path),
            "COMFYUI_PYTHON": sys.executable,
            "COMFYUI_PORT": str(free_port()),
            "COMFY_ARGS": "--cpu",
        }
    )
    own = EngineCommand.of(settings, dict(os.environ))

    async def scenario() -> None:
        engine = Engine(settings, own, EngineProcess.spawn(own))
        await engine.start()
        with pytest.raises(EngineDied, match="exited with code 7"):
            await engine.run(tiny(7), timeout_s=TIMEOUT_S)
        with pytest.raises(EngineStartFailed, match="exited with code 1") as caught:
            await engine.run(tiny(8), timeout_s=TIMEOUT_S)
        assert caught.value.details() == ["second start fails"]
        await engine.stop()

    run_async(scenario())
