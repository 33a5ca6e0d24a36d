"""What the SDK's job loop is made to do, at moments that no process can be brought to on purpose."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from worker.base.clock import RunningClock
from worker.sdk import job_loop as intake_module
from worker.sdk.job_loop import Intake

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import pytest

    Run = Callable[[Coroutine[Any, Any, Any]], Any]

JOB = {"id": "a", "input": {}}


class Scaler:
    """The parts of the SDK's JobScaler that the intake uses."""

    def __init__(self) -> None:
        self.jobs_queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=9)
        self.jobs_tasks: dict[str, asyncio.Task[None]] = {}
        self.job_progress = self
        self.in_progress: list[str] = []
        self.killed = False

    def add(self, job: dict[str, Any]) -> None:
        self.in_progress.append(job["id"])

    def remove(self, job: dict[str, Any]) -> None:
        self.in_progress.remove(job["id"])

    def kill_worker(self) -> None:
        self.killed = True

    async def handle_job(self, _: object, job: dict[str, Any]) -> None:
        """As the SDK's: whatever happens, the job is taken off its books."""
        try:
            await asyncio.sleep(60)
        finally:
            self.jobs_queue.task_done()
            self.remove(job)
            self.jobs_tasks.pop(job["id"], None)


def attached() -> tuple[Intake, Scaler]:
    intake, scaler = Intake(RunningClock()), Scaler()
    intake._scaler, intake._loop = scaler, asyncio.get_running_loop()
    intake._free.set()
    return intake, scaler


def test_a_job_that_is_stopped_before_its_first_step_is_forgotten_and_the_next_one_is_asked_for(run_async: Run) -> None:
    async def scenario() -> None:
        intake, scaler = attached()
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # the scaler's own session
        assert not intake._free.is_set()
        scaler.jobs_tasks["a"].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (scaler.jobs_tasks, scaler.in_progress) == ({}, [])
        assert intake._free.is_set()
        await asyncio.wait_for(scaler.jobs_queue.join(), 1)

    run_async(scenario())


def test_a_job_that_is_stopped_while_it_runs_is_counted_once(run_async: Run) -> None:
    async def scenario() -> None:
        intake, scaler = attached()
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # as above
        await asyncio.sleep(0.01)
        scaler.jobs_tasks["a"].cancel()
        await asyncio.sleep(0.01)
        assert (scaler.jobs_tasks, scaler.in_progress) == ({}, [])
        assert intake._free.is_set()

    run_async(scenario())


def test_leaving_waits_for_the_job_that_was_taken(run_async: Run) -> None:
    async def scenario() -> None:
        intake, scaler = attached()
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # as above
        intake.leave()
        await asyncio.sleep(0.01)
        assert not scaler.killed
        scaler.jobs_tasks["a"].cancel()
        await asyncio.sleep(0.01)
        assert scaler.killed

    run_async(scenario())


# --- the result that has the worker replaced ----------------------------------------------------


async def taken(*names: str) -> Intake:
    """An intake with these jobs under way."""
    intake, _ = attached()
    for name in names:
        await intake._begin(None, {"id": name, "input": {}})  # type: ignore[arg-type]  # the scaler's own session
    return intake


async def settled(*tasks: asyncio.Task[bool]) -> list[bool | None]:
    """What they say once nothing moves any more; None for one that waits."""
    for _ in range(10):
        await asyncio.sleep(0)
    return [task.result() if task.done() else None for task in tasks]


def asking(intake: Intake, name: str, *, asks: bool = True) -> asyncio.Task[bool]:
    return asyncio.create_task(intake.is_last(name, asks=asks))


def test_a_result_that_asks_for_a_new_worker_waits_for_those_on_their_way(run_async: Run) -> None:
    async def scenario() -> None:
        intake = await taken("a", "b", "c")
        assert await settled(asking(intake, "a", asks=False), asking(intake, "b", asks=False)) == [False, False]
        last = asking(intake, "c")
        assert await settled(last) == [None]
        intake._taken["a"].cancel()
        assert await settled(last) == [None]
        intake._taken["b"].cancel()
        assert await settled(last) == [True]
        assert intake._leaving.is_set()

    run_async(scenario())


def test_a_job_that_still_works_asks_in_place_of_the_one_before(run_async: Run) -> None:
    async def scenario() -> None:
        intake = await taken("a", "b")
        assert await settled(asking(intake, "a")) == [False], "it is sent at once"
        later = asking(intake, "b", asks=False)
        assert await settled(later) == [None], "the first result is on its way"
        intake._taken["a"].cancel()
        assert await settled(later) == [True]

    run_async(scenario())


def test_a_job_that_comes_on_the_last_poll_asks_in_place_of_the_one_that_waits(run_async: Run) -> None:
    async def scenario() -> None:
        intake = await taken("a")
        intake._polls = 1
        first = asking(intake, "a")
        assert await settled(first) == [None], "the poll may bring a job"
        await intake._begin(None, {"id": "b", "input": {}})  # type: ignore[arg-type]  # as above
        second = asking(intake, "b")
        intake._polls = 0
        intake._moved.set()
        assert await settled(first, second) == [False, None]
        intake._taken["a"].cancel()
        assert await settled(second) == [True]

    run_async(scenario())


def test_the_wait_for_another_result_ends(run_async: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_SETTLE_S", 0.05)

    async def scenario() -> None:
        intake = await taken("a", "b")
        assert not await intake.is_last("a", asks=False)
        assert not await intake.is_last("b", asks=True), "the pod is never stopped while a result is on its way"

    run_async(scenario())


def test_a_worker_that_nobody_wants_replaced_is_not(run_async: Run) -> None:
    async def scenario() -> None:
        intake = await taken("a")
        assert not await intake.is_last("a", asks=False)
        assert not intake._leaving.is_set()

    run_async(scenario())


def test_a_job_that_comes_again_while_it_is_being_stopped_is_begun_again(run_async: Run) -> None:
    class Slow(Scaler):
        async def handle_job(self, session: object, job: dict[str, Any]) -> None:
            try:
                await super().handle_job(session, job)
            finally:
                await asyncio.sleep(0.02)  # an upload that is being stopped

    async def scenario() -> None:
        intake, scaler = Intake(RunningClock()), Slow()
        intake._scaler, intake._loop = scaler, asyncio.get_running_loop()
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # as above
        await asyncio.sleep(0)
        first = intake._taken["a"]
        first.cancel()
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # as above
        assert first.cancelled()
        assert intake._taken["a"] is not first
        assert scaler.in_progress == ["a"]
        intake._taken["a"].cancel()
        await asyncio.sleep(0.05)
        assert scaler.in_progress == []

    run_async(scenario())


def test_a_job_that_comes_twice_is_begun_once(run_async: Run) -> None:
    async def scenario() -> None:
        intake, scaler = attached()
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # as above
        await intake._begin(None, JOB)  # type: ignore[arg-type]  # as above
        assert scaler.in_progress == ["a"]
        scaler.jobs_tasks["a"].cancel()
        await asyncio.sleep(0.01)
        assert scaler.in_progress == []

    run_async(scenario())
