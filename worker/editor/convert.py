"""Convert a workflow in the editor's format to the API graph that the editor itself would send. Pure.

The rules are those of ComfyUI's own frontend, versions 1.32 and 1.58, as observed. Where they differ, the engine's version
decides. Two things differ from the frontends. One of them follows the links of nodes, the other the list of links, and each
loses some: this module keeps them. And a graph that they would send although it cannot run, such as one with a node without a
class, is refused with a sentence.
"""

from __future__ import annotations

import random as chance
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from worker.base.text import quotable
from worker.comfyui_data import known
from worker.editor.dynamic_prompts import choose_options, fill_tokens
from worker.editor.javascript import as_javascript_json, text_of
from worker.editor.loaded_nodes import GROUP_PREFIXES
from worker.editor.loader import load_workflow
from worker.editor.primitive_nodes import apply_primitives
from worker.editor.saved_workflow import BYPASSED, MUTED, ConversionBudget, is_saved_workflow, read_saved_workflow
from worker.editor.subgraphs import LinkResolver, ResolvedValue, flatten
from worker.editor.widgets import UNSET, FrontendDialect, dialect_of, upload_widget_value
from worker.errors import UiWorkflowInvalid
from worker.graph.rejection import NodeOrigin, unknown_nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from worker.editor.loaded_nodes import LoadedNode
    from worker.editor.subgraphs import FlatWorkflow, SubgraphFrame
    from worker.editor.widgets import InputSpec, Widget
    from worker.graph.graph import Graph

__all__ = ["Converted", "classes_to_convert", "convert", "is_saved_workflow"]

_SUBGRAPH = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)  # how the editor names a subgraph's class
_MAX_NAME_CHARS = 10_000  # of a file's name, many times what a file system allows


@dataclass(frozen=True, slots=True)
class Control:
    """A value to change after each run of a converted workflow, as its `control_after_generate` was saved.

    `targets` are the inputs that hold it, as node id and name. There are several if a promoted widget or PrimitiveNode feeds
    them.
    """

    targets: tuple[tuple[str, str], ...]
    mode: str
    spec: InputSpec


@dataclass(frozen=True, slots=True)
class Converted:
    """A graph for `POST /prompt`, and the values that the editor would change for the next run."""

    graph: Graph
    controls: tuple[Control, ...]


def classes_to_convert(ui: object) -> frozenset[str]:
    """Return the node classes whose definitions `convert` needs, inside subgraphs too, and new names of renamed ones.

    Raises:
        UiWorkflowInvalid: as `convert` does for a workflow with the wrong structure.
    """
    graph = read_saved_workflow(ui)
    scopes = [graph.root, *graph.definitions.values()]
    found = frozenset(node.type for scope in scopes for node in scope.nodes.values())
    aliases = known().editor.aliases
    renamed = {aliases[name] for name in found if name in aliases}
    return (found | renamed) - known().editor.virtual - graph.definitions.keys()


def convert(
    ui: object,
    object_info: Mapping[str, Any],
    *,
    frontend: str | None = None,
    comfyui: str | None = None,
    now: datetime | None = None,
    random: Callable[[], float] = chance.random,
) -> Converted:
    """Return the graph that the editor would send for this workflow, with the seeds as saved.

    `object_info` is the running engine's, at least for `classes_to_convert(ui)`. `frontend` is the version that this engine
    requires (`/system_stats`, `required_frontend_version`); without it /object_info decides. `comfyui` is the engine's own
    version, used to name what it lacks. `now` (default: now, in local time) fills `%date:...%` in file names. `random` chooses
    among `{a|b}`.

    Raises:
        UnknownNodes: classes are missing in `object_info`; all of them are named, with their packs.
        UiWorkflowInvalid: anything else that prevents an exact conversion.
    """
    dialect = dialect_of(frontend, object_info)
    budget = ConversionBudget()
    root = load_workflow(read_saved_workflow(ui), object_info, dialect, budget)
    flat = flatten(root, dialect)
    steered: dict[tuple[int, int], LoadedNode] = {}
    for loaded in flat.loaded_scopes if dialect is FrontendDialect.MODERN else [root]:
        steered |= apply_primitives(loaded, budget)
    writer = _Writer(flat, object_info, dialect, now or datetime.now().astimezone(), random, steered, budget, comfyui)
    return Converted(writer.graph(), writer.controls())


# --- the graph ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Writer:
    flat: FlatWorkflow
    object_info: Mapping[str, Any]
    dialect: FrontendDialect
    now: datetime
    random: Callable[[], float]
    steered: Mapping[tuple[int, int], LoadedNode]
    budget: ConversionBudget
    comfyui: str | None
    found: dict[tuple[int, int], Control] = field(default_factory=dict)
    names: dict[str, LoadedNode] = field(default_factory=dict)

    def graph(self) -> Graph:
        """Return every node that runs, with its links resolved. Leave out links to nodes that do not run."""
        running = [
            (frame, part)
            for frame, part in self.flat.nodes
            if part.kind in {"node", "unknown"} and part.node.mode not in {MUTED, BYPASSED}
        ]
        self._refuse_unknown(running)
        resolver = LinkResolver(self.dialect, self.budget)
        graph: Graph = {}
        for frame, part in running:
            node_id = f"{frame.prefix}{part.node.id}"
            if node_id in graph:
                raise UiWorkflowInvalid(f"two of its nodes get the id {quotable(node_id)}")
            inputs = self._inputs(frame, part, resolver)
            graph[node_id] = {"inputs": inputs, "class_type": part.node.type, "_meta": self._meta(part)}
        for node in graph.values():
            gone = [name for name, value in node["inputs"].items() if isinstance(value, list) and value[0] not in graph]
            for name in gone:
                del node["inputs"][name]
        return graph

    def _refuse_unknown(self, running: list[tuple[SubgraphFrame, LoadedNode]]) -> None:
        unknown: dict[str, LoadedNode] = {}
        for _, part in running:
            if part.node.type in known().editor.broadcasters:
                raise UiWorkflowInvalid(f"node {part.node} feeds other nodes without links; replace it by links")
            if part.kind == "unknown" and part.node.type.startswith(GROUP_PREFIXES):
                raise UiWorkflowInvalid(f"node {part.node} is a group node; convert it to nodes or to a subgraph in the editor")
            if part.kind == "unknown" and _SUBGRAPH.fullmatch(part.node.type):
                raise UiWorkflowInvalid(
                    f"node {part.node} is a subgraph whose definition the workflow lacks; save it again in the editor"
                )
            if part.kind == "unknown":
                unknown.setdefault(part.node.type, part)
            if part.left:
                raise UiWorkflowInvalid(
                    f"node {part.node} was saved with {part.left[0]}, which no input of its class takes: only the code of its "
                    "pack in the editor knows where it goes"
                )
        if unknown:
            missing = (NodeOrigin(part.node.type, part.node.id, part.node.properties) for part in unknown.values())
            raise unknown_nodes(missing, self.comfyui)

    def _meta(self, part: LoadedNode) -> dict[str, object]:
        node = part.node
        meta: dict[str, object] = {"title": node.title or self._class_title(node.type)}
        self.budget.value(0, len(node.title or ""))
        if self.dialect is FrontendDialect.MODERN:
            for key in ("cnr_id", "aux_id", "ver"):
                value = node.properties.get(key)
                if isinstance(value, str) and value:
                    meta[key] = value.removeprefix("v") if key == "ver" else value
        return meta

    def _class_title(self, class_type: str) -> str:
        name = self.object_info[class_type].get("display_name")
        if self.dialect is FrontendDialect.CLASSIC:
            return known().editor.classic_titles.get(class_type) or name or class_type
        return name or known().editor.modern_titles.get(class_type, class_type)

    def _inputs(self, frame: SubgraphFrame, part: LoadedNode, resolver: LinkResolver) -> dict[str, object]:
        inputs: dict[str, object] = {}
        for widget in part.widgets:
            # An upload that names no file means the first file there, and there may be none.
            if widget.in_prompt and widget.value is not UNSET and (sent := self._sent(part, widget)) is not UNSET:
                inputs[widget.name] = sent
        node_id = f"{frame.prefix}{part.node.id}"
        holders: dict[str, tuple[LoadedNode, int]] = {
            slot.widget: (part, at) for at, slot in enumerate(part.slots) if slot.widget
        }
        for at, slot in enumerate(part.slots):
            match resolver.source(frame, part, at):
                case None:
                    continue
                case ResolvedValue(value, holder, port):
                    if value is not UNSET:
                        inputs[slot.name] = _wrapped(as_javascript_json(value, self.budget))
                    holders[slot.name] = (holder, port)
                case (origin, output):
                    inputs[slot.name] = [origin, output]
                    holders.pop(slot.name, None)
        for widget in part.widgets:
            if widget.name in holders and widget.name in inputs:
                self._note_control(node_id, widget, *holders[widget.name])
        return inputs

    def _note_control(self, node_id: str, widget: Widget, holder: LoadedNode, port: int) -> None:
        """Record that this input changes from run to run, with all inputs that get their value from the same place."""
        primitive = self.steered.get((id(holder), port))
        mode, key = widget.mode, (id(holder), port)
        if primitive is not None:
            values = primitive.node.values
            mode = values[1] if isinstance(values, list) and len(values) > 1 and isinstance(values[1], str) else None
            key = (id(primitive), 0)
        if mode is None:
            return
        known = self.found.get(key)
        target = (node_id, widget.name)
        self.found[key] = replace(known, targets=(*known.targets, target)) if known else Control((target,), mode, widget.spec)

    def controls(self) -> tuple[Control, ...]:
        """Return what `graph` found to change from run to run."""
        return tuple(self.found.values())

    def _sent(self, part: LoadedNode, widget: Widget) -> object:
        value = as_javascript_json(
            _value_without_browser(part, widget) if widget.spec.widget_type in known().editor.made_by_browser else widget.value,
            self.budget,
        )
        if widget.multiline and not isinstance(value, str):
            value = text_of(value)
        if widget.name == "sampler_name" and part.loaded.scope.id is None and isinstance(value, str):
            value = value.removeprefix("sample_")
        classic = self.dialect is FrontendDialect.CLASSIC
        if classic:
            value = _as_classic(widget, value)
        if isinstance(value, str):
            if widget.spec.options.get("dynamicPrompts"):
                value = choose_options(value, self.random)
            if widget.name == "filename_prefix" and part.node.type in _savers(self.dialect):
                value = self._filled(part, value)
        return _wrapped(value, "" if classic else widget.spec.widget_type)

    def _filled(self, part: LoadedNode, name: str) -> str:
        if len(name) > _MAX_NAME_CHARS:
            raise UiWorkflowInvalid(f"the 'filename_prefix' of node {part.node} has {len(name)} characters")
        filled = fill_tokens(name, self.now, self._lookup)
        self.budget.value(1, len(filled))
        return filled

    def _lookup(self, name: str, widget_name: str) -> str | None:
        """Return the value of a widget of the first node with this name. Its name for this purpose comes before its title."""
        if not self.names:
            for naming in (_search_name, self._shown_title):
                for _, part in self.flat.nodes:
                    if isinstance(called := naming(part), str):
                        self.names.setdefault(called, part)
        widget = self.names[name].widget(widget_name) if name in self.names else None
        if widget is None or widget.value is UNSET:
            return None
        text = text_of(as_javascript_json(widget.value, self.budget))
        if len(text) > _MAX_NAME_CHARS:
            raise UiWorkflowInvalid(
                f"a file name takes in '{quotable(widget_name)}' of '{quotable(name)}', {len(text)} characters"
            )
        return text

    def _shown_title(self, part: LoadedNode) -> str:
        return part.node.title or (self._class_title(part.node.type) if part.kind == "node" else part.node.type)


def _value_without_browser(part: LoadedNode, widget: Widget) -> object:
    """Convert an input that the editor fills while it queues: a 3D view that was not drawn, or nothing."""
    if widget.name != "viewport_state" or part.node.type.startswith("Load3D"):
        if part.linked(widget.name):
            return widget.value
        raise UiWorkflowInvalid(
            f"node {part.node} takes its '{quotable(widget.name)}' from the browser when the workflow is queued, "
            "which no server can do; load a file instead"
        )
    camera = part.node.properties.get("Camera Config")
    state = camera.get("state") if isinstance(camera, dict) else None
    view = {"image": "", "mask": "", "normal": "", "recording": "", "model_3d_info": []}
    return {**view, "camera_info": state if isinstance(state, dict) else known().editor.camera}


def _search_name(part: LoadedNode) -> object:
    saved = part.node.properties.get("Node name for S&R")
    return part.node.type if saved is None and part.node.type not in known().editor.classic_savers else saved


def _savers(dialect: FrontendDialect) -> frozenset[str]:
    editor = known().editor
    return editor.classic_savers if dialect is FrontendDialect.CLASSIC else editor.modern_savers


def _wrapped(value: object, kind: str = "") -> object:
    if kind == "CURVE" and value is not None:
        return {"__type__": "CURVE", "__value__": value}
    return {"__value__": value} if isinstance(value, list) else value  # ComfyUI would take a bare list for a link


def _as_classic(widget: Widget, value: object) -> object:
    if widget.multiline and isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    return upload_widget_value(widget.spec, value)
