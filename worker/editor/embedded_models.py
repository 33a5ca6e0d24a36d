"""The models that a saved workflow names in its metadata. Pure."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


_MUTED, _BYPASSED = 2, 4


def embedded_models(workflow: object) -> tuple[Mapping[str, Any], ...]:
    """Return the entries `{name, url, directory, hash?, hash_type?}` of the models that an editor's workflow uses.

    They come from `properties.models` of every active node, including those inside used subgraphs, and from a `models` at the
    top. The name must be the current value of a widget, because editing a node leaves old entries behind.
    """
    graph = _editor_graph(workflow)
    if graph is None:
        return ()
    nodes = list(_active_nodes(graph))
    values = {str(value).replace("\\", "/") for node in nodes for value in _widget_values(node)}
    lists = [graph.get("models"), *(_properties(node).get("models") for node in nodes)]
    entries = chain.from_iterable(map(_dicts, lists))
    return tuple(entry for entry in entries if str(entry.get("name", "")).replace("\\", "/") in values)


def _editor_graph(value: object) -> Mapping[str, Any] | None:
    while isinstance(value, dict):
        if isinstance(value.get("nodes"), list):
            return value
        value = next((value[key] for key in ("extra_data", "extra_pnginfo", "workflow") if key in value), None)
    return None


def _active_nodes(graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the nodes whose embedded models count: neither muted nor bypassed. Yield a subgraph's nodes once if it is used."""
    definitions = graph.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    by_id = {str(inner.get("id")): inner for inner in _dicts(subgraphs)}
    waiting = [graph]
    while waiting:
        for node in _dicts(waiting.pop().get("nodes")):
            if node.get("mode") not in (_MUTED, _BYPASSED):
                yield node
                if inner := by_id.pop(str(node.get("type")), None):
                    waiting.append(inner)


def _dicts(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _properties(node: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = node.get("properties")
    return properties if isinstance(properties, dict) else {}


def _widget_values(node: Mapping[str, Any]) -> Iterator[object]:
    values = node.get("widgets_values")
    if isinstance(values, dict):
        yield from values.values()
    elif isinstance(values, list):
        yield from values
