"""A volume through its S3 API, with the worker's own layout, seals and checks. Touches the network.

Keys are the paths on the mounted volume. Over S3 nobody can set a file's mtime, or be sure to read the one that a mount shows,
so a seal from here has `mtime: null`: the first worker that sees the file compares its size and header, and fills the mtime in.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.errors import EnsureCancelled, S3Failed, S3FileDiffers
from worker.models.download import Origin
from worker.models.layout import Layout
from worker.models.seals import Seal, decode_seal, encode_seal, now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.models.hub import Remote
    from worker.models.progress import CancelToken
    from worker.models.spec import ModelSpec
    from worker.seed.bucket import Bucket
    from worker.seed.outcome import How

log = logging.getLogger(__name__)

_READ_BYTES: Final = 8 * 1024 * 1024
_SEAL_BYTES: Final = 64 * 1024
_LAYOUT: Final = Layout(Path())


@dataclass(frozen=True, slots=True)
class Sealed:
    """A model that has a seal."""

    folder: str
    name: str
    seal: Seal

    @property
    def title(self) -> str:
        """The model as people write it."""
        return f"{self.folder}/{self.name}"


def sealed_at(path: str, seal: Seal | None) -> Sealed | None:
    """What a seal's path below the seals' folder is about: `folder/name.json`."""
    folder, _, name = path.partition("/")
    if seal is None or not name.endswith(".json") or name.rpartition("/")[2].startswith("."):
        return None
    return Sealed(folder, name.removesuffix(".json"), seal)


class S3Volume:
    """One volume. Its errors are those of `Bucket`."""

    free_bytes: int | None = None
    """The API does not tell."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    @property
    def title(self) -> str:
        """What people call it."""
        return self.bucket.place.title

    def key(self, folder: str, name: str) -> str:
        """A model's file."""
        return _LAYOUT.model(folder, name).as_posix()

    # --- what is there

    def look(self, spec: ModelSpec, sha256: str | None, size_bytes: int | None) -> How | None:
        """Whether the model is there to be used: `ready`, `by_hand`, or None when it is not there at all.

        `by_hand` is also what has to be hashed before it can be sealed: see `adopt`. Raises `S3FileDiffers` when the file is
        another one than this sha256 or length.
        """
        found = self.size_bytes(spec.folder, spec.name)
        if found is None:
            return None
        seal = self._seal(_LAYOUT.seal(spec.folder, spec.name))
        if seal and seal.size == found:
            self._check(spec, "sha256", sha256, seal.sha256)
            return "ready"
        if size_bytes is not None and sha256 is not None:
            self._check(spec, "size", str(size_bytes), str(found))
        return "by_hand"

    def _check(self, spec: ModelSpec, what: str, expected: str | None, actual: str | None) -> None:
        if expected and actual and expected != actual:
            raise S3FileDiffers(self.key(spec.folder, spec.name), what, expected, actual)

    def size_bytes(self, folder: str, name: str) -> int | None:
        """The file's length; None when it is not there."""
        return self.bucket.size_bytes(self.key(folder, name))

    def adopt(self, spec: ModelSpec, remote: Remote, on_bytes: Callable[[int], None], cancel: CancelToken) -> How:
        """Seal a file that has no seal, if it is what it should be; one that nobody knows the sha256 of is left as it is.

        A run that died between Complete and seal left its record: it is believed. Any other file is read over the network.
        """
        found = self.size_bytes(spec.folder, spec.name) or 0
        record = self._seal(_LAYOUT.pending_seal(spec.folder, spec.name))
        if record and record.size == found and record.sha256 and remote.sha256 in {None, record.sha256}:
            self.seal(spec.folder, spec.name, record)
            return "adopted"
        if remote.sha256 is None:
            return "by_hand"
        actual = self.hash(spec.folder, spec.name, found, on_bytes, cancel)
        self._check(spec, "sha256", remote.sha256, actual)
        self.seal(spec.folder, spec.name, new_seal(spec, remote, actual, "seeder"))
        return "adopted"

    def begun_bytes(self, spec: ModelSpec, remote: Remote) -> int:
        """What unfinished uploads of the model have, the fullest of them."""
        del remote
        key = self.key(spec.folder, spec.name)
        sizes = [
            sum(part.size_bytes for part in self.bucket.parts(key, upload).values()) for upload in self.bucket.uploads(key)
        ]
        return max(sizes, default=0)

    def hash(self, folder: str, name: str, size_bytes: int, on_bytes: Callable[[int], None], cancel: CancelToken) -> str:
        """The sha256 of a file, read over the network."""
        digest, at, key = hashlib.sha256(), 0, self.key(folder, name)
        while at < size_bytes:
            if cancel.is_set():
                raise EnsureCancelled(key)
            data = self.bucket.read(key, at, _READ_BYTES)
            if not data:
                raise S3Failed(self.title, f"GetObject of {key}", f"it ends at {at} of {size_bytes} bytes")
            digest.update(data)
            at += len(data)
            on_bytes(at)
        return digest.hexdigest()

    def manifest(self) -> bytes | None:
        """`models.toml`, if there is one."""
        found = io.BytesIO()
        key = _LAYOUT.manifest.as_posix()
        while data := self.bucket.read(key, found.tell(), _READ_BYTES):
            found.write(data)
            if len(data) < _READ_BYTES:
                break
        return found.getvalue() or None

    # --- seals

    def sealed(self) -> Iterator[Sealed]:
        """Every model that has a seal; the folders of models themselves are not listed."""
        prefix = f"{_LAYOUT.seals.as_posix()}/"
        for key in self.bucket.keys(prefix):
            if found := sealed_at(key.removeprefix(prefix), self._seal(Path(key))):
                yield found

    def fits(self, found: Sealed) -> bool:
        """Whether the file is still as long as its seal says; its mtime does not show here."""
        return self.size_bytes(found.folder, found.name) == found.seal.size

    def announce(self, folder: str, name: str, seal: Seal) -> None:
        """Write down what a file should be, before it gets its name."""
        self.bucket.write(_LAYOUT.pending_seal(folder, name).as_posix(), encode_seal(seal))

    def seal(self, folder: str, name: str, seal: Seal) -> None:
        """Seal a file that is there. The record of its announcement goes."""
        self.bucket.write(_LAYOUT.seal(folder, name).as_posix(), encode_seal(replace(seal, mtime=None)))
        with contextlib.suppress(S3Failed):
            self.bucket.remove(_LAYOUT.pending_seal(folder, name).as_posix())

    def remove(self, folder: str, name: str) -> None:
        """Remove a model, then its seal."""
        self.bucket.remove(self.key(folder, name))
        self.bucket.remove(_LAYOUT.seal(folder, name).as_posix())

    def _seal(self, path: Path) -> Seal | None:
        data = self.bucket.read(path.as_posix(), 0, _SEAL_BYTES)
        return decode_seal(data) if data else None


def new_seal(spec: ModelSpec, remote: Remote, sha256: str, by: str) -> Seal:
    """The seal of a file that was uploaded."""
    origin = Origin.of(spec)
    return Seal(
        size=remote.size_bytes,
        mtime=None,
        sha256=sha256,
        etag=remote.etag,
        repo=origin.repo,
        file=origin.file,
        commit=remote.commit,
        by=by,
        at=now(),
    )
