"""The common frame of the benchmarks: what a figure is, how it is judged, how it is printed. Reads /proc, prints.

A script measures, makes `Figure`s, and ends with `sys.exit(report(figures, options))`:

    options = parse_args(__doc__)
    ratios = [worker() / bare() for _ in range(options.samples)]
    sys.exit(report([Figure.of("job_overhead_ratio", ratios, "x", BOUND)], options))

What a machine lacks is said with `leave_out(reason)`, and the rest is measured: no figure is missing without a word. Bounds are
module constants with BOUND in their name and the unit behind it (`BOUND_MS`), which a test holds to the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["SHORT_FORGIVES", "Figure", "Options", "leave_out", "left_out", "machine", "median", "parse_args", "report", "table"]

SHORT_FORGIVES = 2.0
"""A short run has few samples on a shared machine, so it only fails on gross regressions: this many times the bound."""

_LEFT_OUT: Final = re.compile(r"nothing is measured(?P<place> on [^:]+)?: (?P<reason>.+)")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. `bound` is the most it may be; None means that it only informs."""

    name: str
    value: float
    unit: str
    bound: float | None = None
    samples: Sequence[float] = ()

    @classmethod
    def of(cls, name: str, samples: Iterable[float], unit: str, bound: float | None = None) -> Figure:
        """Return the median of the samples, and keep them."""
        values = tuple(samples)
        return cls(name, median(values), unit, bound, values)

    def ok(self, forgive: float = 1.0) -> bool:
        """Return whether the value is a number and within `forgive` times its bound."""
        return math.isfinite(self.value) and (self.bound is None or self.value <= self.bound * forgive)


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark's command line says; `extra` holds what the script itself added."""

    json: bool
    short: bool
    samples: int
    extra: argparse.Namespace


def parse_args(
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    samples: int = 5,
    short_samples: int = 3,
    add: Callable[[argparse.ArgumentParser], object] | None = None,
) -> Options:
    """The common options, and those that `add` puts onto the parser; exits with 2 and the usage when they are wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each figure, for machines")
    parser.add_argument("--short", action="store_true", help=f"a quick run that fails only beyond {SHORT_FORGIVES:g}x a bound")
    parser.add_argument("--samples", type=int, help=f"how often to measure (default {samples}, short {short_samples})")
    if add is not None:
        add(parser)
    extra = parser.parse_args(argv)
    count = extra.samples if extra.samples is not None else short_samples if extra.short else samples
    if count < 1:
        parser.error("--samples must be at least 1")
    return Options(json=extra.json, short=extra.short, samples=count, extra=extra)


def report(figures: Sequence[Figure], options: Options, *, data: Path | None = None) -> int:
    """Print the machine and the figures; the exit status: 1 when a bound is missed, else 0.

    With --json standard output holds figures only and the machine goes to standard error. `data` is where the measured
    files lay, for the file system's name.
    """
    forgive = SHORT_FORGIVES if options.short else 1.0
    if options.json:
        print(machine(data), file=sys.stderr)
        for figure in figures:
            print(_json_line(figure, forgive))
    else:
        print(machine(data))
        print(table(figures, forgive))
    return 0 if all(figure.ok(forgive) for figure in figures) else 1


def leave_out(reason: str, place: str | None = None) -> None:
    """Say on standard error that nothing is measured, or nothing in one place, and why; `left_out` reads it there."""
    print(f"nothing is measured{f' on {place}' if place else ''}: {reason}", file=sys.stderr)


def left_out(line: str) -> tuple[str, str] | None:
    """What a line of a benchmark's standard error says it leaves out: ` on PLACE` or nothing, and why; else None."""
    found = _LEFT_OUT.fullmatch(line.strip())
    return (found["place"] or "", found["reason"]) if found else None


def machine(data: Path | None = None) -> str:
    """Cores and memory that this process may use, the kernel, and the file system under `data` (default: here)."""
    cores = len(os.sched_getaffinity(0))
    place = (data or Path.cwd()).resolve()
    return f"{cores} cores, {_memory_bytes() / 2**30:.1f} GiB, Linux {platform.release()}, {_file_system(place)} at {place}"


def _json_line(figure: Figure, forgive: float) -> str:
    return json.dumps(
        {
            "name": figure.name,
            "value": figure.value if math.isfinite(figure.value) else None,
            "unit": figure.unit,
            "bound": figure.bound,
            "ok": figure.ok(forgive),
            "samples": list(figure.samples),
        },
    )


def table(figures: Sequence[Figure], forgive: float = 1.0) -> str:
    """Return the figures for people. A bound may be missed by the factor `forgive`."""
    rows = [("figure", "median", "(min - max)", "bound", ""), *(_row(figure, forgive) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for name, value, spread, bound, verdict in rows:
        cells = (name.ljust(widths[0]), value.rjust(widths[1]), spread.ljust(widths[2]), bound.ljust(widths[3]), verdict)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(figure: Figure, forgive: float) -> tuple[str, str, str, str, str]:
    spread = f"({_number(min(figure.samples))} - {_number(max(figure.samples))})" if len(figure.samples) > 1 else ""
    bound = "" if figure.bound is None else f"<= {_number(figure.bound)}" + (f" x{forgive:g}" if forgive != 1 else "")
    verdict = "" if figure.bound is None and figure.ok() else "ok" if figure.ok(forgive) else "MISSED"
    return figure.name, f"{_number(figure.value)} {figure.unit}", spread, bound, verdict


def _number(value: float) -> str:
    """Return three significant digits, never in scientific notation."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, 2 - exponent)}f}"


def _memory_bytes() -> int:
    """Return the container's limit (cgroup v2), or the machine's memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _file_system(place: Path) -> str:
    """Return the type of the mount of `place`: the longest mount point above it, the newest of equals."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, this_kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if place.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, this_kind
    return kind
