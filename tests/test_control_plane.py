"""The stand-in of RunPod's control plane: what the unmodified SDK makes of it, then this project's worker in front of it."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from devkit.control_plane import ControlPlane, ProductionWorker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from devkit.control_plane import JobHandle
    from devkit.engine.build import Engine

RUN_LIMIT = 100_000
RUNSYNC_LIMIT = 200_000

# A worker as people write them; what it does with a job, the job says.
PROGRAM = """
    import asyncio, os, sys, threading
    from pathlib import Path
    import runpod

    FOLDER = Path(sys.argv[1])

    async def exists(path):
        while not path.exists():
            await asyncio.sleep(0.01)

    async def sent():
        for thread in threading.enumerate():
            if "_thread_target" in thread.name:  # one of progress_update
                await asyncio.to_thread(thread.join)

    def update_late(job):
        asyncio.run(exists(FOLDER / f"{job['id']}.go"))
        runpod.serverless.progress_update(job, "late")

    async def handler(job):
        try:
            return await act(job)
        except asyncio.CancelledError:
            (FOLDER / f"{job['id']}.cancelled").touch()
            raise

    async def act(job):
        ask = job["input"]
        for step in range(ask.get("updates", 0)):
            runpod.serverless.progress_update(job, {"step": step})
            await sent()
        if ask.get("late"):
            threading.Thread(target=update_late, args=(job,)).start()
        if ask.get("hold"):
            await exists(FOLDER / f"{job['id']}.go")
        if "raise" in ask:
            raise RuntimeError(ask["raise"])
        return ask.get("return", {"job": job})

    if __name__ == "__main__":
        concurrency = int(sys.argv[2])
        sys.argv[1:] = []
        runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: concurrency})
"""

# A client as RunPod's documentation has it.
CLIENT = """
    import json, runpod
    runpod.api_key = "k"
    endpoint = runpod.Endpoint("ep")
    by_runsync = endpoint.run_sync({"input": {"return": {"a": 1}}})
    job = endpoint.run({"input": {"return": {"b": 2}}})
    print(json.dumps([by_runsync, job.output(timeout=20), job.status(), endpoint.health()["workers"]]))
"""


def ask(
    url: str, method: str = "GET", body: object = None, key: str | None = "Bearer k", timeout_s: float = 30
) -> tuple[int, Any]:
    """The status and the body of an answer, as any HTTP client gets them."""
    host, _, path = url.removeprefix("http://").partition("/")
    link = http.client.HTTPConnection(host, timeout=timeout_s)
    with contextlib.closing(link):
        sent = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        link.request(method, f"/{path}", sent, {"Authorization": key} if key else {})
        answer = link.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if raw else None


TINY: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
}


@pytest.fixture(scope="module", autouse=True)
def production(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProductionWorker]:
    """This project's worker; it boots while the tests before its own run."""
    folder = tmp_path_factory.mktemp("production")
    with ControlPlane(poll_s=1) as plane, ProductionWorker(plane, engine, folder, folder / "volume") as worker:
        yield worker


# --- the plane itself, without the SDK -----------------------------------------------------------


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    with ControlPlane(run_limit_bytes=RUN_LIMIT, runsync_limit_bytes=RUNSYNC_LIMIT) as made:
        yield made


def worker_ask(plane: ControlPlane, path: str, body: object = None) -> tuple[int, Any]:
    return ask(f"{plane.url}/{path}", "GET" if body is None else "POST", body, plane.worker_key)


def take(plane: ControlPlane, pod_id: str = "p") -> Any:
    return worker_ask(plane, f"job-take/{pod_id}?gpu=X&job_in_progress=0")[1]


def post(plane: ControlPlane, job: JobHandle, body: object, pod_id: str = "p") -> int:
    return worker_ask(plane, f"job-done/{pod_id}/{job.id}?gpu=X&isStream=false", body)[0]


def open_poll(plane: ControlPlane, path: str) -> http.client.HTTPConnection:
    """A poll that is sent and not waited for."""
    link = http.client.HTTPConnection(plane.url.removeprefix("http://").partition("/")[0], timeout=30)
    link.request("GET", f"/v2/{plane.endpoint_id}/{path}", headers={"Authorization": plane.worker_key})
    return link


def received(link: http.client.HTTPConnection) -> tuple[int, Any]:
    with contextlib.closing(link):
        answer = link.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if raw else None


def test_jobs_go_out_in_the_order_they_came_alone_or_in_batches(plane: ControlPlane) -> None:
    handles = [plane.submit(n, s3Config={"bucketName": "b"}) for n in range(5)]
    first = take(plane)
    assert first == {"id": handles[0].id, "input": 0, "s3Config": {"bucketName": "b"}}
    _, batch = worker_ask(plane, "job-take-batch/p?gpu=X&batch_size=3&job_in_progress=1")
    assert [job["input"] for job in batch] == [1, 2, 3]
    _, rest = worker_ask(plane, "job-take-batch/p?gpu=X&batch_size=3&job_in_progress=1")
    assert [job["input"] for job in rest] == [4]
    assert [handle.takes for handle in handles] == [["p"]] * 5


def test_polls_are_held_served_in_turn_and_ended_with_204(plane: ControlPlane) -> None:
    polls = []
    for pod_id in ("one", "two", "three"):
        polls.append(open_poll(plane, f"job-take/{pod_id}?gpu=X"))
        plane.wait_polling(pod_id)
    plane.submit("a")
    plane.submit("b")
    assert received(polls[0])[1]["input"] == "a"
    assert received(polls[1])[1]["input"] == "b"
    assert plane.is_polling("three")
    plane.end_polls("three")
    assert received(polls[2]) == (204, None)
    with ControlPlane(poll_s=0.05) as hasty:
        assert worker_ask(hasty, "job-take/p?gpu=X") == (204, None)
        assert worker_ask(hasty, "job-stop/p?gpu=X") == (204, None)


def test_a_poll_whose_client_has_gone_gets_no_job(plane: ControlPlane) -> None:
    for turn in range(10):
        open_poll(plane, "job-take/dead?gpu=X").close()  # at once: closed before, while or after it is held
        plane.submit(turn)
        assert take(plane, "living")["input"] == turn
    assert [handle.takes for handle in plane.jobs] == [["living"]] * 10


def test_a_stop_signal_goes_to_the_pod_that_has_the_job_and_a_queued_job_is_never_handed_out(plane: ControlPlane) -> None:
    running, queued = plane.submit(1), plane.submit(2)
    take(plane, "a")
    poll = open_poll(plane, "job-stop/a?gpu=X")
    assert plane.cancel(queued.id) == {"id": queued.id, "status": "CANCELLED"}
    assert plane.time_out(running.id)["status"] == "TIMED_OUT"
    assert received(poll) == (200, {"jobsToStop": [running.id]})
    assert post(plane, running, {"output": "too late"}, "a") == 200
    assert running.result() == {**running.status(), "status": "TIMED_OUT"}
    assert "output" not in running.status()
    plane.submit(3)
    assert take(plane, "a")["input"] == 3


def test_a_job_that_runs_too_long_is_timed_out_and_its_worker_told(plane: ControlPlane) -> None:
    job = plane.submit(1, policy={"executionTimeout": 50})
    assert take(plane)["policy"] == {"executionTimeout": 50}
    assert worker_ask(plane, "job-stop/p?gpu=X") == (200, {"jobsToStop": [job.id]})
    assert job.result()["status"] == "TIMED_OUT"


@pytest.mark.parametrize(
    ("body", "shown", "answer"),
    [
        ({"output": [1, "ä"]}, {"status": "COMPLETED", "output": [1, "ä"]}, 200),
        ({}, {"status": "COMPLETED"}, 200),
        ({"error": "no", "output": {"code": "c"}}, {"status": "FAILED", "error": "no", "output": {"code": "c"}}, 200),
        ({"error": {"text": "no"}}, {"status": "COMPLETED"}, 400),
        (b'{"output": NaN}', {"status": "COMPLETED"}, 400),
        (b"[]", {"status": "COMPLETED"}, 400),
        (b'{"output": "%s"}' % (b"x" * RUN_LIMIT), {"status": "COMPLETED"}, 400),
    ],
)
def test_what_a_client_sees_of_a_result(plane: ControlPlane, body: object, shown: Mapping[str, Any], answer: int) -> None:
    job = plane.submit(1)
    take(plane)
    assert post(plane, job, body) == answer
    result = job.result()
    assert {name: result[name] for name in ("status", "output", "error") if name in result} == shown
    assert (job.answers, job.lost) == (1, answer == 400)


def test_a_result_through_runsync_may_be_larger(plane: ControlPlane) -> None:
    job = plane.submit(1, via="runsync")
    assert job.id.startswith("sync-")
    take(plane)
    assert post(plane, job, {"output": "x" * RUN_LIMIT}) == 200
    assert len(job.result()["output"]) == RUN_LIMIT


def test_an_update_after_the_result_leaves_the_job_in_progress(plane: ControlPlane) -> None:
    job = plane.submit(1)
    take(plane)
    post(plane, job, {"status": "IN_PROGRESS", "output": {"step": 1}})
    assert (job.status()["status"], job.status()["output"]) == ("IN_PROGRESS", {"step": 1})
    post(plane, job, {"output": "done"})
    post(plane, job, {"status": "IN_PROGRESS", "output": {"step": 2}})
    assert [(update.value["step"], update.late) for update in job.updates] == [(1, False), (2, True)]
    assert [update.value for update in job.late_updates] == [{"step": 2}]
    with pytest.raises(TimeoutError, match="came after the result"):
        job.result(timeout_s=0.01)


def test_a_job_whose_worker_died_goes_to_the_next_when_it_is_requeued(plane: ControlPlane) -> None:
    job = plane.submit(1)
    take(plane, "dead")
    plane.requeue(job.id)
    assert take(plane, "living")["id"] == job.id
    post(plane, job, {"output": 1}, "living")
    assert (job.takes, job.answers) == (["dead", "living"], 1)
    with pytest.raises(ValueError, match="COMPLETED"):
        plane.requeue(job.id)


def test_a_pod_that_asked_to_be_replaced_gets_no_job_until_it_is(plane: ControlPlane) -> None:
    job = plane.submit(1)
    take(plane, "spent")
    post(plane, job, {"output": 1, "stopPod": True}, "spent")
    assert (job.stop_pod, plane.pods_to_stop) == (True, {"spent"})
    plane.submit(2)
    poll = open_poll(plane, "job-take/spent?gpu=X")
    plane.wait_polling("spent")
    assert take(plane, "other")["input"] == 2
    plane.readmit("spent")
    plane.submit(3)
    assert received(poll)[1]["input"] == 3


def test_clients_find_what_api_runpod_ai_has(plane: ControlPlane) -> None:
    url = plane.url
    status, queued = ask(f"{url}/run", "POST", {"input": {"a": 1}, "policy": {"ttl": 60_000}})
    assert (status, queued["status"]) == (200, "IN_QUEUE")
    assert ask(f"{url}/health")[1]["jobs"]["inQueue"] == 1
    assert take(plane) == {"id": queued["id"], "input": {"a": 1}, "policy": {"ttl": 60_000}}
    assert ask(f"{url}/health")[1]["workers"] == {"idle": 0, "running": 1}
    post(plane, plane.job(queued["id"]), {"output": "x"})
    _, shown = ask(f"{url}/status/{queued['id']}", key="raw-key")
    assert (shown["status"], shown["output"], shown["workerId"]) == ("COMPLETED", "x", "p")
    assert shown["executionTime"] >= 0
    _, waiting = ask(f"{url}/runsync?wait=1000", "POST", {"input": 2})
    assert waiting["status"] == "IN_QUEUE"
    assert ask(f"{url}/cancel/{waiting['id']}", "POST") == (200, {"id": waiting["id"], "status": "CANCELLED"})
    assert ask(f"{url}/health")[1]["jobs"] == {"completed": 1, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}


def test_clients_are_refused_as_api_runpod_ai_refuses(plane: ControlPlane) -> None:
    url = plane.url
    assert ask(f"{url}/run", "POST", {"input": 1}, key=None)[0] == 401
    assert ask(f"{url}/run", "POST", b"{")[0] == 400
    assert ask(f"{url}/run", "POST", {"prompt": 1})[0] == 400
    assert ask(f"{url}/runsync?wait=1", "POST", {"input": 1})[0] == 400
    assert ask(f"{url}/status/none")[0] == 404
    too_large = {"input": "x" * RUN_LIMIT}
    assert ask(f"{url}/run", "POST", too_large)[0] == 400
    assert plane.jobs == []
    assert ask(f"{url}/job-take/p?gpu=X", key="not the workers' key")[0] == 401


# --- the real SDK in production mode -------------------------------------------------------------


@dataclass
class Pod:
    """A worker process of people's kind."""

    plane: ControlPlane
    pod_id: str
    folder: Path
    process: subprocess.Popen[bytes]

    def wait_up(self) -> None:
        self.plane.wait_until(lambda: self.plane.is_polling(self.pod_id) or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return (self.folder / f"{self.pod_id}.log").read_text()

    def failed_to_post(self, job_id: str) -> bool:
        """Whether the SDK has given up on a result."""
        return any(job_id in line and "Failed to return job results" in line for line in self.log().splitlines())

    def wait_file(self, name: str) -> None:
        self.plane.wait_until((self.folder / name).exists)


def start_pod(plane: ControlPlane, pod_id: str, folder: Path, concurrency: int = 1) -> Pod:
    program = folder / f"{pod_id}.py"  # its own: another pod may be reading its file just now
    program.write_text(textwrap.dedent(PROGRAM))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    with (folder / f"{pod_id}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(program), str(folder), str(concurrency)],
            env={**inherited, **plane.environ(pod_id), "RUNPOD_LOG_LEVEL": "INFO"},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Pod(plane, pod_id, folder, process)


@dataclass
class Fleet:
    """`many` takes four jobs at once, the others one each, from an endpoint of their own; `client` asks the first endpoint."""

    many: Pod
    left: Pod
    right: Pod
    client: subprocess.Popen[str]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Started together, and given what takes long before anything else: the SDK's import and its retries last seconds."""
    folder = tmp_path_factory.mktemp("pods")
    with contextlib.ExitStack() as stack:
        many, few = (
            stack.enter_context(ControlPlane(run_limit_bytes=RUN_LIMIT, ping_interval_s=1, poll_s=1)) for _ in range(2)
        )
        few.fault("status", "take", pod="right", status=500)
        few.fault("status", "take", pod="right", status=429)
        many.fault("status", "result", job="thrice", status=503, count=None)
        many.submit({"return": 1}, id="thrice")
        pods = [start_pod(many, "many", folder, 4), start_pod(few, "left", folder), start_pod(few, "right", folder)]
        client = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CLIENT)],
            env={**os.environ, "HOME": str(folder), "RUNPOD_ENDPOINT_BASE_URL": many.base_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        yield Fleet(pods[0], pods[1], pods[2], client)
        client.kill()
        client.communicate(timeout=10)
        for pod in pods:
            pod.plane.kill_pod(pod.pod_id)
            pod.process.wait(10)


@pytest.fixture
def many(fleet: Fleet) -> Pod:
    fleet.many.wait_up()
    return fleet.many


def test_each_job_is_answered_once(many: Pod) -> None:
    jobs = [many.plane.submit({"n": n}, id=f"once-{n}", s3Config={"bucketName": "b"}) for n in range(6)]
    for n, job in enumerate(jobs):
        result = job.result()
        assert result["status"] == "COMPLETED"
        assert result["output"] == {"job": {"id": f"once-{n}", "input": {"n": n}, "s3Config": {"bucketName": "b"}}}
        assert (job.answers, job.takes, result["workerId"]) == (1, ["many"], "many")


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({"return": {"error": "no", "code": "c"}}, {"status": "FAILED", "error": "no", "output": {"code": "c"}}),
        ({"return": {"error": "no"}}, {"status": "FAILED", "error": "no"}),
        ({"return": {}}, {"status": "COMPLETED"}),
        ({"return": {"refresh_worker": False, "a": 1}}, {"status": "COMPLETED", "output": {"a": 1}}),
    ],
)
def test_what_a_handler_returns_is_what_a_client_sees(many: Pod, asked: object, shown: Mapping[str, Any]) -> None:
    result = many.plane.submit(asked).result()
    assert {name: result[name] for name in ("status", "output", "error") if name in result} == shown


def test_an_exception_that_escapes_reaches_the_client_with_its_traceback(many: Pod) -> None:
    result = many.plane.submit({"raise": "secret"}).result()
    assert result["status"] == "FAILED"
    assert "Traceback" in json.loads(result["error"])["error_traceback"]


def test_progress_is_recorded_in_order(many: Pod) -> None:
    job = many.plane.submit({"updates": 3, "return": {"a": 1}})
    assert job.result()["output"] == {"a": 1}
    assert [update.value for update in job.updates] == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert [update.at_s for update in job.updates] == sorted(update.at_s for update in job.updates)
    assert [post.kind for post in job.posts] == ["progress"] * 3 + ["result"]
    assert job.late_updates == []


def test_an_update_that_overtakes_nothing_but_comes_last_leaves_the_job_in_progress(many: Pod) -> None:
    job = many.plane.submit({"late": True, "return": 1})
    assert job.result()["status"] == "COMPLETED"
    (many.folder / f"{job.id}.go").touch()
    many.plane.wait_until(lambda: bool(job.late_updates))
    assert (job.status()["status"], job.status()["output"]) == ("IN_PROGRESS", "late")


def test_a_cancel_reaches_the_handler_and_nothing_is_posted(many: Pod) -> None:
    job = many.plane.submit({"updates": 1, "hold": True})
    many.plane.wait_until(lambda: bool(job.updates))
    assert many.plane.cancel(job.id)["status"] == "CANCELLED"
    many.wait_file(f"{job.id}.cancelled")
    assert many.plane.submit({"return": 1}).result()["output"] == 1
    assert (job.status()["status"], job.answers) == ("CANCELLED", 0)


def test_a_result_that_is_too_large_is_lost(many: Pod) -> None:
    job = many.plane.submit({"return": {"data": "x" * RUN_LIMIT}})
    result = job.result()
    assert (result["status"], "output" in result, job.lost, job.answers) == ("COMPLETED", False, True, 1)
    many.plane.wait_until(lambda: many.failed_to_post(job.id))


def test_the_sdk_pings_with_the_jobs_it_has(many: Pod) -> None:
    job = many.plane.submit({"updates": 1, "hold": True})
    many.plane.wait_until(lambda: any(job.id in ping.job_ids for ping in many.plane.pings))
    (many.folder / f"{job.id}.go").touch()
    job.result()
    assert {ping.sdk_version for ping in many.plane.pings} == {"1.12.0"}


def test_what_the_sdk_does_when_posting_a_result_goes_wrong(many: Pod) -> None:
    plane = many.plane
    plane.fault("status", "result", job="once", status=500)
    plane.fault("status", "result", job="busy", status=429, count=None)
    plane.fault("drop", "result", job="cut", count=None)
    plane.fault("slow", "result", job="slow", delay_s=0.1)
    plane.fault("lose", "result", job="unheard")
    jobs = {name: plane.submit({"return": 1}, id=name) for name in ("once", "busy", "cut", "slow", "unheard")}
    jobs["thrice"] = plane.job("thrice")
    for name in ("once", "slow", "unheard"):
        assert jobs[name].result()["status"] == "COMPLETED"
    for name in ("thrice", "busy", "cut", "unheard"):
        plane.wait_until(functools.partial(many.failed_to_post, name))
    answers = {name: [post.answer for post in job.posts] for name, job in jobs.items()}
    assert answers == {
        "once": [500, 200],
        "thrice": [503, 503, 503],
        "busy": [429],
        "cut": [0],  # a connection that breaks is not tried again
        "slow": [200],
        "unheard": [200],
    }
    assert {name for name, job in jobs.items() if job.status()["status"] == "IN_PROGRESS"} == {"thrice", "busy", "cut"}


def test_runpods_own_client_talks_to_it(fleet: Fleet) -> None:
    said, complaint = fleet.client.communicate(timeout=60)
    assert fleet.client.returncode == 0, complaint
    by_runsync, by_run, status, workers = json.loads(said.splitlines()[-1])
    assert (by_runsync, by_run, status) == ({"a": 1}, {"b": 2}, "COMPLETED")
    assert sum(workers.values()) == 1


def test_a_dead_workers_poll_eats_no_job_and_a_worker_comes_back_from_errors_of_take(fleet: Fleet) -> None:
    left, right = fleet.left, fleet.right
    plane = left.plane
    left.wait_up()
    os.kill(left.process.pid, signal.SIGKILL)
    left.process.wait(10)
    jobs = [plane.submit({"n": n}) for n in range(2)]
    assert [job.result()["status"] for job in jobs] == ["COMPLETED"] * 2
    assert [job.takes for job in jobs] == [["right"]] * 2
    right.wait_up()
    assert plane.kill_pod("left") == 1, "its heartbeat"


def test_sigterm_ends_an_idle_worker(fleet: Fleet) -> None:
    fleet.right.wait_up()
    fleet.right.process.send_signal(signal.SIGTERM)
    assert fleet.right.process.wait(20) == 0


# --- this project's worker -----------------------------------------------------------------------


def test_this_projects_worker_in_production_mode(production: ProductionWorker) -> None:
    production.wait_ready()
    wrong = {**TINY, "1": {**TINY["1"], "inputs": {**TINY["1"]["inputs"], "width": 0}}}
    jobs = [production.plane.submit({"workflow": workflow}, via="runsync") for workflow in (TINY, wrong, TINY)]
    first, failed, last = [job.result() for job in jobs]
    for result in (first, last):
        assert result["status"] == "COMPLETED", production.log_tail()
        assert len(result["output"]["images"]) == 1
    assert failed["status"] == "FAILED"
    assert "smaller than min" in failed["error"]
    assert failed["output"]["code"] == "workflow_rejected"
    assert failed["output"]["details"]
    assert [(job.answers, job.lost, job.late_updates) for job in jobs] == [(1, False, [])] * 3
    assert production.stop() == 0
