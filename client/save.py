"""Save a result's outputs: under their own names, over no other file, never outside their folder. Disk, network."""

from __future__ import annotations

import base64
import http.client
import itertools
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

from client.errors import OutputNotSaved, UsageError
from client.plain import fits_a_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

KINDS: Final = ("images", "videos", "audio", "text", "files")

_ATTEMPTS: Final = 3
_TIMEOUT_S: Final = 60.0
_NAME_BYTES: Final = 200  # file systems allow 255, and a number may follow
_FORBIDDEN: Final = frozenset('<>:"|?*')  # names with a meaning on Windows


@dataclass(frozen=True, slots=True)
class Saved:
    """One output. `path` is None if the file is on the volume, at `volume_path` relative to its root."""

    name: str
    media_type: str
    size_bytes: int
    path: Path | None = None
    volume_path: str | None = None
    text: str | None = None


def check_folder(folder: Path) -> None:
    """Check that outputs can be saved there, before the job costs money. Leave nothing behind. Raises `UsageError`."""
    whole = folder.absolute()
    there = next(each for each in (whole, *whole.parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as exc:
        raise UsageError(f"{folder} cannot be written ({exc.strerror}): give another folder with --output") from None


def save_outputs(output: Mapping[str, Any], folder: Path) -> Iterator[Saved | OutputNotSaved]:
    """Save each output of a job's result. If one cannot be saved, yield the reason and continue."""
    for kind in KINDS:
        items = output.get(kind) or []
        for item in items if isinstance(items, list) else [items]:
            try:
                yield _save(item, folder) if isinstance(item, dict) else OutputNotSaved(kind, "it is not told as an output is")
            except OutputNotSaved as exc:
                yield exc


def _save(item: Mapping[str, Any], folder: Path) -> Saved:
    name, data = file_name(str(item.get("filename") or "output")), item.get("data")
    media_type = str(item.get("media_type") or "")
    if not isinstance(data, str):
        raise OutputNotSaved(name, "the result has no data for it")
    match item.get("type"):
        case "volume_path":
            size = item.get("size_bytes")
            return Saved(name, media_type, size if isinstance(size, int) else 0, volume_path=data)
        case "s3_url":
            path = _place(folder, item, name, lambda file: _download(data, file, name))
        case "text":
            path = _place(folder, item, name, lambda file: _write(file, data.encode("utf-8", "backslashreplace")))
            return Saved(name, media_type, path.stat().st_size, path, text=data)
        case "base64":
            content = _decoded(data, name)
            path = _place(folder, item, name, lambda file: _write(file, content))
        case kind:
            raise OutputNotSaved(name, f"this client does not know the type '{kind}'")
    return Saved(name, media_type, path.stat().st_size, path)


def file_name(name: str) -> str:
    """Return the last part of a name, without characters that mean more to some file system."""
    last = name.replace("\\", "/").rpartition("/")[2]
    clean = "".join("_" if char in _FORBIDDEN or not char.isprintable() else char for char in last).strip()
    stem, dot, suffix = clean.rpartition(".")
    while len(clean.encode()) > _NAME_BYTES:
        stem = stem[:-1] if stem else stem
        clean = f"{stem}{dot}{suffix}" if stem else clean[:-1]
    return clean if clean.strip(".") else "output"


def _place(folder: Path, item: Mapping[str, Any], name: str, fill: Callable[[IO[bytes]], None]) -> Path:
    """Return the new file that `fill` filled: `name`, or `name-2`, ... if it exists. Remove it if that fails."""
    try:
        target = _folder(folder, str(item.get("subfolder") or ""))
        path, file = _create(target, name)
    except OSError as exc:
        raise OutputNotSaved(name, f"{exc.filename or folder} cannot be written ({exc.strerror})") from None
    done = False
    try:
        with file:
            fill(file)
        done = True
    except OSError as exc:
        raise OutputNotSaved(name, f"{path} cannot be written ({exc.strerror or exc})") from None
    finally:
        if not done:
            path.unlink(missing_ok=True)
    return path


def _folder(folder: Path, subfolder: str) -> Path:
    """Return the subfolder below the folder. The folder itself if the path would lead out of it, as through a link."""
    parts = [file_name(part) for part in subfolder.replace("\\", "/").split("/") if part.strip(". ")]
    target = folder.joinpath(*parts)
    if not target.resolve().is_relative_to(folder.resolve()):
        target = folder
    target.mkdir(parents=True, exist_ok=True)
    return target


def _create(folder: Path, name: str) -> tuple[Path, IO[bytes]]:
    encoding = sys.getfilesystemencoding()  # of a system without UTF-8; "?" is in no clean name
    name = name.encode(encoding, "replace").decode(encoding).replace("?", "_")
    stem, dot, suffix = name.rpartition(".")
    for number in itertools.count(1):
        path = folder / (name if number == 1 else f"{stem}-{number}.{suffix}" if dot and stem else f"{name}-{number}")
        try:
            return path, path.open("xb")
        except FileExistsError:
            continue
    raise AssertionError  # count() does not end


def _decoded(data: str, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise OutputNotSaved(name, "its data is not base64") from None


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)


def _host(address: str, name: str) -> str:
    """Return the host of an address that can be requested. Raises `OutputNotSaved` for any other."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:
        parts = urllib.parse.urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname or not fits_a_header(address):
        raise OutputNotSaved(name, "what should be its address is no https:// address")
    return parts.hostname


def _download(address: str, file: IO[bytes], name: str) -> None:
    """Download a signed address, with three attempts. The address is a secret: only its host is ever shown."""
    host = _host(address, name)
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(attempt)
        file.seek(0)
        file.truncate()
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:  # noqa: S310 - the scheme is checked above
                length = response.headers.get("Content-Length")
                shutil.copyfileobj(response, file, 1 << 20)
        except urllib.error.HTTPError as exc:
            reason = f"status {exc.code}"
            if exc.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as exc:
            reason = str(getattr(exc, "reason", exc)) or type(exc).__name__
        else:
            if length is None or str(file.tell()) == length.strip():
                return
            reason = f"{file.tell()} of {length} bytes came"
    raise OutputNotSaved(name, f"{host} did not give it ({reason}); its address is in the answer (--json)")
