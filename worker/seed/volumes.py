"""A volume as the seeder sees it, and one that is mounted here. Touches the disk."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from worker.base.files import free_bytes
from worker.base.text import unicode_forms
from worker.errors import UnsafePath, VolumeFailed, volume_error
from worker.plan.places import Places
from worker.store.hashing import sha256_of
from worker.store.inventory import InventoryEntry, Standing, look_up_file
from worker.store.layout import split_title
from worker.store.seals import Seal, SealedModel, read_seal, sealed_titles, stat_file, whole_mtime, write_seal
from worker.volume_workflows import workflow_bytes, workflow_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.base.progress import CancelToken
    from worker.fetch.hub import RemoteFile
    from worker.model_spec import ModelSpec
    from worker.store.layout import Layout


class SeedVolume(Protocol):
    """A volume as maintenance and the dry run see it, mounted or through S3."""

    @property
    def title(self) -> str:
        """Return the volume's name for people."""
        ...

    @property
    def free_bytes(self) -> int | None:
        """Return the free bytes, or None if unknown."""
        ...

    def workflow(self, name: str) -> bytes | None:
        """Return the file of a workflow of this name. None if there is none, or if the name is impossible."""
        ...

    def workflow_names(self) -> list[str]:
        """Return the names of its workflows."""
        ...

    def look(self, folder: str, name: str) -> InventoryEntry:
        """Return the state of a model's file."""
        ...

    def expected(self, spec: ModelSpec, sha256: str | None) -> str | None:
        """Return the required hash of a file without a fitting seal, if its source says `sha256`. None if any file will do."""
        ...

    def begun_bytes(self, spec: ModelSpec, remote: RemoteFile) -> int:
        """Return how much of it an interrupted run left behind."""
        ...

    def hash(self, folder: str, name: str, size_bytes: int, on_bytes: Callable[[int], None], cancel: CancelToken) -> str:
        """Return the sha256 of a file."""
        ...

    def sealed(self) -> Iterator[SealedModel]:
        """Yield every model that has a seal."""
        ...

    def seal(self, folder: str, name: str, seal: Seal) -> None:
        """Seal a file in its current state."""
        ...

    def remove(self, folder: str, name: str) -> None:
        """Remove a model, then its seal."""
        ...


class MountedVolume:
    """A volume of the seeder that is mounted here. Raises `VolumeReadOnly` and `VolumeFailed` if the file system refuses."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._places = Places(layout, layout, layout.models)

    @property
    def title(self) -> str:
        """Return the volume's name for people."""
        return str(self._layout.root)

    @property
    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system. A quota is not included."""
        return free_bytes(self._layout.root)

    def workflow(self, name: str) -> bytes | None:
        """Return the file of a workflow of this name. None if there is none, or if the name is impossible."""
        with contextlib.suppress(UnsafePath):
            return workflow_bytes(self._layout.root, name)
        return None

    def workflow_names(self) -> list[str]:
        """Return the names of its workflows."""
        return workflow_names(self._layout.root)

    def look(self, folder: str, name: str) -> InventoryEntry:
        """Return the state of a model's file."""
        looks = (look_up_file(self._layout, folder, form) for form in unicode_forms(name))
        return next((found for found in looks if found.standing is not Standing.ABSENT), InventoryEntry(Standing.ABSENT))

    @staticmethod
    def expected(spec: ModelSpec, sha256: str | None) -> str | None:
        """Return the required hash of a file without a fitting seal: the model's own, as in the worker's store."""
        del sha256
        return spec.sha256

    def begun_bytes(self, spec: ModelSpec, remote: RemoteFile) -> int:
        """Return how much of it an interrupted download left behind."""
        del spec
        return self._places.begun_bytes(remote)

    def hash(self, folder: str, name: str, size_bytes: int, on_bytes: Callable[[int], None], cancel: CancelToken) -> str:
        """Return the sha256 of a file."""
        del size_bytes
        path = self._layout.model(folder, name)
        try:
            return sha256_of(path, cancel, on_bytes)
        except OSError as exc:
            raise VolumeFailed(path, exc.strerror or str(exc)) from exc

    def sealed(self) -> Iterator[SealedModel]:
        """Yield every model that has a seal."""
        for title, path in sealed_titles(self._layout):
            folder, name = split_title(title)
            with contextlib.suppress(UnsafePath):
                self._layout.model(folder, name)
                if seal := read_seal(path):
                    yield SealedModel(folder, name, seal)

    def seal(self, folder: str, name: str, seal: Seal) -> None:
        """Seal a file in its current state."""
        there = stat_file(self._layout.model(folder, name))
        if there:
            write_seal(self._layout.seal(folder, name), replace(seal, size=there.st_size, mtime=whole_mtime(there)))

    def remove(self, folder: str, name: str) -> None:
        """Remove a model, then its seal."""
        try:
            self._layout.model(folder, name).unlink(missing_ok=True)
            self._layout.seal(folder, name).unlink(missing_ok=True)
        except OSError as exc:
            raise volume_error(self._layout.root, exc) from exc
