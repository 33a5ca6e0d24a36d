"""Decide which connection fetches which bytes of a file, and which one takes over from a slow one. Pure; any thread may call.

The clock is passed in. Ranges are handed out from the front of the file. When none is left, an idle connection takes over the
rest of the range that would end last, or the part of it that makes both end together.
"""

from __future__ import annotations

import bisect
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_GRACE_S: Final = 1.0  # how long a range runs before it is judged
_WORTH_S: Final = 0.2  # the minimum saving of a takeover, which costs a request
_WINDOW_S: Final = 1.0
_SMALL_BYTES: Final = 64 * 1024
_LAG: Final = 8  # a connection that is this many times slower than the others is replaced
_LAG_GRACE_S: Final = 2.0
_DRIP_GRACE_S: Final = 5.0
_MOST_DOUBLINGS: Final = 6


@dataclass(eq=False, slots=True)
class Pull:
    """A span that one connection fetches. `at` is the offset of its next byte. A takeover moves `end` towards it."""

    owner: int
    at: int
    end: int
    began_s: float
    takeovers: int = 0
    cut: bool = False
    """Whether the connection was ended on purpose, so that its error says nothing about the source."""
    first_s: float | None = None
    _idle_since_s: float | None = None
    _idle_s: float = 0.0
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=2))

    def __post_init__(self) -> None:
        self._marks.append((0.0, self.at))

    @property
    def left(self) -> int:
        """Return how many bytes are missing."""
        return self.end - self.at

    @property
    def waits(self) -> bool:
        """Return whether it waits for the source now, not for the sink."""
        return self._idle_since_s is None

    def waited_s(self, now_s: float) -> float:
        """Return how long it has waited for the source, without the sink's time."""
        idle_s = now_s - self._idle_since_s if self._idle_since_s is not None else 0.0
        return now_s - self.began_s - self._idle_s - idle_s

    def rate(self, now_s: float) -> float:
        """Return bytes a second over the last seconds of waiting."""
        waited_s = self.waited_s(now_s)
        if waited_s - self._marks[-1][0] >= _WINDOW_S:
            self._marks.append((waited_s, self.at))
        mark_s, mark_at = self._marks[0]
        return (self.at - mark_at) / max(waited_s - mark_s, 0.001)

    def pause(self, now_s: float) -> None:
        """Stop the clock while the sink takes the bytes."""
        self._idle_since_s = now_s

    def resume(self, now_s: float) -> None:
        """Restart the clock."""
        if self._idle_since_s is not None:
            self._idle_s += now_s - self._idle_since_s
            self._idle_since_s = None


class Spans:
    """The missing ranges of a file and those under way. `Pull.owner` numbers the connection."""

    def __init__(self, gaps: Iterable[tuple[int, int]], connections: int, request_bytes: int, smallest_bytes: int) -> None:
        self.changed = threading.Condition()
        self._todo = sorted(gaps)
        self._connections = connections
        self._request_bytes = request_bytes
        self._smallest_bytes = smallest_bytes
        self._pulls: list[Pull] = []
        self._rates: deque[float] = deque(maxlen=connections)
        self._first_s: deque[float] = deque(maxlen=connections)
        self._cuts: dict[int, int] = {}

    @property
    def is_done(self) -> bool:
        """Return whether nothing is missing and nothing is under way."""
        with self.changed:
            return not self._todo and not self._pulls

    @property
    def waits(self) -> bool:
        """Return whether any connection waits for the source."""
        with self.changed:
            return any(pull.waits for pull in self._pulls)

    def take(self, owner: int, reach: int, now_s: float) -> Pull | None:
        """Return the next range that begins before `reach`, or a takeover. None if there is none that is worth it."""
        with self.changed:
            if self._todo and self._todo[0][0] < reach:
                start, end = self._todo[0]
                stop = min(end, reach, start + self._length())
                self._todo[0:1] = [(stop, end)] if stop < end else []
                return self._begin(Pull(owner, start, stop, now_s))
            return self._take_over(owner, now_s)

    def take_whole(self, owner: int, now_s: float) -> Pull | None:
        """Return everything from the first missing byte on, for a source without range support."""
        with self.changed:
            if not self._todo:
                return None
            start, end = self._todo[0][0], self._todo[-1][1]
            self._todo = []
            return self._begin(Pull(owner, start, end, now_s))

    def _length(self) -> int:
        """Return the next length: large ranges first and small ones at the end, so that all connections finish together."""
        left = sum(end - start for start, end in self._todo)
        share = left // (2 * self._connections)
        return max(self._smallest_bytes, min(share, self._request_bytes))

    def _begin(self, pull: Pull) -> Pull:
        self._pulls.append(pull)
        return pull

    def _take_over(self, owner: int, now_s: float) -> Pull | None:
        """Split what would end last, in proportion to the rates. Take all of it if its connection is nearly stalled."""
        slowest, saved_s, keep_bytes = None, max(_WORTH_S, 2 * self._usual_first_s()), 0
        for pull in self._pulls:
            usual = self._usual(pull, now_s)
            if pull.waited_s(now_s) >= self._grace_s(pull):
                rate = max(pull.rate(now_s), 1.0)
            elif usual:
                rate = max(pull.rate(now_s), usual)  # too young to be judged: assumed to be as fast as the others
            else:
                continue
            usual = usual or rate
            saves_s = pull.left / rate - pull.left / (rate + usual)
            if saves_s > saved_s:
                slowest, saved_s, keep_bytes = pull, saves_s, int(pull.left * rate / (rate + usual))
        if slowest is None:
            return None
        if keep_bytes < max(_SMALL_BYTES, slowest.rate(now_s) * _WORTH_S):
            keep_bytes = 0
            slowest.cut = True
        mine = Pull(owner, slowest.at + keep_bytes, slowest.end, now_s, slowest.takeovers + 1)
        slowest.end = mine.at
        return self._begin(mine)

    def _grace_s(self, pull: Pull) -> float:
        """Return the time before a takeover. It doubles with each one, so that a source that halts is not asked repeatedly."""
        return max(_GRACE_S, 2 * self._usual_first_s()) * 2.0 ** min(pull.takeovers, _MOST_DOUBLINGS)

    def _usual_first_s(self) -> float:
        return statistics.median(self._first_s) if self._first_s else 0.0

    def _usual(self, but: Pull, now_s: float) -> float:
        """Return the rate of the other connections, running or recently finished."""
        others = [pull.rate(now_s) for pull in self._pulls if pull is not but and pull.first_s is not None]
        known = [*others, *self._rates]
        return statistics.median(known) if known else 0.0

    def came(self, pull: Pull, length: int, now_s: float) -> int:
        """Count bytes. Return how many of them still belong to this pull."""
        with self.changed:
            length = max(0, min(length, pull.end - pull.at))
            pull.at += length
            if pull.first_s is None:
                pull.first_s = now_s - pull.began_s
                self._first_s.append(pull.first_s)
            return length

    def end(self, pull: Pull, now_s: float) -> None:
        """Take back a range. Its rest goes to the others, in its place.

        A full sink waits for the first missing byte, so ranges nearest to the front go first.
        """
        with self.changed:
            self._pulls.remove(pull)
            if pull.at < pull.end:
                bisect.insort(self._todo, (pull.at, pull.end))
            elif not pull.cut and pull.first_s is not None:
                self._rates.append(pull.rate(now_s))
            self.changed.notify_all()

    def laggards(self, slowest_bytes_per_s: float, now_s: float) -> list[Pull]:
        """Mark pulls as cut that are far slower than the others or nearly stalled. Return all whose connection must end."""
        with self.changed:
            found = [pull for pull in self._pulls if not pull.cut and self._lags(pull, slowest_bytes_per_s, now_s)]
            for pull in found:
                pull.cut = True
                self._cuts[pull.owner] = self._cuts.get(pull.owner, 0) + 1
            return [pull for pull in self._pulls if pull.cut]

    def _lags(self, pull: Pull, slowest_bytes_per_s: float, now_s: float) -> bool:
        waited_s = pull.waited_s(now_s) / 2.0 ** min(self._cuts.get(pull.owner, 0), _MOST_DOUBLINGS)
        if waited_s < _LAG_GRACE_S or pull.left <= 0:
            return False
        rate = pull.rate(now_s)
        others = [other.rate(now_s) for other in self._pulls if other is not pull]
        if len(others) > 1 and rate * _LAG < statistics.median(others):
            return True
        return waited_s >= _DRIP_GRACE_S and rate < slowest_bytes_per_s
