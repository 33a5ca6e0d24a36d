"""Weights are in the page cache before anybody asks for them, within the container's memory, and out of a job's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from devkit.local_worker import PROJECT
from worker.links.model_links import ModelLinks
from worker.store.host_cache import cached_copies, link_host_cache
from worker.store.layout import Layout
from worker.store.seals import Seal, write_seal
from worker.warmup.memory import free_memory_bytes
from worker.warmup.page_cache import missing_ranges
from worker.warmup.read_ahead import WeightsReader
from worker.warmup.recent_models import RecentModels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from devkit.moosefs import MooseFS

MIB = 1 << 20
PIECE = 8 * MIB


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident(path: Path) -> int:
    """What the kernel holds of a file, asked from another process and by another program than ours."""
    command = ["fincore", "--noheadings", "--bytes", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def is_in_memory(path: Path) -> bool:
    """Whether the kernel holds a file, but for pages that a busy machine takes back (2 of 16 MiB were seen to go)."""
    return resident(path) >= path.stat().st_size * 3 // 4


def cold(path: Path, size_bytes: int) -> Path:
    path.write_bytes(os.urandom(MIB) * (size_bytes // MIB) + b"\1" * (size_bytes % MIB))
    evict(path)
    if resident(path):
        pytest.skip(f"{path} lies on a file system that is memory itself")
    return path


def warmer(budget_bytes: int = 1 << 40) -> WeightsReader:
    return WeightsReader(lambda: budget_bytes)


# --- which part of a file is in memory


def test_what_is_not_in_memory_is_known(tmp_path: Path) -> None:
    size = 3 * PIECE + 5
    path = cold(tmp_path / "a", size)
    with path.open("rb", buffering=0) as stream:
        fd = stream.fileno()
        assert missing_ranges(fd, size) == [(0, size)]
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead behind what is asked for
        os.pread(fd, PIECE, PIECE)
        assert missing_ranges(fd, size) == [(0, PIECE), (2 * PIECE, size)]
        os.pread(fd, MIB, 0)
        os.pread(fd, 1, PIECE - 1)
        assert missing_ranges(fd, size) == [(MIB, PIECE), (2 * PIECE, size)]
        path.read_bytes()
        assert missing_ranges(fd, size) == missing_ranges(fd, 0) == []


def test_what_the_kernel_will_not_tell_counts_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "root's"
    path.write_bytes(b"x" * PIECE)
    path.chmod(0o444)
    if os.geteuid() != 0:
        pytest.skip("becoming somebody else needs root")
    code = "import os; from worker.warmup.page_cache import missing_ranges as f; os.setuid(65534); print(f(0, 8 << 20))"
    with path.open("rb") as stream:
        shown = subprocess.run(
            [sys.executable, "-c", code], stdin=stream, cwd=PROJECT, check=True, capture_output=True, text=True
        )
    assert shown.stdout == "[(0, 8388608)]\n"


# --- reading


def test_files_are_in_memory_afterwards(tmp_path: Path) -> None:
    sizes = {"large": 3 * PIECE + 4097, "small": 10, "empty": 0}
    paths = [cold(tmp_path / name, size) for name, size in sizes.items()]
    reader = warmer()
    reader.warm(paths)
    warmed = reader.wait(30)
    assert (warmed.read_bytes, warmed.cached_bytes, warmed.left_bytes) == (sum(sizes.values()), 0, 0)
    assert [is_in_memory(path) for path in paths] == [True] * 3


def test_what_is_in_memory_is_not_read_again(tmp_path: Path) -> None:
    path = cold(tmp_path / "a", 2 * PIECE)
    path.read_bytes()
    reader = warmer()
    reader.warm([path])
    warmed = reader.wait(30)
    assert (warmed.read_bytes, warmed.cached_bytes) == (0, 2 * PIECE)
    assert warmed.what == "16.8 MB were in memory"


def test_no_more_is_read_than_there_is_memory_for(tmp_path: Path) -> None:
    first, second = cold(tmp_path / "first", 2 * PIECE), cold(tmp_path / "second", 2 * PIECE)
    reader = warmer(3 * PIECE)
    reader.warm([first, second])
    warmed = reader.wait(30)
    assert (warmed.read_bytes, warmed.left_bytes) == (3 * PIECE, PIECE)
    assert is_in_memory(first)
    assert "no memory for 8.4 MB" in str(warmed)


def test_what_cannot_be_read_is_said_and_the_rest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cold(tmp_path / "a", 100)
    (tmp_path / "folder").mkdir()
    reader = warmer()
    reader.warm([tmp_path / "gone", tmp_path / "folder", path])
    assert reader.wait(30).read_bytes == 100
    assert [record.getMessage() for record in caplog.records if "cannot be read ahead" in record.getMessage()] == [
        f"{tmp_path}/gone cannot be read ahead: [Errno 2] No such file or directory: '{tmp_path}/gone'"
    ]


def begun(reader: WeightsReader, path: Path) -> None:
    """Return when the reader has come to that file, where a hold keeps it from reading."""
    for _ in range(10_000):
        plan = reader._plan
        if plan and plan.current == path:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{path} was never begun")


def test_nothing_is_read_while_a_job_has_the_disk(tmp_path: Path) -> None:
    path = cold(tmp_path / "a", 2 * PIECE)
    reader = warmer()
    with reader.standing_back():
        with reader.standing_back():
            reader.warm([path])
            begun(reader, path)
        assert reader.wait(0.1).running
        assert resident(path) == 0
    assert reader.wait(30).read_bytes == 2 * PIECE
    assert is_in_memory(path)


def test_what_a_job_needs_takes_the_place_of_what_was_guessed(tmp_path: Path) -> None:
    guessed, needed = cold(tmp_path / "guessed", 2 * PIECE), cold(tmp_path / "needed", 2 * PIECE)
    reader = warmer()
    with reader.standing_back():
        reader.warm([guessed])
        begun(reader, guessed)
        reader.warm([needed])
    assert reader.wait(30).read_bytes == 2 * PIECE
    assert resident(guessed) == 0
    assert is_in_memory(needed)


def test_a_file_that_is_being_read_and_is_needed_goes_on(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    a, b, c = (cold(tmp_path / name, PIECE) for name in names)
    reader = warmer()
    with reader.standing_back():
        reader.warm([a, b])
        begun(reader, a)
        reader.warm([c, a])
    assert reader.wait(30).read_bytes == 2 * PIECE
    assert [bool(resident(path)) for path in (a, b, c)] == [True, False, True]


def test_a_new_list_has_a_budget_of_its_own(tmp_path: Path) -> None:
    a, b = (cold(tmp_path / name, 2 * PIECE) for name in ("a", "b"))
    budgets = [PIECE, 1 << 40]
    reader = WeightsReader(lambda: budgets.pop(0))
    with reader.standing_back():
        reader.warm([a])
        begun(reader, a)
        reader.warm([a, b])
    assert reader.wait(30).left_bytes == 0
    assert is_in_memory(a)
    assert is_in_memory(b)


def test_what_is_in_memory_already_counts(tmp_path: Path) -> None:
    a, b = (cold(tmp_path / name, 2 * PIECE) for name in ("a", "b"))
    a.read_bytes()
    reader = warmer(budget_bytes=3 * PIECE)
    reader.warm([a, b])
    warmed = reader.wait(30)
    assert (warmed.cached_bytes, warmed.read_bytes, warmed.left_bytes) == (2 * PIECE, PIECE, PIECE)


def test_a_stopped_reader_reads_nothing_more(tmp_path: Path) -> None:
    path = cold(tmp_path / "a", PIECE)
    reader = warmer()
    with reader.standing_back():
        reader.warm([path])
        begun(reader, path)
        reader.stop()
        assert not reader.warmed().running
    assert resident(path) == 0


def test_what_was_read_from_a_network_volume_stays_in_memory(moosefs: MooseFS, tmp_path: Path) -> None:
    folder = moosefs.mounts[0] / tmp_path.name
    folder.mkdir()
    path = cold(folder / "model.safetensors", 2 * PIECE)
    reader = warmer()
    reader.warm([path])
    assert reader.wait(60).read_bytes == 2 * PIECE
    assert is_in_memory(path)


# --- how much memory there is


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in ({"proc/meminfo": "MemTotal: 64 kB\nMemAvailable:   64000 kB\n"} | dict(files)).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(where: str, limit: str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\n"
    return {f"{where}/memory.max": f"{limit}\n", f"{where}/memory.current": f"{usage}\n", f"{where}/memory.stat": stat}


def group_v1(where: str, limit: int, usage: int, inactive: int) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file 0\n"
    return {
        f"{where}/memory.limit_in_bytes": str(limit),
        f"{where}/memory.usage_in_bytes": str(usage),
        f"{where}/memory.stat": stat,
    }


CGROUP = "sys/fs/cgroup"
V1 = f"{CGROUP}/memory"
MEMORY: dict[str, tuple[dict[str, str], int]] = {
    "no groups": ({}, 65_536_000),
    "a container with a namespace": ({"proc/self/cgroup": "0::/\n", **group(CGROUP, "1000", 700, 200, 100)}, 600),
    "no limit": ({"proc/self/cgroup": "0::/\n", **group(CGROUP, "max", 700)}, 65_536_000),
    "a tighter group above": (
        {"proc/self/cgroup": "0::/a/b\n", **group(f"{CGROUP}/a/b", "9000", 0), **group(f"{CGROUP}/a", "5000", 1000)},
        4000,
    ),
    "a container that sees the machine's path": (
        {"proc/self/cgroup": "0::/docker/0123\n", **group(CGROUP, "1000", 400)},
        600,
    ),
    "version 1": ({"proc/self/cgroup": "4:memory:/x\n0::/\n", **group_v1(f"{V1}/x", 5000, 3000, 500)}, 2500),
    "version 1 without a namespace": ({"proc/self/cgroup": "4:cpu,memory:/docker/1\n", **group_v1(V1, 5000, 3000, 0)}, 2000),
    "version 1 without a limit": (
        {"proc/self/cgroup": "4:memory:/\n", **group_v1(V1, 9_223_372_036_854_771_712, 3000, 0)},
        65_536_000,
    ),
    "both versions mixed": (
        {"proc/self/cgroup": "0::/y\n", **group(f"{CGROUP}/unified/y", "300", 100)},
        200,
    ),
    "over the limit": ({"proc/self/cgroup": "0::/\n", **group(CGROUP, "1000", 1200)}, 0),
}


@pytest.mark.parametrize("case", MEMORY)
def test_free_memory_is_the_tightest_limits(case: str, tmp_path: Path) -> None:
    files, expected = MEMORY[case]
    assert free_memory_bytes(machine(tmp_path, files)) == expected


def test_where_nothing_says_how_much_memory_there_is_there_is_none(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path) == 0


def test_this_machine_has_some() -> None:
    assert 0 < free_memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- what jobs used


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        path = tmp_path / f"volume/models/loras/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "volume"


def record(volume: Path, clock: Callable[[], float] = lambda: 0.0) -> RecentModels:
    return RecentModels(volume, volume / ".worker/used/e.json", clock)


def names(volume: Path) -> list[str]:
    return [path.name for path in record(volume).files()]


def test_the_last_used_comes_first_also_from_another_worker(volume: Path) -> None:
    loras = volume / "models/loras"
    assert names(volume) == []
    assert record(volume).note([loras / "a", loras / "b"])
    assert record(volume).note([loras / "c", loras / "b"])
    assert names(volume) == ["c", "b", "a"]


def test_it_is_written_rarely(volume: Path) -> None:
    loras, now = volume / "models/loras", [0.0]
    mine = record(volume, lambda: now[0])
    assert mine.note([loras / "a"])
    assert not mine.note([loras / "a"])
    assert mine.note([loras / "b"])
    assert not mine.note([loras / "a"])
    assert names(volume) == ["b", "a"]
    now[0] = 61.0
    assert mine.note([loras / "a"])
    assert names(volume) == ["a", "b"]


def test_it_is_read_again_only_for_what_is_new(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loras, reads = volume / "models/loras", []
    record(volume).note([loras / "a"])
    second = record(volume)
    read = second._read

    def counted(_: RecentModels) -> dict[str, Any]:
        reads.append(1)
        return read()

    monkeypatch.setattr(RecentModels, "_read", counted)
    for _ in range(3):
        assert not second.note([loras / "a"])
    assert len(reads) == 1


def test_only_files_of_the_volume_are_remembered_and_read(volume: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    assert not record(volume).note([outside])
    (volume / "models/loras/link").symlink_to(outside)
    listed = ["../outside", str(outside), "models/loras/link", "models/loras/gone", "models/loras", 5, "models/loras/b"]
    path = volume / ".worker/used/e.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"v": 1, "files": listed}))
    assert names(volume) == ["b"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 5}', "\xff"])
def test_a_record_that_is_none_is_as_good_as_empty(text: str, volume: Path) -> None:
    path = volume / ".worker/used/e.json"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    assert names(volume) == []
    assert record(volume).warmup() is None
    assert record(volume).note([volume / "models/loras/a"])
    assert names(volume) == ["a"]


def test_a_volume_that_takes_no_record_is_said_once(volume: Path, caplog: pytest.LogCaptureFixture) -> None:
    (volume / ".worker").write_text("a file where the folder belongs")
    mine = record(volume)
    assert not mine.note([volume / "models/loras/a"])
    assert not mine.note([volume / "models/loras/b"])
    assert len([line for line in caplog.messages if "cannot be recorded" in line]) == 1


def test_the_record_holds_no_more_than_a_few_names(volume: Path) -> None:
    paths = [volume / f"models/loras/{number}" for number in range(40)]
    record(volume).note(paths)
    written = json.loads((volume / ".worker/used/e.json").read_text())
    assert written == {"v": 1, "files": [f"models/loras/{number}" for number in range(32)]}


def test_a_graph_to_warm_up_with_is_kept_until_there_is_another(volume: Path) -> None:
    loras = volume / "models/loras"
    record(volume).note([loras / "a"], {"1": {}})
    record(volume).note([loras / "b"])
    assert record(volume).warmup() == {"1": {}}
    assert names(volume) == ["b", "a"]


# --- RunPod's host cache


@pytest.fixture
def cached(volume: Path) -> Path:
    """A model on the volume that the host cache holds as well."""
    layout = Layout(volume)
    path = layout.models / "loras/a"
    path.write_bytes(b"12345")
    write_seal(layout.seal("loras", "a"), Seal(size=5, mtime=int(path.stat().st_mtime), sha256="ab" * 32, repo="org/repo"))
    blob = layout.host_cache_repo("org/repo") / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"12345")
    return path


def test_comfyui_is_shown_the_copy_in_the_host_cache(volume: Path, cached: Path, tmp_path: Path) -> None:
    layout, models, near = Layout(volume), tmp_path / "comfyui/models", tmp_path / "near"
    copies = cached_copies(layout)
    assert list(copies) == [cached]
    assert link_host_cache(copies, layout, near) == 1
    report = ModelLinks(models, [layout.models], within=[volume], host_cache=near).refresh()
    assert (report.files, report.problems) == (3, ())
    assert (models / "loras/a").resolve() == layout.host_cache_repo("org/repo") / "blobs" / ("ab" * 32)
    assert (models / "loras/b").resolve() == layout.models / "loras/b"

    assert link_host_cache({}, layout, near) == 0
    ModelLinks(models, [layout.models], within=[volume], host_cache=near).refresh()
    assert (models / "loras/a").resolve() == cached


@pytest.mark.parametrize("fault", ["another size", "no hash", "a hash that is a path", "replaced since", "no blob", "no model"])
def test_what_may_not_be_the_same_is_read_from_the_volume(fault: str, volume: Path, cached: Path) -> None:
    layout = Layout(volume)
    seal = Seal(size=5, mtime=int(cached.stat().st_mtime), sha256="ab" * 32, repo="org/repo")
    wrong: dict[str, Any] = {
        "replaced since": {"mtime": 0},
        "no hash": {"sha256": None},
        "a hash that is a path": {"sha256": "../" * 20 + "etc"},
    }
    write_seal(layout.seal("loras", "a"), replace(seal, **wrong.get(fault, {})))
    blob = layout.host_cache_repo("org/repo") / "blobs" / ("ab" * 32)
    if fault == "another size":
        blob.write_bytes(b"123456")
    if fault == "no blob":
        blob.unlink()
    if fault == "no model":
        cached.unlink()
    assert cached_copies(layout) == {}


def test_without_a_host_cache_no_seal_is_read(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.store.host_cache.read_seal", lambda _: pytest.fail("a seal was read"))
    assert cached_copies(Layout(volume)) == {}
