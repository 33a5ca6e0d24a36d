"""Decide which models of a volume may be removed to make room, and in which order. Reads the disk.

A content may be removed only if its seal fits, with all its names, and only if nobody names it, uses it or used it recently.
The order depends on a model's value: how often it was used lately, times the cost of downloading it again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.base.files import free_bytes
from worker.base.text import count, duration_text, size_text
from worker.errors import UnsafePath
from worker.store.inventory import ready_file
from worker.store.layout import split_title
from worker.store.leases import ANY, LeasedTitles, LeaseTiming, Usage, normal_title
from worker.store.seals import Seal, read_seal, redownload_spec, sealed_titles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from worker.model_spec import ModelSpec
    from worker.store.layout import Layout

_SHOWN = 5
LOOK_UP_BYTES = 500_000_000
"""The cost of a download besides its bytes, as bytes: a small file is worth more for each byte."""


@dataclass(frozen=True, slots=True)
class EvictionLimits:
    """How full a volume may get before models are evicted: the total of all models, and the free space of the file system."""

    keep_bytes: int | None = None
    free_bytes: int | None = None

    @classmethod
    def of_gb(cls, keep_gb: float | None, free_gb: float | None) -> EvictionLimits:
        """Return the limits from settings in GB."""
        return cls(*(None if size is None else int(size * 1e9) for size in (keep_gb, free_gb)))

    def __bool__(self) -> bool:
        return self != EvictionLimits()


@dataclass(frozen=True, slots=True)
class EvictionPins:
    """The models that must not be evicted. `texts` are searched for a file name; `trouble` is why the pins are unknown."""

    titles: LeasedTitles = field(default_factory=LeasedTitles)
    texts: Callable[[str], str | None] = lambda _: None
    trouble: str | None = None

    def why(self, title: str) -> str | None:
        """Return who names the model, or None."""
        return self.trouble or self.titles.find(title) or self.texts(title)


@dataclass(frozen=True, slots=True)
class ContentName:
    """One name of a sealed content that may be evicted, with its seal."""

    title: str
    path: Path
    seal: Seal


@dataclass(frozen=True, slots=True)
class SealedContent:
    """One sealed content that may be evicted, with all its names. `kept` is why it stays; None if it may be removed.

    `idle_s` is the time since its last use or its download. `value` is the sort key: the lowest is removed first. `in_use`:
    only its use keeps it, and it may be removed a short time later.
    """

    names: tuple[ContentName, ...]
    size_bytes: int
    stamp: tuple[int, int, int, int]
    idle_s: float
    value: float
    kept: str | None = None
    in_use: bool = False

    @property
    def title(self) -> str:
        """Return the model as people write it."""
        return " = ".join(name.title for name in self.names)

    @property
    def spec(self) -> ModelSpec | None:
        """Return its source, as far as its seal tells."""
        return redownload_spec(self.names[0].title, self.names[0].seal)


@dataclass(frozen=True, slots=True)
class Survey:
    """The volume at one moment, for eviction: its sealed contents in the order of removal, and how full it is."""

    contents: tuple[SealedContent, ...]
    used_bytes: int
    """The size of all models, including those by hand and the final size of partial downloads."""
    free_bytes: int | None

    @property
    def removable(self) -> tuple[SealedContent, ...]:
        """Return those that may be removed, in order."""
        return tuple(content for content in self.contents if content.kept is None)

    def excess(self, limits: EvictionLimits, more_bytes: int = 0) -> int:
        """Return by how many bytes the limits would be exceeded with that many more."""
        over = [0]
        if limits.keep_bytes is not None:
            over.append(self.used_bytes + more_bytes - limits.keep_bytes)
        if limits.free_bytes is not None and self.free_bytes is not None:
            over.append(limits.free_bytes + more_bytes - self.free_bytes)
        return max(over)


def chosen_for_removal(contents: Sequence[SealedContent], needed_bytes: int) -> list[SealedContent]:
    """Return what to evict for that many bytes: from the front, without those that turned out to be unnecessary."""
    found: list[SealedContent] = []
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


def eviction_outlook(found: Survey, limits: EvictionLimits, more_bytes: int = 0) -> str:
    """Return in words what would be evicted for that many more bytes, or next if they fit."""
    over = found.excess(limits, more_bytes)
    gone = chosen_for_removal(found.removable, over) if over > 0 else list(found.removable[:_SHOWN])
    if not gone:
        return "nothing on the volume may be removed"
    shown = [f"{one.title} ({size_text(one.size_bytes)}, {idle_text(one.idle_s)})" for one in gone[:_SHOWN]]
    more = f" and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
    short = over - sum(one.size_bytes for one in gone)
    lack = f", and {size_text(short)} would still be lacking" if over > 0 and short > 0 else ""
    return f"{'to remove' if over > 0 else 'next to go'}: {', '.join(shown)}{more}{lack}"


def idle_text(seconds: float) -> str:
    """Return how long ago a model was used, for people who choose what to evict."""
    return f"used {duration_text(seconds)} ago"


# --- how it stands ------------------------------------------------------------------------------


def survey_for_eviction(
    layout: Layout, pins: EvictionPins, timing: LeaseTiming, held: Iterable[str] = (), *, fill: bool = False
) -> Survey:
    """Examine everything on the volume before an eviction. `held` are uses that this worker may not have recorded yet.

    With `fill`, an uploaded file's seal gets the file's time, as for a use. Otherwise only the mark of the volume's time is
    written.
    """
    judge = EvictionJudge(
        Usage.of(layout, timing), LeasedTitles((title, "this worker") for title in held), pins, ModelsTree.of(layout), timing
    )
    groups: dict[tuple[int, int], list[_Sealed]] = defaultdict(list)
    for found in _sealed_files(layout, fill=fill):
        groups[found.info.st_dev, found.info.st_ino].append(found)
    contents = sorted(map(judge.content, groups.values()), key=lambda found: (found.value, -found.idle_s, found.title))
    return Survey(tuple(contents), judge.tree.size_bytes + _partial_bytes(layout), free_bytes(layout.root))


@dataclass(frozen=True, slots=True)
class _Sealed:
    name: ContentName
    info: os.stat_result
    sealed_s: float


def _sealed_files(layout: Layout, *, fill: bool) -> Iterator[_Sealed]:
    """Yield every file that may be evicted if nobody uses it: its seal fits and it is no link."""
    for title, seal_path in sealed_titles(layout):
        with contextlib.suppress(OSError, UnsafePath):
            path, seal = layout.model(*split_title(title)), read_seal(seal_path)
            info = path.lstat()
            if seal and stat.S_ISREG(info.st_mode) and seal.size == info.st_size:
                if seal.mtime is None and fill and ready_file(layout, *split_title(title)):
                    seal = read_seal(seal_path) or seal
                if seal.mtime is None or seal.fits(info):
                    yield _Sealed(ContentName(title, path, seal), info, seal_path.stat().st_mtime)


@dataclass(slots=True)
class ModelsTree:
    """The files under `models/`, as eviction counts them: their total size, each content once, and the targets of links."""

    size_bytes: int = 0
    links: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout) -> ModelsTree:
        """Walk the tree without following links."""
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
        """Return the link that leads to this very file, or None."""
        return next(iter(self.links.get(os.path.realpath(path), ())), None) if self.links else None

    def also(self, path: Path) -> list[str]:
        """Return the titles that a file has through links to folders above it."""
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
    """Return the total final size of partial downloads, which eviction counts as used."""
    total = 0
    for above, _, names in os.walk(layout.partials):
        for name in names:
            with contextlib.suppress(OSError):
                info = os.lstat(f"{above}/{name}")
                total += info.st_size if info.st_nlink == 1 and name.endswith(".part") else 0
    return total


@dataclass(frozen=True, slots=True)
class EvictionJudge:
    """Decides whether a content may be evicted, and its value."""

    usage: Usage
    own: LeasedTitles
    pins: EvictionPins
    tree: ModelsTree
    timing: LeaseTiming

    def content(self, group: Sequence[_Sealed]) -> SealedContent:
        """Judge all names of one content together: only removing the last one frees the space."""
        info, names = group[0].info, tuple(found.name for found in group)
        titles = [name.title for name in names]
        titles += [title for name in names for title in self.tree.also(name.path)]
        uses = [
            self.usage.used[key] for key in {key for title in titles for key in _usage_titles(title)} if key in self.usage.used
        ]
        fetched_s = max(0.0, self.usage.now_s - max(found.sealed_s for found in group))
        idle_s = min([fetched_s, *(age_s for age_s, _ in uses)])
        weight = sum(weight for _, weight in uses) + 0.5 ** (fetched_s / self.timing.half_life_s)
        value = weight * (info.st_size + LOOK_UP_BYTES) / max(info.st_size, 1)
        lasting = self._named(titles) or self._odd(group)
        in_use = self.user(titles) or (f"used {idle_s:.0f} s ago" if idle_s < self.timing.grace_s else None)
        return SealedContent(
            names, info.st_size, survey_stamp(info), idle_s, value, lasting or in_use, in_use=not lasting and bool(in_use)
        )

    def user(self, titles: Iterable[str]) -> str | None:
        """Return which worker's job uses one of them."""
        by = _first(self.own.find(title) or self.usage.held.find(title) for title in titles)
        return f"a job of {by} uses it" if by else None

    def _named(self, titles: Sequence[str]) -> str | None:
        """Return who wants it to stay."""
        by = _first(self.usage.pins.find(title) for title in titles)
        return _first(map(self.pins.why, titles)) or (f"a list of {by} names it" if by else None)

    def _odd(self, group: Sequence[_Sealed]) -> str | None:
        """Return what prevents removing it completely, or downloading it again."""
        names, links = [found.name for found in group], group[0].info.st_nlink
        if link := _first(self.tree.linked(name.path) for name in names):
            return f"the link {link} leads to it"
        if links != len(group):
            return f"it has {count(links, 'name')}, of which {len(group)} are sealed"
        if any(name.seal.mtime is None for name in names):
            return "no worker has looked at it since its upload"
        if names[0].seal.sha256 is None or redownload_spec(names[0].title, names[0].seal) is None:
            return "nothing says where it comes from"
        return None


def _usage_titles(title: str) -> Iterator[str]:
    """Yield every title under which a use that speaks against an eviction may be recorded."""
    path = normal_title(title)
    below = path.partition("/")[2]
    while path:
        yield path
        path = path.rpartition("/")[0]
    while below:
        yield f"{ANY}/{below}"
        below = below.rpartition("/")[0]


def _first(words: Iterable[str | None]) -> str | None:
    """Return the first reason against an eviction that is not None or empty."""
    return next((word for word in words if word), None)


def survey_stamp(info: os.stat_result) -> tuple[int, int, int, int]:
    """Return values that differ if the file was replaced since the survey: size, mtime, inode and the number of its names."""
    return info.st_size, info.st_mtime_ns, info.st_ino, info.st_nlink
