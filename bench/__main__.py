"""Run benchmarks one after the other, and sum them up. Starts each as a process of its own.

    python -m bench                      all of them
    python -m bench --short              the quick form: fails only beyond twice a bound
    python -m bench first_job fleet      these

The exit status is 1 when a bound is missed or a benchmark ends without its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.report import SHORT_FORGIVES, Figure, machine, table

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE: Final = Path(__file__).parent
PARTS: Final = frozenset({"__init__", "__main__", "bare", "report"})
"""What is not a benchmark here."""

_TIMEOUT_S: Final = 3600.0


def benchmarks() -> list[str]:
    """The names of all benchmarks."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in PARTS)


def run(name: str, *, short: bool, timeout_s: float = _TIMEOUT_S) -> tuple[list[Figure], str]:
    """One benchmark's figures, and what was wrong with it: empty when each figure is within its bound."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", *(["--short"] if short else [])]
    try:
        done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return [], f"took longer than {timeout_s:g} s"
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    figures = [
        Figure(row["name"], math.nan if row["value"] is None else row["value"], row["unit"], row["bound"], row["samples"])
        for row in rows
    ]
    missed = [row["name"] for row in rows if not row["ok"]]
    if missed:
        return figures, f"missed {', '.join(missed)}"
    return figures, f"ended with status {done.returncode}" if done.returncode else ""


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
    troubles: dict[str, str] = {}
    for name in chosen.names or benchmarks():
        began = time.monotonic()
        print(f"== {name}", flush=True)
        figures, trouble = run(name, short=chosen.short)
        print(table(figures, SHORT_FORGIVES if chosen.short else 1.0), flush=True)
        print(f"   {time.monotonic() - began:.0f} s{': ' + trouble if trouble else ''}\n", flush=True)
        if trouble:
            troubles[name] = trouble
    print(machine())
    for name, trouble in troubles.items():
        print(f"{name}: {trouble}")
    print("every bound is kept" if not troubles else f"{len(troubles)} of the benchmarks missed")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
