"""The routes of Xet's storage: access, how a file is put together, its pieces. Loopback network."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from devkit.hub.body import parse_range, send_file
from devkit.hub.xet_store import CHUNK_BYTES, CHUNKS, PIECE_BYTES

if TYPE_CHECKING:
    from devkit.hub.routes import Target
    from devkit.hub.wire import Wire

_HEADER_BYTES: Final = 8
_LIFE_S: Final = 3600


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
    first, end = wanted.start // CHUNK_BYTES, -(-wanted.stop // CHUNK_BYTES)
    terms, pieces = [], {}
    for number in range(first // CHUNKS, -(-end // CHUNKS)):
        chunks = {"start": max(first - number * CHUNKS, 0), "end": min(end - number * CHUNKS, CHUNKS)}
        count = chunks["end"] - chunks["start"]
        start = number * PIECE_BYTES + chunks["start"] * CHUNK_BYTES
        length = min(size - start, count * CHUNK_BYTES)
        stored = chunks["start"] * (CHUNK_BYTES + _HEADER_BYTES)
        piece = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()
        terms.append({"hash": piece, "unpacked_length": length, "range": chunks})
        url = wire.hub.cdn_endpoint + wire.hub.signer.sign(f"/xet/piece/{quote(name)}/{number}", "inline")
        held = {"start": stored, "end": stored + length + count * _HEADER_BYTES - 1}
        pieces[piece] = [{"url": url, "ranges": [{"chunks": chunks, "bytes": held}]}]
    return {"offset_into_first_range": wanted.start - first * CHUNK_BYTES, "terms": terms, "xorbs": pieces}
