"""Workers die, stop and lose their locks; what carries a final name is right all the while, and the next one finishes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import threading
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import pytest

from devkit.fleet import FAST, MIB, SMALL, STEPS, Fleet, Worker
from devkit.hub import Hub as StandIn
from devkit.moosefs import LOCAL_FLOCK
from worker.errors import VolumeFailed
from worker.fetch.http import Network
from worker.fetch.hub import Hub
from worker.fetch.ranges import RangeTuning
from worker.model_spec import HubFile, ModelSpec
from worker.store.byte_ranges import Ranges
from worker.store.layout import Layout
from worker.store.store import LockTiming, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devkit.moosefs import MooseFS

SIZE = 12 * MIB
_HEADER = json.dumps({"t": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + random.Random(1).randbytes(SIZE)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
SPEC = ModelSpec("checkpoints", "model.safetensors", HubFile("org/repo", "model.safetensors"))
# What is written and not yet journalled, at most, as the default tuning's 64 MiB for each connection scaled to this file.
UNSAVED = 2 * (MIB + 128 * 1024)
# How far the ranges get that are held up until their worker is killed.
STALLED_AT = 400_000
# What a worker may cost that is killed while they are: a fifth of the file.
LOST_AT_MOST = UNSAVED + 2 * STALLED_AT


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    (root / "org/repo").mkdir(parents=True)
    (root / "org/repo/model.safetensors").write_bytes(WEIGHTS)
    return root


@pytest.fixture
def stand_in(hub_root: Path) -> Iterator[StandIn]:
    with StandIn(hub_root) as made:
        yield made


def stall(stand_in: StandIn, after_mib: int) -> None:
    """From that many MiB on nothing comes: what the workers asked for then is sent in part."""
    stand_in.fault("stall", skip=after_mib, after_bytes=STALLED_AT, count=2, route="cdn")


@pytest.fixture
def folders(moosefs: MooseFS, request: pytest.FixtureRequest) -> list[Path]:
    """One folder of the volume, as two hosts see it."""
    name = request.node.name.replace("[", "-").strip("]")
    (moosefs.mounts[0] / name).mkdir()
    return [mount / name for mount in moosefs.mounts[:2]]


def worker(name: str, root: Path, hub: StandIn, **options: Any) -> Worker:
    return Worker(name, str(root), hub.endpoint, "org/repo/model.safetensors", **options)


def journalled(root: Path) -> int:
    """How many bytes the next worker need not fetch."""
    journals = (json.loads(path.read_bytes())["ranges"] for path in Layout(root).partials.glob("*/*.journal"))
    return max((Ranges(ranges).total for ranges in journals), default=0)


class Watcher:
    """Reads the final name all the while: it is either not there, or whole and right. Says in the end that it saw something."""

    def __init__(self, *roots: Path) -> None:
        self._paths = [Layout(root).model("checkpoints", "model.safetensors") for root in roots]
        self._stop = threading.Event()
        self._wrong: list[str] = []
        self.looks = 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        assert self._wrong == []
        assert self.looks

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._look()

    def _look(self) -> None:
        for path in self._paths:
            self.looks += 1
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            if hashlib.sha256(content).hexdigest() != SHA256:
                self._wrong.append(f"{path}: {len(content)} bytes that are wrong")


def check_ready(root: Path, *, with_locked_partial: bool = False) -> None:
    """Sealed, right, and nothing left over; what the volume keeps locked for a dead host is removed when it no longer is."""
    layout = Layout(root)
    store = Store(layout, Hub("http://nowhere.invalid", Network()), "check")
    path = store.ready("checkpoints", "model.safetensors")
    assert path is not None
    assert path.read_bytes() == WEIGHTS
    left = [found for found in layout.partials.rglob("*") if found.is_file()] if layout.partials.exists() else []
    assert [path.suffix for path in left] in ([[], [".part"]] if with_locked_partial else [[]])
    assert list(layout.seals.rglob("*.pending")) == []
    assert list((layout.state / "pending").glob("*")) == []


# --- killed at any point ------------------------------------------------------------------------


def test_killed_at_any_step_the_next_worker_finishes(tmp_path: Path, stand_in: StandIn) -> None:
    """Ten volumes at once, a victim on each, then an heir on each."""
    roots = {step: tmp_path / step for step in STEPS}
    with Watcher(*roots.values()):
        with Fleet(*(worker(step, root, stand_in, die_at=step) for step, root in roots.items())) as victims:
            assert victims.wait_ended() == []
        reached = {event["worker"]: event["step"] for event in victims.events if event["event"] == "step"}
        assert reached == {step: step for step in STEPS}, "the last step that each one said is the one it died at"
        there = {step: journalled(root) for step, root in roots.items()}
        with Fleet(*(worker(step, root, stand_in) for step, root in roots.items())) as heirs:
            ends = {end["worker"]: end for end in heirs.wait_ended()}
    assert there["fetched"] >= len(WEIGHTS) - UNSAVED
    for step, root in roots.items():
        check_ready(root)
        late, whole = (STEPS.index(step) >= STEPS.index(known) for known in ("replaced", "settled"))
        assert ends[step]["how"] == ("ready" if step == "sealed" else "adopted" if late else "downloaded")
        assert ends[step]["bytes_fetched"] == (0 if whole else len(WEIGHTS) - there[step]), step


def test_killed_in_the_middle_of_its_ranges_little_is_fetched_again(tmp_path: Path, stand_in: StandIn) -> None:
    stall(stand_in, after_mib=8)
    with Watcher(tmp_path), Fleet(worker("victim", tmp_path, stand_in)) as fleet:
        stand_in.wait_stalled(2)
        fleet.kill(fleet.events[0]["pid"])
        assert fleet.wait_ended() == []
        stand_in.clear_faults()
        stand_in.wait_idle()
        sent, there = stand_in.bytes_sent(), journalled(tmp_path)
        assert 2 * LOST_AT_MOST < sent < len(WEIGHTS)
        with Fleet(worker("heir", tmp_path, stand_in)) as heirs:
            (end,) = heirs.wait_ended()
    assert end["how"] == "downloaded"
    assert end["bytes_fetched"] == len(WEIGHTS) - there
    assert sent - there <= LOST_AT_MOST
    check_ready(tmp_path)


def test_killed_again_and_again_it_still_gets_there(tmp_path: Path, stand_in: StandIn) -> None:
    """Each worker gets a few megabytes further, because none begins anew."""
    there = 0
    with Watcher(tmp_path):
        for attempt in range(2):
            stand_in.clear_faults()
            stand_in.clear_log()
            stall(stand_in, after_mib=4)
            with Fleet(worker(f"victim{attempt}", tmp_path, stand_in)) as fleet:
                pid = fleet.wait_step("claimed")["pid"]
                stand_in.wait_stalled(2)
                fleet.kill(pid)
                fleet.wait_ended()
            stand_in.clear_faults()
            stand_in.wait_idle()
            before, there = there, journalled(tmp_path)
            assert there - before >= stand_in.bytes_sent() - LOST_AT_MOST > 0
        with Fleet(worker("heir", tmp_path, stand_in)) as fleet:
            (end,) = fleet.wait_ended()
    assert end["how"] == "downloaded"
    assert end["bytes_fetched"] == len(WEIGHTS) - there
    check_ready(tmp_path)


# --- a fleet ------------------------------------------------------------------------------------


def test_sixteen_workers_on_two_hosts_fetch_the_bytes_once(folders: list[Path], stand_in: StandIn) -> None:
    with Watcher(*folders), Fleet(*(worker(f"w{n}", folders[n % 2], stand_in) for n in range(16))) as fleet:
        ends = fleet.wait_ended()
    assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 15
    assert stand_in.bytes_sent() == len(WEIGHTS)
    for folder in folders:
        check_ready(folder)


def test_whom_the_hub_puts_off_sees_that_the_first_has_published(tmp_path: Path, stand_in: StandIn) -> None:
    """Every look-up but the first is answered with 429 and an hour to wait."""
    stand_in.fault("status", status=429, retry_after_s=3600, skip=1, count=None, route="resolve")
    stall(stand_in, after_mib=2)
    with Watcher(tmp_path), Fleet(*(worker(f"w{n}", tmp_path, stand_in) for n in range(16))) as fleet:
        stand_in.wait_stalled(2)
        fleet.wait_step("waiting")
        stand_in.clear_faults()
        ends = fleet.wait_ended()
    assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 15
    check_ready(tmp_path)


KILLS = int(os.environ.get("KILLS", "6"))


def test_killed_between_two_versions_without_a_hash_no_file_is_mixed(tmp_path: Path) -> None:
    """The source changes all the while between two versions of one length; `KILLS=200` is the long form."""
    root = tmp_path / "hub"
    (root / "org/repo").mkdir(parents=True)
    versions = [random.Random(seed).randbytes(3 * MIB) for seed in (1, 2)]
    place, chance, stop = root / "org/repo/model.bin", random.Random(KILLS), threading.Event()

    def put(version: int, at_s: int) -> None:
        new = place.with_suffix(".new")
        new.write_bytes(versions[version])
        os.utime(new, (at_s, at_s))
        new.replace(place)

    def change_often() -> None:
        turn = 0
        while not stop.wait(chance.uniform(0.05, 0.6)):
            turn += 1
            put(turn % 2, 1_700_000_000 + 10 * turn)

    put(0, 1_700_000_000)
    changing = threading.Thread(target=change_often)
    changing.start()
    kills = seen = 0
    try:
        with StandIn(root) as hub:
            while kills < KILLS:
                hub.clear_faults()
                for fault in chance.choice(SIGNS):
                    hub.fault(**fault, count=None)
                hub.fault("slow", bytes_per_s=chance.choice([8, 16, 64]) * MIB, count=None, route="files")
                source = f"{hub.endpoint}/files/org/repo/model.bin"
                volume = tmp_path / f"volume{seen}"
                one = Worker(f"w{kills}", str(volume), hub.endpoint, source, model="model.bin")
                with Fleet(one) as fleet:
                    fleet.wait_for(lambda event: event.get("step") == "claimed" or event["event"] == "error")
                    if chance.random() < 0.6:
                        stop.wait(chance.uniform(0.0, 0.4))
                        kills += 1
                        with contextlib.suppress(ProcessLookupError):
                            fleet.kill(fleet.events[0]["pid"])
                    fleet.wait_ended()
                found = Layout(volume).model("checkpoints", "model.bin")
                if found.exists():
                    assert found.read_bytes() in versions, "bytes of two versions in one file"
                    seen += 1
    finally:
        stop.set()
        changing.join()
    logging.getLogger(__name__).info("%d kills, %d files, none mixed", kills, seen)
    assert seen or KILLS < 100


SIGNS: list[list[dict[str, Any]]] = [
    [],
    [{"kind": "ignore_if_range"}],
    [{"kind": "weak"}],
    [{"kind": "weak"}, {"kind": "without", "value": "Last-Modified"}],
    [{"kind": "without", "value": "ETag"}],
    [{"kind": "without", "value": "ETag"}, {"kind": "ignore_if_range"}],
    [{"kind": "without", "value": "ETag"}, {"kind": "without", "value": "Last-Modified"}],
]


def test_the_fleet_takes_over_from_a_killed_holder(folders: list[Path], stand_in: StandIn) -> None:
    stall(stand_in, after_mib=8)
    with Watcher(*folders), Fleet(*(worker(f"w{n}", folders[n % 2], stand_in) for n in range(8))) as fleet:
        holder = fleet.wait_step("claimed")
        stand_in.wait_stalled(2)
        fleet.kill(holder["pid"])
        # While its sockets are open they would take more of what is stalled.
        fleet.wait_for(lambda event: event["event"] == "gone" and event["worker"] == holder["worker"])
        stand_in.clear_faults()
        ends = fleet.wait_ended()
    assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 6
    assert stand_in.bytes_sent() - len(WEIGHTS) <= LOST_AT_MOST
    check_ready(folders[0])


def test_the_fleet_takes_over_from_a_dead_host(folders: list[Path], stand_in: StandIn, moosefs: MooseFS) -> None:
    """What the dead host was writing stays locked by the volume for two minutes; the fleet does not wait for that."""
    doomed_root = moosefs.mount() / folders[0].name
    stall(stand_in, after_mib=4)
    with Fleet(worker("doomed", doomed_root, stand_in)) as doomed:
        doomed.wait_step("claimed")
        stand_in.wait_stalled(2)
        with (
            Watcher(*folders),
            Fleet(*(worker(f"w{n}", folders[n % 2], stand_in, tuning={**SMALL, "stuck_s": 1.0}) for n in range(4))) as fleet,
        ):
            stand_in.clear_faults()
            moosefs.kill_mount(len(moosefs.mounts) - 1)
            # A worker that reads the dead host's heartbeat may hang as well, but not for the two minutes.
            ends = fleet.wait_ended(110)
        assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 3
        stand_in.release()
        assert [end["code"] for end in doomed.wait_ended()] == ["volume_failed"]
    for folder in folders:
        check_ready(folder, with_locked_partial=True)


def test_a_stopped_holder_is_overtaken_and_its_waking_hurts_nobody(folders: list[Path], stand_in: StandIn) -> None:
    stall(stand_in, after_mib=4)
    with Watcher(*folders), Fleet(worker("zombie", folders[0], stand_in)) as zombies:
        pid = zombies.wait_step("claimed")["pid"]
        stand_in.wait_stalled(2)
        zombies.kill(pid, signal.SIGSTOP)
        stand_in.clear_faults()
        with Fleet(*(worker(f"w{n}", folders[1], stand_in) for n in range(2))) as fleet:
            ends = fleet.wait_ended()
        assert sorted(end["how"] for end in ends) == ["downloaded", "ready"]
        # It wakes with its connections in the middle of a range, and its file published under another name.
        stand_in.release()
        zombies.kill(pid, signal.SIGCONT)
        (end,) = zombies.wait_ended()
    assert end["how"] in {"ready", "adopted"}
    check_ready(folders[0])


def test_stopped_at_any_step_and_overtaken_all_end_with_the_right_file(folders: list[Path], stand_in: StandIn) -> None:
    steps = ["bytes", "settled", "replacing", "replaced"]
    here, there = ({step: folder / step for step in steps} for folder in folders)
    for root in here.values():
        root.mkdir()
    with (
        Watcher(*here.values(), *there.values()),
        Fleet(*(worker(step, here[step], stand_in, stop_at=step) for step in steps)) as zombies,
    ):
        for step in steps:
            zombies.wait_step(step, of=step)
        pids = {event["pid"] for event in zombies.events}
        with Fleet(*(worker(step, there[step], stand_in) for step in steps)) as heirs:
            assert [end["event"] for end in heirs.wait_ended()] == ["done"] * 4
        for pid in pids:
            zombies.kill(pid, signal.SIGCONT)
        assert [end["event"] for end in zombies.wait_ended()] == ["done"] * 4
    with Fleet(*(worker(step, there[step], stand_in) for step in steps)) as last:
        assert {end["how"] for end in last.wait_ended()} <= {"ready", "adopted"}
    for root in here.values():
        check_ready(root)


# --- the lock sabotaged -------------------------------------------------------------------------


def test_locks_removed_in_the_middle_cost_bandwidth_only(folders: list[Path], stand_in: StandIn) -> None:
    stall(stand_in, after_mib=2)
    tuning = {**SMALL, "handover_s": 1.5}
    with Watcher(*folders), Fleet(*(worker(f"w{n}", folders[n % 2], stand_in, tuning=tuning) for n in range(6))) as fleet:
        stand_in.wait_stalled(2)
        shutil.rmtree(Layout(folders[0]).locks, ignore_errors=True)
        stand_in.clear_faults()
        ends = fleet.wait_ended()
    assert {end["event"] for end in ends} == {"done"}
    check_ready(folders[0], with_locked_partial=True)


def test_hosts_whose_flock_is_their_own_fetch_once_all_the_same(
    folders: list[Path], stand_in: StandIn, moosefs: MooseFS
) -> None:
    roots = [moosefs.mount(LOCAL_FLOCK) / folders[0].name for _ in range(2)]
    with Watcher(*roots), Fleet(*(worker(f"w{n}", roots[n % 2], stand_in) for n in range(6))) as fleet:
        ends = fleet.wait_ended()
    assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 5
    assert stand_in.bytes_sent() == len(WEIGHTS)
    check_ready(roots[0])


def test_with_no_lock_at_all_the_file_is_right(folders: list[Path], stand_in: StandIn) -> None:
    """The locks' folder cannot be made: every worker downloads for itself, and one publication is as good as another."""
    Layout(folders[0]).state.mkdir()
    Layout(folders[0]).locks.write_bytes(b"in the way")
    with Watcher(*folders), Fleet(*(worker(f"w{n}", folders[n % 2], stand_in) for n in range(6))) as fleet:
        ends = fleet.wait_ended()
    assert {end["event"] for end in ends} == {"done"}, ends
    assert {end["how"] for end in ends} <= {"downloaded", "ready", "adopted"}
    assert Layout(folders[0]).model("checkpoints", "model.safetensors").read_bytes() == WEIGHTS
    with Fleet(worker("last", folders[1], stand_in)) as fleet:
        (end,) = fleet.wait_ended()
    assert end["how"] in {"ready", "adopted"}
    check_ready(folders[0])


def test_without_a_lock_too_nothing_is_left_of_a_worker_that_died(tmp_path: Path, stand_in: StandIn) -> None:
    """Its bytes are not idle for long enough to be gone on with, and after the publication nobody would look there again."""
    with Fleet(worker("victim", tmp_path, stand_in, die_at="settled")) as fleet:
        assert fleet.wait_ended() == []
    shutil.rmtree(Layout(tmp_path).locks)
    Layout(tmp_path).locks.write_bytes(b"in the way")
    with Watcher(tmp_path), Fleet(worker("heir", tmp_path, stand_in)) as fleet:
        (end,) = fleet.wait_ended()
    assert end["bytes_fetched"] == len(WEIGHTS)
    check_ready(tmp_path)


def test_a_disk_that_dies_under_a_download_is_an_error_not_a_hang(
    folders: list[Path], stand_in: StandIn, moosefs: MooseFS
) -> None:
    root = moosefs.mount() / folders[0].name
    stall(stand_in, after_mib=2)
    with Fleet(worker("w", root, stand_in)) as fleet:
        stand_in.wait_stalled(2)
        moosefs.kill_mount(len(moosefs.mounts) - 1)
        stand_in.clear_faults()
        (end,) = fleet.wait_ended()
    assert (end["event"], end["code"]) == ("error", "volume_failed")


def test_a_flush_that_never_ends_is_an_error_and_the_next_one_finishes(tmp_path: Path, stand_in: StandIn) -> None:
    go_on = threading.Event()
    real = os.fdatasync

    def keep(fd: int) -> None:
        assert go_on.wait(60)
        real(fd)

    hub = Hub(stand_in.endpoint, Network())
    tuning, timing = RangeTuning(**{**SMALL, "patience_s": 1.0}), LockTiming(**FAST)  # type: ignore[arg-type] # as in devkit.fleet
    with mock.patch("os.fdatasync", keep):
        try:
            with pytest.raises(VolumeFailed, match="did not answer"):
                Store(Layout(tmp_path), hub, "w1", tuning=tuning, timing=timing).ensure(SPEC)
            with mock.patch("os.fdatasync", real):
                assert Store(Layout(tmp_path), hub, "w2", tuning=tuning, timing=timing).ensure(SPEC).how == "downloaded"
        finally:
            go_on.set()
    check_ready(tmp_path)
