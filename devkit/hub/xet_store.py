"""What Xet's storage holds: files by hash, cut into pieces, and the tokens for them. Disk.

A file is cut into chunks of 64 KiB, and 16 of them make a piece ("xorb"), so that a small file has many. Chunks are stored as
they are, each behind a header of 8 bytes. hf_xet does not compare a chunk with its hash when it downloads, so that hashes are
names here and nothing more. What is not here: compression, chunks that several files share, uploads.
https://huggingface.co/docs/xet/en/download-protocol
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

from devkit.hub.answers import RefusedError, not_found

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devkit.hub.shelf import Blob

CHUNK_BYTES: Final = 64 * 1024
CHUNKS: Final = 16
PIECE_BYTES: Final = CHUNKS * CHUNK_BYTES


class Xet:
    """Which repos are on Xet (globs over `org/repo`), their files by hash, and the tokens given out for them."""

    def __init__(self, repos: Sequence[str]) -> None:
        self._repos = tuple(repos)
        self._lock = threading.Lock()
        self._files: dict[str, tuple[str, Blob]] = {}
        self._tokens: set[str] = set()
        self._made = tempfile.TemporaryDirectory(prefix="xet-")

    def close(self) -> None:
        """Remove the pieces."""
        self._made.cleanup()

    def hash_of(self, repo: str, path: str, blob: Blob) -> str | None:
        """Return a file's name in Xet's storage, or None if its repo is not on Xet."""
        if not any(fnmatchcase(repo, pattern) for pattern in self._repos):
            return None
        name = hashlib.sha256(f"xet {blob.sha256}".encode()).hexdigest()
        with self._lock:
            self._files[name] = f"{repo}/{path}", blob
        return name

    def file(self, name: str) -> str:
        """Return `org/repo/path` of a hash that was given out, or the hash."""
        return self._files[name][0] if name in self._files else name

    def blob(self, name: str) -> Blob:
        """Return the file of a hash. Raises RefusedError 404."""
        if name not in self._files:
            raise not_found()
        return self._files[name][1]

    def token(self) -> str:
        """Return a new token for the storage."""
        token = f"xet_{secrets.token_hex(8)}"
        self._tokens.add(token)
        return token

    def expire(self) -> None:
        """Refuse every token given out so far."""
        self._tokens.clear()

    def check_token(self, token: str | None) -> None:
        """Raise RefusedError 401 for any other token, also the hub's own."""
        if token not in self._tokens:
            raise RefusedError(401, "Unauthorized")

    def piece(self, name: str, number: int) -> Path:
        """Return a stored file with one piece, created on request. Raises RefusedError 404."""
        blob = self.blob(name)
        path = Path(self._made.name, f"{name}.{number}")
        with self._lock:
            if not path.exists():
                path.write_bytes(b"".join(_stored(blob, number)))
        return path


def _stored(blob: Blob, number: int) -> Iterator[bytes]:
    with blob.source.open("rb") as stream:
        stream.seek(number * PIECE_BYTES)
        left = PIECE_BYTES
        while chunk := stream.read(min(left, CHUNK_BYTES)):
            left -= len(chunk)
            size = len(chunk).to_bytes(3, "little")
            # Version 0, the stored size, no compression, the size.
            yield b"\0" + size + b"\0" + size + chunk
