"""Which models of a volume may be removed to make room, and in which order. Reads the disk.

Only a file with a fitting seal may go, with every name that its content has, and only one that nobody names, uses or used a
short time ago. The order is by what a model is worth: how often it was used lately, times what getting it again costs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from worker.base.text import count
from worker.errors import SpecInvalid, UnsafePath
from worker.spec import HubFile, ModelSpec, parse_source
from worker.store.disk import free_bytes
from worker.store.inventory import sealed
from worker.store.layout import sealed_by, split
from worker.store.leases import ANY, LeaseTiming, Titles, Usage, normal
from worker.store.seals import Seal, read_seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from worker.store.layout import Layout

_LOOK_UP_BYTES: Final = 500_000_000
"""What a fetch costs besides its bytes, in bytes: a small file is worth more for each byte that it takes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How full a volume may get: how much all models on it may take, how much the file system is to have free."""

    keep_bytes: int | None = None
    free_bytes: int | None = None

    @classmethod
    def of_gb(cls, keep_gb: float | None, free_gb: float | None) -> Limits:
        """The same, from settings in GB."""
        return cls(*(None if size is None else int(size * 1e9) for size in (keep_gb, free_gb)))

    def __bool__(self) -> bool:
        return self != Limits()


@dataclass(frozen=True, slots=True)
class Pins:
    """What people say is to stay. `texts` asks where a model's file name is written; `trouble` is why nobody can know."""

    titles: Titles = field(default_factory=Titles)
    texts: Callable[[str], str | None] = lambda _: None
    trouble: str | None = None

    def why(self, title: str) -> str | None:
        """Return who names the model, None if nobody does."""
        return self.trouble or self.titles.find(title) or self.texts(title)


@dataclass(frozen=True, slots=True)
class Name:
    """One name of a content, with its seal."""

    title: str
    path: Path
    seal_path: Path
    seal: Seal


@dataclass(frozen=True, slots=True)
class Content:
    """One sealed content on the volume, under all its names. `kept` is why it stays; None: it may go.

    `idle_s` is how long ago anybody used it, or it was fetched. `value` orders: the lowest goes first. `in_use`: it stays for
    its use alone, and may go a short time later.
    """

    names: tuple[Name, ...]
    size_bytes: int
    stamp: tuple[int, int, int, int]
    idle_s: float
    value: float
    kept: str | None = None
    in_use: bool = False

    @property
    def title(self) -> str:
        """The model as people write it."""
        return " = ".join(name.title for name in self.names)

    @property
    def spec(self) -> ModelSpec | None:
        """Where it comes from, as far as its seal tells."""
        return spec_of(self.names[0].title, self.names[0].seal)


@dataclass(frozen=True, slots=True)
class Survey:
    """The volume at one moment: its sealed contents, what goes first first, and how full it is."""

    contents: tuple[Content, ...]
    used_bytes: int
    """What all models take, with those by hand and what unfinished downloads will take."""
    free_bytes: int | None

    @property
    def removable(self) -> tuple[Content, ...]:
        """Those that may go, in their order."""
        return tuple(content for content in self.contents if content.kept is None)

    def excess(self, limits: Limits, more_bytes: int = 0) -> int:
        """Return how many bytes are too many, if that many more came."""
        over = [0]
        if limits.keep_bytes is not None:
            over.append(self.used_bytes + more_bytes - limits.keep_bytes)
        if limits.free_bytes is not None and self.free_bytes is not None:
            over.append(limits.free_bytes + more_bytes - self.free_bytes)
        return max(over)


def chosen(contents: Sequence[Content], needed_bytes: int) -> list[Content]:
    """Return what goes for that many bytes: from the front, without what turned out not to be needed."""
    found: list[Content] = []
    total = 0
    for content in contents:
        if total >= needed_bytes:
            break
        found.append(content)
        total += content.size_bytes
    for content in reversed(found[:-1]):
        if total - content.size_bytes >= needed_bytes:
            found.remove(content)
            total -= content.size_bytes
    return found


# --- how it stands ------------------------------------------------------------------------------


def survey(layout: Layout, pins: Pins, timing: LeaseTiming, held: Iterable[str] = (), *, fill: bool = False) -> Survey:
    """Look at everything on the volume. `held` are uses that this worker may not have written down yet.

    With `fill` a seal that was uploaded gets its file's time, as whoever uses the model gives it. Else nothing is written but
    the mark that tells the volume's time.
    """
    judge = Judge(Usage.of(layout, timing), Titles((title, "this worker") for title in held), pins, Tree.of(layout), timing)
    groups: dict[tuple[int, int], list[_Sealed]] = defaultdict(list)
    for found in _sealed(layout, fill=fill):
        groups[found.info.st_dev, found.info.st_ino].append(found)
    contents = sorted(map(judge.content, groups.values()), key=lambda found: (found.value, -found.idle_s, found.title))
    return Survey(tuple(contents), judge.tree.size_bytes + _partial_bytes(layout), free_bytes(layout.root))


@dataclass(frozen=True, slots=True)
class _Sealed:
    name: Name
    info: os.stat_result
    sealed_s: float


def _sealed(layout: Layout, *, fill: bool) -> Iterator[_Sealed]:
    """Every file whose seal fits, and that is no link."""
    for above, _, names in os.walk(layout.seals):
        for name in sorted(names):
            if not name.endswith(".json") or name.startswith("."):
                continue
            seal_path = layout.seals.joinpath(above, name)
            title = sealed_by(seal_path.relative_to(layout.seals).as_posix())
            with contextlib.suppress(OSError, UnsafePath):
                path, seal = layout.model(*split(title)), read_seal(seal_path)
                info = path.lstat()
                if seal and stat.S_ISREG(info.st_mode) and seal.size == info.st_size:
                    if seal.mtime is None and fill and sealed(layout, *split(title)):
                        seal = read_seal(seal_path) or seal
                    if seal.mtime is None or seal.fits(info):
                        yield _Sealed(Name(title, path, seal_path, seal), info, seal_path.stat().st_mtime)


@dataclass(slots=True)
class Tree:
    """What lies under `models/`: how much in sum, each content once, and where links lead."""

    size_bytes: int = 0
    links: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout) -> Tree:
        """Walk it, without following links."""
        tree, seen = cls(), set[tuple[int, int]]()
        for top in dict.fromkeys((layout.models, *(path for name, path in layout.moved if name))):
            for above, folders, names in os.walk(top):
                for name in (*folders, *names):
                    path = f"{above}/{name}"
                    with contextlib.suppress(OSError):
                        info = os.lstat(path)
                        if stat.S_ISLNK(info.st_mode):
                            title = os.path.relpath(path, layout.models)
                            tree.links.setdefault(os.path.realpath(path), []).append(title)
                        elif stat.S_ISREG(info.st_mode) and (info.st_dev, info.st_ino) not in seen:
                            seen.add((info.st_dev, info.st_ino))
                            tree.size_bytes += info.st_size
        return tree

    def linked(self, path: Path) -> str | None:
        """The link that leads to the very file, if one does."""
        return next(iter(self.links.get(os.path.realpath(path), ())), None) if self.links else None

    def also(self, path: Path) -> list[str]:
        """The titles that a file has through links to folders above it."""
        if not self.links:
            return []
        real = os.path.realpath(path)
        return [
            f"{link}{real[len(folder) :]}"
            for folder, links in self.links.items()
            if real.startswith(f"{folder}/")
            for link in links
        ]


def _partial_bytes(layout: Layout) -> int:
    """What unfinished downloads take, or will: each has its final size from its beginning."""
    total = 0
    for above, _, names in os.walk(layout.partials):
        for name in names:
            with contextlib.suppress(OSError):
                info = os.lstat(f"{above}/{name}")
                total += info.st_size if info.st_nlink == 1 and name.endswith(".part") else 0
    return total


@dataclass(frozen=True, slots=True)
class Judge:
    """Says of a content whether it may go, and what it is worth."""

    usage: Usage
    own: Titles
    pins: Pins
    tree: Tree
    timing: LeaseTiming

    def content(self, group: Sequence[_Sealed]) -> Content:
        """Judge the names of one content together: the space comes with the last of them."""
        info, names = group[0].info, tuple(found.name for found in group)
        titles = [name.title for name in names]
        titles += [title for name in names for title in self.tree.also(name.path)]
        uses = [self.usage.used[key] for key in {key for title in titles for key in _keys(title)} if key in self.usage.used]
        fetched_s = max(0.0, self.usage.now_s - max(found.sealed_s for found in group))
        idle_s = min([fetched_s, *(age_s for age_s, _ in uses)])
        weight = sum(weight for _, weight in uses) + 0.5 ** (fetched_s / self.timing.half_life_s)
        value = weight * (info.st_size + _LOOK_UP_BYTES) / max(info.st_size, 1)
        lasting = self._named(titles) or self._odd(group)
        in_use = self.user(titles) or (f"used {idle_s:.0f} s ago" if idle_s < self.timing.grace_s else None)
        return Content(names, info.st_size, stamp(info), idle_s, value, lasting or in_use, in_use=not lasting and bool(in_use))

    def user(self, titles: Iterable[str]) -> str | None:
        """Return which worker's job uses one of them."""
        by = first(self.own.find(title) or self.usage.held.find(title) for title in titles)
        return f"a job of {by} uses it" if by else None

    def _named(self, titles: Sequence[str]) -> str | None:
        """Return who wants it to stay."""
        by = first(self.usage.pins.find(title) for title in titles)
        return first(map(self.pins.why, titles)) or (f"a list of {by} names it" if by else None)

    def _odd(self, group: Sequence[_Sealed]) -> str | None:
        """Return what keeps it from being removed whole, or from being had again."""
        names, links = [found.name for found in group], group[0].info.st_nlink
        if link := first(self.tree.linked(name.path) for name in names):
            return f"the link {link} leads to it"
        if links != len(group):
            return f"it has {count(links, 'name')}, of which {len(group)} are sealed"
        if any(name.seal.mtime is None for name in names):
            return "no worker has looked at it since its upload"
        if names[0].seal.sha256 is None or spec_of(names[0].title, names[0].seal) is None:
            return "nothing says where it comes from"
        return None


def _keys(title: str) -> Iterator[str]:
    """Every title under which a use of the model may be known."""
    path = normal(title)
    below = path.partition("/")[2]
    while path:
        yield path
        path = path.rpartition("/")[0]
    while below:
        yield f"{ANY}/{below}"
        below = below.rpartition("/")[0]


def first(words: Iterable[str | None]) -> str | None:
    """Return the first that says anything."""
    return next((word for word in words if word), None)


def stamp(info: os.stat_result) -> tuple[int, int, int, int]:
    """Return what another file would have otherwise: size, mtime, inode and how many names it has."""
    return info.st_size, info.st_mtime_ns, info.st_ino, info.st_nlink


def spec_of(title: str, seal: Seal) -> ModelSpec | None:
    """Return where a sealed model comes from, pinned to its content; None where its seal does not tell."""
    if not seal.file:
        return None
    with contextlib.suppress(SpecInvalid):
        source = HubFile(seal.repo, seal.file, seal.commit or "main") if seal.repo else parse_source(seal.file)
        return ModelSpec(*split(title), source, seal.sha256, seal.size or None)
    return None
