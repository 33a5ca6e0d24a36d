"""Check that a workflow is a graph in ComfyUI's API format; follow and change its links and strings. Pure.

Node classes need not be installed. The check is strict only where ComfyUI would answer with an exception's text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from worker.base.text import quotable
from worker.errors import WorkflowEmpty, WorkflowInvalid, WorkflowMissing, WorkflowNotFinite, WorkflowUiFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

Graph: TypeAlias = dict[str, dict[str, Any]]
"""Maps a node id to `{"class_type": str, "inputs": {name: value or [node id, slot]}, ...}`, as `POST /prompt` expects it."""

# --- is it a graph ------------------------------------------------------------------------------

_LINK_LENGTH = 2
# Several times what real workflows use. ComfyUI is asked about each class, and each name is matched against patterns.
_MAX_CLASSES = 2_000
_MAX_NAME_CHARS = 500


class BrokenLink(list[Any]):
    """A link in a graph that leads nowhere or closes a cycle, as ComfyUI gets it: an empty list. `problem` says what is wrong.

    ComfyUI refuses an input that holds an empty list, drops the outputs that need its node, and runs the others. With the link
    itself, ComfyUI 0.3.75 does so only if the class declares the input. For any other input the link ends the thread that runs
    all prompts. It also drops outputs behind a cycle silently.
    """

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem


def parse_graph(value: object) -> Graph:
    """Return a request's workflow, unchanged, after checking that it is a graph.

    Every node has a class and inputs, every number is finite, every link leads to a node, and links form no cycle. Links that
    break these rules become `BrokenLink`s in a copy, if something that may be an output does not need them. ComfyUI decides
    which nodes are outputs.

    Raises:
        WorkflowMissing: there is no workflow.
        WorkflowUiFormat: it is in the editor's format; `convert` comes first.
        WorkflowEmpty: it has no nodes.
        WorkflowNotFinite: a number in it is NaN or infinite.
        WorkflowInvalid: anything else, naming the node and what to do.
    """
    if value is None:
        raise WorkflowMissing
    if not isinstance(value, dict):
        raise WorkflowInvalid(f"the workflow is {_kind(value)}; send an object in ComfyUI's API format")
    if isinstance(value.get("nodes"), list):
        raise WorkflowUiFormat
    if not value:
        raise WorkflowEmpty
    _check_not_wrapped(value)
    for node_id, node in value.items():
        _check_node(node_id, node)
    if len({node["class_type"] for node in value.values()}) > _MAX_CLASSES:
        raise WorkflowInvalid(f"it names more than {_MAX_CLASSES} node classes")
    return _with_links_broken(cast("Graph", value))


def without_wrapper(value: object) -> object:
    """Return a graph without its wrapper, `{"prompt": ...}` or `{"output": ...}`, and without ComfyUI's notes."""
    match value:
        case {"prompt": dict(inner), **rest} | {"output": dict(inner), **rest} if not rest and "class_type" not in inner:
            value = inner
    return without_notes(value) if isinstance(value, dict) else value


def without_notes(graph: dict[str, Any]) -> dict[str, Any]:
    """Return a graph without `is_changed`. ComfyUI adds it while it runs, and it is often not a finite number."""
    if not any(isinstance(node, dict) and "is_changed" in node for node in graph.values()):
        return graph
    return {
        node_id: {name: value for name, value in node.items() if name != "is_changed"} if isinstance(node, dict) else node
        for node_id, node in graph.items()
    }


def _check_not_wrapped(value: dict[str, Any]) -> None:
    # What people paste: a POST /prompt body, the frontend's {output, workflow}, or a whole request.
    for key in ("prompt", "output", "workflow", "input"):
        inner = value.get(key)
        if not isinstance(inner, dict) or "class_type" in inner:
            continue
        raise WorkflowInvalid(f"the graph is wrapped in '{key}'; send the object inside '{key}' as the workflow")


def _check_node(node_id: object, node: object) -> None:
    if not isinstance(node_id, str):
        raise WorkflowInvalid(f"node {node_id} has {_kind(node_id)} as its id; write node ids as strings")
    if not isinstance(node, dict):
        raise WorkflowInvalid(
            f"node {node_id} is {_kind(node)}; the workflow may hold nodes only, each an object with 'class_type' and 'inputs'"
        )
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not class_type:
        raise WorkflowInvalid(
            f"node {_titled(node_id, node)} has no 'class_type'; the editor exports that for a node it does not know: "
            "install its custom node there and export again, or remove it"
        )
    if len(class_type) > _MAX_NAME_CHARS:
        raise WorkflowInvalid(f"node {_titled(node_id, node)} has a 'class_type' of {len(class_type)} characters")
    # Even if it is unused: ComfyUI accepts such a graph, reads every node's inputs, and its prompt thread ends (0.3.75).
    if not isinstance(node.get("inputs"), dict):
        raise WorkflowInvalid(f"node {node_id} ({class_type}) has no object 'inputs'; send {{}} where there are none")
    for name, value in node["inputs"].items():
        if not is_finite(value):
            raise WorkflowNotFinite(node_id=node_id, input_name=name)
    for name, value in node.items():
        if name != "inputs" and not is_finite(value):
            raise WorkflowNotFinite(node_id=node_id, input_name=name)


def _titled(node_id: str, node: dict[str, Any]) -> str:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return f"{node_id} ('{title}')" if isinstance(title, str) and title else node_id


def is_finite(value: object) -> bool:
    """Return whether JSON can represent every number in a graph: no NaN and no infinity."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                return False
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return True


def _with_links_broken(graph: Graph) -> Graph:
    broken = dict(_broken_links(graph))
    if not broken:
        return graph
    if not _leaves_an_output(graph, {node_id for node_id, _ in broken}):
        raise WorkflowInvalid(next(iter(broken.values())).problem)
    links: dict[str, dict[str, BrokenLink]] = {}
    for (node_id, name), link in broken.items():
        links.setdefault(node_id, {})[name] = link
    return with_inputs(graph, links)


def with_inputs(graph: Graph, values: Mapping[str, Mapping[str, Any]]) -> Graph:
    """Return a copy of the graph with these inputs set, by node. Copy each changed node once."""
    changed = {
        node_id: {**graph[node_id], "inputs": {**graph[node_id]["inputs"], **inputs}} for node_id, inputs in values.items()
    }
    return {**graph, **changed}


def _broken_links(graph: Graph) -> Iterator[tuple[tuple[str, str], BrokenLink]]:
    """Yield node, input and problem: first for links that lead nowhere, then for one link of each cycle."""
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, BrokenLink):
                yield (node_id, name), value
            elif isinstance(value, list) and len(value) == _LINK_LENGTH and (problem := _link_problem(graph, value)):
                where = f"input '{name}' of node {node_id} ({node['class_type']})"
                yield (node_id, name), BrokenLink(f"bad link: {where} {problem}")
    for node_id, name, cycle in _closing_links(graph):
        yield (node_id, name), BrokenLink(f"the links form a cycle, nodes {cycle}; remove one of them")


def _leaves_an_output(graph: Graph, broken: Iterable[str]) -> bool:
    """Return whether a possible output of the graph needs none of these nodes: one that takes a link, and gives none."""
    takers = takers_in(graph)
    spoiled = reachable(broken, takers)
    takes = {taker for each in takers.values() for taker in each}
    return any(node_id not in spoiled and (node_id in takes or node_id not in takers) for node_id in graph)


def takers_in(graph: Graph) -> dict[str, list[str]]:
    """Map a node's id to the nodes that take a link from it, or that try to and name its output or its id wrongly."""
    takers: dict[str, list[str]] = {}
    for node_id, node in graph.items():
        for value in node["inputs"].values():
            meant = isinstance(value, list) and len(value) == _LINK_LENGTH and isinstance(value[0], (str, int))
            if meant and str(value[0]) in graph:
                takers.setdefault(str(value[0]), []).append(node_id)
    return takers


def reachable(starts: Iterable[str], nexts: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """Return the starts and every node of a graph that can be reached from them."""
    found = set(starts)
    waiting = list(found)
    while waiting:
        fresh = set(nexts.get(waiting.pop(), ())) - found
        found |= fresh
        waiting.extend(fresh)
    return frozenset(found)


def _link_problem(graph: Graph, pair: list[Any]) -> str | None:
    """Return what is wrong with a two-element list in a graph. None for a good link and for a possible plain value.

    ComfyUI treats a two-element list as a link if the class declares the input for one. It accepts lists in other inputs as
    they are (validate_inputs in its execution.py). A list that can only be meant as a link, and that would end in ComfyUI's
    `exception_during_validation`, is refused here. ComfyUI judges the rest.
    """
    source, slot = pair
    number = isinstance(slot, (int, float))
    if isinstance(source, str) and source in graph:
        if isinstance(slot, int) and slot >= 0:  # ComfyUI counts a negative index from the end
            return None
        return f"takes output {slot!r} of node {source} ({graph[source]['class_type']}); an output is a whole number from 0"
    if isinstance(source, str) and number:
        return f"comes from node {source}, which is not in the workflow"
    if isinstance(source, int) and number and str(source) in graph:
        return f'comes from node {source} as a number; write the node id as a string: ["{source}", {slot}]'
    return None


_SHOWN_CYCLE = 20  # nodes of a cycle that a sentence lists


def _closing_links(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """Yield node, input and the cycle's nodes, for links whose removal breaks every cycle."""
    done: set[str] = set()
    for root in graph:
        if root in done:
            continue
        path, place = [root], {root: 0}
        following = [_links_into(graph, root)]
        while path:
            node_id = path[-1]
            for name, source in following[-1]:
                if source in place:
                    yield node_id, name, _cycle_in(path, place[source])
                elif source not in done:
                    place[source] = len(path)
                    path.append(source)
                    following.append(_links_into(graph, source))
                    break
            else:
                following.pop()
                done.add(path.pop())
                del place[node_id]


def _links_into(graph: Graph, node_id: str) -> Iterator[tuple[str, str]]:
    return ((name, value[0]) for name, value in graph[node_id]["inputs"].items() if is_link(graph, value))


def _cycle_in(path: Sequence[str], start: int) -> str:
    """Return the nodes of a graph's cycle: those of the path from `start` on, in the order in which data flows."""
    behind = path[max(start + 1, len(path) - _SHOWN_CYCLE) :]
    left_out = ["..."] if len(path) - start - 1 > len(behind) else []
    return " -> ".join([path[start], *reversed(behind), *left_out, path[start]])


def is_link(graph: Graph, value: object) -> bool:
    """Return whether an input's value is a link to a node of this graph: `[node id, slot]`."""
    return (
        isinstance(value, list)
        and len(value) == _LINK_LENGTH
        and isinstance(value[0], str)
        and value[0] in graph
        and isinstance(value[1], (int, float))
    )


def _kind(value: object) -> str:
    kinds = {str: "a string", list: "a list", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


# --- every string in it -------------------------------------------------------------------------


def strings_in(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield every string of a graph's input with its dotted name, in order.

    Lists arrive as `{"__value__": [...]}`, which is the frontend's way to tell them from links. Some inputs are objects
    (Load3D's `image`, a row of LoRAs), so a file name may be nested. Raises `WorkflowInvalid` for names that are too long.
    """
    stack: list[tuple[str, object]] = [(name, value)]
    while stack:
        key, item = stack.pop()
        if len(key) > _MAX_NAME_CHARS:
            raise WorkflowInvalid(f"an input has a name of {len(key)} characters, '{quotable(key, 200)}'")
        if isinstance(item, str):
            yield key, item
        elif isinstance(item, dict):
            stack.extend((key if inner == "__value__" else f"{key}.{inner}", item[inner]) for inner in reversed(item))
        elif isinstance(item, list):
            stack.extend((key, inner) for inner in reversed(item))


# --- what runs, and what changes ----------------------------------------------------------------


def needed_nodes(graph: Graph, outputs: Collection[str]) -> frozenset[str]:
    """Return the nodes that run if these are the graph's output nodes: those that can run, and all their inputs.

    ComfyUI ignores the values of all other nodes (validate_prompt in its execution.py), so their models need not exist.
    """
    broken = (node_id for node_id, node in graph.items() if any(isinstance(v, BrokenLink) for v in node["inputs"].values()))
    spoiled = reachable(broken, takers_in(graph))
    return ancestry(graph, *(node_id for node_id in outputs if node_id not in spoiled))


def last_nodes(graph: Graph) -> dict[str, str]:
    """Return the nodes that no other node takes from, with their classes. Each of them that runs is an output."""
    taken = {source for node_id in graph for _, source in _links_into(graph, node_id)}
    return {node_id: node["class_type"] for node_id, node in graph.items() if node_id not in taken}


def ancestry(graph: Graph, *node_ids: str) -> frozenset[str]:
    """Return these nodes of a graph and all nodes that they take from."""
    return reachable(node_ids, {node_id: [source for _, source in _links_into(graph, node_id)] for node_id in graph})


def with_strings(value: object, change: Callable[[str], str]) -> object:
    """Return a copy of a graph's input with `change` applied to each string in it."""
    root: list[Any] = [value]
    waiting: list[tuple[Any, Any]] = [(root, 0)]
    while waiting:
        holder, key = waiting.pop()
        item = holder[key]
        if isinstance(item, str):
            holder[key] = change(item)
        elif isinstance(item, (list, dict)):
            copy = holder[key] = item.copy()
            waiting.extend((copy, inner) for inner in (copy if isinstance(copy, dict) else range(len(copy))))
    return root[0]
