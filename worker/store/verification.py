"""What a download must pass before it is published, on a disk or through S3, and the seal that records it. Pure."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from worker.errors import ContentMismatch, NotAFile
from worker.spec import HubFile
from worker.store.seals import Seal, seal_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.fetch.hub import RemoteFile
    from worker.spec import ModelSpec

log = logging.getLogger(__name__)

ATTEMPTS: Final = 3
"""How often a whole file is downloaded because it arrived wrong."""


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


def check_unhashed(remote: RemoteFile, misfit: str | None, stated_bytes: Callable[[], int | None]) -> None:
    """Verify a download without a hash: what the first bytes say it is (`misfit`), and the length that its header states.

    Raises `NotAFile` and `ContentMismatch`.
    """
    if misfit:
        raise NotAFile(remote.where, misfit)
    if remote.sha256 is not None:
        return
    stated = stated_bytes()
    if stated != remote.size_bytes:
        promised = "its safetensors header says" if stated is None else str(stated)
        raise ContentMismatch(remote.where, "size", promised, str(remote.size_bytes))


@dataclass(frozen=True, slots=True)
class SourceOrigin:
    """Where a verified file is from, for its seal. It contains no secret."""

    repo: str | None
    file: str

    @classmethod
    def of(cls, spec: ModelSpec) -> SourceOrigin:
        """Return the source, without secrets."""
        if isinstance(spec.source, HubFile):
            return cls(spec.source.repo, spec.source.path)
        return cls(None, str(spec.source))


def new_seal(spec: ModelSpec, remote: RemoteFile, sha256: str, by: str, mtime: int | None = None) -> Seal:
    """Return the seal of a file that passed verification. Through S3 nobody knows its `mtime`."""
    origin = SourceOrigin.of(spec)
    return Seal(
        size=remote.size_bytes,
        mtime=mtime,
        sha256=sha256,
        etag=remote.etag,
        repo=origin.repo,
        file=origin.file,
        commit=remote.commit,
        by=by,
        at=seal_time(),
    )
