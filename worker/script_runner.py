"""Start a command of the package from a file in scripts/, with any Python that has its packages or not. Touches the process."""

from __future__ import annotations

import importlib
import io
import logging
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping

_INSTALL = """\
{program} needs packages that this Python does not have ({name} is the first). In the repository:
  python3 -m venv .venv && .venv/bin/pip install --no-deps -r requirements.lock
  .venv/bin/python scripts/{program} ..."""


def start_command(program: str, module: str, environ: Mapping[str, str]) -> NoReturn:
    """Start a program in scripts/: exit with the status of its module's `run`, or with how to install missing packages."""
    try:
        run = importlib.import_module(module).run
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "worker":
            raise
        sys.exit(_INSTALL.format(program=program, name=exc.name))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to end
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(level=logging.ERROR)
    sys.exit(run(sys.argv[1:], environ))
