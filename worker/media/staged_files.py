"""Write one file of a job to disk within a size limit, in large pieces, and read a file in small ones. Touches disk."""

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
    """One new file that is staged: open while the context lasts. At most a piece or two of it are in memory.

    Closing waits for a `flush` in another thread, so that this thread never writes to another file.
    """

    def __init__(self, name: str, path: Path, max_bytes: int) -> None:
        self.name = name
        self.path = path
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._size_bytes = 0

    def __enter__(self) -> Self:
        with as_not_stored(self.name):
            self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk reports it again; what mattered was flushed
            self._file.close()

    @property
    def full(self) -> bool:
        """Return whether enough bytes wait in memory to be flushed."""
        return len(self._buffer) >= _FULL_BYTES

    @property
    def size_bytes(self) -> int:
        """Return how many bytes were added."""
        return self._size_bytes

    def add(self, data: bytes) -> None:
        """Take the next bytes into memory. Raises `InputTooLarge`."""
        self._size_bytes += len(data)
        self.check_size(self._size_bytes)
        self._buffer += data

    def check_size(self, size_bytes: int) -> None:
        """Raise `InputTooLarge` if a file of this size would be too large."""
        if size_bytes > self._max_bytes:
            raise InputTooLarge(self.name, self._max_bytes)

    def flush(self) -> None:
        """Write the waiting bytes. Raises `InputNotStored`."""
        with as_not_stored(self.name):
            data, self._buffer = self._buffer, bytearray()
            self._file.write(data)
            self._file.flush()

    def restart(self) -> None:
        """Discard the bytes so far: they will come again. Raises `InputNotStored`."""
        self._buffer.clear()
        self._size_bytes = 0
        with as_not_stored(self.name):
            self._file.seek(0)
            self._file.truncate()


class StagedBytes:
    """The bytes of a staged file as slices, read from the disk on demand: of a video, only its metadata."""

    def __init__(self, stream: FileIO) -> None:
        self._stream = stream
        self._size_bytes = os.fstat(stream.fileno()).st_size

    def __len__(self) -> int:
        """Return the file's size."""
        return self._size_bytes

    def __getitem__(self, where: slice) -> bytes:
        """Return a slice as `bytes` does, without steps. Raises `OSError`."""
        start, stop, _ = where.indices(self._size_bytes)
        return os.pread(self._stream.fileno(), max(0, stop - start), start)


@contextlib.contextmanager
def as_not_stored(name: str) -> Iterator[None]:
    """Turn an `OSError` while a file is staged into `InputNotStored`, which names the file."""
    try:
        yield
    except OSError as exc:
        raise InputNotStored(name, os.strerror(exc.errno) if exc.errno else str(exc)) from exc
