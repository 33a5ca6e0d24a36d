"""The worker, as RunPod starts it. An image that copies a handler of its own over this file runs that one instead."""

import os
import sys

from worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
