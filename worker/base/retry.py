"""When to retry and when to give up: HTTP statuses, `Retry-After`, pauses, patience."""

from __future__ import annotations

import contextlib
import email.utils
import random
import re
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from email.message import Message

OK: Final = 200
PARTIAL: Final = 206
PROXY_LOGIN: Final = 407
UNSATISFIABLE: Final = 416
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
UNAUTHORISED: Final = frozenset({401, 403})
# A server sends Too Early for a replayed TLS request. The others are timeouts, rate limits and broken back ends.
TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_LONGEST_WAIT_S: Final = 900.0
_LONGEST_PAUSE_S: Final = 20.0


def pause_s(failures: int, first_s: float = 0.25, longest_s: float = _LONGEST_PAUSE_S) -> float:
    """Return how long to wait before a retry after so many failures: twice as long each time, less a random part.

    The random part keeps many workers that met one bad moment of a server from coming back together.
    """
    return min(longest_s, first_s * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def retry_after_s(headers: Message | Mapping[str, str]) -> float | None:
    """Return what `Retry-After` (seconds or a date) or an exhausted `RateLimit` asks for, or None."""
    text = headers.get("Retry-After")
    if text and text.strip().isdecimal():
        return float(text)
    if text:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    limit = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit") or "")
    return float(limit.group(1)) if limit else None


class Backoff:
    """Decide when to retry and when to give up: at fewer than `enough_bytes` in `patience_s`, however many failures.

    `give_up` makes the error from a reason, the seconds that passed and the bytes that came. `width` threads share it, because
    one bad moment of the server hits them together. If a server names a time, it gets that time, within 15 minutes of the last
    progress.
    """

    def __init__(
        self,
        give_up: Callable[[str, float, int], Exception],
        patience_s: float,
        width: int = 1,
        clock: Callable[[], float] = time.monotonic,
        *,
        enough_bytes: int = 0,
    ) -> None:
        self._give_up = give_up
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
        """Raise what `give_up` makes if the patience is used up."""
        with self._lock:
            self._give_up_after(self._clock())

    def _give_up_after(self, now_s: float) -> None:
        if now_s >= self._until_s:
            raise self._give_up(self._reason, now_s - self._since_s, self._came_bytes)

    def failed(self, reason: str, named_s: float | None = None) -> float:
        """Return how long to wait before the next attempt. Raises what `give_up` makes if there is none."""
        with self._lock:
            now_s = self._clock()
            self._failures += 1
            self._reason = reason
            if named_s is not None:
                last_s = self._since_s + max(self._patience_s, _LONGEST_WAIT_S)
                self._until_s = max(self._until_s, min(now_s + named_s + self._patience_s, last_s))
            self._give_up_after(now_s)
            delay_s = pause_s((self._failures - 1) // self._width + 1)
            return min(max(delay_s, named_s or 0.0), max(0.0, self._until_s - now_s))
