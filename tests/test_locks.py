"""One downloader in the fleet: overlap is impossible while the lock works, and nobody waits for ever when it does not."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from filelock import SoftReadWriteLock

from worker.base.progress import Meter, ModelProgress
from worker.base.text import size_text
from worker.errors import EnsureCancelled
from worker.store.layout import Layout
from worker.store.locks import LockHolder, LockResult, Locks, LockTiming
from worker.store.store import PublishedOrCancelled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devkit.moosefs import MooseFS

PROJECT = Path(__file__).resolve().parents[1]
# A second stands for the default's thirty.
QUICK = LockTiming(
    heartbeat_s=0.3,
    stale_s=1.5,
    quiet_s=0.3,
    look_s=0.05,
    poll_s=0.05,
    attempt_s=0.1,
    patience_s=60,
    lone_patience_s=0.3,
    report_every_s=0,
    trouble_s=0.5,
)
KEY = "content"
MIB = 1024 * 1024

# Each contender takes the lock, proves that it is alone, and says so. Two independent detectors of an overlap: a folder that
# only one can make, and a file that only one may write between two reads of it.
CONTENDER = """
import json, os, sys, threading
from pathlib import Path
from worker.store.layout import Layout
from worker.store.locks import Locks, LockTiming

root, name, rounds, timing = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
locks = Locks(Layout(root), name, LockTiming(**timing))
alone, record = root / "alone", root / "record"
print("ready", flush=True)
sys.stdin.readline()
for _ in range(rounds):
    with locks.hold("content", published=lambda: False, cancel=threading.Event()) as hold:
        assert hold.state == "held", hold.state
        alone.mkdir()
        record.write_text(name)
        fd = os.open(record, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        assert record.read_text() == name
        alone.rmdir()
        print("entered", flush=True)
        if sys.argv[5:] == ["stay"]:
            sys.stdin.readline()
print("done", flush=True)
"""


def timing_json(timing: LockTiming) -> str:
    return json.dumps({name: getattr(timing, name) for name in LockTiming.__dataclass_fields__})


@contextlib.contextmanager
def contender(root: Path, name: str, rounds: int = 1, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CONTENDER, str(root), name, str(rounds), timing_json(QUICK), *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as process:
        assert said(process) == "ready"
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def hold_now(root: Path, **options: Any) -> str:
    with Locks(Layout(root), "me", options.pop("timing", QUICK)).hold(
        KEY, published=options.pop("published", lambda: False), cancel=options.pop("cancel", threading.Event()), **options
    ) as hold:
        return hold.state


@pytest.fixture(params=["ext4", "moosefs"])
def roots(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Two ways to the same folder: the same path twice, or two hosts' mounts of one volume."""
    if request.param == "ext4":
        return [tmp_path, tmp_path]
    volume: MooseFS = request.getfixturevalue("moosefs")
    name = request.node.name.replace("[", "-").strip("]")
    (volume.mounts[0] / name).mkdir()
    return [mount / name for mount in volume.mounts[:2]]


def test_no_two_processes_are_ever_inside(roots: list[Path]) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(contender(roots[n % 2], f"worker{n}", 3)) for n in range(4)]
        for process in processes:
            tell(process)
        for process in processes:
            assert [said(process) for _ in range(4)] == ["entered"] * 3 + ["done"]


def test_a_killed_holder_is_succeeded(roots: list[Path]) -> None:
    with contender(roots[0], "victim", 1, "stay") as victim:
        tell(victim)
        assert said(victim) == "entered"
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(30)
        assert hold_now(roots[1]) == "held"


def test_a_living_holder_is_not(roots: list[Path]) -> None:
    with contender(roots[0], "holder", 1, "stay") as holder:
        tell(holder)
        assert said(holder) == "entered"
        waits: list[ModelProgress] = []
        entered: list[str] = []
        other = threading.Thread(target=lambda: entered.append(hold_now(roots[1], on_wait=waits.append)))
        other.start()
        other.join(2 * QUICK.stale_s)
        assert not entered
        assert waits
        tell(holder)
        assert said(holder) == "done"
        other.join(30)
        assert entered == ["held"]


def test_who_waits_sees_it_published(tmp_path: Path) -> None:
    with contender(tmp_path, "holder", 1, "stay") as holder:
        tell(holder)
        assert said(holder) == "entered"
        answers = iter([False, False, True])
        assert hold_now(tmp_path, published=lambda: next(answers)) == "published"


def test_who_waits_sees_who_downloads_what_and_how_far_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    seen: list[ModelProgress] = []
    mine, theirs = Locks(Layout(tmp_path), "pod-1", QUICK), Locks(Layout(tmp_path), "pod-2", QUICK)
    with mine.hold(KEY, published=lambda: False, cancel=threading.Event(), name="vae/ae.safetensors") as hold:
        hold.report(ModelProgress("downloading", 3_100_000_000, 11_900_000_000, 240_000_000))
        with theirs.hold(KEY, published=lambda: len(seen) > 1, cancel=threading.Event(), on_wait=seen.append) as other:
            assert other.state == "published"
    assert str(seen[-1]) == "worker pod-1: 3.1 of 11.9 GB, 240.0 MB/s"
    said = "waiting for vae/ae.safetensors, which another worker downloads (worker pod-1: 3.1 of 11.9 GB, 240.0 MB/s)"
    assert caplog.text.count(said) == 1


def test_the_report_of_an_older_worker_is_understood(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.locks.mkdir(parents=True)
    old = {"by": "x", "phase": "checking", "done_bytes": 1, "total_bytes": 2, "bytes_per_s": 0.5, "beat": 3}
    layout.lock_progress(KEY).write_bytes(json.dumps(old).encode())
    assert Locks(layout, "me").holder(KEY) == LockHolder("x", "checking", 1, 2, 0.5, 3, "")


def test_a_report_is_written_at_most_as_often_as_agreed(tmp_path: Path) -> None:
    locks = Locks(Layout(tmp_path), "pod-1", LockTiming(report_every_s=60))
    with locks.hold(KEY, published=lambda: False, cancel=threading.Event(), name="vae/ae.safetensors") as hold:
        for done in range(100):
            hold.report(ModelProgress("downloading", done, 100))
    assert locks.holder(KEY) == LockHolder("pod-1", "downloading", 0, 100, 0.0, 1, "vae/ae.safetensors")


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"by": "x"}', b"\xff\xfe", b'{"other": 1}'])
def test_a_report_that_cannot_be_read_is_nobody(tmp_path: Path, content: bytes) -> None:
    layout = Layout(tmp_path)
    layout.locks.mkdir(parents=True)
    layout.lock_progress(KEY).write_bytes(content)
    assert Locks(layout, "me").holder(KEY) is None


def test_a_cancelled_wait_ends(tmp_path: Path) -> None:
    cancel = threading.Event()
    with contender(tmp_path, "holder", 1, "stay") as holder:
        tell(holder)
        assert said(holder) == "entered"
        with pytest.raises(EnsureCancelled):
            hold_now(tmp_path, cancel=cancel, on_wait=lambda _: cancel.set())


def test_a_volume_that_hangs_in_the_lock_is_not_waited_for_and_the_lock_is_given_back(tmp_path: Path) -> None:
    """A read of what a dead host was writing can take two minutes. Who is cancelled meanwhile, or has the model, leaves."""
    cancel, hanging, go_on = (threading.Event() for _ in range(3))
    real = SoftReadWriteLock.acquire_write

    def hang(lock: SoftReadWriteLock, **options: Any) -> Any:
        hanging.set()
        assert go_on.wait(60)
        return real(lock, **options)

    locks = Locks(Layout(tmp_path), "w1", QUICK)

    def leave() -> None:
        hanging.wait(30)
        cancel.set()

    waiting = threading.Thread(target=leave)
    waiting.start()
    with mock.patch.object(SoftReadWriteLock, "acquire_write", hang), pytest.raises(EnsureCancelled):  # noqa: SIM117
        with locks.hold(KEY, published=lambda: False, cancel=cancel):
            pytest.fail("nobody has the lock")
    waiting.join()
    go_on.set()
    with Locks(Layout(tmp_path), "w2", QUICK).hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:
        assert hold.state == "held"


def test_a_holder_without_progress_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with contender(tmp_path, "stuck", 1, "stay") as stuck:
        tell(stuck)
        assert said(stuck) == "entered"
        impatient = LockTiming(**{**json.loads(timing_json(QUICK)), "patience_s": 0.5})
        assert hold_now(tmp_path, timing=impatient) == "unlocked"


def test_a_waiter_that_was_frozen_is_as_patient_as_before(tmp_path: Path) -> None:
    """By the system's clock the patience is over many times. By the waiter's own, which stood still, it is not."""
    impatient = LockTiming(**{**json.loads(timing_json(QUICK)), "patience_s": 0.01})
    looks = itertools.count()
    holder, waiter = Locks(Layout(tmp_path), "holder", QUICK), Locks(Layout(tmp_path), "frozen", impatient, clock=lambda: 0.0)
    with (
        holder.hold(KEY, published=lambda: False, cancel=threading.Event()),
        waiter.hold(KEY, published=lambda: next(looks) > 10, cancel=threading.Event()) as hold,
    ):
        assert hold.state == "published"


def test_a_holder_that_reports_the_same_again_and_again_lives_and_does_not_get_on(tmp_path: Path) -> None:
    """Its disk is stuck, and the thread that reports goes on."""
    impatient = LockTiming(**{**json.loads(timing_json(QUICK)), "patience_s": 0.5})
    holder = Locks(Layout(tmp_path), "stuck", QUICK)
    beats: set[int] = set()

    def reports_on_and_on() -> bool:
        hold.report(ModelProgress("downloading", 5, 100, float(len(beats))))
        found = holder.holder(KEY)
        assert found is not None
        beats.add(found.beat)
        return False

    with holder.hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:
        assert hold_now(tmp_path, timing=impatient, published=reports_on_and_on) == "unlocked"
    assert len(beats) > 1


@pytest.mark.parametrize("what", ["phase", "bytes"])
def test_a_holder_that_moves_is_waited_for_beyond_any_patience(tmp_path: Path, what: str) -> None:
    impatient = LockTiming(**{**json.loads(timing_json(QUICK)), "patience_s": 0.5})
    began = time.monotonic()
    with Locks(Layout(tmp_path), "mover", QUICK).hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:
        moves = itertools.count()

        def moves_until_published() -> bool:
            move = next(moves)
            hold.report(
                ModelProgress("downloading", move, 10**9)
                if what == "bytes"
                else ModelProgress("downloading" if move % 2 else "checking", 5, 10**9)
            )
            return time.monotonic() - began > 1.5

        assert hold_now(tmp_path, timing=impatient, published=moves_until_published) == "published"


def test_two_reporters_that_do_not_move_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    impatient = LockTiming(**{**json.loads(timing_json(QUICK)), "patience_s": 0.5})
    holder, other = (Locks(Layout(tmp_path), name, QUICK) for name in ("one", "other"))
    calls = itertools.count()
    with holder.hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:
        second = LockResult(Layout(tmp_path).lock_progress(KEY), "other", "", QUICK, "unlocked")

        def report_in_turn() -> bool:
            turn = next(calls) % 2
            (hold, second)[turn].report(ModelProgress("downloading", 5 + turn, 100))
            return False

        assert hold_now(tmp_path, timing=impatient, published=report_in_turn) == "unlocked"
    assert other.holder(KEY) is not None


def test_who_hears_from_the_holder_leaves_the_lock_alone(tmp_path: Path) -> None:
    tried: list[float] = []
    real = SoftReadWriteLock.acquire_write

    def counted(self: SoftReadWriteLock, *args: Any, **options: Any) -> Any:
        tried.append(time.monotonic())
        return real(self, *args, **options)

    heard = itertools.count()
    with Locks(Layout(tmp_path), "holder", QUICK).hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:

        def report() -> bool:
            hold.report(ModelProgress("downloading", next(heard), 10**9))
            return next(heard) > 100

        with mock.patch.object(SoftReadWriteLock, "acquire_write", counted):
            assert hold_now(tmp_path, published=report) == "published"
    assert len(tried) <= 2


def test_who_heard_that_the_holder_failed_is_next_at_once(tmp_path: Path) -> None:
    patient = LockTiming(**{**json.loads(timing_json(QUICK)), "quiet_s": 60.0})
    heard: list[ModelProgress] = []

    def fail_soon() -> None:
        with (
            contextlib.suppress(OSError),
            Locks(Layout(tmp_path), "holder", QUICK).hold(KEY, published=lambda: False, cancel=threading.Event()) as hold,
        ):
            inside.set()
            for done in itertools.count():
                hold.report(ModelProgress("downloading", done, 10**9))
                time.sleep(0.02)
                if len(heard) > 5:
                    raise OSError

    inside = threading.Event()
    failing = threading.Thread(target=fail_soon)
    failing.start()
    assert inside.wait(30)
    began_s = time.monotonic()
    assert hold_now(tmp_path, timing=patient, on_wait=heard.append) == "held"
    assert time.monotonic() - began_s < 30
    failing.join()


def test_waiting_costs_a_volume_little(moosefs: MooseFS) -> None:
    """By the counters of the waiting host's own mount; the default timings."""
    here, there = (Layout(mount / "waiting") for mount in moosefs.mounts[:2])
    here.model("checkpoints", "model.safetensors").parent.mkdir(parents=True)
    stop, heard, states = threading.Event(), threading.Semaphore(0), []

    def work(hold: LockResult) -> None:
        for done in itertools.count():
            if stop.wait(0.2):
                return
            hold.report(ModelProgress("downloading", done * MIB, 10**12))

    def wait() -> None:
        path = there.model("checkpoints", "model.safetensors")
        locks = Locks(there, "waiter", LockTiming(quiet_s=120))  # on a busy machine the holder may be late
        with (
            contextlib.suppress(EnsureCancelled),
            PublishedOrCancelled(stop, path, path.exists, LockTiming().look_s) as watch,
            locks.hold(KEY, published=lambda: False, cancel=watch, on_wait=lambda _: heard.release()) as hold,
        ):
            states.append(hold.state)

    with Locks(here, "holder").hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:
        threads = [threading.Thread(target=work, args=(hold,)), threading.Thread(target=wait)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            assert heard.acquire(timeout=60)
        before, began_s = operations(moosefs.mounts[1]), time.monotonic()
        time.sleep(10)  # long against a look that a busy machine has moved into it
        rate = (operations(moosefs.mounts[1]) - before) / (time.monotonic() - began_s)
        stop.set()
        for thread in threads:
            thread.join()
    assert states == []
    assert rate <= 5


def operations(mount: Path) -> int:
    """How many operations this mount has asked of its volume."""
    lines = (mount / ".stats").read_text().splitlines()
    return next(int(line.partition(": ")[2]) for line in lines if line.startswith("fuse_ops: "))


def test_locks_removed_under_a_holder_let_another_in_and_hurt_nobody(
    roots: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    mine = Locks(Layout(roots[0]), "mine", QUICK)
    with mine.hold(KEY, published=lambda: False, cancel=threading.Event()) as hold:
        shutil.rmtree(Layout(roots[0]).locks)
        assert hold_now(roots[1]) == "held"
        hold.report(ModelProgress("downloading", 1, 2))
        until = time.monotonic() + 30
        while "lost the lock" not in caplog.text:
            assert time.monotonic() < until, "the holder was never told"
            threading.Event().wait(0.05)


def test_a_file_system_without_hard_links_costs_a_moment_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch("os.link", side_effect=OSError(errno.EPERM, "Operation not permitted")):
        assert hold_now(tmp_path) == "unlocked"
    assert "this file system has no locks" in caplog.text


def test_a_volume_that_cannot_be_written_is_not_waited_for(tmp_path: Path) -> None:
    never = LockTiming(**{**json.loads(timing_json(QUICK)), "patience_s": 1e9, "lone_patience_s": 1e9})
    with mock.patch("os.open", side_effect=OSError(errno.EROFS, "Read-only file system")):
        assert hold_now(tmp_path, timing=never) == "unlocked"


def test_trouble_that_passes_is_waited_out(tmp_path: Path) -> None:
    real, failures = os.link, iter([OSError(errno.EIO, "Input/output error")] * 2)

    def link(*args: Any, **options: Any) -> None:
        if failure := next(failures, None):
            raise failure
        real(*args, **options)

    with mock.patch("os.link", link):
        assert hold_now(tmp_path) == "held"


def test_progress_reads_as_a_person_would_say_it() -> None:
    assert str(ModelProgress("downloading", 1_500, 2_500_000, 0)) == "0.0 of 2.5 MB"
    assert str(ModelProgress("checking", 5, 10)) == "5 of 10 B, checking"
    assert str(ModelProgress("waiting")) == "waiting"
    assert [size_text(size) for size in (0, 999, 1000, 11_900_000_000)] == ["0 B", "999 B", "1.0 kB", "11.9 GB"]


def test_a_rate_is_smooth_and_never_negative() -> None:
    meter = Meter(0.0)
    assert meter.rate(1.0, 100) == 100
    assert 100 < meter.rate(2.0, 400) < 300
    assert meter.rate(2.0, 400) == meter.rate(2.0, 999)
    meter.rate(100.0, 0)
    assert meter.rate(200.0, 0) == 0
