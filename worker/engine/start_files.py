"""Have the kernel read what ComfyUI's start reads, before ComfyUI asks for it. Touches the disk, in its own threads.

In a container whose files are not in memory, ComfyUI waits for one small read after another. While the image was built, one
start was recorded (image/record_start.py): a list of parts of files, in the order of their use. They are requested in parallel
with posix_fadvise(WILLNEED), which returns before they are read.

The recorded start had no GPU. With one, more of CUDA's libraries is read, which no list knows. A file that is gone or changed
since costs nothing but a vain request, and a file system that ignores requests (gVisor's) loses nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from worker.base.text import count

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

# Most of the time goes into opening thousands of small files, whose metadata is not in memory either.
_THREADS: Final = 4
# The kernel takes no more from one request than its readahead window or the disk's largest request, and drops the rest.
_REQUEST_BYTES: Final = 128 << 10


def request_start_files(listed: Path) -> None:
    """Begin to request the parts of files that a start reads, by a list; return at once. Do nothing without a list."""
    threading.Thread(target=_request_all, args=(listed,), name="start-files", daemon=True).start()


def _request_all(listed: Path) -> None:
    began_s = time.monotonic()
    try:
        lines = deque(listed.read_text("utf-8").splitlines())
    except OSError as exc:
        log.debug("ComfyUI's files are not read ahead: %s", exc)
        return
    files = len(lines)
    threads = [threading.Thread(target=_request, args=(lines,), daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.debug("%s of ComfyUI's start requested in %.2f s", count(files, "file"), time.monotonic() - began_s)


def _request(lines: deque[str]) -> None:
    """Request the start's files line by line, beside other threads that do the same."""
    with suppress(IndexError):
        while True:
            line = lines.popleft()
            # What cannot be opened or read ahead, ComfyUI reads itself, or does not.
            with suppress(OSError, ValueError):
                _request_line(line)


def _request_line(line: str) -> None:
    ranges, _, path = line.partition("\t")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for text in ranges.split(","):
            begin, end = map(int, text.split("-"))
            for offset in range(begin, end, _REQUEST_BYTES):
                os.posix_fadvise(fd, offset, min(_REQUEST_BYTES, end - offset), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
