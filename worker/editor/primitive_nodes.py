"""Copy the value of each PrimitiveNode into the widgets that it is linked to. Pure."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

from worker.editor.loaded_nodes import PRIMITIVE
from worker.editor.saved_workflow import MAX_DEFINITIONS

if TYPE_CHECKING:
    from worker.editor.loaded_nodes import LoadedNode, LoadedScope
    from worker.editor.saved_workflow import ConversionBudget
    from worker.editor.widgets import InputSpec


def apply_primitives(loaded: LoadedScope, budget: ConversionBudget) -> dict[tuple[int, int], LoadedNode]:
    """Copy the value of each PrimitiveNode into the widgets that it is linked to, as the editor does when it queues.

    Return the PrimitiveNode that controls each input, by the id() of the input's node and its index.
    """
    steered: dict[tuple[int, int], LoadedNode] = {}
    targets: dict[str, list[tuple[LoadedNode, int]]] = {}
    for part in loaded.parts.values():
        for at, slot in enumerate(part.slots):
            origin = loaded.parts.get(slot.link.origin) if slot.link is not None else None
            if origin is not None and origin.kind == PRIMITIVE:
                targets.setdefault(origin.node.id, []).append((part, at))
    for node_id, found in targets.items():
        primitive = loaded.parts[node_id]
        budget.step(sum(len(part.slots) + len(part.widgets) for part, _ in found))
        _apply_primitive(primitive, found)
        steered.update({(id(part), at): primitive for part, at in found})
    return steered


def _apply_primitive(primitive: LoadedNode, targets: list[tuple[LoadedNode, int]]) -> None:
    values = primitive.node.values
    held = [(part, at, spec) for part, at in targets if (spec := spec_behind(part, at)) is not None]
    if not held:
        return
    value = values[0] if isinstance(values, list) and values else _value_at(*held[0][:2])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and held[0][2].widget_type in {"INT", "FLOAT"}:
        value = max(value, *(_limit(spec, "min", 0) for *_, spec in held))
        value = min(value, *(_limit(spec, "max", 2048) for *_, spec in held))
    for part, at, spec in held:
        _set_value(part, at, rounded(spec, value))


def spec_behind(part: LoadedNode, at: int) -> InputSpec | None:
    """Return the InputSpec of the widget that a PrimitiveNode's link ends in, following nested subgraphs."""
    for _ in range(MAX_DEFINITIONS):
        if part.inner is None:
            widget = part.widget(part.slots[at].widget) if at < len(part.slots) else None
            return widget.spec if widget is not None else None
        source = part.inner.promoted.get(at)
        inner = part.inner.parts.get(source[0]) if source is not None else None
        if source is None or inner is None:
            return None
        if inner.inner is None:
            widget = inner.widget(source[1])
            return widget.spec if widget is not None else None
        part, at = inner, next((index for index, slot in enumerate(inner.slots) if slot.name == source[1]), -1)
    return None


def _value_at(part: LoadedNode, at: int) -> object:
    if part.inner is not None:
        return part.values.get(at, part.inner.initial.get(at))
    widget = part.widget(part.slots[at].widget)
    return widget.value if widget is not None else None


def _set_value(part: LoadedNode, at: int, value: object) -> None:
    if part.inner is not None:
        if at in part.inner.initial:
            part.values[at] = value
    elif (widget := part.widget(part.slots[at].widget)) is not None:
        widget.value = value


def _limit(spec: InputSpec, key: str, default: float) -> float:
    value = spec.options.get(key)
    return value if isinstance(value, (int, float)) else default


def rounded(spec: InputSpec, value: object) -> object:
    """Return a PrimitiveNode's value as a number widget stores it: a whole number of steps, or rounded to its precision."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return value
    if spec.widget_type == "INT":
        step = _limit(spec, "step", 1) or 1
        offset = 0.0 if step == 1 else math.fmod(_limit(spec, "min", 0), step)
        return value if isinstance(value, int) and step == 1 else math.floor((value - offset) / step + 0.5) * step + offset
    if spec.widget_type != "FLOAT":
        return value
    precision = _precision(_limit(spec, "step", 0.5))
    to = _limit(spec, "round", 0) or (10.0**-precision if precision else 0)
    if not to:
        return value
    # toFixed uses the double's exact value and rounds a tie up.
    near = Decimal(math.floor(value / to + 0.5) * to).quantize(Decimal(1).scaleb(-precision), ROUND_HALF_UP)
    return min(max(float(near), _limit(spec, "min", 0)), _limit(spec, "max", 2048))


def _precision(step: float) -> int:
    return max(0, -math.floor(math.log10(step))) if step > 0 else 0
