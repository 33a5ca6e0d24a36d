"""What a download's bytes go through: into the partial, and in their order past a sha256. Touches the disk.

On a network volume, reading back what eight connections are writing costs as much as writing it. So the hash takes a file's
bytes from memory on their way to the disk, where that is as good as reading them back:

- The file carried a name that only this worker knew from its first byte on, so nobody else ever had it open for writing; one
  that lost its name is `Taken` and never published. Its length is looked at again before it is.
- Every byte was written once, and nothing was published before each write, the flush after them and the close said that they
  went well. A lost write is reported there; the page cache, which is what a read back shows, would have hidden it.
- What came too far ahead of its turn to be kept in memory is read back.

Where it is not, the whole file is read back. A partial that was `inherited` holds another worker's bytes, and until that worker
notices its loss, more of them may come. In one that was `rewritten` (a server that stopped honouring ranges sends the file from
its beginning again) the disk may hold other bytes than those that were hashed.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from worker.errors import EnsureCancelled
from worker.store.disk import sha256_of
from worker.store.partial import Taken, silent
from worker.store.reorder import Ahead

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import CancelToken
    from worker.fetch.ranges import Tuning
    from worker.store.partial import Partial

_TICK_S: Final = 0.2


class HashedPartial:
    """A `Sink` over a partial, with a thread that hashes behind the writers; `stop` ends it."""

    def __init__(self, partial: Partial, tuning: Tuning) -> None:
        self._partial = partial
        self._tuning = tuning
        self._ahead = None if partial.inherited else Ahead(tuning.ahead_bytes, tuning.buffer_bytes)
        self._stop = threading.Event()
        self._hashed_bytes = 0
        self._sha256: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._hash, name="sha256", daemon=True)
        self._thread.start()

    # --- the sink

    @property
    def size_bytes(self) -> int:
        """The file's length."""
        return self._partial.size_bytes

    @property
    def done_bytes(self) -> int:
        """How many bytes are written."""
        return self._partial.done_bytes

    @property
    def is_rewritable(self) -> bool:
        """Yes: the whole file is read back then."""
        return True

    def gaps(self) -> list[tuple[int, int]]:
        """What is missing."""
        return self._partial.gaps()

    def reach(self) -> int:
        """Everything: a connection that stalls holds the others up no more than the disk does."""
        return self._partial.reach()

    def write(self, offset: int, view: memoryview) -> None:
        """As `Partial.write`. The copy comes first: once the file has the bytes, whoever finds no copy reads them back."""
        if self._ahead is not None:
            self._ahead.put(offset, view)
        self._partial.write(offset, view)

    def check(self) -> None:
        """As `Partial.check`, with the patience of the tuning."""
        self._partial.check(self._tuning.patience_s, self._tuning.stuck_s)

    # --- the hash

    def _hash(self) -> None:
        try:
            self._sha256 = self._partial.follow(self._stop.is_set, self._count, self._ahead)
        except (OSError, Taken) as exc:
            self._error = exc

    def _count(self, hashed_bytes: int) -> None:
        self._hashed_bytes = hashed_bytes

    def sha256(self, cancel: CancelToken, on_bytes: Callable[[int], None]) -> str:
        """The sha256 of the file, which must be complete and settled by now.

        Raises `EnsureCancelled`, `Taken`, what the file system says, and `DiskFailed` when that gives no byte for `patience_s`.
        """
        seen_bytes, moved_s = -1, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_TICK_S)
            on_bytes(self._hashed_bytes)
            if cancel.is_set():
                raise EnsureCancelled(self._partial.path.parent.name)
            now_s = time.monotonic()
            if self._hashed_bytes != seen_bytes:
                seen_bytes, moved_s = self._hashed_bytes, now_s
            if now_s - moved_s > self._tuning.patience_s:
                raise silent(self._tuning.patience_s)
        if self._sha256 is None:
            raise self._error or Taken
        if self._partial.rewritten:
            return sha256_of(self._partial.path, cancel, on_bytes)
        return self._sha256

    def stop(self) -> None:
        """End the thread, whatever it does."""
        self._stop.set()
        self._thread.join(_TICK_S)
