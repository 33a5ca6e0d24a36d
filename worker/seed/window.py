"""The parts of a file in memory between source and targets: in any order in, in order out. Pure.

`RangeFetch` writes into it as into a partial on disk, but never beyond the window, which limits the memory.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from worker.store.byte_ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_TICK_S: Final = 0.5


class WindowClosed(Exception):  # noqa: N818 - it was closed on purpose
    """Nobody takes the bytes in a window any longer."""


@dataclass(eq=False, slots=True)
class WindowPart:
    """One part of a file in a window. `number` counts from 1, as in S3."""

    number: int
    buffer: bytearray
    came: Ranges = field(default_factory=Ranges)
    open_for: set[object] = field(default_factory=set)
    """The readers that still need it."""
    writers: int = 0

    @property
    def whole(self) -> bool:
        """Return whether every byte arrived."""
        return self.came.total == len(self.buffer)


class Window:
    """`width` parts of `part_bytes` each, moving over a file of `size_bytes`. Each of the `readers` must release every part.

    `spare` holds unused buffers. They are passed from one window to the next, so that many files take no more memory than one
    (a process does not always give freed memory of this size back).

    It cannot deadlock: the lowest unfinished part always has room.
    """

    def __init__(
        self, size_bytes: int, part_bytes: int, width: int, readers: Collection[object], spare: list[bytearray] | None = None
    ) -> None:
        self.size_bytes = size_bytes
        self.part_bytes = part_bytes
        self.count = max(1, -(-size_bytes // part_bytes))
        self._width = width
        self._readers = frozenset(readers)
        self._changed = threading.Condition()
        self._parts: dict[int, WindowPart] = {}
        self._spare = [] if spare is None else spare
        self._spare[:] = [buffer for buffer in self._spare if len(buffer) == part_bytes]
        self._through: set[int] = set()
        self._low = 1
        self._came = Ranges()
        self._closed = False
        self._held_until_s = 0.0
        if not size_bytes:
            self._parts[1] = WindowPart(1, bytearray(), open_for=set(self._readers))

    # --- what a fetch sees: it is a `ranges.Sink`

    @property
    def done_bytes(self) -> int:
        """Return how many bytes arrived."""
        with self._changed:
            return self._came.total

    @property
    def is_rewritable(self) -> bool:
        """Return False: its readers may have passed the bytes on."""
        return False

    def gaps(self) -> list[tuple[int, int]]:
        """Return the missing ranges, in order."""
        with self._changed:
            return self._came.gaps(self.size_bytes)

    def reach(self) -> int:
        """Return the end of the window."""
        with self._changed:
            if len(self._parts) == self._width and all(part.whole for part in self._parts.values()):
                self._held_until_s = time.monotonic() + _TICK_S
            return min(self.size_bytes, (self._low - 1 + self._width) * self.part_bytes)

    def check(self) -> None:
        """Do nothing: closing the window also cancels the download."""

    def write(self, offset: int, view: memoryview) -> None:
        """Take bytes. Those of a source without range support may wait for room. Raises `WindowClosed`."""
        while view:
            number, at = offset // self.part_bytes + 1, offset % self.part_bytes
            length = min(len(view), self.part_bytes - at)
            self._put(number, at, view[:length])
            offset, view = offset + length, view[length:]

    def _put(self, number: int, at: int, view: memoryview) -> None:
        with self._changed:
            part = self._room_for(number)
            # An abandoned thread may deliver bytes late that another one brought: complete parts stay as they are.
            if part is None or part.whole:
                return
            part.writers += 1
        part.buffer[at : at + len(view)] = view
        start = (number - 1) * self.part_bytes + at
        with self._changed:
            part.writers -= 1
            part.came.add(at, at + len(view))
            self._came.add(start, start + len(view))
            if part.whole:
                self._changed.notify_all()

    def _room_for(self, number: int) -> WindowPart | None:
        """Return the part once it is inside the window. None if it is already finished."""
        while not self._closed:
            if number in self._through or number < self._low:
                return None
            if number in self._parts:
                return self._parts[number]
            if number < self._low + self._width:
                part = self._parts[number] = WindowPart(number, self._buffer(number), open_for=set(self._readers))
                return part
            self._held_until_s = time.monotonic() + _TICK_S
            self._changed.wait(_TICK_S)
        raise WindowClosed

    def _buffer(self, number: int) -> bytearray:
        length = min(self.part_bytes, self.size_bytes - (number - 1) * self.part_bytes)
        return self._spare.pop() if self._spare and length == self.part_bytes else bytearray(length)

    def held_within(self, seconds: float) -> bool:
        """Return whether the source had to wait in the last `seconds`. If its connections then broke, it is not to blame."""
        return time.monotonic() - self._held_until_s < seconds

    # --- what a reader sees

    def in_order(self) -> Iterator[WindowPart]:
        """Yield each part, in order, as soon as it is complete. Raises `WindowClosed`."""
        for number in range(1, self.count + 1):
            with self._changed:
                while not self._closed and not ((part := self._parts.get(number)) and part.whole):
                    self._changed.wait(_TICK_S)
                if self._closed:
                    raise WindowClosed
                part = self._parts[number]
            yield part

    def release(self, part: WindowPart, reader: object) -> None:
        """Release the part for this reader. When all have released it, its memory is reused."""
        with self._changed:
            part.open_for.discard(reader)
            if part.open_for or part.number not in self._parts:
                return
            del self._parts[part.number]
            self._through.add(part.number)
            while self._low in self._through:
                self._through.discard(self._low)
                self._low += 1
            if len(part.buffer) == self.part_bytes and not part.writers:
                self._spare.append(part.buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """End all waits: nobody takes or gives bytes any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
