"""Decode ComfyUI's websocket protocol, and track the state of a run. Pure: bytes in, values out.

Recorded from ComfyUI 0.3.75. A run's events normally come as: execution_start, execution_cached, per node executing / progress
/ executed, then execution_success (or execution_error, execution_interrupted), then executing with no node. After a gap nothing
is replayed, so from then on only /history can say how the run ended.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from worker.errors import EngineError, NodeFailed, OutOfMemory, RunInterrupted, RunLost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# progress_state repeats the state of every node so far, twice a node. Not decoding it keeps a run linear in its nodes.
_PROGRESS_STATE = '{"type": "progress_state"'
# A binary message begins with two numbers: its kind (1, a picture) and the picture's format (1 JPEG, 2 PNG).
_PICTURE_HEADER: Final = struct.Struct(">II")
_PNG_PICTURE: Final = (1, 2)
_PNG: Final = b"\x89PNG\r\n\x1a\n"
# Pictures that a run sends are kept in memory until they are delivered.
_SENT_LIMIT_BYTES: Final = 512_000_000

Outputs = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Executing:
    """The event that a node begins. Without a node: the prompt has left the queue and its history is written."""

    prompt_id: str
    node_id: str | None


@dataclass(frozen=True, slots=True)
class NodeOutput:
    """The event with an output node's result, also for a cached node."""

    prompt_id: str
    node_id: str
    output: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cached:
    """The event that names the nodes that will not run, because ComfyUI still has their results."""

    prompt_id: str
    node_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class SentPicture:
    """The event with a picture that a node sends as its output, as SaveImageWebsocket does."""

    prompt_id: str
    node_id: str
    png: bytes


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """The event of step `value` of `maximum` in one node."""

    prompt_id: str
    node_id: str | None
    value: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The event that every node has run."""

    prompt_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The event that a node raised an exception. No node runs after it."""

    prompt_id: str
    node_id: str
    node_type: str
    message: str
    exception_type: str = ""

    def error(self, outputs: Outputs) -> NodeFailed:
        """Return the error, with the outputs of other nodes until then."""
        memory = _exhausted_memory(self.exception_type, self.message)
        if memory:
            return OutOfMemory(self.node_type, self.node_id, self.message, outputs, memory=memory)
        return NodeFailed(self.node_type, self.node_id, self.message, outputs)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The event that the prompt was interrupted."""

    prompt_id: str


Event = Executing | NodeOutput | Cached | SentPicture | NodeProgress | Succeeded | Failed | Interrupted


def decode_event(message: object) -> Event | None:
    """Return the event in a websocket message. None for pictures (binary), unneeded kinds, and anything malformed."""
    if not isinstance(message, str) or message.startswith(_PROGRESS_STATE):
        return None
    try:
        value = json.loads(message)
        decoder = _DECODERS.get(value["type"])
        return decoder(value["data"]) if decoder else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def sent_png(message: bytes) -> bytes | None:
    """Return the picture in a binary event if it is a PNG. Previews of sampling are JPEG.

    The message names neither prompt nor node. ComfyUI sends it right after a message that names both.
    """
    if len(message) < _PICTURE_HEADER.size or _PICTURE_HEADER.unpack_from(message) != _PNG_PICTURE:
        return None
    png = message[_PICTURE_HEADER.size :]
    return png if png.startswith(_PNG) else None


def _failed_event(data: Mapping[str, Any]) -> Failed:
    """Return the content of an execution_error, from the websocket or from the history."""
    kind = str(data.get("exception_type") or "")
    message = str(data.get("exception_message") or kind or "the node gave no message").strip()
    node_id, node_type = str(data.get("node_id", "?")), str(data.get("node_type", "?"))
    return Failed(str(data.get("prompt_id", "?")), node_id, node_type, message, kind)


def _exhausted_memory(kind: str, message: str) -> Literal["GPU", "host"] | None:
    """Return which memory ran out, if that is what the exception in an event means.

    `torch.OutOfMemoryError` is the GPU's. torch's allocator for the host raises a bare RuntimeError.
    """
    if kind.endswith("OutOfMemoryError") or message.startswith(("CUDA error: out of memory", "Allocation on device")):
        return "GPU"
    return "host" if kind == "MemoryError" or "DefaultCPUAllocator" in message else None


def _event_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _node(value: object) -> str | None:
    return None if value is None else _event_text(value)


def _count(value: Any) -> float:  # noqa: ANN401 - ComfyUI's JSON
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


_DECODERS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "executing": lambda data: Executing(_event_text(data["prompt_id"]), _node(data.get("node"))),
    "executed": lambda data: NodeOutput(_event_text(data["prompt_id"]), _event_text(data["node"]), dict(data["output"] or {})),
    "execution_cached": lambda data: Cached(_event_text(data["prompt_id"]), frozenset(map(_event_text, data["nodes"]))),
    "progress": lambda data: NodeProgress(
        _event_text(data["prompt_id"]), _node(data.get("node")), _count(data["value"]), _count(data["max"])
    ),
    "execution_success": lambda data: Succeeded(_event_text(data["prompt_id"])),
    "execution_error": _failed_event,
    "execution_interrupted": lambda data: Interrupted(_event_text(data["prompt_id"])),
}


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The event of a run's success: the outputs of its output nodes, by node id, in the order in which they were produced.

    `cached` are the nodes that did not run again.
    """

    outputs: Outputs
    cached: frozenset[str] = frozenset()


Outcome = RunFinished | EngineError


@dataclass(slots=True)
class RunTracker:
    """The state of one prompt. It takes events, histories and errors in any order, and ends exactly once.

    `outcome` is None until then and never changes afterwards. `wants_history` says that events alone can no longer decide.
    """

    prompt_id: str
    outcome: Outcome | None = None
    wants_history: bool = False
    lost_pictures: int = 0
    """Pictures that nodes sent through the websocket, of which there were too many to keep."""
    _outputs: Outputs = field(default_factory=dict)
    _cached: frozenset[str] = frozenset()
    _sent: dict[str, list[bytes]] = field(default_factory=dict)
    _sent_bytes: int = 0
    _complete: bool = True
    _failed: Failed | None = None
    _succeeded: bool = False

    def feed(self, event: Event) -> None:
        """Take one websocket event. Ignore those of other prompts."""
        if event.prompt_id != self.prompt_id or self.outcome is not None:
            return
        match event:
            case NodeOutput(node_id=node_id, output=output):
                self._outputs[node_id] = output
            case Cached(node_ids=node_ids):
                self._cached = node_ids
            case SentPicture(node_id=node_id, png=png):
                self._keep(node_id, png)
            case Failed() if self._complete:
                self.outcome = event.error(self._with_sent(self._outputs))
            case Interrupted():
                self.outcome = RunInterrupted()
            case Succeeded() if self._complete and (self._outputs or self._sent):
                self.outcome = RunFinished(self._with_sent(self._outputs), self._cached)
            case Failed():
                # Outputs during the gap are in the history only. If that is lost, this is still known.
                self._failed, self.wants_history = event, True
            case Succeeded() | Executing(node_id=None):
                # Even without outputs: an `executed` that is late or missing is in the history.
                self._succeeded = self._succeeded or isinstance(event, Succeeded)
                self.wants_history = True

    def gap(self) -> None:
        """Note that the websocket was disconnected: events may be missing, and the history decides from here on."""
        self._complete = False
        self.wants_history = self.outcome is None

    def reconcile(self, entry: Mapping[str, Any] | None, *, queued: bool) -> None:
        """Take /history's entry for this prompt (or None), and whether /queue still has it."""
        if self.outcome is not None:
            return
        self.wants_history = False
        if entry is not None:
            self.outcome = outcome_of(entry, self._with_sent)
        elif not queued and self._failed:
            self.outcome = self._failed.error(self._with_sent(self._outputs))
        elif not queued:
            done = RunFinished(self._with_sent(self._outputs), self._cached)
            self.outcome = done if self._succeeded else RunLost(self.prompt_id)

    def end(self, error: EngineError) -> None:
        """End the run for a reason outside the protocol: the engine died, or the time is up."""
        if self.outcome is None:
            self.outcome = error

    def _keep(self, node_id: str, png: bytes) -> None:
        if self._sent_bytes + len(png) > _SENT_LIMIT_BYTES:
            self.lost_pictures += 1
            return
        self._sent_bytes += len(png)
        self._sent.setdefault(node_id, []).append(png)

    def _with_sent(self, outputs: Outputs) -> Outputs:
        """Return the outputs with the pictures from the websocket, as files whose bytes are `data`."""
        joined = dict(outputs)
        for node_id, pngs in self._sent.items():
            name = re.sub(r"[^A-Za-z0-9._-]", "-", node_id)
            sent = [{"filename": f"websocket_{name}_{at}.png", "type": "websocket", "data": png} for at, png in enumerate(pngs)]
            output = joined.get(node_id) or {}
            listed = output.get("images")
            joined[node_id] = {**output, "images": [*(listed if isinstance(listed, list) else ()), *sent]}
        return joined


def outcome_of(entry: Mapping[str, Any], joined: Callable[[Outputs], Outputs] = dict) -> Outcome:
    """Return the event with which a run ended, from its entry in /history. `joined` adds outputs that it does not contain."""
    status = entry.get("status") or {}
    outputs = joined(dict(entry.get("outputs") or {}))
    messages = status.get("messages") or ()
    if status.get("status_str", "success") == "success":
        cached = (data.get("nodes") or () for name, data in messages if name == "execution_cached")
        return RunFinished(outputs, frozenset(str(node_id) for nodes in cached for node_id in nodes))
    for name, data in messages:
        if name == "execution_error":
            return _failed_event(data).error(outputs)
        if name == "execution_interrupted":
            return RunInterrupted()
    return NodeFailed("?", "?", "ComfyUI's history says the run failed and gives no cause")
