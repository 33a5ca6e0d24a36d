"""Copy files that are too large for a result to the network volume. A name appears when its file is complete. Touches disk."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from worker.errors import OutputGone, UnsafePath

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Large enough for a network file system, small enough to notice a cancelled job soon.
_CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class VolumeCopy:
    """One output to copy to the volume: `path` is relative to the volume's root, `source` is a file or the bytes themselves."""

    path: str
    source: Path | bytes


class VolumeCopies:
    """The copies of one job's outputs on the volume. Call `run` in a thread, and `stop` from any other."""

    def __init__(self, root: Path, copies: Sequence[VolumeCopy]) -> None:
        self._root = root
        self._copies = copies
        self._stopped = threading.Event()

    def run(self) -> None:
        """Write every file to the disk. No name appears before its file is complete.

        If one fails, those before it stay; a second attempt at the same job replaces them. Raises OSError as the volume does,
        `OutputGone` for a missing source. Returns early once stopped, with no unfinished file left.
        """
        for copy in self._copies:
            if self._stopped.is_set():
                return
            self._write(copy)

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stopped.set()

    def _write(self, copy: VolumeCopy) -> None:
        target = self._root / copy.path
        if not target.parent.resolve().is_relative_to(self._root.resolve()):
            raise UnsafePath("The place of an output on the volume", copy.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex[:8]}.part")
        try:
            with partial.open("xb") as sink:
                whole = self._fill(sink.fileno(), copy.source)
                if whole:
                    os.fsync(sink.fileno())
            if whole:
                partial.replace(target)
                _sync_copy_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def _fill(self, sink: int, source: Path | bytes) -> bool:
        """Return whether all of it was written. It is not if the job was cancelled meanwhile."""
        if isinstance(source, bytes):
            _write_all(sink, source)
            return True
        try:
            opened = source.open("rb", buffering=0)
        except FileNotFoundError as exc:
            raise OutputGone(source.name) from exc
        with opened:
            while not self._stopped.is_set():
                chunk = opened.read(_CHUNK_BYTES)
                if not chunk:
                    return not self._stopped.is_set()
                _write_all(sink, chunk)
        return False


def _write_all(sink: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(sink, left) :]


def _sync_copy_folder(folder: Path) -> None:
    """Flush a copy's new name to the disk of the volume. Some network file systems refuse this for a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
