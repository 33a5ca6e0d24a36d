"""The state of a model's file, by one look without a lock or the network. Every command asks here. Touches the disk."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from worker.base.text import unicode_forms
from worker.errors import FileUnusable, LinkAstray, ModelError, NotAModel, UnsafePath, VolumeFailed
from worker.store.file_formats import check_whole, foreign_in
from worker.store.seals import read_seal, stat_file, whole_mtime, write_seal

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from worker.model_spec import ModelSpec
    from worker.store.layout import Layout
    from worker.store.seals import Seal

_T = TypeVar("_T")
_R = TypeVar("_R")

_LOOKERS: Final = 8
_PROBED: Final = 16
_UPLOADED_S: Final = 60.0
_SLOW_LOOK_S: Final = 0.0003  # a look takes about a millisecond on a network file system, a tenth of that on a disk


class Standing(StrEnum):
    """The state of a model's file in the inventory. No look finds `DAMAGED`: that requires reading the file."""

    READY = "ready"  # size and time equal its seal
    BY_HAND = "by hand"  # present without a seal
    REPLACED = "replaced by hand"  # sealed once, with another size or time
    INCOMPLETE = "incomplete"  # neither, and its own header states another length
    ABSENT = "absent"
    DAMAGED = "damaged"  # size and time equal its seal, but the content differs


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """One model's file as a look found it.

    `seal` is its seal, whether or not it fits. `stamp` changes if the file is replaced or written to. `error` is why an
    incomplete file cannot be used, or why a ready one is no model (old versions sealed a source's answer without a look).
    `record` is what a seeder wrote down before an upload that it did not seal.
    """

    standing: Standing
    size_bytes: int = 0
    seal: Seal | None = None
    stamp: object = None
    error: ModelError | None = None
    record: Seal | None = None


def look_up_file(layout: Layout, folder: str, name: str) -> InventoryEntry:
    """Return the inventory's entry for a model: the state of its file. Write nothing."""
    return look_at_file(layout.model(folder, name), layout.seal(folder, name))


def look_at_file(path: Path, seal_path: Path) -> InventoryEntry:
    """Return the inventory's entry for a file and its seal."""
    found = stat_file(path)
    if found is None:
        return InventoryEntry(Standing.ABSENT)
    size_bytes, seal = found.st_size, read_seal(seal_path)
    if seal and _seal_fits(seal, seal_path, path, found):
        return InventoryEntry(Standing.READY, size_bytes, seal, file_stamp(found), _foreign(path))
    error = trouble_of(path, size_bytes)
    standing = Standing.INCOMPLETE if error else Standing.REPLACED if seal else Standing.BY_HAND
    return InventoryEntry(standing, size_bytes, seal, file_stamp(found), error)


def _foreign(path: Path) -> ModelError | None:
    with contextlib.suppress(OSError):
        found = foreign_in(path)
        return NotAModel(path, found) if found else None
    return None


def file_stamp(found: os.stat_result) -> tuple[int, ...]:
    """Return values that change if the file of an inventory entry is replaced or written to."""
    return found.st_size, found.st_mtime_ns, found.st_ino


def trouble_of(path: Path, size_bytes: int) -> ModelError | None:
    """Return why the inventory calls a file without a fitting seal unusable, as far as that shows without reading all of it."""
    try:
        check_whole(path, size_bytes)
    except FileUnusable as exc:
        return exc
    except OSError as exc:
        return VolumeFailed(path, f"it cannot be read ({exc.strerror})")
    return None


def _seal_fits(seal: Seal, seal_path: Path, path: Path, found: os.stat_result) -> bool:
    """Return whether the inventory's file still fits the seal.

    An uploaded file has no time in its seal yet. Its header must then agree with its size, and nothing may have changed it
    since it was sealed: another file of the same length, put there later, differs only in its bytes. What S3 stores may take a
    moment to become stable.
    """
    if seal.mtime is not None:
        return seal.fits(found)
    if seal.size != found.st_size or trouble_of(path, found.st_size) is not None:
        return False
    own = stat_file(seal_path)
    return own is not None and found.st_ctime <= own.st_ctime + _UPLOADED_S


def resolved_path(layout: Layout, spec: ModelSpec) -> Path:
    """Return a model file's path for the inventory. Raises `LinkAstray` if a link above it leads nowhere or out of the root."""
    path = layout.model(spec.folder, spec.name)
    root = layout.root.resolve()
    if path.parent.resolve().is_relative_to(root) and path.resolve().is_relative_to(root) and path.parent.exists():
        return path
    for place in (*reversed(path.relative_to(layout.root).parents), path.relative_to(layout.root)):
        link = layout.root / place
        if link.is_symlink() and not (link.resolve().is_relative_to(root) and (link.exists() or link == path)):
            raise LinkAstray("The link", str(link), target=str(link.readlink()), exists=link.exists())
    return path


def ready_file(layout: Layout, folder: str, name: str) -> tuple[Path, Seal] | None:
    """Return a model's file and its seal if the inventory finds it ready. A seal without a time gets the file's."""
    path = layout.model(folder, name)
    found = stat_file(path)
    seal = read_seal(layout.seal(folder, name)) if found else None
    if found is None or seal is None or not _seal_fits(seal, layout.seal(folder, name), path, found):
        return None
    if seal.mtime is None:
        with contextlib.suppress(OSError):
            write_seal(layout.seal(folder, name), replace(seal, mtime=whole_mtime(found)))
    return path, seal


def not_ready(layouts: Iterable[Layout], specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Return the models that the inventory finds not ready: they need a download, an adoption, or an error message.

    The others lie under the first layout that has them: sealed as the requested file, or put there by hand where no hash is
    known.
    """
    left = list(specs)
    for layout in layouts:
        there = _look_in_parallel(partial(_needs_nothing, layout), left)
        left = [spec for spec, settled in zip(left, there, strict=True) if not settled]
    return left


def find_record(layout: Layout, spec: ModelSpec, found: os.stat_result) -> Seal | None:
    """Return the record that the inventory has of a file of this size: from a publication that was cut short, or older."""
    for place in (layout.pending(found.st_ino), layout.pending_seal(spec.folder, spec.name)):
        pending = read_seal(place)
        if pending and pending.fits(found):
            return pending
    seal = read_seal(layout.seal(spec.folder, spec.name))
    return seal if seal and seal.size == found.st_size else None


def as_spelled(layout: Layout, spec: ModelSpec) -> ModelSpec:
    """Return the model with its name as the file in the inventory spells it, if only the form of accents differs."""
    names = unicode_forms(spec.name)
    there = (name for name in names if len(names) > 1 and stat_file(layout.model(spec.folder, name)))
    return replace(spec, name=next(there, spec.name))


def _needs_nothing(layout: Layout, spec: ModelSpec) -> bool:
    spec = as_spelled(layout, spec)
    there = ready_file(layout, spec.folder, spec.name)
    if there:
        sha256 = there[1].sha256
        return None in {spec.sha256, sha256} or sha256 == spec.sha256
    return spec.sha256 is None and _is_by_hand(layout, spec)


def _is_by_hand(layout: Layout, spec: ModelSpec) -> bool:
    """Return whether the inventory calls the file one put by hand: no hash is known for it, and it is used as it is."""
    found = stat_file(layout.model(spec.folder, spec.name))
    if found is None or find_record(layout, spec, found):
        return False
    with contextlib.suppress(UnsafePath):
        return trouble_of(resolved_path(layout, spec), found.st_size) is None
    return False


def _look_in_parallel(look: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Return the results of the looks at many files, in order."""
    first, rest = items[:_PROBED], items[_PROBED:]
    began_s = time.monotonic()
    said = [look(item) for item in first]
    if time.monotonic() - began_s < _SLOW_LOOK_S * len(first):
        # On a local disk threads wait for the interpreter lock, not for the disk: without them 1,000 models take 30 ms instead
        # of 80.
        return said + [look(item) for item in rest]
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="ready") as pool:
        return said + list(pool.map(look, rest, chunksize=32))
