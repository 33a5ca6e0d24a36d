"""Sets of byte ranges. Pure."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Ranges:
    """Byte ranges, half open, disjoint and in order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add a range. It may overlap or touch existing ones."""
        if start >= end:
            return
        low = bisect.bisect_left(self._ranges, start, key=lambda found: found[1])
        high = bisect.bisect_right(self._ranges, end, key=lambda found: found[0])
        if low < high:
            start, end = min(start, self._ranges[low][0]), max(end, self._ranges[high - 1][1])
        self._ranges[low:high] = [(start, end)]

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """Return the missing ranges of `size` bytes, in order."""
        edges = [0, *(edge for found in self._ranges for edge in found), size]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]

    @property
    def total(self) -> int:
        """Return the total length of the ranges."""
        return sum(end - start for start, end in self._ranges)

    @property
    def first_gap(self) -> int:
        """Return how many bytes are there from the beginning without a gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    def as_list(self) -> list[tuple[int, int]]:
        """Return a copy, in order."""
        return list(self._ranges)
