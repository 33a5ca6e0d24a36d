# ruff: noqa: INP001 - run as a file; scripts is a folder of programs, no package
"""Fill a volume with models before the first job: `python scripts/seed_volume.py --help`. The work is in worker/seed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # In a checkout the package lies beside this folder; where it is installed this changes nothing.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from worker.seed.cli import run

    logging.basicConfig(level=logging.ERROR)
    sys.exit(run(sys.argv[1:], os.environ))
