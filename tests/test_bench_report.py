"""The frame of the benchmarks: a missed bound fails the run, and machines read what people read."""

from __future__ import annotations

import ast
import importlib
import json
import math
from pathlib import Path

import pytest

from bench import __main__ as runner
from bench.report import Figure, machine, parse_args, report
from devkit.local_worker import PROJECT


def test_a_figure_is_the_median_of_its_samples() -> None:
    figure = Figure.of("ratio", [1.0, 9.0, 1.2], "x", bound=1.25)
    assert (figure.value, figure.samples, figure.ok()) == (1.2, (1.0, 9.0, 1.2), True)


@pytest.mark.parametrize(
    ("value", "arguments", "status"),
    [(1.2, [], 0), (1.3, [], 1), (1.3, ["--short"], 0), (2.6, ["--short"], 1), (math.nan, [], 1), (math.inf, ["--short"], 1)],
)
def test_a_missed_bound_is_exit_status_1_and_a_short_run_forgives_twice(
    value: float, arguments: list[str], status: int
) -> None:
    assert report([Figure("ratio", value, "x", bound=1.25), Figure("informs", 99, "ms")], parse_args("", arguments)) == status


def test_json_is_one_line_for_each_figure_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [Figure.of("first", [3.0, 1.0, 2.0], "ms", 1.5), Figure("second", math.nan, "x")]
    report(figures, parse_args("", ["--json"]))
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"name": "first", "value": 2.0, "unit": "ms", "bound": 1.5, "ok": False, "samples": [3.0, 1.0, 2.0]},
        {"name": "second", "value": None, "unit": "x", "bound": None, "ok": False, "samples": []},
    ]
    assert "cores" in err


def test_people_get_an_aligned_table_with_spread_bound_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    report([Figure.of("a", [0.00123, 0.002], "s", 0.001), Figure("longer_name", 12345.6, "ms", 20000)], parse_args("", []))
    _, header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["figure", "median", "(min", "-", "max)", "bound"]
    assert "(0.00123 - 0.00200)" in first
    assert first.endswith("MISSED")
    assert second.split()[:3] == ["longer_name", "12,346", "ms"]
    assert second.endswith("ok")
    assert first.index("<=") == second.index("<=")


def test_the_machine_is_named_with_the_file_system_that_was_measured() -> None:
    assert "proc at /proc/self" in machine(Path("/proc/self/fd")).replace(str(Path("/proc/self").resolve()), "/proc/self")


def test_samples_can_be_set_and_must_be_some() -> None:
    assert (parse_args("", []).samples, parse_args("", ["--short"]).samples, parse_args("", ["--samples", "9"]).samples) == (
        5,
        3,
        9,
    )
    with pytest.raises(SystemExit) as caught:
        parse_args("", ["--samples", "0"])
    assert caught.value.code == 2


def test_every_benchmark_is_in_the_list_of_them() -> None:
    text = (PROJECT / "bench/README.md").read_text("utf-8")
    assert [name for name in runner.benchmarks() if f"| `{name}` |" not in text] == []
    assert text.count("\n| `") == len(runner.benchmarks())


UNITS = {"_MS": "ms", "_S": "s", "_MB": "MB"}


def bounds_in_code(name: str) -> set[tuple[float, str]]:
    """The values of a benchmark's constants with BOUND in their names, with the unit that the name ends with."""
    constants = {key: value for key, value in vars(importlib.import_module(f"bench.{name}")).items() if "BOUND" in key}
    found = set()
    for key, value in constants.items():
        unit = next((unit for ending, unit in UNITS.items() if key.endswith(ending)), "")
        found |= {(float(each), unit) for each in (value.values() if isinstance(value, dict) else [value])}
    return found


def bounds_in_table(name: str) -> set[tuple[float, str]]:
    """The last cell of a benchmark's row: `NUMBER [UNIT] words; NUMBER ...`, where a number may be a fraction."""
    rows = (PROJECT / "bench/README.md").read_text("utf-8").splitlines()
    cell = next(row for row in rows if row.startswith(f"| `{name}` |")).rstrip("| ").rpartition("|")[2]
    found = set()
    for entry in cell.split(";"):
        number, unit = (*entry.split(), "")[:2]
        top, _, bottom = number.partition("/")
        found.add((float(top) / float(bottom or 1), unit if unit in UNITS.values() else ""))
    return found


@pytest.mark.parametrize("name", runner.benchmarks())
def test_the_table_has_exactly_the_bounds_that_the_code_has(name: str) -> None:
    assert bounds_in_table(name) == bounds_in_code(name)


@pytest.mark.parametrize("name", runner.benchmarks())
def test_no_bound_is_written_where_it_is_used(name: str) -> None:
    tree = ast.parse((PROJECT / f"bench/{name}.py").read_text("utf-8"))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in {"Figure", "Figure.of"}
    ]
    bounds = [call.args[3] for call in calls if len(call.args) > 3]
    bounds += [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "bound"]
    assert calls
    parts = [part for bound in bounds for part in ([bound.body, bound.orelse] if isinstance(bound, ast.IfExp) else [bound])]
    literal = [ast.unparse(part) for part in parts if isinstance(part, ast.Constant) and part.value is not None]
    assert literal == []


BENCHMARK = """
import sys
from bench.report import Figure, parse_args, report
print("noise of a library")
sys.exit(report([Figure("ratio", {value}, "x", bound=1.0)], parse_args("")) or {status})
"""


def make_benchmark(folder: Path, code: str) -> None:
    """A package `bench` with one benchmark in it, `mine`."""
    (folder / "bench").mkdir()
    for name in ("__init__", "report"):
        (folder / f"bench/{name}.py").write_text((PROJECT / f"bench/{name}.py").read_text())
    (folder / "bench/mine.py").write_text(code)


@pytest.mark.parametrize(
    ("value", "status", "form", "trouble"),
    [
        (0.9, 0, "full", ""),
        (1.5, 0, "full", "missed ratio"),
        (1.5, 0, "short", ""),
        (2.5, 0, "short", "missed ratio"),
        (0.9, 3, "full", "ended with status 3"),
    ],
)
def test_the_runner_sums_up_what_each_benchmark_said(
    value: float, status: int, form: str, trouble: str, *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_benchmark(tmp_path, BENCHMARK.format(value=value, status=status))
    monkeypatch.setattr(runner, "HERE", tmp_path / "bench")
    assert runner.benchmarks() == ["mine"]
    outcome = runner.run("mine", short=form == "short")
    assert [(figure.name, figure.value) for figure in outcome.figures] == [("ratio", value)]
    assert (outcome.trouble, list(outcome.left_out)) == (trouble, [])


def test_a_benchmark_that_does_not_end_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_benchmark(tmp_path, "import threading; threading.Event().wait()")
    monkeypatch.setattr(runner, "HERE", tmp_path / "bench")
    assert runner.run("mine", short=False, timeout_s=0.5) == runner.Outcome(trouble="took longer than 0.5 s")


LEAVES_OUT = """
import sys
from bench.report import Figure, leave_out, parse_args, report
leave_out("it needs root: to mount", {place!r})
sys.exit(report({figures}, parse_args("")))
"""
FIGURE = Figure("ratio", 1.0, "x", 2.0)


@pytest.mark.parametrize(
    ("place", "figures", "left_out"),
    [
        (None, "[]", "mine"),
        ("MooseFS", "[Figure('ratio', 1.0, 'x', 2.0)]", "mine on MooseFS"),
    ],
)
def test_what_a_machine_cannot_measure_is_named_and_misses_nothing(
    place: str | None,
    figures: str,
    left_out: str,
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_benchmark(tmp_path, LEAVES_OUT.format(place=place, figures=figures))
    monkeypatch.setattr(runner, "HERE", tmp_path / "bench")
    outcome = runner.run("mine", short=False)
    assert (outcome.trouble, list(outcome.left_out)) == ("", [(left_out, "it needs root: to mount")])
    assert runner.main(["mine"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-2:] == [
        f"not measured here: {left_out} (it needs root: to mount)",
        "every bound that was measured is kept",
    ]
    assert err.count("nothing is measured") == 2  # shown as it comes, in both runs


def test_a_benchmark_with_neither_figures_nor_a_reason_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_benchmark(tmp_path, "")
    monkeypatch.setattr(runner, "HERE", tmp_path / "bench")
    assert runner.run("mine", short=False) == runner.Outcome([], "gave neither figures nor a reason", [])


def test_the_summary_says_what_was_missed_beside_what_was_not_measured() -> None:
    outcomes = {
        "links": runner.Outcome([FIGURE], "", [("links on MooseFS", "no root")]),
        "gpu": runner.Outcome([], "", [("gpu", "no GPU")]),
        "fleet": runner.Outcome([], "", [("fleet", "no root")]),
        "soak": runner.Outcome([FIGURE], "missed ratio"),
    }
    assert runner.summary(outcomes).splitlines() == [
        "not measured here: links on MooseFS, fleet (no root)",
        "not measured here: gpu (no GPU)",
        "soak: missed ratio",
        "1 of the benchmarks missed",
    ]
    assert runner.summary({"soak": runner.Outcome([FIGURE])}) == "every bound is kept"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SystemExit):
        runner.main(["no_such"])
