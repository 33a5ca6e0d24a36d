"""Keep ComfyUI's outputs up to a size limit, because a cached run returns the same files again. Touches disk.

The oldest files are removed first; a file's age is that of its writing or its last delivery. Never removed: files of the jobs
being delivered, of the last job and of a running one; files that existed before the first worker used the folder; folders on
the network volume; and the folders below `output` from which ComfyUI loads models.

ComfyUI numbers its files from the highest existing number. If that file were removed, the next one would get its name, and a
cached run that still names it would return another job's picture. So an empty file stays in its place, and counts as missing.
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

from worker.base.text import count, size_text
from worker.comfyui_data import known

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

log = logging.getLogger(__name__)

_MARKER: Final = ".kept-by-worker"
_PLACEHOLDER: Final = "_output_images_will_be_put_here"
# Only a walk finds files that no node lists. One walk in so many jobs costs nothing measurable.
_JOBS_A_WALK: Final = 100
# File systems stamp a file with a clock that lags a little.
_CLOCKS_APART_S: Final = 2.0
# Empty files that hold a number. With more of them ComfyUI's own listing takes milliseconds. It remembers the results of the
# last graph, or of as many as --cache-lru says, so the oldest are no longer needed.
_MOST_HELD: Final = 1_000
_HOLDER: Final = ".kept-by-worker.new"
# Sweep to less than the limit, so that a full folder is not walked after every job.
_DOWN_TO: Final = 0.9


class KeptOutputs:
    """Keeps ComfyUI's output and preview folders together below a size. Safe to use from many threads.

    It walks the folders only at `start` and when `due` says so. Between walks it adds up the sizes of delivered files.
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
        """Record which files the worker may remove, before the first job writes one."""
        with self._sweeping:
            if self._folders is None:
                folders = [self._temp_dir]
                if any(self._output_dir.resolve().is_relative_to(root.resolve()) for root in self._spare):
                    log.info("%s is on the network volume: nothing in it is ever removed", self._output_dir)
                else:
                    folders.insert(0, self._output_dir)
                    self._foreign = _outputs_of_others(self._output_dir)
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
        """Count a job. It may leave files that no delivery lists: it failed, or nobody could take them."""
        with self._lock:
            self._jobs += 1

    def due(self) -> bool:
        """Return whether `sweep` could have work and is not running. Costs nothing."""
        if self._sweeping.locked():
            return False
        with self._lock:
            return self._bytes > self._limit_bytes or self._jobs >= _JOBS_A_WALK

    def is_gone(self, path: Path, size_bytes: int) -> bool:
        """Return whether the file only holds the number of a removed one."""
        return size_bytes == 0 and str(path) in self._held

    def sweep(self) -> None:
        """Walk the folders and remove the oldest files until the rest is below the limit."""
        self.start()
        with self._sweeping:
            found = sorted(self._walk())
            highest = _highest_numbers(path for _, _, path in found)
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
            self._forget(highest)
            with self._lock:
                self._bytes, self._jobs = total_bytes, 0
                self._delivered = {path: at for path, at in self._delivered.items() if path in there}
        if removed:
            log.info("removed the oldest outputs (%s); %s are kept", count(removed, "file"), size_text(total_bytes))

    def _walk(self) -> Iterator[tuple[float, int, str]]:
        """Yield age, size and path of every file that may be removed."""
        for folder in self._folders or ():
            for path, found in _output_files(str(folder), spare_models=folder == self._output_dir):
                if found.st_size:
                    self._held.pop(path, None)  # a node has written it again
                # Files newer than the last delivery's start belong to a job that runs, perhaps beside that delivery.
                if path not in self._foreign and found.st_mtime < self._begun_at - _CLOCKS_APART_S:
                    yield max(found.st_mtime, self._delivered.get(path, 0.0)), found.st_size, path

    def _remove(self, path: str, *, hold: bool) -> bool:
        # Under the lock: a delivery that begins now either has the file, or does not find it and runs its node again.
        with self._lock:
            if path in self._in_use or path in self._latest:
                return False
            with contextlib.suppress(OSError):
                if hold:
                    self._held[path] = None
                    _empty_output(Path(path))
                else:
                    Path(path).unlink()
                return True
        return False

    def _forget(self, highest: Mapping[tuple[str, str], int]) -> None:
        """Remove empty files that hold no number any more, and the oldest if there are too many."""
        holding = [path for path in self._held if _is_highest(path, highest)]
        kept = set(holding[-_MOST_HELD:])
        for path in [path for path in self._held if path not in kept]:
            if self._remove(path, hold=False):
                self._held.pop(path, None)


def _output_numbers(path: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield each way to read a kept output's name as prefix and number: a_2_00005_.png is number 2 of a and number 5 of a_2."""
    folder, name = os.path.split(path)
    for match in re.finditer(r"_0*([0-9]{1,18})(?![0-9])", name):
        yield (folder, name[: match.start()]), int(match[1])


def _highest_numbers(paths: Iterable[str]) -> dict[tuple[str, str], int]:
    """Return the highest number of each prefix of the kept outputs in each folder."""
    highest: dict[tuple[str, str], int] = {}
    for path in paths:
        for prefix, number in _output_numbers(path):
            highest[prefix] = max(number, highest.get(prefix, 0))
    return highest


def _is_highest(path: str, highest: Mapping[tuple[str, str], int]) -> bool:
    return any(number >= highest.get(prefix, 0) for prefix, number in _output_numbers(path))


def _empty_output(path: Path) -> None:
    """Keep an output's number taken: replace the file atomically by an empty one of the same age."""
    found, holder = path.stat(), path.with_name(_HOLDER)
    holder.touch()
    os.utime(holder, (found.st_atime, found.st_mtime))
    holder.replace(path)


def _outputs_of_others(folder: Path) -> frozenset[str]:
    """Return the outputs that are always kept, from before any worker: all in a folder that none found empty and marked."""
    marker = folder / _MARKER
    if marker.exists():
        return frozenset()
    there = frozenset(path for path, _ in _output_files(str(folder)) if Path(path).name != _PLACEHOLDER)
    if not there:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return there


def _output_files(folder: str, *, spare_models: bool = False) -> Iterable[tuple[str, os.stat_result]]:
    """Yield every file below a folder of kept outputs, without following links."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                if not (spare_models and entry.name in known().output_model_folders):
                    yield from _output_files(entry.path)
            elif entry.is_file(follow_symlinks=False) and entry.name not in {_MARKER, _PLACEHOLDER}:
                yield entry.path, entry.stat(follow_symlinks=False)
        except OSError:
            continue
