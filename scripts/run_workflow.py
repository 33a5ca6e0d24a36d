# ruff: noqa: INP001 - run as a file; scripts is a folder of programs, no package
"""Send a workflow to an endpoint or a local worker: `python scripts/run_workflow.py --help`. The work is in client/."""

import os
import sys

# Above everything that an older Python cannot read, so that it gets as far as this sentence.
if sys.version_info < (3, 10):  # noqa: UP036 - this runs with whatever Python somebody has
    sys.exit("run_workflow.py needs Python 3.10 or newer; this is Python %d.%d." % sys.version_info[:2])  # noqa: UP031 - as above

import io
from pathlib import Path

if __name__ == "__main__":
    # In a checkout the package lies beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from client.command import run

    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to end
        sys.stdout.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:], os.environ))
