"""Make room on a volume: remove models in order until a download fits. Touches the disk.

A removal holds the content's lock and makes a mark on the volume. Then it checks the uses again, moves the file aside, and
removes it. A worker records its use, then looks for marks, then for the file. So one of the two sees the other, and no file
vanishes under a job, not even for a moment. A removal that was frozen in between checks once more, and puts the file back. No
step needs free space: files are moved into a folder that exists. The seal is moved last and becomes the tombstone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from worker.base.files import free_bytes
from worker.base.text import duration_text, size_text
from worker.errors import EnsureCancelled, WorkerError
from worker.model_spec import ModelSpec
from worker.store.download import DownloadHooks
from worker.store.eviction import (
    EvictionJudge,
    EvictionLimits,
    EvictionPins,
    ModelsTree,
    chosen_for_removal,
    survey_for_eviction,
    survey_stamp,
)
from worker.store.leases import LeasedTitles, LeaseTiming, Usage, merge_old, removal_marks, volume_now_s
from worker.store.locks import Locks
from worker.store.seals import read_seal, sealed_titles
from worker.store.tombstones import bury

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Hub
    from worker.store.eviction import ContentName, SealedContent, Survey
    from worker.store.layout import Layout
    from worker.store.leases import Leases
    from worker.store.locks import LockTiming

log = logging.getLogger(__name__)

_ORPHAN_S: Final = 60.0
_PROMISE_S: Final = 600.0
_ASK_S: Final = 10.0
_ASK_AGAIN_S: Final = 3_600.0
_KEEP_EVERY_S: Final = 600.0
_TICK_S: Final = 0.2
_WAIT_S: Final = 0.5
_ASIDE: Final = re.compile(r"(?P<moved_s>\d+)-[0-9a-f]+-(?P<said>\d+-\d+-\d+)-(?P<digest>[0-9a-f]+)")
ROOM: Final = "room"
"""The lock with which workers make room one after the other. Without it they remove too much, nothing worse."""

Ask = Callable[[ModelSpec, "CancelToken"], None]
"""Raises a `WorkerError` if a model could not be downloaded again."""


def _exists_always(_: ModelSpec, __: CancelToken) -> None:
    """Assume that every source still exists, so that any model may be removed to make room."""


class Room:
    """Makes room on one volume, for one worker. Safe to use from many threads. All workers together make one pass at a time.

    `pins` reads what people name, again for each pass. `patience_s` is how long a pass waits, on `clock`, for models that stay
    only because of their use. `settle_s` passes after a mark is made, and again before it goes: a client of MooseFS answers
    from its cache for up to 1 s. In that time this worker may still see an old lease, and a job a removed file. `on_notice`
    hears how many seconds the first pass on a volume waits until all workers write leases. Without it that pass removes
    nothing.
    """

    def __init__(
        self,
        layout: Layout,
        worker: str,
        limits: EvictionLimits,
        pins: Callable[[], EvictionPins],
        *,
        leases: Leases | None = None,
        ask: Ask = _exists_always,
        lock_timing: LockTiming | None = None,
        patience_s: float = 0.0,
        settle_s: float = 1.5,
        on_notice: Callable[[float], None] | None = None,
        hooks: DownloadHooks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.layout = layout
        self._worker = worker
        self._pins = pins
        self._leases = leases
        self._timing = leases.timing if leases else LeaseTiming()
        self._ask = ask
        self._locks = Locks(layout, worker, lock_timing, clock)
        self._patience_s = patience_s
        self._clock = clock
        self._settle_s = settle_s
        self._on_notice = on_notice
        self._at = (hooks or DownloadHooks()).at
        self._asked: dict[ModelSpec, tuple[float, str | None]] = {}
        self._promised: list[tuple[float, int]] = []
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        if leases:
            leases.make_room = lambda: self.make(1, self._stopped) > 0

    def begin(self) -> None:
        """Announce on the volume that models may be removed from now on, so that every worker records what it uses.

        Also make the folders that a removal needs: a full disk may have no room for one.
        """
        try:
            for folder in (self.layout.leases, self.layout.removing, self.layout.tombstones):
                folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.layout.leases_began, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except OSError as exc:
            log.warning("no model can be removed yet, because %s cannot be written (%s)", self.layout.state, exc.strerror)

    def keep(self) -> None:
        """Keep to the limits in the background, in its own thread, until `stop`."""
        threading.Thread(target=self._keep, name="room", daemon=True).start()

    def _keep(self) -> None:
        self.begin()
        while not self._stopped.wait(_KEEP_EVERY_S * (0.5 + secrets.randbelow(1000) / 1000)):
            with contextlib.suppress(EnsureCancelled):
                self.fit(0, self._stopped)

    def stop(self) -> None:
        """Begin no more removals."""
        self._stopped.set()

    def fit(self, more_bytes: int, cancel: CancelToken) -> int:
        """Keep to the limits, with that many bytes of a running download still to be written, as far as possible."""
        return self._pass(lambda found, _: self._excess(found, more_bytes), cancel)

    def _excess(self, found: Survey, more_bytes: int) -> int:
        free = None if found.free_bytes is None else found.free_bytes + self._promised_bytes()
        # `used_bytes` already includes the length of a running download.
        over = max(
            found.excess(EvictionLimits(keep_bytes=self.limits.keep_bytes)),
            replace(found, free_bytes=free).excess(EvictionLimits(free_bytes=self.limits.free_bytes), more_bytes),
        )
        short = 0 if free is None else more_bytes - free
        possible = sum(content.size_bytes for content in found.contents if content.kept is None or content.in_use)
        return 0 if short > possible else max(over, short)  # if it cannot fit anyway, nothing is removed

    def make(self, needed_bytes: int, cancel: CancelToken) -> int:
        """Remove models for that many bytes after a refused write, whatever the file system reports. Return the freed bytes."""
        return self._pass(lambda _, freed: needed_bytes - freed, cancel)

    def _pass(self, needed: Callable[[Survey, int], int], cancel: CancelToken) -> int:
        """Remove until `needed`, computed from the volume and the freed bytes, is zero. Return the freed bytes."""
        while not self._turn.acquire(timeout=_TICK_S):
            if cancel.is_set():
                raise EnsureCancelled("room on the volume")
        try:
            self.begin()
            if not self._is_announced(cancel):
                return 0
            with self._locks.hold(ROOM, published=lambda: False, cancel=cancel, name="room on the volume"):
                self._tidy()
                merge_old(self.layout, self._timing)
                return self._free(needed, cancel)
        finally:
            self._turn.release()

    def _is_announced(self, cancel: CancelToken) -> bool:
        """Return whether every worker has had the time to learn that it must write down what it uses."""
        try:
            began_s = self.layout.leases_began.stat().st_mtime
        except OSError:
            return False
        left_s = began_s + self._timing.notice_s - volume_now_s(self.layout)
        if left_s > 0 and self._on_notice:
            self._on_notice(left_s)
            if cancel.wait(left_s):
                raise EnsureCancelled("room on the volume")
        elif left_s > 0:
            log.info("no model is removed yet: other workers have %.0f s to say what they use", left_s)
            return False
        return True

    def _free(self, needed: Callable[[Survey, int], int], cancel: CancelToken) -> int:
        until_s = self._clock() + self._patience_s
        refused: set[str] = set()
        freed = 0
        while True:
            pins = self._pins()
            found = survey_for_eviction(self.layout, pins, self._timing, self._held(), fill=True)
            left = needed(found, freed)
            if left <= 0:
                return freed
            removable = [content for content in found.removable if content.title not in refused]
            if removable:
                freed += self._remove(list(self._to_be_had(chosen_for_removal(removable, left), refused, cancel)), refused)
                continue
            if pins.trouble:
                log.warning("no model is removed: %s", pins.trouble)
            waits = any(content.in_use for content in found.contents)
            if not waits or self._clock() >= until_s:
                log.warning("%s more are needed on the volume, and nothing else on it may be removed", size_text(left))
                return freed
            if cancel.wait(_WAIT_S):
                raise EnsureCancelled("room on the volume")

    def _held(self) -> Collection[str]:
        return self._leases.held() if self._leases else ()

    # --- whether it could be had again

    def _to_be_had(self, contents: Iterable[SealedContent], refused: set[str], cancel: CancelToken) -> Iterator[SealedContent]:
        """Yield those that their sources still have for this worker. The others are refused."""
        limit = _CancelOrDeadline(cancel, _ASK_S)
        for content in contents:
            reason = self._why_not(content.spec, limit) if content.spec else "nothing says where it comes from"
            if cancel.is_set():
                raise EnsureCancelled("room on the volume")
            if reason:
                log.warning("%s is kept, because it could not be downloaded again: %s", content.title, reason)
                refused.add(content.title)
            else:
                yield content

    def _why_not(self, spec: ModelSpec, limit: CancelToken) -> str | None:
        asked_s, reason = self._asked.get(spec, (-math.inf, None))
        if time.monotonic() - asked_s < _ASK_AGAIN_S:
            return reason
        try:
            self._ask(spec, limit)
            reason = None
        except EnsureCancelled:
            return "its source does not answer"
        except WorkerError as exc:
            reason = str(exc)
        self._asked[spec] = time.monotonic(), reason
        return reason

    # --- the removal itself

    def _remove(self, contents: Sequence[SealedContent], refused: set[str]) -> int:
        """Remove these, except those that turn out to be in use: they are refused. Return the freed bytes."""
        before = free_bytes(self.layout.root)
        freed: list[int] = []
        moved: dict[SealedContent, list[_MovedAside]] = {}
        refused.update(content.title for content in contents)
        with contextlib.ExitStack() as stack:
            free = [content for content in contents if self._is_free(content, stack)]
            if not free:
                return 0
            stack.enter_context(self._marked())
            self._at("marked")
            try:
                for content in self._unused(free):
                    if aside := self._moved_aside(content):
                        moved[content] = aside
                self._at("moved")
                for content in self._unused(moved):
                    if self._is_unlinked(content, moved.pop(content)):
                        freed.append(content.size_bytes)
                        refused.discard(content.title)
            finally:
                for one in itertools.chain.from_iterable(moved.values()):
                    one.put_back()
        if freed:
            self._promise(before, freed)
        return sum(freed)

    @contextlib.contextmanager
    def _marked(self) -> Iterator[None]:
        """Have every job that begins meanwhile wait until the body has ended."""
        mark = self.layout.removal_mark(f"{self._worker}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            mark.touch()
        try:
            time.sleep(self._settle_s)
            yield
            time.sleep(self._settle_s)
        finally:
            with contextlib.suppress(OSError):
                mark.unlink()

    def _unused(self, contents: Iterable[SealedContent]) -> list[SealedContent]:
        """Return those that no job uses by now."""
        tree = ModelsTree.of(self.layout)
        own = LeasedTitles((title, "this worker") for title in self._held())
        judge = EvictionJudge(Usage.of(self.layout, self._timing), own, EvictionPins(), tree, self._timing)
        found = []
        for content in contents:
            titles = [name.title for name in content.names]
            titles += [title for name in content.names for title in tree.also(name.path)]
            if user := judge.user(titles):
                log.info("%s stays: %s", content.title, user)
            else:
                found.append(content)
        return found

    def _is_free(self, content: SealedContent, locks: contextlib.ExitStack) -> bool:
        """Return whether nobody downloads this content. Its lock is held from here on."""
        sha256 = content.names[0].seal.sha256
        return sha256 is not None and locks.enter_context(self._locks.attempt(sha256))

    def _moved_aside(self, content: SealedContent) -> list[_MovedAside] | None:
        """Move every name of the content aside, if it is still the examined one. None if it is another one."""
        self._at("locked")
        aside: list[_MovedAside] = []
        for name in content.names:
            with contextlib.suppress(OSError):
                aside.append(_MovedAside.of(self.layout, name, content.stamp))
                self._at("half_moved")
        if len(aside) == len(content.names) and all(one.is_same(content.stamp) for one in aside):
            return aside
        for one in aside:
            one.put_back()
        return None

    def _is_unlinked(self, content: SealedContent, aside: Sequence[_MovedAside]) -> bool:
        """Free the space, then record that on the volume. Return whether it was freed."""
        try:
            for one in aside:
                one.path.unlink()
                self._at("unlinked")
        except OSError:  # this process was stopped for so long that another one put it back
            for one in aside:
                one.settle()
            return False
        for name in content.names:
            bury(self.layout, name.title, name.seal, self._worker, f"it was not used for {duration_text(content.idle_s)}")
            self._at("buried")
        log.info(
            "removed %s (%s, last used %s ago) to make room; it comes from %s",
            content.title,
            size_text(content.size_bytes),
            duration_text(content.idle_s),
            content.spec.source if content.spec else "nowhere",
        )
        return True

    def _tidy(self) -> None:
        """Put back what a killed worker had moved aside. Remove it if the model exists again."""
        for mark, age_s in removal_marks(self.layout):
            if age_s > _ORPHAN_S:
                mark.unlink(missing_ok=True)
        for one in _MovedAside.all_of(self.layout):
            if volume_now_s(self.layout) - one.moved_s > _ORPHAN_S:
                one.settle()

    # --- space that comes later

    def _promise(self, before: int | None, freed: Sequence[int]) -> None:
        """Remember freed bytes that are not visible yet: a process that has a removed file open frees its space later.

        Less than a whole model is none that is open: records and other downloads take space as well.
        """
        after = free_bytes(self.layout.root)
        if before is not None and after is not None and (missing := sum(freed) - max(0, after - before)) >= min(freed):
            self._promised.append((time.monotonic(), missing))

    def _promised_bytes(self) -> int:
        self._promised = [(at_s, size) for at_s, size in self._promised if time.monotonic() - at_s < _PROMISE_S]
        return sum(size for _, size in self._promised)


class _CancelOrDeadline:
    """A cancel token for making room that is also set after some seconds."""

    def __init__(self, cancel: CancelToken, seconds: float) -> None:
        self._cancel = cancel
        self._until_s = time.monotonic() + seconds

    def is_set(self) -> bool:
        return self._cancel.is_set() or time.monotonic() >= self._until_s

    def wait(self, timeout: float | None = None) -> bool:
        left_s = max(0.0, self._until_s - time.monotonic())
        self._cancel.wait(left_s if timeout is None else min(timeout, left_s))
        return self.is_set()


@dataclass(frozen=True, slots=True)
class _MovedAside:
    """One model's file, moved aside to make room, and when by the volume's clock.

    Its name records the expected file: size, mtime, inode. A digest stands for its title, which the seals tell: a folder for
    each would need space. The title is None if it no longer has a seal.
    """

    path: Path
    title: str | None
    layout: Layout
    moved_s: int
    said: str

    @classmethod
    def of(cls, layout: Layout, name: ContentName, looked_at: tuple[int, int, int, int]) -> _MovedAside:
        """Move a name's file aside. Raises `OSError`."""
        moved_s, said = int(volume_now_s(layout)), "-".join(map(str, looked_at[:3]))
        path = layout.removing / f"{moved_s}-{secrets.token_hex(4)}-{said}-{_digest(name.title)}"
        name.path.rename(path)
        return cls(path, name.title, layout, moved_s, said)

    @classmethod
    def all_of(cls, layout: Layout) -> Iterator[_MovedAside]:
        """Yield what interrupted removals left."""
        with contextlib.suppress(OSError):
            left = [(path, _ASIDE.fullmatch(path.name)) for path in layout.removing.iterdir()]
            titles = {_digest(title): title for title, _ in sealed_titles(layout)} if left else {}
            for path, found in left:
                if found:
                    yield cls(path, titles.get(found["digest"]), layout, int(found["moved_s"]), found["said"])

    def is_same(self, looked_at: tuple[int, int, int, int]) -> bool:
        """Return whether it is the examined file: another one may have got its name at the last moment."""
        return survey_stamp(self.path.lstat()) == looked_at

    def put_back(self) -> None:
        """Give it its name again. If another file has the name by now, remove a sealed copy and keep any other file.

        A file whose seal is gone, or another file's, is removed as well: with its name it would look as if put there by hand.
        """
        try:
            if self._has_lost_its_seal() or not self._is_named_again():
                if not self._is_as_said():
                    log.warning("%s stays there: it is another file than was to be removed, and its name is taken", self.path)
                    return
                self.path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("%s cannot be put back (%s); the next removal tries again", self.path, exc.strerror)

    def _is_named_again(self) -> bool:
        """Give it its name. Return False if that is unknown or another file's. Raises `OSError`."""
        if self.title is None:
            return False
        home = self.layout.listed(self.title)
        try:
            os.link(self.path, home, follow_symlinks=False)
        except OSError as exc:
            if exc.errno == errno.EEXIST or os.path.lexists(home):
                return False
            self.path.rename(home)
        else:
            self.path.unlink()
        return True

    def _has_lost_its_seal(self) -> bool:
        seal = read_seal(self.layout.seal_of(self.title)) if self.title else None
        return self._is_as_said() and (seal is None or not seal.fits(self.path.lstat()))

    def settle(self) -> None:
        """Undo half of a removal."""
        with contextlib.suppress(OSError):
            self.put_back()

    def _is_as_said(self) -> bool:
        return self.said == "-".join(map(str, survey_stamp(self.path.lstat())[:3]))


def _digest(title: str) -> str:
    return hashlib.sha256(os.fsencode(title)).hexdigest()[:16]


def source_check(hub: Callable[[], Hub]) -> Ask:
    """Return a function that asks, before room is made, whether this worker could download that very content again."""

    def ask(spec: ModelSpec, cancel: CancelToken) -> None:
        hub().look_up(spec.source, cancel).check_against(spec)

    return ask
