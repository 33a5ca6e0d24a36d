"""How a worker in production mode ends, and what becomes of its jobs: the real SDK, the real ComfyUI, a stand-in of RunPod."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args
from devkit.local_worker import PROJECT, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.control_plane.faults import FaultKind
    from devkit.engine.build import Engine

    Start = Callable[..., tuple[ControlPlane, ProductionWorker]]

LONG_S = 600.0
"""Longer than any test runs: what is not ended waits for ever."""


def tiny(colour: int, node: str | None = None, **inputs: Any) -> dict[str, Any]:
    """A job that needs no weights; with a node between, one that misbehaves."""
    graph: dict[str, Any] = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
    }
    if node:
        graph["3"] = {"class_type": node, "inputs": {"image": ["1", 0], "seed": colour, **inputs}}
        graph["2"]["inputs"]["images"] = ["3", 0]
    return {"workflow": graph}


@contextlib.contextmanager
def started(engine: Engine, folder: Path, **environ: str) -> Iterator[tuple[ControlPlane, ProductionWorker]]:
    """A pod whose polls are held longer than the test runs, with nodes that misbehave."""
    (folder / "volume").mkdir()
    flags = " ".join([*engine_args(engine), *nodes.FLAGS])
    with ControlPlane(poll_s=LONG_S) as plane:
        worker = ProductionWorker(plane, engine, folder, folder / "volume", {"COMFY_ARGS": flags, **environ})
        nodes.install(worker.base_dir)
        with worker:
            worker.wait_ready()
            yield plane, worker


@pytest.fixture
def start(engine: Engine, tmp_path: Path) -> Iterator[Start]:
    """Start a pod of the test's own."""
    with contextlib.ExitStack() as pods:
        yield lambda **environ: pods.enter_context(started(engine, tmp_path, **environ))


class Pod:
    """The pod that the tests share which leave it running: its plane, and what it said since the test began."""

    def __init__(self, plane: ControlPlane, worker: ProductionWorker) -> None:
        self.plane = plane
        self._worker = worker
        self._said_before = len(worker.log())

    def log(self) -> str:
        return self._worker.log()[self._said_before :]


@pytest.fixture(scope="module")
def kept(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlPlane, ProductionWorker]]:
    with started(engine, tmp_path_factory.mktemp("kept")) as pod:
        yield pod


@pytest.fixture
def pod(kept: tuple[ControlPlane, ProductionWorker]) -> Iterator[Pod]:
    plane, worker = kept
    yield Pod(plane, worker)
    plane.clear_faults()
    assert plane.submit(tiny(0)).result(60)["status"] == "COMPLETED", "the next test finds it able to serve"


def is_back(worker: ProductionWorker, times: int) -> bool:
    return worker.log().count("ComfyUI is back") == times


def test_an_idle_worker_leaves_at_once_though_its_polls_are_held(start: Start) -> None:
    plane, worker = start()
    assert worker.stop(timeout_s=30) == 0
    assert "leaving: no job to finish" in worker.log()
    assert not plane.is_polling()


def test_a_busy_worker_posts_its_result_before_it_leaves_and_takes_no_other_job(start: Start) -> None:
    plane, worker = start()
    busy = plane.submit(tiny(1, "FaultSleep", seconds=3.0))
    plane.wait_until(lambda: "got prompt" in worker.log())
    os.kill(worker.pid, signal.SIGTERM)
    plane.wait_until(lambda: "leaving: 1 job to finish first" in worker.log())
    later = plane.submit(tiny(2))
    assert busy.result(30)["status"] == "COMPLETED"
    assert worker.wait_exit(30) == 0
    assert (busy.answers, later.takes) == (1, [])


def test_the_next_job_is_taken_while_a_result_is_on_its_way(start: Start) -> None:
    plane, worker = start()
    plane.fault("slow", "result", delay_s=LONG_S)
    first, second = plane.submit(tiny(1)), plane.submit(tiny(2))
    assert second.result(30)["status"] == "COMPLETED"
    assert first.answers == 1
    assert worker.log().count("finished in") == 2
    worker.kill()


@pytest.mark.parametrize("kind", ["drop", "lose", "status"])
def test_a_result_that_does_not_get_through_is_sent_again(kind: FaultKind, pod: Pod) -> None:
    pod.plane.fault(kind, "result", count=5, status=503)
    job = pod.plane.submit(tiny(1))
    pod.plane.wait_until(lambda: len(job.posts) >= 6 or (kind == "drop" and job.answers > 0), 60)
    assert job.result(30)["status"] == "COMPLETED"
    assert "sending it again" in pod.log()


def test_a_node_that_calls_sys_exit_costs_one_job_and_no_time(start: Start) -> None:
    """It ends ComfyUI's thread that runs workflows, without a word of Python's, and ComfyUI goes on answering."""
    plane, worker = start(COMFY_HANG_TIMEOUT_S=f"{LONG_S:g}")
    result = plane.submit(tiny(1, "FaultDie", signal=0) | {"timeout_s": LONG_S}).result(200)
    assert (result["status"], result["output"]["code"]) == ("FAILED", "prompt_fatal")
    assert "SystemExit: a node ended itself" in result["error"]
    assert plane.submit(tiny(2)).result(200)["status"] == "COMPLETED"
    assert "is replaced: its thread that runs workflows ended" in worker.log()


@pytest.mark.parametrize("status", [400, 413])
def test_where_a_result_is_refused_the_client_is_told(status: int, pod: Pod) -> None:
    pod.plane.fault("status", "result", status=status)
    job = pod.plane.submit(tiny(1))
    result = job.result(30)
    assert result["status"] == "FAILED"
    assert f"status {status}" in result["error"]
    assert result["output"] == {"code": "result_refused", "retryable": False}
    assert "[result_refused]" in pod.log()
    assert pod.plane.submit(tiny(2)).result(30)["status"] == "COMPLETED"


def test_what_was_saved_before_a_node_failed_is_delivered(pod: Pod) -> None:
    job = tiny(1)
    job["workflow"]["3"] = {"class_type": "FaultDie", "inputs": {"image": ["1", 0], "seed": 1, "signal": -1}}
    job["workflow"]["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "never"}}
    result = pod.plane.submit({**job, "return_timings": True}).result(30)
    assert result["status"] == "COMPLETED"
    assert result["output"]["timings"]["running_s"] > 0
    assert [item["node_id"] for item in result["output"]["images"]] == ["2"]
    (error,) = result["output"]["errors"]
    assert error.startswith("Workflow execution error: Node Type: FaultDie, Node ID: 3, Message: Allocation on device")
    assert "delivering what there is" in pod.log()
    only = pod.plane.submit({**job, "outputs": ["4"]}).result(30)
    assert (only["status"], only["output"]["code"]) == ("FAILED", "out_of_memory")


def test_with_refresh_worker_each_job_asks_for_another_worker_and_the_worker_leaves(start: Start) -> None:
    plane, worker = start(REFRESH_WORKER="true")
    first, second = plane.submit(tiny(1)), plane.submit(tiny(2))
    assert first.result(30)["status"] == "COMPLETED"
    assert worker.wait_exit(30) == 0
    assert first.stop_pod
    assert (second.takes, plane.pods_to_stop) == ([], {"pod-1"})


def test_a_worker_whose_engine_dies_three_times_in_a_row_leaves_its_queue_to_others(start: Start) -> None:
    plane, worker = start()
    dying = [plane.submit(tiny(number, "FaultDie", signal=9)) for number in range(3)]
    waiting = plane.submit(tiny(9))
    results = [job.result(90) for job in dying]
    assert [result["output"]["code"] for result in results] == ["engine_died", "engine_died", "engine_gave_up"]
    assert "SIGKILL" in results[2]["error"]
    assert worker.wait_exit(30) == 1
    assert [job.stop_pod for job in dying] == [False, False, True]
    assert waiting.takes == []


def test_the_pod_is_not_stopped_while_another_jobs_result_is_on_its_way(start: Start) -> None:
    plane, worker = start()
    upload = plane.submit(tiny(1))
    plane.fault("status", "result", job=upload.id, status=503, count=None)
    plane.wait_until(lambda: "sending it again" in worker.log(), 60)
    dying = [plane.submit(tiny(number, "FaultDie", signal=9)) for number in range(3)]
    plane.wait_until(lambda: "engine_gave_up" in worker.log(), 90)
    tried = len(upload.posts)
    plane.wait_until(lambda: len(upload.posts) > tried, 60)
    assert (dying[2].answers, plane.pods_to_stop) == (0, set())
    plane.clear_faults()
    assert upload.result(30)["status"] == "COMPLETED"
    assert dying[2].result(30)["output"]["code"] == "engine_gave_up"
    assert [job.stop_pod for job in (upload, *dying)] == [False, False, False, True]
    assert upload.posts[-1].at_s < dying[2].posts[0].at_s
    assert worker.wait_exit(30) == 1


def test_a_job_that_succeeds_between_deaths_keeps_the_worker(pod: Pod) -> None:
    for number in range(3):
        dying = pod.plane.submit(tiny(number, "FaultDie", signal=11))
        assert dying.result(60)["output"]["code"] == "engine_died"
        assert pod.plane.submit(tiny(number)).result(60)["status"] == "COMPLETED"
    assert pod.log().count("ComfyUI is back") == 3


def test_a_node_that_runs_out_of_memory_is_told_apart_and_the_engine_lives(pod: Pod) -> None:
    result = pod.plane.submit(tiny(1, "FaultDie", signal=-1)).result(60)
    assert result["output"]["code"] == "out_of_memory"
    assert "Node ID: 3" in result["error"]
    assert "use a smaller size" in result["error"]
    assert pod.plane.submit(tiny(2)).result(60)["status"] == "COMPLETED"
    assert "ComfyUI is back" not in pod.log()


def test_an_engine_that_hangs_is_replaced_and_its_job_told(start: Start) -> None:
    plane, worker = start(COMFY_HANG_TIMEOUT_S="2")
    job = plane.submit(tiny(1, "FaultSleep", seconds=LONG_S))
    plane.wait_until(lambda: "got prompt" in worker.log())
    os.kill(worker.comfyui_pid(), signal.SIGSTOP)
    assert job.result(90)["output"]["code"] == "engine_hung"
    assert plane.submit(tiny(2)).result(60)["status"] == "COMPLETED"


@pytest.mark.parametrize("how", ["cancel", "timeout_s"])
def test_an_engine_that_does_not_let_go_of_a_job_is_replaced(how: str, pod: Pod) -> None:
    job = pod.plane.submit({**tiny(1, "FaultSleep", seconds=LONG_S), **({"timeout_s": 1} if how == "timeout_s" else {})})
    pod.plane.wait_until(lambda: "got prompt" in pod.log())
    if how == "cancel":
        pod.plane.cancel(job.id)
    following = pod.plane.submit(tiny(2))
    assert following.result(90)["status"] == "COMPLETED"
    assert "does not let go" in pod.log()
    if how == "timeout_s":
        assert job.result(1)["output"]["code"] == "job_timeout"
        assert "longer than 1 s" in job.result(1)["error"]
    else:
        assert job.answers == 0


def test_an_engine_that_dies_while_idle_three_times_ends_the_worker(start: Start) -> None:
    plane, worker = start()
    for death in range(3):
        plane.wait_until(partial(is_back, worker, death), 60)
        os.kill(worker.comfyui_pid(), signal.SIGKILL)
    assert worker.wait_exit(60) == 1
    assert "3 times in a row" in worker.log()


def test_half_a_character_in_an_error_reaches_the_client(pod: Pod) -> None:
    job = pod.plane.submit({"workflow": {"1": {"class_type": "Bad\ud800Node", "inputs": {}}}})
    result = job.result(30)
    assert (result["status"], result["output"]["code"]) == ("FAILED", "unknown_nodes")
    assert "Bad?Node" in result["error"]


def test_half_a_character_in_a_node_id_does_not_cost_the_result(pod: Pod) -> None:
    job = tiny(1)
    job["workflow"] = {"1": job["workflow"]["1"], "2\ud800": job["workflow"]["2"]}
    result = pod.plane.submit({**job, "return_timings": True}).result(30)
    assert result["status"] == "COMPLETED"
    assert "2?" in result["output"]["timings"]["nodes_s"]
    assert result["output"]["images"][0]["node_id"] == "2?"


UNREADABLE = {
    "deep": '{"delayTime": 1, "id": "$ID", "input": {"id": "no", "workflow": ' + "[" * 100_000 + "]" * 100_000 + "}}",
    "digits": '{"input": {"a": {"id": "no"}, "seed": ' + "9" * 5_000 + '}, "id": "$ID"}',
    "cut": '{"id": "$ID", "input": {"workflow"',
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_job_that_python_does_not_read_is_answered(kind: str, pod: Pod) -> None:
    pod.plane.fault("garble", "take", body=UNREADABLE[kind])
    pod.plane.end_polls()  # the rule is for the next poll: one that is held already would give the job unharmed
    result = pod.plane.submit(tiny(1)).result(30)
    assert (result["status"], result["output"]["code"]) == ("FAILED", "input_not_json")
    assert result["error"].startswith("Invalid JSON format in input: ")
    assert pod.plane.submit(tiny(2)).result(30)["status"] == "COMPLETED"


def test_a_field_that_the_sdk_does_not_survive_costs_nothing(pod: Pod) -> None:
    for fields in ({"self": 1}, {"__class__": "x"}, {"__dict__": 7}, {"id2": None}):
        assert pod.plane.submit(tiny(1), **fields).result(30)["status"] == "COMPLETED"


def test_a_result_that_is_accepted_and_never_answered_is_sent_again(pod: Pod) -> None:
    pod.plane.fault("silent", "result")
    job = pod.plane.submit(tiny(1))
    assert job.result(60)["status"] == "COMPLETED"
    assert len(job.posts) == 2
    assert "RunPod did not take a result (TimeoutError); sending it again" in pod.log()


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 204},
        {"status": 400},
        {"status": 200, "body": "<html>", "content_type": "text/html"},
        {"status": 200, "body": "[]"},
        {"status": 200, "body": '{"input": {}}'},
    ],
)
def test_polls_that_are_answered_at_once_are_not_repeated_without_a_pause(answer: dict[str, Any], pod: Pod) -> None:
    rule = pod.plane.fault("status", "take", count=None, **answer)
    pod.plane.end_polls()
    pod.plane.wait_until(lambda: rule.fired > 0)
    time.sleep(5)
    assert rule.fired < 15
    pod.plane.clear_faults()
    assert pod.plane.submit(tiny(1)).result(30)["status"] == "COMPLETED"


def test_a_job_that_is_on_its_way_when_the_worker_is_told_to_leave_is_done(start: Start) -> None:
    plane, worker = start()
    rule = plane.fault("slow", "take", delay_s=0.5)
    plane.end_polls()
    job = plane.submit(tiny(1))
    plane.wait_until(lambda: rule.fired > 0)
    os.kill(worker.pid, signal.SIGTERM)
    assert job.result(30)["status"] == "COMPLETED"
    assert (worker.wait_exit(30), len(job.takes)) == (0, 1)


def test_an_endpoint_that_refuses_is_asked_again_with_pauses(pod: Pod) -> None:
    rule = pod.plane.fault("status", "take", status=500, count=3)
    pod.plane.end_polls()
    pod.plane.wait_until(lambda: rule.fired == 3, 60)
    assert pod.plane.submit(tiny(1)).result(60)["status"] == "COMPLETED"
    assert pod.log().count("cannot poll RunPod for a job") == 3


SERVING_DEMO = """
import sys
from pathlib import Path
from devkit import demo
demo.FOLDER = Path(sys.argv[1])
sys.exit(demo.main(["--serve", "--port", sys.argv[2]]))
"""


def started_with(mark: str) -> list[str]:
    """The command lines of the living processes that have this in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.usefixtures("engine")
def test_a_terminated_demo_ends_what_it_started(tmp_path: Path) -> None:
    mark, log, errors = f"DEMO_MARK={tmp_path}", tmp_path / "log", tmp_path / "errors"
    environ = {**os.environ, "DEMO_MARK": str(tmp_path)}
    command = [sys.executable, "-c", SERVING_DEMO, str(tmp_path), str(free_port())]
    with log.open("w") as output, errors.open("w") as said:
        demo = subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=output, stderr=said)
    try:
        until_s = time.monotonic() + 180
        while not any(line.startswith("tail ") for line in started_with(mark)):
            assert demo.poll() is None, errors.read_text()
            assert time.monotonic() < until_s, log.read_text()
            time.sleep(0.05)
        running = started_with(mark)
        assert any("-m worker" in line for line in running)
        assert any("main.py" in line for line in running), "ComfyUI"
        demo.terminate()
        assert demo.wait(60) == 128 + signal.SIGTERM
        assert started_with(mark) == []
        assert "Traceback" not in errors.read_text()
        assert "weights here are tiny and random" in log.read_text()
    finally:
        demo.terminate()
        demo.wait(60)
