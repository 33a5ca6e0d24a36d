"""Convert a workflow in the editor's format to a graph that names its models, without an engine. Pure.

The conversion is the worker's own: subgraphs, promoted widgets, primitives, muted and bypassed nodes count as in a job. Only
the definitions differ: here the file itself has to show which widgets its classes have. It names those that have an input or
that a subgraph promotes, which is enough for models. Other values are named by their position.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any

from worker.comfyui_data import known
from worker.editor.convert import classes_to_convert, convert
from worker.editor.saved_workflow import read_saved_workflow
from worker.errors import UiWorkflowInvalid
from worker.model_spec import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from worker.editor.saved_workflow import SavedNode, SavedWorkflow
    from worker.graph.graph import Graph


def naming_graphs(ui: object, release: str | None = None) -> tuple[Graph, ...]:
    """Return the workflow's nodes that run, with the files that they load, for this release of ComfyUI.

    If the release was not recorded, return one graph for each dialect of the editor, where they differ. Leave out the dialect
    of releases that lack a class of the workflow, and one in which it cannot be converted, if there is another. The graphs are
    for names only: an engine could not run them.

    Raises:
        UiWorkflowInvalid: the worker could not convert it either, in any dialect.
    """
    found: list[Graph] = []
    refused: list[UiWorkflowInvalid] = []
    for frontend in _frontends(classes_to_convert(ui), release):
        try:
            graph = naming_graph(ui, frontend)
        except UiWorkflowInvalid as exc:
            refused.append(exc)
        else:
            found += [graph] if graph not in found else []
    if not found:
        raise refused[0]
    return tuple(graph for graph in found if graph) or ({},)


def _frontends(names: Iterable[str], release: str | None) -> tuple[str, ...]:
    facts = known()
    if release and release in facts.frontends:
        return (facts.frontends[release],)
    newest_first = list(facts.frontends.items())[::-1]
    own = [name for name in names if facts.is_own(name)]
    able = [frontend for each, frontend in newest_first if all(facts.has(name, each) for name in own)]
    return tuple(able) or (newest_first[0][1],)


def naming_graph(ui: object, frontend: str | None = None) -> Graph:
    """Return the workflow's nodes that run, with the files that they load, for this version of the editor.

    Without a version it is the newest recorded one.

    Raises:
        UiWorkflowInvalid: the worker could not convert it either.
    """
    graph = read_saved_workflow(ui)
    needed = classes_to_convert(ui)
    promoted = _promoted_by_node(graph)
    by_class: dict[str, list[tuple[SavedNode, list[str]]]] = defaultdict(list)
    for scope in (graph.root, *graph.definitions.values()):
        for node in scope.nodes.values():
            by_class[node.type].append((node, promoted.get((scope.id, node.id), [])))
    found = {name: _derived_definition(name, nodes) for name, nodes in by_class.items() if name in needed}
    return convert(ui, found, frontend=frontend or known().frontends[known().newest]).graph


def _promoted_by_node(graph: SavedWorkflow) -> Mapping[tuple[str | None, str], list[str]]:
    """Map a subgraph's id and a node's id in it to the widgets with names that its instances show for the node."""
    names: dict[tuple[str | None, str], list[str]] = defaultdict(list)
    for scope in (graph.root, *graph.definitions.values()):
        for node in scope.nodes.values():
            entries = node.properties.get("proxyWidgets")
            for entry in entries if node.type in graph.definitions and isinstance(entries, list) else ():
                match entry:
                    case [inner, str(name), *_]:
                        names[node.type, str(inner)].append(name)
    return names


def _derived_definition(class_type: str, nodes: Sequence[tuple[SavedNode, list[str]]]) -> dict[str, Any]:
    """Return the class of a node in a naming graph as /object_info might describe it, derived from the workflow's nodes."""
    first = known().first_widgets.get(class_type, ())
    saved = [[slot.widget for slot in node.slots if slot.widget] for node, _ in nodes]
    # An input that only takes links is no widget, whatever its type: it has no place among the values.
    sockets = {slot.name: [slot.type, {"forceInput": True}] for node, _ in nodes for slot in node.slots if slot.widget is None}
    names = dict.fromkeys([*first, *chain.from_iterable(saved), *chain.from_iterable(promoted for _, promoted in nodes)])
    values = max((node.values for node, _ in nodes if node.values), key=len, default=[])
    if isinstance(values, dict):
        placed = [str(key) for key in values]
    else:
        whole = (each for each in saved if len(each) == len(values))
        placed = next(whole, _names_by_position(values, first, names))
    # As texts, values pass through unchanged, each in its place. Nothing else is needed here.
    widgets = {name: ["STRING"] for name in [*placed, *names] if name not in sockets}
    return {"input": {"required": sockets | widgets}, "output": []}


def _names_by_position(values: Sequence[object], first: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return a name in a naming graph for each saved value: a file input's, in order, or one with its position."""
    files = [at for at, value in enumerate(values) if isinstance(value, str) and value.lower().endswith(WEIGHT_SUFFIXES)]
    places = dict(enumerate(first)) if first else dict(_paired(files, names))
    return [places.get(at, f"widget {at}") for at in range(len(values))]


def _paired(files: Sequence[int], names: Iterable[str]) -> Iterable[tuple[int, str]]:
    loading = [name for name in names if "name" in name or "model" in name]
    return zip(files, loading, strict=True) if len(files) == len(loading) else ()
