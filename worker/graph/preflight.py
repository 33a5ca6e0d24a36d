"""What of a graph ComfyUI would refuse whatever files there are, by its own definitions of node classes. Pure.

It decides what is worth a download or a read, and never what a client is told: the graph goes to ComfyUI all the same. So what
is not certain passes: types that are worked out from other values, choices that may be files, and values of classes that may
check them by code of their own, as those of custom nodes.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from worker.comfyui_data import is_older, known
from worker.graph.graph import BrokenLink, is_link, reachable, takers_in
from worker.graph.model_names import named_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from worker.graph.graph import Graph

_CONVERSIONS: Final[Mapping[object, Callable[[Any], float]]] = {"INT": int, "FLOAT": float}
_LINK_LENGTH: Final = 2
_A_MODEL: Final = object()
"""In place of a value that names a model: it is no number, and a choice that may still come."""
_DYNAMIC: Final = "COMFY_"  # types that a value makes other inputs of, and types that match others
_DYNAMIC_COMBO: Final = "COMFY_DYNAMICCOMBO_V3"
_UPLOADS: Final = ("image_upload", "video_upload", "audio_upload", "file_upload", "upload", "remote", "multiselect")
# A path, a name with a suffix, or one with its folder behind it: `a/b`, `a.yaml`, `a.png [output]`. `v1.5` is none.
_FILE: Final = re.compile(r"[/\\]|\.\w*[A-Za-z]\w*$|\]$")


def runnable_outputs(graph: Graph, definitions: Mapping[str, Any], release: str | None = None) -> list[str]:
    """Return, before its files are there, the output nodes of a graph that a release of ComfyUI may run then.

    Nodes of unknown classes may be outputs.
    """
    unknown = {"output_node": True}
    spoiled = reachable(refused_nodes(graph, definitions, release), takers_in(graph))
    outputs = (key for key, node in graph.items() if definitions.get(node["class_type"], unknown).get("output_node"))
    return [node_id for node_id in outputs if node_id not in spoiled]


def refused_nodes(graph: Graph, definitions: Mapping[str, Any], release: str | None = None) -> dict[str, str]:
    """Return the nodes that ComfyUI refuses whatever files there are, each with the name of an input that is the reason."""
    found: dict[str, str] = {}
    models = {(model.node_id, model.input_name) for model in named_models(graph)}  # their files may still come
    rules = _Rules(graph, definitions, checks_combos=_checks_combos(release))
    for node_id, node in graph.items():
        inputs = {name: _A_MODEL if (node_id, name) in models else value for name, value in node["inputs"].items()}
        if (name := rules.refused_input(node["class_type"], inputs)) is not None:
            found[node_id] = name
    return found


def _checks_combos(release: str | None) -> bool:
    version = (release or "").removeprefix("v")
    return version[:1].isdigit() and not is_older(version, known().combos_checked_since)


@cache
def _may_check_itself(class_type: str) -> bool:
    return class_type in known().judged_by_code or not known().is_own(class_type)


class _Rules:
    """ComfyUI's own rules (validate_inputs in its execution.py), as far as definitions show what they say of an input."""

    def __init__(self, graph: Graph, definitions: Mapping[str, Any], *, checks_combos: bool) -> None:
        self._graph = graph
        self._definitions = definitions
        self._checks_combos = checks_combos

    def refused_input(self, class_type: str, inputs: Mapping[str, Any]) -> str | None:
        """Return the name of an input for which ComfyUI refuses a node, or None."""
        definition = self._definitions.get(class_type)
        if not definition:
            return None
        is_certain = not _may_check_itself(class_type)
        for name, config, required in self._declared(_as_object(definition.get("input")), inputs):
            if name not in inputs:
                if required:
                    return name
            elif self._is_refused(inputs[name], config, is_certain=is_certain):
                return name
        return None

    def _declared(
        self, groups: Mapping[str, Any], inputs: Mapping[str, Any], prefix: str = ""
    ) -> Iterator[tuple[str, list[Any], bool]]:
        """Yield the inputs that are what they seem: name, type and options, whether it is required."""
        for group in ("required", "optional"):
            for name, config in _as_object(groups.get(group)).items():
                if not isinstance(config, list) or not config:
                    continue
                if not (isinstance(config[0], str) and config[0].startswith(_DYNAMIC)):
                    yield prefix + name, config, group == "required"
                elif config[0] == _DYNAMIC_COMBO and self._checks_combos:
                    brought = _brought_by(inputs.get(prefix + name), _options(config))
                    yield from self._declared(brought, inputs, f"{prefix}{name}.")

    def _is_refused(self, value: Any, config: list[Any], *, is_certain: bool) -> bool:  # noqa: ANN401 - any JSON
        kind, options = config[0], _options(config)
        if isinstance(value, list):
            if isinstance(value, BrokenLink) or len(value) != _LINK_LENGTH:
                return True
            return is_link(self._graph, value) and self._is_mismatch(value, kind, is_certain=is_certain)
        if isinstance(value, dict) and "__value__" in value:
            value = value["__value__"]
        if isinstance(kind, str) and kind in _CONVERSIONS:
            return _is_no_number(value, _CONVERSIONS[kind], options if is_certain else {})
        if not is_certain:
            return False
        choices = (
            kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" and self._checks_combos else None
        )
        return isinstance(choices, list) and _is_no_choice(value, choices, options)

    def _is_mismatch(self, link: list[Any], kind: object, *, is_certain: bool) -> bool:
        source = self._definitions.get(self._graph[link[0]]["class_type"])
        given = source.get("output") if source else None
        if not isinstance(given, list) or not isinstance(link[1], int):
            return False
        if link[1] >= len(given):
            return True
        received = given[link[1]]
        if not (is_certain and isinstance(received, str) and isinstance(kind, str)) or kind == "COMBO":
            return False
        received_types, taken = ({part.strip() for part in text.split(",")} for text in (received, kind))
        odd = {part for part in received_types | taken if part == "*" or part.startswith(_DYNAMIC)}
        return not odd and received_types.isdisjoint(taken)


def _as_object(value: object) -> Mapping[str, Any]:
    """Return the value in a definition if it is an object that ComfyUI's rules can read. Node packs make any shape."""
    return value if isinstance(value, dict) else {}


def _options(config: list[Any]) -> Mapping[str, Any]:
    return _as_object(config[1]) if len(config) > 1 else {}


def _brought_by(value: object, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the inputs that a dynamic combo's value brings."""
    choices = options.get("options")
    chosen = (_as_object(each) for each in choices) if isinstance(choices, list) else ()
    return next((_as_object(each.get("inputs")) for each in chosen if "key" in each and each["key"] == value), {})


def _is_no_number(value: object, convert: Callable[[Any], float], options: Mapping[str, Any]) -> bool:
    try:
        number = convert(value)
    except (TypeError, ValueError, OverflowError):
        return True
    low, high = options.get("min"), options.get("max")
    below = isinstance(low, (int, float)) and number < low
    return below or (isinstance(high, (int, float)) and number > high)


def _is_no_choice(value: object, choices: list[Any], options: Mapping[str, Any]) -> bool:
    """Return whether ComfyUI refuses the value as none of the choices, and it is certainly no file, which may come later."""
    if value is _A_MODEL or value in choices or not choices or any(options.get(flag) for flag in _UPLOADS):
        return False
    return not (isinstance(value, str) and _FILE.search(value))
