"""Change values of a graph: by a request's overrides, or as the editor changes seeds between runs. Pure but for the draws."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worker.base.text import quotable
from worker.comfyui_data import known
from worker.errors import OverrideInvalid
from worker.graph.graph import with_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from worker.editor.convert import Control
    from worker.graph.graph import Graph

# 32 bits: some nodes accept no more, and nobody makes that many pictures.
_SEED_RANGE = 1 << 32
_NAMED = 8  # candidates that a sentence lists
_MAX_KEY_CHARS = 1_000
_MAX_DOTS = 16  # dots, counted from a key's end, that may separate node and input


def apply_overrides(graph: Graph, overrides: Mapping[str, Any]) -> Graph:
    """Return a copy of the graph with the values set that `overrides` gives by `NODE.INPUT`.

    NODE is a node's id (`6`, in a subgraph `12:5`), or its title, or its class. Title and class must be unique. INPUT follows
    the last dot, or an earlier one if the input's own name contains dots (`3.resize_type.width`). A value replaces a link. A
    list that is not a link to a node of the graph is sent as a list.

    Raises:
        OverrideInvalid: no node, several nodes or no such input; the sentence names the candidates. Also a link to an output
            that is no whole number from 0.
    """
    index = _NodeIndex(graph)
    values: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        node_id, name = index.find(key)
        values.setdefault(node_id, {})[name] = _as_input(graph, key, value)
    return with_inputs(graph, values)


def _as_input(graph: Graph, key: str, value: object) -> object:
    if not isinstance(value, list):
        return value
    match value:
        case [str(node_id), int() | float() as slot] if node_id in graph:
            if slot < 0 or (isinstance(slot, float) and not slot.is_integer()):
                takes = f"takes output {slot!r} of node {quotable(node_id)}; an output is a whole number from 0"
                raise OverrideInvalid(quotable(key), takes)
            return [node_id, int(slot)]
    return {"__value__": value}


class _NodeIndex:
    """The nodes of a graph by id, title and class, for overrides."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._titles: dict[str, list[str]] = {}
        self._classes: dict[str, list[str]] = {}
        for node_id, node in graph.items():
            meta = node.get("_meta")
            title = meta.get("title") if isinstance(meta, dict) else None
            if isinstance(title, str):
                self._titles.setdefault(title, []).append(node_id)
            self._classes.setdefault(str(node.get("class_type")), []).append(node_id)

    def find(self, key: object) -> tuple[str, str]:
        """Return the node id and the input that a key means."""
        if not isinstance(key, str) or not key.strip(".") or len(key) > _MAX_KEY_CHARS:
            raise OverrideInvalid(quotable(str(key)), "is not NODE.INPUT; write '6.text' or 'KSampler.seed'")
        problem = None
        for place, name in _splits(key):
            ids = self._nodes(place)
            if len(ids) == 1:
                if name in self._graph[ids[0]]["inputs"]:
                    return ids[0], name
                problem = problem or self._no_input(ids[0], name)
            elif ids:
                problem = problem or f"matches the nodes {_list(ids)}; use one of these ids instead of '{quotable(place)}'"
        raise OverrideInvalid(quotable(key), problem or self._no_node(key))

    def _nodes(self, place: str) -> list[str]:
        if place in self._graph:
            return [place]
        return self._titles.get(place) or self._classes.get(place) or []

    def _no_input(self, node_id: str, name: str) -> str:
        node = self._graph[node_id]
        inputs = _list(node["inputs"]) or "none"
        return f"finds no input '{quotable(name)}' at node {node_id} ({node.get('class_type')}), which has {inputs}"

    def _no_node(self, key: str) -> str:
        if "." not in key:
            return "is not NODE.INPUT; write '6.text' or 'KSampler.seed'"
        nodes = (f"{node_id} ({quotable(str(node.get('class_type')))})" for node_id, node in self._graph.items())
        return f"finds no node by that id, title or class; there are {_list(nodes)}"


def _splits(key: str) -> Iterator[tuple[str, str]]:
    at = len(key)
    for _ in range(_MAX_DOTS):
        if (at := key.rfind(".", 0, at)) <= 0:
            return
        yield key[:at], key[at + 1 :]


def _list(items: Any) -> str:  # noqa: ANN401 - any iterable of strings
    found = [quotable(item) for item in items]
    more = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- what changes from run to run ---------------------------------------------------------------

# The editor's own limits for a random number: exact in a double, and usable by a slider.
_LOWEST, _HIGHEST = -(2**50), 2**50


def next_values(graph: Graph, controls: Sequence[Control], draw: Callable[[], float]) -> Graph:
    """Return a copy of the graph with every controlled value overridden as the editor would set it for the next run.

    `fixed` keeps the value, `increment`, `increment-wrap` and `decrement` move one step or option, `randomize` draws one. A
    value that was overridden with something that cannot be counted stays.
    """
    values: dict[str, dict[str, Any]] = {}
    for control in controls:
        node_id, name = control.targets[0]
        value = graph[node_id]["inputs"].get(name)
        following = _next_value(control, value, draw)
        for target, target_name in control.targets:
            if graph[target]["inputs"].get(target_name) == value:
                values.setdefault(target, {})[target_name] = following
    return with_inputs(graph, values)


def _next_value(control: Control, value: object, draw: Callable[[], float]) -> object:
    if control.spec.widget_type == "COMBO":
        return _next_option(control, value, draw)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or control.spec.widget_type != "INT":
        return value
    low = max(_option(control, "min", 0), _LOWEST)
    high = min(_option(control, "max", 2048), _HIGHEST)
    step = max(_option(control, "step", 1), 1)
    match control.mode:
        case "increment" | "increment-wrap":
            following = value + step
        case "decrement":
            following = value - step
        case "randomize":
            following = low + math.floor(draw() * ((high - low) // step)) * step
        case _:
            return value
    return int(min(max(following, low), high))


def _option(control: Control, name: str, default: int) -> int:
    value = control.spec.options.get(name)
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else default


def _next_option(control: Control, value: object, draw: Callable[[], float]) -> object:
    choices = control.spec.choices
    if not choices or value not in choices:
        return value
    at = choices.index(value)
    match control.mode:
        case "increment":
            at = min(at + 1, len(choices) - 1)
        case "increment-wrap":
            at = (at + 1) % len(choices)
        case "decrement":
            at = max(at - 1, 0)
        case "randomize":
            at = min(math.floor(draw() * len(choices)), len(choices) - 1)
    return choices[at]


def reseeded(graph: Graph, controls: Sequence[Control], seed: str | int) -> Graph:
    """Return a copy of the graph with other seeds: `next` as the editor would set them for the next run, `random`, or a number.

    Seeds are the values that the editor's format marks with `control_after_generate`. In a graph without marks they are the
    numbers called `seed` or `noise_seed`.
    """
    if seed == "next":
        return next_values(graph, controls, random.random)
    if controls and seed == "random":
        return next_values(graph, [replace(control, mode="randomize") for control in controls], random.random)
    marked = {target for control in controls for target in control.targets}
    return {node_id: _with_seeds(node_id, node, marked, seed) for node_id, node in graph.items()}


def _with_seeds(node_id: str, node: dict[str, Any], marked: set[tuple[str, str]], seed: str | int) -> dict[str, Any]:
    values = {
        name: random.randrange(_SEED_RANGE) if seed == "random" else seed  # noqa: S311 - a picture's seed, no secret
        for name, value in node["inputs"].items()
        if isinstance(value, int) and ((node_id, name) in marked if marked else name in known().editor.seeds)
    }
    return {**node, "inputs": {**node["inputs"], **values}} if values else node
