"""Record which models the workers of a volume use, so that none is removed during a job. Touches the disk; a thread renews.

A worker keeps one small file on the volume: what its jobs use now, and what they used when. It is written once a minute while
jobs run, and before a job uses a model that no file of this worker protects yet. A job with the last job's models writes
nothing. A lease that is not renewed expires.

No host's clock is trusted. A worker measures itself how long ago a use was, and records that. The file's mtime gives its age,
and a file that is touched just now gives the volume's time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from worker.base.files import FULL, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from worker.store.layout import Layout

log = logging.getLogger(__name__)

VERSION: Final = 1
_MAX_BYTES: Final = 4 << 20
_MOST_MODELS: Final = 512
_REMOVAL_S: Final = 20.0
_LOOK_S: Final = 0.1
ANY: Final = "?"
"""The folder of a title that means a name in any folder."""


@dataclass(frozen=True, slots=True)
class LeaseTiming:
    """How long a use counts. All times in seconds, by the volume's clock or a worker's own monotonic one.

    `lease_s`: how long a file that is not renewed protects what it holds. `linger_s`: how long a worker holds the models of its
    last job. `grace_s`: how long a model stays after its last use. `half_life_s`: the time in which the weight of a use halves.
    `notice_s`: the time from the first worker that may remove models until it does; the others look once in `beat_s`.
    """

    beat_s: float = 60.0
    lease_s: float = 300.0
    linger_s: float = 600.0
    grace_s: float = 180.0
    half_life_s: float = 3 * 86_400.0
    notice_s: float = 180.0
    merge_s: float = 3_600.0


@dataclass(frozen=True, slots=True)
class Lease:
    """One worker's file, as read. `used` says how long before `written_s` each model was used, and how much."""

    by: str
    written_s: float
    held: frozenset[str] = frozenset()
    pins: frozenset[str] = frozenset()
    used: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    path: Path | None = None


class LeasedTitles:
    """Models that leases name, by `folder/name`, each with a word about it. `?/name`: in any folder; a folder: all in it."""

    def __init__(self, titles: Iterable[tuple[str, str]] = ()) -> None:
        self._exact: dict[str, str] = {}
        self._anywhere: dict[str, str] = {}
        for title, word in titles:
            self.add(title, word)

    def add(self, title: str, word: str) -> None:
        """Add a title. The first word about a title stays."""
        folder, _, name = normal_title(title).partition("/")
        if folder == ANY:
            self._anywhere.setdefault(name, word)
        else:
            self._exact.setdefault(f"{folder}/{name}", word)

    def find(self, title: str) -> str | None:
        """Return the word about a model, or None."""
        path = normal_title(title)
        below = path.partition("/")[2]
        while path:
            if path in self._exact:
                return self._exact[path]
            path = path.rpartition("/")[0]
        while below:
            if below in self._anywhere:
                return self._anywhere[below]
            below = below.rpartition("/")[0]
        return None


def normal_title(title: str) -> str:
    """Return a leased model's title with its accents in one Unicode form."""
    return title if title.isascii() else unicodedata.normalize("NFC", title)


# --- what all workers say -----------------------------------------------------------------------


def read_leases(layout: Layout) -> list[Lease]:
    """Return every worker's file, then the content of files that are gone. Skip unreadable files."""
    found = []
    with contextlib.suppress(OSError), os.scandir(layout.leases) as entries:
        # Listing a folder queries the volume, and so shows what another host replaced.
        found = [layout.leases / entry.name for entry in entries if entry.name.endswith(".json") and entry.name[0] != "."]
    # The summary comes last: a lease's file is removed after its content was written there.
    leases = [_read_lease(path) for path in (*found, layout.last_used)]
    return [lease for lease in leases if lease] + _recent(layout)


def _read_lease(path: Path) -> Lease | None:
    read = read_json(path)
    if read is None:
        return None
    record, written_s = read
    used = record.get("used")
    pairs = used.items() if isinstance(used, dict) else ()
    return Lease(
        str(record.get("by", "?")),
        written_s,
        _texts(record.get("held")),
        _texts(record.get("pins")),
        {normal_title(title): pair for title, value in pairs if (pair := _pair(value))},
        path,
    )


def read_json(path: Path) -> tuple[dict[str, Any], float] | None:
    """Return the JSON object of a lease or another small file, and its mtime, or None."""
    try:
        with path.open("rb") as stream:
            record: Any = json.loads(stream.read(_MAX_BYTES))
            written_s = os.fstat(stream.fileno()).st_mtime
    except (OSError, ValueError, RecursionError):
        return None
    return (record, written_s) if isinstance(record, dict) else None


def _texts(value: object) -> frozenset[str]:
    return frozenset(text for text in value if isinstance(text, str)) if isinstance(value, list) else frozenset()


def _pair(value: object) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(number) in {int, float} for number in value):  # noqa: PLR2004
        return max(0.0, float(value[0])), max(0.0, float(value[1]))
    return None


def _recent(layout: Layout) -> list[Lease]:
    """Return as leases the lists of recent models from before there were leases: the time of these uses is unknown."""
    found = []
    with contextlib.suppress(OSError):
        began_s = layout.leases_began.stat().st_mtime
        for path in sorted(layout.recent.glob("*.json")):
            if read := read_json(path):
                names = [name.removeprefix("models/") for name in _texts(read[0].get("files")) if name.startswith("models/")]
                at_s = min(read[1], began_s)
                found.append(Lease(path.stem, at_s, used={normal_title(name): (0.0, 0.0) for name in names}))
    return found


def volume_now_s(layout: Layout, leases: Iterable[Lease] = ()) -> float:
    """Return the time by the volume's own clock, by which leases expire. No file on it is younger. Needs no space on it."""
    latest_s = max((lease.written_s for lease in leases), default=0.0)
    clock = layout.leases_clock
    try:
        clock.touch()
        return max(clock.stat().st_mtime, latest_s)
    except OSError:
        return latest_s or time.time()


@dataclass(frozen=True, slots=True)
class Usage:
    """The uses of models that all leases tell, at one moment of the volume's clock."""

    now_s: float
    held: LeasedTitles
    pins: LeasedTitles
    used: Mapping[str, tuple[float, float]]
    """For each model the seconds since its last use, and the current weight of its uses."""

    @classmethod
    def of(cls, layout: Layout, timing: LeaseTiming) -> Usage:
        """Read it from the volume."""
        leases = read_leases(layout)
        now_s = volume_now_s(layout, leases)
        living = [lease for lease in leases if now_s - lease.written_s < timing.lease_s]
        used: dict[str, tuple[float, float]] = {}
        for lease in leases:
            since_s = max(0.0, now_s - lease.written_s)
            decay = 0.5 ** (since_s / timing.half_life_s)
            for title, (age_s, weight) in lease.used.items():
                known_s, known = used.get(title, (age_s + since_s, 0.0))
                used[title] = min(known_s, age_s + since_s), known + weight * decay
        held = LeasedTitles((title, lease.by) for lease in living for title in lease.held)
        pins = LeasedTitles((title, lease.by) for lease in living for title in lease.pins)
        return cls(now_s, held, pins, used)


def wait_for_removals(layout: Layout) -> None:
    """Return once every removal has ended that may have begun before this worker's lease was written.

    A removal looks at the leases after it made its mark, and a job looks for marks after it wrote its lease. So one of the two
    sees the other. Ignore the marks of workers that died. Block for up to `_REMOVAL_S`.
    """
    until_s = time.monotonic() + _REMOVAL_S
    marks = {path for path, age_s in removal_marks(layout) if age_s < _REMOVAL_S}
    while marks and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
        marks &= {path for path, _ in removal_marks(layout)}


def removal_marks(layout: Layout) -> list[tuple[Path, float]]:
    """Return the marks of removals, each with its age in seconds by the volume's clock."""
    found = []
    with contextlib.suppress(OSError):
        paths = list(layout.leases.glob(layout.removal_mark("*").name))
        now_s = volume_now_s(layout) if paths else 0.0
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                found.append((path, now_s - path.stat().st_mtime))
    return found


def merge_old(layout: Layout, timing: LeaseTiming) -> None:
    """Move the leases of long dead workers into one file, so that reading them costs one look. Optional; raises nothing."""
    leases = [lease for lease in read_leases(layout) if lease.path]
    now_s = volume_now_s(layout, leases)
    dead = [lease for lease in leases if lease.path != layout.last_used and now_s - lease.written_s > timing.merge_s]
    if not dead:
        return
    used: dict[str, tuple[float, float]] = {}
    for lease in (*dead, *(lease for lease in leases if lease.path == layout.last_used)):
        since_s = max(0.0, now_s - lease.written_s)
        for title, (age_s, weight) in lease.used.items():
            known_s, known = used.get(title, (age_s + since_s, 0.0))
            used[title] = min(known_s, age_s + since_s), known + weight * 0.5 ** (since_s / timing.half_life_s)
    with contextlib.suppress(OSError):
        write_atomically(layout.last_used, _encode_lease("all", used=used), durable=False)
        for lease in dead:
            if lease.path:
                lease.path.unlink(missing_ok=True)


def _encode_lease(
    by: str, *, used: Mapping[str, tuple[float, float]], held: Iterable[str] = (), pins: Iterable[str] = ()
) -> bytes:
    latest = sorted(used.items(), key=lambda item: item[1][0])[:_MOST_MODELS]
    rounded = {title: [round(age_s, 1), round(weight, 3)] for title, (age_s, weight) in latest}
    return json.dumps({"v": VERSION, "by": by, "held": sorted(held), "pins": sorted(pins), "used": rounded}).encode()


# --- what this worker says ----------------------------------------------------------------------


class Leases:
    """This worker's uses. Safe to use from any thread; `job` and `JobUse.note` touch memory only.

    Nothing is written while no worker on the volume may remove models. `make_room` is called if the volume is too full for a
    lease, and returns whether it freed anything.
    """

    def __init__(
        self,
        layout: Layout,
        worker: str,
        *,
        timing: LeaseTiming | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timing = timing or LeaseTiming()
        self.make_room: Callable[[], bool] | None = None
        self._layout = layout
        self._worker = worker
        self._path = layout.lease(worker)
        self._pins: frozenset[str] = frozenset()
        self._clock = clock
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._jobs: set[JobUse] = set()
        self._last: frozenset[str] = frozenset()  # the titles of the last job that ended
        self._last_s = -1e18
        self._used: dict[str, tuple[float, float]] = {}  # when, and the weight at that time
        self._counted: set[str] = set()  # since the last beat
        self._published: frozenset[str] = frozenset()
        self._published_s = -1e18
        self._safe_until_s: dict[str, float] = {}
        self._needed: bool | None = None
        self._looked_s = -1e18
        self._began = False
        self._dirty = False
        self._stopped = False
        self._failed = False
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def job(self) -> Iterator[JobUse]:
        """Hold the models that the job in the body notes until it ends."""
        use = JobUse(self)
        with self._changed:
            self._jobs.add(use)
        try:
            yield use
        finally:
            with self._changed:
                self._jobs.discard(use)
                if use.titles:
                    self._last, self._last_s = frozenset(use.titles), self._clock()

    def held(self) -> frozenset[str]:
        """Return what this worker's jobs use now, recorded or not, and what the last one used a short time ago."""
        with self._changed:
            return self._held()

    def _held(self) -> frozenset[str]:
        lingers = self._clock() - self._last_s < self.timing.linger_s
        return frozenset().union(*(use.titles for use in self._jobs), self._last if lingers else ())

    def note(self, use: JobUse, titles: Iterable[str]) -> bool:
        """Like `JobUse.note`."""
        with self._changed:
            now_s = self._clock()
            for title in titles:
                use.titles.add(title)
                self._count(title, now_s)
            self._dirty = True
            self._start()
            return self._is_covered(use.titles, now_s)

    def pin(self, titles: Iterable[str]) -> None:
        """Keep these models while this worker lives: its own environment names them."""
        with self._changed:
            self._pins = frozenset(map(normal_title, titles))
            if self._pins:
                self._start()

    def _start(self) -> None:
        if self._thread is None and not self._stopped:
            self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
            self._thread.start()

    def _count(self, title: str, now_s: float) -> None:
        used_s, weight = self._used.get(title, (now_s, 0.0))
        if title not in self._counted:
            self._counted.add(title)
            weight = weight * 0.5 ** ((now_s - used_s) / self.timing.half_life_s) + 1.0
        self._used[title] = now_s, weight

    def _is_covered(self, titles: Iterable[str], now_s: float) -> bool:
        if self._needed is False:
            return now_s - self._looked_s < 2 * self.timing.beat_s
        renewed = now_s - self._published_s < self.timing.lease_s / 2
        safe = self._safe_until_s
        return all((renewed and title in self._published) or safe.get(title, -1e18) > now_s for title in titles)

    def forget(self, _: float = 0.0) -> None:
        """Distrust everything that was written: this process was stopped, and its lease may have expired."""
        with self._changed:
            self._published_s = self._looked_s = -1e18
            self._safe_until_s = {}

    def publish(self, *, is_job: bool = False) -> None:
        """Record what this worker uses, if any worker on the volume may remove models. It never raises.

        If a job waits for it, return only when each of its models is either there to stay, or gone.
        """
        with self._writing:
            is_needed = self._is_needed()
            if is_needed:
                self._write()
        if is_needed and is_job:
            wait_for_removals(self._layout)

    def _is_needed(self) -> bool:
        if not self._needed:
            with contextlib.suppress(OSError):
                looked_s = self._clock()
                self._needed = os.path.lexists(self._layout.leases_began)
                self._looked_s = looked_s
        return bool(self._needed)

    def _write(self) -> None:
        with self._changed:
            now_s = self._clock()
            held, used = self._held(), dict(self._used)
            self._counted.clear()
            self._dirty = False
        half_life_s = self.timing.half_life_s
        ages = {title: (now_s - at_s, weight * 0.5 ** ((now_s - at_s) / half_life_s)) for title, (at_s, weight) in used.items()}
        data = _encode_lease(self._worker, used=ages, held=held, pins=self._pins)
        try:
            self._set_aside()
            self._replace(data)
        except OSError as exc:
            self._touch(exc)
            return
        safe_s = self.timing.grace_s - 2 * self.timing.beat_s
        with self._changed:
            self._published, self._published_s = held, now_s
            self._safe_until_s = {title: at_s + safe_s for title, (at_s, _) in used.items() if at_s + safe_s > now_s}
            self._failed = False

    def _set_aside(self) -> None:
        """Keep the lease of an earlier process of this name: its uses count like any dead worker's."""
        if not self._began:
            with contextlib.suppress(FileNotFoundError):
                self._path.rename(self._path.with_name(f"{self._path.stem}.{secrets.token_hex(4)}.json"))
            self._began = True

    def _replace(self, data: bytes) -> None:
        try:
            write_atomically(self._path, data, durable=False)
        except OSError as exc:
            if exc.errno not in FULL or self.make_room is None:
                raise
            with contextlib.suppress(OSError):
                os.utime(self._path)  # making room may take longer than a lease
            if not self.make_room():
                raise
            write_atomically(self._path, data, durable=False)

    def _touch(self, exc: OSError) -> None:
        """Renew the last lease, which needs no space, if a new one cannot be written."""
        with contextlib.suppress(OSError):
            os.utime(self._path)
        if not self._failed:
            self._failed = True
            log.warning("which models jobs use cannot be written to the volume (%s)", exc.strerror or exc)

    def _renew(self) -> None:
        while True:
            with self._changed:
                if not self._stopped:
                    self._changed.wait(self.timing.beat_s)
                stopped, held = self._stopped, self._held()
                says = self._dirty or held or self._pins or held != self._published
            if stopped:
                break
            if says:
                self.publish()
        if self._published:
            self.publish()

    def stop(self) -> None:
        """Hold nothing any more. The last lease is written in the background."""
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._last = self._pins = frozenset()
            self._changed.notify_all()


@dataclass(eq=False, slots=True)
class JobUse:
    """The models that one job uses, which this worker's lease holds."""

    leases: Leases
    titles: set[str] = field(default_factory=set)

    def note(self, titles: Iterable[str]) -> bool:
        """Hold these models, as `folder/name`. Return whether other workers know it. If not: `publish`, then look."""
        return self.leases.note(self, [normal_title(title) for title in titles])

    def publish(self) -> None:
        """Tell the other workers, if the volume can be written to. Blocks for a small write, and while one removes models."""
        self.leases.publish(is_job=True)
