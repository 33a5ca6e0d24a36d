"""One worker of `bench/evict.py`: the worker's own store, leases and room, with ComfyUI left out. Runs until it is killed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.errors import WorkerError
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.fetch.ranges import RangeTuning
from worker.model_spec import HubFile, ModelSpec
from worker.store import eviction
from worker.store.layout import Layout
from worker.store.leases import Leases, LeaseTiming
from worker.store.room import Room, source_check
from worker.store.store import LockTiming, Store

if TYPE_CHECKING:
    import os
    from multiprocessing.connection import Connection

FOLDER: Final = "checkpoints"
SMALLER: Final = 50_000
"""The models are that many times smaller than real ones, and so is what a look-up costs in bytes."""

TIMING: Final = LeaseTiming(beat_s=3, lease_s=15, linger_s=1, grace_s=0, notice_s=0, merge_s=60)
"""No time of grace: what keeps a model under a job is its lease alone."""

LOCKS: Final = LockTiming(
    heartbeat_s=0.5, stale_s=4, quiet_s=0.5, look_s=0.1, poll_s=0.05, attempt_s=0.3, patience_s=60, report_every_s=0.2
)
TUNING: Final = RangeTuning(
    connections=1, request_bytes=1 << 20, smallest_bytes=1 << 20, buffer_bytes=1 << 16, unsaved_bytes=1 << 20
)


@dataclass(frozen=True, slots=True)
class Part:
    """What a worker is told at its start."""

    name: str
    root: str
    endpoint: str
    keep_bytes: int
    clock_off_s: float
    run_s: float
    settle_s: float
    patience_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a job."""

    model: int
    how: str
    was_removed: bool = False
    """Whether the file went while the job used it."""
    wrote: bool = False
    """Whether the job had to wait for a lease."""


def name_of(model: int) -> str:
    """The file of a model."""
    return f"model-{model:02}.bin"


def run(part: Part, jobs: Connection) -> None:
    """Do each job that comes; a job is the number of a model."""
    real = time.time
    time.time = lambda: real() + part.clock_off_s  # this host's clock is wrong by hours
    eviction.LOOK_UP_BYTES //= SMALLER
    layout = Layout(Path(part.root))
    hub = Hub(part.endpoint, Network(credentials(part.endpoint, None, None), read_timeout_s=60))
    leases = Leases(layout, part.name, timing=TIMING)
    room = Room(
        layout,
        part.name,
        eviction.EvictionLimits(keep_bytes=part.keep_bytes),
        eviction.EvictionPins,
        leases=leases,
        ask=source_check(lambda: hub),
        lock_timing=LOCKS,
        patience_s=part.patience_s,
        settle_s=part.settle_s,
    )
    room.begin()
    store = Store(layout, hub, part.name, tuning=TUNING, timing=LOCKS, room=room)
    jobs.send(Told(-1, "ready"))
    while True:
        jobs.send(_job(jobs.recv(), store, leases, part))


def _job(model: int, store: Store, leases: Leases, part: Part) -> Told:
    spec = ModelSpec(FOLDER, name_of(model), HubFile("org/repo", name_of(model)))
    with leases.job() as use:
        covered = use.note([f"{FOLDER}/{spec.name}"])
        if not covered:
            use.publish()
        told = Told(model, "ready", wrote=not covered)
        path = store.layout.model(FOLDER, spec.name)
        try:
            if store.ready(FOLDER, spec.name) is None:
                told = replace(told, how=store.ensure(spec).how)
            before = path.stat()
        except WorkerError as exc:
            return replace(told, how=exc.code)
        except FileNotFoundError:
            return replace(told, was_removed=True)
        time.sleep(part.run_s)
        return replace(told, was_removed=_is_other(path, before))


def _is_other(path: Path, before: os.stat_result) -> bool:
    try:
        return path.stat().st_ino != before.st_ino
    except FileNotFoundError:
        return True
