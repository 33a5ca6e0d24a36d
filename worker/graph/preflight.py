"""What of a graph ComfyUI would refuse whatever files there are, by its own definitions of node classes. Pure.

It decides what is worth a download or a read, and never what a client is told: the graph goes to ComfyUI all the same. So what
is not certain passes: inputs whose type is worked out from other values, and choices that may be files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.graph.graph import BrokenLink, is_link, reached, takers_in
from worker.graph.model_names import named_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from worker.graph.graph import Graph

_CONVERSIONS: Final[Mapping[object, Callable[[Any], float]]] = {"INT": int, "FLOAT": float}
_LINK_LENGTH: Final = 2
_A_MODEL: Final = object()
"""In place of a value that names a model: it is no number, and a choice that may still come."""
_DYNAMIC: Final = "COMFY_"  # types that a value makes other inputs of, and types that match others
_UPLOADS: Final = ("image_upload", "video_upload", "audio_upload", "file_upload", "upload", "remote", "multiselect")


def runnable_outputs(graph: Graph, definitions: Mapping[str, Any]) -> list[str]:
    """Return the output nodes that ComfyUI may run, once their files are there. Nodes of unknown classes may be outputs."""
    unknown = {"output_node": True}
    spoiled = reached(refused_nodes(graph, definitions), takers_in(graph))
    outputs = (key for key, node in graph.items() if definitions.get(node["class_type"], unknown).get("output_node"))
    return [node_id for node_id in outputs if node_id not in spoiled]


def refused_nodes(graph: Graph, definitions: Mapping[str, Any]) -> dict[str, str]:
    """Return the nodes that ComfyUI refuses whatever files there are, each with the name of an input that is the reason."""
    found: dict[str, str] = {}
    models = {(model.node_id, model.input_name) for model in named_models(graph)}  # their files may still come
    for node_id, node in graph.items():
        definition = definitions.get(node["class_type"])
        inputs = {name: _A_MODEL if (node_id, name) in models else value for name, value in node["inputs"].items()}
        if definition and (name := _refused_input(graph, inputs, definition, definitions)) is not None:
            found[node_id] = name
    return found


def _refused_input(
    graph: Graph, inputs: Mapping[str, Any], definition: Mapping[str, Any], definitions: Mapping[str, Any]
) -> str | None:
    for name, config, required in _declared(definition):
        if name not in inputs:
            if required:
                return name
        elif _is_refused(graph, inputs[name], config, definitions):
            return name
    return None


def _declared(definition: Mapping[str, Any]) -> Iterator[tuple[str, list[Any], bool]]:
    """Yield the inputs of a class that are what they seem: name, type and options, whether it is required."""
    groups = _object(definition.get("input"))
    for group in ("required", "optional"):
        for name, config in _object(groups.get(group)).items():
            if isinstance(config, list) and config and not (isinstance(config[0], str) and config[0].startswith(_DYNAMIC)):
                yield name, config, group == "required"


def _object(value: object) -> Mapping[str, Any]:
    """Return the value where it is an object. Node packs make definitions of any shape."""
    return value if isinstance(value, dict) else {}


def _is_refused(graph: Graph, value: Any, config: list[Any], definitions: Mapping[str, Any]) -> bool:  # noqa: ANN401 - any JSON
    kind, options = config[0], config[1] if len(config) > 1 and isinstance(config[1], dict) else {}
    if isinstance(value, list):
        if isinstance(value, BrokenLink) or len(value) != _LINK_LENGTH:
            return True
        return is_link(graph, value) and _is_mismatch(graph, value, kind, definitions)
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    if isinstance(kind, str) and kind in _CONVERSIONS:
        return _is_no_number(value, _CONVERSIONS[kind], options)
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    return isinstance(choices, list) and _is_no_choice(value, choices, options)


def _is_mismatch(graph: Graph, link: list[Any], kind: object, definitions: Mapping[str, Any]) -> bool:
    source = definitions.get(graph[link[0]]["class_type"])
    given = source.get("output") if source else None
    if not isinstance(given, list) or not isinstance(link[1], int):
        return False
    if link[1] >= len(given):
        return True
    received = given[link[1]]
    if not (isinstance(received, str) and isinstance(kind, str)) or kind == "COMBO":
        return False
    received_types, taken = ({part.strip() for part in text.split(",")} for text in (received, kind))
    odd = {part for part in received_types | taken if part == "*" or part.startswith(_DYNAMIC)}
    return not odd and received_types.isdisjoint(taken)


def _is_no_number(value: object, convert: Callable[[Any], float], options: Mapping[str, Any]) -> bool:
    try:
        number = convert(value)
    except (TypeError, ValueError, OverflowError):
        return True
    low, high = options.get("min"), options.get("max")
    below = isinstance(low, (int, float)) and number < low
    return below or (isinstance(high, (int, float)) and number > high)


def _is_no_choice(value: object, choices: list[Any], options: Mapping[str, Any]) -> bool:
    """Return whether it is none of the choices, where they are certainly no files: those come with the job."""
    if value is _A_MODEL or value in choices or not choices or any(options.get(flag) for flag in _UPLOADS):
        return False
    return not (isinstance(value, str) and ("." in value or "/" in value or "\\" in value or value.endswith("]")))
