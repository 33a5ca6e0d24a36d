"""Which connection fetches what: by a clock that the test moves, without a socket."""

from __future__ import annotations

import pytest

from worker.fetch.spans import Pull, Spans

MIB = 1024 * 1024


class Run:
    """Connections with a rate each, on one file; `go` lets time pass."""

    def __init__(self, size_bytes: int, rates: list[int], *, smallest_bytes: int = 4 * MIB) -> None:
        self.spans = Spans([(0, size_bytes)], len(rates), 16 * MIB, smallest_bytes)
        self.size_bytes = size_bytes
        self.rates = rates
        self.pulls: list[Pull | None] = [None] * len(rates)
        self.came: list[tuple[int, int]] = []
        self.cuts = 0
        self.now_s = 0.0

    def go(self, tick_s: float = 0.1) -> None:
        for owner in range(len(self.rates)):
            self.pulls[owner] = self.pulls[owner] or self.spans.take(owner, self.size_bytes, self.now_s)
        self.now_s += tick_s
        for owner, rate in enumerate(self.rates):
            if pull := self.pulls[owner]:
                at = pull.at
                length = self.spans.came(pull, int(rate * tick_s), self.now_s)
                self.came.append((at, at + length))
                if pull.left == 0:
                    self._end(owner)
        for pull in self.spans.laggards(8 * 1024, self.now_s):
            self.cuts += 1
            self._end(pull.owner)

    def _end(self, owner: int) -> None:
        if pull := self.pulls[owner]:
            self.spans.end(pull, self.now_s)
            self.pulls[owner] = None

    def until_done(self, limit_s: float) -> float:
        while not self.spans.is_done:
            self.go()
            assert self.now_s < limit_s
        return self.now_s


def covered(ranges: list[tuple[int, int]], size_bytes: int) -> bool:
    """Whether they are the whole file, each byte once."""
    at = 0
    for start, end in sorted(found for found in ranges if found[0] < found[1]):
        if start != at:
            return False
        at = end
    return at == size_bytes


@pytest.mark.parametrize("slow", [1, 2000, 20_000, 200_000])
def test_one_slow_connection_of_eight_costs_little(slow: int) -> None:
    even = Run(64 * MIB, [5 * MIB] * 8).until_done(60)
    run = Run(64 * MIB, [slow, *[5 * MIB] * 7])
    assert run.until_done(60) < even + 2
    assert covered(run.came, 64 * MIB)


def test_a_second_connection_helps_where_the_only_one_is_slow() -> None:
    run = Run(3 * MIB, [20_000, MIB])
    assert run.until_done(60) < 8
    assert covered(run.came, 3 * MIB)


def test_equal_connections_end_together_without_cutting_each_other() -> None:
    run = Run(64 * MIB, [MIB] * 8)
    assert run.until_done(60) < 11
    assert run.cuts == 0
    assert covered(run.came, 64 * MIB)


def test_a_source_that_halts_as_a_whole_is_asked_a_few_times_more_and_no_more() -> None:
    run = Run(16 * MIB, [MIB] * 4)
    for _ in range(25):
        run.go()
    run.rates[:] = [0] * 4
    for _ in range(600):
        run.go()
    assert run.cuts < 40
    run.rates[:] = [MIB] * 4
    run.until_done(90)
    assert covered(run.came, 16 * MIB)


def test_a_slow_connection_is_made_anew_while_there_is_more_to_fetch() -> None:
    run = Run(2000 * MIB, [20_000, *[10 * MIB] * 7])
    for _ in range(50):
        run.go()
    assert run.cuts >= 1


def test_time_that_the_sink_takes_makes_no_connection_slow() -> None:
    run = Run(2000 * MIB, [10 * MIB] * 8)
    run.go()
    first = run.pulls[0]
    assert first is not None
    first.pause(run.now_s)
    run.rates[0] = 0
    for _ in range(100):
        run.go()
    assert run.cuts == 0


def test_what_is_left_of_a_range_is_handed_out_before_what_is_behind_it() -> None:
    spans = Spans([(0, 32 * MIB)], 2, 4 * MIB, 4 * MIB)
    first, second = spans.take(0, 32 * MIB, 0), spans.take(1, 32 * MIB, 0)
    assert first
    assert second
    spans.came(first, MIB, 1)
    spans.end(first, 1)
    again = spans.take(0, 32 * MIB, 1)
    assert again is not None
    assert (again.at, again.end) == (MIB, 4 * MIB)


def test_nothing_beyond_what_the_sink_can_take_is_handed_out() -> None:
    spans = Spans([(0, 32 * MIB)], 2, 4 * MIB, 4 * MIB)
    first = spans.take(0, 2 * MIB, 0)
    assert first is not None
    assert first.end == 2 * MIB
    assert spans.take(1, 2 * MIB, 0.1) is None


def test_the_one_who_waits_at_the_edge_of_the_sink_takes_over_from_whoever_holds_it_up() -> None:
    spans = Spans([(0, 32 * MIB)], 2, 4 * MIB, 4 * MIB)
    slow, fast = spans.take(0, 8 * MIB, 0), spans.take(1, 8 * MIB, 0)
    assert slow
    assert fast
    spans.came(slow, 100, 0.5)
    spans.came(fast, 4 * MIB, 0.5)
    spans.end(fast, 0.5)
    taken = spans.take(1, 8 * MIB, 1.5)
    assert taken is not None
    assert (taken.at, taken.end, slow.end, slow.cut) == (100, 4 * MIB, 100, True)
    assert spans.came(slow, 5000, 2) == 0, "what comes late belongs to another connection"
