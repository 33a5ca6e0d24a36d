"""What is in a file on the disk, and what the disk's errors mean. Touches the disk."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, BinaryIO, Final

from worker.base.files import FULL, READ_ONLY, free_bytes
from worker.errors import EnsureCancelled, FileIncomplete, ModelError, NotAModel, VolumeFailed, VolumeFull, VolumeReadOnly
from worker.store.file_formats import HEAD_BYTES, foreign, is_safetensors, is_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from worker.base.progress import CancelToken


_BUFFER_BYTES: Final = 4 * 1024 * 1024
_MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit


def volume_error(path: Path, exc: OSError, needed_bytes: int = 0) -> ModelError:
    """Return the error that describes a file system error under `path` to a person."""
    if exc.errno in FULL:
        return VolumeFull(path, needed_bytes, free_bytes(path) or 0)
    if exc.errno in READ_ONLY:
        return VolumeReadOnly(path, exc.strerror or str(exc))
    return VolumeFailed(path, exc.strerror or str(exc))


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
