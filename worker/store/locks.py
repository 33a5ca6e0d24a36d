"""One downloader for each content. The lock saves bandwidth; correctness does not depend on it. Touches the disk.

filelock's `SoftReadWriteLock` is the one lock that survives what happens to workers. Its holders write heartbeats, and waiters
judge them by their own clocks, so a killed worker and a dead host are both replaced after `stale_s`. flock stays held for a day
when a host dies, and does not lock at all on mounts that keep it local. See docs/decisions/004.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Literal

from filelock import SoftFileLockProtocolError, SoftReadWriteLock, Timeout

from worker.base.files import FULL, READ_ONLY, Peek, write_atomically
from worker.base.progress import ModelProgress
from worker.errors import EnsureCancelled
from worker.fetch.blocking_call import abandonable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from filelock import LeaseCompromise

    from worker.base.progress import CancelToken, Listener
    from worker.store.layout import Layout

log = logging.getLogger(__name__)

_CANNOT_WRITE: Final = READ_ONLY | FULL


@dataclass(frozen=True, slots=True)
class LockTiming:
    """How the lock waits. A dead holder is replaced after `quiet_s + stale_s` and two polls: within 45 s with the defaults.

    A waiter looks for the published file each `look_s` and reads the holder's report every second time. It takes part in the
    lock itself, which costs a volume a hundred times as much, only if no new report came for `quiet_s`. `attempt_s` limits how
    long a cancelled waiter stays.

    `patience_s` is how long a holder's phase and byte count may stay the same before a waiter continues without the lock, each
    waiter after one to two times that. A holder that still reports only shows that it lives. `lone_patience_s` is the same for
    file systems without such locks.

    `answer_s` is how long a worker waits for another one's look-up before it asks the source itself, each after one to two
    times that. It may ask sooner if the same worker has been asking for `quiet_s`.
    """

    heartbeat_s: float = 5.0
    stale_s: float = 27.0
    quiet_s: float = 3.0
    look_s: float = 1.0
    poll_s: float = 0.5
    attempt_s: float = 0.75
    patience_s: float = 120.0
    lone_patience_s: float = 6.0
    report_every_s: float = 1.0
    trouble_s: float = 3.0
    answer_s: float = 10.0


@dataclass(frozen=True, slots=True)
class LockHolder:
    """What the holder of a download's lock reports once a second to those who wait for it.

    `beat` counts its reports: it lives, which does not mean progress. `left`: it has released the lock.
    """

    by: str
    phase: Literal["downloading", "checking"]
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    beat: int
    name: str = ""  # the model's `folder/name`; the key means nothing to a person
    left: bool = False

    def as_progress(self) -> ModelProgress:
        """Return the report as the waiting worker's progress."""
        return ModelProgress("waiting", self.done_bytes, self.total_bytes, self.bytes_per_s, self.by)


class LockResult:
    """The result of waiting for a lock: the content was published meanwhile, or this worker shall download it."""

    def __init__(
        self, path: Path, worker: str, name: str, timing: LockTiming, state: Literal["held", "unlocked", "published"]
    ) -> None:
        self.state = state
        self._path = path
        self._worker = worker
        self._name = name
        self._timing = timing
        self._beat = 0
        self._next_s = 0.0
        self._last: ModelProgress | None = None

    def report(self, progress: ModelProgress) -> None:
        """Show the progress to the waiting workers, at most once a second. It never raises."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._timing.report_every_s
        self._last = progress
        self._write(progress, left=False)

    def leave(self) -> None:
        """Tell the waiting workers that the lock is free and nothing was published, if they were told that it is held."""
        if self._last:
            self._write(self._last, left=True)

    def _write(self, progress: ModelProgress, *, left: bool) -> None:
        self._beat += 1
        phase: Literal["downloading", "checking"] = "checking" if progress.phase == "checking" else "downloading"
        done, total, rate = progress.done_bytes, progress.total_bytes, progress.bytes_per_s
        holder = LockHolder(self._worker, phase, done, total, rate, self._beat, self._name, left)
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps(asdict(holder)).encode(), durable=False)


class Locks:
    """The locks of one volume, as one worker takes them."""

    def __init__(
        self, layout: Layout, worker: str, timing: LockTiming | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._layout = layout
        self._worker = worker
        self._timing = timing or LockTiming()
        self._clock = clock
        self._tried: dict[str, SoftReadWriteLock] = {}

    def holder(self, key: str) -> LockHolder | None:
        """Return who reports a download of this content, possibly a worker that has died since."""
        with Peek(self._layout.lock_progress(key)) as peek:
            return _read_holder(peek)

    @contextlib.contextmanager
    def hold(
        self,
        key: str,
        *,
        published: Callable[[], bool],
        cancel: CancelToken,
        on_wait: Listener = lambda _: None,
        name: str = "",
    ) -> Iterator[LockResult]:
        """Wait until the content is published or this worker may download it. `LockResult.state` says which.

        `name` is the content's name for people: it appears in this worker's log, and in those of workers that wait for this
        one.

        A waiter never waits longer than a holder without progress is allowed. It then continues without the lock, which costs
        bandwidth and nothing else. Raises `EnsureCancelled` within a tenth of a second and a disk access.
        """
        record, lock = self._layout.lock_progress(key), self._make(key)
        with Peek(record) as peek:
            state = _LockWait(peek, name or key, self._timing, on_wait, self._clock).wait(lock, published, cancel)
        hold = LockResult(record, self._worker, name, self._timing, state)
        left = True
        try:
            yield hold
            left = False
        finally:
            if state == "held":
                _release(lock)
                if left:
                    hold.leave()

    @contextlib.contextmanager
    def attempt(self, key: str) -> Iterator[bool]:
        """Take the lock if nobody has it, without waiting; whether the content is this worker's to touch.

        It is where the volume has no locks, or is too full for one. A dead holder is succeeded by a later attempt of the same
        object: how long it was silent is remembered.
        """
        lock = self._tried.pop(key, None) or self._make(key)
        try:
            lock.acquire_write(timeout=self._timing.attempt_s)
        except Timeout:
            self._tried[key] = lock
            yield False
            return
        except (OSError, RuntimeError) as exc:
            log.info("no lock of %s can be had (%s): trying without it", key, exc)
            yield True
            return
        try:
            yield True
        finally:
            _release(lock)

    def _make(self, key: str) -> SoftReadWriteLock:
        # One instance for all attempts, because it remembers how long a holder was silent.
        return SoftReadWriteLock(
            self._layout.lock(key),
            is_singleton=False,
            heartbeat_interval=self._timing.heartbeat_s,
            stale_threshold=self._timing.stale_s,
            poll_interval=self._timing.poll_s,
            on_compromise=_lost,
        )


def _read_holder(record: Peek) -> LockHolder | None:
    try:
        return LockHolder(**json.loads(record.read()))
    except (OSError, ValueError, TypeError):
        return None


class _LockWait:
    """One wait for one lock. It retries and watches everything that could end the wait. Its patience is counted on `clock`."""

    def __init__(self, record: Peek, name: str, timing: LockTiming, on_wait: Listener, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._record = record
        self._name = name
        self._timing = timing
        self._on_wait = on_wait
        # If all workers lost patience together, all would download. With a random delay the first one shows progress to the
        # others.
        self._haste = random.uniform(1.0, 2.0)  # noqa: S311 - no secret
        self._seen: LockHolder | None = None
        self._furthest: dict[str, tuple[str, int]] = {}
        self._moved_s = clock()
        self._heard_s = -math.inf
        self._trouble_since_s: float | None = None
        self._works = True
        self._patience_s = timing.patience_s

    def wait(
        self, lock: SoftReadWriteLock, published: Callable[[], bool], cancel: CancelToken
    ) -> Literal["held", "unlocked", "published"]:
        announced: str | None = None
        while True:
            if cancel.is_set():
                raise EnsureCancelled(self._name)
            if published():
                return "published"
            tries = self._works and self._clock() - self._heard_s >= self._timing.quiet_s
            if tries and self._acquired(lock, cancel):
                return "held"
            if self._out_of_patience():
                why = "its holder shows no progress" if self._works else "there is none"
                log.warning("continuing without the lock of %s: %s; this costs only bandwidth", self._name, why)
                return "unlocked"
            if self._seen and self._seen.by != announced:
                log.info(
                    "waiting for %s, which another worker downloads (%s)",
                    self._seen.name or self._name,
                    self._seen.as_progress(),
                )
                announced = self._seen.by
            cancel.wait(self._timing.look_s * (1 if tries else 2))

    def _acquired(self, lock: SoftReadWriteLock, cancel: CancelToken) -> bool:
        def attempt() -> SoftReadWriteLock:
            lock.acquire_write(timeout=self._timing.attempt_s)
            return lock

        try:
            # A volume keeps readers of what a dead host was writing waiting, its heartbeat included, for up to two minutes.
            abandonable(attempt, self._name, cancel, undo=_release)
        except Timeout:
            self._trouble_since_s = None
            return False
        # filelock raises RuntimeError if its folder belongs to another account or was replaced by a link.
        except (OSError, RuntimeError) as exc:
            self._judge(exc)
            return False
        return True

    def _judge(self, exc: OSError | RuntimeError) -> None:
        now_s = self._clock()
        self._trouble_since_s = self._trouble_since_s or now_s
        final = isinstance(exc, (SoftFileLockProtocolError, RuntimeError)) or exc.errno in _CANNOT_WRITE
        if final or now_s - self._trouble_since_s > self._timing.trouble_s:
            number = exc.errno if isinstance(exc, OSError) else None
            why = "no lock can be written" if number in FULL else "this file system has no locks"
            log.warning("%s (%s): two workers may download the same model", why, exc)
            self._works = False
            # If nothing can be written there is nobody to wait for, and the download gives a better error.
            self._patience_s = 0.0 if number in _CANNOT_WRITE else self._timing.lone_patience_s

    def _out_of_patience(self) -> bool:
        now_s = self._clock()
        before, self._seen = self._seen, _read_holder(self._record)
        holder = self._seen
        if holder and self._moves(holder):
            self._moved_s = now_s
        if holder and before and (holder.by, holder.beat) != (before.by, before.beat):
            self._heard_s = -math.inf if holder.left else now_s
        self._on_wait(holder.as_progress() if holder else ModelProgress("waiting"))
        return now_s - self._moved_s >= self._patience_s * self._haste

    def _moves(self, holder: LockHolder) -> bool:
        """Return whether this reporter is in a new phase, or further in it than before. Alternating reports do not count."""
        phase, done_bytes = self._furthest.get(holder.by, ("", -1))
        if holder.phase == phase and holder.done_bytes <= done_bytes:
            return False
        self._furthest[holder.by] = holder.phase, holder.done_bytes
        return True


def _release(lock: SoftReadWriteLock) -> None:
    try:
        lock.release(force=True)  # from any thread
    except (OSError, RuntimeError) as exc:
        log.warning("could not release a lock (%s); it will expire", exc)


def _lost(loss: LeaseCompromise) -> None:
    log.warning("lost the lock %s (%s): another worker may download the same bytes", loss.lock_file, loss.reason)
