"""The worker, as RunPod starts it. An image that copies a handler of its own over this file runs that one instead."""

import os
import sys

WORKER = "/opt/worker"

try:
    from worker.__main__ import main
except ModuleNotFoundError:
    # `python /handler.py` as an endpoint's start command is another Python than the worker's.
    if sys.prefix == WORKER:
        raise
    os.execv(f"{WORKER}/bin/python", [f"{WORKER}/bin/python", "-u", *sys.argv])  # noqa: S606 - the same program again

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
