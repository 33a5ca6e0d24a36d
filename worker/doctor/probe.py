"""The checks of one volume, and their order. Touches the disk through them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from worker.doctor.downloads import downloads
from worker.doctor.exclusion import locks
from worker.doctor.lists import custom_nodes, host_cache, manifests
from worker.doctor.misplaced import misplaced
from worker.doctor.models import models
from worker.doctor.seals import seals
from worker.doctor.volume import silence, space, where, writable
from worker.store.pod_links import layout_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from worker.doctor.findings import Finding, FolderCount, Subject


class Probe:
    """The checks, each a generator of findings. They run in threads and share only immutable values."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.root = Path(subject.volume)
        self.answers = False
        self.folders: list[FolderCount] = []

    def volume(self) -> Iterator[Finding]:
        """Yield whether there is a volume, what it is, and whether it answers. The other checks require that it does."""
        silent = silence(self.root)
        if silent:
            yield silent
            return
        self.answers = True
        yield where(self.root, required=self.subject.require_volume)

    @property
    def checks(self) -> dict[str, Callable[[], Iterable[Finding]]]:
        """Return the checks of a volume that answers, in the order of the report. Reads a link on the volume."""
        layout, subject = layout_at(self.root), self.subject
        return {
            "space": partial(space, layout),
            "writable": partial(writable, layout),
            "locks": partial(locks, layout),
            "models": partial(models, layout, counted=self.folders.extend),
            "seals": partial(seals, layout),
            "misplaced": partial(misplaced, layout, Path(subject.comfyui_models)),
            "downloads": partial(downloads, layout),
            "manifests": partial(manifests, layout, subject),
            "host cache": partial(host_cache, layout),
            "custom nodes": partial(custom_nodes, layout),
        }
