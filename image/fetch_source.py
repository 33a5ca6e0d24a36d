"""Unpack a source archive from an address, without its one top folder. Touches the network and the disk.

Run while the image is built, by a python3 that has nothing but the standard library.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import io
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import PurePosixPath

ATTEMPTS = 4
TIMEOUT_S = 60.0


def fetch(address: str) -> bytes:
    """Return what is at the address; a host that is busy is asked again, one that refuses is not."""
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:  # noqa: S310 - the builder's own address
                body: bytes = response.read()
                return body
        except OSError as exc:
            refused = isinstance(exc, urllib.error.HTTPError) and exc.code < 500 and exc.code != 429  # noqa: PLR2004 - HTTP's own
            if refused or attempt == ATTEMPTS - 1:
                raise
            time.sleep(2.0**attempt)
    raise AssertionError


def unpack(archive: bytes, target: str) -> None:
    """Write the archive's files below `target`; names that leave it are refused by the standard library's filter."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            member.name = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            if member.name != ".":
                tar.extract(member, target, filter="data")


if __name__ == "__main__":
    unpack(fetch(sys.argv[1]), sys.argv[2])
