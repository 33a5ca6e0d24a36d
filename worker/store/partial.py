"""One partial download: its bytes, and the journal of those that are there. Touches the disk.

A partial is `<nonce>.part` beside `<nonce>.journal`, in the folder of its content. It belongs to whoever renamed it last. A
worker that continues another's partial first renames it, and a writer whose file has lost its name stops (`PartialTaken`). So a
worker that was wrongly believed dead cannot write for long into a file that another worker may publish. And a journal, named
like its file, never describes another file's bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Final

from worker.base.files import FULL, create_file, patiently, write_at, write_atomically
from worker.store.byte_ranges import Ranges
from worker.store.reorder import ReorderBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

# A quota of MooseFS counts a file once for each of its names: a link is refused where the file itself just fits.
_NO_LINKS: Final = FULL | {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

MIB: Final = 1024 * 1024
_VERSION: Final = 1
_FLUSH_EVERY_S: Final = 1.0
_OWNED_EVERY_S: Final = 0.25
_HASH_BYTES: Final = 4 * MIB
_PATIENCE_S: Final = 120.0
_STUCK_S: Final = 8.0
_SLOWEST_BYTES_PER_S: Final = 16 * MIB  # the flush may take as long as a volume of this rate needs
_SWEEP_S: Final = 1.0
_GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})


class PartialTaken(Exception):  # noqa: N818 - not an error: another worker continues the file
    """The partial is no longer this worker's: another one continues it, has published it, or removed it."""


class PartialStuck(Exception):  # noqa: N818 - as above
    """The file system does not finish a write to, or a flush of, a partial that another worker began."""


class PartialWriteFailed(Exception):  # noqa: N818 - named for what happened, as all errors here
    """The file system's error during a write to a partial. It is no OSError, so that it is not taken for the network's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def stuck_error(for_s: float) -> PartialWriteFailed:
    """Return the error of a partial download for a file system that has not answered for that long."""
    return PartialWriteFailed(TimeoutError(errno.ETIMEDOUT, f"it did not answer for {for_s:.0f} s"))


class Partial:
    """A partial download. Any thread may write. `claim` creates one. Its patience is counted on `clock`.

    `inherited`: another worker began it and may still be writing. `rewritten`: bytes arrived again. Partials of either kind
    cannot be hashed on the fly and are re-read before publishing.
    """

    def __init__(
        self, path: Path, fd: int, size_bytes: int, done: Ranges, clock: Callable[[], float], *, inherited: bool = False
    ) -> None:
        self.path = path
        self.clock = clock
        self.inherited = inherited
        self.rewritten = False
        self.size_bytes = size_bytes
        self._fd = fd
        self._done = done
        self._changed = threading.Condition()
        self._unsaved_bytes = 0
        self._flushing_bytes = 0
        self._limit_bytes = 0
        self._broken: OSError | None = None
        self._closing = False
        self._closed = False
        self._given_up = False
        self._journalist: threading.Thread | None = None
        self._owned_until_s = 0.0
        self._users = 0
        self._pending: dict[object, float] = {}

    @classmethod
    def claim(cls, folder: Path, size_bytes: int, idle_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> Partial:
        """Continue the fullest partial in `folder` that nobody touched for `idle_s`, or begin a new one.

        Callers that hold the content's lock pass 0. Without the lock, an idle time prevents two workers from taking the same
        partial from each other for ever.
        """
        path = folder / f"{secrets.token_hex(8)}.part"
        candidates = _candidates(folder, size_bytes)
        if idle_s and candidates:
            candidates = _idle_partials(candidates, path.with_suffix(".journal"), size_bytes, idle_s)
        for journal, done in candidates:
            with contextlib.suppress(FileNotFoundError):
                return cls._take(journal, path, size_bytes, done, clock)
        return cls._begin_as(path, size_bytes, clock)

    @classmethod
    def begin(cls, folder: Path, size_bytes: int, clock: Callable[[], float] = time.monotonic) -> Partial:
        """Create an empty partial."""
        return cls._begin_as(folder / f"{secrets.token_hex(8)}.part", size_bytes, clock)

    @classmethod
    def _begin_as(cls, path: Path, size_bytes: int, clock: Callable[[], float]) -> Partial:
        """Create a partial under this name. Its journal may exist from a claim that found nothing to continue."""
        journal = path.with_suffix(".journal")
        write_atomically(journal, _encode_journal(size_bytes, Ranges()))
        try:
            partial = cls(path, create_file(path), size_bytes, Ranges(), clock)
        except OSError:
            journal.unlink(missing_ok=True)
            raise
        try:
            # Set the length first: ranges can then land in any order in a sparse file, and a quota that counts lengths fails
            # before the download begins.
            os.ftruncate(partial._fd, size_bytes)
        except OSError:
            partial.discard()
            raise
        return partial

    @classmethod
    def _take(cls, old_journal: Path, path: Path, size_bytes: int, done: Ranges, clock: Callable[[], float]) -> Partial:
        # The new journal is complete before the file gets its name: a crash in between leaves the old pair as it was.
        write_atomically(path.with_suffix(".journal"), _encode_journal(size_bytes, done))
        old_journal.with_suffix(".part").rename(path)
        old_journal.unlink(missing_ok=True)
        fd = patiently(lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if os.fstat(fd).st_nlink > 1:
            # It was published under its final name while it was claimed: this worker must not write into that file.
            os.close(fd)
            path.unlink(missing_ok=True)
            path.with_suffix(".journal").unlink(missing_ok=True)
            raise FileNotFoundError(path)
        return cls(path, fd, size_bytes, done, clock, inherited=True)

    @property
    def done_bytes(self) -> int:
        """Return how many bytes are there."""
        with self._changed:
            return self._done.total

    @property
    def is_rewritable(self) -> bool:
        """Return True; `rewritten` records whether it happened."""
        return True

    def gaps(self) -> list[tuple[int, int]]:
        """Return the missing ranges, in order."""
        with self._changed:
            return self._done.gaps(self.size_bytes)

    @property
    def stuck_s(self) -> float:
        """Return how long the oldest unfinished write or flush has waited for the file system. 0 if there is none.

        If a host dies while it writes, MooseFS keeps those parts of the file locked for two minutes.
        """
        with self._changed:
            return self.clock() - min(self._pending.values()) if self._pending else 0.0

    @contextlib.contextmanager
    def _pended(self) -> Iterator[None]:
        """Count the body as a wait for the file system, which may never answer, in `stuck_s`."""
        mine = object()
        with self._changed:
            self._pending[mine] = self.clock()
        try:
            yield
        finally:
            with self._changed:
                del self._pending[mine]
                self._changed.notify_all()

    def reach(self) -> int:
        """Return the whole size: bytes may land in any order."""
        return self.size_bytes

    def check(self, patience_s: float = _PATIENCE_S, stuck_s: float = _STUCK_S) -> None:
        """Raise `PartialStuck` or `PartialWriteFailed` if a write or a flush takes too long. On a network volume it may hang.

        `stuck_s` is for a file that another worker began, which a dead host may have left locked; `patience_s` for our own. A
        large flush, which writes wait for as well, gets the time that a slow volume needs.
        """
        waited_s = self.stuck_s
        if not waited_s:
            return
        if self.inherited and waited_s > max(stuck_s, self._flushing_bytes / _SLOWEST_BYTES_PER_S):
            raise PartialStuck
        if waited_s > patience_s:
            raise stuck_error(patience_s)

    @contextlib.contextmanager
    def _using(self) -> Iterator[int]:
        """Yield the descriptor. It stays open in the body even if `close` is called, because its number must not be reused."""
        with self._changed:
            if self._closed:
                raise PartialTaken
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._changed:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                os.close(self._fd)

    def keep_journal(self, limit_bytes: int) -> None:
        """Write the journal in the background. Writers wait while more than `limit_bytes` are not safe."""
        if self._journalist:
            return
        self._limit_bytes = limit_bytes
        self._start_journalist()

    def _start_journalist(self) -> threading.Thread:
        self._journalist = threading.Thread(target=self._journal_often, name="journal", daemon=True)
        self._journalist.start()
        return self._journalist

    def write(self, offset: int, view: memoryview) -> None:
        """Write bytes at their offset. Raises `PartialTaken`, or `PartialWriteFailed`, also for an earlier journal error."""
        with self._using() as fd, self._pended():
            try:
                self._check_ours()
                write_at(fd, view, offset)
            except OSError as exc:
                raise PartialWriteFailed(exc) from exc
        with self._changed:
            before = self._done.total
            self._done.add(offset, offset + len(view))
            self.rewritten = self.rewritten or self._done.total != before + len(view)
            self._unsaved_bytes += len(view)
            self._changed.notify_all()
            while self._journalist and self._unsaved_bytes > self._limit_bytes and not (self._broken or self._closing):
                self._changed.wait(_FLUSH_EVERY_S)
        self._raise_broken()

    def _check_ours(self) -> None:
        now_s = time.monotonic()
        if now_s < self._owned_until_s:
            return
        if not self.is_ours():
            raise PartialTaken
        self._owned_until_s = now_s + _OWNED_EVERY_S

    def is_ours(self) -> bool:
        """Return whether the file still has the unique name that this worker gave it."""
        try:
            self.path.stat()
        except OSError as exc:
            if exc.errno in _GONE:
                return False
            raise
        return True

    def _save(self, fd: int) -> None:
        """Flush the bytes, then record them in the journal: a dead host leaves no journal of bytes that it lost."""
        with self._changed:
            done, unsaved = Ranges(self._done.as_list()), self._unsaved_bytes
            self._flushing_bytes = unsaved
        with self._pended():
            os.fdatasync(fd)
            # Nobody would ever remove a journal that is written after another worker took its file.
            if not self._given_up and self.is_ours():
                write_atomically(self.path.with_suffix(".journal"), _encode_journal(self.size_bytes, done))
        with self._changed:
            self._flushing_bytes = 0
            self._unsaved_bytes -= unsaved
            self._changed.notify_all()

    def _journal_often(self) -> None:
        try:
            with self._using() as fd:
                while not self._wait_for_work():
                    self._save(fd)
                self._save(fd)
        except PartialTaken:
            return
        except OSError as exc:
            with self._changed:
                self._broken = exc
                self._changed.notify_all()

    def _raise_broken(self) -> None:
        """Raise what stopped the journal. A folder that was removed under it is not a disk error."""
        if self._broken is None:
            return
        if self._broken.errno in _GONE and not self.is_ours():
            raise PartialTaken
        raise PartialWriteFailed(self._broken)

    def _wait_for_work(self) -> bool:
        """Wait until there is enough to journal, or for a while. Return True if it is time to end."""
        until_s = time.monotonic() + _FLUSH_EVERY_S
        with self._changed:
            while not self._closing:
                left_s = until_s - time.monotonic()
                if self._unsaved_bytes and (left_s <= 0 or self._unsaved_bytes * 2 >= self._limit_bytes):
                    return False
                self._changed.wait(left_s if left_s > 0 else _FLUSH_EVERY_S)
            return True

    def follow(
        self, stop: Callable[[], bool], on_bytes: Callable[[int], None] = lambda _: None, reorder: ReorderBuffer | None = None
    ) -> str | None:
        """Return the sha256 of the whole file, computed while the writers write. None if `stop` says so before its end.

        Bytes come from `reorder` if they are there, and are then those that were given to `write`. Otherwise they come from the
        file, and are what was stored. Either way the page cache is warm afterwards.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_HASH_BYTES))
        kept = reorder or ReorderBuffer(0, 1)
        at = 0
        with self._using() as fd:
            while at < self.size_bytes:
                if stop():
                    return None
                if block := kept.take(at):
                    digest.update(block)
                    at += len(block)
                    kept.release(block)
                elif readable := self._readable(at, kept):
                    length = os.preadv(fd, [buffer[:readable]], at)
                    if length == 0:
                        raise PartialTaken  # the file was truncated: it is not the one that was journalled
                    digest.update(buffer[:length])
                    at += length
                on_bytes(at)
        return digest.hexdigest()

    def _readable(self, offset: int, kept: ReorderBuffer) -> int:
        """Return how many bytes to read back at `offset`. 0 after a short wait for more, or if `kept` has them.

        Bytes are offered to `kept` before they are written: if the file has bytes that `kept` lacks, they will not appear
        there.
        """
        with self._changed:
            until = min(offset + _HASH_BYTES, kept.next_after(offset, self.size_bytes))
            if self._done.first_gap < until and not kept.has(offset):
                self._changed.wait(_OWNED_EVERY_S)
            return until - offset if self._done.first_gap >= until and not kept.has(offset) else 0

    def settle(self, patience_s: float = _PATIENCE_S, stuck_s: float = _STUCK_S) -> None:
        """Return when everything is safe and journalled.

        Raises `PartialTaken`, the disk's errors, and what `check` raises if the disk does not answer.
        """
        # An abandoned connection can still be in a write: nothing may land after the file was judged.
        while self.stuck_s:
            self.check(patience_s, stuck_s)
            with self._changed:
                self._changed.wait(_OWNED_EVERY_S / 10)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        # The journal's thread does the last flush. It may never end, and this thread must notice that.
        journalist = self._journalist or self._start_journalist()
        while journalist.is_alive():
            self.check(patience_s, stuck_s)
            journalist.join(_OWNED_EVERY_S / 10)
        self._raise_broken()
        if self._closed:
            raise PartialTaken

    def close(self, wait_s: float = 0.5) -> None:
        """Release the file and keep it for the next worker. A disk slower than `wait_s` journals later."""
        self._stop_journalist(wait_s)
        with self._changed:
            last = not self._closed and not self._users
            self._closed = True
        if last:
            os.close(self._fd)

    def _stop_journalist(self, wait_s: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._journalist:
            self._journalist.join(wait_s)
        self._journalist = None

    def publish(self, target: Path, *, over: bool = False) -> bool:
        """Give the file its final name and forget the partial. Return False if another file has that name.

        `over` replaces that file. Raises `PartialTaken` if another worker has this partial.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if over or not self._link(target):
                self.path.replace(target)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if not self.is_ours():
                raise PartialTaken from None
            raise
        self.path.with_suffix(".journal").unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        return True

    def _link(self, target: Path) -> bool:
        """Link the file to this name too. Return False if only a rename can. Raises `FileExistsError` if the name is taken."""
        try:
            target.hardlink_to(self.path)
        except FileExistsError:
            if target.exists():
                raise
            return False  # a broken link
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            if target.exists():
                raise FileExistsError(target) from None
            return False
        return True

    def disown(self) -> None:
        """Prevent others from continuing it, but keep the file for now: see `discard_later`."""
        self._given_up = True
        self.path.with_suffix(".journal").unlink(missing_ok=True)

    def discard_later(self) -> None:
        """Remove it once its stuck writes are through. Unlinking it earlier would wait for them and lock its folder."""
        while self.stuck_s:
            time.sleep(_FLUSH_EVERY_S)
        with contextlib.suppress(OSError):
            self.discard()

    def discard(self) -> None:
        """Remove it. It is unlinked, never truncated: another worker may just have published this inode."""
        self._given_up = True
        self.close()
        if self.is_ours():
            self.path.unlink(missing_ok=True)
        self.path.with_suffix(".journal").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # only if nobody else has a file in it


def sweep_partials(folder: Path, but: Collection[Path] = (), wait_s: float = _SWEEP_S) -> None:
    """Remove a published content's partials, of all workers. A writer among them notices and stops.

    Return after `wait_s` at the latest, and go on in the background. The kernel keeps an unlink waiting while a write to that
    file hangs, which a dead host's locks can cause for two minutes. No job may wait for that: the model is there.
    """
    work = threading.Thread(target=_sweep, args=(folder, but), name="sweep", daemon=True)
    work.start()
    work.join(wait_s)


def _sweep(folder: Path, but: Collection[Path]) -> None:
    with contextlib.suppress(OSError):
        for entry in set(folder.iterdir()).difference(but):
            entry.unlink(missing_ok=True)
        folder.rmdir()


def _encode_journal(size_bytes: int, done: Ranges) -> bytes:
    return json.dumps({"v": _VERSION, "size": size_bytes, "ranges": done.as_list()}).encode()


def _idle_partials(found: list[tuple[Path, Ranges]], clock: Path, size_bytes: int, idle_s: float) -> list[tuple[Path, Ranges]]:
    """Return the partials not journalled for `idle_s`, by the file server's clock alone: `clock` is a file made for that."""
    write_atomically(clock, _encode_journal(size_bytes, Ranges()))
    before_s = clock.stat().st_mtime - idle_s
    idle = []
    for journal, done in found:
        with contextlib.suppress(FileNotFoundError):
            if journal.stat().st_mtime <= before_s:
                idle.append((journal, done))
    return idle


def _candidates(folder: Path, size_bytes: int) -> list[tuple[Path, Ranges]]:
    """Return partials of this size that have bytes, the fullest first."""
    found = []
    for journal in folder.glob("*.journal"):
        done = _read_journal(journal, size_bytes)
        if done is not None and done.total:
            found.append((journal, done))
    return sorted(found, key=lambda pair: (-pair[1].total, pair[0].name))


def _read_journal(journal: Path, size_bytes: int) -> Ranges | None:
    try:
        text = json.loads(journal.read_bytes())
        if text["v"] != _VERSION or text["size"] != size_bytes:
            return None
        done = Ranges((int(start), int(end)) for start, end in text["ranges"])
        if journal.with_suffix(".part").stat().st_size != size_bytes:
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return done if done.total + sum(end - start for start, end in done.gaps(size_bytes)) == size_bytes else None
