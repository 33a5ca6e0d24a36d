"""The command `doctor`: settings in, the report out. Prints. Only a child process touches the volume."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from worker.base.text import count, printable, size_text, wrapped
from worker.doctor.checking import Deadlines, Subject, examine
from worker.doctor.findings import Severity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.doctor.findings import Finding, FolderCount
    from worker.settings import Settings


PROBLEM_FOUND: Final = 1


def run(argv: Sequence[str], settings: Settings, deadlines: Deadlines | None = None) -> int:
    """Run the command `doctor` in limited time. Return 0 without problems, 1 with problems, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m worker doctor", description="Examine the volume, and say what to do about each finding."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every path")
    try:
        options = parser.parse_args(list(argv))
    except SystemExit as exc:
        return int(exc.code or 0)
    findings, folders = examine(Subject.of(settings, deadlines or Deadlines()))
    healthy = all(finding.severity is not Severity.PROBLEM for finding in findings)
    if options.json:
        report = {"findings": [asdict(found) for found in findings], "folders": [asdict(found) for found in folders]}
        text = json.dumps({"volume": str(settings.volume_path), "ok": healthy, **report}, indent=2)
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        text = "\n".join(report_lines(findings, folders, width, colour=sys.stdout.isatty()))
    print(text)  # noqa: T201 - the command's output
    return 0 if healthy else PROBLEM_FOUND


# --- the report as a terminal shows it --------------------------------------------------------------


_COLOURS: Final = {Severity.OK: "32", Severity.NOTE: "33", Severity.PROBLEM: "1;31"}
_LABEL_WIDTH: Final = max(map(len, Severity))
_CHECK_WIDTH: Final = len("host cache")


def report_lines(findings: Sequence[Finding], folders: Sequence[FolderCount], width: int, *, colour: bool) -> Iterator[str]:
    """Yield the command's report: findings in order, folders as a table, the number of problems, in the terminal's width."""
    indent = 2 + _LABEL_WIDTH + 2 + _CHECK_WIDTH + 2
    before = ""
    for found in findings:
        label = f"{found.severity.upper() if found.severity is Severity.PROBLEM else found.severity:<{_LABEL_WIDTH}}"
        check = "" if found.check == before else found.check
        text = wrapped(printable(found.message), indent, width)
        shown = f"\x1b[{_COLOURS[found.severity]}m{label}\x1b[0m" if colour else label
        yield f"  {shown}  {check:<{_CHECK_WIDTH}}  {text[0].lstrip()}"
        yield from text[1:]
        before = found.check
    if folders:
        yield ""
        yield from _folder_table(folders)
    yield ""
    problems, notes = ([found for found in findings if found.severity is one] for one in (Severity.PROBLEM, Severity.NOTE))
    yield f"{count(problems, 'problem')}, {count(notes, 'note')}"


def _folder_table(folders: Sequence[FolderCount]) -> Iterator[str]:
    width = max(len("folder"), *(len(folder.folder) for folder in folders))
    yield f"  {'folder':<{width}}  {'files':>7}  {'size':>9}  {'sealed':>7}"
    for folder in folders:
        size = "?" if folder.size_bytes is None else size_text(folder.size_bytes)
        sealed = "?" if folder.sealed is None else str(folder.sealed)
        yield f"  {printable(folder.folder):<{width}}  {folder.files:>7}  {size:>9}  {sealed:>7}"
