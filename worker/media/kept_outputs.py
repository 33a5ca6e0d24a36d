"""Keeps what ComfyUI wrote until there is too much of it: a cached re-run returns the same files again. Touches disk.

The oldest goes first, where a file is as old as its writing or its last delivery. Never touched: files of the jobs being
delivered, of the last one and of one that runs; files that were there before the first worker used the folder, and folders on
the network volume: they are somebody's; and the folders below `output` from which ComfyUI loads models.

ComfyUI numbers its files from the highest number it finds. If that file went, the next one would get its name, and a cached
re-run that still names it would return somebody else's picture. So an empty file stays in its place, and counts as gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.comfyui_data import known

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

log = logging.getLogger(__name__)

_MARKER: Final = ".kept-by-worker"
_PLACEHOLDER: Final = "_output_images_will_be_put_here"
# Files that no node lists are found by a walk only; one every so many jobs finds them at no cost that shows.
_JOBS_A_WALK: Final = 100
# File systems stamp a file with a clock that lags a little behind.
_CLOCKS_APART_S: Final = 2.0
# Empty files that hold a number. With more of them ComfyUI's own look at the folder takes milliseconds; it remembers the
# results of the last graph, or of as many as --cache-lru says, so the oldest are of no use any more.
_MOST_HELD: Final = 1_000
_HOLDER: Final = ".kept-by-worker.new"
# Down to less than the limit, so that a full folder is not walked after every job.
_DOWN_TO: Final = 0.9


class KeptOutputs:
    """ComfyUI's output and preview folders, together kept below a size. Safe to use from many threads.

    Nothing is walked but at `start` and when `due` says so: between walks the sizes of delivered files are added up.
    """

    def __init__(self, output_dir: Path, temp_dir: Path, limit_bytes: int, *, spare: Sequence[Path] = ()) -> None:
        self._output_dir = output_dir
        self._temp_dir = temp_dir
        self._limit_bytes = limit_bytes
        self._spare = spare
        self._lock = threading.Lock()
        self._sweeping = threading.Lock()
        self._folders: tuple[Path, ...] | None = None
        self._foreign: frozenset[str] = frozenset()
        self._delivered: dict[str, float] = {}
        self._held: dict[str, None] = {}
        self._in_use: dict[str, int] = {}
        self._latest: frozenset[str] = frozenset()
        self._begun_at = 0.0
        self._bytes = 0
        self._jobs = 0

    def start(self) -> None:
        """Learn which files are the worker's to remove, before the first job writes one."""
        with self._sweeping:
            if self._folders is None:
                folders = [self._temp_dir]
                if any(self._output_dir.resolve().is_relative_to(root.resolve()) for root in self._spare):
                    log.info("%s is on the network volume: nothing in it is ever removed", self._output_dir)
                else:
                    folders.insert(0, self._output_dir)
                    self._foreign = _foreign(self._output_dir)
                self._folders = tuple(folders)

    @contextlib.contextmanager
    def using(self, files: Mapping[Path, int]) -> Iterator[None]:
        """Keep these files (with their sizes) while the body delivers them, and until another job was delivered."""
        names = frozenset(map(str, files))
        with self._lock:
            self._begun_at = time.time()
            for name in names:
                self._in_use[name] = self._in_use.get(name, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                for name in names:
                    self._in_use[name] -= 1
                    if not self._in_use[name]:
                        del self._in_use[name]
                self._bytes += sum(size for path, size in files.items() if str(path) not in self._delivered)
                self._delivered.update(dict.fromkeys(names, time.time()))
                self._latest = names

    def count_job(self) -> None:
        """A job has run. What it left may be in no delivery: it failed, or nobody could take its files."""
        with self._lock:
            self._jobs += 1

    def due(self) -> bool:
        """Whether `sweep` could have something to do, and is not at it; costs nothing."""
        if self._sweeping.locked():
            return False
        with self._lock:
            return self._bytes > self._limit_bytes or self._jobs >= _JOBS_A_WALK

    def is_gone(self, path: Path, size_bytes: int) -> bool:
        """Whether the file only holds the number of one that was removed."""
        return size_bytes == 0 and str(path) in self._held

    def sweep(self) -> None:
        """Walk the folders and remove the oldest files until what is left is below the limit."""
        self.start()
        with self._sweeping:
            found = sorted(self._walk())
            highest = _highest(path for _, _, path in found)
            total_bytes, removed = sum(size for _, size, _ in found), 0
            goal_bytes = self._limit_bytes * _DOWN_TO if total_bytes > self._limit_bytes else total_bytes
            there = {path for _, _, path in found}
            for _, size_bytes, path in found:
                if total_bytes <= goal_bytes:
                    break
                if path not in self._held and self._remove(path, hold=_is_highest(path, highest)):
                    there.discard(path)
                    total_bytes -= size_bytes
                    removed += 1
            self._let_go(highest)
            with self._lock:
                self._bytes, self._jobs = total_bytes, 0
                self._delivered = {path: at for path, at in self._delivered.items() if path in there}
        if removed:
            log.info("removed the %d oldest outputs, %.0f MB are kept", removed, total_bytes / 1e6)

    def _walk(self) -> Iterator[tuple[float, int, str]]:
        """Age, size and path of every file that may be removed."""
        for folder in self._folders or ():
            for path, found in _files(str(folder), spare_models=folder == self._output_dir):
                if found.st_size:
                    self._held.pop(path, None)  # a node has written it again
                # What was written since the last delivery began belongs to a job that runs, perhaps beside that delivery.
                if path not in self._foreign and found.st_mtime < self._begun_at - _CLOCKS_APART_S:
                    yield max(found.st_mtime, self._delivered.get(path, 0.0)), found.st_size, path

    def _remove(self, path: str, *, hold: bool) -> bool:
        # Under the lock: a delivery that begins now either has the file, or does not find it and the job runs again.
        with self._lock:
            if path in self._in_use or path in self._latest:
                return False
            with contextlib.suppress(OSError):
                if hold:
                    self._held[path] = None
                    _empty(Path(path))
                else:
                    Path(path).unlink()
                return True
        return False

    def _let_go(self, highest: Mapping[tuple[str, str], int]) -> None:
        """Remove the empty files that hold no number any more, and the oldest when there are too many."""
        holding = [path for path in self._held if _is_highest(path, highest)]
        kept = set(holding[-_MOST_HELD:])
        for path in [path for path in self._held if path not in kept]:
            if self._remove(path, hold=False):
                self._held.pop(path, None)


def _numbers(path: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Each way to read a file's name as a prefix and a number: a_2_00005_.png is number 2 of a, and number 5 of a_2."""
    folder, name = os.path.split(path)
    for match in re.finditer(r"_0*([0-9]{1,18})(?![0-9])", name):
        yield (folder, name[: match.start()]), int(match[1])


def _highest(paths: Iterable[str]) -> dict[tuple[str, str], int]:
    """The highest number of each prefix in each folder."""
    highest: dict[tuple[str, str], int] = {}
    for path in paths:
        for prefix, number in _numbers(path):
            highest[prefix] = max(number, highest.get(prefix, 0))
    return highest


def _is_highest(path: str, highest: Mapping[tuple[str, str], int]) -> bool:
    return any(number >= highest.get(prefix, 0) for prefix, number in _numbers(path))


def _empty(path: Path) -> None:
    """Put an empty file of the same age in a file's place, at once."""
    found, holder = path.stat(), path.with_name(_HOLDER)
    holder.touch()
    os.utime(holder, (found.st_atime, found.st_mtime))
    holder.replace(path)


def _foreign(folder: Path) -> frozenset[str]:
    """What was in the folder before any worker: all of it, unless a worker found it empty once and marked it as its own."""
    marker = folder / _MARKER
    if marker.exists():
        return frozenset()
    there = frozenset(path for path, _ in _files(str(folder)) if Path(path).name != _PLACEHOLDER)
    if not there:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return there


def _files(folder: str, *, spare_models: bool = False) -> Iterable[tuple[str, os.stat_result]]:
    """Every regular file below, following no links."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                if not (spare_models and entry.name in known().output_model_folders):
                    yield from _files(entry.path)
            elif entry.is_file(follow_symlinks=False) and entry.name not in {_MARKER, _PLACEHOLDER}:
                yield entry.path, entry.stat(follow_symlinks=False)
        except OSError:
            continue
