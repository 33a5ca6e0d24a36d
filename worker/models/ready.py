"""Which models are there to be used: a look at each, without a lock, the network or what fetches. Touches the disk."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from worker.errors import FileIncomplete, UnsafePath
from worker.models.disk import check_whole
from worker.models.seals import read_seal, stat_file, whole_mtime, write_seal

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from worker.models.layout import Layout
    from worker.models.seals import Seal
    from worker.models.spec import ModelSpec

_T = TypeVar("_T")
_R = TypeVar("_R")

_LOOKERS: Final = 8
_PROBED: Final = 16
_SLOW_LOOK_S: Final = 0.0003  # a look at a network file system takes about a millisecond, at a disk a tenth of this


def path_of(layout: Layout, spec: ModelSpec) -> Path:
    """The model's final path; raises `UnsafePath` where links lead out of the layout's root."""
    path = layout.model(spec.folder, spec.name)
    root = layout.root.resolve()
    if not (path.parent.resolve().is_relative_to(root) and path.resolve().is_relative_to(root)):
        raise UnsafePath("The model's name", f"{spec.folder}/{spec.name}")
    return path


def sealed(layout: Layout, folder: str, name: str) -> tuple[Path, Seal] | None:
    """The file and its seal, if the file's size and whole-second mtime are those of the seal: one stat, one small read."""
    path = layout.model(folder, name)
    found = stat_file(path)
    seal = read_seal(layout.seal(folder, name)) if found else None
    if found is None or seal is None:
        return None
    if seal.mtime is None and seal.size == found.st_size:
        return (path, seal) if _fill_in(layout.seal(folder, name), seal, path, found) else None
    return (path, seal) if seal.fits(found) else None


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
    pending = read_seal(layout.pending_seal(spec.folder, spec.name))
    if pending and pending.fits(found):
        return pending
    seal = read_seal(layout.seal(spec.folder, spec.name))
    return seal if seal and seal.size == found.st_size else None


def _is_settled(layout: Layout, spec: ModelSpec) -> bool:
    there = sealed(layout, spec.folder, spec.name)
    if there:
        sha256 = there[1].sha256
        return None in {spec.sha256, sha256} or sha256 == spec.sha256
    return spec.sha256 is None and _is_by_hand(layout, spec)


def _is_by_hand(layout: Layout, spec: ModelSpec) -> bool:
    found = stat_file(layout.model(spec.folder, spec.name))
    if found is None or record(layout, spec, found):
        return False
    with contextlib.suppress(UnsafePath, FileIncomplete, OSError):
        check_whole(path_of(layout, spec), found.st_size)
        return True
    return False


def _fill_in(place: Path, seal: Seal, path: Path, found: os.stat_result) -> bool:
    """Complete the seal of an uploaded file, whose mtime nobody knew, once its header agrees with its size."""
    try:
        check_whole(path, found.st_size)
    except (FileIncomplete, OSError):
        return False
    with contextlib.suppress(OSError):
        write_seal(place, replace(seal, mtime=whole_mtime(found)))
    return True


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
