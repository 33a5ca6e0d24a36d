"""Parse a workflow in the editor's format into values of known structure. Pure.

Both schemas are supported: 0.4 (links as lists) and 1 (links as objects), with subgraph definitions at any depth of
`definitions`. The parser ignores what the frontend ignores: positions, colours, groups, reroutes that are only drawn, floating
links. Ids may be numbers or strings and become strings, as the frontend's own keys are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from worker.base.text import quotable
from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

INPUT_NODE, OUTPUT_NODE = "-10", "-20"
"""The ids that links inside a subgraph use for its own inputs and outputs."""

MUTED, BYPASSED = 2, 4

MAX_NODES = 5_000
"""The most nodes a workflow may have with subgraphs expanded. Several times the largest real one; limits hostile input."""

MAX_LINKS = 50_000
MAX_SLOTS = 50_000
MAX_DEFINITIONS = 1_000
_MAX_TYPE_CHARS = 2_000  # a slot that accepts every 3D format lists a few hundred
_MAX_ID_CHARS = 100
_MAX_NAMED_VALUES = 10_000


@dataclass(slots=True)
class ConversionBudget:
    """How much a saved workflow may cost to parse and to convert.

    A few short definitions, used often enough, expand to more than any machine can hold.
    """

    steps: int = 100_000
    values: int = 200_000
    chars: int = 50_000_000

    def step(self, count: int = 1) -> None:
        """Count work, such as inputs that were searched for a link."""
        self.steps -= count
        if self.steps < 0:
            raise UiWorkflowInvalid("its links run through too many nodes and inputs to follow")

    def value(self, count: int, chars: int = 0) -> None:
        """Count values that go into the graph."""
        self.values -= count
        self.chars -= chars
        if self.values < 0 or self.chars < 0:
            raise UiWorkflowInvalid("its widgets hold more values or text than any graph has")


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """An input as saved: `link` is the id of its link, `widget` the name of its widget."""

    name: str
    type: str
    link: str | None
    widget: str | None


@dataclass(frozen=True, slots=True)
class SavedNode:
    """A node as saved. `values` is `widgets_values` unchanged: a list, an object, or None."""

    id: str
    type: str
    title: str | None
    mode: int
    slots: tuple[SavedSlot, ...]
    outputs: tuple[str, ...]
    values: list[Any] | dict[str, Any] | None
    properties: Mapping[str, Any]

    def __str__(self) -> str:
        """Return the node's id, class and title, for people."""
        title = f" '{quotable(self.title)}'" if self.title and self.title != self.type else ""
        return f"{quotable(self.id)} ({quotable(self.type)}{title})"


@dataclass(frozen=True, slots=True)
class SavedLink:
    """A link as saved. Slots are indexes."""

    id: str
    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True, slots=True)
class SavedPort:
    """An input or output of a subgraph as saved, and the links on its inner side, in order."""

    name: str
    type: str
    links: tuple[str, ...]


@dataclass(slots=True)
class SavedScope:
    """One sheet as saved: the workflow itself, or the inside of a subgraph definition, which has an id and ports."""

    nodes: dict[str, SavedNode]
    links: dict[str, SavedLink]
    id: str | None = None
    name: str = ""
    inputs: list[SavedPort] = field(default_factory=list)
    outputs: list[SavedPort] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SavedWorkflow:
    """A whole workflow: its own sheet, and its subgraph definitions by id in the order of the file."""

    root: SavedScope
    definitions: Mapping[str, SavedScope]
    last_node_id: int


def is_saved_workflow(value: object) -> bool:
    """Return whether this is a workflow in the editor's format: a list of nodes.

    An API graph maps ids to nodes. One may be called "nodes" but is never a list.
    """
    return isinstance(value, dict) and isinstance(value.get("nodes"), list)


def read_saved_workflow(value: object) -> SavedWorkflow:
    """Return a saved workflow, parsed.

    Raises:
        UiWorkflowInvalid: a part has the wrong type, an id appears twice, or it is larger than any real workflow.
    """
    if not is_saved_workflow(value):
        raise UiWorkflowInvalid("it has no list 'nodes'; send what the editor's Save writes")
    document = cast("dict[str, Any]", value)
    reader = _SavedReader()
    root = reader.scope(document, "the workflow")
    definitions: dict[str, SavedScope] = {}
    for raw in _subgraph_definitions(document):
        scope = reader.definition(raw)
        if scope.id is not None:
            definitions.setdefault(scope.id, scope)
    last = document.get("last_node_id", _state(document).get("lastNodeId"))
    return SavedWorkflow(root, definitions, last if isinstance(last, int) and not isinstance(last, bool) else 0)


def _state(document: dict[str, Any]) -> dict[str, Any]:
    state = document.get("state")  # where schema 1 stores the counters
    return state if isinstance(state, dict) else {}


def _subgraph_definitions(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every subgraph definition as saved. Nested ones follow the one that contains them, in the frontend's order."""
    waiting, count = [document], 0
    while waiting:
        current = waiting.pop()
        if current is not document:
            yield current
        held = current.get("definitions")
        inner = held.get("subgraphs") if isinstance(held, dict) else None
        if inner is None:
            continue
        if not isinstance(inner, list) or not all(isinstance(item, dict) for item in inner):
            raise UiWorkflowInvalid("its 'definitions.subgraphs' is no list of objects")
        count += len(inner)
        if count > MAX_DEFINITIONS:
            raise UiWorkflowInvalid(f"it has more than {MAX_DEFINITIONS} subgraph definitions")
        waiting.extend(reversed(inner))


@dataclass(slots=True)
class _SavedReader:
    """Reads a saved workflow and counts, so that an oversized document is refused before it costs anything."""

    nodes: int = 0
    links: int = 0
    slots: int = 0

    def scope(self, raw: dict[str, Any], where: str) -> SavedScope:
        nodes, links = raw.get("nodes"), raw.get("links")
        if not isinstance(nodes, list):
            raise UiWorkflowInvalid(f"{where} has no list 'nodes'")
        if not isinstance(links, list) and links is not None:
            raise UiWorkflowInvalid(f"the 'links' of {where} are no list")
        self.nodes += len(nodes)
        self.links += len(links or ())
        if self.nodes > MAX_NODES or self.links > MAX_LINKS:
            raise UiWorkflowInvalid(f"it has more than {MAX_NODES} nodes or {MAX_LINKS} links")
        scope = SavedScope({}, {})
        for item in nodes:
            node = self._node(item, where)
            if node.id in scope.nodes:
                raise UiWorkflowInvalid(f"{where} has two nodes with the id {quotable(node.id)}")
            scope.nodes[node.id] = node
        for item in links or ():
            if item is not None:  # older editors left gaps
                link = _link(item, where)
                scope.links.setdefault(link.id, link)
        return scope

    def definition(self, raw: dict[str, Any]) -> SavedScope:
        name = raw.get("name")
        title = quotable(name) if isinstance(name, str) else ""
        where = f"the subgraph '{title}'"
        if not isinstance(raw.get("id"), str) or not raw["id"]:
            raise UiWorkflowInvalid(f"{where} has no id")
        scope = self.scope(raw, where)
        scope.id, scope.name = raw["id"], title
        scope.inputs = self._ports(raw.get("inputs"), scope, where)
        scope.outputs = self._ports(raw.get("outputs"), scope, where)
        return scope

    def _ports(self, raw: object, scope: SavedScope, where: str) -> list[SavedPort]:
        if raw is None:
            return []
        if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
            raise UiWorkflowInvalid(f"the inputs and outputs of {where} are no lists of objects")
        self._count(raw, where)
        ports = []
        for item in raw:
            links = item.get("linkIds")
            ids = [_id(link, f"a link of {where}") for link in links] if isinstance(links, list) else []
            self._count(ids, where)
            known = tuple(link_id for link_id in ids if link_id in scope.links)
            ports.append(SavedPort(_text(item.get("name")), _slot_type(item.get("type"), where), known))
        return ports

    def _node(self, raw: object, where: str) -> SavedNode:
        if not isinstance(raw, dict):
            raise UiWorkflowInvalid(f"{where} has something in 'nodes' that is no node")
        node_id = _id(raw.get("id"), f"a node of {where}")
        kind = raw.get("type")
        if not isinstance(kind, str) or not kind:
            raise UiWorkflowInvalid(f"node {quotable(node_id)} has no 'type'")
        label = f"node {quotable(node_id)} ({quotable(kind)})"
        title, mode, values = raw.get("title"), raw.get("mode"), raw.get("widgets_values")
        if isinstance(values, dict) and len(values) > _MAX_NAMED_VALUES:
            raise UiWorkflowInvalid(f"{label} has {len(values)} widgets")
        properties = raw.get("properties")
        return SavedNode(
            node_id,
            kind,
            title if isinstance(title, str) and title else None,
            mode if isinstance(mode, int) else 0,
            tuple(self._slots(raw.get("inputs"), label)),
            tuple(_slot_type(item.get("type"), label) for item in self._objects(raw.get("outputs"), label)),
            values if isinstance(values, (list, dict)) else None,
            properties if isinstance(properties, dict) else {},
        )

    def _slots(self, raw: object, label: str) -> Iterator[SavedSlot]:
        for item in self._objects(raw, label):
            link, widget = item.get("link"), item.get("widget")
            named = widget.get("name") if isinstance(widget, dict) else None
            yield SavedSlot(
                _text(item.get("name")),
                _slot_type(item.get("type"), label),
                None if link is None else _id(link, f"a link of {label}"),
                _text(named) if widget else None,
            )

    def _objects(self, raw: object, label: str) -> list[dict[str, Any]]:
        if raw is None:
            return []
        if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
            raise UiWorkflowInvalid(f"the inputs and outputs of {label} are no lists of objects")
        self._count(raw, label)
        return raw

    def _count(self, items: list[Any], label: str) -> None:
        self.slots += len(items)
        if self.slots > MAX_SLOTS:
            raise UiWorkflowInvalid(f"it has more than {MAX_SLOTS} inputs and outputs; the count broke at {label}")


def _link(raw: object, where: str) -> SavedLink:
    match raw:
        case [link_id, origin, origin_slot, target, target_slot, *_]:
            pass
        case {"id": link_id, "origin_id": origin, "target_id": target, **slots}:
            origin_slot, target_slot = slots.get("origin_slot"), slots.get("target_slot")
        case _:
            raise UiWorkflowInvalid(f"{where} has a link that is neither [id, node, slot, node, slot, type] nor such an object")
    label = f"a link of {where}"
    return SavedLink(
        _id(link_id, label), _id(origin, label), _index(origin_slot, label), _id(target, label), _index(target_slot, label)
    )


def _id(value: object, label: str) -> str:
    if isinstance(value, str) and 0 < len(value) <= _MAX_ID_CHARS:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**15 else _refuse_id(label)
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**15:
        return str(int(value))
    return _refuse_id(label)


def _refuse_id(label: str) -> str:
    raise UiWorkflowInvalid(f"{label} has no id, or one that is neither a number nor a short string")


_DIGITS = re.compile(r"[0-9]{1,6}")


def _index(value: object, label: str) -> int:
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SLOTS:
        return value
    raise UiWorkflowInvalid(f"{label} names no slot by its number")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _slot_type(value: object, label: str) -> str:
    """Return a saved slot's type as the frontend compares it. Old files have a combo's options in its place, and 0 for any."""
    if isinstance(value, list):
        value = "COMBO"
    text = value if isinstance(value, str) else "*" if value in (0, None, True, False) else str(value)
    if len(text) > _MAX_TYPE_CHARS:
        raise UiWorkflowInvalid(f"{label} has a slot whose type is {len(text)} characters long")
    return "*" if text == "0" else text
