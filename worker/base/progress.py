"""Progress and cancellation: the values that every part of a download shares. Pure but for the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from worker.base.text import part_text, size_text

Phase = Literal["waiting", "downloading", "checking"]

_SMOOTHING_S = 3.0
_TICK_S = 0.2


class CancelToken(Protocol):
    """What every long call with progress watches, to be cancelled. `threading.Event` is one."""

    def is_set(self) -> bool:
        """Return whether the caller no longer wants the result."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is set or the time is over. Return whether it is set."""
        ...


@dataclass(frozen=True, slots=True)
class ModelProgress:
    """The progress of one model's download. `by` names the other worker whose download this one waits for."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float = 0.0
    by: str | None = None

    def __str__(self) -> str:
        """Return text such as `worker abc: 3.1 of 11.9 GB, 240 MB/s`."""
        amount = part_text(self.done_bytes, self.total_bytes) if self.total_bytes else "waiting"
        rate = f", {size_text(int(self.bytes_per_s))}/s" if self.bytes_per_s >= 1 else ""
        check = ", checking" if self.phase == "checking" else ""
        return f"{f'worker {self.by}: ' if self.by else ''}{amount}{rate}{check}"


Listener: TypeAlias = Callable[[ModelProgress], None]


class Meter:
    """The smoothed byte rate of a download's progress. Each reading passes the clock's time in."""

    def __init__(self, now_s: float, done_bytes: int = 0) -> None:
        self._at_s = now_s
        self._done_bytes = done_bytes
        self._rate: float | None = None

    def rate(self, now_s: float, done_bytes: int) -> float:
        """Return bytes a second, averaged over the last few seconds."""
        passed_s = now_s - self._at_s
        if passed_s <= 0:
            return self._rate or 0.0
        current = max(0, done_bytes - self._done_bytes) / passed_s
        weight = min(1.0, passed_s / _SMOOTHING_S)
        self._rate = current if self._rate is None else self._rate + weight * (current - self._rate)
        self._at_s, self._done_bytes = now_s, done_bytes
        return self._rate


def metered(phase: Phase, total_bytes: int, report: Listener, done_bytes: int = 0) -> Callable[[int], None]:
    """Return a function that turns byte counts into progress with a rate, a few times a second."""
    rate = Meter(time.monotonic(), done_bytes)
    next_s = 0.0

    def on_bytes(done_bytes: int) -> None:
        nonlocal next_s
        now_s = time.monotonic()
        if now_s >= next_s:
            next_s = now_s + _TICK_S
            report(ModelProgress(phase, done_bytes, total_bytes, rate.rate(now_s, done_bytes)))

    return on_bytes
