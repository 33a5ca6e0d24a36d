"""Hash files: a download's bytes in order, while they are written into the partial, and whole files. Touches the disk.

On a network volume, reading back what eight connections write costs as much as writing it. So the hash takes a file's bytes
from memory on their way to the disk, where that is as good as reading them back:

- From its first byte on, the file had a name that only this worker knew, so nobody else had it open for writing. A file that
  lost its name is `PartialTaken` and never published. Its length is checked again before that.
- Every byte was written once. Nothing was published before each write, the following flush and the close reported success. A
  lost write is reported there; the page cache, which a read back shows, would have hidden it.
- Bytes that came too early to be kept in memory are read back.

Otherwise the whole file is read back. An `inherited` partial contains another worker's bytes, and until that worker notices its
loss, more of them may arrive. In a `rewritten` one (a server that stops honouring ranges sends the file from its beginning
again) the disk may hold other bytes than those that were hashed.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Final

from worker.errors import EnsureCancelled
from worker.store.partial import PartialTaken, stuck_error
from worker.store.reorder import ReorderBuffer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from worker.base.progress import CancelToken
    from worker.fetch.ranges import RangeTuning
    from worker.store.partial import Partial

_TICK_S: Final = 0.2
_BUFFER_BYTES: Final = 4 * 1024 * 1024


class HashedPartial:
    """A `Sink` over a partial, with a thread that hashes behind the writers. `stop` ends it."""

    def __init__(self, partial: Partial, tuning: RangeTuning) -> None:
        self._partial = partial
        self._tuning = tuning
        self._reorder = None if partial.inherited else ReorderBuffer(tuning.reorder_bytes, tuning.buffer_bytes)
        self._stop = threading.Event()
        self._hashed_bytes = 0
        self._sha256: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._hash, name="sha256", daemon=True)
        self._thread.start()

    # --- the sink

    @property
    def size_bytes(self) -> int:
        """Return the file's length."""
        return self._partial.size_bytes

    @property
    def done_bytes(self) -> int:
        """Return how many bytes are written."""
        return self._partial.done_bytes

    @property
    def is_rewritable(self) -> bool:
        """Return True: the whole file is read back then."""
        return True

    def gaps(self) -> list[tuple[int, int]]:
        """Return the missing ranges."""
        return self._partial.gaps()

    def reach(self) -> int:
        """Return the whole size: a stalled connection delays the others no more than the disk does."""
        return self._partial.reach()

    def write(self, offset: int, view: memoryview) -> None:
        """Like `Partial.write`. Copy first: once the file has the bytes, a reader without a copy reads them back."""
        if self._reorder is not None:
            self._reorder.put(offset, view)
        self._partial.write(offset, view)

    def check(self) -> None:
        """Like `Partial.check`, with the patience of the tuning."""
        self._partial.check(self._tuning.patience_s, self._tuning.stuck_s)

    # --- the hash

    def _hash(self) -> None:
        try:
            self._sha256 = self._partial.follow(self._stop.is_set, self._count, self._reorder)
        except (OSError, PartialTaken) as exc:
            self._error = exc

    def _count(self, hashed_bytes: int) -> None:
        self._hashed_bytes = hashed_bytes

    def sha256(self, cancel: CancelToken, on_bytes: Callable[[int], None]) -> str:
        """Return the sha256 of the file, which must be complete and settled by now.

        Raises `EnsureCancelled`, `PartialTaken`, file system errors, and `PartialWriteFailed` if no byte can be read for
        `patience_s`.
        """
        seen_bytes, moved_s = -1, self._partial.clock()
        while self._thread.is_alive():
            self._thread.join(_TICK_S)
            on_bytes(self._hashed_bytes)
            if cancel.is_set():
                raise EnsureCancelled(self._partial.path.parent.name)
            now_s = self._partial.clock()
            if self._hashed_bytes != seen_bytes:
                seen_bytes, moved_s = self._hashed_bytes, now_s
            if now_s - moved_s > self._tuning.patience_s:
                raise stuck_error(self._tuning.patience_s)
        if self._sha256 is None:
            raise self._error or PartialTaken
        if self._partial.rewritten:
            return sha256_of(self._partial.path, cancel, on_bytes)
        return self._sha256

    def stop(self) -> None:
        """End the thread, whatever it does."""
        self._stop.set()
        self._thread.join(_TICK_S)


def sha256_of(path: Path, cancel: CancelToken, on_bytes: Callable[[int], None]) -> str:
    """Return the sha256 of a whole file. Stop within one buffer if cancelled. `on_bytes` gets the count so far."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    done = 0
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(buffer):
            if cancel.is_set():
                raise EnsureCancelled(path.name)
            digest.update(buffer[:length])
            done += length
            on_bytes(done)
    return digest.hexdigest()


def git_sha1_of(path: Path, size_bytes: int) -> str:
    """Return git's hash of a file, which must be small."""
    digest = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()
