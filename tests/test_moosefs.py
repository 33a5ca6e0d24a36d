"""The development volume is what it stands for: a network file system with several hosts, one of which can crash."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devkit import moosefs as rig
from devkit.moosefs import LOCAL_FLOCK, MooseFS, MooseFSError

if TYPE_CHECKING:
    from collections.abc import Callable

PROJECT = Path(__file__).resolve().parents[1]

ENTER_AND_WAIT = """
import sys
from pathlib import Path
from devkit.moosefs import MooseFS

with MooseFS(Path(sys.argv[1]), mounts=1) as volume:
    print(*[process.pid for process in [*volume._servers, *volume._clients]], flush=True)
    sys.stdin.read()
"""


def mounted_below(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]


def processes_naming(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command and b"mfs" in command:
            found.append(command.decode())
    return found


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait for what another process does on its own."""
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.05)


def test_another_host_reads_what_one_wrote_and_sees_it_renamed(moosefs: MooseFS, request: pytest.FixtureRequest) -> None:
    here, there = (mount / request.node.name for mount in moosefs.mounts[:2])
    here.mkdir()
    (here / "partial").write_bytes(b"weights" * 10_000)
    (here / "partial").replace(here / "model")
    assert (there / "model").read_bytes() == b"weights" * 10_000
    assert [found.name for found in there.iterdir()] == ["model"]
    assert (there / "model").stat().st_mtime_ns % 1_000_000_000 == 0, "mtimes are whole seconds, unlike on a local disk"


def test_a_quota_is_felt_when_it_is_used_up(moosefs: MooseFS, request: pytest.FixtureRequest) -> None:
    folder = moosefs.mounts[0] / request.node.name
    folder.mkdir()
    moosefs.set_quota(folder, 1 << 20)
    (folder / "small").write_bytes(bytes(1 << 19))
    with pytest.raises(OSError, match="quota") as caught:
        (folder / "large").write_bytes(bytes(4 << 20))
    assert caught.value.errno == errno.EDQUOT


def test_a_flock_is_seen_by_other_hosts_unless_a_mount_keeps_its_own(moosefs: MooseFS, request: pytest.FixtureRequest) -> None:
    island = moosefs.mount(LOCAL_FLOCK)
    name = f"{request.node.name}.lock"
    with (
        (moosefs.mounts[0] / name).open("w") as first,
        (moosefs.mounts[1] / name).open("w") as second,
        (island / name).open("w") as third,
    ):
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_crashed_host_leaves_the_others_the_volume(tmp_path: Path, moosefs: MooseFS) -> None:
    assert moosefs.mounts  # this machine can: otherwise the fixture has skipped, or failed in CI
    with MooseFS(tmp_path / "volume") as volume:
        victim, witness = volume.mounts
        (victim / "before").write_text("kept")
        volume.kill_mount(0)
        with pytest.raises(OSError, match="not connected") as caught:
            list(victim.iterdir())
        assert caught.value.errno == errno.ENOTCONN
        assert (witness / "before").read_text() == "kept"
        (witness / "after").write_text("goes on")
        assert mounted_below(tmp_path)
        assert processes_naming(tmp_path)
    assert not mounted_below(tmp_path)
    assert not processes_naming(tmp_path)


def test_nothing_outlives_a_killed_user(tmp_path: Path, moosefs: MooseFS) -> None:
    assert moosefs.mounts
    with subprocess.Popen(
        [sys.executable, "-c", ENTER_AND_WAIT, str(tmp_path / "volume")],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as user:
        assert user.stdout is not None
        assert len(user.stdout.readline().split()) == 3
        assert len(mounted_below(tmp_path)) == 1
        user.send_signal(signal.SIGKILL)
    wait_for(lambda: not mounted_below(tmp_path) and not processes_naming(tmp_path))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"_PROGRAMS": ("mfsmaster-that-is-not-installed",)}, "mfsmaster-that-is-not-installed missing"),
        ({"_EMPTY": Path("/nowhere/metadata.mfs.empty")}, "apt-get install moosefs-master"),
    ],
)
def test_it_says_what_is_missing(
    fault: dict[str, object],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moosefs: MooseFS,
) -> None:
    assert moosefs.mounts
    for name, value in fault.items():
        monkeypatch.setattr(rig, name, value)
    assert expected in (rig.available() or "")
    with pytest.raises(MooseFSError, match=expected), MooseFS(tmp_path / "volume"):
        pass


def test_a_part_that_does_not_start_is_reported_with_its_words_and_nothing_is_left(tmp_path: Path, moosefs: MooseFS) -> None:
    assert moosefs.mounts
    volume = MooseFS(tmp_path / "volume", mounts=0)
    with pytest.raises(MooseFSError, match=r"(?s)mount1 ended with .*mfsnosuchoption"), volume:
        volume.mount(["-o", "mfsnosuchoption"])
    assert not mounted_below(tmp_path)
    assert not processes_naming(tmp_path)
