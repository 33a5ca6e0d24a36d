"""Download a file, verify it, publish it under its final name, and seal it.

Touches the disk and, through `ranges`, the network.

A final name appears only as a hard link to a file whose bytes were verified and are safe on the disk, so that it never replaces
another file. If the file system has no hard links, or a damaged file is replaced, a rename is used instead. The seal is written
last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from worker.base.files import FULL, free_bytes, patiently, sync_folder
from worker.base.progress import ModelProgress, metered
from worker.base.text import size_text
from worker.errors import ContentMismatch, EnsureCancelled, ModelError, SourceChanged, SourceRefused, VolumeFull
from worker.fetch.blocking_call import abandonable
from worker.fetch.ranges import RangeFetch, RangeTuning
from worker.fetch.xet import XetFetch
from worker.store.file_formats import check_unhashed, head_of, is_safetensors, misfit, stated_bytes
from worker.store.hashing import HashedPartial, git_sha1_of
from worker.store.inventory import file_stamp
from worker.store.partial import Partial, PartialStuck, PartialTaken, PartialWriteFailed, sweep_partials
from worker.store.seals import Seal, new_seal, stat_file, whole_mtime, write_seal
from worker.store.tombstones import forget_tombstone, tombstone_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from worker.base.progress import CancelToken, Listener, Phase
    from worker.fetch.hub import Hub, RemoteFile
    from worker.fetch.ranges import Sink
    from worker.model_spec import ModelSpec
    from worker.store.layout import Layout
    from worker.store.locks import LockResult
    from worker.store.room import Room

log = logging.getLogger(__name__)

ATTEMPTS: Final = 3
"""How often a whole file is downloaded because it arrived wrong."""

How = Literal["ready", "adopted", "host_cache", "downloaded", "by_hand"]

_IDLE_S: Final = 60.0
_PENDING_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """The result of a model's download, or of one that was there. `how` is the reason; `by_hand`: a person put it there."""

    path: Path
    how: How
    bytes_fetched: int = 0
    seconds: float = 0.0


class DownloadHooks:
    """Named points between the steps of a download. This class does nothing; tests end the process there."""

    def at(self, step: str) -> None:
        """Run at a step, in the thread that does the work."""


@dataclass(frozen=True, slots=True)
class DownloadTools:
    """What a download needs besides the model."""

    layout: Layout
    hub: Hub
    worker: str
    tuning: RangeTuning = field(default_factory=RangeTuning)
    hooks: DownloadHooks = field(default_factory=DownloadHooks)
    room: Room | None = None
    """Makes room on the volume, where that is wanted."""

    def make_room(self, exc: OSError, needed_bytes: int, cancel: CancelToken) -> bool:
        """Return whether room was made after this write error, so that a retry is worthwhile."""
        if exc.errno not in FULL or self.room is None:
            return False
        log.info("the volume refused a write (%s): making room", exc.strerror or exc)
        return self.room.make(max(1, needed_bytes), cancel) > 0


@dataclass(slots=True)
class DownloadTask:
    """What to download for one call of `ensure`: the model, the listener, and the cost so far."""

    spec: ModelSpec
    path: Path
    progress: Listener
    cancel: CancelToken
    replaces: object = None
    """The stamp of the file that is to be replaced, if there is one."""
    needed_bytes: int = 0
    fetched_bytes: int = 0
    key: str = ""
    remote: RemoteFile | None = None
    """The source's answer, if the file turned out to be another one than the key's."""


class Download:
    """The download of one content to one name."""

    def __init__(self, tools: DownloadTools, task: DownloadTask, remote: RemoteFile, hold: LockResult) -> None:
        self._tools = tools
        self._task = task
        self._remote = remote
        self._hold = hold
        self._folder = tools.layout.partial(remote.key)
        self._left: list[Partial] = []
        self._at = tools.hooks.at

    def run(self) -> ReadyModel | None:
        """Download, verify and publish. None if another worker changed the file meanwhile; call again.

        A file with a wrong byte is downloaded again. If the same wrong file arrives twice, the source is wrong:
        `ContentMismatch`.
        """
        log.info("downloading %s (%s)", self._task.spec, size_text(self._remote.size_bytes))
        wrong = WrongFiles(str(self._task.spec), self._remote)
        self._say_if_removed()
        partial = self._claimed()
        while True:
            try:
                result = self._attempt(partial)
            except PartialStuck:
                log.warning("the volume keeps a dead host's writes locked: starting the download of %s again", self._task.spec)
                partial.disown()
                self._left.append(partial)
            else:
                if not isinstance(result, str):
                    return result
                partial.discard()
                wrong.add(result)
            partial = self._begin()

    def _say_if_removed(self) -> None:
        """Say in the log that the model was here before."""
        spec = self._task.spec
        if tombstone := tombstone_of(self._tools.layout, spec.folder, spec.name):
            log.info("%s/%s is downloaded again: it was %s", spec.folder, spec.name, tombstone)

    def _claimed(self) -> Partial:
        """Claim a partial. A quota that counts lengths refuses one that is too long: then models go, one after the other."""
        while True:
            try:
                return self._claim()
            except OSError as exc:
                if not self._tools.make_room(exc, 1, self._task.cancel):
                    raise

    def _claim(self) -> Partial:
        if not self._remote.has_validator:
            # Nothing shows whether the bytes that another worker left are of the current version.
            return self._begin()
        idle_s = 0.0 if self._hold.state == "held" else _IDLE_S
        return patiently(lambda: Partial.claim(self._folder, self._remote.size_bytes, idle_s, self._tools.hub.clock))

    def _begin(self) -> Partial:
        return patiently(lambda: Partial.begin(self._folder, self._remote.size_bytes, self._tools.hub.clock))

    def _attempt(self, partial: Partial) -> ReadyModel | str | None:
        """Do what `run` does, with one partial. Return the sha256 if it is wrong."""
        try:
            self._at("claimed")
            self._check_space(partial)
            if partial.inherited and partial.gaps() and self._task.cancel.wait(self._tools.tuning.handover_s):
                raise EnsureCancelled(str(self._task.spec))
            actual = self._fill(partial)
            if self._is_wrong(partial, actual):
                return actual
            self._check_unhashed(partial)
            return self._publish(partial, actual)
        except PartialTaken:
            log.info("another worker continues the download of %s", self._task.spec)
            with contextlib.suppress(OSError):
                partial.discard()
            return None
        except (PartialWriteFailed, OSError) as exc:
            error, missing = exc.error if isinstance(exc, PartialWriteFailed) else exc, partial.size_bytes - partial.done_bytes
            if self._tools.make_room(error, missing, self._task.cancel):
                return None
            _discard_if_full(partial, error)
            raise
        except SourceChanged:
            with contextlib.suppress(OSError):
                partial.discard()
            raise
        finally:
            with contextlib.suppress(OSError):
                partial.close()

    def _is_wrong(self, partial: Partial, sha256: str) -> bool:
        """Return whether this is not the file that the source promised. For a small file the hub gives git's hash."""
        if self._remote.sha256 or not self._remote.git_sha1:
            return self._remote.sha256 not in {None, sha256}
        return git_sha1_of(partial.path, self._remote.size_bytes) != self._remote.git_sha1

    def _check_space(self, partial: Partial) -> None:
        """Make room, then raise if the file system still reports too little space. A quota shows only later."""
        needed = partial.size_bytes - partial.done_bytes
        if self._tools.room and needed:
            self._tools.room.fit(needed, self._task.cancel)
        free = free_bytes(partial.path.parent)
        if free is not None and needed > free:
            if not partial.done_bytes:
                partial.discard()
            raise VolumeFull(self._tools.layout.root, needed, free)

    # --- the bytes

    def _fill(self, partial: Partial) -> str:
        """Download all bytes to the disk. Return their sha256, which is computed while the writers write."""
        tuning = self._tools.tuning
        partial.keep_journal(tuning.unsaved_bytes * tuning.connections)
        sink = HashedPartial(partial, tuning)
        try:
            self._receive(sink, partial.done_bytes)
            self._at("fetched")
            abandonable(lambda: partial.settle(tuning.patience_s, tuning.stuck_s), self._remote.where, self._task.cancel)
            self._at("settled")
            sha256 = sink.sha256(self._task.cancel, self._meter("checking"))
        finally:
            sink.stop()
        self._at("hashed")
        return sha256

    def _receive(self, sink: Sink, done_bytes: int) -> None:
        meter = self._meter("downloading", done_bytes)

        def on_bytes(done_bytes: int) -> None:
            meter(done_bytes)
            self._at("bytes")

        try:
            self._run(RangeFetch, sink, on_bytes)
        except SourceRefused:
            if self._remote.xet is None:
                raise
            log.warning("the source refuses %s over plain HTTP: continuing through Xet", self._remote.where)
            self._run(XetFetch, sink, on_bytes)

    def _run(self, way: type[RangeFetch | XetFetch], sink: Sink, on_bytes: Callable[[int], None]) -> None:
        fetch = way(self._tools.hub, self._remote, sink, self._tools.tuning, self._task.cancel)
        try:
            fetch.run(on_bytes)
        finally:
            self._task.fetched_bytes += fetch.fetched_bytes

    def _meter(self, phase: Phase, done_bytes: int = 0) -> Callable[[int], None]:
        return metered(phase, self._remote.size_bytes, both_listeners(self._task.progress, self._hold.report), done_bytes)

    def _check_unhashed(self, partial: Partial) -> None:
        """Without a hash, check the length and what a safetensors header says about it."""
        name, size_bytes = self._task.path.name, self._remote.size_bytes
        found = misfit(name, head_of(partial.path), size_bytes, is_verified=self._remote.is_verified)
        try:
            check_unhashed(
                self._remote, found, lambda: stated_bytes(partial.path, size_bytes) if is_safetensors(name) else size_bytes
            )
        except ModelError:
            partial.discard()
            raise

    # --- the name

    def _publish(self, partial: Partial, sha256: str) -> ReadyModel | None:
        """Give the verified file its name, then seal it. None if a file appeared there meanwhile."""
        spec, path, layout = self._task.spec, self._task.path, self._tools.layout
        there = stat_file(path)
        over = there is not None and file_stamp(there) == self._task.replaces
        if there is not None and not over:
            partial.discard()
            return None
        seal, inode = self._seal(partial, sha256)
        # Between name and seal, even if this worker dies there, others find here what the file should hash to.
        pending = layout.pending(inode)
        write_seal(pending, seal)
        if path.is_symlink():
            log.warning("replacing the broken link %s -> %s", path, path.readlink())
        self._at("replacing")
        try:
            published = patiently(lambda: partial.publish(path, over=over))
        except PartialTaken:
            # A worker that continues the file removes the record with the seal. If another file has the name by now, nobody
            # does.
            there = stat_file(path)
            if there is not None and there.st_ino != inode:
                pending.unlink(missing_ok=True)
            raise
        if not published:
            pending.unlink(missing_ok=True)
            partial.discard()
            return None
        self._at("replaced")
        sync_folder(path.parent)
        if self._hold.state == "held":
            self._clear_away()
        seal_download(layout, spec, seal, inode, lambda: self._at("seal_half_written"))
        if self._hold.state != "held":
            # Other workers may download it as well. They stop now and look again: without the seal they would have to hash.
            self._clear_away()
        self._at("sealed")
        log.debug("published %s", path)
        return ReadyModel(path, "downloaded")

    def _clear_away(self) -> None:
        """Remove what other workers, mostly dead ones, left of this content. Once it is sealed nobody looks there."""
        sweep_partials(self._folder, {partial.path for partial in self._left})
        for left in self._left:
            threading.Thread(target=left.discard_later, name="clear-away", daemon=True).start()

    def _seal(self, partial: Partial, sha256: str) -> tuple[Seal, int]:
        """Return the seal of a file and its inode, which identifies it before it has its name."""
        if not partial.is_ours():
            raise PartialTaken
        # Set our own time: what a network file system records for the last write may still change, and differ between hosts.
        mtime = int(time.time())
        os.utime(partial.path, (mtime, mtime))
        partial.close()
        found = partial.path.stat()
        if found.st_size != partial.size_bytes:
            raise PartialTaken  # it was truncated after it was hashed
        return new_seal(self._task.spec, self._remote, sha256, self._tools.worker, whole_mtime(found)), found.st_ino


def seal_download(layout: Layout, spec: ModelSpec, seal: Seal, inode: int, opened: Callable[[], None] = lambda: None) -> None:
    """Seal the file that was downloaded or adopted, if possible. Without a seal the file is still used."""
    try:
        write_seal(layout.seal(spec.folder, spec.name), seal, opened)
        forget_pending(layout, spec, inode)
        forget_tombstone(layout, spec.folder, spec.name)
    except OSError as exc:
        log.warning("could not seal %s/%s (%s); it will be checked again at the next start", spec.folder, spec.name, exc)


def forget_pending(layout: Layout, spec: ModelSpec, inode: int) -> None:
    """Remove the pending record of a published download, and those that others left a day ago."""
    own = layout.pending(inode)
    for path in (own, layout.pending_seal(spec.folder, spec.name)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for left in own.parent.iterdir():
            if left.stat().st_mtime < time.time() - _PENDING_S:
                left.unlink(missing_ok=True)


def both_listeners(first: Listener, second: Listener) -> Listener:
    """Return one progress listener of a download that calls two."""

    def report(progress: ModelProgress) -> None:
        first(progress)
        second(progress)

    return report


def _discard_if_full(partial: Partial, error: OSError) -> None:
    """Remove a download's partial that filled the disk, because it blocks everything else."""
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            partial.discard()


class WrongFiles:
    """The wrong files that failed verification for one model so far."""

    def __init__(self, model: str, remote: RemoteFile) -> None:
        self._model = model
        self._remote = remote
        self._seen: set[str] = set()

    def add(self, actual: str) -> None:
        """Raise `ContentMismatch` if the same wrong file arrived twice, which is no coincidence. Otherwise retry."""
        promised = self._remote.sha256 or f"that of the git blob {self._remote.git_sha1}"
        log.warning("%s arrived with the sha256 %s, not %s: discarded", self._model, actual, promised)
        if actual in self._seen or len(self._seen) + 1 == ATTEMPTS:
            raise ContentMismatch(self._remote.where, "sha256", promised, actual)
        self._seen.add(actual)
