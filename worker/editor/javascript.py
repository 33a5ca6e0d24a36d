"""Values as JavaScript has them: what a browser's JSON does to a saved value. Pure."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

from worker.errors import UiWorkflowInvalid

if TYPE_CHECKING:
    from worker.editor.saved_workflow import ConversionBudget

_SAFE_INTEGER = 2**53
_EXPONENT_FROM = 10**21
_MAX_DEPTH = 100


def as_javascript_json(value: object, budget: ConversionBudget) -> object:
    """Return the value after a round trip through JavaScript.

    It has only doubles: 8.0 becomes 8, 2**64 - 1 loses its last digits.

    Raises:
        UiWorkflowInvalid: it is nested too deeply, or the workflow has more values than any real one.
    """
    budget.value(1, len(value) if isinstance(value, str) else 0)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _javascript_number(value)
    return _plain_tree(value, budget) if isinstance(value, (list, dict)) else value


def _plain_tree(value: object, budget: ConversionBudget) -> object:
    root: list[object] = [value]
    waiting: list[tuple[Any, Any, int]] = [(root, 0, 0)]
    while waiting:
        holder, key, depth = waiting.pop()
        item = holder[key]
        if isinstance(item, str):
            budget.value(0, len(item))
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            holder[key] = _javascript_number(item)
        elif isinstance(item, (list, dict)):
            budget.value(len(item))
            if depth > _MAX_DEPTH:
                raise UiWorkflowInvalid("a widget's value is nested too deep")
            copy = holder[key] = cast("Any", item.copy())
            keys = range(len(copy)) if isinstance(copy, list) else list(copy)
            waiting.extend((copy, inner, depth + 1) for inner in keys)
    return root[0]


def _javascript_number(value: float) -> float:
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() and abs(value) < _SAFE_INTEGER else value
    if abs(value) <= _SAFE_INTEGER:
        return value
    try:
        double = float(value)
    except OverflowError:
        return math.inf  # refused later, with the graph's other numbers that JSON cannot represent
    return int(Decimal(repr(double))) if abs(double) < _EXPONENT_FROM else double


def text_of(value: object, depth: int = 0) -> str:
    """Return the value as JavaScript's String() writes it.

    Raises:
        UiWorkflowInvalid: a list in it is nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise UiWorkflowInvalid("a widget's value is nested too deep")
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case list():
            return ",".join(text_of(item, depth + 1) for item in value)
        case dict():
            return "[object Object]"
        case float() if value.is_integer() and abs(value) < _EXPONENT_FROM:
            return str(int(value))
    return str(value)
