"""Run benchmarks one after the other, and sum them up. Starts each as a process of its own.

    python -m bench                      all of them
    python -m bench --short              the quick form: fails only beyond twice a bound
    python -m bench first_job fleet      these

The exit status is 1 when a bound is missed or a benchmark fails. What this machine cannot measure is named, and misses nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from bench.report import SHORT_FORGIVES, Figure, left_out, machine, table
from devkit.engine.cache import BuildFailed, cache_root
from devkit.engine.source import chosen_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE: Final = Path(__file__).parent
PARTS: Final = frozenset({"__init__", "__main__", "bare", "evict_part", "fleet_part", "report"})
"""What is not a benchmark here."""

_TIMEOUT_S: Final = 3600.0
_LAST_WORDS_S: Final = 5.0


def benchmarks() -> list[str]:
    """Return the names of all benchmarks."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in PARTS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a benchmark."""

    figures: Sequence[Figure] = ()
    trouble: str = ""
    """What was wrong with it; empty when each figure is within its bound."""
    left_out: Sequence[tuple[str, str]] = ()
    """What this machine could not measure, the benchmark or a part of it, and the reason."""


def run(name: str, *, short: bool, timeout_s: float = _TIMEOUT_S) -> Outcome:
    """Run one benchmark to its end; what it says on standard error is shown as it comes."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", *(["--short"] if short else [])]
    said: list[str] = []
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=printed, stderr=subprocess.PIPE, text=True)
        # Not closed here: what the benchmark started may outlive it for a moment, with this end of the pipe in its hands.
        listener = threading.Thread(target=_pass_on, args=(process.stderr, said), daemon=True)
        listener.start()
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return Outcome(trouble=f"took longer than {timeout_s:g} s")
        listener.join(_LAST_WORDS_S)
        printed.seek(0)
        rows = [json.loads(line) for line in printed if line.startswith("{")]
    return _outcome(name, rows, status, said)


def _pass_on(stream: IO[str], said: list[str]) -> None:
    for line in stream:
        said.append(line)
        print(line, end="", file=sys.stderr, flush=True)


def _outcome(name: str, rows: Sequence[dict[str, Any]], status: int, said: Sequence[str]) -> Outcome:
    figures = [
        Figure(row["name"], math.nan if row["value"] is None else row["value"], row["unit"], row["bound"], row["samples"])
        for row in rows
    ]
    parts = [(name + part[0], part[1]) for line in said if (part := left_out(line))]
    trouble = ""
    if missed := [row["name"] for row in rows if not row["ok"]]:
        trouble = f"missed {', '.join(missed)}"
    elif status:
        trouble = f"ended with status {status}"
    elif not (figures or parts):
        trouble = "gave neither figures nor a reason"
    return Outcome(figures, trouble, parts)


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return the overall result: what was not measured and why, what was wrong, and whether that is all."""
    troubles = [f"{name}: {outcome.trouble}" for name, outcome in outcomes.items() if outcome.trouble]
    left: dict[str, list[str]] = {}
    for what, reason in (part for outcome in outcomes.values() for part in outcome.left_out):
        left.setdefault(reason, []).append(what)
    lines = [f"not measured here: {', '.join(parts)} ({reason})" for reason, parts in left.items()]
    if troubles:
        lines += [*troubles, f"{len(troubles)} of the benchmarks missed"]
    else:
        lines.append("every bound that was measured is kept" if left else "every bound is kept")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run them; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all of them when none is given: {', '.join(benchmarks())}")
    parser.add_argument("--short", action="store_true", help=f"quick runs that fail only beyond {SHORT_FORGIVES:g}x a bound")
    chosen = parser.parse_args(argv)
    if unknown := set(chosen.names) - set(benchmarks()):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    try:
        chosen_tree(os.environ, cache_root(), sys.stderr)
    except BuildFailed as exc:
        parser.error(str(exc))
    outcomes: dict[str, Outcome] = {}
    for name in chosen.names or benchmarks():
        began = time.monotonic()
        print(f"== {name}", flush=True)
        outcome = outcomes[name] = run(name, short=chosen.short)
        if outcome.figures:
            print(table(outcome.figures, SHORT_FORGIVES if chosen.short else 1.0), flush=True)
        print(f"   {time.monotonic() - began:.0f} s{': ' + outcome.trouble if outcome.trouble else ''}\n", flush=True)
    print(machine())
    print(summary(outcomes))
    return 1 if any(outcome.trouble for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
