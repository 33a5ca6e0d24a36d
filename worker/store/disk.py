"""Small file operations that are reliable on a network file system. Touches the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from typing import TYPE_CHECKING, BinaryIO, Final, Self, TypeVar

from worker.errors import EnsureCancelled, FileIncomplete, ModelError, NotAModel, VolumeFailed, VolumeFull, VolumeReadOnly
from worker.store.file_formats import HEAD_BYTES, foreign, is_safetensors, is_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from worker.base.progress import CancelToken

T = TypeVar("T")

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NOT_THERE_YET: Final = frozenset({errno.ENOENT, errno.ESTALE})
_SETTLE_S: Final = 3.0
_LONGEST_STEM_BYTES: Final = 240
_RENEW_S: Final = 15.0
_BUFFER_BYTES: Final = 4 * 1024 * 1024
_MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit


def volume_error(path: Path, exc: OSError, needed_bytes: int = 0) -> ModelError:
    """Return the error that describes a file system error under `path` to a person."""
    if exc.errno in FULL:
        return VolumeFull(path, needed_bytes, free_bytes(path) or 0)
    if exc.errno in READ_ONLY:
        return VolumeReadOnly(path, exc.strerror or str(exc))
    return VolumeFailed(path, exc.strerror or str(exc))


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system, or None if it cannot be asked. Quotas are not included."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def patiently(operate: Callable[[], T], wait_s: float = _SETTLE_S) -> T:
    """Run `operate`. Retry for up to `wait_s` while a folder that another host just made is not visible yet."""
    until_s = time.monotonic() + wait_s
    while True:
        try:
            return operate()
        except OSError as exc:
            if exc.errno not in _NOT_THERE_YET or time.monotonic() >= until_s:
                raise
        time.sleep(0.05)


def write_atomically(path: Path, data: bytes, *, durable: bool = True, opened: Callable[[], None] = lambda: None) -> None:
    """Write a file so that readers see the old content or all of the new. If `durable`, also after a crash of this host.

    The temporary name is unique, so that two writers cannot mix their bytes. `opened` runs while the file is empty.
    """
    temporary = path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(4)}.tmp")
    fd = patiently(lambda: _create(temporary))
    try:
        try:
            opened()
            write_at(fd, memoryview(data), 0)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _shortened(name: str) -> str:
    """Return a name shortened so that it stays below the 255 bytes of a disk with a prefix and a suffix."""
    while len(os.fsencode(name)) > _LONGEST_STEM_BYTES:
        name = name[:-1]
    return name


def _create(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def create(path: Path) -> int:
    """Create a file and its folders and return its descriptor. Raises FileExistsError."""
    return patiently(lambda: _create(path))


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all of it.

    A short write means that a quota was reached in the middle, so the rest is written again to get the error.
    """
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a crash. Ignore file systems that cannot sync a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)


class Peek:
    """Look at one path repeatedly. Its folder stays open, so that a look costs a network volume one or two operations.

    A replaced folder is noticed after `_RENEW_S`. One thread uses it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._name = ""
        self._until_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> int:
        """Open the nearest folder above the path that exists."""
        if self._fd < 0 or time.monotonic() >= self._until_s:
            self._close()
            folder = next(above for above in self._path.parents if above.is_dir())
            self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._name = str(self._path.relative_to(folder))
            self._until_s = time.monotonic() + _RENEW_S
        return self._fd

    def exists(self) -> bool:
        """Return whether the path exists. Raises `OSError` if that cannot be known."""
        return self.stat() is not None

    def stat(self) -> os.stat_result | None:
        """Return the stat, or None if nothing is there. Raises `OSError` if that cannot be known."""
        try:
            folder = self._open()
            return os.stat(self._name, dir_fd=folder)
        except FileNotFoundError:
            return None

    def read(self, most_bytes: int = 64 * 1024) -> bytes:
        """Read the beginning of the file. Raises `OSError`."""
        folder = self._open()
        fd = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            return os.read(fd, most_bytes)
        finally:
            os.close(fd)


def sha256_of(path: Path, cancel: CancelToken, on_bytes: Callable[[int], None]) -> str:
    """Return the sha256 of a whole file. Stop within one buffer if cancelled. `on_bytes` gets the count so far."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    done = 0
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(buffer):
            if cancel.is_set():
                raise EnsureCancelled(path.name)
            digest.update(buffer[:length])
            done += length
            on_bytes(done)
    return digest.hexdigest()


def git_sha1_of(path: Path, size_bytes: int) -> str:
    """Return git's hash of a file, which must be small."""
    digest = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_whole(path: Path, size_bytes: int) -> None:
    """Raise `FileIncomplete` if a safetensors file's header and size disagree, `NotAModel` for a web page or the like.

    Other formats do not state their length. This finds a truncated copy in under a millisecond, but no wrong byte.
    """
    whole = stated_bytes(path, size_bytes) if is_safetensors(path.name) else size_bytes
    if not (is_safetensors(path.name) and whole == size_bytes) and (found := foreign_in(path)):
        raise NotAModel(path, found)
    if whole != size_bytes:
        raise FileIncomplete(path, size_bytes, whole)


def foreign_in(path: Path) -> str | None:
    """Return what a weights file is instead, if its first bytes leave no doubt."""
    return foreign(path.name, head_of(path)) if is_weights(path.name) else None


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb", buffering=0) as stream:
        return stream.read(HEAD_BYTES)


def stated_bytes(path: Path, size_bytes: int) -> int | None:
    """Return the length that a safetensors file states: 8 + header length + end of the last tensor. None if unreadable."""
    with path.open("rb") as stream:
        return stated_in(stream, size_bytes)


def stated_in(stream: BinaryIO, size_bytes: int) -> int | None:
    """Like `stated_bytes`, for a stream at the beginning of a file of `size_bytes`."""
    length = int.from_bytes(stream.read(8), "little")
    if not len(b"{}") <= length <= min(size_bytes - 8, _MAX_HEADER_BYTES):
        return None
    text = stream.read(length)
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
