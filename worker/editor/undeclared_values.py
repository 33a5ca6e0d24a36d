"""Saved values that no declared input takes, under the names that a node pack's own code sends. Pure.

A pack's code in the editor may add widgets to its nodes that `/object_info` does not describe. Without that code the editor
drops such a value. A conversion would do the same, and the node would silently run without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.base.text import quotable
from worker.editor.widgets import InputSpec, ShapeSlot, Widget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from worker.editor.saved_workflow import SavedNode
    from worker.editor.widgets import Definition, NodeShape

# A widget that only displays something, saved by name. It contains paths of the machine that saved it.
_SHOWS: Final = frozenset({"videopreview"})
_CONTROLS: Final = frozenset({"decrement", "fixed", "increment", "increment-wrap", "randomize"})
_BUTTONS: Final = frozenset({"audio", "image", "upload", "video"})

_POWER_LORA: Final = "Power Lora Loader (rgthree)"
_LORA_MANAGER: Final = "(LoraManager)"


def may_send_undeclared(definition: Definition) -> bool:
    """Return whether a class is a custom node, whose pack may send undeclared values by code of its own."""
    return str(definition.get("python_module", "")).startswith("custom_nodes")


def place_undeclared(node: SavedNode, definition: Definition, shape: NodeShape) -> tuple[str, ...]:
    """Name each undeclared value in `shape.left` that the pack's code sends. Return descriptions of the others."""
    if not may_send_undeclared(definition):
        return ()
    nameless = [value for name, value in shape.left if name is None and value not in (None, "", {}, [])]
    found = [(name, value) for name, value in shape.left if name is not None and value is not None and name not in _SHOWS]
    if node.type == _POWER_LORA:
        rows = [value for value in nameless if isinstance(value, dict)]
        found += _power_lora_rows(node, rows)
        nameless = [value for value in nameless if not isinstance(value, dict)]
    elif node.type.endswith(_LORA_MANAGER):
        named = dict(_lora_manager(node, nameless))
        found += named.items()
        nameless = nameless[len(named) :]
    saved = {slot.widget: slot for slot in node.slots if slot.widget}
    for name, value in found:
        shape.widgets.append(Widget(InputSpec(name, "*", "*", {}), name, value))
        if name in saved:
            shape.slots.append(ShapeSlot(name, saved[name].type, name))
    if definition.get("output_node") and not shape.widgets:
        return ()  # the text that it showed after its last run
    return tuple(_described(value) for value in nameless if not _is_no_input(value))


def _power_lora_rows(node: SavedNode, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, object]]:
    separate = node.properties.get("Show Strengths") == "Separate Model & Clip"
    for number, row in enumerate((row for row in rows if "lora" in row), 1):
        second = row.get("strengthTwo")
        strengths = {"strengthTwo": 1 if second is None else second} if separate else {}
        yield f"lora_{number}", {**{key: value for key, value in row.items() if key != "strengthTwo"}, **strengths}


def _lora_manager(node: SavedNode, values: Sequence[object]) -> Iterator[tuple[str, object]]:
    names = ("toggle_trigger_words", "orinalMessage") if "Trigger" in node.type else ("loras",)
    for name, value in zip(names, values, strict=False):
        if isinstance(value, str if name == "orinalMessage" else list):
            yield name, value


def _is_no_input(value: object) -> bool:
    """Return whether the undeclared value is that of a control, a button or a text below a node."""
    if not isinstance(value, str):
        return False
    return value in _CONTROLS or value in _BUTTONS or (value.startswith("<") and value.endswith(">"))


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(repr(quotable(key)) for key in list(value)[:3])}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(quotable(value)) if isinstance(value, str) else str(value)
