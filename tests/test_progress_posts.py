"""A job's progress on its way to its client: throttled, in order, over before the result; and what a client then sees.

The unmodified SDK in production mode against a stand-in of RunPod. First in front of a handler that does as the job says, so
that what is told, and when, is known; then of this project's worker with a real ComfyUI that samples.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.control_plane import JobHandle
    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]

EVERY_S = 1.0
"""At most one update in this time."""
WAIT_S = 60.0
NEVER_S = 600.0
"""Longer than any test waits."""
SAMPLING = {"type", "value", "max", "percent", "node"}

# The worker's side of the SDK, as it is, in front of a handler that tells `first` updates, waits for the test where it is to
# `hold`, silent or with an update every 10 ms, then tells `last` updates at once and returns how many there were.
PROGRAM = """
    import asyncio, os
    from pathlib import Path
    from types import SimpleNamespace
    from worker.base.clock import RunningClock
    from worker.engine.event_loop import LoopThread
    from worker.sdk.arguments import prepare_environ
    from worker.sdk.imports import import_sdk

    class Handler:
        refreshes = False

        async def handle(self, job, tell, engine_free):
            ask, told = job["input"], 0
            go = Path(__file__).with_name(job["id"])

            def say():
                nonlocal told
                told += 1
                tell({"number": told})

            for _ in range(ask["first"]):
                say()
            while ask["hold"] and not go.exists():
                await asyncio.sleep(0.01)
                if ask["hold"] == "telling":
                    say()
            for _ in range(ask["last"]):
                say()
            return {"told": told}

    if __name__ == "__main__":
        prepare_environ(os.environ)
        import_sdk([], os.environ)
        from worker.sdk.serve import serve
        worker = SimpleNamespace(loop=LoopThread("engine-loop"), handler=Handler(), clock=RunningClock(), failed=False)
        serve(worker, [], os.environ)
"""


class Pod:
    """The program as one pod of a control plane."""

    def __init__(self, folder: Path) -> None:
        self.plane = ControlPlane(poll_s=20)
        self._folder = folder
        program = folder / "program.py"
        program.write_text(textwrap.dedent(PROGRAM))
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            env={**environ, **self.plane.environ("pod-1"), "PYTHONPATH": str(PROJECT)},
            cwd=folder,
        )

    def submit(self, *, first: int = 0, hold: str = "", last: int = 0) -> JobHandle:
        return self.plane.submit({"first": first, "hold": hold, "last": last})

    def go(self, job: JobHandle) -> None:
        (self._folder / job.id).touch()

    def close(self) -> None:
        self.plane.kill_pod("pod-1")
        self._process.wait(30)
        self.plane.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    running = Pod(tmp_path_factory.mktemp("pod"))
    running.plane.wait_polling(timeout_s=WAIT_S)
    yield running
    running.close()


@pytest.fixture
def pod(shared: Pod) -> Iterator[Pod]:
    yield shared
    shared.plane.clear_faults()
    for job in shared.plane.jobs:  # a test that failed leaves nothing that the next one would wait for
        shared.go(job)


def numbers(job: JobHandle) -> list[int]:
    return [update.value["number"] for update in job.updates]


def posts(job: JobHandle) -> list[str]:
    return [post.kind for post in job.posts]


def check_over(job: JobHandle) -> int:
    """One result, after everything else; how many updates were told."""
    result = job.result(WAIT_S)
    assert result["status"] == "COMPLETED"
    assert (job.answers, job.late_updates, posts(job)[-1]) == (1, [], "result")
    told: int = result["output"]["told"]
    return told


def check_silent(job: JobHandle, pod: Pod) -> None:
    """Nothing more is posted about it while another job posts three times, which takes two seconds."""
    pod.plane.clear_faults()
    posted = posts(job)
    other = pod.submit(first=1, hold="telling")
    pod.plane.wait_until(lambda: len(other.updates) >= 3, WAIT_S)
    assert posts(job) == posted
    pod.go(other)
    check_over(other)


@pytest.mark.parametrize("delay_s", [0.0, 0.4])
def test_of_many_updates_the_latest_is_posted_once_a_second_and_in_order(delay_s: float, pod: Pod) -> None:
    if delay_s:
        pod.plane.fault("slow", "progress", delay_s=delay_s, count=None)
    job = pod.submit(first=1, hold="telling")
    pod.plane.wait_until(lambda: len(job.updates) >= 3, WAIT_S)
    pod.go(job)
    told = check_over(job)
    assert numbers(job)[0] == 1  # the first at once
    assert numbers(job) == sorted(set(numbers(job)))
    assert len(job.updates) < told
    gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(job.updates)]
    assert min(gaps) >= EVERY_S + delay_s - 0.01  # a timer may be a tick early


def test_the_result_waits_for_the_post_that_is_under_way_and_for_no_newer_one(pod: Pod) -> None:
    pod.plane.fault("slow", "progress", delay_s=4.0, count=None)
    job = pod.submit(first=1, hold="silent", last=5)
    pod.plane.wait_until(lambda: bool(job.updates), WAIT_S)
    pod.go(job)
    assert check_over(job) == 6
    assert (numbers(job), posts(job)) == ([1], ["progress", "result"])
    progress, result = job.posts
    assert result.at_s - progress.at_s >= 4.0
    check_silent(job, pod)


def test_updates_that_come_at_once_with_the_end_are_one_or_none(pod: Pod) -> None:
    job = pod.submit(last=50)
    assert check_over(job) == 50
    assert len(numbers(job)) <= 1


def test_a_job_that_tells_nothing_posts_nothing(pod: Pod) -> None:
    job = pod.submit()
    assert check_over(job) == 0
    assert posts(job) == ["result"]


def test_an_endpoint_that_does_not_answer_holds_a_result_up_for_a_while_only(pod: Pod) -> None:
    pod.plane.fault("slow", "progress", delay_s=NEVER_S, count=None)
    job = pod.submit(first=1, hold="silent", last=1)
    pod.plane.wait_until(lambda: bool(job.updates), WAIT_S)
    pod.go(job)
    assert check_over(job) == 2
    assert numbers(job) == [1]


def test_progress_that_is_refused_costs_no_job(pod: Pod) -> None:
    refused = pod.plane.fault("status", "progress", status=500, count=None)
    job = pod.submit(first=1, hold="silent", last=1)
    pod.plane.wait_until(lambda: refused.fired > 0, WAIT_S)
    pod.go(job)
    assert check_over(job) == 2
    assert job.updates == []


def test_a_cancelled_job_posts_no_more(pod: Pod) -> None:
    job = pod.submit(first=1, hold="telling")
    pod.plane.wait_until(lambda: len(job.updates) >= 1, WAIT_S)
    pod.plane.cancel(job.id)
    following = pod.submit()  # taken when the cancelled one has ended
    check_over(following)
    check_silent(job, pod)


# --- what a client sees of a real run ------------------------------------------------------------


def status(plane: ControlPlane, job: JobHandle) -> dict[str, Any]:
    """What GET /status answers."""
    request = urllib.request.Request(f"{plane.url}/status/{job.id}", headers={"Authorization": "Bearer k"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        shown: dict[str, Any] = json.load(response)
        return shown


def test_a_client_that_polls_sees_the_sampling_in_the_node_that_samples(engine: Engine, tmp_path: Path, workflow: Load) -> None:
    graph = workflow("text_to_image")
    sampler = next(node_id for node_id, node in graph.items() if node["class_type"] == "KSampler")
    graph[sampler]["inputs"]["steps"] = 10_000
    with (
        ControlPlane(poll_s=20) as plane,
        ProductionWorker(plane, engine, tmp_path, make_volume(engine, tmp_path / "volume")) as worker,
    ):
        worker.wait_ready()
        job = plane.submit({"workflow": graph})
        seen: list[dict[str, Any]] = []
        while len(seen) < 3:
            plane.wait_until(lambda: len(job.updates) > len(seen), WAIT_S)
            shown = status(plane, job)
            assert shown["status"] == "IN_PROGRESS", shown
            seen.append(shown["output"])
        plane.cancel(job.id)
    for output in seen:
        assert set(output) == SAMPLING
        assert (output["type"], output["max"], output["node"]) == ("progress", 10_000, sampler)
        assert 0 < output["value"] < 10_000
        assert output["percent"] == round(100 * output["value"] / 10_000, 1)
    values = [output["value"] for output in seen]
    assert values == sorted(set(values))
