"""The hub's own answers: a file's address, a repo's description, its tree. Loopback network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote, urlencode

from devkit.hub.answers import RefusedError
from devkit.hub.body import send_file
from devkit.hub.shelf import lfs_pointer
from devkit.hub.xet import answer_access

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devkit.hub.routes import Target
    from devkit.hub.shelf import Blob, Snapshot
    from devkit.hub.wire import Wire

_DATE: Final = "2025-01-01T00:00:00.000Z"
_SAFE: Final = {"status": "safe", "avScan": {"virusFound": False, "virusNames": None}, "pickleImportScan": None}


def answer_repo(wire: Wire, target: Target) -> None:
    """Answer a request about a repo, as far as its token goes. The order of the checks is the hub's."""
    access, token = wire.hub.access, wire.token()
    access.check_token(token)
    access.check_repo(target.repo, token, exists=wire.hub.shelf.exists(target.repo))
    snapshot = wire.hub.shelf.snapshot(target.repo, target.revision)
    if snapshot is None:
        raise RefusedError(404, f"Invalid rev id: {target.revision}", "RevisionNotFound")
    match target.route:
        case "resolve":
            access.check_gate(target.repo, token)
            _resolve(wire, target, snapshot)
        case "xet/token":
            access.check_gate(target.repo, token)
            answer_access(wire)
        case "api/info":
            _info(wire, snapshot)
        case "api/tree":
            _tree(wire, target, snapshot)
        case _:
            _paths_info(wire, snapshot)


def answer_whoami(wire: Wire) -> None:
    """Say whose token it is."""
    wire.hub.access.check_token(wire.token())
    if wire.token() is None:
        raise RefusedError(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "stand-in", "role": "read"}}
    wire.json({"type": "user", "id": "0", "name": "stand-in", "orgs": [], "auth": auth})


def _resolve(wire: Wire, target: Target, snapshot: Snapshot) -> None:
    headers = {"X-Repo-Commit": snapshot.commit}
    blob = snapshot.files.get(target.path)
    if blob is None or not blob.is_current():
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    name = quote(target.path.rpartition("/")[2])
    disposition = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
    shown = _shown(wire, target.file, blob)
    if not blob.lfs:
        # git's id, unless a fault gave the file another hash.
        etag = shown.oid if shown.sha256 == blob.sha256 else shown.sha256
        send_file(wire, blob.source, {**headers, "ETag": f'"{etag}"', "Content-Disposition": disposition})
        return
    headers |= {"X-Linked-Etag": f'"{shown.sha256}"', "X-Linked-Size": str(shown.size), "Accept-Ranges": "bytes"}
    if xet := wire.hub.xet.hash_of(target.repo, target.path, blob):
        route = f"{wire.hub.endpoint}/api/models/{target.repo}/xet-read-token/{snapshot.commit}"
        headers |= {"X-Xet-Hash": xet, "X-Xet-Refresh-Route": route}
    path = f"/cdn/repo/{target.repo}/{snapshot.commit}/{quote(target.path)}"
    wire.redirect(302, wire.hub.signer.sign(path, disposition), headers)


def _shown(wire: Wire, file: str, blob: Blob) -> Blob:
    """Return a file's metadata: the truth, or the requested lie."""
    lies: dict[str, Any] = {rule.fault.kind: rule.fault.value for rule in wire.befall("size", "sha256", file=file)}
    return replace(blob, **lies)


def _info(wire: Wire, snapshot: Snapshot) -> None:
    repo = snapshot.repo
    info = {
        "_id": snapshot.commit[:24],
        "id": repo,
        "modelId": repo,
        "author": repo.partition("/")[0],
        "sha": snapshot.commit,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "private": wire.hub.access.is_private(repo),
        "gated": "auto" if wire.hub.access.is_gated(repo) else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "usedStorage": sum(blob.size for blob in snapshot.files.values()),
        "siblings": [_sibling(wire, snapshot, path) for path in snapshot.files],
    }
    wanted = parse_qs(wire.entry.query).get("expand")
    wire.json({key: info[key] for key in info if key in {"_id", "id", *wanted}} if wanted else info)


def _sibling(wire: Wire, snapshot: Snapshot, path: str) -> dict[str, Any]:
    if not wire.asks("blobs"):
        return {"rfilename": path}
    blob = _shown(wire, f"{snapshot.repo}/{path}", snapshot.files[path])
    lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(lfs_pointer(blob.sha256, blob.size))}
    return {"rfilename": path, "size": blob.size, "blobId": blob.oid, **({"lfs": lfs} if blob.lfs else {})}


def _tree(wire: Wire, target: Target, snapshot: Snapshot) -> None:
    below = f"{target.path}/" if target.path else ""
    inside = [path for path in snapshot.files if path.startswith(below)]
    if not inside:
        raise RefusedError(404, f"{target.path} does not exist on {target.revision!r}", "EntryNotFound")
    listed = sorted({*inside, *(folder for folder in _folders(inside) if folder.startswith(below))})
    if not wire.asks("recursive"):
        listed = [path for path in listed if "/" not in path.removeprefix(below)]
    start = int(wire.query.get("cursor", "0"))
    stop = start + wire.hub.page_size
    query = urlencode({**wire.query, "cursor": stop})
    more = {"Link": f'<{wire.hub.endpoint}{wire.entry.path}?{query}>; rel="next"'} if stop < len(listed) else {}
    expand = wire.asks("expand")
    wire.json([_path_info(wire, snapshot, path, expand=expand) for path in listed[start:stop]], more)


def _paths_info(wire: Wire, snapshot: Snapshot) -> None:
    text = wire.body.decode()
    is_json = "json" in wire.headers.get("Content-Type", "")
    form: dict[str, list[Any]] = json.loads(text) if is_json else parse_qs(text)
    expand = form.get("expand") in (True, ["true"])
    there = {*snapshot.files, *_folders(snapshot.files)}
    asked = [path.strip("/") for path in form.get("paths", [])]
    wire.json([_path_info(wire, snapshot, path, expand=expand) for path in asked if path in there])


def _path_info(wire: Wire, snapshot: Snapshot, path: str, *, expand: bool) -> dict[str, Any]:
    extra: dict[str, Any] = {"lastCommit": {"id": snapshot.commit, "title": "Upload", "date": _DATE}} if expand else {}
    if path not in snapshot.files:
        oid = hashlib.sha1(f"{snapshot.commit}/{path}".encode(), usedforsecurity=False).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": path, **extra}
    blob = _shown(wire, f"{snapshot.repo}/{path}", snapshot.files[path])
    if blob.lfs:
        extra["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(lfs_pointer(blob.sha256, blob.size))}
    if expand:
        extra["securityFileStatus"] = _SAFE
    return {"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **extra}


def _folders(paths: Iterable[str]) -> set[str]:
    """Return every folder above these paths."""
    return {path[:end] for path in paths for end, letter in enumerate(path) if letter == "/"}
