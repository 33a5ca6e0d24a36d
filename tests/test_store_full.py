"""The volume is full, really, at each step of a download and of a removal: nothing is damaged, and room is all it takes.

On a disk of a few MB, where even a folder takes space, and on a network volume with a quota. What fills it is a person's file,
which no worker may touch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from typing import TYPE_CHECKING

import pytest

from devkit.fleet import STEPS
from devkit.small_disk import available, fill, small_disk
from tests.test_eviction import NOW, QUICK, TUNING, Site, content, spec, stand_in
from worker.base.files import free_bytes
from worker.errors import VolumeFull
from worker.store.download import DownloadHooks
from worker.store.eviction import EvictionLimits
from worker.store.leases import Leases, read_leases
from worker.store.store import Store
from worker.store.tombstones import tombstone_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.hub import Hub
    from devkit.moosefs import MooseFS
    from worker.store.room import Room

__all__ = ["stand_in"]

QUOTA_BYTES = 4_000_000
PUBLISHED = {"replaced", "seal_half_written", "sealed"}
REMOVAL = ["locked", "half_moved", "marked", "moved", "unlinked", "buried"]
OTHERS = (1, 2, 3)


class Person:
    """Has a file on the volume, which may take all of its space."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.look()

    def look(self) -> None:
        """Remember the file as it is."""
        self._seen = self._path.stat()

    def fill(self) -> None:
        """Take what is free."""
        fill(self._path)
        self.look()

    def make_room(self) -> None:
        """Give the space back."""
        self.check()
        os.truncate(self._path, 4)
        self.look()

    def check(self) -> None:
        """The file is as the person left it."""
        now = self._path.stat()
        assert (now.st_ino, now.st_size, now.st_mtime_ns) == (self._seen.st_ino, self._seen.st_size, self._seen.st_mtime_ns)
        assert self._path.read_bytes().startswith(b"mine")


class Filling(DownloadHooks):
    """Fills the volume when a step is reached, once or each time, and then may kill the worker."""

    def __init__(self, person: Person, step: str, *, each: bool = False, kill: bool = False) -> None:
        self._person, self._step, self._each, self._kill = person, step, each, kill
        self.reached = 0

    def at(self, step: str) -> None:
        """Do it."""
        if step == self._step and (self._each or not self.reached):
            self.reached += 1
            self._person.fill()
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=["disk", "quota"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield a volume that can be filled."""
    if request.param == "disk":
        if reason := available():
            pytest.skip(reason)
        with small_disk(tmp_path) as disk:
            yield disk / "volume"
        return
    moosefs: MooseFS = request.getfixturevalue("moosefs")
    volume = moosefs.mounts[0] / request.node.name
    volume.mkdir()
    moosefs.set_quota(volume, QUOTA_BYTES)
    yield volume


@pytest.fixture
def site(stand_in: Hub, root: Path) -> Site:
    """A volume with some sealed models on it, which workers may remove."""
    made = Site(stand_in.endpoint, root)
    made.room().begin()
    made.fetch(*OTHERS)
    return made


@pytest.fixture
def person(site: Site) -> Person:
    path = site.layout.model("loras", "mine.bin")
    path.write_bytes(b"mine")
    return Person(path)


def store(site: Site, hooks: DownloadHooks, room: Room | None = None) -> Store:
    return Store(site.layout, site.hub, "pod-1", tuning=TUNING, timing=QUICK, hooks=hooks, room=room)


def attempt(site: Site, store: Store) -> str:
    """Have a job fetch a model: how it got it, or the code of its error."""
    path = site.layout.model("loras", "m0.bin")
    try:
        told: str = store.ensure(spec(0)).how
    except VolumeFull as exc:
        told = exc.code
    assert path.read_bytes() == content(0) if path.exists() else told == "volume_full"
    return told


def check_undamaged(site: Site, person: Person) -> None:
    """Each model is there and right, or was removed. Nobody's file was touched, and nothing is left over."""
    person.check()
    for number in OTHERS:
        path = site.layout.model("loras", f"m{number}.bin")
        assert not path.exists() or path.read_bytes() == content(number)
    assert site.litter() == []


def check_works_again(site: Site, person: Person) -> None:
    """Once there is room, the next job gets its models, and nothing is left over."""
    person.make_room()
    site.fetch(0, *OTHERS)
    for number in (0, *OTHERS):
        assert site.layout.model("loras", f"m{number}.bin").read_bytes() == content(number)
        assert site.store().ready("loras", f"m{number}.bin")
    left = [path for path in site.layout.state.rglob("*") if path.suffix in {".part", ".journal", ".pending"}]
    assert left == []
    assert list((site.layout.state / "pending").glob("*")) == []


def killed(work: Callable[[], object]) -> None:
    """Do it in a process that is killed meanwhile."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# --- a volume on which nothing is removed -------------------------------------------------------


@pytest.mark.parametrize("step", ["", *STEPS])
def test_full_at_a_step_of_a_download(site: Site, person: Person, step: str) -> None:
    hooks = Filling(person, step)
    if not step:
        person.fill()

    told = attempt(site, store(site, hooks))

    assert hooks.reached == bool(step)
    assert told in ({"downloaded"} if step in PUBLISHED else {"volume_full", "downloaded"})
    assert site.there() >= set(OTHERS)
    check_undamaged(site, person)
    check_works_again(site, person)


@pytest.mark.parametrize("step", STEPS)
def test_full_and_killed_at_a_step_of_a_download(site: Site, person: Person, step: str) -> None:
    killed(lambda: attempt(site, store(site, Filling(person, step, kill=True))))
    person.look()

    assert attempt(site, store(site, DownloadHooks())) in {"volume_full", "ready", "adopted", "downloaded"}

    check_undamaged(site, person)
    check_works_again(site, person)


# --- a volume that makes room -------------------------------------------------------------------


@pytest.mark.parametrize("step", ["", *STEPS])
def test_full_at_a_step_of_a_download_that_may_make_room(site: Site, person: Person, step: str) -> None:
    hooks = Filling(person, step)
    if not step:
        person.fill()

    assert attempt(site, store(site, hooks, site.room())) == "downloaded"

    assert hooks.reached == bool(step)
    check_undamaged(site, person)
    check_works_again(site, person)


@pytest.mark.parametrize("step", REMOVAL)
def test_full_at_a_step_of_each_removal(site: Site, person: Person, step: str) -> None:
    person.fill()
    hooks = Filling(person, step, each=True)

    assert attempt(site, store(site, DownloadHooks(), site.room(hooks=hooks))) in {"volume_full", "downloaded"}

    assert hooks.reached
    check_undamaged(site, person)
    for number in set(OTHERS) - site.there():
        assert tombstone_of(site.layout, "loras", f"m{number}.bin") or step == "unlinked"
    check_works_again(site, person)


@pytest.mark.parametrize("step", REMOVAL)
def test_full_and_killed_at_a_step_of_a_removal(site: Site, person: Person, step: str) -> None:
    person.fill()
    killed(lambda: attempt(site, store(site, DownloadHooks(), site.room(hooks=Filling(person, step, kill=True)))))
    person.look()
    site.much_later()

    assert attempt(site, store(site, DownloadHooks(), site.room())) == "downloaded"

    check_undamaged(site, person)
    check_works_again(site, person)


# --- leases -------------------------------------------------------------------------------------


def test_a_lease_that_cannot_be_written_keeps_what_the_last_one_said(site: Site, person: Person) -> None:
    leases = Leases(site.layout, "pod-1", timing=NOW)
    with leases.job() as first:
        first.note(["loras/m1.bin"])
        first.publish()
        site.age("pod-1", NOW.lease_s + 2)
        person.fill()
        with leases.job() as second:
            second.note(["loras/m2.bin"])
            second.publish()
            assert site.room(name="pod-2").make(10 * len(content(0)), site.never) == 2 * len(content(0))
            assert site.there() == {1}
            check_undamaged(site, person)
            person.make_room()
            second.publish()
            assert second.note(["loras/m2.bin"])
    leases.stop()
    assert [lease.by for lease in read_leases(site.layout)] == ["pod-1"]


def test_a_lease_has_room_made_for_it(site: Site, person: Person) -> None:
    leases = Leases(site.layout, "pod-1", timing=NOW)
    site.room(leases=leases)
    person.fill()
    with leases.job() as use:
        use.note(["loras/m1.bin"])
        use.publish()
        assert use.note(["loras/m1.bin"])
    leases.stop()
    assert 1 in site.there()
    assert len(site.there()) == 2
    check_undamaged(site, person)
    check_works_again(site, person)


# --- space that comes later ---------------------------------------------------------------------


@pytest.mark.parametrize("root", ["disk"], indirect=True)
def test_a_removed_model_that_comfyui_has_mapped_is_counted_once(site: Site) -> None:
    before = free_bytes(site.layout.root)
    assert before
    room = site.room()
    room.limits = EvictionLimits(free_bytes=before + len(content(0)) // 2)
    with contextlib.ExitStack() as comfyui:
        for number in OTHERS:
            stream = comfyui.enter_context(site.layout.model("loras", f"m{number}.bin").open("rb"))
            comfyui.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        room.fit(0, site.never)
        room.fit(0, site.never)
        assert len(site.there()) == 2
        assert (free_bytes(site.layout.root) or 0) <= before
    assert (free_bytes(site.layout.root) or 0) > before
