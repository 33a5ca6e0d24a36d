"""ComfyUI's websocket protocol, decoded, and what a run's events add up to. Pure: bytes in, values out.

Recorded from ComfyUI 0.3.75. A run's events normally come as: execution_start, execution_cached, per node
executing / progress / executed, then execution_success (or execution_error, execution_interrupted), then
executing with no node. After a gap nothing is replayed, so from then on only /history can say how the run ended.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from worker.errors import EngineError, NodeFailed, OutOfMemory, RunInterrupted, RunLost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# progress_state repeats the state of every node so far, twice a node: not decoding it keeps a run linear in its nodes.
_PROGRESS_STATE = '{"type": "progress_state"'

Outputs = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Executing:
    """A node begins; no node: the prompt has left the queue and its history is written."""

    prompt_id: str
    node_id: str | None


@dataclass(frozen=True, slots=True)
class NodeOutput:
    """An output node's result, also for a node that was cached."""

    prompt_id: str
    node_id: str
    output: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `value` of `maximum` in one node."""

    prompt_id: str
    node_id: str | None
    value: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Succeeded:
    """Every node has run."""

    prompt_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A node raised; nothing after it runs."""

    prompt_id: str
    node_id: str
    node_type: str
    message: str
    exception_type: str = ""

    def error(self, outputs: Outputs) -> NodeFailed:
        """As the error it is, with what other nodes had put out by then."""
        memory = _exhausted(self.exception_type, self.message)
        if memory:
            return OutOfMemory(self.node_type, self.node_id, self.message, outputs, memory=memory)
        return NodeFailed(self.node_type, self.node_id, self.message, outputs)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody interrupted the prompt."""

    prompt_id: str


Event = Executing | NodeOutput | Progress | Succeeded | Failed | Interrupted


def decode(message: object) -> Event | None:
    """The event in one websocket message; None for previews (binary), kinds nobody needs, and anything malformed."""
    if not isinstance(message, str) or message.startswith(_PROGRESS_STATE):
        return None
    try:
        value = json.loads(message)
        decoder = _DECODERS.get(value["type"])
        return decoder(value["data"]) if decoder else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _failure(data: Mapping[str, Any]) -> Failed:
    """What an execution_error says, from the websocket or from the history."""
    kind = str(data.get("exception_type") or "")
    message = str(data.get("exception_message") or kind or "the node gave no message").strip()
    node_id, node_type = str(data.get("node_id", "?")), str(data.get("node_type", "?"))
    return Failed(str(data.get("prompt_id", "?")), node_id, node_type, message, kind)


def _exhausted(kind: str, message: str) -> Literal["GPU", "host"] | None:
    """Which memory ran out, if that is what the exception means.

    `torch.OutOfMemoryError` is the GPU's; torch's allocator for the host raises a bare RuntimeError.
    """
    if kind.endswith("OutOfMemoryError") or message.startswith(("CUDA error: out of memory", "Allocation on device")):
        return "GPU"
    return "host" if kind == "MemoryError" or "DefaultCPUAllocator" in message else None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _node(value: object) -> str | None:
    return None if value is None else _text(value)


def _count(value: Any) -> float:  # noqa: ANN401 - ComfyUI's JSON
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


_DECODERS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "executing": lambda data: Executing(_text(data["prompt_id"]), _node(data.get("node"))),
    "executed": lambda data: NodeOutput(_text(data["prompt_id"]), _text(data["node"]), dict(data["output"] or {})),
    "progress": lambda data: Progress(
        _text(data["prompt_id"]), _node(data.get("node")), _count(data["value"]), _count(data["max"])
    ),
    "execution_success": lambda data: Succeeded(_text(data["prompt_id"])),
    "execution_error": _failure,
    "execution_interrupted": lambda data: Interrupted(_text(data["prompt_id"])),
}


@dataclass(frozen=True, slots=True)
class Finished:
    """A run's success: the outputs of its output nodes, by node id, in the order they were produced."""

    outputs: Outputs


Outcome = Finished | EngineError


@dataclass(slots=True)
class RunTracker:
    """One prompt's fate. Fed with events, histories and news of the engine in any order, it ends exactly once.

    `outcome` is None until then and never changes afterwards. `wants_history` says that events alone can no longer decide.
    """

    prompt_id: str
    outcome: Outcome | None = None
    wants_history: bool = False
    _outputs: Outputs = field(default_factory=dict)
    _complete: bool = True
    _failed: Failed | None = None
    _succeeded: bool = False

    def feed(self, event: Event) -> None:
        """Take one websocket event; those of other prompts are ignored."""
        if event.prompt_id != self.prompt_id or self.outcome is not None:
            return
        match event:
            case NodeOutput(node_id=node_id, output=output):
                self._outputs[node_id] = output
            case Failed() if self._complete:
                self.outcome = event.error(self._outputs)
            case Interrupted():
                self.outcome = RunInterrupted()
            case Succeeded() if self._complete and self._outputs:
                self.outcome = Finished(self._outputs)
            case Failed():
                # What was put out during the gap is in the history only; should that be lost, this is known all the same.
                self._failed, self.wants_history = event, True
            case Succeeded() | Executing(node_id=None):
                # Without outputs too: an `executed` that is late or missing is in the history.
                self._succeeded = self._succeeded or isinstance(event, Succeeded)
                self.wants_history = True

    def gap(self) -> None:
        """The websocket was away: events may be missing, the history decides from here on."""
        self._complete = False
        self.wants_history = self.outcome is None

    def reconcile(self, entry: Mapping[str, Any] | None, *, queued: bool) -> None:
        """Take what /history says of this prompt (`entry`, or None) and whether /queue still has it."""
        if self.outcome is not None:
            return
        self.wants_history = False
        if entry is not None:
            self.outcome = outcome_of(entry)
        elif not queued and self._failed:
            self.outcome = self._failed.error(self._outputs)
        elif not queued:
            self.outcome = Finished(self._outputs) if self._succeeded else RunLost(self.prompt_id)

    def end(self, error: EngineError) -> None:
        """The run cannot go on, for a reason outside the protocol: the engine died, the time is up."""
        if self.outcome is None:
            self.outcome = error


def outcome_of(entry: Mapping[str, Any]) -> Outcome:
    """How a run ended, from its entry in /history."""
    status = entry.get("status") or {}
    if status.get("status_str", "success") == "success":
        return Finished(dict(entry.get("outputs") or {}))
    for name, data in status.get("messages") or ():
        if name == "execution_error":
            return _failure(data).error(dict(entry.get("outputs") or {}))
        if name == "execution_interrupted":
            return RunInterrupted()
    return NodeFailed("?", "?", "ComfyUI's history says the run failed and gives no cause")
