"""When to try a source again, and when to give up."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Final

from worker.errors import SourceUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable


_LONGEST_WAIT_S: Final = 900.0
_LONGEST_PAUSE_S: Final = 20.0


class Backoff:
    """Decide when to retry and when to give up: at fewer than `enough_bytes` in `patience_s`, however many failures.

    `width` threads share it, because one bad moment of the server hits them together. If a server names a time, it gets that
    time, within 15 minutes of the last progress.
    """

    def __init__(
        self,
        where: str,
        patience_s: float,
        width: int = 1,
        clock: Callable[[], float] = time.monotonic,
        *,
        enough_bytes: int = 0,
    ) -> None:
        self._where = where
        self._patience_s = patience_s
        self._width = width
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._enough_bytes = enough_bytes
        self._came_bytes = 0
        self._reason = "it is too slow"
        self._since_s = clock()
        self._until_s = self._since_s + patience_s

    def progressed(self, length: int = 0) -> None:
        """Record bytes. The count of failures restarts. With enough bytes the patience restarts as well."""
        with self._lock:
            self._failures = 0
            self._came_bytes += length
            if self._came_bytes >= self._enough_bytes:
                self._came_bytes = 0
                self._since_s = self._clock()
                self._until_s = self._since_s + self._patience_s

    def pause(self, for_s: float) -> None:
        """Exclude a time that was not the source's fault."""
        with self._lock:
            self._since_s += for_s
            self._until_s += for_s

    @property
    def is_over(self) -> bool:
        """Return whether the patience is used up."""
        with self._lock:
            return self._clock() >= self._until_s

    def check(self) -> None:
        """Raise `SourceUnreachable` if the patience is used up."""
        with self._lock:
            self._give_up_after(self._clock())

    def _give_up_after(self, now_s: float) -> None:
        if now_s >= self._until_s:
            raise SourceUnreachable(self._where, self._reason, now_s - self._since_s, self._came_bytes)

    def failed(self, reason: str, named_s: float | None = None) -> float:
        """Return how long to wait before the next attempt. Raises `SourceUnreachable` if there is none."""
        with self._lock:
            now_s = self._clock()
            self._failures += 1
            self._reason = reason
            if named_s is not None:
                last_s = self._since_s + max(self._patience_s, _LONGEST_WAIT_S)
                self._until_s = max(self._until_s, min(now_s + named_s + self._patience_s, last_s))
            self._give_up_after(now_s)
            rounds = min((self._failures - 1) // self._width, 10)
            delay_s = min(_LONGEST_PAUSE_S, 0.25 * 2.0**rounds) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            return min(max(delay_s, named_s or 0.0), max(0.0, self._until_s - now_s))
