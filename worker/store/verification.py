"""What a download must pass before it is published, on a disk or through S3. Pure."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from worker.errors import ContentMismatch, NotAFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.fetch.hub import RemoteFile

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
