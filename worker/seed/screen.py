"""Show progress to a person, a log or a program: bars, lines, or JSON. Prints."""

from __future__ import annotations

import json
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, Self

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from worker.base.text import count, size_text
from worker.seed.outcome import WORDS, grouped_outcomes
from worker.store.eviction import idle_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, RenderableType

    from worker.base.progress import ModelProgress as Moment
    from worker.seed.outcome import Outcome
    from worker.seed.seeding import DryRunLine
    from worker.seed.verify import VerifiedModel
    from worker.store.eviction import SealedContent
    from worker.store.seals import SealedModel


_LINE_EVERY_S: Final = 10.0
_JSON_EVERY_S: Final = 1.0
_MARKS: Final = {True: ("✓", "green"), False: ("✗", "red")}
_PHASES: Final = {"waiting": "waiting", "downloading": "", "checking": "checking"}


class SeedScreen(Protocol):
    """Shows the seeder's progress. Called from several threads; a context manager around the work."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Restore the terminal."""
        ...

    def expect(self, sizes: Iterable[int]) -> None:
        """Take the models' sizes, for the total."""
        ...

    def moved(self, model: str, moment: Moment) -> None:
        """Show the progress of one model."""
        ...

    def ended(self, model: str, outcomes: Iterable[Outcome]) -> None:
        """Show the outcome of one model on each volume."""
        ...

    def say(self, text: str) -> None:
        """Show a sentence for people."""
        ...


class ScreenBars:
    """The screen of a terminal: a bar for each model in transfer and one for all, and a line for each finished one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(ratio=2)),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[phase]}", style="dim"),
            console=console,
            expand=True,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._total: TaskID | None = None
        self._count = self._ended = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, sizes: Iterable[int]) -> None:
        """Like `SeedScreen.expect`."""
        known = list(sizes)
        self._count = len(known)
        self._total = self._progress.add_task("", total=sum(known), phase="")
        self._retitle()

    def moved(self, model: str, moment: Moment) -> None:
        """Like `SeedScreen.moved`."""
        with self._lock:
            if model not in self._tasks:
                self._tasks[model] = self._progress.add_task(model, total=moment.total_bytes or None, phase="")
            phase = f"by {moment.by}" if moment.by else _PHASES[moment.phase]
            total = moment.total_bytes or None
            self._progress.update(self._tasks[model], completed=moment.done_bytes, total=total, phase=phase)
            self._done[model] = max(self._done.get(model, 0), moment.done_bytes)
            self._retotal()

    def ended(self, model: str, outcomes: Iterable[Outcome]) -> None:
        """Like `SeedScreen.ended`."""
        with self._lock:
            self._ended += 1
            if model in self._tasks:
                self._progress.remove_task(self._tasks.pop(model))
            for outcome, where in grouped_outcomes(outcomes):
                self._done[model] = outcome.size_bytes
                self._progress.console.print(outcome_line(outcome, where))
            self._retotal()
            self._retitle()

    def say(self, text: str) -> None:
        """Like `SeedScreen.say`."""
        self._progress.console.print(Text(text))

    def _retotal(self) -> None:
        if self._total is not None:
            self._progress.update(self._total, completed=sum(self._done.values()))

    def _retitle(self) -> None:
        if self._total is not None:
            self._progress.update(self._total, description=f"[bold]total, {self._ended} of {count(self._count, 'model')}")


def outcome_line(outcome: Outcome, where: str) -> RenderableType:
    """Return one outcome as a coloured line of the screen, with its error below."""
    mark, style = _MARKS[outcome.good]
    if outcome.how == "cancelled":
        mark, style = "-", "yellow"
    text = Text.assemble((f"{mark} ", style), outcome.model, ("  ", ""), (f"{outcome_text(outcome)}{where}", "dim"))
    if outcome.error is None or outcome.how == "cancelled":
        return text
    return Group(text, Padding(Text(str(outcome.error), style), (0, 0, 0, 2)))


def outcome_text(outcome: Outcome) -> str:
    """Return an outcome for the screen, without the model's name: `seeded, 11.9 GB in 50 s, 240 MB/s`."""
    text = WORDS[outcome.how]
    if outcome.how != "sent":
        size = f", {size_text(outcome.size_bytes)}" if outcome.size_bytes else ""
        return text + size + (f" ({outcome.note})" if outcome.note else "")
    rate = f", {size_text(int(outcome.moved_bytes / outcome.seconds))}/s" if outcome.seconds and outcome.moved_bytes else ""
    resumed = outcome.size_bytes - outcome.moved_bytes
    kept = f", {size_text(resumed)} of it from an earlier run" if resumed > 0 else ""
    return f"{text}, {size_text(outcome.size_bytes)} in {outcome.seconds:.1f} s{rate}{kept}"


class ScreenLines:
    """The screen without a terminal: a line when a model begins, every ten seconds, and when it has ended."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._next_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def expect(self, sizes: Iterable[int]) -> None:
        """Like `SeedScreen.expect`."""
        known = list(sizes)
        self.say(f"{count(len(known), 'model')}, {size_text(sum(known))}")

    def moved(self, model: str, moment: Moment) -> None:
        """Like `SeedScreen.moved`."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_s.get(model, 0.0):
                return
            self._next_s[model] = now_s + _LINE_EVERY_S
        self.say(f"{model}: {moment}")

    def ended(self, model: str, outcomes: Iterable[Outcome]) -> None:
        """Like `SeedScreen.ended`."""
        del model
        for outcome, where in grouped_outcomes(outcomes):
            self.say(f"{outcome.model}: {outcome_text(outcome)}{where}" + (f": {outcome.error}" if outcome.error else ""))

    def say(self, text: str) -> None:
        """Like `SeedScreen.say`."""
        with self._lock:
            print(text, file=self._stream, flush=True)


class ScreenJson:
    """The seeder's screen for a program: one JSON object a line, each with an `event`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._next_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def expect(self, sizes: Iterable[int]) -> None:
        """Like `SeedScreen.expect`."""
        known = list(sizes)
        self.tell("begin", models=len(known), size_bytes=sum(known))

    def moved(self, model: str, moment: Moment) -> None:
        """Like `SeedScreen.moved`."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_s.get(model, 0.0):
                return
            self._next_s[model] = now_s + _JSON_EVERY_S
        done, total, rate = moment.done_bytes, moment.total_bytes, round(moment.bytes_per_s)
        self.tell("progress", model=model, phase=moment.phase, done_bytes=done, total_bytes=total, bytes_per_s=rate)

    def ended(self, model: str, outcomes: Iterable[Outcome]) -> None:
        """Like `SeedScreen.ended`."""
        del model
        for outcome in outcomes:
            self.tell("ended", **outcome.to_dict())

    def say(self, text: str) -> None:
        """Like `SeedScreen.say`."""
        self.tell("note", text=text)

    def tell(self, event: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        """Print one event."""
        with self._lock:
            print(json.dumps({"event": event, **values}), file=self._stream, flush=True)


# --- tables -----------------------------------------------------------------------------------------


_STYLES: Final = {True: "green", False: "red"}


def _table(*columns: str, numbers: frozenset[str] = frozenset()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        number = column in numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def summary_table(outcomes: Sequence[Outcome], seconds: float) -> Table:
    """Return a table for the screen: the outcome of each model on each volume."""
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


def dry_run_table(lines: Sequence[DryRunLine]) -> Table:
    """Return a table for the screen: what would be done."""
    table = _table("model", "size", "state", "from", numbers=frozenset({"size"}))
    for line in lines:
        size = "?" if line.size_bytes is None else size_text(line.size_bytes)
        table.add_row(line.model, size, Text(line.state, _STYLES[line.good]), line.source or "")
    return table


def sealed_table(found: Sequence[SealedModel], fits: Iterable[bool], removals: Sequence[str] | None = None) -> Table:
    """Return a table for the screen: what is sealed, on a mounted volume in the order of removal to make room."""
    last = ("removal",) if removals else ()
    table = _table("model", "size", "state", "sealed", "from", *last, numbers=frozenset({"size"}))
    for sealed, good, removal in zip(found, fits, removals or [""] * len(found), strict=True):
        seal = sealed.seal
        source = f"hf://{seal.repo}/{seal.file}" if seal.repo else seal.file or ""
        state = Text("ready" if good else "CHANGED", _STYLES[good])
        at = f"{(seal.at or '')[:16].replace('T', ' ')}"
        table.add_row(sealed.title, size_text(seal.size), state, at, source, *([removal] if last else []))
    return table


def least_used_table(found: Iterable[SealedContent]) -> Table:
    """Return a table for the screen: what would be removed to make room."""
    table = _table("model", "size", "last use", numbers=frozenset({"size"}))
    for one in found:
        table.add_row(one.title, size_text(one.size_bytes), idle_text(one.idle_s))
    return table


def verification_table(checked: Sequence[VerifiedModel]) -> Table:
    """Return a table for the screen: what reading everything found."""
    table = _table("model", "size", "state", "", numbers=frozenset({"size"}))
    for item in checked:
        note = str(item.error) if item.error else ""
        if item.verdict in {"damaged", "replaced"} and item.actual:
            note = f"it has {item.actual}, not {item.sealed.seal.sha256}"
        word = Text("replaced by hand" if item.verdict == "replaced" else item.verdict, _STYLES[item.good])
        table.add_row(item.sealed.title, size_text(item.sealed.seal.size), word, note)
    return table
