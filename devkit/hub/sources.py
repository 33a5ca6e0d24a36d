"""Sources that are no repos: the CDN, plain files, Civitai. Reads disk, loopback network."""

from __future__ import annotations

import hashlib
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from devkit.hub.answers import RefusedError, not_found
from devkit.hub.body import send_file

if TYPE_CHECKING:
    from pathlib import Path

    from devkit.hub.routes import Target
    from devkit.hub.wire import Wire


def answer_cdn(wire: Wire, target: Target) -> None:
    """Send what a signed address stands for; tokens are neither needed nor looked at."""
    disposition = wire.hub.signer.check(wire.entry.path, wire.query)
    source = _of_commit(wire, target) if target.repo else wire.hub.shelf.plain(target.path)
    if source is None:
        raise RefusedError(404, "<Error><Code>NoSuchKey</Code></Error>")
    # As S3's: it tells versions apart and is not the sha256.
    etag = hashlib.md5(f"{source} {source.stat().st_mtime_ns}".encode(), usedforsecurity=False).hexdigest()
    send_file(wire, source, {"ETag": f'"{etag}"', "Content-Disposition": disposition})


def _of_commit(wire: Wire, target: Target) -> Path | None:
    snapshot = wire.hub.shelf.snapshot(target.repo, target.revision)
    blob = snapshot.files.get(target.path) if snapshot else None
    return blob.source if blob and blob.is_current() else None


def answer_plain(wire: Wire, target: Target) -> None:
    """Send a file, or send the client to the CDN for it."""
    source = wire.hub.shelf.plain(target.path)
    if source is None:
        raise not_found()
    if target.route == "redirect":
        wire.redirect(302, wire.hub.signer.sign(f"/cdn/file/{quote(target.path)}", "inline"))
        return
    stat = source.stat()
    etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    send_file(wire, source, {"ETag": etag, "Last-Modified": formatdate(stat.st_mtime, usegmt=True)})


def answer_civitai(wire: Wire, target: Target) -> None:
    """Describe a model version, or send the client to the CDN for its file if the token (header or query) is right."""
    path = wire.hub.civitai.get(target.path)
    source = wire.hub.shelf.plain(path) if path else None
    if path is None or source is None:
        raise RefusedError(404, f"No model version with id {target.path}")
    if target.route == "civitai-info":
        wire.json(_version(wire, target.path, source))
        return
    if wire.hub.civitai_token not in {None, wire.token(), wire.query.get("token")}:
        raise RefusedError(401, "The creator of this asset requires you to be logged in to download it")
    wire.redirect(307, wire.hub.signer.sign(f"/cdn/file/{quote(path)}", f'attachment; filename="{quote(source.name)}"'))


def _version(wire: Wire, number: str, source: Path) -> dict[str, Any]:
    address = f"{wire.hub.endpoint}/api/download/models/{number}"
    blob = wire.hub.shelf.blob(source)
    file = {
        "name": source.name,
        "type": "Model",
        "primary": True,
        "sizeKB": blob.size / 1024,
        "hashes": {"SHA256": blob.sha256.upper()},
        "downloadUrl": address,
    }
    return {"id": int(number), "name": source.stem, "files": [file], "downloadUrl": address}
