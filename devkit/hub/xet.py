"""Xet's storage, as far as hf_xet downloads from it: access, how a file is put together, its pieces. Disk, loopback network.

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
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from devkit.hub.answers import RefusedError, not_found
from devkit.hub.body import parse_range, send_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devkit.hub.routes import Target
    from devkit.hub.shelf import Blob
    from devkit.hub.wire import Wire

_CHUNK_BYTES: Final = 64 * 1024
_CHUNKS: Final = 16
_PIECE_BYTES: Final = _CHUNKS * _CHUNK_BYTES
_HEADER_BYTES: Final = 8
_LIFE_S: Final = 3600


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
        """What a file is called there; None when its repo is not on Xet."""
        if not any(fnmatchcase(repo, pattern) for pattern in self._repos):
            return None
        name = hashlib.sha256(f"xet {blob.sha256}".encode()).hexdigest()
        with self._lock:
            self._files[name] = f"{repo}/{path}", blob
        return name

    def file(self, name: str) -> str:
        """`org/repo/path` of a hash that was given out, or the hash."""
        return self._files[name][0] if name in self._files else name

    def blob(self, name: str) -> Blob:
        """The file of a hash, or RefusedError 404."""
        if name not in self._files:
            raise not_found()
        return self._files[name][1]

    def token(self) -> str:
        """A new token for the storage."""
        token = f"xet_{secrets.token_hex(8)}"
        self._tokens.add(token)
        return token

    def expire(self) -> None:
        """Every token given out so far is refused from now on."""
        self._tokens.clear()

    def check_token(self, token: str | None) -> None:
        """RefusedError 401 for any other token, the hub's own too."""
        if token not in self._tokens:
            raise RefusedError(401, "Unauthorized")

    def piece(self, name: str, number: int) -> Path:
        """A file with one piece as it is stored, made when it is asked for; RefusedError 404."""
        blob = self.blob(name)
        path = Path(self._made.name, f"{name}.{number}")
        with self._lock:
            if not path.exists():
                path.write_bytes(b"".join(_stored(blob, number)))
        return path


def _stored(blob: Blob, number: int) -> Iterator[bytes]:
    with blob.source.open("rb") as stream:
        stream.seek(number * _PIECE_BYTES)
        left = _PIECE_BYTES
        while chunk := stream.read(min(left, _CHUNK_BYTES)):
            left -= len(chunk)
            size = len(chunk).to_bytes(3, "little")
            # Version 0, the stored size, no compression, the size.
            yield b"\0" + size + b"\0" + size + chunk


def answer_access(wire: Wire) -> None:
    """Say where the storage is, with a token for it; whose repo it is was checked before."""
    said = {"casUrl": f"{wire.hub.cdn_endpoint}/xet", "accessToken": wire.hub.xet.token(), "exp": int(time.time()) + _LIFE_S}
    headers = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
    wire.json(said, dict(zip(headers, map(str, said.values()), strict=True)))


def answer_xet(wire: Wire, target: Target) -> None:
    """Say how a range of a file is put together, or send a range of a piece, whose address is signed."""
    if target.route == "xet/piece":
        wire.hub.signer.check(wire.entry.path, wire.query)
        name, _, number = target.path.partition("/")
        send_file(wire, wire.hub.xet.piece(name, int(number)), {"ETag": f'"{target.path}"'})
        return
    wire.hub.xet.check_token(wire.token())
    wire.json(_reconstruction(wire, target.path))


def _reconstruction(wire: Wire, name: str) -> dict[str, Any]:
    size = wire.hub.xet.blob(name).size
    wanted = parse_range(wire.headers.get("Range"), size) or range(size)
    first, end = wanted.start // _CHUNK_BYTES, -(-wanted.stop // _CHUNK_BYTES)
    terms, pieces = [], {}
    for number in range(first // _CHUNKS, -(-end // _CHUNKS)):
        chunks = {"start": max(first - number * _CHUNKS, 0), "end": min(end - number * _CHUNKS, _CHUNKS)}
        count = chunks["end"] - chunks["start"]
        start = number * _PIECE_BYTES + chunks["start"] * _CHUNK_BYTES
        length = min(size - start, count * _CHUNK_BYTES)
        stored = chunks["start"] * (_CHUNK_BYTES + _HEADER_BYTES)
        piece = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()
        terms.append({"hash": piece, "unpacked_length": length, "range": chunks})
        url = wire.hub.cdn_endpoint + wire.hub.signer.sign(f"/xet/piece/{quote(name)}/{number}", "inline")
        held = {"start": stored, "end": stored + length + count * _HEADER_BYTES - 1}
        pieces[piece] = [{"url": url, "ranges": [{"chunks": chunks, "bytes": held}]}]
    return {"offset_into_first_range": wanted.start - first * _CHUNK_BYTES, "terms": terms, "xorbs": pieces}
