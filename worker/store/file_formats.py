"""Recognise a file's format by its first bytes, whatever its name says, and the length that it states. Reads files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, BinaryIO, Final

from worker.errors import ContentMismatch, FileIncomplete, NotAFile, NotAModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from worker.fetch.hub import RemoteFile

HEAD_BYTES: Final = 512
SAFETENSORS: Final = (".safetensors", ".sft")
# Formats whose header states no length, so nothing else is checked before they are used.
_OTHERS: Final = (".pth", ".pt", ".ckpt", ".bin", ".gguf", ".onnx")
_GGUF: Final = b"GGUF"
_LFS: Final = b"version https://git-lfs"
_GZIP: Final = b"\x1f\x8b"
_TEXT_CONTROLS: Final = frozenset(b"\t\n\r\f")
_SHORT_BYTES: Final = 1_000_000
_MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit


def is_safetensors(name: str) -> bool:
    """Return whether the name is that of a safetensors file, in upper or lower case."""
    return name.lower().endswith(SAFETENSORS)


def is_weights(name: str) -> bool:
    """Return whether the name is that of a weights file."""
    return name.lower().endswith((*_OTHERS, *SAFETENSORS))


def foreign(name: str, head: bytes) -> str | None:
    """Return what a weights file is instead, if its first bytes leave no doubt. None for any other file."""
    if is_weights(name) and head.startswith(_LFS):
        return "a Git LFS pointer, which stands for the file in a repository"
    if not name.lower().endswith(_OTHERS):
        return None
    if head.startswith(_GZIP):
        return "compressed with gzip"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    kinds = ((b"<", "a web page"), (b"{", "a text in JSON"), (b"[", "a text in JSON"))
    return next((kind for start, kind in kinds if text.startswith(start) and _is_plain_text(head)), None)


def misfit(name: str, head: bytes, size_bytes: int, *, is_verified: bool) -> str | None:
    """Return what a weights file that a source sent is instead, like `foreign`.

    Without a hash that proves the right file, also reject an empty file, a short text, and a file without its format's first
    bytes.
    """
    if (found := foreign(name, head)) or is_verified:
        return found
    lower = name.lower()
    if not lower.endswith(_OTHERS):
        return None
    if not size_bytes:
        return "empty"
    if lower.endswith(".gguf") and not head.startswith(_GGUF):
        return "no GGUF file"
    return "a text" if size_bytes <= _SHORT_BYTES and _is_plain_text(head) else None


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
    """Return the first bytes of a file, which tell its format."""
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


def _is_plain_text(head: bytes) -> bool:
    return all(byte >= ord(" ") or byte in _TEXT_CONTROLS for byte in head) and _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as exc:
        return exc.start > len(head) - 4  # a character that the end cut in two
    return True


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
