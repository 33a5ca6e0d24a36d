"""A volume that makes room for itself, under a fleet: what is fetched again, and whether anything goes that must not.

Four workers, each with a mount of its own of one MooseFS volume and a clock that is off by hours, do jobs on 40 models, drawn
by Zipf; the volume has a quota of half their sum. Workers are killed with -9 and succeeded by new ones. Workers, store, leases
and removals are the real ones, ComfyUI is left out, and the models are 50,000 times smaller than real ones.

Nearly all jobs run on mounts that cache no names, where a removal need not wait until caches are over; the others on mounts as
they are, with removals as they are.

Counted: jobs that failed; files that went under a job; files without a seal that changed; bytes fetched again. The last are
compared with two orders on the same trace: the one that knows the future (Belady: what is needed last goes first), and the
best one that does not, which knows how often each model is wanted in the long run. No order without foresight gets nearer to
Belady's than that one.

Then what it costs: the operations on the volume by which leases add to warm jobs, for each worker and beat (a minute), as the
mount counts them, and what a warm job waits for its lease.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import tempfile
import time
from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.evict_part import FOLDER, Part, Told, name_of, run
from bench.report import Figure, leave_out, parse_args, report
from devkit.hub import Hub
from devkit.moosefs import MooseFS, available
from worker.store.layout import Layout
from worker.store.leases import Leases, LeaseTiming

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

FAILED_BOUND, IN_USE_BOUND, UNSEALED_BOUND = 0, 0, 0
OVER_KNOWN_BOUND = 1.3
LEASE_BOUND_MS = 0.1

_WORKERS: Final = 4
_MODELS: Final = 40
_ZIPF: Final = 1.2
_SIZES_GB: Final = (0.3, 1, 2, 5, 7, 12, 17, 24)
_UNIT: Final = 20_000
"""Bytes in the place of a GB."""
_RECORDS_BYTES: Final = 4_000_000
_KILL_EVERY: Final = 200
_HOURS: Final = 5 * 3600.0
_RUN_S: Final = 0.01
_SILENCE_S: Final = 180.0
_UNCACHED: Final = ("-o", "mfsdirentrycacheto=0", "-o", "mfsattrcacheto=0", "-o", "mfsentrycacheto=0")
_SETTLE_S: Final = 1.5
_BEATS: Final = 8
_BEAT_S: Final = 1.0
_JOBS: Final = 10_000
_SHORT_JOBS: Final = 200


# --- the trace, and orders on it ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """Which model each job wants, and what the models are."""

    wanted: tuple[int, ...]
    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    """How often each model is wanted in the long run."""

    @classmethod
    def of(cls, jobs: int, seed: int) -> Trace:
        """Draw one."""
        rng = random.Random(seed)
        sizes = tuple(int(rng.choice(_SIZES_GB) * _UNIT) for _ in range(_MODELS))
        shares = [1 / (rank + 1) ** _ZIPF for rank in range(_MODELS)]
        return cls(tuple(rng.choices(range(_MODELS), shares, k=jobs)), sizes, tuple(shares))

    @property
    def keep_bytes(self) -> int:
        """Half their sum."""
        return sum(self.sizes) // 2


def again_bytes(trace: Trace, worth: Callable[[int, int], float]) -> int:
    """Return what an order fetches again: `worth` of a model after so many jobs; the least worth goes first."""
    there: set[int] = set()
    had: set[int] = set()
    again = 0
    for at, model in enumerate(trace.wanted):
        if model in there:
            continue
        while sum(trace.sizes[other] for other in there) + trace.sizes[model] > trace.keep_bytes:
            there.remove(min(there, key=lambda other: worth(other, at)))
        there.add(model)
        again += trace.sizes[model] if model in had else 0
        had.add(model)
    return again


def belady_bytes(trace: Trace) -> int:
    """Return what the order fetches again that knows the future."""
    next_of: dict[int, list[int]] = defaultdict(list)
    for at in reversed(range(len(trace.wanted))):
        next_of[trace.wanted[at]].append(at)

    def worth(model: int, at: int) -> float:
        left = next_of[model]
        while left and left[-1] <= at:
            left.pop()
        return -left[-1] if left else -math.inf

    return again_bytes(trace, worth)


def past_bytes(trace: Trace, judge: Callable[[Sequence[int]], float]) -> int:
    """Return what an order fetches again that judges a model by the jobs that wanted it so far."""
    jobs_of: dict[int, list[int]] = defaultdict(list)
    for at, model in enumerate(trace.wanted):
        jobs_of[model].append(at)
    return again_bytes(trace, lambda model, at: judge(jobs_of[model][: bisect(jobs_of[model], at)]))


def known_bytes(trace: Trace) -> int:
    """Return what the order fetches again that knows how often each model is wanted, and not when."""
    return again_bytes(trace, lambda model, _: trace.shares[model])


# --- the fleet ------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Member:
    """One worker's process, and the job it has."""

    mount: Path
    process: ForkServerProcess
    pipe: Connection
    job: int | None = None
    is_ready: bool = False


@dataclass(slots=True)
class Counts:
    """What was seen."""

    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    removed_in_use: int = 0
    again_bytes: int = 0
    fetched: set[int] = field(default_factory=set)
    done: int = 0
    waited_for_lease: int = 0
    kills: int = 0


class Fleet:
    """Workers that are killed and succeeded, and the queue they take jobs from."""

    def __init__(self, mounts: Sequence[Path], hub: Hub, trace: Trace, keep_bytes: int, settle_s: float) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bench.evict_part"])
        self._hub, self._trace, self._keep_bytes, self._settle_s = hub, trace, keep_bytes, settle_s
        self._rng = random.Random(len(trace.wanted))
        self._born = 0
        self.counts = Counts()
        self.members = [self._start(mount) for mount in mounts]

    def _start(self, mount: Path) -> Member:
        self._born += 1
        here, there = self._context.Pipe()
        off_s = self._rng.uniform(-_HOURS, _HOURS)
        part = Part(f"pod-{self._born}", str(mount / "v"), self._hub.endpoint, self._keep_bytes, off_s, _RUN_S, self._settle_s)
        process = self._context.Process(target=run, args=(part, there), daemon=True)
        process.start()
        there.close()
        return Member(mount, process, here)

    def work(self) -> Counts:
        """Do all jobs of the trace, those of killed workers again."""
        waiting = list(reversed(self._trace.wanted))
        heard_s = time.monotonic()
        while waiting or any(member.job is not None for member in self.members):
            ready: Any = multiprocessing.connection.wait([member.pipe for member in self.members], 1.0)
            if ready:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > _SILENCE_S:
                raise TimeoutError(f"no worker said anything for {_SILENCE_S:g} s; they are at {[m.job for m in self.members]}")
            for member in [member for member in self.members if member.pipe in ready]:
                self._hear(member, waiting)
                if waiting and member.is_ready and member.job is None:
                    member.job = waiting.pop()
                    member.pipe.send(member.job)
            if self.counts.done and self.counts.done // _KILL_EVERY > self.counts.kills:
                self._kill(waiting)
        return self.counts

    def _hear(self, member: Member, waiting: Sequence[int]) -> None:
        told: Told = member.pipe.recv()
        counts = self.counts
        member.job, member.is_ready = None, True
        if told.model < 0:
            return
        counts.done += 1
        counts.waited_for_lease += told.wrote
        counts.removed_in_use += told.was_removed
        if told.how in {"downloaded", "adopted"}:
            if told.model in counts.fetched and told.how == "downloaded":
                counts.again_bytes += self._trace.sizes[told.model]
            counts.fetched.add(told.model)
        elif told.how != "ready":
            counts.failed[told.how] += 1
        if counts.done % 500 == 0:
            print(f"{counts.done} jobs, {len(waiting)} to go, {counts}", file=sys.stderr)

    def _kill(self, waiting: list[int]) -> None:
        """Kill one in the middle of whatever it does; its job goes back to the queue, as RunPod has it."""
        self.counts.kills += 1
        victim = self._rng.choice(self.members)
        victim.process.kill()
        victim.process.join()
        victim.pipe.close()
        if victim.job is not None:
            waiting.append(victim.job)
        self.members[self.members.index(victim)] = self._start(victim.mount)

    def end(self) -> None:
        """Kill them all."""
        for member in self.members:
            member.process.kill()
            member.process.join()


def by_hand(root: Path) -> dict[Path, bytes]:
    """Put files there that no worker may touch."""
    files = {root / "models" / FOLDER / f"mine-{number}.bin": os.urandom(_UNIT) for number in range(3)}
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def fleet(trace: Trace, *, caches: bool) -> tuple[Counts, int]:
    """Run the trace; what was counted, and how many files without a seal were touched."""
    with tempfile.TemporaryDirectory() as temporary, MooseFS(Path(temporary) / "volume", mounts=0) as volume:
        folder = Path(temporary) / "hub/org/repo"
        folder.mkdir(parents=True)
        rng = random.Random(len(trace.wanted))
        for model, size in enumerate(trace.sizes):
            (folder / name_of(model)).write_bytes(rng.randbytes(size))
        mounts = [volume.mount(() if caches else _UNCACHED) for _ in range(_WORKERS)]
        root = mounts[0] / "v"
        root.mkdir()
        mine = by_hand(root)
        stats = {path: path.stat() for path in mine}
        keep = trace.keep_bytes + sum(map(len, mine.values()))
        volume.set_quota(root, keep + _RECORDS_BYTES)
        with Hub(Path(temporary) / "hub") as hub:
            workers = Fleet(mounts, hub, trace, keep, _SETTLE_S if caches else 0.0)
            try:
                counts = workers.work()
            finally:
                workers.end()
        return counts, sum(path.read_bytes() != data or path.stat().st_ino != stats[path].st_ino for path, data in mine.items())


def simulate(jobs: int, seed: int) -> list[Figure]:
    """Run the fleets; the figures."""
    trace = Trace.of(jobs, seed)
    counts, touched = fleet(trace, caches=False)
    cached, touched_too = fleet(Trace.of(max(_KILL_EVERY + 10, jobs // 50), seed), caches=True)
    touched += touched_too
    for code, number in cached.failed.items():
        counts.failed[code] += number
    counts.removed_in_use += cached.removed_in_use
    belady, known = max(1, belady_bytes(trace)), max(1, known_bytes(trace))
    print(
        f"{counts.kills} workers killed; Belady {belady}, known shares {known}, here {counts.again_bytes} bytes",
        file=sys.stderr,
    )
    return [
        Figure.of("jobs failed", [sum(counts.failed.values())], "", FAILED_BOUND),
        Figure.of("files removed in use", [counts.removed_in_use], "", IN_USE_BOUND),
        Figure.of("files without a seal touched", [touched], "", UNSEALED_BOUND),
        Figure.of("bytes fetched again / the best order without foresight", [counts.again_bytes / known], "", OVER_KNOWN_BOUND),
        Figure.of("bytes fetched again / Belady", [counts.again_bytes / belady], ""),
        Figure.of("the best order without foresight / Belady", [known / belady], ""),
        Figure.of("the model used least goes first, alone / Belady", [past_bytes(trace, len) / belady], ""),
        Figure.of(
            "the model used longest ago goes first, alone / Belady", [past_bytes(trace, lambda jobs: jobs[-1]) / belady], ""
        ),
        Figure.of("jobs that wrote a lease first", [100 * counts.waited_for_lease / counts.done], "%"),
    ]


# --- what it costs --------------------------------------------------------------------------------


def operations(mount: Path) -> int:
    """Return how many operations this mount has asked of the volume."""
    lines = (mount / ".stats").read_text("ascii").splitlines()
    return next(int(line.partition(": ")[2]) for line in lines if line.startswith("fuse_ops: "))


def cost() -> list[Figure]:
    """Measure leases under warm jobs: what a job waits, and what a beat asks of the volume."""
    with tempfile.TemporaryDirectory() as temporary, MooseFS(Path(temporary) / "volume", mounts=1) as volume:
        mount = volume.mounts[0]
        layout = Layout(mount / "v")
        layout.leases.mkdir(parents=True)
        layout.leases_began.touch()
        titles = [f"{FOLDER}/{name_of(model)}" for model in range(3)]
        leases = Leases(layout, "pod", timing=LeaseTiming(beat_s=_BEAT_S, lease_s=5 * _BEAT_S, linger_s=600))
        with leases.job() as use:
            use.note(titles)
            use.publish()
        before, until_s, waits = operations(mount), time.monotonic() + _BEATS * _BEAT_S, list[float]()
        while time.monotonic() < until_s:
            began_s = time.perf_counter()
            with leases.job() as use:
                if not use.note(titles):
                    use.publish()
            waits.append((time.perf_counter() - began_s) * 1000)
            time.sleep(_RUN_S)
        asked = operations(mount) - before
        leases.stop()
    return [
        Figure("a warm job's wait for its lease", sorted(waits)[len(waits) // 2], "ms", LEASE_BOUND_MS, ()),
        Figure.of("operations on the volume for each worker and minute", [asked / _BEATS], ""),
    ]


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, help=f"how many jobs (default {_JOBS:,}, short {_SHORT_JOBS:,})")
    parser.add_argument("--seed", type=int, default=1, help="of the trace, the kills and the clocks (default 1)")


def main() -> int:
    """Measure and print."""
    options = parse_args(__doc__, samples=1, short_samples=1, add=_add)
    if reason := available():
        leave_out(reason)
        return 0
    jobs = options.extra.jobs or (_SHORT_JOBS if options.short else _JOBS)
    return report([*simulate(jobs, options.extra.seed), *cost()], options)


if __name__ == "__main__":
    sys.exit(main())
