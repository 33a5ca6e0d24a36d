"""A file of a job: on its way to disk counted against the limit and written in large pieces, there read in small ones.

Touches disk.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, Self

from worker.errors import InputNotStored, InputTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

_FULL_BYTES: Final = 1 << 20


class StagedFile:
    """One new file, open while the context lasts. Holds at most a piece or two of it in memory.

    Closing waits for a `flush` in another thread, so that thread never writes to a file that is not this one.
    """

    def __init__(self, name: str, path: Path, max_bytes: int) -> None:
        self.name = name
        self.path = path
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._size_bytes = 0

    def __enter__(self) -> Self:
        with storing(self.name):
            self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a disk that is full says so again; what mattered was flushed
            self._file.close()

    @property
    def full(self) -> bool:
        """Whether so much is waiting in memory that it should be flushed."""
        return len(self._buffer) >= _FULL_BYTES

    @property
    def size_bytes(self) -> int:
        """How much was added."""
        return self._size_bytes

    def add(self, data: bytes) -> None:
        """Take the next bytes, into memory. Raises `InputTooLarge`."""
        self._size_bytes += len(data)
        self.check_size(self._size_bytes)
        self._buffer += data

    def check_size(self, size_bytes: int) -> None:
        """Raise `InputTooLarge` when a file of this size would be."""
        if size_bytes > self._max_bytes:
            raise InputTooLarge(self.name, self._max_bytes)

    def flush(self) -> None:
        """Write what is waiting. Raises `InputNotStored`."""
        with storing(self.name):
            data, self._buffer = self._buffer, bytearray()
            self._file.write(data)
            self._file.flush()

    def restart(self) -> None:
        """Forget what came so far: it will come again. Raises `InputNotStored`."""
        self._buffer.clear()
        self._size_bytes = 0
        with storing(self.name):
            self._file.seek(0)
            self._file.truncate()


class FileBytes:
    """A file's bytes as slices of it, read from the disk when they are asked for: of a video, its metadata alone."""

    def __init__(self, stream: FileIO) -> None:
        self._stream = stream
        self._size_bytes = os.fstat(stream.fileno()).st_size

    def __len__(self) -> int:
        """How large the file is."""
        return self._size_bytes

    def __getitem__(self, where: slice) -> bytes:
        """As of `bytes`, without steps. Raises `OSError`."""
        start, stop, _ = where.indices(self._size_bytes)
        return os.pread(self._stream.fileno(), max(0, stop - start), start)


@contextlib.contextmanager
def storing(name: str) -> Iterator[None]:
    """Say which file the disk would not take. Raises `InputNotStored` for an `OSError`."""
    try:
        yield
    except OSError as exc:
        raise InputNotStored(name, os.strerror(exc.errno) if exc.errno else str(exc)) from exc
