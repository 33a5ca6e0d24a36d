"""The files of a start: recorded from a real program, and read ahead by the kernel."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from devkit.local_worker import PROJECT
from worker.engine.start_files import request_start_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
DEADLINE_S = 60.0
RECORDER = PROJECT / "image/record_start.py"

# Reads one file, maps another and touches it in two places, then listens as ComfyUI would.
PROGRAM = """
import mmap, pathlib, socket, sys
folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[sys.argv.index("--port") + 1])
(folder / "read").read_bytes()
with (folder / "mapped").open("rb") as stream:
    pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
pages[0], pages[9 << 20]
with socket.create_server(("127.0.0.1", port)) as server:
    while True:
        server.accept()
"""


def resident(path: Path) -> int:
    """What the page cache has of a file, by another program than ours."""
    command = ["fincore", "--noheadings", "--bytes", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write(path: Path, size: int) -> Path:
    """Write a file that is on the disk and not in memory."""
    path.write_bytes(os.urandom(size))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip(f"{path} lies on a file system that is memory itself")
    return path


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def recorder() -> dict[str, Any]:
    return runpy.run_path(str(RECORDER))


def test_the_parts_in_the_list_come_into_memory_and_no_others(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", 64 * MIB), write(tmp_path / "second", MIB)
    lines = [f"0-{4 * MIB},{40 * MIB}-{41 * MIB}\t{first}", f"0-{2 * MIB}\t{second}"]
    # A file that is gone, a path that is none, a line of another kind: the rest is read all the same.
    (tmp_path / "list").write_text("\n".join([f"0-4096\t{tmp_path}/gone", f"0-4096\t{tmp_path}", "no such line", "", *lines]))
    request_start_files(tmp_path / "list")
    until(lambda: resident(first) >= 9 * MIB // 2 and resident(second) >= MIB * 3 // 4)  # a busy machine takes pages back
    assert resident(first) < 8 * MIB


def test_without_a_list_nothing_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    request_start_files(tmp_path / "none")
    until(lambda: "files are not read ahead" in caplog.text)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    until(lambda: not any(thread.name == "start-files" for thread in threading.enumerate()))


def test_a_record_has_what_a_start_read_and_the_pages_that_it_touched(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / "read", 100_000)
    write(folder / "mapped", 16 * MIB)
    write(folder / "untouched", MIB)
    (folder / "link").symlink_to(folder / "read")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(RECORDER), str(tmp_path / "list"), str(folder)]
    subprocess.run([*command, sys.executable, str(tmp_path / "program.py"), str(folder)], check=True, timeout=DEADLINE_S)
    found = {
        path: ranges for ranges, _, path in (line.partition("\t") for line in (tmp_path / "list").read_text().splitlines())
    }
    assert found[f"{folder}/read"] == "0-102400"
    touched = [tuple(map(int, part.split("-"))) for part in found[f"{folder}/mapped"].split(",")]
    assert touched[0][0] == 0
    assert touched[1][0] <= 9 * MIB < touched[1][1]
    assert sum(end - begin for begin, end in touched) <= 2 * MIB
    assert found.keys() == {f"{folder}/read", f"{folder}/mapped"}


def test_the_list_is_in_the_order_of_use(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name, 10_000)
    record = recorder()["Record"]([str(tmp_path)])
    for name in ("c", "a", "b"):
        (tmp_path / name).read_bytes()
        record.look(os.getpid())
    assert [line.rstrip()[-1] for line in record.lines()] == ["c", "a", "b"]


def test_a_program_that_ends_before_it_listens_fails_the_build_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, str(RECORDER), str(tmp_path / "list"), str(tmp_path)]
    program = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    done = subprocess.run([*command, *program], check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert "no such thing" in done.stderr
    assert not (tmp_path / "list").exists()


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ("0000", []),
        ("1", [[0, 1]]),
        ("0110", [[1, 3]]),
        ("1" + 15 * "0" + "1", [[0, 17]]),
        ("1" + 16 * "0" + "1", [[0, 1], [17, 18]]),
    ],
)
def test_small_gaps_are_read_as_well(pages: str, expected: list[list[int]]) -> None:
    assert json.loads(json.dumps(recorder()["runs"](bytes(map(int, pages))))) == expected
