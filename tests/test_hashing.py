"""The hash of a download: from memory where that is as good as from the disk, and read back where it is not."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import EnsureCancelled
from worker.fetch.ranges import RangeTuning
from worker.store.hashing import HashedPartial
from worker.store.partial import Partial, PartialTaken, PartialWriteFailed
from worker.store.reorder import ReorderBuffer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 1000
CONTENT = random.Random(2).randbytes(20_500)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NEVER = threading.Event()


def blocks() -> list[tuple[int, int]]:
    return [(at, min(at + BLOCK, len(CONTENT))) for at in range(0, len(CONTENT), BLOCK)]


def put(sink: HashedPartial | Partial, start: int, end: int, content: bytes = CONTENT) -> None:
    """As a fetch does it: the buffer is overwritten as soon as the sink has returned."""
    buffer = bytearray(content[start:end])
    sink.write(start, memoryview(buffer))
    buffer[:] = bytes(len(buffer))


def hashed(partial: Partial, reorder_blocks: int = 100) -> HashedPartial:
    return HashedPartial(partial, RangeTuning(reorder_bytes=reorder_blocks * BLOCK, buffer_bytes=BLOCK))


def finish(sink: HashedPartial, partial: Partial) -> str:
    try:
        partial.settle()
        return sink.sha256(NEVER, lambda _: None)
    finally:
        sink.stop()


@pytest.fixture
def reads() -> Iterator[list[int]]:
    """How many bytes each read back took."""
    counted: list[int] = []
    real = os.preadv

    def count(fd: int, buffers: list[memoryview], offset: int) -> int:
        counted.append(real(fd, buffers, offset))
        return counted[-1]

    with mock.patch("os.preadv", count):
        yield counted


# --- what is kept in memory ---------------------------------------------------------------------


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(0, 12))
def test_what_is_kept_is_right_within_the_limit_and_nearest_to_its_turn(order: list[int], limit: int, turn: int) -> None:
    reorder = ReorderBuffer(limit * 10, 10)
    reorder.take(turn * 10)
    for number in order:
        reorder.put(number * 10, memoryview(bytes([number] * 10)))
    kept = [number for number in range(12) if reorder.has(number * 10)]
    assert kept == list(range(turn, min(12, turn + limit)))
    assert reorder.next_after(turn * 10, 120) == (kept[1] * 10 if len(kept) > 1 else 120)
    for number in kept:
        block = reorder.take(number * 10)
        assert block is not None
        assert block.tobytes() == bytes([number] * 10)
        reorder.release(block)
    assert reorder.take(0) is None


def test_memory_is_used_again_and_a_block_that_is_too_long_is_left_to_others() -> None:
    reorder = ReorderBuffer(10, 10)
    assert not reorder.put(0, memoryview(bytes(11)))
    for at in range(0, 1000, 7):
        assert reorder.put(at, memoryview(b"seven!!"))
        block = reorder.take(at)
        assert block is not None
        assert block.tobytes() == b"seven!!"
        reorder.release(block)


# --- the hash -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_file_of_our_own_is_hashed_without_being_read(tmp_path: Path, reads: list[int], seed: int) -> None:
    partial = Partial.begin(tmp_path, len(CONTENT))
    sink = hashed(partial)
    order = blocks()
    random.Random(seed).shuffle(order)
    for start, end in order:
        put(sink, start, end)
    assert finish(sink, partial) == SHA256
    assert partial.path.read_bytes() == CONTENT
    assert reads == []


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_did_not_fit_into_memory_is_read_back(tmp_path: Path, reads: list[int], kept: int) -> None:
    partial = Partial.begin(tmp_path, len(CONTENT))
    sink = hashed(partial, kept)
    for start, end in reversed(blocks()):
        put(sink, start, end)
    assert finish(sink, partial) == SHA256
    assert sum(reads) == len(CONTENT) - kept * BLOCK


def test_the_file_of_another_worker_is_read_back_all_of_it(tmp_path: Path, reads: list[int]) -> None:
    """What that one still writes while we go on must be found, wherever it lands."""
    first = Partial.begin(tmp_path, len(CONTENT))
    put(first, 0, BLOCK)
    first._save(first._fd)
    heir = Partial.claim(tmp_path, len(CONTENT))
    assert heir.inherited
    put(heir, BLOCK, len(CONTENT) - BLOCK)
    os.pwrite(first._fd, b"wrong", 5 * BLOCK)
    sink = hashed(heir)
    put(sink, len(CONTENT) - BLOCK, len(CONTENT))
    assert finish(sink, heir) == hashlib.sha256(heir.path.read_bytes()).hexdigest() != SHA256
    assert sum(reads) == len(CONTENT)


def test_bytes_that_come_twice_are_read_back_as_the_disk_has_them(tmp_path: Path) -> None:
    """A server that stops honouring ranges sends everything again, and a byte of it can be wrong."""
    partial = Partial.begin(tmp_path, len(CONTENT))
    sink = hashed(partial)
    put(sink, 0, BLOCK)
    put(sink, 0, BLOCK, bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    for start, end in blocks()[1:]:
        put(sink, start, end)
    assert finish(sink, partial) == hashlib.sha256(partial.path.read_bytes()).hexdigest() != SHA256


def test_a_file_that_was_taken_has_no_hash(tmp_path: Path) -> None:
    partial = Partial.begin(tmp_path, len(CONTENT))
    sink = hashed(partial)
    put(sink, 0, BLOCK)
    partial.close()
    with pytest.raises(PartialTaken):
        put(sink, BLOCK, 2 * BLOCK)
    sink.stop()
    with pytest.raises(PartialTaken):
        sink.sha256(NEVER, lambda _: None)


def test_a_cancelled_wait_for_the_hash_ends(tmp_path: Path) -> None:
    partial = Partial.begin(tmp_path, len(CONTENT))
    sink = hashed(partial)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(EnsureCancelled):
        sink.sha256(cancel, lambda _: None)
    sink.stop()


def test_a_disk_that_gives_nothing_back_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    partial = Partial.begin(tmp_path, len(CONTENT))
    put(partial, 0, len(CONTENT))
    go_on = threading.Event()

    def keep(*_: object) -> int:
        assert go_on.wait(60)
        return 0

    with mock.patch("os.preadv", keep):
        sink = HashedPartial(partial, RangeTuning(reorder_bytes=0, patience_s=0.3))
        try:
            with pytest.raises(PartialWriteFailed, match="did not answer"):
                sink.sha256(NEVER, lambda _: None)
        finally:
            go_on.set()
            sink.stop()


def test_nothing_is_written_after_the_file_was_judged(tmp_path: Path) -> None:
    """A connection that was given up is still in a write when everything else has come."""
    writing, go_on, settled = threading.Event(), threading.Event(), threading.Event()
    real = os.pwrite

    def slow(fd: int, view: memoryview, offset: int) -> int:
        if offset == 0 and not writing.is_set():
            writing.set()
            assert go_on.wait(30)
        return real(fd, view, offset)

    partial = Partial.begin(tmp_path, len(CONTENT))
    sink = hashed(partial)
    found: list[str] = []

    def judge() -> None:
        partial.settle()
        settled.set()
        found.append(sink.sha256(NEVER, lambda _: None))

    with mock.patch("os.pwrite", slow):
        late = threading.Thread(target=put, args=(sink, 0, BLOCK, bytes(BLOCK)))
        late.start()
        assert writing.wait(30)
        for start, end in blocks():
            put(sink, start, end)
        judging = threading.Thread(target=judge)
        judging.start()
        assert not settled.wait(0.3)
        go_on.set()
        late.join(30)
        judging.join(30)
    sink.stop()
    assert found == [hashlib.sha256(bytes(BLOCK) + CONTENT[BLOCK:]).hexdigest()]
