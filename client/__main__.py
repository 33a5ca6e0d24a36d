"""`python -m client`: reads the arguments and the environment."""

import os
import sys

# Before everything that an older Python cannot parse, so that it gets as far as this sentence.
if sys.version_info < (3, 10):  # noqa: UP036 - this runs with whatever Python somebody has
    sys.exit("The client needs Python 3.10 or newer; this is Python %d.%d." % sys.version_info[:2])  # noqa: UP031 - as above

from client.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], os.environ))
