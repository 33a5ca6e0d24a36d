"""Maintain a seeded volume: verify what is sealed, remove what no list names. Works through a `Volume`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from worker.errors import EnsureCancelled, SpecInvalid, WorkerError
from worker.spec import HubFile, ModelSpec, parse_source
from worker.store.inventory import Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Remote
    from worker.seed.s3_volume import Sealed
    from worker.store.inventory import Look
    from worker.store.seals import Seal

Verdict = Literal["whole", "touched", "damaged", "replaced", "missing", "unhashed", "unreadable"]


class Volume(Protocol):
    """A volume, mounted or through S3, as maintenance and the dry run see it."""

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

    def look(self, folder: str, name: str) -> Look:
        """Return the state of a model's file."""
        ...

    def expected(self, spec: ModelSpec, sha256: str | None) -> str | None:
        """Return the required hash of a file without a fitting seal, if its source says `sha256`. None if any file will do."""
        ...

    def begun_bytes(self, spec: ModelSpec, remote: Remote) -> int:
        """Return how much of it an interrupted run left behind."""
        ...

    def hash(self, folder: str, name: str, size_bytes: int, on_bytes: Callable[[int], None], cancel: CancelToken) -> str:
        """Return the sha256 of a file."""
        ...

    def sealed(self) -> Iterator[Sealed]:
        """Yield every model that has a seal."""
        ...

    def seal(self, folder: str, name: str, seal: Seal) -> None:
        """Seal a file in its current state."""
        ...

    def remove(self, folder: str, name: str) -> None:
        """Remove a model, then its seal."""
        ...


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of verifying one sealed model.

    `touched`: its mtime differs from the seal, its content does not; it was sealed again. `damaged`: size and time equal its
    seal, the content differs. `replaced`: size or time differ, and so does the content: it was put there by hand. `unhashed`:
    its seal has no sha256. `stamp` is that of the file that was read.
    """

    sealed: Sealed
    verdict: Verdict
    actual: str | None = None
    error: WorkerError | None = None
    stamp: object = None

    @property
    def good(self) -> bool:
        """Return whether a worker can trust it."""
        return self.verdict in {"whole", "touched", "unhashed"}

    def to_dict(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        seal = self.sealed.seal
        return {
            "model": self.sealed.title,
            "verdict": self.verdict,
            "size_bytes": seal.size,
            "sha256": seal.sha256,
            "actual_sha256": self.actual,
            "error": str(self.error) if self.error else None,
        }


def verify(volume: Volume, found: Sealed, on_bytes: Callable[[int], None], cancel: CancelToken) -> Checked:
    """Read the file and compare. Write only a seal, and only for a right file. Raises `EnsureCancelled`."""
    try:
        there = volume.look(found.folder, found.name)
        if there.standing is Standing.ABSENT:
            return Checked(found, "missing")
        if there.size_bytes != found.seal.size:
            return Checked(found, "replaced", f"{there.size_bytes} bytes", stamp=there.stamp)
        if found.seal.sha256 is None:
            return Checked(found, "unhashed" if there.standing is Standing.READY else "replaced", stamp=there.stamp)
        return _compare(volume, found, there, on_bytes, cancel)
    except EnsureCancelled:
        raise
    except WorkerError as exc:
        return Checked(found, "unreadable", error=exc)


def _compare(volume: Volume, found: Sealed, there: Look, on_bytes: Callable[[int], None], cancel: CancelToken) -> Checked:
    if there.standing is Standing.READY and there.error:
        return Checked(found, "damaged", error=there.error, stamp=there.stamp)
    actual = volume.hash(found.folder, found.name, found.seal.size, on_bytes, cancel)
    is_ready = there.standing is Standing.READY
    if actual == found.seal.sha256:
        if not is_ready:
            volume.seal(found.folder, found.name, found.seal)
        return Checked(found, "whole" if is_ready else "touched", actual)
    changed = volume.look(found.folder, found.name).stamp != there.stamp  # while it was read
    return Checked(found, "damaged" if is_ready and not changed else "replaced", actual, stamp=there.stamp)


def repair_spec(found: Sealed, known: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """Return the source for a damaged model: its seal's commit, a list, or any address in its seal. None without one.

    The commit comes first, because a list without a pin may mean a newer file by now. If the list has another source, the list
    comes first.
    """
    own, listed = _sealed_spec(found), known.get(found.title)
    if listed is None or (own and found.seal.commit and _is_same_origin(own, listed)):
        return own
    return listed


def _is_same_origin(own: ModelSpec, listed: ModelSpec) -> bool:
    """Return whether a list means the sealed file, at any revision."""
    if not (isinstance(own.source, HubFile) and isinstance(listed.source, HubFile)) or listed.sha256 not in {None, own.sha256}:
        return False
    return (own.source.repo, own.source.path) == (listed.source.repo, listed.source.path)


def _sealed_spec(found: Sealed) -> ModelSpec | None:
    seal = found.seal
    try:
        if seal.repo and seal.file:
            source = HubFile(seal.repo, seal.file, seal.commit or "main")
            return ModelSpec(found.folder, found.name, source, seal.sha256, seal.size or None)
        if seal.file:
            return ModelSpec(found.folder, found.name, parse_source(seal.file), seal.sha256, seal.size or None)
    except SpecInvalid:
        return None
    return None


def unnamed(volume: Volume, named: Collection[str]) -> list[Sealed]:
    """Return the sealed models that none of these `folder/name`s is, without files that no longer fit their seal.

    `?/name` is a name that may be in any folder.
    """
    sealed = [found for found in volume.sealed() if not {found.title, f"?/{found.name}"} & set(named)]
    return [found for found in sealed if is_as_sealed(volume, found)]


def is_as_sealed(volume: Volume, found: Sealed) -> bool:
    """Return whether the file still fits its seal."""
    return volume.look(found.folder, found.name).standing is Standing.READY
