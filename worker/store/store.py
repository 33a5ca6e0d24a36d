"""Make a model available: ready, adopted, from the machine's cache, or downloaded. Touches the disk.

Correctness does not depend on a lock. The lock keeps workers from downloading the same bytes twice.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from worker.base.files import Peek, patiently, sync_folder
from worker.base.progress import metered
from worker.errors import (
    ModelError,
    UnsafePath,
    UnsealedMismatch,
    VolumeFailed,
    VolumeFull,
    VolumeMissing,
    VolumeReadOnly,
    no_volume,
    volume_error,
)
from worker.fetch.ranges import RangeTuning
from worker.store.download import (
    Download,
    DownloadHooks,
    DownloadTask,
    DownloadTools,
    ReadyModel,
    both_listeners,
    forget_pending,
    seal_download,
)
from worker.store.file_formats import check_whole
from worker.store.hashing import sha256_of
from worker.store.host_cache import cached_file
from worker.store.inventory import as_spelled, file_stamp, find_record, ready_file, resolved_path
from worker.store.locks import Locks, LockTiming
from worker.store.partial import PartialWriteFailed, sweep_partials
from worker.store.seals import Seal, SourceOrigin, seal_time, stat_file, whole_mtime, write_seal
from worker.store.shared_lookups import SharedLookups

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from worker.base.progress import CancelToken, Listener, ModelProgress
    from worker.fetch.hub import Hub, RemoteFile
    from worker.model_spec import ModelSpec
    from worker.store.layout import Layout
    from worker.store.room import Room
    from worker.store.shared_lookups import SharedAnswer

__all__ = ["DownloadHooks", "LockTiming", "RangeTuning", "ReadyModel", "Store", "Stores"]

log = logging.getLogger(__name__)

_TICK_S: Final = 0.1
_LOOK_S: Final = 3.0
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def _ignore_progress(_: ModelProgress) -> None:
    """Ignore the progress of a model that the store makes available."""


class Store:
    """A store: the models below one root, a network volume or the container's own disk.

    `host_cache` is the location of RunPod's host cache if it is not below the same root. Safe to use from many threads.
    """

    def __init__(
        self,
        layout: Layout,
        hub: Hub,
        worker: str,
        *,
        tuning: RangeTuning | None = None,
        timing: LockTiming | None = None,
        host_cache: Layout | None = None,
        hooks: DownloadHooks | None = None,
        room: Room | None = None,
    ) -> None:
        self.layout = layout
        self._tools = DownloadTools(layout, hub, worker, tuning or RangeTuning(), hooks or DownloadHooks(), room)
        self._timing = timing or LockTiming()
        self._locks = Locks(layout, worker, self._timing, hub.clock)
        self._lookups = SharedLookups(layout, worker, self._timing)
        self._host_cache = host_cache or layout
        self._hashed: dict[tuple[str, int, int], str] = {}

    def ready(self, folder: str, name: str) -> Path | None:
        """Return the file if its size and whole-second mtime equal its seal: one stat, one small read, no network, no lock."""
        there = ready_file(self.layout, folder, name)
        return there[0] if there else None

    def ensure(self, spec: ModelSpec, progress: Listener = _ignore_progress, cancel: CancelToken | None = None) -> ReadyModel:
        """Return when the model can be used. `progress` is called several times a second.

        The order: a sealed file; a file without a seal, which is never overwritten or removed; RunPod's host cache; a file of
        the same content that was downloaded under another name; a download, by this worker or by the one it waits for. Raises a
        `ModelError` (or `UnsafePath`) that says what to do. Raises `EnsureCancelled` within a second; the next attempt
        continues the partial.
        """
        began_s = time.monotonic()
        spec = as_spelled(self.layout, spec)
        path = resolved_path(self.layout, spec)
        cancel = cancel or threading.Event()
        task = DownloadTask(spec, path, progress, cancel)
        while True:
            task.cancel = cancel
            try:
                found = self._look(task) or self._get(task)
                break
            except (PartialWriteFailed, OSError) as exc:
                error = exc.error if isinstance(exc, PartialWriteFailed) else exc
                # What is small was refused: large writes make room where they are refused.
                if not self._tools.make_room(error, 1, cancel):
                    raise volume_error(self.layout.root, error, task.needed_bytes) from exc
        return replace(found, bytes_fetched=task.fetched_bytes, seconds=time.monotonic() - began_s)

    def _get(self, task: DownloadTask) -> ReadyModel:
        """Download or adopt the model. Stop as soon as another worker has it, whatever this one waits for."""
        with PublishedOrCancelled(task.cancel, task.path, lambda: self._is_published(task.spec), self._timing.look_s) as watch:
            task.cancel = watch
            try:
                while (found := self._once(task)) is None:
                    pass
            except (ModelError, OSError, PartialWriteFailed):
                if not watch.look():
                    raise
                log.info("%s was published by another worker", task.path)
                if task.key:
                    sweep_partials(self.layout.partial(task.key))
                return ReadyModel(task.path, "ready")
            return found

    def _is_published(self, spec: ModelSpec) -> bool:
        there = ready_file(self.layout, spec.folder, spec.name)
        return there is not None and (None in {spec.sha256, there[1].sha256} or spec.sha256 == there[1].sha256)

    def replace(
        self, spec: ModelSpec, stamp: object, progress: Listener = _ignore_progress, cancel: CancelToken | None = None
    ) -> ReadyModel:
        """Download the model again, verify it, and then replace the file with this stamp.

        Until then the old file stays, and it stays if the source is unavailable. If the file changed meanwhile, it is left
        alone and this does what `ensure` does. Raises what `ensure` raises.
        """
        began_s = time.monotonic()
        task = DownloadTask(spec, resolved_path(self.layout, spec), progress, cancel or threading.Event(), replaces=stamp)
        name = f"{spec.folder}/{spec.name}"
        try:
            remote = self._look_up(task)
            while (found := stat_file(task.path)) is not None and file_stamp(found) == stamp:
                with self._locks.hold(
                    remote.key, published=lambda: False, cancel=task.cancel, on_wait=progress, name=name
                ) as hold:
                    ready = Download(self._tools, task, remote, hold).run()
                if ready:
                    return replace(ready, bytes_fetched=task.fetched_bytes, seconds=time.monotonic() - began_s)
        except PartialWriteFailed as exc:
            raise volume_error(self.layout.root, exc.error, task.needed_bytes) from exc
        except OSError as exc:
            raise volume_error(self.layout.root, exc, task.needed_bytes) from exc
        return self.ensure(spec, progress, cancel)

    # --- what is there already

    def _look(self, task: DownloadTask) -> ReadyModel | None:
        """Return what can be used without a lock or the network."""
        spec = task.spec
        if self._is_ready(task):
            return ReadyModel(task.path, "ready")
        if (found := stat_file(task.path)) is None:
            if task.path.is_dir():
                raise VolumeFailed(task.path, "it is a folder where a file belongs")
            return self._cached(task)
        if self._sha256_to_have(spec, found) is None:
            check_whole(task.path, found.st_size)
            return ReadyModel(task.path, "by_hand")
        return None

    def _is_ready(self, task: DownloadTask) -> bool:
        """Return whether the file is sealed. Raises `UnsealedMismatch` if it is sealed as another file than the wanted one."""
        spec = task.spec
        there = ready_file(self.layout, spec.folder, spec.name)
        if there is None:
            return False
        sha256 = there[1].sha256
        if spec.sha256 and sha256 and sha256 != spec.sha256:
            raise UnsealedMismatch(task.path, spec.sha256, sha256)
        return True

    def _sha256_to_have(self, spec: ModelSpec, found: os.stat_result) -> str | None:
        """Return the expected sha256 of a file that is not ready, from the model or from our record of this file."""
        known = find_record(self.layout, spec, found)
        return spec.sha256 or (known.sha256 if known else None)

    def _adopt(self, task: DownloadTask, found: os.stat_result, report: Listener) -> ReadyModel:
        """Use a file that has no seal, and seal it if it is the expected one."""
        spec, path = task.spec, task.path
        check_whole(path, found.st_size)
        known, expected = find_record(self.layout, spec, found), self._sha256_to_have(spec, found)
        if expected is None:
            return ReadyModel(path, "by_hand")
        actual = self._hash(path, found, task, report)
        if actual != expected:
            return self._not_as_recorded(spec, path, found, actual)
        origin = SourceOrigin.of(spec)
        if known is None or known.sha256 != actual:
            known = Seal(
                size=0, mtime=0, sha256=actual, repo=origin.repo, file=origin.file, by=self._tools.worker, at=seal_time()
            )
        seal_download(self.layout, spec, replace(known, size=found.st_size, mtime=whole_mtime(found)), found.st_ino)
        log.info("adopted %s: its sha256 is right", path)
        return ReadyModel(path, "adopted")

    def _not_as_recorded(self, spec: ModelSpec, path: Path, found: os.stat_result, actual: str) -> ReadyModel:
        """Handle a file that was replaced: an error if the model is pinned. Otherwise use it and drop our record."""
        if spec.sha256:
            raise UnsealedMismatch(path, spec.sha256, actual)
        log.warning("%s is no longer the file that was sealed; it is used as it is", path)
        with contextlib.suppress(OSError):
            self.layout.seal(spec.folder, spec.name).unlink(missing_ok=True)
            forget_pending(self.layout, spec, found.st_ino)
        return ReadyModel(path, "by_hand")

    def _hash(self, path: Path, found: os.stat_result, task: DownloadTask, report: Listener) -> str:
        """Return the file's sha256, cached while the file stays the same."""
        key = (str(path), found.st_size, found.st_mtime_ns)
        if key not in self._hashed:
            meter = metered("checking", found.st_size, report)
            self._hashed[key] = sha256_of(path, task.cancel, meter)
        return self._hashed[key]

    def cached(self, spec: ModelSpec) -> Path | None:
        """Like `cached_file`, in the host cache that this store uses."""
        return cached_file(self._host_cache, spec)

    def _cached(self, task: DownloadTask) -> ReadyModel | None:
        """Return the file in RunPod's host cache if it is the requested one. It is faster than the volume and costs nothing."""
        with contextlib.suppress(OSError):
            if (path := self.cached(task.spec)) and self._is_blob(path, path.stat(), task):
                log.info("using %s from the machine's cache", task.spec)
                return ReadyModel(path, "host_cache")
        return None

    def _is_blob(self, path: Path, found: os.stat_result, task: DownloadTask) -> bool:
        """Return whether a cached file has the requested sha256, which names the cache's blobs."""
        wanted = task.spec.sha256
        if wanted is None:
            return True
        blob = path.resolve().name
        return (blob if _SHA256.fullmatch(blob) else self._hash(path, found, task, task.progress)) == wanted

    # --- getting it

    def _once(self, task: DownloadTask) -> ReadyModel | None:
        """Adopt or download it, once for all workers. None if another worker changed the file meanwhile; call again."""
        if (found := stat_file(task.path)) is not None:
            expected = self._sha256_to_have(task.spec, found)
            return self._locked(task, expected, None) if expected else self._look(task)
        if task.remote:
            remote, task.remote = task.remote, None
            return self._locked(task, remote.key, remote)
        spec, question = task.spec, self._tools.hub.question(task.spec.source)
        with self._lookups.turn(question, lambda answer: _answer_fits(spec, answer), task.cancel, task.progress) as turn:
            if turn.answer:
                log.info("%s was looked up by %s", spec, turn.answer.by)
                return self._locked(task, spec.sha256 or turn.answer.key, None)
            self._tools.hooks.at("asking")
            own = self._look_up(task)
            # Tell the others only when they can only wait. Otherwise one of them might get the lock first, and have to ask as
            # well.
            return self._locked(task, own.key, own, lambda: turn.tell(own))

    def _locked(
        self, task: DownloadTask, key: str, remote: RemoteFile | None, tell: Callable[[], None] = lambda: None
    ) -> ReadyModel | None:
        """Like `_once`, for a content. Call `tell` once this or another worker has its lock."""
        spec, task.key = task.spec, key

        def on_wait(progress: ModelProgress) -> None:
            tell()
            task.progress(progress)

        with self._locks.hold(
            key,
            published=lambda: False,  # `PublishedOrCancelled` looks for that
            cancel=task.cancel,
            on_wait=on_wait,
            name=f"{spec.folder}/{spec.name}",
        ) as hold:
            tell()
            self._tools.hooks.at("locked")
            if self._is_ready(task):
                return ReadyModel(task.path, "ready")
            if (found := stat_file(task.path)) is not None:
                there: ReadyModel | None = self._adopt(task, found, both_listeners(task.progress, hold.report))
            else:
                remote = remote or self._look_up(task)
                if remote.key != key:
                    task.remote = remote
                    return None
                there = self._linked(task, remote)
            if there and hold.state == "held":
                sweep_partials(self.layout.partial(key))
            return there or (Download(self._tools, task, remote, hold).run() if remote else None)

    def _linked(self, task: DownloadTask, remote: RemoteFile) -> ReadyModel | None:
        """Give this name to an existing file of the same content. None if there is none.

        The last downloader of the content left that name beside its lock. A hard link copies no byte. If the file system has no
        hard links, the content is downloaded again, which costs no more than a copy.
        """
        spec, holder = task.spec, self._locks.holder(remote.key)
        folder, _, name = holder.name.partition("/") if holder else ("", "", "")
        try:
            there = ready_file(self.layout, folder, name)
        except UnsafePath:
            return None
        if there is None or remote.sha256 is None or there[1].sha256 != remote.sha256 or there[0].is_symlink():
            return None
        origin = SourceOrigin.of(spec)
        seal = replace(there[1], etag=remote.etag, repo=origin.repo, file=origin.file, commit=remote.commit)
        seal = replace(seal, by=self._tools.worker, at=seal_time())
        if (inode := self._link(there[0], task.path, seal)) is None:
            return None
        seal_download(self.layout, spec, seal, inode)
        log.info("%s has the content of %s: linked", task.path, there[0])
        return ReadyModel(task.path, "adopted")

    def _link(self, old: Path, new: Path, seal: Seal) -> int | None:
        """Link the sealed file to the new name, unless another file has it. Return its inode."""
        pending = None
        try:
            inode = old.stat().st_ino
            pending = self.layout.pending(inode)
            write_seal(pending, seal)
            new.parent.mkdir(parents=True, exist_ok=True)
            patiently(lambda: new.hardlink_to(old))
            sync_folder(new.parent)
            if seal.fits(new.stat()):
                return inode
            new.unlink()  # another file had appeared under the old name
        except OSError as exc:
            log.info("%s cannot be linked to %s (%s)", new, old, exc.strerror)
        if pending:
            with contextlib.suppress(OSError):
                pending.unlink(missing_ok=True)
        return None

    def _look_up(self, task: DownloadTask) -> RemoteFile:
        """Return the source's metadata. Raises `ContentMismatch` if that differs from the model's."""
        spec = task.spec
        remote = self._tools.hub.look_up(spec.source, task.cancel)
        remote.check_against(spec)
        task.needed_bytes = remote.size_bytes
        return replace(remote, sha256=remote.sha256 or spec.sha256)


def _answer_fits(spec: ModelSpec, answer: SharedAnswer) -> bool:
    """Return whether another worker's answer can be about the store's model. The source itself must report a wrong pin."""
    same_content = spec.sha256 in {None, answer.key} or answer.key.startswith("url-")
    return same_content and spec.size_bytes in {None, answer.size_bytes}


class PublishedOrCancelled:
    """A cancel token that is also set once another worker has published the store's file at `path`. It looks each `every_s`.

    Its own thread looks, so that a volume that does not answer delays no waiter.
    """

    def __init__(self, cancel: CancelToken, path: Path, is_published: Callable[[], bool], every_s: float) -> None:
        self._cancel = cancel
        self._path = path
        self._is_published = is_published
        self._every_s = every_s
        self._published = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._look_often, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _look_often(self) -> None:
        with Peek(self._path) as peek:
            while not self._published and not self._ended.wait(self._every_s):
                with contextlib.suppress(OSError):
                    if peek.exists():
                        self._look_once()

    def _look_once(self) -> None:
        with contextlib.suppress(OSError):
            self._published = self._published or self._is_published()

    def look(self) -> bool:
        """Look now, for as long as a volume may take to answer."""
        thread = threading.Thread(target=self._look_once, name="look", daemon=True)
        thread.start()
        thread.join(_LOOK_S)
        return self._published

    def is_set(self) -> bool:
        """Return whether there is nothing left to wait for."""
        return self._cancel.is_set() or self._published

    def wait(self, timeout: float | None = None) -> bool:
        """Wait like `threading.Event.wait`."""
        until_s = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left_s := until_s - time.monotonic()) > 0:
            self._cancel.wait(min(_TICK_S, left_s))
        return self.is_set()


class Stores:
    """The stores of a worker: the volume, and the container's own disk if the volume cannot be used."""

    def __init__(self, volume_path: Path, volume: Store | None, local: Store | None, *, require_volume: bool = False) -> None:
        self._volume_path = volume_path
        self._volume = volume
        self._local = None if require_volume else local
        self._said = False

    def ensure(self, spec: ModelSpec, progress: Listener = _ignore_progress, cancel: CancelToken | None = None) -> ReadyModel:
        """Like `Store.ensure`. A missing, full or read-only volume is no error while the container's disk can be used."""
        local = self._local
        if self._volume is None:
            if local is None:
                raise VolumeMissing(self._volume_path)
            self._say(no_volume(self._volume_path))
            return local.ensure(spec, progress, cancel)
        if local and local.ready(spec.folder, spec.name) and not self._volume.ready(spec.folder, spec.name):
            return local.ensure(spec, progress, cancel)
        try:
            return self._volume.ensure(spec, progress, cancel)
        except (VolumeFull, VolumeReadOnly) as exc:
            if local is None:
                raise
            refused = exc
        self._say(str(refused).removesuffix("."))
        try:
            return local.ensure(spec, progress, cancel)
        except (VolumeFull, VolumeReadOnly) as exc:
            # Prefer the volume's error: people can enlarge it or mount it in another way.
            raise refused.copy(container=exc) from exc

    def _say(self, reason: str) -> None:
        """Log this once: one look at the volume need not be repeated with each model."""
        if not self._said:
            self._said = True
            log.warning("%s. Models are kept on this container's disk and are lost with it.", reason)
