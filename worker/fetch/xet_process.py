"""The process that speaks Xet: it reads byte ranges from standard input and writes bytes to standard output.

Touches the network.

hf_xet continues a call after it is cancelled, and its buffers are large. A process can be killed, which frees its memory. This
one imports nothing of the worker, ends when its standard input does, and reports a failure as one line of JSON on standard
error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from hf_xet import XetConfig, XetFileInfo, XetSession  # type: ignore[import-untyped] # it has none


def main() -> None:
    """Read the requests for Xet, write the bytes, and exit, whatever hf_xet still does."""
    output, says = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # a library's message must not get between a file's bytes
        os.dup2(nowhere, stream)
    wanted = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        _pump(wanted, output)
    except Exception as exc:  # noqa: BLE001 - hf_xet raises any exception, and the parent process decides
        os.write(says, json.dumps({"error": type(exc).__name__, "text": str(exc)}).encode())
        os._exit(1)
    os._exit(0)


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(2)


def _pump(wanted: dict[str, Any], output: int) -> None:
    session = XetSession(XetConfig().with_config(wanted["settings"]))
    group = session.new_download_stream_group(
        endpoint=wanted["endpoint"],
        token=wanted["token"],
        token_expiry_unix_secs=wanted["expires_s"],
        token_refresh_url=wanted["refresh_url"],
        token_refresh_headers=wanted["refresh_headers"],
    )
    info = XetFileInfo(wanted["hash"], wanted["size_bytes"])
    for start, end in wanted["spans"]:
        for block in group.download_stream(info, start=start, end=end):
            left = memoryview(block)
            while left:
                left = left[os.write(output, left) :]


if __name__ == "__main__":
    main()
