"""Load a saved workflow as the editor does: each node with its inputs, links and values, sheet by sheet. Pure.

A node inside a subgraph definition is created once, however many instances there are. Instances differ only in the values of
promoted widgets, which each instance holds itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from worker.base.text import quotable
from worker.comfyui_data import known
from worker.editor.loaded_nodes import LoadedInput, LoadedNode, LoadedScope
from worker.editor.promoted_widgets import PromotingInstance, find_promoted
from worker.editor.undeclared_values import may_send_undeclared, place_undeclared
from worker.editor.widgets import DYNAMIC_COMBO, FrontendDialect, ShapeSlot, read_specs, shape_of
from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from worker.editor.saved_workflow import ConversionBudget, SavedLink, SavedNode, SavedScope, SavedWorkflow
    from worker.editor.widgets import InputSpec, NodeShape


def load_workflow(
    ui: SavedWorkflow, object_info: Mapping[str, Any], dialect: FrontendDialect, budget: ConversionBudget
) -> LoadedScope:
    """Load a saved workflow: return it as it is in the editor right after opening.

    Raises:
        UiWorkflowInvalid: subgraphs contain each other in a cycle, or a node is one that no server can evaluate.
    """
    if dialect is FrontendDialect.MODERN:
        ui = renumbered(ui)
    loader = _Loader(ui, object_info, dialect, budget)
    for definition_id in _leaves_first(ui):
        loader.loaded_scopes[definition_id] = loader.loaded(ui.definitions[definition_id])
    return loader.loaded(ui.root)


def _leaves_first(ui: SavedWorkflow) -> tuple[str, ...]:
    needs = {
        key: {node.type for node in scope.nodes.values() if node.type in ui.definitions}
        for key, scope in ui.definitions.items()
    }
    try:
        return tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        names = " -> ".join(f"'{ui.definitions[key].name or quotable(key)}'" for key in error.args[1][:6])
        raise UiWorkflowInvalid(f"its subgraphs contain each other in a circle: {names}") from error


# --- ids ----------------------------------------------------------------------------------------


def renumbered(ui: SavedWorkflow) -> SavedWorkflow:
    """Return the workflow with the ids that a modern frontend gives when it loads one: an inner node never has a taken id."""
    used = set(ui.root.nodes)
    last = max([ui.last_node_id, *(int(key) for key in used if _is_node_number(key))])
    moved: dict[str, dict[str, str]] = {}
    for definition_id, scope in ui.definitions.items():
        mapping = moved[definition_id] = {}
        for node_id in scope.nodes:
            if node_id in used:
                last += 1
                while str(last) in used:
                    last += 1
                mapping[node_id] = str(last)
            elif _is_node_number(node_id):
                last = max(last, int(node_id))
            used.add(mapping.get(node_id, node_id))
    if not any(moved.values()):
        return ui
    definitions = {key: _renamed(scope, moved[key], moved) for key, scope in ui.definitions.items()}
    return replace(ui, root=_renamed(ui.root, {}, moved), definitions=definitions)


def _is_node_number(node_id: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,14}", node_id) is not None


def _renamed(scope: SavedScope, own: Mapping[str, str], moved: Mapping[str, Mapping[str, str]]) -> SavedScope:
    nodes = {}
    for node in scope.nodes.values():
        changed = node
        inner = moved.get(node.type)
        entries = node.properties.get("proxyWidgets")
        if inner and isinstance(entries, list):
            proxies = [
                [inner.get(str(entry[0]), entry[0]), *entry[1:]] if isinstance(entry, list) and entry else entry
                for entry in entries
            ]
            changed = replace(changed, properties={**node.properties, "proxyWidgets": proxies})
        if node.id in own:
            changed = replace(changed, id=own[node.id])
        nodes[changed.id] = changed
    links = {
        link.id: replace(link, origin=own.get(link.origin, link.origin), target=own.get(link.target, link.target))
        for link in scope.links.values()
    }
    return replace(scope, nodes=nodes, links=links)


# --- nodes --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Loader:
    ui: SavedWorkflow
    object_info: Mapping[str, Any]
    dialect: FrontendDialect
    budget: ConversionBudget
    loaded_scopes: dict[str, LoadedScope] = field(default_factory=dict)
    specs: dict[str, tuple[InputSpec, ...]] = field(default_factory=dict)
    order: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {key: at for at, key in enumerate(self.ui.definitions)}

    def loaded(self, scope: SavedScope) -> LoadedScope:
        loaded = LoadedScope(replace(scope, inputs=list(scope.inputs)))
        by_target = {(link.target, link.target_slot): link for link in scope.links.values()}
        for node in scope.nodes.values():
            part = loaded.parts[node.id] = self._part(node, loaded, by_target)
            for at, slot in enumerate(part.slots):
                if slot.link is not None:
                    loaded.ends.setdefault((node.id, slot.link.id), at)
        for part in loaded.parts.values():
            if part.inner is not None and not self._is_early(part):
                PromotingInstance(part, self.dialect, self.budget).take_values()
        if scope.id is not None:
            find_promoted(loaded, self.dialect)
            loaded.size = sum(len(part.slots) for part in loaded.parts.values())
        return loaded

    def _part(self, node: SavedNode, loaded: LoadedScope, by_target: Mapping[tuple[str, int], SavedLink]) -> LoadedNode:
        named = {slot.link for slot in node.slots}
        links = [_link_of(node, at, loaded.scope, by_target, named) for at in range(len(node.slots))]
        if node.type in self.loaded_scopes:
            return self._instance(node, loaded, links, by_target)
        definition = self._definition(node)
        if node.type in known().editor.own_virtual or definition is None:
            slots = [LoadedInput(slot.name, slot.type, link, slot.widget) for slot, link in zip(node.slots, links, strict=True)]
            kind = node.type if node.type in known().editor.virtual else "unknown"
            return LoadedNode(node, loaded, kind, slots, list(node.outputs), [])
        if node.type not in self.object_info:
            node = replace(node, type=known().editor.aliases[node.type])
        if node.type not in self.specs:
            self.specs[node.type] = read_specs(definition)
        shape = shape_of(node, self.specs[node.type], self.dialect, foreign=may_send_undeclared(definition))
        left = place_undeclared(node, definition, shape)
        slots = _slots_of(node, shape, links, by_target)
        part = LoadedNode(node, loaded, "node", slots, [], shape.widgets, left=left)
        part.outputs = _outputs_of(part, definition)
        return part

    def _definition(self, node: SavedNode) -> Mapping[str, Any] | None:
        found = self.object_info.get(node.type) or self.object_info.get(known().editor.aliases.get(node.type, ""))
        return found if isinstance(found, dict) else None

    def _instance(
        self,
        node: SavedNode,
        loaded: LoadedScope,
        links: Sequence[SavedLink | None],
        by_target: Mapping[tuple[str, int], SavedLink],
    ) -> LoadedNode:
        inner = self.loaded_scopes[node.type]
        self.budget.step(len(inner.scope.inputs))
        slots = _matched_inputs([ShapeSlot(port.name, port.type) for port in inner.scope.inputs], node, links, by_target)
        return LoadedNode(node, loaded, "subgraph", slots, [port.type for port in inner.scope.outputs], [], inner)

    def _is_early(self, part: LoadedNode) -> bool:
        """Return True if frontend 1.32 creates this instance before its definition is loaded (it follows the file's order)."""
        own = part.loaded.scope.id
        if self.dialect is FrontendDialect.MODERN or own is None:
            return False
        return self.order[part.node.type] > self.order[own]


def _link_of(
    node: SavedNode, at: int, scope: SavedScope, by_target: Mapping[tuple[str, int], SavedLink], taken: Collection[str | None]
) -> SavedLink | None:
    """Return the link of an input of the workflow to load: the one it names, or the one that names it.

    Frontends trust one of the two and lose links.
    """
    named = node.slots[at].link
    if named is not None and named in scope.links:
        return scope.links[named]
    found = by_target.get((node.id, at))
    # If another input of the node names the link, the link belongs there.
    return None if found is None or found.id in taken else found


def _matched_inputs(
    declared: Sequence[ShapeSlot],
    node: SavedNode,
    links: Sequence[SavedLink | None],
    by_target: Mapping[tuple[str, int], SavedLink],
) -> list[LoadedInput]:
    """Return the inputs of a node to load: the declared ones, with links of saved ones. Of two of one name the last counts."""
    saved = {slot.name: link for slot, link in zip(node.slots, links, strict=True)}
    if not node.slots:
        return [
            LoadedInput(slot.name, slot.type, by_target.get((node.id, at)), slot.widget) for at, slot in enumerate(declared)
        ]
    return [LoadedInput(slot.name, slot.type, saved.get(slot.name), slot.widget) for slot in declared]


def _slots_of(
    node: SavedNode, shape: NodeShape, links: Sequence[SavedLink | None], by_target: Mapping[tuple[str, int], SavedLink]
) -> list[LoadedInput]:
    slots = _matched_inputs(shape.slots, node, links, by_target)
    known, closed = {slot.name for slot in shape.slots}, tuple(shape.closed)
    for slot, link in zip(node.slots, links, strict=True):
        if slot.name in known or slot.widget is not None:
            continue  # a widget that the class no longer has is dropped, with its link
        if not slot.name.startswith(closed):
            slots.append(LoadedInput(slot.name, slot.type, link))
        else:
            _land_link(slots, link)
    return slots


def _land_link(slots: list[LoadedInput], link: SavedLink | None) -> None:
    """While a node is loaded, move the link of an input that the chosen option lacks to the input with its number."""
    if link is not None and link.target_slot < len(slots):
        slot = slots[link.target_slot]
        if slot.link is None and slot.type != DYNAMIC_COMBO:
            slot.link = link


def _outputs_of(part: LoadedNode, definition: Mapping[str, Any]) -> list[str]:
    declared = definition.get("output")
    types = [kind if isinstance(kind, str) else "COMBO" for kind in declared] if isinstance(declared, list) else []
    types = ["*" if kind == "COMFY_MATCHTYPE_V3" else kind for kind in types]
    return types + list(part.node.outputs[len(types) :])
