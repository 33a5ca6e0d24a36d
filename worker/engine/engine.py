"""ComfyUI as the handler sees it: running or restarting. Touches processes and the loopback network, through its two parts.

It joins `process` (is it alive, why did it die) and `client` (the protocol). A death ends every open run with its cause, and a
new process starts at once, so that the next job finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, TypeVar

from worker.base.clock import within
from worker.engine.client import OLDEST, ComfyClient, Reconnect
from worker.engine.process import EngineProcess
from worker.errors import (
    EngineAnswerInvalid,
    EngineDied,
    EngineError,
    EngineGaveUp,
    EngineHung,
    EngineStalled,
    EngineStartFailed,
    EngineUnreachable,
    GpuFault,
    NodeFailed,
    PromptFatal,
    RunLost,
    RunTimedOut,
    StartError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from worker.engine.client import RunResult, Versions
    from worker.engine.events import NodeProgress
    from worker.engine.process import EngineCommand
    from worker.graph.graph import Graph
    from worker.settings import Settings

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A refused connection costs 0.1 ms, so frequent attempts cost nothing, and a cold start loses 10 ms on average instead of 500.
_PROBE_INTERVAL_S = 0.02
# A connection that breaks because the process died is noticed before the process is reaped.
_DEATH_NEWS_S = 1.0
# Without a finished run between them: the container, the GPU or the weights are broken, and no job would succeed here.
_DEATHS_IN_A_ROW = 3


class Engine:
    """A supervised ComfyUI. Call `start` once on the event loop, then `run` graphs, then `stop`.

    `on_gone` is called on the loop when ComfyUI is gone for good: a restart failed, or three deaths came in a row. A process
    that is replaced because a job was given up does not count. All limits use `clock`.
    """

    def __init__(
        self,
        settings: Settings,
        command: EngineCommand,
        process: EngineProcess,
        on_gone: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = f"127.0.0.1:{settings.comfyui_port}"
        self._settings = settings
        self._command = command
        self._process = process
        self._clock = clock
        self._client = self._new_client()
        self._up = asyncio.Event()
        self._failure: StartError | None = None
        self._deaths = 0
        self._replaced: EngineProcess | None = None
        self._on_gone = on_gone
        self._watcher: asyncio.Task[None] | None = None
        self._prompts_watcher: asyncio.Task[None] | None = None
        self._told: Versions | None = None

    async def start(self) -> None:
        """Wait until the spawned process answers and the websocket is open. Raises `EngineStartFailed`."""
        try:
            await self._await_ready()
        except StartError as exc:
            self._failure = exc
            self._up.set()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="comfyui-watch")

    @property
    def is_booting(self) -> bool:
        """Return whether the first ComfyUI has not answered yet."""
        return self._watcher is None and self._failure is None

    async def run(
        self,
        graph: Graph,
        *,
        timeout_s: float,
        extra_data: Mapping[str, Any] | None = None,
        targets: Collection[str] | None = None,
        on_progress: Callable[[NodeProgress], None] | None = None,
    ) -> RunResult:
        """Run a graph as `ComfyClient.run` does. Wait for a running restart.

        A ComfyUI that hangs, keeps a prompt that was given up, or lost its GPU is replaced before this returns. Also raises
        `EngineDied` with the cause and the last lines, and a `StartError` if ComfyUI will not come back.
        """
        client = await self._ready()
        process = self._process
        process.forget_lines()  # lines that it printed for another client are not for this one
        try:
            result = await client.run(
                graph, timeout_s=timeout_s, extra_data=extra_data, targets=targets, on_progress=on_progress
            )
        except NodeFailed as exc:
            if not is_gpu_fault(exc.message):
                self._deaths = 0  # it lives, and does what it is told
                raise
            await self._replace(process, f"the GPU's context is broken: {exc.message}")
            raise GpuFault(" ".join(exc.message.split())) from exc
        except RunLost as exc:
            if process.prompts_ended.done():
                raise PromptFatal(process.prompts_ended.result(), process.last_lines) from exc
            self._replaced = process
            await self._replace(process, str(exc))
            raise
        except (EngineHung, EngineStalled, EngineUnreachable, EngineDied) as exc:
            await self._give_up(process, exc)
            raise
        except (RunTimedOut, EngineAnswerInvalid, asyncio.CancelledError):
            if client.holds_prompt:
                self._replaced = process  # not its own fault
                await self._replace(process, "it does not let go of a prompt that was given up")
            raise
        self._deaths = 0
        return result

    async def _give_up(self, process: EngineProcess, error: EngineError) -> None:
        """Replace a process that lives but does not serve. Raises a more precise error if it died or will not come back."""
        if isinstance(error, EngineUnreachable):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(process.exited)), _DEATH_NEWS_S)
                raise self._failure or _died(process) from error
        if not isinstance(error, EngineDied):
            await self._replace(process, str(error))
        elif self._failure:
            raise self._failure from error

    async def _replace(self, process: EngineProcess, reason: str) -> None:
        """End this process. `_watch` starts the next one, for which the next run waits."""
        log.error("ComfyUI is replaced: %s", reason)
        if process is self._process:
            self._up.clear()
        try:
            await asyncio.to_thread(process.stop)
        except TimeoutError:
            # Stuck in a driver or on a dead mount: the kernel does not end it, and it keeps its port and its GPU.
            self._failure = EngineGaveUp(self._deaths + 1, "could not even be killed", process.last_lines)
            self._up.set()
            self._on_gone()
            raise self._failure from None

    async def choices(self, class_type: str, input_name: str) -> Sequence[str] | None:
        """Like `ComfyClient.choices`; waits, replaces and raises as `run` does if the engine does not answer."""
        return await self._answered(lambda client: client.choices(class_type, input_name))

    async def object_info(self, class_types: Collection[str]) -> dict[str, Any]:
        """Like `ComfyClient.object_info`; waits, replaces and raises as `run` does if the engine does not answer."""
        return await self._answered(lambda client: client.object_info(class_types))

    async def definitions(self, class_types: Collection[str]) -> dict[str, Any]:
        """As `ComfyClient.definitions`; waits, replaces and raises as `run` does for an engine that does not answer."""
        return await self._answered(lambda client: client.definitions(class_types))

    async def lacks(self, class_types: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Like `ComfyClient.lacks`; waits, replaces and raises as `run` does if the engine does not answer."""
        return await self._answered(lambda client: client.lacks(class_types))

    async def everything(self) -> dict[str, Any]:
        """As `ComfyClient.everything`; waits, replaces and raises as `run` does for an engine that does not answer."""
        return await self._answered(lambda client: client.everything())

    async def versions(self) -> Versions:
        """Return the engine's versions. Waits and raises as `run` does if the engine is not there."""
        return (await self._ready()).versions

    async def _answered(self, ask: Callable[[ComfyClient], Awaitable[Answer]]) -> Answer:
        client = await self._ready()
        process = self._process
        try:
            return await ask(client)
        except (EngineHung, EngineUnreachable) as exc:
            await self._give_up(process, exc)
            raise

    async def _ready(self) -> ComfyClient:
        """Return the engine's client, after a running restart. Raises a `StartError` if there will be none."""
        if self._process.exited.done() and not self._failure:
            self._up.clear()  # its death is known here before `_watch` runs
        await self._up.wait()
        if self._failure:
            raise self._failure
        return self._client

    async def stop(self) -> None:
        """End ComfyUI. Nothing restarts it."""
        watchers = [watcher for watcher in (self._watcher, self._prompts_watcher) if watcher]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        await self._client.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.to_thread(self._process.stop)

    def _new_client(self) -> ComfyClient:
        settings = self._settings
        reconnect = Reconnect(settings.websocket_reconnect_attempts, settings.websocket_reconnect_delay_s)
        return ComfyClient(self.address, reconnect, hang_s=settings.comfy_hang_timeout_s, clock=self._clock)

    async def _await_ready(self) -> None:
        exited = asyncio.wrap_future(self._process.exited)
        try:
            async with within(self._settings.comfy_start_timeout_s, self._clock):
                while not await self._client.answers():
                    if exited.done():
                        raise EngineStartFailed(f"it {exited.result()}", self._process.last_lines)
                    await asyncio.sleep(_PROBE_INTERVAL_S)
                await self._client.open()
        except TimeoutError:
            limit = f"{self._settings.comfy_start_timeout_s:g} s (COMFY_START_TIMEOUT_S)"
            raise EngineStartFailed(f"it gave no answer within {limit}", self._process.last_lines) from None
        except EngineError as exc:
            raise EngineStartFailed(str(exc), self._process.last_lines) from exc
        self._log_versions()
        self._up.set()
        watching = self._watch_prompts(self._process, self._client)
        self._prompts_watcher = asyncio.create_task(watching, name="comfyui-watch-prompts")

    def _log_versions(self) -> None:
        versions = self._client.versions
        if versions == self._told:
            return
        self._told = versions
        log.info("ComfyUI %s (editor %s)", versions.comfyui or "of unknown version", versions.frontend or "unknown")
        if versions.too_old:
            log.warning(
                "ComfyUI %s is older than %s, the oldest that this worker is tested on: take an image with a newer one",
                versions.comfyui,
                OLDEST,
            )

    async def _watch(self) -> None:
        """Turn each death into errors for its runs and start a new process, until a restart fails or too many died in a row."""
        while True:
            await asyncio.shield(asyncio.wrap_future(self._process.exited))
            self._up.clear()
            error = _died(self._process)
            replaced = self._process is self._replaced
            self._deaths += not replaced
            if self._deaths >= _DEATHS_IN_A_ROW:
                self._failure = EngineGaveUp(self._deaths, error.cause, error.last_lines)
            elif not replaced:
                log.error("ComfyUI %s; restarting it", error.cause)
            self._client.fail_all(error)
            if not self._failure:
                await self._client.close()
                await self._restart()
            if self._failure:
                # At once: a job that gets this error may be what the worker waits for before it exits.
                self._on_gone()
                log.error("%s", self._failure)
                self._up.set()
                await self._client.close()
                return
            log.info("ComfyUI is back (pid %d)", self._process.pid)

    async def _watch_prompts(self, process: EngineProcess, client: ComfyClient) -> None:
        """Replace the process if its prompt thread ends: it would still answer, but never run a prompt again."""
        ended, exited = asyncio.wrap_future(process.prompts_ended), asyncio.wrap_future(process.exited)
        await asyncio.wait((ended, exited), return_when=asyncio.FIRST_COMPLETED)
        if exited.done():
            return
        self._replaced = process  # a workflow's fault: three of them in a row say nothing about this machine
        self._up.clear()
        client.fail_all(PromptFatal(ended.result(), process.last_lines))
        with contextlib.suppress(StartError):
            await self._replace(process, f"its thread that runs workflows ended ({ended.result()})")

    async def _restart(self) -> None:
        """Start ComfyUI until it answers. A death during the start counts as one of the deaths in a row."""
        while True:
            self._client = self._new_client()
            try:
                self._process = EngineProcess.spawn(self._command)
                await self._await_ready()
            except (StartError, OSError) as exc:
                self._failure = exc if isinstance(exc, StartError) else EngineStartFailed(str(exc))
            else:
                return
            self._deaths += 1
            if not self._process.exited.done() or self._deaths >= _DEATHS_IN_A_ROW:
                return
            log.error("%s; restarting it", self._failure)
            self._failure = None
            await self._client.close()


def is_gpu_fault(message: str) -> bool:
    """Return whether the engine must be replaced: by a node's error, CUDA (or HIP) no longer works in its process.

    Such an error persists until the process ends (CUDA's runtime API, "error handling"). Out of memory does not.
    """
    return message.startswith(("CUDA error:", "HIP error:")) and "out of memory" not in message


def _died(process: EngineProcess) -> EngineDied:
    return EngineDied(str(process.exited.result()), process.last_lines)
