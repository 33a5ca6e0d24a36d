"""Widgets of a subgraph's inner nodes that its instances show and hold values for. Pure.

There are two generations of files. In the older one an instance's `widgets_values` follow the subgraph's inputs. In the newer
one `proxyWidgets` names the inner widget of each value, whether or not the subgraph has an input for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.editor.loaded_nodes import HIDDEN, PRIMITIVE, first_value
from worker.editor.saved_workflow import INPUT_NODE, SavedLink, SavedPort
from worker.editor.widgets import FrontendDialect
from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from worker.editor.loaded_nodes import LoadedNode, LoadedScope
    from worker.editor.saved_workflow import ConversionBudget, SavedNode


def find_promoted(loaded: LoadedScope, dialect: FrontendDialect) -> None:
    """Record for each input of a subgraph its inner widget, and that widget's value."""
    for at, port in enumerate(loaded.scope.inputs):
        for link_id in port.links:
            found = _widget_behind(loaded, link_id, by_index=dialect is FrontendDialect.CLASSIC)
            if found is not None:
                part, slot, value = found
                loaded.promoted[at] = (part.node.id, slot)
                loaded.initial[at] = value
                break


def _widget_behind(loaded: LoadedScope, link_id: str, *, by_index: bool = False) -> tuple[LoadedNode, str, object] | None:
    """Return the inner node, promoted widget and value that a link from a subgraph's input ends in.

    A classic frontend uses the link's slot number, which is wrong if the file leaves out inputs. It then promotes another
    widget's value, and sends that.
    """
    link = loaded.scope.links.get(link_id)
    part = loaded.parts.get(link.target) if link is not None else None
    if link is None or part is None:
        return None
    at = link.target_slot if by_index else loaded.ends.get((link.target, link.id))
    if at is None or at >= len(part.slots):
        return None
    slot = part.slots[at]
    if part.inner is not None:
        if at not in part.inner.initial:
            return None
        return part, slot.name, part.values.get(at, part.inner.initial[at])
    widget = part.widget(slot.widget)
    return None if widget is None else (part, widget.name, widget.value)


@dataclass(slots=True)
class PromotingInstance:
    """A subgraph instance whose promoted widgets take their own values from its `widgets_values`."""

    part: LoadedNode
    dialect: FrontendDialect
    budget: ConversionBudget

    @property
    def _loaded(self) -> LoadedScope:
        if self.part.inner is None:
            raise AssertionError  # created only for instances
        return self.part.inner

    def take_values(self) -> None:
        """Take the values in the order of the inputs, then as `proxyWidgets` says, which newer files have."""
        saved = self.part.node.values
        values: list[Any] = saved if isinstance(saved, list) else []
        loaded = self._loaded
        for at, value in zip(sorted(loaded.initial), values, strict=False):
            self.part.values[at] = value
        entries = _proxies(self.part.node)
        self.budget.step(len(entries) * (len(loaded.scope.inputs) + 1))
        if self.dialect is FrontendDialect.CLASSIC:
            self._classic(entries, values)
        else:
            for at, entry in enumerate(entries):
                self._modern(entry, values[at] if at < len(values) else _HOLE)

    def _named(self, name: str) -> int | None:
        return next((at for at, port in enumerate(self._loaded.scope.inputs) if port.name == name), None)

    def _classic(self, entries: list[tuple[str, str]], values: list[Any]) -> None:
        own = {name for node_id, name in entries if node_id == "-1"}
        for (node_id, name), value in zip(entries, values, strict=False):
            at = self._named(name)
            if node_id == "-1" and at is not None and at in self._loaded.initial and value is not None:
                self.part.values[at] = value
        for _, name in entries:
            at = self._named(name)
            if name not in own and at is not None and at in self._loaded.initial:
                self.part.values[at] = HIDDEN

    def _modern(self, entry: tuple[str, str], value: object) -> None:
        node_id, name = entry
        if node_id == "-1":
            at = self._named(name)
            if at is not None and at in self._loaded.initial and value is not _HOLE:
                self.part.values[at] = value
            return
        name = self._plain_name(node_id, name)
        at = next((at for at, source in self._loaded.promoted.items() if source == (node_id, name)), None)
        if at is None:
            at = self._promote(node_id, name)
        if at is not None and value is not _HOLE:
            self.part.values[at] = value

    def _plain_name(self, node_id: str, name: str) -> str:
        """Return the widget's name without the `12: ` that older editors put before it."""
        inner = self._loaded.parts.get(node_id)
        self.budget.step(len(inner.slots) if inner is not None else 1)
        if len(name) > _MAX_NAME_CHARS:
            return name
        while inner is not None and not _has(inner, name) and (found := re.match(r"\s*\d+\s*:\s*(.+)", name)):
            name = found[1]
        return name

    def _promote(self, node_id: str, name: str) -> int | None:
        """Return a new input of the subgraph for an inner widget, as the modern frontend adds when it opens such a file."""
        inner = self._loaded.parts.get(node_id)
        self.budget.step(len(inner.slots) if inner is not None and inner.kind != PRIMITIVE else self._loaded.size)
        if inner is None or name.startswith("$$"):
            return None
        if inner.kind == PRIMITIVE:
            return self._promote_primitive(inner, name)
        at = _slot_of_widget(inner, name)
        if at is None:
            return None
        return self._connect(name, [(inner, at)])

    def _promote_primitive(self, inner: LoadedNode, name: str) -> int | None:
        targets = [
            (part, at)
            for part in self._loaded.parts.values()
            for at, slot in enumerate(part.slots)
            if slot.link is not None and slot.link.origin == inner.node.id
        ]
        if not targets:
            return None
        made = self._connect(inner.node.title or name, targets)
        if (value := first_value(inner)) is not None:
            self.part.values[made] = value
        return made

    def _connect(self, name: str, targets: list[tuple[LoadedNode, int]]) -> int:
        loaded = self._loaded
        made = len(loaded.scope.inputs)
        ids: list[str] = []
        for part, at in targets:
            link = SavedLink(f"+{made}.{len(ids)}", INPUT_NODE, made, part.node.id, at)
            loaded.scope.links[link.id] = link
            part.slots[at].link = link
            loaded.ends[part.node.id, link.id] = at
            ids.append(link.id)
        loaded.scope.inputs.append(SavedPort(name, targets[0][0].slots[targets[0][1]].type, tuple(ids)))
        if (found := _widget_behind(loaded, ids[0])) is not None:
            loaded.promoted[made], loaded.initial[made] = (found[0].node.id, found[1]), found[2]
        return made


_HOLE = object()
_MAX_NAME_CHARS = 1_000  # of a widget


def _has(part: LoadedNode, name: str) -> bool:
    return part.widget(name) is not None or _slot_of_widget(part, name) is not None


def _slot_of_widget(part: LoadedNode, name: str) -> int | None:
    """Return the input of a node's promoted widget of this name. For a subgraph instance, the input that stands for it."""
    if part.inner is None:
        return next((at for at, slot in enumerate(part.slots) if slot.widget == name and part.widget(name) is not None), None)
    initial, promoted = part.inner.initial, part.inner.promoted
    by_name = [at for at, slot in enumerate(part.slots) if at in initial and slot.name == name]
    return next(iter(by_name), next((at for at, source in promoted.items() if source[1] == name and at in initial), None))


def _proxies(node: SavedNode) -> list[tuple[str, str]]:
    raw = node.properties.get("proxyWidgets")
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raw = None
    entries = raw if isinstance(raw, list) else []
    if not all(isinstance(entry, list) and len(entry) in {2, 3} and isinstance(entry[1], str) for entry in entries):
        raise UiWorkflowInvalid(f"the 'proxyWidgets' of the subgraph node {node} are no pairs of node and widget")
    return [(str(entry[0]), entry[1]) for entry in entries]
