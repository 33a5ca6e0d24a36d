"""Talk to one running ComfyUI over HTTP and a websocket: queue a graph, follow it, learn how it ended.

Touches the loopback network.

One websocket stays open for as long as the process lives. It is opened before the first prompt, so that no event of a run can
be missed. After a gap or silence /history and /queue are asked instead. Everything runs on one event loop.

HTTP goes through the connections of httpcore2, which httpx2 is made of. No cookie, redirect, login or proxy passes between two
programs of one container, and httpx2 takes 0.5 ms of processor time for them with each request
(docs/decisions/006-http-clients.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import httpcore2
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from worker.base.asyncio_transport import AsyncioBackend
from worker.base.clock import within
from worker.comfyui_data import is_older
from worker.engine.events import Executing, NodeProgress, RunFinished, RunTracker, SentPicture, decode_event, sent_png
from worker.errors import (
    EngineAnswerInvalid,
    EngineError,
    EngineHung,
    EngineStalled,
    EngineUnreachable,
    RequestError,
    RunTimedOut,
    WorkerError,
)
from worker.graph.graph import last_nodes
from worker.graph.rejection import combo_options, dropped_outputs, rejection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from websockets.asyncio.client import ClientConnection

    from worker.engine.events import Event, Outputs
    from worker.graph.graph import Graph

log = logging.getLogger(__name__)

_HTTP_TIMEOUT_S = 30.0
_PROBE_TIMEOUT_S = 5.0
# ComfyUI closes an idle connection after 75 s (aiohttp's default). Closing first avoids a request on a closing connection.
_KEEPALIVE_S = 60.0
_JSON = [(b"Content-Type", b"application/json")]
# ComfyUI loads weights and runs nodes beside its server thread, so seconds of silence are normal. A question costs 1 ms.
_SILENCE_S = 5.0
# Between two prompts ComfyUI unloads models and collects garbage for seconds. After this many silences its thread is gone.
_STALLED_SILENCES = 2
# A node that sends nothing, and a server thread that does not get the interpreter, look like this for a while as well.
_HANG_S = 180.0
# Sampling stops within a step, and a step of a large video model takes seconds.
_WITHDRAW_S = 15.0
_LEAVING_POLL_S = 0.02
# One request for each run would cost a millisecond each. This many graphs take little memory.
_REMEMBERED = 20
_CLOSE_S = 0.5
# Each open question is a connection, and a workflow may name thousands of classes.
_QUESTIONS_AT_ONCE = 16
OLDEST = "0.3.75"
"""The oldest ComfyUI that the worker is tested on."""


@dataclass(frozen=True, slots=True)
class Versions:
    """What the client's ComfyUI reports: its own version, and that of the editor it requires. None if it does not say."""

    comfyui: str | None = None
    frontend: str | None = None

    @classmethod
    def of(cls, system_stats: object) -> Versions:
        """Return the versions in an answer of /system_stats. An answer of another form has none."""
        system = system_stats.get("system") if isinstance(system_stats, dict) else None
        told = system if isinstance(system, dict) else {}
        comfyui, frontend = (told.get(key) for key in ("comfyui_version", "required_frontend_version"))
        return cls(str(comfyui) if comfyui else None, str(frontend) if frontend else None)

    @property
    def too_old(self) -> bool:
        """Return whether this ComfyUI is older than the oldest one that the worker is tested on."""
        version = self.comfyui or ""
        return version.removeprefix("v")[:1].isdigit() and is_older(version, OLDEST)


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run that a client followed: its outputs by node id, and a sentence for each output that ComfyUI refused.

    `cached` are the nodes that did not run again, `silent` the output nodes without outputs, with their classes. `queued_s` is
    the time until its first node began, `node_s` the time of each node that ran. Both are measured here, without gaps.
    """

    outputs: Outputs
    dropped: tuple[str, ...] = ()
    cached: frozenset[str] = field(default=frozenset(), compare=False)
    silent: Mapping[str, str] = field(default_factory=dict, compare=False)
    queued_s: float = field(default=0.0, compare=False)
    node_s: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class _Run:
    tracker: RunTracker
    graph: Graph
    on_progress: Callable[[NodeProgress], None] | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    began_at: float = field(default_factory=time.monotonic)
    nodes: list[tuple[str | None, float]] = field(default_factory=list)
    stalled_at: float | None = None

    def result(self, finished: RunFinished, dropped: tuple[str, ...]) -> RunResult:
        """Return the run's result, with its times."""
        outputs, cached = finished.outputs, finished.cached
        if self.tracker.lost_pictures:
            lost = self.tracker.lost_pictures
            dropped += (f"Too many pictures came through ComfyUI's websocket, {lost} of them are missing: use SaveImage.",)
        ran = cached.union(node_id for node_id, _ in self.nodes if node_id is not None)
        last = last_nodes(self.graph)
        silent = {node_id: name for node_id, name in last.items() if node_id in ran and not outputs.get(node_id)}
        if not self.nodes:
            return RunResult(outputs, dropped, cached, silent)
        ended = [*(at for _, at in self.nodes[1:]), time.monotonic()]
        node_s: dict[str, float] = {}
        for (node_id, at), end in zip(self.nodes, ended, strict=True):
            if node_id is not None:
                node_s[node_id] = node_s.get(node_id, 0.0) + end - at
        return RunResult(outputs, dropped, cached, silent, self.nodes[0][1] - self.began_at, node_s)

    def sends(self, node_id: str) -> bool:
        """Return whether pictures of this node are outputs: nothing else could be done with them."""
        return not last_nodes(self.graph).keys().isdisjoint({node_id, node_id.partition(".")[0]})


@dataclass(frozen=True, slots=True)
class Reconnect:
    """How often the client reconnects a lost websocket, and the pause between attempts. The first is immediate."""

    attempts: int = 5
    delay_s: float = 3.0


class ComfyClient:
    """The client of one ComfyUI process. Call `open` before use, and `close` when the process is gone.

    It raises a `RequestError` if ComfyUI refuses the graph, and an `EngineError` if ComfyUI fails.
    """

    def __init__(
        self,
        address: str,
        reconnect: Reconnect = Reconnect(),
        silence_s: float = _SILENCE_S,
        hang_s: float = _HANG_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.holds_prompt = False
        """Whether a prompt that was given up is still in ComfyUI: a node that looks for no interruption."""
        self.versions = Versions()
        """What this ComfyUI is; known once it has answered."""
        self._client_id = uuid.uuid4().hex
        self._deaf = False
        self._reconnect = reconnect
        self._silence_s = silence_s
        self._hang_s = hang_s
        self._clock = clock
        self._heard_at = clock()
        self._runs: dict[str, _Run] = {}
        self._at: tuple[str, str | None] = ("", None)
        self._ended: list[str] = []
        self._forgetting: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None] | None = None
        self._connections: list[httpcore2.AsyncHTTP11Connection] = []
        self._closed = False
        # Classes come with ComfyUI's start, and this client goes with that ComfyUI.
        self._classes: dict[str, Any] = {}

    async def answers(self) -> bool:
        """Return whether ComfyUI answers requests. Once it does, `versions` is set."""
        try:
            status, said = await self._ask("GET", "/system_stats", limit_s=_PROBE_TIMEOUT_S)
        except EngineUnreachable:
            return False
        if status == HTTPStatus.OK:
            self.versions = Versions.of(said)
        return status == HTTPStatus.OK

    async def open(self) -> None:
        """Connect the websocket. Raises `EngineUnreachable`."""
        try:
            socket = await self._connect()
        except (OSError, WebSocketException) as exc:
            raise EngineUnreachable(self.address, _request_failure(exc)) from exc
        self._listener = asyncio.create_task(self._listen(socket), name="comfyui-websocket")

    async def _reopen(self) -> None:
        """Open a websocket under a name that is new to ComfyUI, while no run is open.

        ComfyUI keeps one socket for a name. If an earlier one ends late, as a half-open one does, ComfyUI forgets the newer one
        with it (server.py, `self.sockets.pop(sid)`): that one stays open but receives nothing any more.
        """
        if self._listener:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._client_id, self._deaf = uuid.uuid4().hex, False
        await self.open()

    async def close(self) -> None:
        """Close every connection. Open runs end as unreachable."""
        self.fail_all(EngineUnreachable(self.address, "the connection was closed"))
        if self._listener:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._closed = True
        for connection in self._connections:
            await connection.aclose()

    async def choices(self, class_type: str, input_name: str) -> Sequence[str] | None:
        """Return the current choices of a node's input: for a loader, the files it sees. None if there is no list."""
        info = await self.object_info([class_type])
        with _read_answer(f"GET /object_info/{class_type}", HTTPStatus.OK):
            inputs = (info.get(class_type) or {}).get("input") or {}
            return next((combo_options(group[input_name]) for group in inputs.values() if input_name in group), None)

    async def object_info(self, class_types: Collection[str]) -> dict[str, Any]:
        """Return ComfyUI's definitions of these node classes, without those that it does not have."""
        few = asyncio.Semaphore(_QUESTIONS_AT_ONCE)

        async def ask(name: str) -> dict[str, Any]:
            async with few:
                status, body = await self._wait_for("GET", f"/object_info/{quote(name, safe='', errors='replace')}")
            with _read_answer(f"GET /object_info/{name}", status):
                return dict(body or {})

        answers = await asyncio.gather(*(ask(name) for name in class_types))
        found = {name: entry for answer in answers for name, entry in answer.items()}
        self._classes |= found
        return found

    async def definitions(self, class_types: Collection[str]) -> dict[str, Any]:
        """Return the definitions of these node classes, as ComfyUI gave them first: their lists of files may be old."""
        if asked := set(class_types) - self._classes.keys():
            await self.object_info(asked)
        return {name: self._classes[name] for name in class_types if name in self._classes}

    async def lacks(self, class_types: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the node classes that ComfyUI does not have, and those that it replaces by others.

        It asks once for each class that exists, not for each job.
        """
        asked = set(class_types) - self._classes.keys()
        if not asked or not (lacking := asked - (await self.object_info(asked)).keys()):
            return frozenset(), frozenset()
        status, body = await self._wait_for("GET", "/node_replacements")  # older ones have none
        with _read_answer("GET /node_replacements", status):
            entries = body if status == HTTPStatus.OK else {}
            successors = {name: entries[name][0]["new_node_id"] for name in lacking if entries.get(name)}
        there = await self.object_info(set(successors.values()))
        replaced = frozenset(name for name, successor in successors.items() if successor in there)
        return frozenset(lacking) - replaced, replaced

    async def everything(self) -> dict[str, Any]:
        """Return all that ComfyUI says of its node classes and of itself, for `KeptDefinitions`."""
        status, classes = await self._wait_for("GET", "/object_info")
        with _read_answer("GET /object_info", status):
            found = dict(classes)
        status, body = await self._wait_for("GET", "/node_replacements")  # older ones have none
        replacements = dict(body) if status == HTTPStatus.OK and isinstance(body, dict) else {}
        versions = {"comfyui": self.versions.comfyui, "frontend": self.versions.frontend}
        return {"versions": versions, "classes": found, "replacements": replacements}

    def fail_all(self, error: EngineError) -> None:
        """End every open run with `error`: the engine is gone, or cannot be reached any more."""
        for run in self._runs.values():
            run.tracker.end(error)
            run.news.set()

    async def run(
        self,
        graph: Graph,
        *,
        timeout_s: float,
        extra_data: Mapping[str, Any] | None = None,
        targets: Collection[str] | None = None,
        on_progress: Callable[[NodeProgress], None] | None = None,
    ) -> RunResult:
        """Queue a graph and wait for its end. `targets` are the output nodes to run; None means all of them.

        On cancellation and after `timeout_s` (`RunTimedOut`) the prompt is removed from ComfyUI before this returns, so that
        the next job finds it idle. If ComfyUI does not stop it, `holds_prompt` is true from then on. Raises `EngineHung` if
        ComfyUI neither sends events nor answers.
        """
        if self._listener is None or self._listener.done() or (self._deaf and not self._runs):
            await self._reopen()
        # Newer releases of ComfyUI (0.33.0, for one) refuse any id but a UUID in canonical form: lower case, with hyphens.
        tracker = RunTracker(str(uuid.uuid4()))
        run = self._runs[tracker.prompt_id] = _Run(tracker, graph, on_progress)
        more = {"extra_data": extra_data or {}} | ({} if targets is None else {"partial_execution_targets": sorted(targets)})
        queueing = asyncio.create_task(self._queue(graph, tracker, more))
        try:
            async with within(timeout_s, self._clock):
                dropped = await asyncio.shield(queueing)
                await self._follow(run)
        except TimeoutError:
            await self._withdraw(run, queueing)
            raise RunTimedOut(timeout_s) from None
        except EngineUnreachable as exc:
            # The run may have ended its engine before POST /prompt was answered.
            raise tracker.outcome if isinstance(tracker.outcome, EngineError) else exc from None
        except (EngineAnswerInvalid, asyncio.CancelledError):
            await self._withdraw(run, queueing)
            raise
        finally:
            del self._runs[tracker.prompt_id]
            self._forget_later(tracker.prompt_id)
        if isinstance(tracker.outcome, RunFinished):
            return run.result(tracker.outcome, dropped)
        assert tracker.outcome is not None  # noqa: S101 - _follow returns at the outcome
        raise tracker.outcome

    def _forget_later(self, prompt_id: str) -> None:
        """Make ComfyUI forget an ended run: it keeps the last 10,000 graphs with all their inputs in memory."""
        self._ended.append(prompt_id)
        if len(self._ended) >= _REMEMBERED and (self._forgetting is None or self._forgetting.done()):
            ended, self._ended = self._ended, []
            self._forgetting = asyncio.create_task(self._forget(ended), name="comfyui-forget")

    async def _forget(self, prompt_ids: Sequence[str]) -> None:
        with contextlib.suppress(EngineUnreachable):  # it will be restarted, and forgets everything
            await self._ask("POST", "/history", {"delete": prompt_ids})

    async def _queue(self, graph: Graph, tracker: RunTracker, more: Mapping[str, Any]) -> tuple[str, ...]:
        """Send the graph once. If the answer is lost, ask ComfyUI whether it has the prompt before sending it again."""
        prompt_id = tracker.prompt_id
        prompt = {"prompt": graph, "client_id": self._client_id, "prompt_id": prompt_id, **more}
        for last in (False, False, True):
            try:
                # Validation lists folders, which may take time on a cold volume. Only a hang is a hang.
                status, body = await self._wait_for("POST", "/prompt", prompt)
            except EngineUnreachable:
                if last:
                    raise
                if await self._history(prompt_id) is not None or await self._place(prompt_id):
                    tracker.gap()
                    return ()
                continue
            with _read_answer("POST /prompt", status):
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise EngineAnswerInvalid("POST /prompt", status)
                if status == HTTPStatus.OK and not body.get("node_errors"):
                    return ()
                await self._add_choices(body)
                if status == HTTPStatus.OK:
                    return await asyncio.to_thread(dropped_outputs, graph, body)
                raise await asyncio.to_thread(rejection, graph, body, self.versions.comfyui)
        raise AssertionError("the last attempt returns or raises")

    async def _add_choices(self, refusal: object) -> None:
        """Add an input's choices if ComfyUI left them out of its refusal: lists of more than 20 choices."""
        reports = (refusal.get("node_errors") if isinstance(refusal, dict) else None) or {}
        asked: dict[tuple[str, str], Sequence[str] | None] = {}
        for report in reports.values():
            for error in report.get("errors") or ():
                extra = error.get("extra_info") or {}
                key = str(report.get("class_type")), str(extra.get("input_name"))
                if error.get("type") != "value_not_in_list" or combo_options(extra.get("input_config")) is not None:
                    continue
                if key not in asked and len(asked) < _QUESTIONS_AT_ONCE:
                    asked[key] = await self.choices(*key)
                if choices := asked.get(key):
                    extra["input_config"] = [list(choices)]

    async def _follow(self, run: _Run) -> None:
        """Return when the run's tracker has its outcome."""
        while run.tracker.outcome is None:
            try:
                async with asyncio.timeout(self._silence_s):
                    await run.news.wait()
            except TimeoutError:
                await self._consult_history(run)
                self._deaf = self._deaf or run.tracker.outcome is not None  # it ended, and no event said so
            run.news.clear()
            if run.tracker.wants_history:
                await self._consult_history(run)

    async def _consult_history(self, run: _Run) -> None:
        """Ask ComfyUI about the prompt. If ComfyUI is silent, the caller asks again.

        Raises `EngineStalled` if the prompt waits repeatedly while nothing runs: the thread that runs prompts is gone.
        """
        tracker = run.tracker
        try:
            entry = await self._history(tracker.prompt_id)
            place = None if entry is not None else await self._place(tracker.prompt_id)
            if entry is None and place is None:
                # It may have moved from the queue to the history between the two questions.
                entry = await self._history(tracker.prompt_id)
        except EngineUnreachable as exc:
            silent_s = self._clock() - self._heard_at
            if silent_s > self._hang_s:
                raise EngineHung(silent_s) from exc
            log.warning("%s", exc)
            return
        with _read_answer(f"GET /history/{tracker.prompt_id}", HTTPStatus.OK):
            tracker.reconcile(entry, queued=place is not None)
        now = self._clock()
        if place != "stalled":
            run.stalled_at = None
        elif run.stalled_at is None:
            run.stalled_at = now
        elif now - run.stalled_at >= _STALLED_SILENCES * self._silence_s:
            raise EngineStalled(now - run.stalled_at)

    async def _history(self, prompt_id: str) -> Mapping[str, Any] | None:
        status, body = await self._ask("GET", f"/history/{prompt_id}")
        with _read_answer(f"GET /history/{prompt_id}", status):
            return body.get(prompt_id)  # type: ignore[no-any-return]  # ComfyUI's JSON

    async def _place(self, prompt_id: str) -> Literal["running", "waiting", "stalled"] | None:
        """Return the prompt's place in ComfyUI's queue, or None. `stalled`: it waits, and nothing runs."""
        status, body = await self._ask("GET", "/queue")
        with _read_answer("GET /queue", status):
            running = [item[1] for item in body["queue_running"]]
            if prompt_id in running:
                return "running"
            if any(item[1] == prompt_id for item in body["queue_pending"]):
                return "waiting" if running else "stalled"
            return None

    async def _withdraw(self, run: _Run, queueing: asyncio.Task[tuple[str, ...]]) -> None:
        """Remove the prompt from ComfyUI, running or queued, and wait until ComfyUI has stopped it."""
        prompt_id = run.tracker.prompt_id
        self.holds_prompt = True
        with contextlib.suppress(WorkerError, TimeoutError):
            async with within(_WITHDRAW_S, self._clock):
                try:
                    await queueing  # a prompt that is still being sent would be queued after it was deleted
                except RequestError:
                    self.holds_prompt = False  # refused
                    return
                except EngineAnswerInvalid as exc:
                    log.debug("%s; is it queued?", exc)
                await self._ask("POST", "/queue", {"delete": [prompt_id]})
                await self._ask("POST", "/interrupt", {"prompt_id": prompt_id})
                # The event of the interruption comes before the prompt has left the queue.
                while await self._place(prompt_id):  # noqa: ASYNC110 - ComfyUI sends no event when a prompt leaves its queue
                    await asyncio.sleep(_LEAVING_POLL_S)
                self.holds_prompt = False

    async def _ask(self, method: str, path: str, body: object = None, limit_s: float = _HTTP_TIMEOUT_S) -> tuple[int, Any]:
        """Return status and decoded JSON. The latter is None for other bodies, as in ComfyUI's answer to its own defects."""
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        limit_s = min(limit_s, self._hang_s)
        if self._closed:
            raise EngineUnreachable(self.address, "the connection was closed")
        send = partial(self._send, method, path, data)
        try:
            async with within(limit_s, self._clock):  # ours, by a clock that stops during a freeze
                try:
                    response = await send()
                except (httpcore2.ReadError, httpcore2.WriteError, httpcore2.ProtocolError):
                    if method != "GET":
                        raise
                    response = await send()  # a kept connection may close as it is used
        except (httpcore2.NetworkError, httpcore2.ProtocolError, TimeoutError) as exc:
            raise EngineUnreachable(self.address, f"{_request_failure(exc)} on {method} {path}") from exc
        self._heard_at = self._clock()
        return response.status, _json_or_none(response.content)

    async def _send(self, method: str, path: str, data: bytes | None) -> httpcore2.Response:
        """Send a request on a connection that is idle, or on a new one."""
        for each in self._connections:
            if each.is_idle() and each.has_expired():
                await each.aclose()
        self._connections = [each for each in self._connections if not each.is_closed()]
        host, _, port = self.address.partition(":")
        url = httpcore2.URL(scheme=b"http", host=host.encode(), port=int(port), target=path.encode())
        connection = next((each for each in self._connections if each.is_idle()), None)
        if connection is None:
            stream = await AsyncioBackend().connect_tcp(host, int(port))
            connection = httpcore2.AsyncHTTP11Connection(url.origin, stream, _KEEPALIVE_S)
            self._connections.append(connection)
        return await connection.request(method, url, headers=_JSON, content=data)

    async def _wait_for(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Like `_ask`, for as long as a busy ComfyUI may take. Raises `EngineHung` after that."""
        try:
            return await self._ask(method, path, body, self._hang_s)
        except EngineUnreachable as exc:
            if isinstance(exc.__cause__, TimeoutError):
                raise EngineHung(self._hang_s) from exc
            raise

    async def _connect(self) -> ClientConnection:
        """Open a websocket. Raises `OSError` (`TimeoutError` is one) or `WebSocketException`."""
        # No heartbeat: a node that holds the interpreter for a minute is busy, not gone, and a dead process closes the socket.
        # No compression and no size limit: both ends are on this machine, and previews can be large.
        async with within(self._hang_s, self._clock):
            return await connect(
                f"ws://{self.address}/ws?clientId={self._client_id}",
                proxy=None,
                compression=None,
                max_size=None,
                ping_interval=None,
                open_timeout=None,  # the limit is ours, by a clock that stops during a freeze
                close_timeout=_CLOSE_S,  # a dead peer does not answer
            )

    async def _listen(self, socket: ClientConnection) -> None:
        while True:
            try:
                with contextlib.suppress(ConnectionClosed):  # in whatever way it ends
                    async for message in socket:
                        self._heard_at = self._clock()
                        if isinstance(message, bytes):
                            self._take(sent_png(message))
                        elif (event := decode_event(message)) is not None:
                            self._dispatch(event)
            finally:
                await socket.close()
            log.warning("the websocket to ComfyUI closed; reconnecting")
            self._deaf = True  # perhaps, once ComfyUI notices the end of the old one
            for run in self._runs.values():
                run.tracker.gap()
            again = await self._connect_again()
            if again is None:
                return
            socket = again
            for run in self._runs.values():
                run.news.set()

    async def _connect_again(self) -> ClientConnection | None:
        reason = ""
        for attempt in range(self._reconnect.attempts):
            if attempt:
                await asyncio.sleep(self._reconnect.delay_s)
            try:
                return await self._connect()
            except (OSError, WebSocketException) as exc:
                reason = _request_failure(exc)
        log.error("cannot reconnect the websocket to ComfyUI: %s", reason)
        self.fail_all(EngineUnreachable(self.address, reason))
        return None

    def _take(self, png: bytes | None) -> None:
        prompt_id, node_id = self._at
        run = self._runs.get(prompt_id)
        if png is not None and run and node_id is not None and run.sends(node_id):
            run.tracker.feed(SentPicture(prompt_id, node_id, png))

    def _dispatch(self, event: Event) -> None:
        run = self._runs.get(event.prompt_id)
        if run is None:
            return
        if isinstance(event, NodeProgress):
            self._at = (event.prompt_id, event.node_id)
            if run.on_progress:
                try:
                    run.on_progress(event)
                except Exception:
                    log.exception("progress could not be reported")  # the listener serves every run, and continues
            return
        if isinstance(event, Executing):
            self._at = (event.prompt_id, event.node_id)
            run.nodes.append((event.node_id, time.monotonic()))
        run.tracker.feed(event)
        if run.tracker.outcome is not None or run.tracker.wants_history:
            run.news.set()


@contextlib.contextmanager
def _read_answer(request: str, status: int) -> Iterator[None]:
    """Read ComfyUI's answer to a client. Raises `EngineAnswerInvalid` if it has an unexpected form."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        raise EngineAnswerInvalid(request, status) from exc


def _json_or_none(content: bytes) -> Any:  # noqa: ANN401 - ComfyUI's JSON
    try:
        return json.loads(content) if content else None
    except (ValueError, RecursionError):
        return None


def _request_failure(error: Exception) -> str:
    """Return why a client's request failed, for a sentence. Many of these errors have no text."""
    return str(error) or type(error).__name__
