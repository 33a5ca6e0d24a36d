"""Our loop in place of the SDK's, at moments that no process can be brought to on purpose; and which SDKs it fits."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import runpod
from runpod.serverless.modules import rp_job, rp_scale
from runpod.serverless.modules.worker_state import JobsProgress

from devkit.control_plane import ControlPlane, ProductionWorker
from worker.base.clock import RunningClock
from worker.errors import SdkUnknown
from worker.sdk import job_loop as job_loop_module
from worker.sdk.job_loop import JobLoop
from worker.sdk.parts import check_sdk

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from devkit.engine.build import Engine

    Run = Callable[[Coroutine[Any, Any, Any]], Any]

JOB = {"id": "a", "input": {}}


async def endless(_: dict[str, Any]) -> dict[str, Any]:
    """A handler whose jobs end when they are stopped."""
    await asyncio.sleep(600)
    raise AssertionError("nobody stopped it")


@pytest.fixture(autouse=True)
def no_jobs() -> Iterator[None]:
    """The SDK's count of jobs is one for the process; what a test's end leaves in it is none of the next one's."""
    yield
    JobsProgress().clear()


def in_progress() -> str | None:
    """The ids of the jobs that the SDK tells RunPod of."""
    ids: str | None = JobsProgress().get_job_list()
    return ids


def attached(handler: Callable[[dict[str, Any]], Any] = endless) -> JobLoop:
    loop = JobLoop({"handler": handler}, RunningClock())
    loop._loop = asyncio.get_running_loop()
    loop._free.set()
    return loop


def test_connections_from_before_a_freeze_are_closed_once_nothing_can_arrive_on_them(run_async: Run) -> None:
    async def scenario() -> None:
        loop, made = attached(), []
        with mock.patch.object(job_loop_module, "_OLD_S", 0.5):
            for _ in range(3):
                loop._connect_anew()
                made.append(loop.session)
            closing = list(loop._closing.values())
            assert [session.closed for session in made] == [False] * 3
            await asyncio.wait_for(asyncio.gather(*closing), 30)
        assert [session.closed for session in made] == [True, True, False]
        assert not loop._closing
        await loop.session.close()

    run_async(scenario())


@pytest.mark.parametrize("turns", range(5))
def test_a_worker_that_fails_while_its_first_poll_begins_makes_it_and_leaves(turns: int, run_async: Run) -> None:
    async def scenario() -> None:
        failed, polls = False, 0

        async def poll() -> list[dict[str, Any]]:
            nonlocal polls
            polls += 1
            return []

        loop = JobLoop({"handler": endless}, RunningClock(), lambda: failed)
        loop._loop = asyncio.get_running_loop()
        loop._free.set()
        with mock.patch.object(loop, "_ask", poll):
            jobs = asyncio.create_task(loop.get_jobs(None))  # type: ignore[arg-type]  # nothing is sent
            for _ in range(turns):
                await asyncio.sleep(0)
            failed = True
            loop.leave()
            await asyncio.wait_for(jobs, 30)
        assert polls >= 1
        assert not loop.is_alive()

    run_async(scenario())


def test_a_job_that_is_stopped_before_its_first_step_is_forgotten_and_the_next_one_is_asked_for(run_async: Run) -> None:
    async def scenario() -> None:
        loop = attached()
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # no result is sent
        assert not loop._free.is_set()
        loop.jobs_tasks["a"].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (loop.jobs_tasks, in_progress()) == ({}, None)
        assert loop._free.is_set()
        await asyncio.wait_for(loop.jobs_queue.join(), 1)

    run_async(scenario())


def test_a_job_that_is_stopped_while_it_runs_is_counted_once(run_async: Run) -> None:
    async def scenario() -> None:
        loop = attached()
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # as above
        await asyncio.sleep(0.01)
        loop.jobs_tasks["a"].cancel()
        await asyncio.sleep(0.01)
        assert (loop.jobs_tasks, in_progress()) == ({}, None)
        assert loop._free.is_set()

    run_async(scenario())


def test_leaving_waits_for_the_job_that_was_taken(run_async: Run) -> None:
    async def scenario() -> None:
        loop = attached()
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # as above
        loop.leave()
        await asyncio.sleep(0.01)
        assert loop.is_alive()
        loop.jobs_tasks["a"].cancel()
        await asyncio.sleep(0.01)
        assert not loop.is_alive()

    run_async(scenario())


# --- the result that has the worker replaced ----------------------------------------------------


async def taken(*names: str) -> JobLoop:
    """A loop with these jobs under way."""
    loop = attached()
    for name in names:
        await loop._begin(None, {"id": name, "input": {}})  # type: ignore[arg-type]  # no result is sent
    return loop


async def settled(*tasks: asyncio.Task[bool]) -> list[bool | None]:
    """What they say once nothing moves any more; None for one that waits."""
    for _ in range(10):
        await asyncio.sleep(0)
    return [task.result() if task.done() else None for task in tasks]


def asking(loop: JobLoop, name: str, *, asks: bool = True) -> asyncio.Task[bool]:
    return asyncio.create_task(loop.is_last(name, asks=asks))


def test_a_result_that_asks_for_a_new_worker_waits_for_those_on_their_way(run_async: Run) -> None:
    async def scenario() -> None:
        loop = await taken("a", "b", "c")
        assert await settled(asking(loop, "a", asks=False), asking(loop, "b", asks=False)) == [False, False]
        last = asking(loop, "c")
        assert await settled(last) == [None]
        loop._taken["a"].cancel()
        assert await settled(last) == [None]
        loop._taken["b"].cancel()
        assert await settled(last) == [True]
        assert loop._leaving.is_set()

    run_async(scenario())


def test_a_job_that_still_works_asks_in_place_of_the_one_before(run_async: Run) -> None:
    async def scenario() -> None:
        loop = await taken("a", "b")
        assert await settled(asking(loop, "a")) == [False], "it is sent at once"
        later = asking(loop, "b", asks=False)
        assert await settled(later) == [None], "the first result is on its way"
        loop._taken["a"].cancel()
        assert await settled(later) == [True]

    run_async(scenario())


def test_a_job_that_comes_on_the_last_poll_asks_in_place_of_the_one_that_waits(run_async: Run) -> None:
    async def scenario() -> None:
        loop = await taken("a")
        loop._polls = 1
        first = asking(loop, "a")
        assert await settled(first) == [None], "the poll may bring a job"
        await loop._begin(None, {"id": "b", "input": {}})  # type: ignore[arg-type]  # as above
        second = asking(loop, "b")
        loop._polls = 0
        loop._moved.set()
        assert await settled(first, second) == [False, None]
        loop._taken["a"].cancel()
        assert await settled(second) == [True]

    run_async(scenario())


def test_the_wait_for_another_result_ends(run_async: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_loop_module, "_SETTLE_S", 0.05)

    async def scenario() -> None:
        loop = await taken("a", "b")
        assert not await loop.is_last("a", asks=False)
        assert not await loop.is_last("b", asks=True), "the pod is never stopped while a result is on its way"

    run_async(scenario())


def test_a_worker_that_nobody_wants_replaced_is_not(run_async: Run) -> None:
    async def scenario() -> None:
        loop = await taken("a")
        assert not await loop.is_last("a", asks=False)
        assert not loop._leaving.is_set()

    run_async(scenario())


def test_a_job_that_comes_again_while_it_is_being_stopped_is_begun_again(run_async: Run) -> None:
    async def slow(job: dict[str, Any]) -> dict[str, Any]:
        try:
            return await endless(job)
        finally:
            await asyncio.sleep(0.02)  # an upload that is being stopped

    async def scenario() -> None:
        loop = attached(slow)
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # as above
        await asyncio.sleep(0.01)
        first = loop._taken["a"]
        first.cancel()
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # as above
        assert first.cancelled()
        assert loop._taken["a"] is not first
        assert in_progress() == "a"
        loop._taken["a"].cancel()
        await asyncio.sleep(0.05)
        assert in_progress() is None

    run_async(scenario())


def test_a_job_that_comes_twice_is_begun_once(run_async: Run) -> None:
    async def scenario() -> None:
        loop = attached()
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # as above
        await loop._begin(None, JOB)  # type: ignore[arg-type]  # as above
        assert in_progress() == "a"
        loop.jobs_tasks["a"].cancel()
        await asyncio.sleep(0.01)
        assert in_progress() is None

    run_async(scenario())


# --- which SDKs it fits -------------------------------------------------------------------------


def test_the_installed_sdk_is_one_that_the_loop_was_written_for() -> None:
    check_sdk()


def test_an_sdk_of_another_shape_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rp_scale.JobScaler, "handle_job", lambda job: job)
    monkeypatch.delattr(rp_job, "get_stop_signals")
    with pytest.raises(SdkUnknown, match=r'rp_scale\.JobScaler\.handle_job, .*rp_job\.get_stop_signals\): install "runpod~='):
        check_sdk()


def test_an_sdk_whose_loop_keeps_its_books_elsewhere_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK has no types
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            del self.jobs_tasks

    monkeypatch.setattr(rp_scale, "JobScaler", Other)
    with pytest.raises(SdkUnknown, match="jobs_tasks"):
        check_sdk()


def test_the_newest_sdk_on_the_index_runs_the_loop_as_well(engine: Engine, tmp_path: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--target",
        str(tmp_path / "sdk"),
        "runpod",
    ]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"the package index cannot be reached: {installed.stderr.strip().splitlines()[-1:]}")
    if list((tmp_path / "sdk").glob(f"runpod-{runpod.__version__}.dist-info")):
        pytest.skip(f"{runpod.__version__} is the newest, which every other test runs on")
    (tmp_path / "volume").mkdir()
    paths = os.pathsep.join([str(tmp_path / "sdk"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        ControlPlane(poll_s=600.0) as plane,
        ProductionWorker(plane, engine, tmp_path, tmp_path / "volume", {"PYTHONPATH": paths}) as pod,
    ):
        pod.wait_ready()
        image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}}
        saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sdk"}}
        assert plane.submit({"workflow": {"1": image, "2": saved}}).result(60)["status"] == "COMPLETED", pod.log_tail()
        assert pod.stop(timeout_s=30) == 0
        assert "leaving: " in pod.log()
