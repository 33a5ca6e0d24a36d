"""Read weights into the page cache before ComfyUI asks for them. Touches the disk, in its own threads.

ComfyUI maps a weights file and copies it tensor by tensor. On a network volume each piece is a round trip. A file in memory
costs only a copy. Plain reads work everywhere: on MooseFS posix_fadvise(WILLNEED) and readahead(2) fetch nothing, on ext4 one
window of readahead (0.01 of 768 MB after 8 s). Four threads with buffers of 1 MiB saturate a network volume (205 of 212 MB/s).
They read a disk faster than with buffers of 8 MiB (1.9 against 0.5 GB/s), which do not fit into the processor's cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from worker.base.text import size_text
from worker.warmup.page_cache import missing_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from worker.warmup.page_cache import Range

log = logging.getLogger(__name__)

_READERS: Final = 4
# One thread's share of a file: long enough to be sequential for the file system, short enough to stop soon.
_PIECE_BYTES: Final = 8 << 20
_BUFFER_BYTES: Final = 1 << 20
_STOP_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class ReadAheadResult:
    """The result of reading one list of files ahead: `what` without, `str()` with the time that it took."""

    began_s: float = 0.0
    """On the clock of `time.monotonic`."""
    read_bytes: int = 0
    cached_bytes: int = 0
    """Bytes that were already in memory."""
    left_bytes: int = 0
    """Bytes that were not read, because the memory limit was reached."""
    seconds: float = 0.0
    running: bool = False

    @property
    def what(self) -> str:
        """Return how much was read and how much was not."""
        parts = [size_text(self.read_bytes)] if self.read_bytes or not self.cached_bytes else []
        parts += [f"{size_text(self.cached_bytes)} were in memory"] if self.cached_bytes else []
        parts += [f"no memory for {size_text(self.left_bytes)}"] if self.left_bytes else []
        return ", ".join([*parts, "going on"] if self.running else parts)

    def __str__(self) -> str:
        return f"{self.what} in {self.seconds:.1f} s"


@dataclass(eq=False, slots=True)
class _ReadAhead:
    """One list of files that the reader is reading ahead."""

    files: deque[Path]
    warmed: ReadAheadResult
    budget_bytes: int = 0
    current: Path | None = None

    def so_far(self, *, running: bool) -> ReadAheadResult:
        """Return the result so far."""
        return replace(self.warmed, seconds=time.monotonic() - self.warmed.began_s, running=running)


class WeightsReader:
    """Reads weights into the page cache in the background. Safe to use from any thread; no call waits for the disk.

    `budget_bytes` is called in a thread when a list of files begins, and returns how much may be read. An error of a file is
    logged and ends nothing: such a file is only slower to load.
    """

    def __init__(self, budget_bytes: Callable[[], int], readers: int = _READERS) -> None:
        self._budget_bytes = budget_bytes
        self._readers = readers
        self._changed = threading.Condition()
        self._plan: _ReadAhead | None = None
        self._holders = 0
        self._thread: threading.Thread | None = None
        self._last = ReadAheadResult()

    def warm(self, files: Iterable[Path]) -> None:
        """Read these files, in this order, instead of the current ones, with a new budget.

        Parts that are already in memory are not read again.
        """
        wanted = deque(dict.fromkeys(files))
        with self._changed:
            self._plan = _ReadAhead(wanted, ReadAheadResult(time.monotonic())) if wanted else None
            self._changed.notify_all()
            if self._plan and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="warm", daemon=True)
                self._thread.start()

    @contextlib.contextmanager
    def standing_back(self) -> Iterator[None]:
        """Read nothing while the body runs, from the next piece on: a job needs the disk."""
        with self._changed:
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._changed.notify_all()

    def warmed(self) -> ReadAheadResult:
        """Return the state of the current list, or the result of the last one."""
        with self._changed:
            return self._plan.so_far(running=True) if self._plan else self._last

    def wait(self, timeout_s: float) -> ReadAheadResult:
        """Return when nothing is left to read, or after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None, timeout_s)
        return self.warmed()

    def stop(self) -> None:
        """Stop reading. Return soon, even if a read hangs: its thread does not keep the process alive."""
        self.warm(())
        self.wait(_STOP_S)

    # --- in the thread `warm`

    def _work(self) -> None:
        while plan := self._next_plan():
            try:
                self._read(plan)
            except Exception:
                log.exception("reading ahead stopped by a defect of the worker")
                plan.files.clear()
            with self._changed:
                if self._plan is plan and not plan.files:
                    self._plan = None
                    self._last = plan.so_far(running=False)
                    if self._last.read_bytes or self._last.left_bytes:
                        log.info("weights read ahead: %s", self._last)

    def _next_plan(self) -> _ReadAhead | None:
        with self._changed:
            if self._plan is None:
                self._thread = None
                self._changed.notify_all()
            return self._plan

    def _read(self, plan: _ReadAhead) -> None:
        plan.budget_bytes = self._budget_bytes()
        while path := self._next_file(plan):
            try:
                self._read_file(plan, path)
            except OSError as exc:
                log.warning("%s cannot be read ahead: %s", path, exc)
            with self._changed:
                plan.current = None

    def _next_file(self, plan: _ReadAhead) -> Path | None:
        with self._changed:
            if self._plan is plan and plan.files:
                plan.current = plan.files.popleft()
            return plan.current

    def _read_file(self, plan: _ReadAhead, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):  # some loaders take a folder
                return
            missing = missing_ranges(fd, found.st_size)
            missing_bytes = sum(end - begin for begin, end in missing)
            pieces = _first_pieces(missing, plan.budget_bytes)
            planned_bytes = sum(end - begin for begin, end in pieces)
            cached_bytes = found.st_size - missing_bytes
            # What is already in memory counts as free there. Later files of the list must not evict it.
            plan.budget_bytes -= planned_bytes + cached_bytes
            self._count(plan, cached_bytes=cached_bytes, left_bytes=missing_bytes - planned_bytes)
            self._read_pieces(plan, fd, pieces)
        finally:
            os.close(fd)

    def _read_pieces(self, plan: _ReadAhead, fd: int, pieces: Sequence[Range]) -> None:
        """Return when all pieces are read or no longer wanted."""
        rest = deque(pieces)
        errors: list[OSError] = []

        def run() -> None:
            buffer = memoryview(bytearray(_BUFFER_BYTES))
            while self._may_go_on(plan) and not errors:
                try:
                    begin, end = rest.popleft()
                    read_bytes = _read_piece(fd, begin, end, buffer)
                except IndexError:
                    return
                except OSError as exc:
                    errors.append(exc)
                    return
                self._count(plan, read_bytes=read_bytes)

        threads = [
            threading.Thread(target=run, name=f"warm-{number}", daemon=True)
            for number in range(min(self._readers, len(pieces)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _may_go_on(self, plan: _ReadAhead) -> bool:
        """Wait while a job has the disk, which the job's own deadline ends. Return False if this plan was replaced."""
        with self._changed:
            self._changed.wait_for(lambda: not self._holders or self._plan is not plan)
            return self._plan is plan

    def _count(self, plan: _ReadAhead, **more: int) -> None:
        with self._changed:
            known = plan.warmed
            plan.warmed = replace(known, **{name: getattr(known, name) + bytes_ for name, bytes_ in more.items()})


def _first_pieces(ranges: Iterable[Range], budget_bytes: int) -> list[Range]:
    """Return the ranges to read ahead in pieces, up to the budget."""
    pieces: list[Range] = []
    for begin, end in ranges:
        for offset in range(begin, end, _PIECE_BYTES):
            after = min(offset + _PIECE_BYTES, end)
            budget_bytes -= after - offset
            if budget_bytes < 0:
                return pieces
            pieces.append((offset, after))
    return pieces


def _read_piece(fd: int, begin: int, end: int, buffer: memoryview) -> int:
    done = 0
    while done < end - begin:
        length = os.preadv(fd, [buffer[: end - begin - done]], begin + done)
        if length == 0:  # the file became shorter
            break
        done += length
    return done
