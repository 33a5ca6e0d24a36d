"""The window that bounds a relay's memory: in any order in, in order out, and never stuck."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.seed.window import Window, WindowClosed, WindowPart

READER = object()


def content(size_bytes: int) -> bytes:
    return bytes(random.Random(size_bytes).randbytes(size_bytes))


def put(window: Window, data: bytes, start: int, end: int) -> None:
    window.write(start, memoryview(data)[start:end])


@given(size=st.integers(0, 60), part=st.integers(1, 9), width=st.integers(1, 4), seed=st.integers())
def test_bytes_written_in_any_order_within_reach_come_out_in_order(size: int, part: int, width: int, seed: int) -> None:
    data, chance = content(size), random.Random(seed)
    window = Window(size, part, width, [READER])
    out: list[bytes] = []
    held: list[WindowPart] = []
    parts = window.in_order()
    todo = list(range(size))
    while len(out) < window.count:
        within = [at for at in todo if at < window.reach()]
        chance.shuffle(within)
        for at in within:
            todo.remove(at)
            put(window, data, at, at + 1)
        if min(size, (len(out) + 1) * part) <= window.reach():
            held.append(next(parts))
            out.append(bytes(held[-1].buffer))
        if held and (chance.random() < 0.5 or len(held) == width):
            window.release(held.pop(chance.randrange(len(held))), READER)
        assert len(held) <= width
    assert b"".join(out) == data
    assert window.gaps() == []
    assert window.done_bytes == size


def test_buffers_are_used_again_also_by_the_next_window() -> None:
    spare: list[bytearray] = []
    for size in (40, 35):
        window, data = Window(size, 10, 2, [READER], spare), content(size)
        parts = window.in_order()
        for start in range(0, size, 10):
            put(window, data, start, min(size, start + 10))
            part = next(parts)
            assert bytes(part.buffer) == data[start : start + 10]
            window.release(part, READER)
        assert len(spare) == 1
    assert Window(100, 20, 2, [READER], spare).gaps() == [(0, 100)]
    assert spare == []  # these were of another size


def test_a_part_is_free_when_every_reader_let_go() -> None:
    one, other = object(), object()
    window = Window(20, 10, 1, [one, other])
    put(window, content(20), 0, 10)
    part = next(window.in_order())
    window.release(part, one)
    assert window.reach() == 10
    window.release(part, other)
    assert window.reach() == 20


def test_who_writes_too_far_ahead_waits_and_is_let_go_when_it_is_closed() -> None:
    window = Window(30, 10, 1, [READER])
    ended = threading.Event()

    def write() -> None:
        with pytest.raises(WindowClosed):
            put(window, content(30), 10, 20)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not window.held_within(10):
        writer.join(0.01)
    assert writer.is_alive()
    window.close()
    writer.join(10)
    assert ended.is_set()
    with pytest.raises(WindowClosed):
        next(window.in_order())


def test_bytes_that_come_twice_change_nothing() -> None:
    window = Window(20, 10, 2, [READER])
    put(window, content(20), 0, 10)
    put(window, bytes(20), 0, 10)
    part = next(window.in_order())
    assert bytes(part.buffer) == content(20)[:10]
    window.release(part, READER)
    put(window, bytes(20), 0, 10)
    assert window.gaps() == [(10, 20)]
