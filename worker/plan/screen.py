"""A plan as text for a terminal. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from worker.base.text import count, size_text, wrapped
from worker.plan.items import FETCHED, THERE, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.plan.items import Item, Plan


_WHAT_TO_DO_WITH_UNKNOWN: Final = (
    "No list of models knows what is UNKNOWN: put the file under models/ on the volume, "
    "or name its source in models.toml or in the request's 'models'."
)
_LABEL_WIDTH: Final = max(map(len, State))
_SIZE_WIDTH: Final = len("999.9 GB")
_INDENT: Final = 2 + _LABEL_WIDTH + 2 + _SIZE_WIDTH + 2


def plan_lines(title: str, plan: Plan, width: int) -> Iterator[str]:
    """Yield the plan's lines. What needs action comes last."""
    there, blocking = sum(item.state in THERE for item in plan.items), sum(item.blocking for item in plan.items)
    stopping = f", {blocking} in the way" if blocking else ""
    yield f"{title}: {count(len(plan.items), 'model')}, {there} there, {len(plan.to_fetch)} to fetch{stopping}"
    yield ""
    for item in sorted(plan.items, key=_rank):
        yield row(item.state.upper() if item.blocking else item.state, item.size_bytes, item.title)
        for text in _details(item):
            yield from wrapped(text, _INDENT, width)
    if plan.items:
        yield ""
    yield from _totals(plan, width)


def _rank(item: Item) -> tuple[bool, int]:
    return item.blocking, list(State).index(item.state)


def row(label: str, size_bytes: int | None, text: str) -> str:
    """Return a line of the list: state, size, name."""
    size = "?" if size_bytes is None else size_text(size_bytes)
    return f"  {label:<{_LABEL_WIDTH}}  {size:>{_SIZE_WIDTH}}  {text}"


def _details(item: Item) -> Iterator[str]:
    if item.spec and item.state in FETCHED:
        yield f"{item.spec.source}" + (f" ({item.known_by})" if item.known_by else "")
    if item.begun_bytes:
        yield f"{size_text(item.begun_bytes)} of it are on the volume already"
    if item.message and not (item.state is State.UNKNOWN and item.blocking):
        yield item.message
    if item.blocking and item.nodes:
        yield "named by " + ", ".join(f"node {node.node_id} ({node.class_type})" for node in item.nodes)
    if item.near:
        yield f"near: {', '.join(item.near)}"


def _totals(plan: Plan, width: int) -> Iterator[str]:
    if plan.to_fetch:
        unknown = f", {plan.unknown_sizes} of unknown size" if plan.unknown_sizes else ""
        yield row("to fetch", plan.fetch_bytes, f"in {count(len(plan.to_fetch), 'file')}{unknown}")
    if plan.free_bytes is not None:
        yield row("free", plan.free_bytes, f"on {plan.target}, less if there is a quota")
    yield ""
    for text in plan.notes:
        yield from wrapped(text, 0, width)
    if any(item.state is State.UNKNOWN and item.blocking for item in plan.items):
        yield from wrapped(_WHAT_TO_DO_WITH_UNKNOWN, 0, width)
    for problem in plan.problems:
        yield from wrapped(str(problem), 0, width)
    yield _verdict(plan)


def _verdict(plan: Plan) -> str:
    if plan.can_run:
        unasked = sum(item.state is State.NO_ANSWER for item in plan.items)
        return "can run" + (f", if the {count(unasked, 'model')} without an answer can be fetched" if unasked else "")
    states = Counter(item.state for item in sorted(plan.items, key=_rank) if item.blocking)
    reasons = [f"{number} {state}" for state, number in states.items()]
    if plan.problems:
        reasons.append(count(len(plan.problems), "problem"))
    return f"CANNOT RUN: {', '.join(reasons)}"
