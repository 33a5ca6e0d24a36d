"""Bytes that came before their turn, kept in memory until it is. Touches nothing; any thread may call.

Ranges are fetched side by side and a hash wants their bytes in order: what is here need not be read back from the disk.
"""

from __future__ import annotations

import threading


class Ahead:
    """Copies of blocks by their offset, at most `limit_bytes` of them; those furthest from their turn give way.

    Nobody may rely on a block being here: what gave way, or came twice, has to be found elsewhere. Memory is taken as it is
    needed, in buffers of `block_bytes` that are used again.
    """

    def __init__(self, limit_bytes: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._left = max(0, limit_bytes // block_bytes)
        self._free: list[memoryview] = []
        self._kept: dict[int, tuple[memoryview, int]] = {}
        self._lock = threading.Lock()
        self._at = 0

    def put(self, offset: int, view: memoryview) -> bool:
        """Keep a copy, if there is room for it or for it rather than for a later one; whether it is kept."""
        with self._lock:
            if len(view) > self._block_bytes or offset < self._at or offset in self._kept:
                return False
            buffer = self._buffer(offset)
            if buffer is None:
                return False
        # Copied without the lock: eight writers would wait for each other. Nobody else knows the buffer yet.
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
        """The block that begins at `offset`, to be given back with `release`; None when it is not here."""
        with self._lock:
            self._at = max(self._at, offset)
            for passed in [found for found in self._kept if found < offset]:
                self._free.append(self._kept.pop(passed)[0])
            found = self._kept.pop(offset, None)
        return None if found is None else found[0][: found[1]]

    def release(self, block: memoryview) -> None:
        """Its memory may be used again."""
        buffer = memoryview(block.obj)
        with self._lock:
            self._free.append(buffer)

    def has(self, offset: int) -> bool:
        """Whether a kept block begins at `offset`."""
        with self._lock:
            return offset in self._kept

    def next_after(self, offset: int, end: int) -> int:
        """Where the first kept block beyond `offset` begins; `end` when that comes first."""
        with self._lock:
            return min((found for found in self._kept if found > offset), default=end)
