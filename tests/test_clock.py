"""Time that passed for the worker: freezes do not count, and are told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from worker.base.clock import RunningClock, within

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Machine:
    """Two clocks of a machine, moved by hand."""

    def __init__(self) -> None:
        self.monotonic_s, self.wall_s = 100.0, 1_700_000_000.0

    def clock(self) -> RunningClock:
        clock = RunningClock(monotonic=lambda: self.monotonic_s, wall=lambda: self.wall_s)
        clock._ticking = True
        return clock

    def passes(self, seconds: float, *, step_s: float = 0.5, clock: RunningClock | None = None) -> None:
        for _ in range(round(seconds / step_s)):
            self.monotonic_s += step_s
            self.wall_s += step_s
            if clock:
                clock.notice()


def test_time_counts_while_the_process_runs_and_not_while_it_is_frozen() -> None:
    machine = Machine()
    clock, told = machine.clock(), list[float]()
    clock.on_thaw(told.append)
    began_s = clock()
    machine.passes(10, clock=clock)
    assert clock() - began_s == pytest.approx(10)
    machine.passes(3600, step_s=3600)
    assert clock() - began_s == pytest.approx(10)  # known before the next tick
    machine.passes(5, clock=clock)
    assert clock() - began_s == pytest.approx(15)
    assert told == [pytest.approx(3600.5, abs=1)]


def test_a_wall_clock_that_jumps_ahead_is_a_freeze_and_costs_no_time() -> None:
    machine = Machine()
    clock, told = machine.clock(), list[float]()
    clock.on_thaw(told.append)
    began_s = clock()
    machine.wall_s += 3600
    clock.notice()
    assert (clock() - began_s, told) == (0, [3600])
    machine.wall_s -= 3600  # somebody set it right
    clock.notice()
    assert told == [3600]


def test_ticks_that_come_late_are_no_freeze() -> None:
    machine = Machine()
    clock, told = machine.clock(), list[float]()
    clock.on_thaw(told.append)
    began_s = clock()
    machine.passes(12, step_s=3, clock=clock)
    assert (clock() - began_s, told) == (12, [])


def test_a_clock_that_was_not_started_is_an_ordinary_one() -> None:
    machine = Machine()
    clock = RunningClock(monotonic=lambda: machine.monotonic_s, wall=lambda: machine.wall_s)
    began_s = clock()
    machine.passes(60, step_s=60)
    assert clock() - began_s == 60


def test_a_limit_by_this_clock_ends_when_the_time_has_passed_for_us(run_async: Run) -> None:
    passed = 0.0

    async def slow() -> None:
        nonlocal passed
        async with within(0.05, lambda: passed):
            await asyncio.sleep(0.3)
            assert passed == 0  # the loop's clock is past the limit, ours is not
            passed = 1.0
            await asyncio.sleep(60)

    async def ordinary(seconds: float) -> None:
        async with within(seconds, time.monotonic):
            await asyncio.sleep(0.01 if seconds else 60)

    run_async(ordinary(60))
    for late in (slow(), ordinary(0)):
        with pytest.raises(TimeoutError):
            run_async(late)


def test_a_process_that_was_stopped_knows_it() -> None:
    code = (
        "import time\n"
        "from worker.base.clock import RunningClock\n"
        "clock = RunningClock(late_s=1.5).start()\n"
        "clock.on_thaw(lambda seconds: print(f'frozen {seconds:.1f} after {clock() - began:.1f}', flush=True))\n"
        "began = clock()\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(4)
            os.kill(process.pid, signal.SIGCONT)
            word, frozen_s, _, after_s = process.stdout.readline().split()
            assert word == "frozen"
            assert float(frozen_s) >= 3.5
            assert float(after_s) < float(frozen_s)
        finally:
            process.kill()
