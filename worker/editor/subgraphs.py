"""Expand the subgraphs of a workflow, and resolve where each link comes from. Pure.

The id of a node in a subgraph begins with the ids of the instances around it: `12:5`, `12:5:7`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.base.text import quotable
from worker.comfyui_data import known
from worker.editor.loaded_nodes import GETTER, HIDDEN, PRIMITIVE, setter_of
from worker.editor.saved_workflow import BYPASSED, INPUT_NODE, MAX_NODES, MUTED
from worker.editor.widgets import FrontendDialect
from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from worker.editor.loaded_nodes import LoadedNode, LoadedScope
    from worker.editor.saved_workflow import ConversionBudget

# --- subgraphs expanded -------------------------------------------------------------------------


@dataclass(slots=True)
class SubgraphFrame:
    """One instance of a sheet, when subgraphs are expanded: the ids in it begin with `prefix`."""

    prefix: str
    loaded: LoadedScope
    instance: LoadedNode | None = None
    parent: SubgraphFrame | None = None
    children: dict[str, SubgraphFrame] = field(default_factory=dict)


@dataclass(slots=True)
class FlatWorkflow:
    """The workflow with expanded subgraphs: every node with its frame, and every sheet once."""

    root: SubgraphFrame
    nodes: list[tuple[SubgraphFrame, LoadedNode]] = field(default_factory=list)
    loaded_scopes: list[LoadedScope] = field(default_factory=list)


def flatten(root: LoadedScope, dialect: FrontendDialect) -> FlatWorkflow:
    """Return every node of the workflow. Those of a subgraph instance follow the sheet that contains it.

    Raises:
        UiWorkflowInvalid: there are more than `MAX_NODES`.
    """
    flat = FlatWorkflow(SubgraphFrame("", root))
    waiting = deque([flat.root])
    seen: set[int] = set()
    while waiting:
        frame = waiting.popleft()
        if id(frame.loaded) not in seen:
            seen.add(id(frame.loaded))
            flat.loaded_scopes.append(frame.loaded)
        for part in frame.loaded.parts.values():
            flat.nodes.append((frame, part))
            # A modern frontend leaves out the inside of a muted or bypassed subgraph, but checks only the outermost one.
            closed = dialect is FrontendDialect.MODERN and frame.parent is None and part.node.mode in {MUTED, BYPASSED}
            if part.inner is not None and not closed:
                child = SubgraphFrame(f"{frame.prefix}{part.node.id}:", part.inner, part, frame)
                frame.children[part.node.id] = child
                waiting.append(child)
        if len(flat.nodes) > MAX_NODES:
            raise UiWorkflowInvalid(f"it has more than {MAX_NODES} nodes once its subgraphs are expanded")
    return flat


# --- links --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResolvedValue:
    """What a link through subgraphs resolves to if an instance shows the widget: its value, the instance and the input."""

    value: object
    holder: LoadedNode
    port: int


@dataclass(slots=True)
class LinkResolver:
    """Resolves links through reroutes, bypassed nodes, and into and out of subgraphs."""

    dialect: FrontendDialect
    budget: ConversionBudget

    def source(self, frame: SubgraphFrame, part: LoadedNode, at: int) -> tuple[str, int] | ResolvedValue | None:
        """Return the node's id and its output, a value, or None if nothing feeds this input."""
        if at < len(part.slots) and part.slots[at].link is None:
            return None
        seen: set[tuple[int, int, bool, int]] = set()
        kind: str | None = None
        incoming = True
        while True:
            key = (id(frame), id(part), incoming, at)
            self.budget.step()
            if key in seen:
                raise UiWorkflowInvalid(f"the links through node {part.node} form a circle")
            seen.add(key)
            if incoming:
                found = self._into(frame, part, at, kind)
                if not isinstance(found, _ResolverStep):
                    return found
                frame, part, at, kind, incoming = found.frame, found.part, found.at, found.kind, found.incoming
                continue
            out = self._out_of(frame, part, at, kind or "")
            if not isinstance(out, _ResolverStep):
                return out
            frame, part, at, kind, incoming = out.frame, out.part, out.at, out.kind, out.incoming

    def _into(self, frame: SubgraphFrame, part: LoadedNode, at: int, kind: str | None) -> _ResolverStep | ResolvedValue | None:
        """Go from an input to the source of its link."""
        if at >= len(part.slots):
            return None
        slot = part.slots[at]
        if slot.link is None:
            return None
        if slot.link.origin == INPUT_NODE and frame.instance is not None and frame.parent is not None:
            return self._up(frame.parent, frame.instance, slot.link.origin_slot)
        origin = frame.loaded.parts.get(slot.link.origin)
        if origin is None:
            raise UiWorkflowInvalid(
                f"input '{quotable(slot.name)}' of node {part.node} is linked to node {slot.link.origin}, which does not exist"
            )
        # A classic frontend looks for PrimitiveNodes on the root sheet only. Frontends show this value but send the inner one.
        if (
            origin.kind == PRIMITIVE
            and part.inner is not None
            and (self.dialect is FrontendDialect.MODERN or frame.parent is None)
        ):
            return _resolve_promoted(part, at)
        return _ResolverStep(frame, origin, slot.link.origin_slot, kind or slot.type, incoming=False)

    @staticmethod
    def _up(parent: SubgraphFrame, instance: LoadedNode, at: int) -> _ResolverStep | ResolvedValue | None:
        """Leave a subgraph through its input: continue in the sheet around it, or return the promoted widget's value."""
        if at < len(instance.slots) and instance.slots[at].link is not None:
            return _ResolverStep(parent, instance, at, None, incoming=True)
        return _resolve_promoted(instance, at)

    def _out_of(
        self, frame: SubgraphFrame, part: LoadedNode, at: int, kind: str
    ) -> _ResolverStep | tuple[str, int] | ResolvedValue | None:
        """Go from an output to its node, or past the node if it does not exist when the graph runs."""
        mode = part.node.mode
        if mode == MUTED and self.dialect is FrontendDialect.MODERN:
            return None
        if mode == BYPASSED:
            self.budget.step(len(part.slots))
            past = _resolve_bypassed(part, at, kind)
            return None if past is None else _ResolverStep(frame, part, past, None, incoming=True)
        if part.inner is not None:
            return self._inside(frame, part, at, kind)
        if part.kind in known().editor.virtual:
            return self._virtual(frame, part, at, kind)
        return f"{frame.prefix}{part.node.id}", at

    def _virtual(self, frame: SubgraphFrame, part: LoadedNode, at: int, kind: str) -> _ResolverStep | None:
        if part.kind in known().editor.reroutes:
            return _ResolverStep(frame, part, at, kind, incoming=True)
        if part.kind == GETTER:
            self.budget.step(len(part.loaded.parts))
            return _ResolverStep(frame, _setter(part), 0, kind, incoming=True)
        return None

    def _inside(self, frame: SubgraphFrame, part: LoadedNode, at: int, kind: str) -> _ResolverStep | ResolvedValue | None:
        child = frame.children.get(part.node.id)
        if child is None or at >= len(child.loaded.scope.outputs):
            raise UiWorkflowInvalid(f"a link comes from output {at} of the subgraph node {part.node}, which does not have it")
        scope = child.loaded.scope
        link = next((scope.links[key] for key in scope.outputs[at].links), None)
        if link is None:
            return None
        if link.origin == INPUT_NODE:  # connected straight through
            return self._up(frame, part, link.origin_slot)
        origin = child.loaded.parts.get(link.origin)
        if origin is None:
            raise UiWorkflowInvalid(f"output {at} of the subgraph node {part.node} comes from a node that does not exist")
        return _ResolverStep(child, origin, link.origin_slot, kind, incoming=False)


@dataclass(frozen=True, slots=True)
class _ResolverStep:
    """The next position of a link that is resolved: an input or an output of a node, and the type that is required there."""

    frame: SubgraphFrame
    part: LoadedNode
    at: int
    kind: str | None
    incoming: bool


def _resolve_promoted(instance: LoadedNode, at: int) -> ResolvedValue | None:
    """Resolve a link that ends in an input of a subgraph instance to the value of the widget that it shows."""
    initial = instance.inner.initial if instance.inner is not None else {}
    value = instance.values.get(at, initial.get(at, HIDDEN))
    return None if value is HIDDEN else ResolvedValue(value, instance, at)


def _setter(getter: LoadedNode) -> LoadedNode:
    setter = setter_of(getter)
    if setter is None:
        raise UiWorkflowInvalid(f"node {getter.node} gets what no SetNode beside it sets")
    return setter


def _resolve_bypassed(part: LoadedNode, at: int, kind: str) -> int | None:
    """Resolve an output of a bypassed node to the input that it passes on, for a consumer of type `kind`."""
    slots = part.slots
    if kind in ("", "*"):
        return at if at < len(slots) else 0
    made = part.outputs[at] if at < len(part.outputs) else "*"
    if at < len(slots) and _fits(slots[at].type, made) and _fits(slots[at].type, kind):
        return at
    exact = next((index for index, slot in enumerate(slots) if slot.type == kind), None)
    if exact is not None:
        return exact
    return next((index for index, slot in enumerate(slots) if _fits(slot.type, made) and _fits(slot.type, kind)), None)


def _fits(one: str, other: str) -> bool:
    if one in ("", "*") or other in ("", "*"):
        return True
    one, other = one.lower(), other.lower()
    if one == other:
        return True
    return ("," in one or "," in other) and not set(one.split(",")).isdisjoint(other.split(","))
