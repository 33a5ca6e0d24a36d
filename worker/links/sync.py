"""One pass that brings ComfyUI's models folder in sync with the roots. Touches the disk.

It compares the existing entries with the wanted ones, folder by folder, and writes only the difference. ComfyUI can work with
every state in between, and the next pass completes it: links appear whole, and replacements are prepared aside and moved into
place. The rules are those of `model_links`, which uses this module.
"""

# ruff: noqa: PTH102, PTH103, PTH104, PTH105, PTH106, PTH108, PTH114, PTH116, PTH211
# No Path objects: one for each of 10,000 names costs more than the system calls do.

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from worker.links.scan import LinkProblem, ProblemKind, ScannedFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from worker.links.scan import Scan

_ASIDE = ".worker-links-aside"
"""The name of an unfinished link or folder, next to its place. A killed worker can leave one, and the next removes it."""

_SECOND_NS = 1_000_000_000
_TICK_NS = 20_000_000


@dataclass(slots=True)
class SyncedFolder:
    """The contents of a real folder of ComfyUI's that a sync filled."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    own: dict[str, str] = field(default_factory=dict)
    """Our links and their targets. A link to a folder ends in a slash, so that it is known as one even without its target."""
    foreign: set[str] = field(default_factory=set)
    changed_ns: int = 0
    settled: bool = False
    """The mtime, and whether it proves that nothing changed while it stays the same."""


@dataclass(frozen=True, slots=True)
class SyncedView:
    """What a sync found and made, by path under ComfyUI's models folder ('' is that folder itself)."""

    places: Mapping[str, SyncedFolder] = field(default_factory=dict)
    sources: Mapping[str, Sequence[ScannedFolder]] = field(default_factory=dict)
    """The roots' folders that each folder shows, including those that are seen through a folder link."""
    linked: frozenset[str] = frozenset()
    """The folders that are one link."""

    def names(self, folder: str) -> set[str]:
        """Return the files of one folder, without hidden files of the roots and files that still arrive."""
        place = self.places.get(folder)
        found = place.files | place.foreign if place else set()
        return found.union(*(source.files for source in self.sources.get(folder, ())))

    def holds(self, folder: str, name: str) -> bool:
        """Return whether `names(folder)` contains `name`, without building the set."""
        place = self.places.get(folder)
        return (place is not None and (name in place.files or name in place.foreign)) or any(
            name in source.files for source in self.sources.get(folder, ())
        )

    def folders(self) -> set[str]:
        """Return every folder, real or seen through a folder link."""
        return self.places.keys() | self.sources.keys()

    def tops(self) -> set[str]:
        """Return the folders that loaders name."""
        top = self.places.get("")
        return {folder.split("/", 1)[0] for folder in self.folders() if folder} | (top.foreign if top else set())


class SyncPass:
    """One sync. Its results are the counts, problems, places, sources and links."""

    def __init__(
        self,
        models: str,
        roots: Sequence[ScannedFolder],
        before: SyncedView,
        scan: Scan,
        large_folder: int,
        *,
        host_cache: str | None = None,
    ) -> None:
        self.made = self.removed = self.files = 0
        self.problems: list[LinkProblem] = []
        self.places: dict[str, SyncedFolder] = {}
        self.sources: dict[str, Sequence[ScannedFolder]] = {}
        self.linked: set[str] = set()
        self._looked: dict[str, SyncedFolder] = {}
        self._models = models
        self._roots = roots
        self._spellings = frozenset(spelling for root in roots for spelling in (root.path, root.real))
        self._before = before
        self._scan = scan
        self._large_folder = large_folder
        self._host_cache = (host_cache,) if host_cache else ()

    def folder(self, relative: str, sources: Sequence[ScannedFolder]) -> None:
        """Make one real folder of ComfyUI's, and the folders below it, show the contents of `sources`."""
        try:
            place = self._look(relative)
        except OSError as exc:
            self._report(ProblemKind.NOT_LINKED, self._path(relative), _os_reason(exc))
            return
        wanted, groups = self._merge(sources)
        self._yield_files(relative, place, sources, wanted)
        self._yield_folders(relative, place, groups)
        for name, group in groups.items():
            if target := self._as_one_link(relative, place, name, group):
                wanted[name] = target
                self._take_in(_join(relative, name), group[0])
            else:
                self._as_real_folder(relative, place, name, group)
        self._update(relative, place, wanted)
        self.places[relative], self.sources[relative] = place, sources
        self.files += sum(1 for target in place.own.values() if not target.endswith("/"))
        for name in sorted(place.folders):
            self.folder(_join(relative, name), groups.get(name, ()))

    # --- what is there ------------------------------------------------------------------------------

    def _look(self, relative: str) -> SyncedFolder:
        """Return the folder's current contents, from memory if its mtime proves that nothing changed.

        Create a missing folder.
        """
        if relative not in self._looked:
            self._looked[relative] = self._look_again(relative)
        return self._looked[relative]

    def _look_again(self, relative: str) -> SyncedFolder:
        path = self._path(relative)
        try:
            changed_ns = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            os.makedirs(path, exist_ok=True)
            changed_ns = os.stat(path).st_mtime_ns
        known = self._before.places.get(relative)
        if known and known.settled and known.changed_ns == changed_ns:
            # A copy: a pass that ends half-way must not change what the next one relies on.
            return replace(known, folders=set(known.folders), own=dict(known.own))
        return self._read(relative, changed_ns)

    def _read(self, relative: str, changed_ns: int) -> SyncedFolder:
        place = SyncedFolder(changed_ns=changed_ns, settled=_is_settled(changed_ns))
        links = []
        folder = os.open(self._path(relative), os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        links.append(entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        place.folders.add(entry.name)
                    else:
                        place.files.add(entry.name)
            self._sort_links(relative, place, folder, links)
        finally:
            os.close(folder)
        if _ASIDE in place.folders or _ASIDE in place.foreign:
            self._clear(_join(self._path(relative), _ASIDE))
            place.folders.discard(_ASIDE)
            place.foreign.discard(_ASIDE)
        return place

    def _sort_links(self, relative: str, place: SyncedFolder, folder: int, links: Sequence[str]) -> None:
        """Separate our links from others. Ours lead to their own name in one of the roots."""
        homes = {_join(root, relative) for root in self._spellings}
        for name in links:
            target = _read_link(name, folder)
            home, _, last = target.removesuffix("/").rpartition("/")
            if (last == name and home in homes) or is_under(self._scan.moved, target.removesuffix("/")):
                place.own[name] = target
            else:
                place.foreign.add(name)

    # --- what should be there -----------------------------------------------------------------------

    def _merge(self, sources: Sequence[ScannedFolder]) -> tuple[dict[str, str], dict[str, list[ScannedFolder]]]:
        """Return files with their link targets, and folders with the sources that have them."""
        wanted: dict[str, str] = {}
        groups: dict[str, list[ScannedFolder]] = {}
        for source in sources:
            for name in wanted.keys() & source.files:
                if _real_path(sources, name) != source.real_path(name) and not is_under(self._host_cache, wanted[name]):
                    self._report(ProblemKind.TWICE, f"{source.path}/{name}", wanted[name])
            for name in groups.keys() & source.files:
                self._report(ProblemKind.SHAPE, f"{source.path}/{name}", groups[name][0].path)
            wanted = {name: source.spelled(name) for name in source.files if name not in groups} | wanted
            for name, child in source.folders.items():
                if name in wanted:
                    self._report(ProblemKind.SHAPE, child.path, wanted[name])
                else:
                    groups.setdefault(name, []).append(child)
        return wanted, {name: _folders_that_count(group) for name, group in groups.items()}

    def _yield_files(
        self, relative: str, place: SyncedFolder, sources: Sequence[ScannedFolder], wanted: dict[str, str]
    ) -> None:
        """Leave out files whose name the image uses itself. Report them unless both are one file."""
        path = self._path(relative)
        for name in wanted.keys() & (place.files | place.foreign):
            target, there = wanted.pop(name), f"{path}/{name}"
            real = os.path.realpath(there) if name in place.foreign else there
            if real != _real_path(sources, name):
                self._report(ProblemKind.HIDDEN, target, there)
        for name in wanted.keys() & place.folders:
            try:
                os.rmdir(f"{path}/{name}")  # a folder link that lost its folder leaves an empty one
            except OSError:
                self._report(ProblemKind.SHAPE, wanted.pop(name), f"{path}/{name}")
            else:
                place.folders.discard(name)

    def _yield_folders(self, relative: str, place: SyncedFolder, groups: dict[str, list[ScannedFolder]]) -> None:
        """Leave out folders whose name is a file or a foreign link in the image, and report them."""
        path = self._path(relative)
        for name in groups.keys() & place.files:
            self._report(ProblemKind.SHAPE, groups.pop(name)[0].path, f"{path}/{name}")
        for name in groups.keys() & place.foreign:
            source = groups.pop(name)[0]
            if os.path.realpath(f"{path}/{name}") != source.real:
                self._report(ProblemKind.FOLDER_TAKEN, source.path, f"{path}/{name}")

    def _as_one_link(self, relative: str, place: SyncedFolder, name: str, group: Sequence[ScannedFolder]) -> str | None:
        """Return the target of the one link for this folder, or None if it must be a real folder.

        A folder that is one link stays one while it can be shown whole, whatever its size: during a change ComfyUI misses it
        for a moment.
        """
        source = group[0]
        target = f"{source.path}/"
        if len(group) > 1:
            return None
        if place.own.get(name, "").removesuffix("/") == source.path:
            return target if source.whole or not source.known else None
        if not source.whole or source.count < self._large_folder:
            return None
        if name in place.folders and not self._replace_by_link(relative, place, name, target):
            return None
        return target

    def _take_in(self, relative: str, folder: ScannedFolder) -> None:
        self.linked.add(relative)
        self.files += folder.count
        self.sources.update((inner, (source,)) for inner, source in folder.below(relative))

    # --- making it so -------------------------------------------------------------------------------

    def _update(self, relative: str, place: SyncedFolder, wanted: Mapping[str, str]) -> None:
        """Make this folder's links equal the wanted ones."""
        path = self._path(relative)
        if place.own == wanted:
            return
        try:
            for name in place.own.keys() - wanted.keys():
                if not is_under(self._scan.unreadable, place.own[name]):
                    self._drop(path, place, name)
            for name, target in wanted.items() - place.own.items():
                self._put(path, place, name, target)
        except OSError as exc:
            # The disk is full, read-only or not ours. The next name would fail in the same way, so report it once for the
            # folder.
            self._report(ProblemKind.NOT_LINKED, path, _os_reason(exc))

    def _put(self, path: str, place: SyncedFolder, name: str, target: str) -> None:
        link = f"{path}/{name}"
        if name in place.own:
            os.symlink(target, f"{path}/{_ASIDE}")
            os.replace(f"{path}/{_ASIDE}", link)
        else:
            try:
                os.symlink(target, link)
            except FileExistsError:  # a file was put there meanwhile: the next pass sees it
                return
        place.own[name] = target
        self.made += 1

    def _drop(self, path: str, place: SyncedFolder, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"{path}/{name}")
        if place.own.pop(name).endswith("/"):
            # ComfyUI asks for the mtime of every folder that it has listed, and answers 500 if one is gone.
            with suppress(FileExistsError):
                os.mkdir(f"{path}/{name}")
            place.folders.add(name)
        self.removed += 1

    def _as_real_folder(self, relative: str, place: SyncedFolder, name: str, group: Sequence[ScannedFolder]) -> None:
        """Make sure that the folder is a real one, for `folder` to fill. Skip an empty folder of the volume."""
        path = _join(self._path(relative), name)
        if name in place.folders or not (name in place.own or any(source.count for source in group)):
            return
        try:
            if name in place.own:
                self._replace_by_folder(relative, path, group)
                del place.own[name]
            else:
                os.mkdir(path)
        except FileExistsError:
            return
        except OSError as exc:
            self._report(ProblemKind.NOT_LINKED, path, _os_reason(exc))
            return
        place.folders.add(name)

    def _replace_by_folder(self, relative: str, path: str, group: Sequence[ScannedFolder]) -> None:
        """Turn one link into a real folder that was filled aside: a running engine misses it for microseconds."""
        aside = _join(relative, _ASIDE)
        filling = SyncPass(
            self._models,
            self._roots,
            SyncedView(),
            self._scan,
            self._large_folder,
            host_cache=next(iter(self._host_cache), None),
        )
        filling.folder(aside, group)
        os.unlink(path)
        os.rename(self._path(aside), path)
        self.made += filling.made
        self.removed += 1

    def _replace_by_link(self, relative: str, place: SyncedFolder, name: str, target: str) -> bool:
        """Replace a real folder by one link, if it contains nothing but our links."""
        if not self._is_ours(_join(relative, name)):
            return False
        path, aside = _join(self._path(relative), name), _join(self._path(relative), _ASIDE)
        try:
            _remove_or_rename(path, aside)
            os.symlink(target, path)
        except OSError:
            return False  # then it stays a real folder, with a link for each file
        self._clear(aside)
        self.made += 1
        place.folders.discard(name)
        place.own[name] = target
        return True

    def _is_ours(self, relative: str) -> bool:
        """Return whether a real folder contains only our links, or nothing."""
        try:
            place = self._look(relative)
        except OSError:
            return False
        return not place.files and not place.foreign and all(self._is_ours(_join(relative, name)) for name in place.folders)

    def _clear(self, path: str) -> None:
        """Remove what was put aside: links into the roots and the folders that held them, nothing else."""
        with suppress(OSError):
            if os.path.islink(path):
                if is_under(self._spellings, _read_link(path)):
                    os.unlink(path)
                return
            with os.scandir(path) as entries:
                inside = [entry.path for entry in entries]
            for inner in inside:
                self._clear(inner)
            os.rmdir(path)

    def _path(self, relative: str) -> str:
        return _join(self._models, relative)

    def _report(self, kind: ProblemKind, path: str, other: str) -> None:
        self.problems.append(LinkProblem(kind, path, other))


def is_under(tops: Iterable[str], path: str) -> bool:
    """Return whether a path in a sync is one of `tops` or lies below one, by the text alone."""
    return any(path == top or path.startswith(f"{top}/") for top in tops)


def _is_settled(changed_ns: int) -> bool:
    """Return whether a change after this sync is sure to show as another mtime.

    A file system's clock ticks. Within one tick a second change leaves the same mtime. On ext4 a tick is some milliseconds (a
    jiffy), on MooseFS a whole second, by another machine's clock.
    """
    tick_ns = _TICK_NS if changed_ns % _SECOND_NS else 2 * _SECOND_NS
    return time.time_ns() - changed_ns > tick_ns


def _folders_that_count(group: list[ScannedFolder]) -> list[ScannedFolder]:
    """Return the folders without empty ones: a root whose folder is empty must not prevent one link to another root's."""
    return [child for child in group if child.count] or group[:1]


def _real_path(sources: Sequence[ScannedFolder], name: str) -> str:
    """Return the path of the bytes that a sync links `name` to: in the first source that has it."""
    return next(source.real_path(name) for source in sources if name in source.files)


def _remove_or_rename(folder: str, aside: str) -> None:
    """Remove an empty folder in a sync's way, or rename it. overlayfs cannot rename a folder of an image's layer (EXDEV)."""
    try:
        os.rmdir(folder)
    except OSError as exc:
        if exc.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        os.rename(folder, aside)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _read_link(path: str, folder: int | None = None) -> str:
    """Return the target of a link that an earlier sync made, or an empty text if the link is gone."""
    try:
        return os.readlink(path, dir_fd=folder)
    except OSError:
        return ""


def _os_reason(exc: OSError) -> str:
    return exc.strerror or str(exc)
