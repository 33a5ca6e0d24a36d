"""How a model's file stands, by one look without a lock or the network: every command asks here. Touches the disk."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from worker.base.text import forms
from worker.errors import FileUnusable, LinkAstray, ModelError, NotAModel, UnsafePath, VolumeFailed
from worker.store.disk import check_whole, foreign_in
from worker.store.seals import read_seal, stat_file, whole_mtime, write_seal

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from worker.spec import ModelSpec
    from worker.store.layout import Layout
    from worker.store.seals import Seal

_T = TypeVar("_T")
_R = TypeVar("_R")

_LOOKERS: Final = 8
_PROBED: Final = 16
_UPLOADED_S: Final = 60.0
_SLOW_LOOK_S: Final = 0.0003  # a look at a network file system takes about a millisecond, at a disk a tenth of this


class Standing(StrEnum):
    """How a file stands. No look finds `DAMAGED`: the file has to be read for it."""

    READY = "ready"  # its size and time are those of its seal
    BY_HAND = "by hand"  # there without a seal
    REPLACED = "replaced by hand"  # sealed once, with another size or time
    INCOMPLETE = "incomplete"  # neither, and its own header says another length
    ABSENT = "absent"
    DAMAGED = "damaged"  # size and time are those of its seal, the content is not


@dataclass(frozen=True, slots=True)
class Look:
    """One file as a look found it.

    `seal` is its seal, whether or not it fits. `stamp` differs once the file is another one or was written to. `error` is why
    an incomplete file cannot be used, or a ready one that is no model: what a source sent was once sealed without a look.
    `record` is what a seeder wrote down before an upload that it did not get to seal.
    """

    standing: Standing
    size_bytes: int = 0
    seal: Seal | None = None
    stamp: object = None
    error: ModelError | None = None
    record: Seal | None = None


def look(layout: Layout, folder: str, name: str) -> Look:
    """Say how a model's file stands. Nothing is written."""
    return look_at(layout.model(folder, name), layout.seal(folder, name))


def look_at(path: Path, seal_path: Path) -> Look:
    """As `look`, of a file and its seal."""
    found = stat_file(path)
    if found is None:
        return Look(Standing.ABSENT)
    size_bytes, seal = found.st_size, read_seal(seal_path)
    if seal and _fits(seal, seal_path, path, found):
        return Look(Standing.READY, size_bytes, seal, stamp_of(found), _foreign(path))
    error = trouble_of(path, size_bytes)
    standing = Standing.INCOMPLETE if error else Standing.REPLACED if seal else Standing.BY_HAND
    return Look(standing, size_bytes, seal, stamp_of(found), error)


def _foreign(path: Path) -> ModelError | None:
    with contextlib.suppress(OSError):
        found = foreign_in(path)
        return NotAModel(path, found) if found else None
    return None


def stamp_of(found: os.stat_result) -> tuple[int, ...]:
    """What another file under this name would have otherwise, and this one too once it was written to."""
    return found.st_size, found.st_mtime_ns, found.st_ino


def trouble_of(path: Path, size_bytes: int) -> ModelError | None:
    """Why a file without a fitting seal cannot be used, as far as that can be told without reading all of it."""
    try:
        check_whole(path, size_bytes)
    except FileUnusable as exc:
        return exc
    except OSError as exc:
        return VolumeFailed(path, f"it cannot be read ({exc.strerror})")
    return None


def _fits(seal: Seal, seal_path: Path, path: Path, found: os.stat_result) -> bool:
    """Whether the seal is about this file.

    One that was uploaded has no time yet. Its header has to agree with its size, and nothing may have changed it since it was
    sealed: a file of the same length that somebody put there later is known by its bytes only. What S3 stores may take a
    moment to be as it stays.
    """
    if seal.mtime is not None:
        return seal.fits(found)
    if seal.size != found.st_size or trouble_of(path, found.st_size) is not None:
        return False
    own = stat_file(seal_path)
    return own is not None and found.st_ctime <= own.st_ctime + _UPLOADED_S


def path_of(layout: Layout, spec: ModelSpec) -> Path:
    """The model's final path; raises `LinkAstray` for a link above it that leads nowhere, or out of the layout's root."""
    path = layout.model(spec.folder, spec.name)
    root = layout.root.resolve()
    if path.parent.resolve().is_relative_to(root) and path.resolve().is_relative_to(root) and path.parent.exists():
        return path
    for place in (*reversed(path.relative_to(layout.root).parents), path.relative_to(layout.root)):
        link = layout.root / place
        if link.is_symlink() and not (link.resolve().is_relative_to(root) and (link.exists() or link == path)):
            raise LinkAstray("The link", str(link), target=str(link.readlink()), exists=link.exists())
    return path


def sealed(layout: Layout, folder: str, name: str) -> tuple[Path, Seal] | None:
    """The file and its seal, if it is ready: one stat, one small read. A seal without a time gets the file's."""
    path = layout.model(folder, name)
    found = stat_file(path)
    seal = read_seal(layout.seal(folder, name)) if found else None
    if found is None or seal is None or not _fits(seal, layout.seal(folder, name), path, found):
        return None
    if seal.mtime is None:
        with contextlib.suppress(OSError):
            write_seal(layout.seal(folder, name), replace(seal, mtime=whole_mtime(found)))
    return path, seal


def lacking(layouts: Iterable[Layout], specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Those of the models that something is left to do for: to fetch or adopt them, or to say what is wrong with them.

    The others lie under the first layout that has them: sealed, as the file that is asked for, or put there by hand where
    nobody says what the file should hash to.
    """
    left = list(specs)
    for layout in layouts:
        there = _each(partial(_is_settled, layout), left)
        left = [spec for spec, settled in zip(left, there, strict=True) if not settled]
    return left


def record(layout: Layout, spec: ModelSpec, found: os.stat_result) -> Seal | None:
    """What was written down about a file of this size: by a publication that was cut short, or before it was touched."""
    for place in (layout.pending(found.st_ino), layout.pending_seal(spec.folder, spec.name)):
        pending = read_seal(place)
        if pending and pending.fits(found):
            return pending
    seal = read_seal(layout.seal(spec.folder, spec.name))
    return seal if seal and seal.size == found.st_size else None


def spelled(layout: Layout, spec: ModelSpec) -> ModelSpec:
    """The model with its name as the file that is there has it, where that only writes accents in the other way."""
    names = forms(spec.name)
    there = (name for name in names if len(names) > 1 and stat_file(layout.model(spec.folder, name)))
    return replace(spec, name=next(there, spec.name))


def _is_settled(layout: Layout, spec: ModelSpec) -> bool:
    spec = spelled(layout, spec)
    there = sealed(layout, spec.folder, spec.name)
    if there:
        sha256 = there[1].sha256
        return None in {spec.sha256, sha256} or sha256 == spec.sha256
    return spec.sha256 is None and _is_by_hand(layout, spec)


def _is_by_hand(layout: Layout, spec: ModelSpec) -> bool:
    """Whether it is a file that is used as it is, because nobody says what it should hash to."""
    found = stat_file(layout.model(spec.folder, spec.name))
    if found is None or record(layout, spec, found):
        return False
    with contextlib.suppress(UnsafePath):
        return trouble_of(path_of(layout, spec), found.st_size) is None
    return False


def _each(look: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """What each look says, in their order."""
    first, rest = items[:_PROBED], items[_PROBED:]
    began_s = time.monotonic()
    said = [look(item) for item in first]
    if time.monotonic() - began_s < _SLOW_LOOK_S * len(first):
        # Threads on a local disk wait for each other's interpreter lock, not for the disk: 1,000 models take 30 ms, not 80.
        return said + [look(item) for item in rest]
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="ready") as pool:
        return said + list(pool.map(look, rest, chunksize=32))
