# ruff: noqa: INP001 - run as a file; scripts is a folder of programs, no package
"""Fill a volume with models before the first job: `python scripts/seed_volume.py --help`. The work is in worker/seed."""

import os
import sys

# Above everything that an older Python cannot read, so that it gets as far as this sentence.
if sys.version_info < (3, 11):  # noqa: UP036 - this runs with whatever Python somebody has
    sys.exit("seed_volume.py needs Python 3.11 or newer; this is Python %d.%d." % sys.version_info[:2])  # noqa: UP031 - as above

from pathlib import Path

if __name__ == "__main__":
    # In a checkout the package lies beside this folder; where it is installed this changes nothing.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from worker.script_runner import start_command

    start_command("seed_volume.py", "worker.seed.seed_command", os.environ)
