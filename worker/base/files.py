"""Small file operations that are reliable on a network file system. Touches the disk."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from typing import TYPE_CHECKING, Final, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_HOST_CACHE: Final = "huggingface-cache"
_NOT_THERE_YET: Final = frozenset({errno.ENOENT, errno.ESTALE})
_SETTLE_S: Final = 3.0
_LONGEST_STEM_BYTES: Final = 240
_RENEW_S: Final = 15.0


def is_volume(path: Path) -> bool:
    """Return whether files in the folder outlive the container: whether a network volume is mounted there.

    RunPod mounts the host's cache of models below /runpod-volume even for endpoints without a network volume. The folder above
    it then belongs to the container: files there are lost with the container, and no other worker sees them.
    """
    try:
        with os.scandir(path) as entries:
            names = {entry.name for _, entry in zip(range(2), entries, strict=False)}
    except OSError:
        return False
    return names != {_HOST_CACHE} or os.path.ismount(path)


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system, or None if it cannot be asked. Quotas are not included."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def patiently(operate: Callable[[], T], wait_s: float = _SETTLE_S) -> T:
    """Run a file operation. Retry for up to `wait_s` while a folder that another host just made is not visible yet."""
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
    temporary = path.with_name(f".{_shortened_name(path.name)}.{secrets.token_hex(4)}.tmp")
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


def _shortened_name(name: str) -> str:
    """Return a file's name shortened so that it stays below the 255 bytes of a disk with a prefix and a suffix."""
    while len(os.fsencode(name)) > _LONGEST_STEM_BYTES:
        name = name[:-1]
    return name


def _create(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def create_file(path: Path) -> int:
    """Create a file and its folders and return its descriptor. Raises FileExistsError."""
    return patiently(lambda: _create(path))


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all bytes at an offset of a file.

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
    """Looks at one file's path repeatedly. Its folder stays open, so that a look costs a network volume one or two operations.

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
