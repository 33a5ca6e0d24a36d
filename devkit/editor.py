"""Small workflows in the editor's format and the node classes they use, for tests and benchmarks. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

INFO: dict[str, Any] = {
    "Loader": {"input": {"required": {"name": [["a.safetensors", "b.safetensors"]]}}, "output": ["MODEL", "CLIP"]},
    "Text": {
        "input": {"required": {"text": ["STRING", {"multiline": True, "dynamicPrompts": True}], "clip": ["CLIP"]}},
        "output": ["COND"],
        "display_name": "Text Encode",
    },
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1}],
                "steps": ["INT", {"default": 20, "min": 1, "max": 100}],
                "cfg": ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}],
                "mode": [["fast", "slow"]],
            },
            "optional": {"cond": ["COND"], "tiled": ["BOOLEAN", {"default": True}]},
        },
        "input_order": {"required": ["model", "cond", "seed", "steps", "cfg", "mode"], "optional": ["tiled"]},
        "output": ["IMAGE"],
        "display_name": "The Sampler",
    },
    "Patch": {
        "input": {"required": {"clip": ["CLIP"], "model": ["MODEL"], "strength": ["FLOAT", {"default": 1.0}]}},
        "output": ["MODEL", "CLIP"],
    },
    "Number": {"input": {"required": {"value": ["INT", {"default": 1}]}}, "output": ["INT"]},
    "Forced": {
        "input": {"required": {"a": ["INT", {"forceInput": True}], "b": ["INT", {"default": 5}], "c": ["STRING"]}},
        "output": ["INT"],
    },
    "SaveImage": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {"default": "ComfyUI"}]}},
        "output": [],
    },
    "LoadImage": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}}, "output": ["IMAGE", "MASK"]},
    "Resize": {
        "input": {
            "required": {
                "kind": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {
                                "key": "size",
                                "inputs": {"required": {"width": ["INT", {"default": 512}], "height": ["INT", {}]}},
                            },
                            {
                                "key": "like",
                                "inputs": {"required": {"image": ["IMAGE"]}, "optional": {"crop": [["no", "yes"]]}},
                            },
                        ]
                    },
                ],
                "method": ["COMBO", {"options": ["area", "lanczos"]}],
                "input": ["COMFY_MATCHTYPE_V3", {"template": {"template_id": "t", "allowed_types": "IMAGE,MASK"}}],
            }
        },
        "output": ["COMFY_MATCHTYPE_V3"],
        "has_intermediate_output": False,
    },
    "Batch": {
        "input": {
            "required": {
                "images": [
                    "COMFY_AUTOGROW_V3",
                    {"template": {"input": {"required": {"image": ["IMAGE", {}]}}, "prefix": "i", "min": 1}},
                ]
            }
        },
        "output": ["IMAGE"],
    },
}


def node(node_id: int | str, kind: str, values: object = None, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a node may have
    """Return a node.

    `inputs` are `name: link`, or `name: (type, link)`, with a trailing `*` at the name for a widget's input.
    """
    inputs = []
    for name, link in more.pop("inputs", {}).items():
        kind_of, link_id = link if isinstance(link, tuple) else ("*", link)
        slot = {"name": name.rstrip("*"), "type": kind_of, "link": link_id}
        inputs.append(slot | ({"widget": {"name": slot["name"]}} if name.endswith("*") else {}))
    outputs = [{"name": name, "type": name} for name in more.pop("outputs", ())]
    return {"id": node_id, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": values} | more


def ui(*nodes: dict[str, Any], links: Iterable[Any] = (), **more: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a workflow may have
    """Return a workflow. Links are `(id, origin, slot, target, slot)`."""
    return {"nodes": list(nodes), "links": [[*link, "*"] for link in links], "version": 0.4} | more


def subgraph(
    name: str, *nodes: dict[str, Any], links: Iterable[Any], inputs: Iterable[Any] = (), outputs: Iterable[Any] = ()
) -> dict[str, Any]:
    """Return a subgraph definition. Ports are `(name, type, [link ids])`."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    return {
        "id": name,
        "name": name,
        "nodes": list(nodes),
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        "inputs": [{"name": port, "type": kind, "linkIds": ids} for port, kind, ids in inputs],
        "outputs": [{"name": port, "type": kind, "linkIds": ids} for port, kind, ids in outputs],
    }


LOADER = node(1, "Loader", ["b.safetensors"], outputs=("MODEL", "CLIP"))


def inner() -> dict[str, Any]:
    """Return a sampler whose model comes from outside and whose steps are promoted."""
    sampler = node(20, "Sampler", [5, "randomize", 25], inputs={"model": 1, "steps*": 2}, outputs=("IMAGE",))
    return subgraph(
        "In",
        sampler,
        links=[(1, -10, 0, 20, 0), (2, -10, 1, 20, 3), (3, 20, 0, -20, 0)],
        inputs=[("model", "MODEL", [1]), ("steps", "INT", [2])],
        outputs=[("IMAGE", "IMAGE", [3])],
    )


def outer() -> dict[str, Any]:
    """Return a subgraph around that one, which promotes the promoted widget."""
    instance = node(10, "In", inputs={"model": 1, "steps*": 2}, outputs=("IMAGE",))
    return subgraph(
        "Out",
        instance,
        links=[(1, -10, 0, 10, 0), (2, -10, 1, 10, 1), (3, 10, 0, -20, 0)],
        inputs=[("model", "MODEL", [1]), ("count", "INT", [2])],
        outputs=[("IMAGE", "IMAGE", [3])],
    )


def with_instance(kind: str, values: object = None, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a node may have
    """Return a loader, an instance of one of these two subgraphs (`In`, `Out`), and a node that saves its picture."""
    instance = node(8, kind, values, inputs={"model": 1}, outputs=("IMAGE",), **more)
    save = node(9, "SaveImage", inputs={"images": ("IMAGE", 2)})
    links = [(1, 1, 0, 8, 0), (2, 8, 0, 9, 0)]
    return ui(LOADER, instance, save, links=links, last_node_id=30, definitions={"subgraphs": [outer(), inner()]})


def large(count: int) -> dict[str, Any]:
    """Return a realistic workflow of `count` nodes: chains through reroutes and bypassed nodes, a fifth in subgraphs."""
    nodes: list[dict[str, Any]] = [LOADER]
    links: list[tuple[int, int, int, int, int]] = []
    tail = 1
    while len(nodes) + len(nodes) // 5 < count:
        at = len(nodes) + 100
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("Reroute", {"inputs": {"": len(links) + 1}, "outputs": ("*",)}),
            (
                "Patch",
                {"inputs": {"model": ("MODEL", len(links) + 2)}, "outputs": ("MODEL", "CLIP"), "mode": 4 * (at % 3 == 0)},
            ),
            ("Sampler", {"inputs": {"model": ("MODEL", len(links) + 3)}, "outputs": ("IMAGE",)}),
            ("SaveImage", {"inputs": {"images": ("IMAGE", len(links) + 4)}}),
            ("Text", {}),
            ("Out", {"inputs": {"model": ("MODEL", len(links) + 5)}}),
        ]
        values = {
            "Patch": [0.5],
            "Sampler": [at, "randomize", 20, 7.5, "slow", True],
            "Text": ["a {red|blue} cat"],
            "Out": [30],
        }
        nodes += [node(at + offset, kind, values.get(kind), **more) for offset, (kind, more) in enumerate(kinds)]
        for offset, (origin, target) in enumerate(
            [(tail, at), (at, at + 1), (at + 1, at + 2), (at + 2, at + 3), (at + 1, at + 5)]
        ):
            links.append((len(links) + 1, origin, 0, target, 1 if offset == 1 else 0))
        tail = at + 1
    return ui(*nodes, links=links, definitions={"subgraphs": [outer(), inner()]})
