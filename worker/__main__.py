"""The entry point: read the arguments and the environment, and run the worker or a command.

python -m worker                        the worker; --rp_serve_api for a local API
python -m worker plan WORKFLOW.json     what a workflow needs and where it comes from
python -m worker doctor                 examine the volume
python -m worker convert WORKFLOW.json  convert the editor's format to the graph that runs
python -m worker seed WHAT ...          put models onto a volume before the first job
python -m worker up WORKFLOW.json       create an endpoint on RunPod for a workflow; up status, up down
python -m worker settings               print the table of settings
python -m worker help                   print this list
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import TYPE_CHECKING

from worker.errors import CommandUnknown, NotOnWindows, WorkerError
from worker.settings import Settings, markdown_table

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence


_HELP = """\
usage: python -m worker [COMMAND] ...        (in the image: worker [COMMAND] ...)

  plan WORKFLOW      show a workflow's models: which are there, and where the others come from
  doctor             examine the volume
  seed WHAT ...      fill a volume with models before the first job
  up WORKFLOW        create an endpoint on RunPod with volume, models and a first picture; up status, up down
  convert WORKFLOW   convert a workflow in the editor's format to the graph that runs
  settings           print the table of settings (environment variables)
  help               print this

plan, doctor, seed, up and convert have their own --help. Without a command the worker starts. On RunPod it takes jobs.
Elsewhere it needs --rp_serve_api for a local API (with --rp_api_host and --rp_api_port), or one job in
./test_input.json or --test_input.
"""

# Each is imported when it is asked for: other imports would delay it, and some are not in every installation.
_COMMANDS = {
    "worker": "worker.spawn",
    "plan": "worker.plan.plan_command",
    "doctor": "worker.doctor.doctor_command",
    "convert": "worker.convert_command",
    "seed": "worker.seed.seed_command",
    "up": "worker.up.up_command",
    "fill": "worker.up.pod",  # `up fill`, in the Pod that `up` creates, where there is no client
}
_WITH_SETTINGS = frozenset({"plan", "doctor", "convert"})
_ANYWHERE = frozenset({"settings", "plan", "seed", "up"})
COMMANDS = (_COMMANDS.keys() | {"settings"}) - {"worker", "fill"}


def main(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Run a command, or the worker. Return the exit status. A failed start is one line and status 1."""
    command, rest = (argv[0], argv[1:]) if argv else ("", argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        if command in {"-h", "--help", "help"}:
            print(_HELP, end="")  # noqa: T201 - the command's output
            return 0
        if command not in _ANYWHERE and not hasattr(os, "fork"):
            raise NotOnWindows(command or "The worker")
        if command == "settings":
            print(markdown_table(), end="")  # noqa: T201 - the command's output
            return 0
        if command in COMMANDS:
            return _run(command, rest, environ)
        if command and not command.startswith("-"):
            raise CommandUnknown(command, sorted(COMMANDS))
        return _run("worker", argv, environ)
    except WorkerError as exc:
        print(f"error: {exc} [{exc.code}]", file=sys.stderr)  # noqa: T201 - logging may not be set up yet
        return 1


def _run(command: str, argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Import a command's module and run it."""
    name = "fill" if command == "up" and list(argv) == ["fill"] else command
    try:
        module = importlib.import_module(_COMMANDS[name])
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "client":
            raise
        raise CommandUnknown(command, sorted(COMMANDS - {command})) from None  # the image has no client
    status: int = module.run(argv, Settings.from_env(environ) if name in _WITH_SETTINGS else environ)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
