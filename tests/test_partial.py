"""A file under way: what the journal says is there is there, whoever goes on with it, and nobody writes into another's file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.base import files
from worker.errors import FileIncomplete, VolumeFailed, VolumeFull, VolumeReadOnly, volume_error
from worker.store.byte_ranges import Ranges
from worker.store.file_formats import check_whole
from worker.store.partial import MIB, Partial, PartialStuck, PartialTaken, PartialWriteFailed, sweep_partials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 10_000
CONTENT = random.Random(1).randbytes(SIZE)

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=30)


def journals(folder: Path) -> dict[str, list[list[int]]]:
    return {path.stem: json.loads(path.read_bytes())["ranges"] for path in folder.glob("*.journal")}


def put(partial: Partial, start: int, end: int) -> None:
    partial.write(start, memoryview(CONTENT)[start:end])


def put_all(partial: Partial) -> None:
    for start in range(0, SIZE, 100):
        put(partial, start, start + 100)


# --- ranges -------------------------------------------------------------------------------------


@given(spans)
def test_ranges_hold_what_was_added_and_nothing_else(added: list[tuple[int, int]]) -> None:
    ranges = Ranges(added)
    there = {byte for start, end in added for byte in range(start, end)}
    assert ranges.total == len(there)
    assert ranges.first_gap == next(byte for byte in range(62) if byte not in there)
    assert {byte for start, end in ranges.gaps(60) for byte in range(start, end)} == set(range(60)) - there
    kept = ranges.as_list()
    assert all(one[1] < two[0] for one, two in itertools.pairwise(kept)), "disjoint, in order, touching ones joined"


# --- the journal --------------------------------------------------------------------------------


def test_a_partial_that_was_let_go_is_continued_from_its_journal(tmp_path: Path) -> None:
    first = Partial.claim(tmp_path, SIZE)
    first.keep_journal(SIZE)
    put(first, 0, 3000)
    put(first, 5000, 6000)
    first.close()

    second = Partial.claim(tmp_path, SIZE)
    assert second.gaps() == [(3000, 5000), (6000, SIZE)]
    for start, end in second.gaps():
        put(second, start, end)
    second.settle()
    assert second.follow(lambda: False) == hashlib.sha256(CONTENT).hexdigest()
    second.close()
    assert second.path.read_bytes() == CONTENT
    assert list(tmp_path.glob("*.part")) == [second.path]


def test_the_fullest_partial_is_continued(tmp_path: Path) -> None:
    for end in (10, 500, 20):
        partial = Partial.claim(tmp_path / str(end), SIZE)
        partial.keep_journal(SIZE)
        put(partial, 0, end)
        partial.close()
        for file in (tmp_path / str(end)).iterdir():
            file.rename(tmp_path / file.name)
    assert Partial.claim(tmp_path, SIZE).done_bytes == 500


@pytest.mark.parametrize(
    "spoil",
    [
        lambda journal: journal.write_bytes(b""),
        lambda journal: journal.write_bytes(b'{"v": 1, "size": 10000, "ranges": [[0, 30'),
        lambda journal: journal.write_bytes(b'{"v": 2, "size": 10000, "ranges": [[0, 3000]]}'),
        lambda journal: journal.write_bytes(b'{"v": 1, "size": 9999, "ranges": [[0, 3000]]}'),
        lambda journal: journal.write_bytes(b'{"v": 1, "size": 10000, "ranges": [[0, 30000]]}'),
        lambda journal: journal.write_bytes(b'{"v": 1, "size": 10000, "ranges": [[-5, 30]]}'),
        lambda journal: journal.write_bytes(b"[]"),
        lambda journal: journal.with_suffix(".part").unlink(),
        lambda journal: os.truncate(journal.with_suffix(".part"), 5),
    ],
)
def test_a_journal_that_cannot_be_right_is_not_believed(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    partial.keep_journal(SIZE)
    put(partial, 0, 3000)
    partial.close()
    spoil(next(tmp_path.glob("*.journal")))
    assert Partial.claim(tmp_path, SIZE).gaps() == [(0, SIZE)]


def test_no_more_than_the_limit_is_ever_ahead_of_the_journal(tmp_path: Path) -> None:
    """The disk's flush is held up: the writer has to stop, whatever the network would still give."""
    flushing, go_on = threading.Event(), threading.Event()
    real = os.fdatasync

    def slow(fd: int) -> None:
        flushing.set()
        assert go_on.wait(30)
        real(fd)

    partial = Partial.claim(tmp_path, SIZE)
    with mock.patch("os.fdatasync", slow):
        partial.keep_journal(2000)
        writer = threading.Thread(target=put_all, args=(partial,))
        writer.start()
        assert flushing.wait(30)
        writer.join(0.5)
        assert writer.is_alive(), "the writer went on although nothing was safe"
        assert partial.done_bytes <= 2000 + 100
        assert journals(tmp_path) == {partial.path.stem: []}, "journalled before it was safe"
        go_on.set()
        writer.join(30)
        partial.settle()
    assert journals(tmp_path) == {partial.path.stem: [[0, SIZE]]}


def test_a_disk_that_fails_while_journalling_stops_the_writers(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    with mock.patch("os.fdatasync", side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")):
        partial.keep_journal(1000)
        with pytest.raises(PartialWriteFailed, match="quota") as caught:
            put_all(partial)
        assert caught.value.error.errno == errno.EDQUOT
        with pytest.raises(PartialWriteFailed, match="quota"):
            partial.settle()


def test_a_write_that_fails_is_no_error_of_the_network(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    with (
        mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(PartialWriteFailed),
    ):
        put(partial, 0, 10)


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    real = os.pwrite
    with mock.patch("os.pwrite", lambda fd, view, offset: real(fd, view[:7], offset)):
        put(partial, 0, 100)
    assert partial.path.read_bytes()[:100] == CONTENT[:100]


# --- a disk that does not answer ----------------------------------------------------------------


@contextlib.contextmanager
def stuck(call: str) -> Iterator[threading.Event]:
    """The file system keeps the call until the block ends; set once it has one."""
    kept, go_on = threading.Event(), threading.Event()
    real = getattr(os, call)

    def keep(*args: Any) -> Any:
        kept.set()
        assert go_on.wait(60)
        return real(*args)

    with mock.patch(f"os.{call}", keep):
        try:
            yield kept
        finally:
            go_on.set()


def inherit(folder: Path) -> Partial:
    first = Partial.claim(folder, SIZE)
    put(first, 0, 1000)
    first._save(first._fd)
    return Partial.claim(folder, SIZE)


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
@pytest.mark.parametrize("journalled", [True, False])
def test_a_flush_that_never_ends_is_an_error_of_the_disk(tmp_path: Path, call: str, *, journalled: bool) -> None:
    """`fdatasync` is the content's, `fsync` the journal's."""
    partial = Partial.claim(tmp_path, SIZE)
    put_all(partial)
    with stuck(call):
        if journalled:
            partial.keep_journal(SIZE)
        with pytest.raises(PartialWriteFailed, match="did not answer"):
            partial.settle(patience_s=0.2)
    partial.discard()


def test_in_a_file_of_another_worker_it_is_somebody_else_s_lock_and_soon_so(tmp_path: Path) -> None:
    heir = inherit(tmp_path)
    with stuck("fdatasync"), pytest.raises(PartialStuck):
        heir.settle(patience_s=60, stuck_s=0.2)
    heir.discard()


def test_a_flush_behind_the_writers_is_watched_as_well(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    with stuck("fdatasync") as flushing:
        partial.keep_journal(100)
        writer = threading.Thread(target=put, args=(partial, 0, 5000))
        writer.start()
        assert flushing.wait(30)
        with pytest.raises(PartialWriteFailed, match="did not answer"):
            partial.check(patience_s=0)
        partial.check(patience_s=60)
    writer.join(30)
    partial.settle()
    partial.check(patience_s=0)


def test_the_patience_does_not_count_the_time_that_the_process_was_frozen(tmp_path: Path) -> None:
    now_s = [100.0]
    partial = Partial.claim(tmp_path, SIZE, clock=lambda: now_s[0])
    with stuck("fdatasync") as flushing:
        partial.keep_journal(100)
        writer = threading.Thread(target=put, args=(partial, 0, 5000))
        writer.start()
        assert flushing.wait(30)
        partial.check(patience_s=0)
        now_s[0] += 121.0
        with pytest.raises(PartialWriteFailed, match="did not answer"):
            partial.check(patience_s=120)
    writer.join(30)
    partial.settle()


def test_a_flush_of_much_is_given_the_time_of_a_slow_volume(tmp_path: Path) -> None:
    heir = inherit(tmp_path)
    heir._unsaved_bytes = 1000 * MIB
    with stuck("fdatasync") as flushing:
        heir.keep_journal(1)
        assert flushing.wait(30)
        heir.check(stuck_s=0)
        heir._flushing_bytes = 0
        with pytest.raises(PartialStuck):
            heir.check(stuck_s=0)
    heir.discard()


def test_who_gave_a_file_up_does_not_journal_it_later(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    put_all(partial)
    with stuck("fdatasync") as flushing:
        partial.keep_journal(SIZE)
        with pytest.raises(PartialWriteFailed):
            partial.settle(patience_s=0.1)
        assert flushing.is_set()
        journalist = partial._journalist
        assert journalist
        partial.discard()
    journalist.join(30)
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


# --- whose it is --------------------------------------------------------------------------------


def test_whoever_claims_a_partial_stops_the_one_who_had_it(tmp_path: Path) -> None:
    zombie = Partial.claim(tmp_path, SIZE)
    zombie.keep_journal(SIZE)
    put(zombie, 0, 3000)
    zombie._save(zombie._fd)
    heir = Partial.claim(tmp_path, SIZE)
    assert heir.done_bytes == 3000
    zombie._owned_until_s = 0
    with pytest.raises(PartialTaken):
        put(zombie, 3000, 4000)
    zombie.close()
    zombie.discard()
    assert heir.is_ours()
    assert journals(tmp_path)[heir.path.stem] == [[0, 3000]]


def test_the_dead_leave_no_late_journal(tmp_path: Path) -> None:
    """A worker that was evicted while its disk was slow would journal after its file was taken and thrown away."""
    zombie = Partial.claim(tmp_path, SIZE)
    put(zombie, 0, 1000)
    zombie._save(zombie._fd)
    put(zombie, 1000, 3000)
    heir = Partial.claim(tmp_path, SIZE)
    assert heir.done_bytes == 1000
    zombie._save(zombie._fd)
    assert journals(tmp_path) == {heir.path.stem: [[0, 1000]]}
    heir.discard()
    zombie._save(zombie._fd)
    assert not tmp_path.exists()


def test_two_who_claim_at_once_never_share_a_file(tmp_path: Path) -> None:
    seed = Partial.claim(tmp_path, SIZE)
    seed.keep_journal(SIZE)
    put(seed, 0, 5000)
    seed.close()
    barrier, claimed = threading.Barrier(8), []

    def claim() -> None:
        barrier.wait()
        claimed.append(Partial.claim(tmp_path, SIZE))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owned = [partial for partial in claimed if partial.is_ours()]
    assert len({partial.path for partial in claimed}) == 8
    assert [partial.done_bytes for partial in owned].count(5000) == 1, "one file, one owner"


def test_without_a_lock_only_what_lies_idle_is_taken(tmp_path: Path) -> None:
    living = Partial.claim(tmp_path, SIZE)
    living.keep_journal(SIZE)
    put(living, 0, 3000)
    living._save(living._fd)
    assert Partial.claim(tmp_path, SIZE, idle_s=60).done_bytes == 0
    assert living.is_ours()
    journal = living.path.with_suffix(".journal")
    os.utime(journal, (journal.stat().st_atime, journal.stat().st_mtime - 61))
    assert Partial.claim(tmp_path, SIZE, idle_s=60).done_bytes == 3000
    assert not living.is_ours()


def test_a_claim_that_finds_all_busy_leaves_nothing_behind(tmp_path: Path) -> None:
    """What it dated them by is the journal of the partial that it begins."""
    living = Partial.claim(tmp_path, SIZE)
    put(living, 0, 3000)
    living._save(living._fd)
    other = Partial.claim(tmp_path, SIZE, idle_s=60)
    assert set(journals(tmp_path)) == {living.path.stem, other.path.stem}
    other.discard()
    assert {path.stem for path in tmp_path.iterdir()} == {living.path.stem}


def test_a_partial_that_cannot_be_made_leaves_no_journal(tmp_path: Path) -> None:
    with (
        mock.patch("worker.store.partial.create_file", side_effect=OSError(errno.ENOSPC, "full")),
        pytest.raises(OSError, match="full"),
    ):
        Partial.begin(tmp_path, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_discarded_partial_is_unlinked_and_never_cut_short(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    put(partial, 0, SIZE)
    published = tmp_path / "published"
    os.link(partial.path, published)
    partial.discard()
    assert published.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [published]


@pytest.mark.parametrize("refused", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_a_name_that_a_file_has_is_left_to_it(tmp_path: Path, refused: int | None) -> None:
    """With hard links and, on a file system that has none, with a look and a rename."""
    partial = Partial.claim(tmp_path / "partial", SIZE)
    put(partial, 0, SIZE)
    target = tmp_path / "models/a.safetensors"
    target.parent.mkdir()
    with mock.patch.object(Path, "hardlink_to", side_effect=OSError(refused, "no")) if refused else contextlib.nullcontext():
        target.write_bytes(b"somebody's")
        assert not partial.publish(target)
        assert target.read_bytes() == b"somebody's"
        target.unlink()
        target.symlink_to(tmp_path / "gone")
        assert partial.publish(target)
    assert (target.read_bytes(), target.is_symlink(), target.stat().st_nlink) == (CONTENT, False, 1)
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_file_that_is_to_be_replaced_is_replaced_by_a_rename(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path / "partial", SIZE)
    put(partial, 0, SIZE)
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"damaged")
    assert partial.publish(target, over=True)
    assert target.read_bytes() == CONTENT


def test_a_partial_that_has_its_final_name_is_nobody_elses_to_write_into(tmp_path: Path) -> None:
    """A worker that died between the link and the removal of the partial's own name leaves both."""
    partial = Partial.claim(tmp_path / "partial", SIZE)
    partial.keep_journal(SIZE)
    put(partial, 0, SIZE)
    partial.close()
    os.link(partial.path, tmp_path / "published")
    heir = Partial.claim(tmp_path / "partial", SIZE)
    assert heir.done_bytes == 0
    os.ftruncate(heir._fd, 0)
    assert (tmp_path / "published").read_bytes() == CONTENT


def test_closing_waits_for_nobody_and_its_descriptor_is_not_reused_under_a_writer(tmp_path: Path) -> None:
    writing, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def slow(fd: int, view: memoryview, offset: int) -> int:
        writing.set()
        assert go_on.wait(30)
        return real(fd, view, offset)

    partial = Partial.claim(tmp_path, SIZE)
    with mock.patch("os.pwrite", slow):
        writer = threading.Thread(target=put, args=(partial, 0, 100))
        writer.start()
        assert writing.wait(30)
        partial.close()
        others = [os.open(tmp_path / f"other{n}", os.O_RDWR | os.O_CREAT) for n in range(20)]
        go_on.set()
        writer.join(30)
    assert partial.path.read_bytes()[:100] == CONTENT[:100]
    assert [os.fstat(fd).st_size for fd in others] == [0] * 20
    with pytest.raises(PartialTaken):
        put(partial, 100, 200)
    for fd in others:
        os.close(fd)


def test_hashing_follows_the_writers_and_ends_when_told(tmp_path: Path) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    stop = threading.Event()
    put(partial, 0, 5000)
    found: list[str | None] = []
    hasher = threading.Thread(target=lambda: found.append(partial.follow(stop.is_set)))
    hasher.start()
    stop.set()
    hasher.join(30)
    assert found == [None]


def test_what_is_swept_is_gone_and_a_missing_folder_is_no_matter(tmp_path: Path) -> None:
    Partial.claim(tmp_path / "key", SIZE)
    sweep_partials(tmp_path / "key")
    assert not (tmp_path / "key").exists()
    sweep_partials(tmp_path / "key")


def test_nobody_waits_for_a_sweep_whose_unlink_hangs(tmp_path: Path) -> None:
    """Unlinking a file waits in the kernel while a write to it hangs, as it does with a dead host's locks."""
    Partial.claim(tmp_path / "key", SIZE)
    with stuck("unlink") as unlinking:
        sweep_partials(tmp_path / "key", wait_s=0.05)
        assert unlinking.wait(30)
        assert len(list((tmp_path / "key").iterdir())) == 2
    for thread in threading.enumerate():
        if thread.name == "sweep":
            thread.join(30)
    assert not (tmp_path / "key").exists()


# --- the disk's small operations ----------------------------------------------------------------


def test_a_folder_that_another_host_is_making_is_waited_for(tmp_path: Path) -> None:
    answers = [OSError(errno.ESTALE, "Stale file handle"), FileNotFoundError(errno.ENOENT, "No such file"), 5]
    assert files.patiently(mock.Mock(side_effect=answers)) == 5
    with pytest.raises(OSError, match="Stale"):
        files.patiently(mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")), wait_s=0.2)
    with pytest.raises(PermissionError):
        files.patiently(mock.Mock(side_effect=PermissionError(errno.EACCES, "no")))
    assert tmp_path.exists()


def test_a_failed_replacement_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "record"
    files.write_atomically(target, b"old")
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "full")), pytest.raises(OSError, match="full"):
        files.write_atomically(target, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("record", b"old")]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, VolumeFull),
        (errno.EDQUOT, VolumeFull),
        (errno.EROFS, VolumeReadOnly),
        (errno.EACCES, VolumeReadOnly),
        (errno.ENOTCONN, VolumeFailed),
        (errno.EIO, VolumeFailed),
    ],
)
def test_the_file_systems_errors_have_a_meaning(tmp_path: Path, number: int, expected: type[Exception]) -> None:
    found = volume_error(tmp_path, OSError(number, os.strerror(number)), 123)
    assert type(found) is expected
    assert str(tmp_path) in str(found)


def safetensors(tensor_bytes: int, header: object | None = None) -> bytes:
    text = json.dumps(
        header if header is not None else {"__metadata__": {"a": "b"}, "t": {"dtype": "U8", "data_offsets": [0, tensor_bytes]}}
    ).encode()
    return len(text).to_bytes(8, "little") + text + bytes(tensor_bytes)


@pytest.mark.parametrize(
    "content",
    [
        safetensors(100)[:-1],
        safetensors(100) + b"x",
        safetensors(100)[:20],
        b"",
        b"\x05",
        (2**63).to_bytes(8, "little") + b"{}",
        safetensors(100, ["no", "header"]),
        safetensors(100, {"t": {"data_offsets": "no"}}),
        safetensors(100, {"t": {}}),
    ],
)
def test_a_safetensors_file_that_is_cut_off_is_found(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileIncomplete):
        check_whole(path, len(content))


def test_a_whole_safetensors_file_passes_and_other_formats_say_nothing(tmp_path: Path) -> None:
    for content in (safetensors(100), safetensors(0, {})):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        check_whole(path, len(content))
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"anything")
    check_whole(path, 8)


KILLED_WHILE_CLAIMING = """
import os, signal, sys
from pathlib import Path
from worker.store.partial import Partial

real = Path.rename
def die(self, target):
    if sys.argv[2] == "after":
        real(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.rename = die
Partial.claim(Path(sys.argv[1]), 10_000)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_killed_while_it_claims_loses_nothing(tmp_path: Path, when: str) -> None:
    partial = Partial.claim(tmp_path, SIZE)
    partial.keep_journal(SIZE)
    put(partial, 0, 3000)
    partial.close()
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_CLAIMING, str(tmp_path), when], check=False, timeout=60)
    assert killed.returncode == -9
    assert Partial.claim(tmp_path, SIZE).done_bytes == 3000
