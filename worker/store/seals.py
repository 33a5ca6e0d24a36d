"""A seal: the record that a file is whole, so that nobody has to read the file to know. Touches the disk."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from worker.base.files import write_atomically
from worker.errors import SpecInvalid
from worker.model_spec import HubFile, ModelSpec, parse_source
from worker.store.layout import split_title, title_of_seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from worker.fetch.hub import RemoteFile
    from worker.store.layout import Layout

VERSION: Final = 1
_MAX_BYTES: Final = 64 * 1024
_READ: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # the last two do not exist everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What a seal says of a whole file. `mtime` is in whole seconds, as network file systems keep it.

    `mtime` is None if the file was uploaded through S3, which does not report it: the first worker that sees the file compares
    size and header, and fills it in. `sha256` is of the bytes that were stored.
    """

    size: int
    mtime: int | None
    sha256: str | None
    etag: str | None = None
    repo: str | None = None
    file: str | None = None
    commit: str | None = None
    by: str | None = None
    at: str | None = None
    v: int = VERSION

    def fits(self, found: os.stat_result) -> bool:
        """Return whether this is the sealed file, unchanged."""
        return self.size == found.st_size and self.mtime == whole_mtime(found)


_FIELDS: Final = frozenset(item.name for item in fields(Seal))


def whole_mtime(found: os.stat_result) -> int:
    """Return the mtime that a seal records: the second of the last change. Some file systems drop the fraction."""
    return found.st_mtime_ns // 1_000_000_000


def seal_time() -> str:
    """Return the time for `Seal.at`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_seal(path: Path) -> Seal | None:
    """Return the seal, or None if there is no readable one. Ignore fields of a newer version."""
    try:
        fd = os.open(path, _READ)
        try:
            data = os.read(fd, _MAX_BYTES)
        finally:
            os.close(fd)
    except OSError:
        return None
    return decode_seal(data)


def decode_seal(data: bytes) -> Seal | None:
    """Return the seal in the bytes of its file, or None if they are no readable one."""
    try:
        values: Any = json.loads(data)
        seal = Seal(**{name: value for name, value in values.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError):
        return None
    numbers = type(seal.size) is int and type(seal.mtime) in {int, type(None)} and type(seal.v) is int
    texts = (seal.sha256, seal.etag, seal.repo, seal.file, seal.commit, seal.by, seal.at)
    sound = numbers and all(isinstance(text, (str, type(None))) for text in texts)
    return seal if sound and seal.v >= VERSION else None


def write_seal(path: Path, seal: Seal, opened: Callable[[], None] = lambda: None) -> None:
    """Replace the seal at `path`. Readers see the old one or all of the new one."""
    write_atomically(path, encode_seal(seal), opened=opened)


def encode_seal(seal: Seal) -> bytes:
    """Return the bytes of a seal's file."""
    return json.dumps(asdict(seal), indent=1).encode()


def stat_file(path: Path) -> os.stat_result | None:
    """Return the stat of a file to compare with its seal, following links. None if there is no regular file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a thousand of these at every start
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


@dataclass(frozen=True, slots=True)
class SourceOrigin:
    """Where a verified file is from, for its seal. It contains no secret."""

    repo: str | None
    file: str

    @classmethod
    def of(cls, spec: ModelSpec) -> SourceOrigin:
        """Return the source, without secrets."""
        if isinstance(spec.source, HubFile):
            return cls(spec.source.repo, spec.source.path)
        return cls(None, str(spec.source))


def new_seal(spec: ModelSpec, remote: RemoteFile, sha256: str, by: str, mtime: int | None = None) -> Seal:
    """Return the seal of a file that passed verification. Through S3 nobody knows its `mtime`."""
    origin = SourceOrigin.of(spec)
    return Seal(
        size=remote.size_bytes,
        mtime=mtime,
        sha256=sha256,
        etag=remote.etag,
        repo=origin.repo,
        file=origin.file,
        commit=remote.commit,
        by=by,
        at=seal_time(),
    )


def redownload_spec(title: str, seal: Seal) -> ModelSpec | None:
    """Return where a sealed model can be downloaded again, pinned to its content, or None if its seal does not tell."""
    if not seal.file:
        return None
    with contextlib.suppress(SpecInvalid):
        source = HubFile(seal.repo, seal.file, seal.commit or "main") if seal.repo else parse_source(seal.file)
        return ModelSpec(*split_title(title), source, seal.sha256, seal.size or None)
    return None


def sealed_titles(layout: Layout) -> Iterator[tuple[str, Path]]:
    """Yield every model of a volume that has a seal, and the seal's path."""
    for above, _, names in os.walk(layout.seals):
        for name in sorted(names):
            path = layout.seals.joinpath(above, name)
            if title := _title_at(path.relative_to(layout.seals).as_posix()):
                yield title, path


def _title_at(path: str) -> str | None:
    """Return the model whose seal has this path below the seals' folder. None for any other file there."""
    name = path.rpartition("/")[2]
    return title_of_seal(path) if name.endswith(".json") and not name.startswith(".") else None


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A model on a volume that has a seal, which may no longer fit its file."""

    folder: str
    name: str
    seal: Seal

    @property
    def title(self) -> str:
        """Return the model as people write it."""
        return f"{self.folder}/{self.name}"


def sealed_model_at(path: str, seal: Seal | None) -> SealedModel | None:
    """Return the sealed model on a volume from its seal's path below the seals' folder: `folder/name.json`."""
    title = _title_at(path)
    return SealedModel(*split_title(title), seal) if title and seal else None
