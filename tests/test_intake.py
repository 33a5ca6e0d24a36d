"""What the SDK's job loop is made to do, at moments that no process can be brought to on purpose."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from worker.intake import Intake

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

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
    intake, scaler = Intake(), Scaler()
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
