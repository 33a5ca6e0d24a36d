"""A volume that makes room for itself: what goes, what never does, and what a killed or full volume leaves."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from devkit.hub import Hub as StandIn
from worker.base.files import write_atomically
from worker.errors import VolumeFailed, VolumeFull
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.fetch.ranges import RangeTuning
from worker.model_spec import HubFile, ModelSpec
from worker.models.sources import Sources
from worker.pins import read_pins
from worker.store.download import DownloadHooks
from worker.store.eviction import (
    ContentName,
    EvictionLimits,
    EvictionPins,
    SealedContent,
    chosen_for_removal,
    survey_for_eviction,
)
from worker.store.layout import Layout
from worker.store.leases import LeasedTitles, Leases, LeaseTiming, merge_old, read_leases, removal_marks, wait_for_removals
from worker.store.locks import Locks, LockTiming
from worker.store.room import Room, source_check
from worker.store.seals import Seal, read_seal
from worker.store.store import Store
from worker.store.tombstones import tombstone_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.moosefs import MooseFS

MIB = 1024 * 1024
SIZE = MIB // 4
COUNT = 6
QUICK = LockTiming(heartbeat_s=0.3, stale_s=2, quiet_s=0.5, look_s=0.1, poll_s=0.05, attempt_s=0.1, lone_patience_s=0.2)
TUNING = RangeTuning(
    connections=2, request_bytes=MIB // 2, smallest_bytes=MIB // 4, buffer_bytes=64 * 1024, unsaved_bytes=MIB, patience_s=5
)
NOW = LeaseTiming(grace_s=0.0, notice_s=0.0)
"""Whoever may remove may at once, and what was used just now may go."""


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def spec(number: int, name: str = "") -> ModelSpec:
    return ModelSpec("loras", name or f"m{number}.bin", HubFile("org/repo", f"m{number}.bin"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    root = tmp_path_factory.mktemp("hub")
    folder = root / "org/repo"
    folder.mkdir(parents=True)
    for number in range(COUNT):
        (folder / f"m{number}.bin").write_bytes(content(number))
    with StandIn(root) as made:
        yield made


class Site:
    """One volume, and workers on it."""

    def __init__(self, endpoint: str, root: Path) -> None:
        self.layout = Layout(root)
        self.hub = Hub(endpoint, Network(credentials(endpoint, None, None), read_timeout_s=5), patience_s=2)
        self.never = threading.Event()
        self.jobs = contextlib.ExitStack()

    def room(self, keep: int | None = None, name: str = "pod-1", **options: Any) -> Room:
        pins = options.pop("pins", EvictionPins())
        options.setdefault("leases", Leases(self.layout, name, timing=options.pop("timing", NOW)))
        options.setdefault("ask", source_check(lambda: self.hub))
        limits = EvictionLimits(keep_bytes=None if keep is None else keep * SIZE)
        return Room(self.layout, name, limits, lambda: pins, lock_timing=QUICK, settle_s=0.0, **options)

    def store(self, room: Room | None = None, name: str = "pod-1") -> Store:
        return Store(self.layout, self.hub, name, tuning=TUNING, timing=QUICK, room=room)

    def fetch(self, *numbers: int, room: Room | None = None) -> None:
        for number in numbers:
            self.store(room).ensure(spec(number))

    def there(self) -> set[int]:
        return {number for number in range(COUNT) if self.layout.model("loras", f"m{number}.bin").exists()}

    def contents(self, timing: LeaseTiming = NOW, pins: EvictionPins | None = None) -> dict[str, SealedContent]:
        found = survey_for_eviction(self.layout, pins or EvictionPins(), timing)
        return {found.title: found for found in found.contents}

    def use(self, name: str, *titles: str, timing: LeaseTiming = NOW) -> Leases:
        """Another worker's job that has written down what it uses, and goes on."""
        leases = Leases(self.layout, name, timing=timing)
        use = self.jobs.enter_context(leases.job())
        use.note(titles)
        leases.publish()  # without the wait for a removal, which may be what calls this
        return leases

    def age(self, name: str, seconds: float) -> None:
        """Have it been that long since a worker wrote its lease."""
        path = self.layout.leases / f"{name}.json"
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))

    def much_later(self) -> None:
        """Have interrupted removals be a long time ago."""
        for aside in self.layout.removing.glob("*"):
            aside.rename(aside.with_name(f"1-{aside.name.partition('-')[2]}"))
        for mark, _ in removal_marks(self.layout):
            os.utime(mark, (1, 1))

    def litter(self) -> list[Path]:
        """What removals left."""
        return [*self.layout.removing.glob("*"), *(mark for mark, _ in removal_marks(self.layout))]


@pytest.fixture
def site(stand_in: StandIn, tmp_path: Path) -> Site:
    return Site(stand_in.endpoint, tmp_path / "volume")


def test_a_download_that_does_not_fit_has_the_least_used_go(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site.fetch(0, 1, 2)
    site.room().begin()
    ended(site.use("pod-2", "loras/m0.bin", "loras/m2.bin"))
    room = site.room(keep=3)

    site.fetch(3, room=room)

    assert site.there() == {0, 2, 3}
    assert read_seal(site.layout.seal("loras", "m1.bin")) is None
    tombstone = tombstone_of(site.layout, "loras", "m1.bin")
    assert tombstone
    assert (tombstone.by, tombstone.seal.repo, tombstone.seal.file) == ("pod-1", "org/repo", "m1.bin")
    assert tombstone.seal.sha256 == hashlib.sha256(content(1)).hexdigest()
    assert "removed loras/m1.bin" in caplog.text
    assert site.litter() == []


def test_what_was_removed_is_fetched_again_once_and_the_log_says_so(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site.fetch(0)
    site.room().make(1, site.never)
    assert site.there() == set()

    assert site.store().ensure(spec(0)).how == "downloaded"

    assert "loras/m0.bin is downloaded again: it was removed to make room by pod-1" in caplog.text
    assert tombstone_of(site.layout, "loras", "m0.bin") is None
    assert site.store().ensure(spec(0)).how == "ready"


# --- what stays ---------------------------------------------------------------------------------


def by_hand(site: Site) -> str:
    site.layout.seal("loras", "m0.bin").unlink()
    return ""


def replaced_by_hand(site: Site) -> str:
    site.layout.model("loras", "m0.bin").write_bytes(content(1) + b"!")
    return ""


def used(site: Site) -> str:
    site.use("pod-2", "loras/m0.bin")
    return "a job of pod-2 uses it"


def used_in_any_folder(site: Site) -> str:
    site.use("pod-2", "?/m0.bin")
    return "a job of pod-2 uses it"


def linked_to(site: Site) -> str:
    site.layout.model("loras", "other.bin").symlink_to("m0.bin")
    return "the link loras/other.bin leads to it"


def linked_by_hand(site: Site) -> str:
    site.layout.model("loras", "other.bin").hardlink_to(site.layout.model("loras", "m0.bin"))
    return "it has 2 names, of which 1 are sealed"


def used_through_a_linked_folder(site: Site) -> str:
    (site.layout.models / "lora").symlink_to("loras", target_is_directory=True)
    site.use("pod-2", "lora/m0.bin")
    return "a job of pod-2 uses it"


def without_a_source(site: Site) -> str:
    path = site.layout.seal("loras", "m0.bin")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repo": None, "file": None}))
    return "nothing says where it comes from"


def without_a_sha256(site: Site) -> str:
    path = site.layout.seal("loras", "m0.bin")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": None}))
    return "nothing says where it comes from"


@pytest.mark.parametrize(
    "keep",
    [
        by_hand,
        replaced_by_hand,
        used,
        used_in_any_folder,
        linked_to,
        linked_by_hand,
        used_through_a_linked_folder,
        without_a_source,
        without_a_sha256,
    ],
)
def test_what_is_never_removed(site: Site, keep: Callable[[Site], str]) -> None:
    site.fetch(0)
    site.room().begin()
    why = keep(site)

    assert site.room().make(10 * SIZE, site.never) == 0

    assert site.layout.model("loras", "m0.bin").exists()
    found = site.contents().get("loras/m0.bin")
    assert (found.kept if found else "") == why


def test_what_people_name_stays(site: Site) -> None:
    site.fetch(0, 1, 2)
    pins = EvictionPins(
        LeasedTitles([("loras/m0.bin", "models.toml names it")]), lambda title: "w.json names it" if "m1" in title else None
    )

    assert site.room(pins=pins).make(10 * SIZE, site.never) == SIZE

    assert site.there() == {0, 1}
    assert [site.contents(pins=pins)[f"loras/m{number}.bin"].kept for number in (0, 1)] == [
        "models.toml names it",
        "w.json names it",
    ]


def test_nothing_goes_while_nobody_knows_what_people_name(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.fetch(0)

    assert site.room(pins=EvictionPins(trouble="models.toml cannot be read")).make(1, site.never) == 0

    assert "models.toml cannot be read" in caplog.text


def test_what_was_used_or_fetched_a_short_time_ago_stays(site: Site) -> None:
    site.fetch(0)

    assert site.room(timing=LeaseTiming(grace_s=100, notice_s=0)).make(1, site.never) == 0
    assert str(site.contents(LeaseTiming(grace_s=100))["loras/m0.bin"].kept).startswith("used ")


def test_nothing_goes_before_the_other_workers_had_time_to_hear_of_it(site: Site) -> None:
    site.fetch(0)
    room = site.room(timing=LeaseTiming(grace_s=0, notice_s=100))

    assert room.make(1, site.never) == 0

    then = site.layout.leases_began.stat().st_mtime - 101
    os.utime(site.layout.leases_began, (then, then))
    assert room.make(1, site.never) == SIZE


@pytest.mark.parametrize("refusal", ["gone", "other", "silent"])
def test_a_model_that_could_not_be_had_again_stays(site: Site, refusal: str, caplog: pytest.LogCaptureFixture) -> None:
    site.fetch(0, 1)
    path = site.layout.seal("loras", "m0.bin")
    seal = json.loads(path.read_text())
    wrong = {"gone": {"file": "no.bin"}, "other": {"file": "m3.bin"}, "silent": {"repo": None, "file": "http://127.0.0.1:9/x"}}
    path.write_text(json.dumps(seal | wrong[refusal]))

    assert site.room().make(10 * SIZE, site.never) == SIZE

    assert site.there() == {0}
    assert "loras/m0.bin is kept, because it could not be downloaded again" in caplog.text


# --- one content, two names ---------------------------------------------------------------------


def test_two_names_of_one_content_go_together_and_count_once(site: Site) -> None:
    site.fetch(0)
    assert site.store().ensure(spec(0, "twin.bin")).how in {"adopted", "downloaded"}
    site.layout.model("loras", "twin.bin").unlink()
    site.layout.model("loras", "twin.bin").hardlink_to(site.layout.model("loras", "m0.bin"))
    site.layout.seal("loras", "twin.bin").write_bytes(site.layout.seal("loras", "m0.bin").read_bytes())
    assert survey_for_eviction(site.layout, EvictionPins(), NOW).used_bytes == SIZE

    assert site.room().make(10 * SIZE, site.never) == SIZE

    assert site.there() == set()
    assert not site.layout.model("loras", "twin.bin").exists()
    assert all(tombstone_of(site.layout, "loras", name) for name in ("m0.bin", "twin.bin"))


def test_a_use_of_one_name_keeps_the_other(site: Site) -> None:
    twin = site.layout.model("loras", "twin.bin")
    site.fetch(0)
    twin.hardlink_to(site.layout.model("loras", "m0.bin"))
    site.layout.seal("loras", "twin.bin").write_bytes(site.layout.seal("loras", "m0.bin").read_bytes())
    site.room().begin()
    site.use("pod-2", "loras/twin.bin")

    assert site.room().make(1, site.never) == 0


# --- the order ----------------------------------------------------------------------------------


def ended(leases: Leases) -> None:
    """Have a worker leave, and say its last word."""
    leases.stop()
    if leases._thread:
        leases._thread.join(60)


def some(title: str, size: int) -> SealedContent:
    seal = Seal(size=size, mtime=1, sha256="0" * 64)
    return SealedContent((ContentName(title, Path(title), seal),), size, (size, 1, 1, 1), 100.0, 1.0)


@pytest.mark.parametrize(
    ("sizes", "needed", "gone"),
    [
        ([5, 5, 5], 5, [5]),
        ([1, 9], 8, [9]),
        ([1, 2, 9], 10, [1, 9]),
        ([3, 3], 100, [3, 3]),
        ([3], 0, []),
    ],
)
def test_no_more_goes_than_is_needed(sizes: list[int], needed: int, gone: list[int]) -> None:
    assert [
        found.size_bytes for found in chosen_for_removal([some(f"a/{at}", size) for at, size in enumerate(sizes)], needed)
    ] == gone


def test_a_model_that_many_jobs_use_outlasts_one_that_was_used_last(site: Site) -> None:
    site.fetch(0, 1)
    site.room().begin()
    clock = [0.0]
    leases = Leases(site.layout, "pod-2", timing=NOW, clock=lambda: clock[0])
    for name in ("m0", "m0", "m0", "m1"):
        with leases.job() as use:
            use.note([f"loras/{name}.bin"])
        leases.publish()
        clock[0] += 60
    ended(leases)

    assert list(site.contents()) == ["loras/m1.bin", "loras/m0.bin"]


def test_the_uses_of_workers_that_are_gone_are_kept_in_one_file(site: Site) -> None:
    site.fetch(0, 1)
    site.room().begin()
    timing = LeaseTiming(grace_s=0, merge_s=1000)
    for pod in ("pod-2", "pod-3"):
        ended(site.use(pod, "loras/m0.bin"))
        site.age(pod, 2000)
    merge_old(site.layout, timing)

    assert [lease.by for lease in read_leases(site.layout)] == ["all"]
    found = site.contents(timing)["loras/m0.bin"]
    assert found.kept is None
    assert found.value > site.contents(timing)["loras/m1.bin"].value


# --- leases -------------------------------------------------------------------------------------


def test_a_job_on_the_models_of_the_last_one_writes_nothing(site: Site) -> None:
    site.room().begin()
    leases = Leases(site.layout, "pod-1")
    with leases.job() as use:
        assert not use.note(["loras/m0.bin"])
        use.publish()
    path = site.layout.leases / "pod-1.json"
    before = path.stat()
    with mock.patch("worker.store.leases.write_atomically", side_effect=AssertionError), leases.job() as use:
        assert use.note(["loras/m0.bin"])
    assert path.stat() == before
    with leases.job() as use:
        assert not use.note(["loras/m1.bin"])
    leases.stop()


def test_nothing_is_written_while_nobody_removes_anything(site: Site) -> None:
    leases = Leases(site.layout, "pod-1")
    with leases.job() as use:
        assert not use.note(["loras/m0.bin"])  # nobody has looked yet
        use.publish()
        assert use.note(["loras/m1.bin"])
    leases.stop()
    assert not site.layout.state.exists()


def test_a_worker_that_stood_still_believes_nothing(site: Site) -> None:
    site.room().begin()
    leases = site.use("pod-1", "loras/m0.bin")
    leases.forget()
    with leases.job() as use:
        assert not use.note(["loras/m0.bin"])
    leases.stop()


def test_the_lease_of_a_dead_worker_ends(site: Site) -> None:
    site.fetch(0)
    site.room().begin()
    site.use("pod-2", "loras/m0.bin")
    assert site.room().make(1, site.never) == 0
    site.age("pod-2", NOW.lease_s + 2)

    assert site.room().make(1, site.never) == SIZE


def test_clocks_that_are_off_by_hours_change_nothing(site: Site) -> None:
    site.fetch(0, 1)
    site.room().begin()
    with mock.patch.object(time, "time", return_value=time.time() - 30 * 3600):
        site.use("pod-2", "loras/m0.bin")
    with mock.patch.object(time, "time", return_value=time.time() + 30 * 3600):
        assert site.room().make(10 * SIZE, site.never) == SIZE
    assert site.there() == {0}


def test_a_worker_that_starts_again_keeps_what_it_said_before(site: Site) -> None:
    site.fetch(0)
    site.room().begin()
    site.use("pod-2", "loras/m0.bin")
    site.use("pod-2", "loras/m1.bin")

    assert site.room().make(1, site.never) == 0  # it may live on in another container of that name


# --- races --------------------------------------------------------------------------------------


class Meanwhile(DownloadHooks):
    """Does something at one of the steps, once."""

    def __init__(self, step: str, act: Callable[[], object]) -> None:
        self._step = step
        self._act = act

    def at(self, step: str) -> None:
        """Do it."""
        if step == self._step:
            self._step = ""
            self._act()


@pytest.mark.parametrize("step", ["marked", "locked", "half_moved", "moved"])
def test_a_job_that_begins_meanwhile_keeps_its_model(site: Site, step: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site.fetch(0)
    before = site.layout.model("loras", "m0.bin").stat()
    hooks = Meanwhile(step, lambda: site.use("pod-2", "loras/m0.bin"))

    assert site.room(hooks=hooks).make(1, site.never) == 0

    after = site.layout.model("loras", "m0.bin").stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (before.st_ino, before.st_mtime_ns, 1)
    assert site.store().ensure(spec(0)).how == "ready"
    assert "stays: a job of pod-2 uses it" in caplog.text


def test_a_job_that_begins_meanwhile_never_misses_a_model_that_stays(site: Site) -> None:
    site.fetch(0)
    path, seen = site.layout.model("loras", "m0.bin"), list[bool]()

    def work() -> None:
        with Leases(site.layout, "pod-2", timing=NOW).job() as use:
            use.note(["loras/m0.bin"])
            use.publish()
            seen.append(path.exists())

    thread = threading.Thread(target=work)

    def begin() -> None:
        assert not path.exists()
        thread.start()
        while "pod-2" not in {lease.by for lease in read_leases(site.layout)}:
            assert thread.is_alive()
        thread.join(0.5)  # it must not end before the removal has

    assert site.room(hooks=Meanwhile("moved", begin)).make(1, site.never) == 0
    thread.join(60)
    assert seen == [True]


def test_a_removal_that_was_killed_delays_no_job(site: Site) -> None:
    site.room().begin()
    mark = site.layout.removal_mark("pod-1")
    mark.touch()
    os.utime(mark, (1, 1))
    with mock.patch("worker.store.leases.time.sleep", side_effect=AssertionError):
        wait_for_removals(site.layout)


def test_a_job_of_this_very_worker_need_not_have_written_it_down(site: Site) -> None:
    site.fetch(0)
    leases = Leases(site.layout, "pod-1", timing=NOW)
    use = site.jobs.enter_context(leases.job())
    hooks = Meanwhile("moved", lambda: use.note(["loras/m0.bin"]))

    assert site.room(leases=leases, hooks=hooks).make(1, site.never) == 0
    assert site.there() == {0}
    leases.stop()


def test_a_file_that_a_person_puts_there_meanwhile_stays(site: Site) -> None:
    site.fetch(0)
    path = site.layout.model("loras", "m0.bin")

    def replace_it() -> None:
        path.unlink()
        path.write_bytes(b"mine")

    assert site.room(hooks=Meanwhile("locked", replace_it)).make(1, site.never) == 0
    assert path.read_bytes() == b"mine"
    assert site.litter() == []


def test_a_content_that_is_being_fetched_is_left_alone(site: Site) -> None:
    site.fetch(0, 1)
    key = hashlib.sha256(content(0)).hexdigest()
    with Locks(site.layout, "pod-2", QUICK).hold(key, published=lambda: False, cancel=site.never):
        assert site.room().make(10 * SIZE, site.never) == SIZE
    assert site.there() == {0}


def test_two_workers_that_need_room_take_turns(site: Site) -> None:
    site.fetch(0, 1, 2, 3)
    rooms = [site.room(keep=3, name=f"pod-{at}") for at in range(4)]
    threads = [threading.Thread(target=room.fit, args=(0, site.never)) for room in rooms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(site.there()) == 3


def test_a_removed_file_that_is_still_open_is_counted_once(site: Site) -> None:
    site.fetch(0, 1, 2)
    room = site.room()
    room.limits = EvictionLimits(free_bytes=10 * SIZE)
    with (
        mock.patch("worker.store.room.free_bytes", return_value=9 * SIZE),
        mock.patch("worker.store.eviction.free_bytes", return_value=9 * SIZE),
    ):
        room.fit(0, site.never)
        room.fit(0, site.never)

    assert len(site.there()) == 2


# --- killed, and full -----------------------------------------------------------------------------

STEPS = ["marked", "locked", "half_moved", "moved", "unlinked", "buried"]


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_that_is_killed_in_the_middle_loses_nothing_of_anybodys(site: Site, step: str) -> None:
    site.fetch(0, 1)
    mine = site.layout.model("loras", "mine.bin")
    mine.write_bytes(b"mine")
    child = os.fork()
    if child == 0:
        try:
            site.room(hooks=Meanwhile(step, lambda: os.kill(os.getpid(), signal.SIGKILL))).make(1, site.never)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    for number in (0, 1):
        assert site.store().ensure(spec(number)).how in {"ready", "downloaded", "adopted"}
    site.much_later()
    room, until_s = site.room(), time.monotonic() + 60
    while site.there() and time.monotonic() < until_s:  # the dead one's lock is succeeded by and by
        room.make(10 * SIZE, site.never)
    assert site.there() == set()
    assert mine.read_bytes() == b"mine"
    assert site.litter() == []


def test_what_a_killed_worker_left_aside_does_not_come_back_without_its_seal(site: Site) -> None:
    site.fetch(0, 1)
    child = os.fork()
    if child == 0:
        try:
            site.room(hooks=Meanwhile("moved", lambda: os.kill(os.getpid(), signal.SIGKILL))).make(1, site.never)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (gone,) = {0, 1} - site.there()
    site.fetch(gone)  # another worker wants it meanwhile, and it is removed once more
    room, until_s = site.room(), time.monotonic() + 60
    while site.there() and time.monotonic() < until_s:
        room.make(10 * SIZE, site.never)
    site.much_later()
    room.make(1, site.never)

    assert site.there() == set()
    assert site.litter() == []


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_volume_that_takes_not_one_byte_is_freed(site: Site) -> None:
    site.fetch(0)
    site.room().begin()
    with (
        mock.patch("worker.base.files.write_at", full),
        mock.patch("filelock._soft_rw._sync._atomic_write_bytes", full, create=True),
    ):
        assert site.room().make(1, site.never) == SIZE

    assert site.there() == set()
    tombstone = tombstone_of(site.layout, "loras", "m0.bin")
    assert tombstone
    assert (tombstone.by, tombstone.seal.file) == (None, "m0.bin")


def test_a_lease_that_a_full_volume_refuses_has_room_made_for_it(site: Site) -> None:
    site.fetch(0)
    room = site.room()
    room.begin()
    leases = Leases(site.layout, "pod-1", timing=NOW)
    room = site.room(leases=leases)
    refused = [1]

    def refuse_once(*args: Any, **options: Any) -> None:
        if refused:
            refused.pop()
            full()
        write_atomically(*args, **options)

    with mock.patch("worker.store.leases.write_atomically", refuse_once), leases.job() as use:
        use.note(["loras/m1.bin"])
        use.publish()
        assert use.note(["loras/m1.bin"])
    leases.stop()
    assert site.there() == set()


def test_a_quota_that_the_file_system_does_not_show(
    stand_in: StandIn, moosefs: MooseFS, request: pytest.FixtureRequest
) -> None:
    site = Site(stand_in.endpoint, moosefs.mounts[0] / request.node.name)
    site.layout.root.mkdir()
    site.fetch(0, 1, 2)
    moosefs.set_quota(site.layout.root, 3 * SIZE + SIZE // 2)
    with pytest.raises(VolumeFull):
        site.fetch(3)

    site.fetch(3, 4, room=site.room())

    assert {3, 4} < site.there()
    assert len(site.there()) == 3


def test_a_volume_with_two_hosts(stand_in: StandIn, moosefs: MooseFS, request: pytest.FixtureRequest) -> None:
    here, there = (Site(stand_in.endpoint, mount / request.node.name) for mount in moosefs.mounts[:2])
    here.fetch(0, 1, 2)
    here.room().begin()
    there.use("pod-2", "loras/m0.bin")
    hooks = Meanwhile("moved", lambda: there.use("pod-3", "loras/m1.bin"))

    assert here.room(hooks=hooks).make(10 * SIZE, here.never) == SIZE

    assert there.there() == {0, 1}
    assert there.store().ensure(spec(2)).how == "downloaded"


# --- what people name ---------------------------------------------------------------------------


def pins_of(root: Path, **lists: Any) -> EvictionPins:
    return read_pins(root, Sources.gather(volume_manifest=root / "models.toml", **lists))


def keep_workflow(root: Path, name: str, text: str | bytes) -> None:
    path = root / "workflows" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_manifests_pin_their_models(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[[models]]\nfolder="vae"\nsource="hf://org/repo/a.safetensors"\n')
    pins = pins_of(tmp_path, models="loras=hf://org/repo/b.safetensors")
    named = [pins.why(title) for title in ("vae/a.safetensors", "loras/b.safetensors", "loras/a.safetensors")]
    assert named == ["a manifest names it", "a manifest names it", None]


def test_while_a_manifest_is_wrong_everything_is_pinned(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("[[models]\n")
    assert "models.toml" in str(pins_of(tmp_path).why("vae/a.safetensors"))


@pytest.mark.parametrize(
    "text",
    [
        '{"1": {"class_type": "VAELoader", "inputs": {"vae_name": "flux/my model.safetensors"}}}',
        '{"1": {"class_type": "VAELoader", "inputs": {"vae_name": "flux\\\\my model.safetensors"}}}',
        '{"1": {"class_type": "X", "inputs": {"text": "a cat <lora:my model:0.8>"}}}',
        '{"1": {"class_type": "X", "inputs": {"text": "embedding:my model, a cat"}}}',
        '{"nodes": [{"widgets_values": ["my model.safetensors"]}], "links": []}',
        '{"broken": "my model.safetensors"',
        '{"input": {"workflow": "{\\"1\\": {\\"x\\": \\"my\\u0020model.safetensors\\"}}"}}',
    ],
)
def test_a_kept_workflow_pins_what_is_written_in_it(tmp_path: Path, text: str) -> None:
    keep_workflow(tmp_path, "sub/w.json", text)
    pins = pins_of(tmp_path)
    assert pins.why("vae/flux/my model.safetensors") == "workflows/sub/w.json names it"
    assert pins.why("vae/flux/my model-2.safetensors") is None


def test_accents_are_one_name_in_either_form(tmp_path: Path) -> None:
    keep_workflow(tmp_path, "w.json", json.dumps({"1": {"class_type": "X", "inputs": {"a": "caf\u0065\u0301.safetensors"}}}))
    assert pins_of(tmp_path).why("loras/caf\u00e9.safetensors")


def test_a_workflow_that_cannot_be_read_pins_everything(tmp_path: Path) -> None:
    keep_workflow(tmp_path, "w.json", "{}")
    with mock.patch("worker.pins.all_workflows", side_effect=VolumeFailed(tmp_path, "no")):
        assert pins_of(tmp_path).why("loras/any.safetensors")
