"""One look-up of each address for all workers: the worker that asks tells the others. Touches the disk.

The answer only says whose download to wait for, and nothing depends on it. A worker that downloads has asked the source itself.
So an answer that is old, wrong or about another version costs one look-up. A worker that gets no answer asks for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from worker.base.files import Peek, create_file, write_atomically
from worker.base.progress import ModelProgress
from worker.errors import EnsureCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from worker.base.progress import CancelToken, Listener
    from worker.fetch.hub import RemoteFile
    from worker.store.layout import Layout
    from worker.store.locks import LockTiming

log = logging.getLogger(__name__)

_FRESH_S: Final = 60.0
_KEY: Final = re.compile(r"(url-)?[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SharedAnswer:
    """A look-up's answer for other workers: the content's key, its size, and who asked. No address, no token."""

    key: str
    size_bytes: int
    by: str


class LookupTurn:
    """One worker's part in a shared look-up: `answer` is another worker's, or None if this worker has to ask."""

    def __init__(self, record: Path, mark: Path, worker: str) -> None:
        self.answer: SharedAnswer | None = None
        self._record = record
        self._mark = mark
        self._worker = worker
        self._asks = False
        self._told = False

    def take(self) -> os.stat_result | None:
        """Mark that this worker asks and return the mark's stat. None if another worker was quicker. Raises `OSError`."""
        try:
            fd = create_file(self._mark)
        except FileExistsError:
            return None
        self._asks = True
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def tell(self, remote: RemoteFile | None) -> None:
        """Leave the answer for the others, once. Ignore a volume that cannot be written to."""
        if remote is None or self._told:
            return
        self._told = True
        answer = json.dumps(asdict(SharedAnswer(remote.key, remote.size_bytes, self._worker))).encode()
        with contextlib.suppress(OSError):
            write_atomically(self._record, answer, durable=False)
        self.end()

    def end(self) -> None:
        """Let the next worker ask, unless there is an answer by now."""
        if self._asks:
            self._asks = False
            _remove_mark(self._mark)


class SharedLookups:
    """The shared look-ups of one volume, as one worker takes part in them."""

    def __init__(self, layout: Layout, worker: str, timing: LockTiming) -> None:
        self._layout = layout
        self._worker = worker
        self._timing = timing

    @contextlib.contextmanager
    def turn(
        self, address: str, fits: Callable[[SharedAnswer], bool], cancel: CancelToken, on_wait: Listener
    ) -> Iterator[LookupTurn]:
        """Wait until another worker left a fresh answer that `fits`, or this worker has to ask.

        `address` is the same for all whose look-ups have one answer. It never waits longer than `LockTiming.answer_s` allows.
        Raises `EnsureCancelled`.
        """
        digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        record, mark = self._layout.lookup(digest), self._layout.lookup_mark(digest)
        turn = LookupTurn(record, mark, self._worker)
        try:
            with Peek(record) as record_peek, Peek(mark) as mark_peek, contextlib.suppress(OSError):
                turn.answer = _AnswerWait(turn, record_peek, mark_peek, self._timing).run(mark, fits, cancel, on_wait)
            yield turn
        finally:
            turn.end()


class _AnswerWait:
    """One wait for another worker's answer to a look-up. A look costs two or three operations."""

    def __init__(self, turn: LookupTurn, record: Peek, mark: Peek, timing: LockTiming) -> None:
        self._turn = turn
        self._record = record
        self._mark = mark
        self._look_s = timing.look_s
        # If all workers lost patience together, all would ask.
        haste = random.uniform(1.0, 2.0)  # noqa: S311 - no secret
        self._quiet_s = timing.quiet_s * haste
        self._until_s = time.monotonic() + timing.answer_s * haste
        self._seen: tuple[int, int] | None = None
        self._seen_s = 0.0

    def run(
        self, mark: Path, fits: Callable[[SharedAnswer], bool], cancel: CancelToken, on_wait: Listener
    ) -> SharedAnswer | None:
        while not cancel.is_set():
            others = self._mark.stat()
            there = others or self._turn.take()
            if there:
                answer = self._fresh(there)
                if answer and fits(answer):
                    return answer
                if not others:
                    return None
            if others and self._is_quiet(others):
                # It was killed, or its source is slow: then one more asks, every few seconds.
                _remove_mark(mark)
                continue
            if time.monotonic() >= self._until_s:
                return None
            on_wait(ModelProgress("waiting"))
            cancel.wait(self._look_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        raise EnsureCancelled(mark.stem)

    def _fresh(self, mark: os.stat_result) -> SharedAnswer | None:
        """Return the answer if it was written about when the mark was made, by the volume's clock, not by this host's."""
        found = self._record.stat()
        if found is None or abs(found.st_mtime - mark.st_mtime) > _FRESH_S:
            return None
        return _decoded_answer(self._record.read())

    def _is_quiet(self, mark: os.stat_result) -> bool:
        stamp, now_s = (mark.st_ino, mark.st_mtime_ns), time.monotonic()
        if stamp != self._seen:
            self._seen, self._seen_s = stamp, now_s
        return now_s - self._seen_s >= self._quiet_s


def _decoded_answer(data: bytes) -> SharedAnswer | None:
    try:
        values: Any = json.loads(data)
        answer = SharedAnswer(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    sound = type(answer.key) is str and type(answer.size_bytes) is int and type(answer.by) is str
    return answer if sound and _KEY.fullmatch(answer.key) else None


def _remove_mark(mark: Path) -> None:
    """Remove a look-up's mark if possible. Other workers replace one that stays."""
    with contextlib.suppress(OSError):
        mark.unlink(missing_ok=True)
