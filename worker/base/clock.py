"""A clock that stops while the process is frozen. Touches threads.

RunPod's FlashBoot freezes idle workers and thaws them later. A deadline on the system's clock has then passed, although nobody
could answer in the meantime. Connections to other machines are dead, but no error says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

log = logging.getLogger(__name__)

# Until a freeze is noticed, a job may wait that RunPod thawed the worker for.
_TICK_S = 0.1
# A busy machine, or a library that holds the interpreter, delays ticks by a second or two.
_LATE_S = 4.0


class RunningClock:
    """Seconds that this process was able to run. Call it like `time.monotonic`, from any thread.

    After `start` it ticks. A gap of more than `late_s` between two ticks is a freeze. The clock leaves it out, and calls the
    functions given to `on_thaw` with its length in seconds, on its own thread. A wall clock that jumps ahead also means a
    freeze, because the monotonic clock of a thawed machine may have stood still.
    """

    def __init__(
        self,
        late_s: float = _LATE_S,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._late_s = late_s
        self._monotonic = monotonic
        self._wall = wall
        self._lock = threading.Lock()
        self._seen_s = monotonic()
        self._offset_s = wall() - self._seen_s
        self._frozen_s = 0.0
        self._thawed_s: float | None = None
        self._on_thaw: list[Callable[[float], None]] = []
        self._ticking = False
        self._stopped = threading.Event()

    def __call__(self) -> float:
        """Return the seconds. The difference of two calls is the time that the process ran."""
        with self._lock:
            return self._look() - self._frozen_s

    def on_thaw(self, tell: Callable[[float], None]) -> None:
        """Call a function after each freeze, on the clock's thread. It must return at once."""
        self._on_thaw.append(tell)

    def start(self) -> RunningClock:
        """Start ticking and return this clock."""
        with self._lock:
            self._look()
            self._ticking = True
        threading.Thread(target=self._tick, name="clock", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop ticking. Freezes are then no longer noticed."""
        self._stopped.set()

    def _tick(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self.notice()

    def notice(self) -> None:
        """Check for a freeze, and call the functions of `on_thaw` if there was one."""
        with self._lock:
            self._look()
            thawed_s, self._thawed_s = self._thawed_s, None
        if thawed_s is None:
            return
        log.info("this worker was frozen for %.1f s; reconnecting", thawed_s)
        for tell in self._on_thaw:
            tell(thawed_s)

    def _look(self) -> float:
        """Return the monotonic time, and record a gap since the last call as a freeze. The caller holds the lock."""
        now_s = self._monotonic()
        offset_s = self._wall() - now_s
        gap_s, jump_s = now_s - self._seen_s, offset_s - self._offset_s
        if self._ticking and gap_s > self._late_s:
            self._frozen_s += gap_s
        if self._ticking and max(gap_s, jump_s) > self._late_s:
            self._thawed_s = (self._thawed_s or 0.0) + gap_s + max(0.0, jump_s)
        self._seen_s, self._offset_s = now_s, offset_s
        return now_s


def process_start() -> float:
    """Return when this process began, by `time.monotonic`: the interpreter's own start belongs to the cold start."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.monotonic()
    return time.monotonic() - max(0.0, uptime_s - ticks / 100)  # USER_HZ is 100 on every Linux that Python runs on


@contextlib.asynccontextmanager
async def within(seconds: float, clock: Callable[[], float]) -> AsyncIterator[None]:
    """Raise `TimeoutError` in the body after `seconds` on this clock. Like `asyncio.timeout`, which uses the loop's clock."""
    loop = asyncio.get_running_loop()
    until_s = clock() + seconds
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        left_s = until_s - clock()
        if left_s > 0:
            timer = loop.call_later(left_s, look)
        else:
            limit.reschedule(loop.time())

    timer = loop.call_later(seconds, look)
    try:
        async with asyncio.timeout(None) as limit:
            yield
    finally:
        timer.cancel()
