"""What a volume that was seeded needs later: verify what is sealed, remove what no list names. Through a `Volume`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from worker.errors import EnsureCancelled, SpecInvalid, WorkerError
from worker.models.spec import HubFile, ModelSpec, parse_source

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from worker.models.hub import Remote
    from worker.models.progress import CancelToken
    from worker.models.seals import Seal
    from worker.seed.outcome import How
    from worker.seed.s3volume import Sealed

Verdict = Literal["whole", "touched", "damaged", "missing", "unhashed", "unreadable"]


class Volume(Protocol):
    """A volume, mounted or through S3, as upkeep and the dry run see it."""

    @property
    def title(self) -> str:
        """What people call it."""
        ...

    @property
    def free_bytes(self) -> int | None:
        """What is free, where that can be known."""
        ...

    def look(self, spec: ModelSpec, sha256: str | None, size_bytes: int | None) -> How | None:
        """Whether the model is there to be used."""
        ...

    def begun_bytes(self, spec: ModelSpec, remote: Remote) -> int:
        """How much of it is there of a run that ended."""
        ...

    def size_bytes(self, folder: str, name: str) -> int | None:
        """A file's length; None when it is not there."""
        ...

    def hash(self, folder: str, name: str, size_bytes: int, on_bytes: Callable[[int], None], cancel: CancelToken) -> str:
        """The sha256 of a file."""
        ...

    def sealed(self) -> Iterator[Sealed]:
        """Every model that has a seal."""
        ...

    def fits(self, found: Sealed) -> bool:
        """Whether its seal still is about the file."""
        ...

    def seal(self, folder: str, name: str, seal: Seal) -> None:
        """Seal a file as it is now."""
        ...

    def remove(self, folder: str, name: str) -> None:
        """Remove a model, then its seal."""
        ...


@dataclass(frozen=True, slots=True)
class Checked:
    """What one sealed model turned out to be.

    `touched`: its mtime is another one, its content is not; it was sealed anew. `unhashed`: its seal knows no sha256.
    """

    sealed: Sealed
    verdict: Verdict
    actual: str | None = None
    error: WorkerError | None = None

    @property
    def good(self) -> bool:
        """Whether a worker can trust it."""
        return self.verdict in {"whole", "touched", "unhashed"}

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
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
    """Read the file and compare; only a seal is written, and only for a file that is right. Raises `EnsureCancelled`."""
    try:
        size_bytes = volume.size_bytes(found.folder, found.name)
        if size_bytes is None:
            return Checked(found, "missing")
        if size_bytes != found.seal.size:
            return Checked(found, "damaged", f"{size_bytes} bytes")
        if found.seal.sha256 is None:
            return Checked(found, "unhashed")
        return _compare(volume, found, on_bytes, cancel)
    except EnsureCancelled:
        raise
    except WorkerError as exc:
        return Checked(found, "unreadable", error=exc)


def _compare(volume: Volume, found: Sealed, on_bytes: Callable[[int], None], cancel: CancelToken) -> Checked:
    actual = volume.hash(found.folder, found.name, found.seal.size, on_bytes, cancel)
    if actual != found.seal.sha256:
        return Checked(found, "damaged", actual)
    if volume.fits(found):
        return Checked(found, "whole", actual)
    volume.seal(found.folder, found.name, found.seal)
    return Checked(found, "touched", actual)


def repair_spec(found: Sealed, known: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """Where to fetch a damaged model from: what a list says, else what its seal does; None when neither knows."""
    if spec := known.get(found.title):
        return spec
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
    """The sealed models that none of these `folder/name`s is, each still what its seal says: what was put there is left out.

    `?/name` is a name that may be in any folder.
    """
    sealed = [found for found in volume.sealed() if not {found.title, f"?/{found.name}"} & set(named)]
    return [found for found in sealed if volume.fits(found)]
