"""`python -m client`: composition root, reads argv and the environment."""

from __future__ import annotations

import os
import sys

from client.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], os.environ))
