"""A volume through its S3 API, with the worker's own layout, seals and checks. Touches the network.

Keys are the paths on the mounted volume. S3 cannot set a file's mtime, or read the mtime that a mount shows. So a seal from
here has `mtime: null`: the first worker that sees the file compares its size and header, and fills the mtime in.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.base.text import unicode_forms
from worker.errors import EnsureCancelled, FileIncomplete, UnsafePath
from worker.seed.errors import S3Failed, S3FileDiffers
from worker.store.file_formats import is_safetensors, stated_in
from worker.store.inventory import InventoryEntry, Standing
from worker.store.layout import Layout
from worker.store.seals import Seal, SealedModel, decode_seal, encode_seal, new_seal, sealed_model_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.base.progress import CancelToken
    from worker.fetch.hub import RemoteFile
    from worker.model_spec import ModelSpec
    from worker.seed.outcome import How
    from worker.seed.s3_api import S3Api, S3Head

log = logging.getLogger(__name__)

_READ_BYTES: Final = 8 * 1024 * 1024
_SEAL_BYTES: Final = 64 * 1024
_HEADER_BYTES: Final = 256 * 1024
_LAYOUT: Final = Layout(Path())


class S3Volume:
    """One volume through its S3 API. Its errors are those of `S3Api`."""

    free_bytes: int | None = None
    """The API does not say."""

    def __init__(self, bucket: S3Api) -> None:
        self.bucket = bucket

    @property
    def title(self) -> str:
        """Return the volume's name for people."""
        return self.bucket.place.title

    def key(self, folder: str, name: str) -> str:
        """Return the key of a model's file."""
        return _LAYOUT.model(folder, name).as_posix()

    # --- what is there

    def look(self, folder: str, name: str) -> InventoryEntry:
        """Return the state of a model's file, as the worker's inventory does for a mounted volume."""
        found = self.bucket.head(self.key(folder, name))
        if found is None:
            return InventoryEntry(Standing.ABSENT)
        seal_key = _LAYOUT.seal(folder, name).as_posix()
        seal = self._seal(Path(seal_key))
        if seal and seal.size == found.size_bytes and self._unchanged(found, seal, seal_key):
            return InventoryEntry(Standing.READY, found.size_bytes, seal, found)
        record = self._seal(_LAYOUT.pending_seal(folder, name))
        if record and (record.size != found.size_bytes or record.sha256 is None):
            record = None
        error = None if record else self._trouble(folder, name, found.size_bytes)
        standing = Standing.INCOMPLETE if error else Standing.REPLACED if seal else Standing.BY_HAND
        return InventoryEntry(standing, found.size_bytes, seal, found, error, record)

    def _unchanged(self, found: S3Head, seal: Seal, seal_key: str) -> bool:
        """Return whether the file is not younger than its seal, and not older than the time that a worker wrote into it.

        Only times of the server are compared with each other.
        """
        sealed = self.bucket.head(seal_key)
        return sealed is not None and (seal.mtime or 0) <= found.modified_s <= sealed.modified_s

    def _trouble(self, folder: str, name: str, size_bytes: int) -> FileIncomplete | None:
        """Return why the file cannot be used, if it is a safetensors file and its header states another length."""
        key = self.key(folder, name)
        if not is_safetensors(name):
            return None
        head = self.bucket.read(key, 0, _HEADER_BYTES) or b""
        length = 8 + int.from_bytes(head[:8], "little")
        if _READ_BYTES < length <= size_bytes:
            return None  # a header of this length is not worth reading
        if len(head) < length <= size_bytes:
            head = self.bucket.read(key, 0, length) or b""
        whole = stated_in(io.BytesIO(head), size_bytes)
        return None if whole == size_bytes else FileIncomplete(Path(key), size_bytes, whole)

    @staticmethod
    def expected(spec: ModelSpec, sha256: str | None) -> str | None:
        """Return the required hash of a file without a fitting seal, if its source says `sha256`; see `adopt`."""
        return spec.sha256 or sha256

    def check(self, spec: ModelSpec, what: str, expected: str | None, actual: str | None) -> None:
        """Raise `S3FileDiffers` if both are known and differ."""
        if expected and actual and expected != actual:
            raise S3FileDiffers(self.key(spec.folder, spec.name), what, expected, actual)

    def adopt(
        self, spec: ModelSpec, found: InventoryEntry, remote: RemoteFile, on_bytes: Callable[[int], None], cancel: CancelToken
    ) -> How:
        """Seal a file that has no seal, if it is the wanted one. Leave it as it is if no sha256 is known.

        If a run died between Complete and seal, its record is used. Any other file is read over the network. Raises
        `S3FileDiffers` if it is another file, and says why it cannot be used.
        """
        if remote.sha256:
            self.check(spec, "size", str(remote.size_bytes), str(found.size_bytes))
        if found.record and remote.sha256 in {None, found.record.sha256}:
            self.seal(spec.folder, spec.name, found.record)
            return "adopted"
        if found.error:
            raise found.error
        if remote.sha256 is None:
            return "by_hand"
        actual = self.hash(spec.folder, spec.name, found.size_bytes, on_bytes, cancel)
        self.check(spec, "sha256", remote.sha256, actual)
        self.seal(spec.folder, spec.name, new_seal(spec, remote, actual, "seeder"))
        return "adopted"

    def begun_bytes(self, spec: ModelSpec, remote: RemoteFile) -> int:
        """Return what the fullest unfinished upload of the model has."""
        del remote
        key = self.key(spec.folder, spec.name)
        sizes = [
            sum(part.size_bytes for part in self.bucket.parts(key, upload).values()) for upload in self.bucket.uploads(key)
        ]
        return max(sizes, default=0)

    def hash(self, folder: str, name: str, size_bytes: int, on_bytes: Callable[[int], None], cancel: CancelToken) -> str:
        """Return the sha256 of a file, read over the network."""
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
        """Return `models.toml`, or None."""
        return self._small(_LAYOUT.manifest)

    def workflow(self, name: str) -> bytes | None:
        """Return the file of a workflow of this name. None if there is none, or if the name is impossible."""
        with contextlib.suppress(UnsafePath):
            files = (self._small(_LAYOUT.workflow(form)) for form in unicode_forms(name))
            return next((data for data in files if data is not None), None)
        return None

    def workflow_names(self) -> list[str]:
        """Return the names of its workflows."""
        prefix = f"{_LAYOUT.workflows.as_posix()}/"
        keys = (key.removeprefix(prefix) for key in self.bucket.keys(prefix))
        return sorted(key.removesuffix(".json") for key in keys if key.endswith(".json"))

    def _small(self, path: Path) -> bytes | None:
        found = io.BytesIO()
        key = path.as_posix()
        while data := self.bucket.read(key, found.tell(), _READ_BYTES):
            found.write(data)
            if len(data) < _READ_BYTES:
                break
        return found.getvalue() or None

    # --- seals

    def sealed(self) -> Iterator[SealedModel]:
        """Yield every model that has a seal. The folders of models themselves are not listed."""
        prefix = f"{_LAYOUT.seals.as_posix()}/"
        for key in self.bucket.keys(prefix):
            if found := sealed_model_at(key.removeprefix(prefix), self._seal(Path(key))):
                yield found

    def announce(self, folder: str, name: str, seal: Seal) -> None:
        """Record what a file should be, before it gets its name."""
        self.bucket.write(_LAYOUT.pending_seal(folder, name).as_posix(), encode_seal(seal))

    def seal(self, folder: str, name: str, seal: Seal) -> None:
        """Seal an existing file and remove its announcement."""
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
