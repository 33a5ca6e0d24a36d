"""From a job's graph to one that only loads its weights and takes one step with them: for a worker's start. Pure.

What is kept is chosen by name: node classes of ComfyUI itself that load, patch, sample and decode, and of their inputs those
that are numbers, names of models or words from ComfyUI's own lists. Every text, seed, file and title of the job is left out, as
is every node that is not listed here: custom nodes, paid API nodes, what reads inputs and what saves outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.comfy.workflow import is_link, named_models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.comfy.workflow import Graph

_KEPT: Final[Mapping[str, frozenset[str]]] = {
    "CheckpointLoaderSimple": frozenset({"ckpt_name"}),
    "UNETLoader": frozenset({"unet_name", "weight_dtype"}),
    "CLIPLoader": frozenset({"clip_name", "type", "device"}),
    "DualCLIPLoader": frozenset({"clip_name1", "clip_name2", "type", "device"}),
    "TripleCLIPLoader": frozenset({"clip_name1", "clip_name2", "clip_name3"}),
    "QuadrupleCLIPLoader": frozenset({"clip_name1", "clip_name2", "clip_name3", "clip_name4"}),
    "VAELoader": frozenset({"vae_name"}),
    "LoraLoader": frozenset({"lora_name", "strength_model", "strength_clip"}),
    "LoraLoaderModelOnly": frozenset({"lora_name", "strength_model"}),
    "CLIPSetLastLayer": frozenset({"stop_at_clip_layer"}),
    "ModelSamplingAuraFlow": frozenset({"shift"}),
    "ModelSamplingFlux": frozenset({"max_shift", "base_shift", "width", "height"}),
    "ModelSamplingSD3": frozenset({"shift"}),
    "CLIPTextEncode": frozenset({"text"}),
    "CLIPTextEncodeFlux": frozenset({"clip_l", "t5xxl", "guidance"}),
    "ConditioningZeroOut": frozenset(),
    "FluxGuidance": frozenset({"guidance"}),
    "EmptyLatentImage": frozenset({"width", "height", "batch_size"}),
    "EmptySD3LatentImage": frozenset({"width", "height", "batch_size"}),
    "EmptyHunyuanLatentVideo": frozenset({"width", "height", "length", "batch_size"}),
    "KSampler": frozenset({"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"}),
    "KSamplerSelect": frozenset({"sampler_name"}),
    "BasicScheduler": frozenset({"scheduler", "steps", "denoise"}),
    "BasicGuider": frozenset(),
    "CFGGuider": frozenset({"cfg"}),
    "RandomNoise": frozenset({"noise_seed"}),
    "SamplerCustomAdvanced": frozenset(),
    "VAEDecode": frozenset(),
}
# What these inputs become, whatever the job had: nothing of its text, and the least work that touches all weights. One image,
# one frame and one step, in the job's own width and height, for which kernels are chosen.
_FIXED: Final[Mapping[str, object]] = {
    "text": "",
    "clip_l": "",
    "t5xxl": "",
    "seed": 0,
    "noise_seed": 0,
    "steps": 1,
    "denoise": 1.0,
    "batch_size": 1,
    "length": 1,
}
_SINK: Final = "PreviewAny"  # takes an output of any type, and writes no file


def loading_part(graph: Graph) -> Graph | None:
    """What of a valid graph is worth running again to have its weights loaded; None when that is no model at all.

    Its node ids are new. Applied to its own result it changes nothing, so that a graph which lay on a volume can be put
    through it again.
    """
    kept = {node_id: node for node_id, node in graph.items() if node["class_type"] in _KEPT}
    while lost := [node_id for node_id, node in kept.items() if not _is_fed(graph, kept, node)]:
        for node_id in lost:
            del kept[node_id]
    numbers = {node_id: str(number) for number, node_id in enumerate(kept, start=1)}
    part = {numbers[node_id]: _bare(graph, node, numbers) for node_id, node in kept.items()}
    return part if named_models(part) else None


def runnable(part: Graph) -> Graph:
    """The part with an output node behind each end, without which ComfyUI would run nothing."""
    taken = {value[0] for node in part.values() for value in node["inputs"].values() if is_link(part, value)}
    ends = [node_id for node_id in part if node_id not in taken]
    return part | {f"end-{node_id}": {"class_type": _SINK, "inputs": {"source": [node_id, 0]}} for node_id in ends}


def _is_fed(graph: Graph, kept: Graph, node: dict[str, Any]) -> bool:
    """Whether everything that the node takes from other nodes still comes; what is fixed need not."""
    fixed = _KEPT[node["class_type"]] & _FIXED.keys()
    links = ((name, value) for name, value in node["inputs"].items() if is_link(graph, value))
    return all(value[0] in kept or name in fixed for name, value in links)


def _bare(graph: Graph, node: dict[str, Any], numbers: Mapping[str, str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, value in node["inputs"].items():
        if name in _KEPT[node["class_type"]] and name in _FIXED:
            inputs[name] = _FIXED[name]
        elif is_link(graph, value):
            inputs[name] = [numbers[value[0]], value[1]]
        elif name in _KEPT[node["class_type"]] and isinstance(value, (str, int, float)):
            inputs[name] = value
    return {"class_type": node["class_type"], "inputs": inputs}
