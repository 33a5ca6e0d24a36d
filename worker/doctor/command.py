"""The command `doctor`: settings in, the report out. Prints. Only a child process touches the volume."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from worker.doctor.checking import examine
from worker.doctor.findings import Deadlines, Severity, Subject
from worker.doctor.screen import report_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.settings import Settings

PROBLEM_FOUND: Final = 1


def run(argv: Sequence[str], settings: Settings, deadlines: Deadlines | None = None) -> int:
    """Print the findings in limited time. Return 0 without problems, 1 with problems, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m worker doctor", description="The volume as it is, each finding with what to do."
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
