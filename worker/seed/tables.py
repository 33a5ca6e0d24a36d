"""Tables of results: the dry run, the list, the verification, the summary. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from worker.base.text import size_text
from worker.seed.outcome import WORDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from worker.seed.dry_run import Line
    from worker.seed.outcome import Outcome
    from worker.seed.s3_volume import Sealed
    from worker.seed.verify import Checked

_STYLES: Final = {True: "green", False: "red"}


def _table(*columns: str, numbers: frozenset[str] = frozenset()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        number = column in numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def summary(outcomes: Sequence[Outcome], seconds: float) -> Table:
    """Return the outcome of each model on each volume."""
    table = _table("model", "volume", "", "size", "sent", "time", numbers=frozenset({"size", "sent", "time"}))
    for outcome in outcomes:
        sent = size_text(outcome.moved_bytes) if outcome.moved_bytes else ""
        size = size_text(outcome.size_bytes) if outcome.size_bytes else ""
        word = Text(WORDS[outcome.how], _STYLES[outcome.good])
        table.add_row(outcome.model, outcome.volume, word, size, sent, f"{outcome.seconds:.1f} s" if sent else "")
    all_moved, all_size = sum(outcome.moved_bytes for outcome in outcomes), sum(outcome.size_bytes for outcome in outcomes)
    good = sum(outcome.good for outcome in outcomes)
    table.add_section()
    table.add_row(f"{good} of {len(outcomes)} there", "", "", size_text(all_size), size_text(all_moved), f"{seconds:.1f} s")
    return table


def dry_run(lines: Sequence[Line]) -> Table:
    """Return what would be done."""
    table = _table("model", "size", "state", "from", numbers=frozenset({"size"}))
    for line in lines:
        size = "?" if line.size_bytes is None else size_text(line.size_bytes)
        table.add_row(line.model, size, Text(line.state, _STYLES[line.good]), line.source or "")
    return table


def listing(found: Iterable[Sealed], fits: Iterable[bool]) -> Table:
    """Return what is sealed."""
    table = _table("model", "size", "state", "sealed", "from", numbers=frozenset({"size"}))
    for sealed, good in zip(found, fits, strict=True):
        seal = sealed.seal
        source = f"hf://{seal.repo}/{seal.file}" if seal.repo else seal.file or ""
        state = Text("ready" if good else "CHANGED", _STYLES[good])
        table.add_row(sealed.title, size_text(seal.size), state, f"{(seal.at or '')[:16].replace('T', ' ')}", source)
    return table


def verification(checked: Sequence[Checked]) -> Table:
    """Return what reading everything found."""
    table = _table("model", "size", "state", "", numbers=frozenset({"size"}))
    for item in checked:
        note = str(item.error) if item.error else ""
        if item.verdict in {"damaged", "replaced"} and item.actual:
            note = f"it has {item.actual}, not {item.sealed.seal.sha256}"
        word = Text("replaced by hand" if item.verdict == "replaced" else item.verdict, _STYLES[item.good])
        table.add_row(item.sealed.title, size_text(item.sealed.seal.size), word, note)
    return table
