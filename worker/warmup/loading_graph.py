"""Reduce a job's graph to one that only loads its weights and takes one step, for a worker's start. Pure.

The parts are chosen by name: node classes of ComfyUI itself that load, patch, sample and decode, and of their inputs numbers,
names of models, and words from ComfyUI's own lists. Every text, seed, file and title of the job is left out. So is every
unlisted node: custom nodes, paid API nodes, and nodes that read inputs or save outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.comfyui_data import known
from worker.graph.graph import is_link
from worker.graph.model_names import named_models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.graph.graph import Graph

_SINK: Final = "PreviewAny"  # takes an output of any type, and writes no file


def loading_part(graph: Graph) -> Graph | None:
    """Return the part of a valid graph that loads its weights, or None if it loads no model.

    Its node ids are new. The result is a fixed point: applied again it changes nothing, so a graph from a volume can be put
    through it.
    """
    kept = {node_id: node for node_id, node in graph.items() if node["class_type"] in known().warmup_kept}
    while lost := [node_id for node_id, node in kept.items() if not _is_fed(graph, kept, node)]:
        for node_id in lost:
            del kept[node_id]
    numbers = {node_id: str(number) for number, node_id in enumerate(kept, start=1)}
    part = {numbers[node_id]: _bare(graph, node, numbers) for node_id, node in kept.items()}
    return part if named_models(part) else None


def runnable_part(part: Graph) -> Graph:
    """Return the loading part of a graph with an output node behind each end. Without these ComfyUI would run nothing."""
    taken = {value[0] for node in part.values() for value in node["inputs"].values() if is_link(part, value)}
    ends = [node_id for node_id in part if node_id not in taken]
    return part | {f"end-{node_id}": {"class_type": _SINK, "inputs": {"source": [node_id, 0]}} for node_id in ends}


def _is_fed(graph: Graph, kept: Graph, node: dict[str, Any]) -> bool:
    """Return whether the loading part still has everything that the node takes from other nodes. Constants do not matter."""
    fixed = known().warmup_kept[node["class_type"]] & known().warmup_fixed.keys()
    links = ((name, value) for name, value in node["inputs"].items() if is_link(graph, value))
    return all(value[0] in kept or name in fixed for name, value in links)


def _bare(graph: Graph, node: dict[str, Any], numbers: Mapping[str, str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, value in node["inputs"].items():
        if name in known().warmup_kept[node["class_type"]] and name in known().warmup_fixed:
            inputs[name] = known().warmup_fixed[name]
        elif is_link(graph, value):
            inputs[name] = [numbers[value[0]], value[1]]
        elif name in known().warmup_kept[node["class_type"]] and isinstance(value, (str, int, float)):
            inputs[name] = value
    return {"class_type": node["class_type"], "inputs": inputs}
