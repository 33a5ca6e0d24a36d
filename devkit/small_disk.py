"""A real disk of a few MB, so that a test can fill it: ext4 in a file, mounted through a loop device.

Needs root and loop devices; `available()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

from worker.base.files import FULL, write_at

_BYTES = 8 << 20
_LARGEST_STEP = 1 << 20
_SMALLEST_STEP = 64
_FORMAT = ("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal")


@cache
def available() -> str | None:
    """Return why no small disk can be mounted here, or None."""
    if os.geteuid() != 0:
        return "a small disk needs root, to mount"
    if missing := [name for name in ("mkfs.ext4", "mount", "umount") if shutil.which(name) is None]:
        return f"a small disk needs {' and '.join(missing)}"
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder)):
            return None
    except subprocess.CalledProcessError:
        return "a small disk needs loop devices"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Yield a disk's mount point in an empty folder. It ends with the body."""
    image, point = folder / "image", folder / "disk"
    with image.open("wb") as stream:
        stream.truncate(_BYTES)
    point.mkdir()
    subprocess.run([*_FORMAT, image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True, capture_output=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=True, capture_output=True)


def fill(path: Path) -> None:
    """Let a file grow until its disk, or its quota, takes no more."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        step = _LARGEST_STEP
        while step >= _SMALLEST_STEP:
            if not _grows(fd, step):
                step //= 2
    finally:
        os.close(fd)


def _grows(fd: int, size_bytes: int) -> bool:
    length = os.fstat(fd).st_size
    try:
        os.ftruncate(fd, length + size_bytes)  # a quota of MooseFS counts lengths, and refuses what is written only later
        write_at(fd, memoryview(bytes(size_bytes)), length)
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in FULL:
            raise
        os.ftruncate(fd, length)
        return False
    return True
