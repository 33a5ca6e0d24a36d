"""The models a job names, made visible to ComfyUI: found, fetched where missing, linked. Touches disk and network.

What fetches is built when the first model has to be fetched: a worker whose models are all there never imports it.
"""

from __future__ import annotations

import contextlib
import logging
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from worker.models.disk import check_whole
from worker.models.provision import Provisioner

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from worker.models.download import Ready
    from worker.models.links import ModelLinks
    from worker.models.progress import CancelToken
    from worker.models.provision import Ensurer, Waiting
    from worker.models.sources import Sources
    from worker.models.spec import ModelSpec

log = logging.getLogger(__name__)

Name = tuple[tuple[str, ...], tuple[str, ...]]
"""The folders a loader reads (none: any), and the file names that satisfy it, in the order to try."""


class Supply:
    """Joins what is on the volume, who knows where a model comes from, and the fetching of it. Safe to use from any thread."""

    def __init__(
        self,
        models_dir: Path,
        links: ModelLinks,
        read_sources: Callable[[], Sources],
        build_store: Callable[[], Ensurer],
        hosts: Collection[str],
    ) -> None:
        self._models_dir = models_dir
        self._links = links
        self._read_sources = read_sources
        self._build_store = build_store
        self._hosts = hosts
        self._lock = threading.Lock()
        self._sources: Sources | None = None
        self._whole: dict[Path, tuple[int, int]] = {}
        self._provisioner: Provisioner | None = None

    def missing(self, names: Sequence[Name]) -> list[Name]:
        """Those of the names that no folder has, also not after a fresh look at the volume.

        Raises `FileIncomplete` for one that is there and shorter than its own header says: somebody's copy that is under way
        or was cut off, which ComfyUI would report as a defect of the node.
        """
        absent = [name for name in names if not self._is_there(name)]
        if absent:
            self._links.refresh()
        for path in self.located(names):
            self._check_whole(path)
        return [name for name in absent if not self._is_there(name)]

    def located(self, names: Iterable[Name]) -> list[Path]:
        """The files that ComfyUI would read for these names, in their order; names that no folder has are left out."""
        found = (next((path for file in files if (path := self._links.find(folders, file))), None) for folders, files in names)
        return [Path(path) for path in found if path]

    def specs(self, names: Sequence[Name], request: object, embedded: object) -> dict[Name, ModelSpec | None]:
        """What each name means: to this job's `models`, its workflow's metadata, the manifests, the catalogue, in that order.

        None for a name that nobody knows. Raises a `RequestError` for models that the request may not ask for,
        `AmbiguousModel`, and `ManifestInvalid` when models.toml changed and is wrong.
        """
        sources = self._current_sources().with_request(request, self._hosts).with_workflow(embedded, self._hosts)
        return {
            (folders, files): next((spec for file in files if (spec := sources.find(file, folders))), None)
            for folders, files in names
        }

    def check_request(self, request: object) -> None:
        """Refuse a request's `models` that are wrong, whether or not they are needed. Raises a `RequestError`."""
        self._current_sources().with_request(request, self._hosts)

    def fetch(self, specs: Sequence[ModelSpec], cancel: CancelToken, on_progress: Callable[[Waiting], None]) -> None:
        """Return when all of them are there and linked. Raises a `ModelError`, or `EnsureCancelled`."""
        self._fetcher().wait(specs, cancel, on_progress)
        self._links.refresh()

    def manifest(self) -> tuple[ModelSpec, ...]:
        """What the operator's manifests name. Raises `ManifestInvalid`."""
        return self._current_sources().manifest()

    def fetch_behind(self, specs: Sequence[ModelSpec]) -> None:
        """Have these fetched while jobs run."""
        self._fetcher().want(specs)

    def fetch_first(self, specs: Sequence[ModelSpec]) -> None:
        """Return when all of them are there. Raises the first `ModelError`."""
        self._fetcher().settle(specs)

    def stop(self) -> None:
        """End all fetching; what is half there is gone on with by the next worker."""
        if self._provisioner:
            self._provisioner.stop()

    def _check_whole(self, path: Path) -> None:
        """Once for each file that was found whole, while it stays the same: under a millisecond on a disk."""
        with contextlib.suppress(OSError):  # ComfyUI will say what it cannot read
            found = path.stat()
            seen = found.st_size, found.st_mtime_ns
            if self._whole.get(path) != seen and stat.S_ISREG(found.st_mode):
                check_whole(path.resolve(), found.st_size)
                self._whole[path] = seen

    def _is_there(self, name: Name) -> bool:
        folders, files = name
        return any(self._links.has(folders, file) for file in files)

    def _current_sources(self) -> Sources:
        with self._lock:
            self._sources = self._sources.refreshed() if self._sources else self._read_sources()
            return self._sources

    def _fetcher(self) -> Provisioner:
        with self._lock:
            if self._provisioner is None:
                self._provisioner = Provisioner(self._build_store(), self._on_ready)
            return self._provisioner

    def _on_ready(self, spec: ModelSpec, ready: Ready) -> None:
        """Show ComfyUI what lies outside the folders that are linked as a whole: RunPod's cache on the host."""
        if ready.how != "host_cache":
            self._links.refresh()
            return
        link = self._models_dir / spec.folder / spec.name
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(ready.path)
