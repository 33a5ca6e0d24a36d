"""The nodes and sheets of a loaded workflow, on which the other steps of a conversion work. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.editor.saved_workflow import SavedLink, SavedNode, SavedScope
    from worker.editor.widgets import Widget

PRIMITIVE, SETTER, GETTER = "PrimitiveNode", "SetNode", "GetNode"
GROUP_PREFIXES = ("workflow>", "workflow/")
"""Prefixes of the class of a group node, the editor's older form of subgraph."""


class _HiddenValue:
    """In place of a loaded node's promoted value: the classic frontend shows the inner widget instead, so that one counts."""


HIDDEN = _HiddenValue()


@dataclass(slots=True)
class LoadedInput:
    """An input of a loaded node, with the link that ends in it."""

    name: str
    type: str
    link: SavedLink | None
    widget: str | None = None


@dataclass(slots=True)
class LoadedNode:
    """A loaded node. `values` are the promoted widgets of a subgraph instance, by input. Absent inputs have none.

    `left` describes the saved values that no known input takes.
    """

    node: SavedNode
    loaded: LoadedScope
    kind: str
    slots: list[LoadedInput]
    outputs: list[str]
    widgets: list[Widget]
    inner: LoadedScope | None = None
    values: dict[int, object] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def widget(self, name: str | None) -> Widget | None:
        """Return the node's widget of that name."""
        return next((widget for widget in self.widgets if widget.name == name), None)

    def linked(self, name: str) -> bool:
        """Return whether a link ends in the input of that widget."""
        return any(slot.widget == name and slot.link is not None for slot in self.slots)


@dataclass(slots=True)
class LoadedScope:
    """A loaded scope: the workflow, or the inside of a subgraph."""

    scope: SavedScope
    parts: dict[str, LoadedNode] = field(default_factory=dict)
    promoted: dict[int, tuple[str, str]] = field(default_factory=dict)  # an input, and the inner node and widget behind it
    initial: dict[int, object] = field(default_factory=dict)
    ends: dict[tuple[str, str], int] = field(default_factory=dict)  # a node and link, and the input that the link ends in
    size: int = 0


def setter_of(getter: LoadedNode) -> LoadedNode | None:
    """Return the loaded SetNode with the name that a GetNode asks for, on the same sheet."""
    name = first_value(getter)
    return next((part for part in getter.loaded.parts.values() if part.kind == SETTER and first_value(part) == name), None)


def first_value(part: LoadedNode) -> object:
    """Return the first of the values that a loaded node was saved with, or None."""
    values = part.node.values
    return values[0] if isinstance(values, list) and values else None
