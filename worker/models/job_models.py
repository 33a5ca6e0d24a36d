"""The models a job names, made visible to ComfyUI: found, fetched where missing, linked. Touches disk and network.

What fetches is built when the first model has to be fetched: a worker whose models are all there never imports it.
"""

from __future__ import annotations

import contextlib
import logging
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from worker.base.text import form_of, forms
from worker.errors import EnsureCancelled, FileIncomplete, ManifestInvalid
from worker.models.download_queue import Provisioner
from worker.store.disk import volume_error
from worker.store.inventory import lacking, trouble_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from worker.base.progress import CancelToken
    from worker.links.model_links import Found, ModelLinks
    from worker.models.download_queue import Ensurer, Waiting
    from worker.models.sources import Sources
    from worker.spec import ModelSpec
    from worker.store.download import Ready
    from worker.store.layout import Layout

log = logging.getLogger(__name__)

Name = tuple[tuple[str, ...], tuple[str, ...]]
"""The folders a loader reads (none: any), and the file names that satisfy it, in the order to try."""


class Supply:
    """Joins what is on the volume, who knows where a model comes from, and the fetching of it. Safe to use from any thread.

    `places` are where models may lie, in the order they are asked. `nearer` is the root that `links` has before all others:
    this container's own, for what lies outside the places.
    """

    def __init__(
        self,
        links: ModelLinks,
        places: Sequence[Layout],
        nearer: Path,
        read_sources: Callable[[], Sources],
        build_store: Callable[[], Ensurer],
        *,
        hosts: Collection[str] = (),
    ) -> None:
        self._links = links
        self._places = places
        self._nearer = nearer
        self._read_sources = read_sources
        self._build_store = build_store
        self._hosts = hosts
        self._lock = threading.Lock()
        self._sources: Sources | None = None
        self._whole: dict[str, tuple[int, int]] = {}
        self._provisioner: Provisioner | None = None
        self._stopped = False

    def missing(self, names: Sequence[Name]) -> list[Name]:
        """Those of the names that no folder has, also not after a fresh look at the volume.

        Raises `FileUnusable` for one that is there and shorter than its own header says: somebody's copy that is under way
        or was cut off, which ComfyUI would report as a defect of the node.
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
        """The files that ComfyUI would read for these names, in their order; names that no folder has are left out."""
        return [Path(there.path) for name in names if (there := self._find(name))]

    def respelled(self, names: Iterable[Name]) -> dict[Name, Literal["NFC", "NFD"]]:
        """How accents are written in the files that are there for these names, where a name writes them in the other way."""
        found = {(folders, files): self._find((folders, files)) for folders, files in names}
        own = {name: there for name, there in found.items() if there and not there.path.endswith(name[1])}
        return {name: form_of(there.path) for name, there in own.items()}

    def specs(
        self,
        names: Sequence[Name],
        request: object,
        embedded: object,
        *,
        optional: Collection[Name] = (),
        guessed: Collection[Name] = (),
    ) -> dict[Name, ModelSpec | None]:
        """What each name means: to this job's `models`, its workflow's metadata, the manifests, the catalogue, in that order.

        None for a name that nobody knows. For `guessed` see `Sources.find`. Raises a `RequestError` for models that the request
        may not ask for, `AmbiguousModel`, and `ManifestInvalid` for a name that only a manifest with a mistake may know, unless
        it is optional.
        """
        sources = self._current_sources().with_request(request, self._hosts).with_workflow(embedded, self._hosts)
        return {name: _meaning(sources, name, needed=name not in optional, guessed=name in guessed) for name in names}

    def check_request(self, request: object) -> None:
        """Refuse a request's `models` that are wrong, whether or not they are needed. Raises a `RequestError`."""
        self._current_sources().with_request(request, self._hosts)

    def fetch(self, specs: Sequence[ModelSpec], cancel: CancelToken, on_progress: Callable[[Waiting], None]) -> None:
        """Return when all of them are there and linked. Raises a `ModelError`, or `EnsureCancelled`."""
        self._fetcher(specs).wait(specs, cancel, on_progress)
        self._links.refresh()

    def manifest(self) -> tuple[ModelSpec, ...]:
        """What the operator's manifests name; a mistake in one of them is in the log, once, and costs what that one names."""
        return self._current_sources().manifest()

    def check_manifests(self) -> None:
        """Raises `ManifestInvalid` when there is a mistake in a manifest."""
        sources = self._current_sources()
        for error in (*sources.errors, *sources.odd):
            raise error.copy()

    def fetch_behind(self, specs: Iterable[ModelSpec]) -> None:
        """Have those of these that are not there fetched while jobs run."""
        if left := lacking(self._places, specs):
            self._fetcher(left).want(left)

    def fetch_first(self, specs: Iterable[ModelSpec]) -> None:
        """Return when all of them are there. Raises the first `ModelError`."""
        if left := lacking(self._places, specs):
            self._fetcher(left).settle(left)

    def stop(self) -> None:
        """End all fetching and begin none; what is half there is gone on with by the next worker."""
        with self._lock:
            self._stopped = True
            if self._provisioner:
                self._provisioner.stop()

    def _find(self, name: Name) -> Found | None:
        folders, files = name
        named = (form for file in files for form in forms(file))
        return next((there for file in named if (there := self._links.find(folders, file))), None)

    def _check_whole(self, there: Found) -> None:
        """Once for each file that was found whole, while it stays the same: under a millisecond on a disk."""
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

    def _fetcher(self, specs: Sequence[ModelSpec]) -> Provisioner:
        with self._lock:
            if self._stopped:
                raise EnsureCancelled(specs[0].name)
            if self._provisioner is None:
                self._provisioner = Provisioner(self._build_store(), self._on_ready)
            return self._provisioner

    def _on_ready(self, spec: ModelSpec, ready: Ready) -> None:
        """Show ComfyUI what it does not see yet; a look at all folders for each file that is there would be one too many."""
        if ready.how == "host_cache":
            self._show(spec, ready.path)
        elif ready.how != "downloaded" and self._links.has((spec.folder,), spec.name):
            return
        self._links.refresh()

    def _show(self, spec: ModelSpec, path: Path) -> None:
        """Link what lies on this machine alone into the container's own root: on the volume it would be broken for others."""
        link = self._nearer / spec.folder / spec.name
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                link.symlink_to(path)
        except OSError as exc:
            raise volume_error(self._nearer, exc) from exc


def _meaning(sources: Sources, name: Name, *, needed: bool, guessed: bool) -> ModelSpec | None:
    folders, files = name
    wrong: ManifestInvalid | None = None
    for file in (form for name in files for form in forms(name)):
        try:
            if spec := sources.find(file, folders, guessed=guessed):
                return spec
        except ManifestInvalid as error:  # another spelling may be known to a list that is right
            wrong = error
    if wrong and needed:
        raise wrong
    return None
