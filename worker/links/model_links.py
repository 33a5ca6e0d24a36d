"""Link the volume's models into ComfyUI's own `models` folder. Touches the disk.

Every file under a root's `<folder>/` appears under ComfyUI's `models/<folder>/`: in all folders, nested ones, and ones unknown
to ComfyUI. Real files, and links that lead elsewhere, are never touched. A link is only replaced or removed if it leads to its
own name under one of the roots, which is what this module creates.

**One link for each file, or one for a folder.** ComfyUI lists models by walking folders through links. For each file link it
stats the target, which is a round trip on a network volume. Through one link for the whole folder it reads only names. But
folder links have a price: what a custom node saves there lands on the volume, and if the folder disappears ComfyUI answers 500
until the folder exists again. So they are used for large folders only; see `LARGE_FOLDER`. A folder can be one link only if
ComfyUI's own folder has no real file in it, not even `put_loras_here`.
"""

# ruff: noqa: PTH100, PTH116
# No Path objects: one for each of 10,000 names costs more than the system calls do.

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.base.text import count
from worker.comfyui_data import known
from worker.links.scan import LinkProblem, ProblemKind, Scan
from worker.links.sync import SyncedView, SyncPass, is_under

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["LARGE_FOLDER", "LinkProblem", "LinkReport", "ModelLinks", "ProblemKind", "VisibleFile"]

LARGE_FOLDER = 64
"""From this number of files on (here and below) a folder becomes one link.

`bench/links.py` lists a folder with ComfyUI's own code, medians in ms, on MooseFS (on ext4):

    files                          64        256      1,000       10,000
    a link for each file    15  (1.0)   56 (3.6)   184 (12)  1,845 (122)
    one link for the folder  2  (0.6)    4 (1.8)     7  (6)     91  (63)

So each file link adds 0.1-0.2 ms on a network volume (0.006 on a disk). Below 64 files that is at most 13 ms for a folder, in
an engine that takes seconds to start, which is less than the risks of a folder link are worth. Creating 10,000 file links takes
0.3-1.1 s. Creating the one link and looking at what it shows takes 10-13 ms.
"""

_SECOND_NS = 1_000_000_000
_SHOWN = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkReport:
    """The state of ComfyUI's models folder after a refresh."""

    files: int
    """The number of the roots' files that ComfyUI sees, through links of either kind."""
    folders: int
    """The number of folders that are one link."""
    made: int
    removed: int
    problems: tuple[LinkProblem, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class VisibleFile:
    """A file or folder that ComfyUI sees through the links: its path below ComfyUI's models folder, and its target's stat."""

    path: str
    info: os.stat_result


class ModelLinks:
    """Keeps ComfyUI's models folder in sync with one or more roots. The first root that has a name wins.

    It is safe to use from several threads: refreshes take turns, and queries use the last one. A new object takes over links
    that another process made.
    """

    def __init__(
        self,
        models_dir: Path,
        roots: Sequence[Path],
        *,
        large_folder: int = LARGE_FOLDER,
        within: Sequence[Path] = (),
        host_cache: Path | None = None,
    ) -> None:
        """Set the folders. `within` is where symlinks on the volume may lead besides the roots, usually the volume itself.

        `host_cache` is a root before all others, with copies that are faster to read. That it repeats a name is no problem.
        """
        self._models = os.path.abspath(models_dir)
        self._host_cache = os.path.abspath(host_cache) if host_cache else None
        self._roots = [os.path.abspath(root) for root in ([host_cache, *roots] if host_cache else roots)]
        self._within = [str(place) for place in within]
        self._large_folder = large_folder
        self._lock = threading.Lock()
        self._view = SyncedView()
        self._known_problems: frozenset[LinkProblem] = frozenset()

    def refresh(self) -> LinkReport:
        """Make ComfyUI's models folder show the current files of the roots.

        If nothing changed, this lists both sides. A problem with a name is added to the report, and the other names are still
        linked. Disk errors are not raised: a worker with fewer models is better than none.
        """
        with self._lock:
            started = time.perf_counter()
            models = os.path.realpath(self._models)
            reals = [os.path.realpath(root) for root in self._roots]
            scan = Scan(map(os.path.realpath, (*self._roots, *self._within)), leave_out=models)
            # A root that IS the models folder (ComfyUI on the volume, or its models folder one link to it) needs no links.
            roots = [scan.root(root) for root, real in zip(self._roots, reals, strict=True) if real != models]
            run = SyncPass(models, roots, self._view, scan, self._large_folder, host_cache=self._host_cache)
            run.folder("", roots)
            view = SyncedView(run.places, run.sources, frozenset(run.linked))
            _touch_changed_folders(self._view, view)
            self._view = view
            problems = {*scan.problems, *run.problems, *_aliased(models, view)}
            report = LinkReport(
                files=run.files,
                folders=len(run.linked),
                made=run.made,
                removed=run.removed,
                problems=tuple(sorted(problems, key=lambda problem: (problem.path, problem.kind.name))),
                seconds=time.perf_counter() - started,
            )
            self._log(report)
            return report

    def has(self, folders: Sequence[str], name: str) -> bool:
        """Return whether ComfyUI would find `name`; see `find`."""
        return self.find(folders, name) is not None

    def find(self, folders: Sequence[str], name: str) -> VisibleFile | None:
        """Return where ComfyUI would find an existing `name` under one of these folders. Without folders, search all of them.

        It makes one stat call for each folder up to that one. What it finds needs no refresh. None may also mean that the file
        came after the last refresh: refresh, then ask again. A folder counts as well, for loaders that take one (diffusers).
        """
        if not _is_plain(name):
            return None
        view = self._view
        places = (f"{folder}/{name}" for folder in _with_aliases(folders or sorted(view.tops())))
        return next((found for place in places if (found := self._live(view, place))), None)

    def _live(self, view: SyncedView, relative: str) -> VisibleFile | None:
        path = f"{self._models}/{relative}"
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return None
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return None
        # A folder link shows more than the last refresh saw: files in flight, or newer than ComfyUI's listing (see
        # _move_clocks).
        folder, _, last = relative.rpartition("/")
        is_shown = not is_under(view.linked, relative) or view.holds(folder, last) or relative in view.sources
        return VisibleFile(path, found) if is_shown else None

    def _log(self, report: LinkReport) -> None:
        if report.made or report.removed:
            _logger.info(
                "models: %s linked, %s as one link; %s made, %d removed in %.0f ms",
                count(report.files, "file"),
                count(report.folders, "folder"),
                count(report.made, "link"),
                report.removed,
                report.seconds * 1000,
            )
        new = [problem for problem in report.problems if problem not in self._known_problems]
        if new:
            shown = " ".join(map(str, new[:_SHOWN]))
            need = "needs attention" if len(new) == 1 else "need attention"
            more = " ..." if len(new) > _SHOWN else ""
            _logger.warning("models: %s %s: %s%s", count(new, "name"), need, shown, more)
        self._known_problems = frozenset(report.problems)


def _aliased(models: str, view: SyncedView) -> Iterator[LinkProblem]:
    """Yield names of model links that exist in both of two folders that ComfyUI reads as one, unless they are one file."""
    for first, second in known().same_folders:
        for folder in view.folders():
            if not is_under((second,), folder):
                continue
            twin = first + folder[len(second) :]
            for name in view.names(folder) & view.names(twin):
                if _origin(models, view, folder, name) != _origin(models, view, twin, name):
                    yield LinkProblem(ProblemKind.ALIAS, f"{models}/{folder}/{name}", f"{models}/{twin}/{name}")


def _origin(models: str, view: SyncedView, folder: str, name: str) -> str:
    place = view.places.get(folder)
    if place is None or not (name in place.files or name in place.foreign):
        for source in view.sources.get(folder, ()):
            if name in source.files:
                return source.real_path(name)
    return os.path.realpath(f"{models}/{folder}/{name}")


def _touch_changed_folders(before: SyncedView, after: SyncedView) -> None:
    """Make sure that a linked folder of models has a new mtime if its names changed.

    ComfyUI lists a folder again if its mtime changed. On a file system with whole-second mtimes (MooseFS) it misses a file that
    arrives within the second of the last change it saw, and a mount may keep an old mtime for a second more. So the mtime is
    moved forward by a second. Where that is not allowed (a read-only cache) the file is seen after the next change.
    """
    for relative in before.sources.keys() & after.sources.keys():
        if not (is_under(before.linked, relative) and is_under(after.linked, relative)):
            continue
        then, now = before.sources[relative][0], after.sources[relative][0]
        if then.files == now.files and then.folders.keys() == now.folders.keys():
            continue
        with suppress(OSError):
            info = os.stat(now.path)
            if info.st_mtime_ns % _SECOND_NS == 0:
                os.utime(now.path, ns=(info.st_atime_ns, info.st_mtime_ns + _SECOND_NS))


def _with_aliases(folders: Iterable[str]) -> dict[str, None]:
    found: dict[str, None] = {}
    for folder in folders:
        for name in next((pair for pair in known().same_folders if folder in pair), (folder,)):
            found[name] = None
    return found


def _is_plain(name: str) -> bool:
    return "\0" not in name and not any(part in {"", ".", ".."} for part in name.split("/"))
