# ruff: noqa: INP001 - run as a file; scripts is a folder of programs, no package
"""Send a workflow to an endpoint or a local worker: `python scripts/run_workflow.py --help`. The work is in client/."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # In a checkout the package lies beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from client.command import run

    sys.exit(run(sys.argv[1:], os.environ))
