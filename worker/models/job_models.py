"""Make a job's models visible to ComfyUI: find them, download missing ones, link them. Touches disk and network.

The downloader is built when the first model must be downloaded: a worker whose models are all present never imports it.
"""

from __future__ import annotations

import contextlib
import logging
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from worker.base.text import unicode_form, unicode_forms
from worker.errors import EnsureCancelled, FileIncomplete, ManifestInvalid, volume_error
from worker.model_spec import WEIGHT_SUFFIXES
from worker.models.download_queue import DownloadQueue
from worker.store.inventory import not_ready, trouble_of
from worker.store.seals import redownload_spec
from worker.store.tombstones import removed_folders, tombstone_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from contextlib import AbstractContextManager

    from worker.base.progress import CancelToken
    from worker.links.model_links import ModelLinks, VisibleFile
    from worker.model_spec import ModelSpec
    from worker.models.download_queue import Ensurer, JobWait
    from worker.models.sources import Sources
    from worker.store.download import ReadyModel
    from worker.store.layout import Layout
    from worker.store.leases import JobUse, Leases

log = logging.getLogger(__name__)

Name = tuple[tuple[str, ...], tuple[str, ...]]
"""The folders that a loader reads (none: any), and the file names that satisfy it, in the order to try."""


class JobModels:
    """Makes the models of jobs available: joins the volume, the lists, and the downloads. Safe to use from any thread.

    `places` are where models may lie, in the order in which they are asked. `host_cache` is the root that `links` has before
    all others: this container's own, for files outside the places.
    """

    def __init__(
        self,
        links: ModelLinks,
        places: Sequence[Layout],
        host_cache: Path,
        read_sources: Callable[[], Sources],
        build_store: Callable[[], Ensurer],
        *,
        hosts: Collection[str] = (),
        leases: Leases | None = None,
    ) -> None:
        self._leases = leases
        self._links = links
        self._places = places
        self._host_cache = host_cache
        self._read_sources = read_sources
        self._build_store = build_store
        self._hosts = hosts
        self._lock = threading.Lock()
        self._sources: Sources | None = None
        self._whole: dict[str, tuple[int, int]] = {}
        self._provisioner: DownloadQueue | None = None
        self._stopped = False

    def use(self) -> AbstractContextManager[JobUse | None]:
        """Return what protects a job's models from removal until it ends. None where nothing is removed."""
        return self._leases.job() if self._leases else contextlib.nullcontext()

    def missing(self, names: Sequence[Name]) -> list[Name]:
        """Return the names that no folder has, even after a fresh look at the volume.

        Raises `FileUnusable` for a file that is shorter than its own header says: a copy that is unfinished or was cut off,
        which ComfyUI would report as a defect of the node.
        """
        found = {name: self._find(name) for name in names}
        if None in found.values():
            self._links.refresh()
            found = {name: there or self._find(name) for name, there in found.items()}
        for there in found.values():
            if there:
                self._check_whole(there)
        return [name for name, there in found.items() if there is None]

    def located(self, names: Iterable[Name]) -> list[Path]:
        """Return the files that ComfyUI would read for these names, in order. Leave out names that no folder has."""
        return [Path(there.path) for name in names if (there := self._find(name))]

    def is_model(self, name: str) -> bool:
        """Return whether any of the folders has a model with this name."""
        return name.lower().endswith(WEIGHT_SUFFIXES) and self._find(((), (name,))) is not None

    def respelled(self, names: Iterable[Name]) -> dict[Name, Literal["NFC", "NFD"]]:
        """Return the form of accents in existing files, for names that use the other form."""
        found = {(folders, files): self._find((folders, files)) for folders, files in names}
        own = {name: there for name, there in found.items() if there and not there.path.endswith(name[1])}
        return {name: unicode_form(there.path) for name, there in own.items()}

    def specs(
        self,
        names: Sequence[Name],
        request: object,
        embedded: object,
        *,
        optional: Collection[Name] = (),
        guessed: Collection[Name] = (),
    ) -> dict[Name, ModelSpec | None]:
        """Return the meaning of each name: from the job's `models`, its workflow's metadata, the manifests or the catalogue.

        None for an unknown name. For `guessed` see `Sources.find`. Raises a `RequestError` for models that the request may not
        ask for, `AmbiguousModel`, and `ManifestInvalid` for a name that only a broken manifest may know, unless it is optional.
        """
        sources = self._current_sources().with_request(request, self._hosts).with_workflow(embedded, self._hosts)
        return {
            name: _meaning(sources, name, needed=name not in optional, guessed=name in guessed) or self._removed(name)
            for name in names
        }

    def _removed(self, name: Name) -> ModelSpec | None:
        """Return where a model comes from that was here and was removed to make room."""
        folders, files = name
        named = [form for file in files for form in unicode_forms(file)]
        for layout in self._places:
            for folder in folders or removed_folders(layout):
                for file in named:
                    if there := tombstone_of(layout, folder, file):
                        return redownload_spec(there.title, there.seal)
        return None

    def check_request(self, request: object) -> None:
        """Refuse a request's `models` that are wrong, whether or not they are needed. Raises a `RequestError`."""
        self._current_sources().with_request(request, self._hosts)

    def fetch(self, specs: Sequence[ModelSpec], cancel: CancelToken, on_progress: Callable[[JobWait], None]) -> None:
        """Return when all of them are available and linked. Raises a `ModelError`, or `EnsureCancelled`."""
        self._fetcher(specs).wait(specs, cancel, on_progress)
        self._links.refresh()

    def manifest(self) -> tuple[ModelSpec, ...]:
        """Return the models of the operator's manifests. A broken manifest is logged once and left out."""
        return self._current_sources().manifest()

    def check_manifests(self) -> None:
        """Raise `ManifestInvalid` if a manifest has a mistake."""
        sources = self._current_sources()
        for error in (*sources.errors, *sources.odd):
            raise error.copy()

    def fetch_behind(self, specs: Iterable[ModelSpec]) -> None:
        """Download the missing ones in the background."""
        if left := not_ready(self._places, specs):
            self._fetcher(left).want(left)

    def fetch_first(self, specs: Iterable[ModelSpec]) -> None:
        """Return when all of them are available. Raises the first `ModelError`."""
        if left := not_ready(self._places, specs):
            self._fetcher(left).settle(left)

    def stop(self) -> None:
        """End all downloads and begin none. The next worker resumes partial ones."""
        with self._lock:
            self._stopped = True
            if self._provisioner:
                self._provisioner.stop()

    def _find(self, name: Name) -> VisibleFile | None:
        folders, files = name
        named = (form for file in files for form in unicode_forms(file))
        return next((there for file in named if (there := self._links.find(folders, file))), None)

    def _check_whole(self, there: VisibleFile) -> None:
        """Check each found file once while it stays the same: under a millisecond on a disk."""
        seen = there.info.st_size, there.info.st_mtime_ns
        if self._whole.get(there.path) != seen and stat.S_ISREG(there.info.st_mode):
            error = trouble_of(Path(there.path).resolve(), there.info.st_size)
            if isinstance(error, FileIncomplete):
                raise error
            if error is None:  # ComfyUI will say what it cannot read
                self._whole[there.path] = seen

    def _current_sources(self) -> Sources:
        with self._lock:
            known = (*self._sources.errors, *self._sources.odd) if self._sources else ()
            self._sources = self._sources.refreshed() if self._sources else self._read_sources()
            for error in (*self._sources.errors, *self._sources.odd):
                if error not in known:
                    log.error("%s", error)
            return self._sources

    def _fetcher(self, specs: Sequence[ModelSpec]) -> DownloadQueue:
        with self._lock:
            if self._stopped:
                raise EnsureCancelled(specs[0].name)
            if self._provisioner is None:
                self._provisioner = DownloadQueue(self._build_store(), self._on_ready)
            return self._provisioner

    def _on_ready(self, spec: ModelSpec, ready: ReadyModel) -> None:
        """Show ComfyUI a model that it does not see yet. Do not list all folders again for each file."""
        if ready.how == "host_cache":
            self._show(spec, ready.path)
        elif ready.how != "downloaded" and self._links.has((spec.folder,), spec.name):
            return
        self._links.refresh()

    def _show(self, spec: ModelSpec, path: Path) -> None:
        """Link a file of this machine into the container's own root: on the volume the link would be broken for others."""
        link = self._host_cache / spec.folder / spec.name
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                link.symlink_to(path)
        except OSError as exc:
            raise volume_error(self._host_cache, exc) from exc


def _meaning(sources: Sources, name: Name, *, needed: bool, guessed: bool) -> ModelSpec | None:
    folders, files = name
    wrong: ManifestInvalid | None = None
    for file in (form for name in files for form in unicode_forms(name)):
        try:
            if spec := sources.find(file, folders, guessed=guessed):
                return spec
        except ManifestInvalid as error:  # a valid list may know another spelling
            wrong = error
    if wrong and needed:
        raise wrong
    return None
