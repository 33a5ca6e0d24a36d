# ruff: noqa: INP001 - run as a file; scripts is a folder of programs, no package
"""From a workflow to an endpoint on RunPod: `python scripts/up.py --help`. The work is in worker/up."""

import os
import sys

# Above everything that an older Python cannot read, so that it gets as far as this sentence.
if sys.version_info < (3, 11):  # noqa: UP036 - this runs with whatever Python somebody has
    sys.exit("up.py needs Python 3.11 or newer; this is Python %d.%d." % sys.version_info[:2])  # noqa: UP031 - as above

import io
import logging
from pathlib import Path

_INSTALL = """\
up.py needs packages that this Python does not have ({name} is the first). In the repository:
  python3 -m venv .venv && .venv/bin/pip install --no-deps -r requirements.lock
  .venv/bin/python scripts/up.py ..."""

if __name__ == "__main__":
    # In a checkout the package lies beside this folder; where it is installed this changes nothing.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        from worker.up.up_command import run
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "worker":
            raise
        sys.exit(_INSTALL.format(name=exc.name))

    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to end
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(level=logging.ERROR)
    sys.exit(run(sys.argv[1:], os.environ))
