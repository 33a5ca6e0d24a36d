"""Record which parts of which files one start of ComfyUI reads. Touches the page cache, processes and one file.

    record_start.py LIST FOLDER,... COMMAND ...     run the command, with --port, until it listens there; then write LIST

Run once, while an image is built. At a container's start the worker has the kernel read these parts ahead, in the list's order
(worker/engine/start_files.py). A line of the list is a file's ranges, in bytes, and its path: `0-65536,131072-262144<TAB>PATH`.

The files are first dropped from the page cache, which a build may do for its own files: what is in it afterwards was read. Of a
mapped library that is too much, because the kernel reads megabytes around each page. There the pages count that the process has
in its page table. The kernel enters up to 64 KiB around a touched page, so that is how exact the list is.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT_S: Final = 600.0
LIMIT_BYTES: Final = 1 << 30
"""No list is longer. Reading more would take longer than a start, and memory that a small container has not."""
SMALLEST_GAP_PAGES: Final = (64 << 10) // mmap.PAGESIZE
"""A smaller gap is read as well: that costs less than another request."""
_FAILED: Final = ctypes.c_void_p(-1).value
_MAPPED: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ [1-9]\d* +(/.*)")
_PRESENT: Final = bytes(byte >> 7 for byte in range(256))
"""Translates the highest byte of an entry of /proc/PID/pagemap to 1 if the page is in memory."""

Ranges = list[tuple[int, int]]


class Record:
    """Finds what became resident, look by look. The order of the first looks that found a file is the list's order."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._libc = _libc()
        self._files = {path: size for folder in folders for path, size in _files_below(folder)}
        self._mapped: dict[str, bytearray] = {}
        self._looks: dict[str, int] = {}
        self._look = 0
        self.listed_bytes = 0

    def forget(self) -> None:
        """Drop the files from the page cache. Pages that were just written must be on the disk for that."""
        os.sync()
        for path in self._files:
            with contextlib.suppress(OSError), _opened(path) as fd:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def resident_bytes(self) -> int:
        """Return how much of the files is in the page cache."""
        return mmap.PAGESIZE * sum(self._pages(path, size).count(1) for path, size in self._files.items())

    def look(self, pid: int) -> None:
        """Note what a process has mapped by now, and which files were read for the first time."""
        self._look += 1
        with contextlib.suppress(OSError):  # it just ended
            self._look_at_mappings(pid)
        for path, size in self._files.items():
            if path not in self._looks and (path in self._mapped or 1 in self._pages(path, size)):
                self._looks[path] = self._look

    def lines(self) -> Iterator[str]:
        """Yield the list's lines, up to `LIMIT_BYTES`."""
        for path in sorted(self._looks, key=self._looks.__getitem__):  # a stable sort: files of one package stay together
            found = runs(self._mapped.get(path) or self._pages(path, self._files[path]))
            self.listed_bytes += sum(mmap.PAGESIZE * (after - first) for first, after in found)
            if self.listed_bytes > LIMIT_BYTES:
                return
            ranges = ",".join(f"{mmap.PAGESIZE * first}-{mmap.PAGESIZE * after}" for first, after in found)
            yield f"{ranges}\t{path}\n"

    def _look_at_mappings(self, pid: int) -> None:
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
                found = _MAPPED.fullmatch(line)
                if found and (size := self._files.get(found[4])):
                    begin, end, offset = (int(found[group], 16) // mmap.PAGESIZE for group in (1, 2, 3))
                    end = min(end, begin + _page_count(size) - offset)
                    entries = os.pread(pagemap.fileno(), 8 * (end - begin), 8 * begin)
                    pages = self._mapped.setdefault(found[4], bytearray(_page_count(size)))
                    for first, after in runs(entries[7::8].translate(_PRESENT), 1):
                        pages[offset + first : offset + after] = b"\1" * (after - first)

    def _pages(self, path: str, size: int) -> bytes:
        """Return one byte for each page of a file: 1 if it is in the page cache."""
        with contextlib.suppress(OSError), _opened(path) as fd:
            address = self._libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            if address != _FAILED:
                pages = ctypes.create_string_buffer(_page_count(size))
                self._libc.mincore(address, size, pages)
                self._libc.munmap(address, size)
                return pages.raw
        return b""


def runs(pages: bytes | bytearray, gap_pages: int = SMALLEST_GAP_PAGES) -> Ranges:
    """Return the runs of pages that are 1, first and after the last, with smaller gaps in them."""
    found: Ranges = []
    first = pages.find(1)
    while first >= 0:
        after = pages.find(0, first)
        after = len(pages) if after < 0 else after
        if found and first - found[-1][1] < gap_pages:
            first = found.pop()[0]
        found.append((first, after))
        first = pages.find(1, after)
    return found


def record(listed: Path, folders: Sequence[str], command: Sequence[str]) -> None:
    """Start the command, look until it listens, end it, write the list. Raises `SystemExit` if it does not listen."""
    port = _free_port()
    records = Record(folders)
    records.forget()
    kept = records.resident_bytes()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, start_new_session=True)  # noqa: S603 - the build's own
        try:
            began = time.monotonic()
            listens = False
            while not listens and process.poll() is None and time.monotonic() - began < TIMEOUT_S:
                listens = _listens(port)
                records.look(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not listens:
            log.seek(0)
            raise SystemExit(f"ComfyUI does not listen on port {port}:\n{log.read()[-4000:].decode('utf-8', 'replace')}")
    listed.write_text("".join(records.lines()), encoding="utf-8")
    print(f"{records.listed_bytes / 1e6:.0f} MB; {kept / 1e6:.0f} MB could not be dropped before")  # noqa: T201 - the build's log


def _files_below(folder: str) -> Iterator[tuple[str, int]]:
    for place, _, names in os.walk(folder):
        for name in names:
            path = f"{place}/{name}"
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode) and found.st_size:
                yield path, found.st_size


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _page_count(size: int) -> int:
    return -(-size // mmap.PAGESIZE)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
