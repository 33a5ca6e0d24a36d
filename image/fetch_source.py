"""Fetch from an address, patiently; unpack a source archive without its one top folder. Touches the network and the disk.

    python3 fetch_source.py ADDRESS FOLDER

Run while an image is built, by a python3 that has nothing but the standard library; comfy-node-install imports `fetch`.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import http.client
import io
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import PurePosixPath
from typing import Final

AGENT: Final = "comfyui-volume-worker"  # hosts refuse Python's own name, or serve it less
ATTEMPTS: Final = 4
TIMEOUT_S: Final = 60.0


def fetch(address: str, pause_s: float = 1.0) -> bytes:
    """Return what is at the address. A host that is busy or breaks off is asked again, one that refuses is not.

    The pause before another attempt doubles each time. Raises `OSError` or `http.client.HTTPException`.
    """
    request = urllib.request.Request(address, headers={"User-Agent": AGENT})  # noqa: S310 - the builder's own address
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310 - as above
                body: bytes = response.read()
                return body
        except (OSError, http.client.HTTPException) as exc:
            refused = isinstance(exc, urllib.error.HTTPError) and exc.code < 500 and exc.code != 429  # noqa: PLR2004 - HTTP's own
            if refused or attempt == ATTEMPTS - 1:
                raise
            time.sleep(pause_s * 2.0**attempt)
    raise AssertionError


def unpack(archive: bytes, target: str) -> None:
    """Write the archive's files below `target`. Raises `tarfile.TarError` for what would be written or point outside of it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            member.name = _without_top(member.name)
            if member.islnk():
                member.linkname = _without_top(member.linkname)
            if member.name == ".":
                continue
            if hasattr(tarfile, "data_filter"):
                tar.extract(member, target, filter="data")
            else:  # Debian 12's first Python 3.11
                _refuse_outside(member, os.path.realpath(target))
                tar.extract(member, target)


def _without_top(name: str) -> str:
    return str(PurePosixPath(*PurePosixPath(name).parts[1:]))


def _refuse_outside(member: tarfile.TarInfo, root: str) -> None:
    """What the standard library's filter refuses, links through links included: what they point to is on the disk already."""
    place = os.path.realpath(os.path.join(root, member.name))  # noqa: PTH118 - an absolute name must replace the root
    leads_to = [place]
    if member.issym():
        leads_to.append(os.path.realpath(os.path.join(os.path.dirname(place), member.linkname)))  # noqa: PTH118, PTH120 - as above
    elif member.islnk():
        leads_to.append(os.path.realpath(os.path.join(root, member.linkname)))  # noqa: PTH118 - as above
    elif not (member.isfile() or member.isdir()):
        raise tarfile.ExtractError(f"the archive's '{member.name}' is neither a file, a folder nor a link")
    if any(os.path.commonpath([root, path]) != root for path in leads_to):
        raise tarfile.ExtractError(f"the archive's '{member.name}' leads out of its folder")


if __name__ == "__main__":
    unpack(fetch(sys.argv[1]), sys.argv[2])
