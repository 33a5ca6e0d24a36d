"""Keep bytes that arrive early in memory until their turn. Touches nothing; any thread may call.

Ranges arrive in parallel, but a hash needs their bytes in order. Bytes kept here need not be read back from the disk.
"""

from __future__ import annotations

import threading


class ReorderBuffer:
    """Copies of blocks that arrived early, at most `limit_bytes`. Those furthest from their turn are dropped first.

    No caller may rely on a block: a dropped or repeated block must be found elsewhere. Memory is allocated as needed, in
    buffers of `block_bytes` that are reused.
    """

    def __init__(self, limit_bytes: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._left = max(0, limit_bytes // block_bytes)
        self._free: list[memoryview] = []
        self._kept: dict[int, tuple[memoryview, int]] = {}
        self._lock = threading.Lock()
        self._at = 0

    def put(self, offset: int, view: memoryview) -> bool:
        """Keep a copy if there is room, or instead of a later block. Return whether it is kept."""
        with self._lock:
            if len(view) > self._block_bytes or offset < self._at or offset in self._kept:
                return False
            buffer = self._buffer(offset)
            if buffer is None:
                return False
        # Copy without the lock, or eight writers would wait for each other. Nobody else knows the buffer yet.
        buffer[: len(view)] = view
        with self._lock:
            if offset < self._at:
                self._free.append(buffer)
                return False
            self._kept[offset] = buffer, len(view)
            return True

    def _buffer(self, offset: int) -> memoryview | None:
        if self._free:
            return self._free.pop()
        if self._left:
            self._left -= 1
            return memoryview(bytearray(self._block_bytes))
        last = max(self._kept, default=-1)
        return self._kept.pop(last)[0] if last > offset else None

    def take(self, offset: int) -> memoryview | None:
        """Return the block that begins at `offset`, or None. The caller gives it back with `release`."""
        with self._lock:
            self._at = max(self._at, offset)
            for passed in [found for found in self._kept if found < offset]:
                self._free.append(self._kept.pop(passed)[0])
            found = self._kept.pop(offset, None)
        return None if found is None else found[0][: found[1]]

    def release(self, block: memoryview) -> None:
        """Allow the block's memory to be reused."""
        buffer = memoryview(block.obj)
        with self._lock:
            self._free.append(buffer)

    def has(self, offset: int) -> bool:
        """Return whether a kept block begins at `offset`."""
        with self._lock:
            return offset in self._kept

    def next_after(self, offset: int, end: int) -> int:
        """Return where the first kept block beyond `offset` begins, at most `end`."""
        with self._lock:
            return min((found for found in self._kept if found > offset), default=end)
