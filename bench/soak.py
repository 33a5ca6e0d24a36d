"""Mixed jobs through an endpoint of two pods, in production mode, with something going wrong all the while.

Pods are killed, stopped and frozen, engines are killed, connections are cut, refused and left without an answer. Each job has
to be answered once, with the right pixels. One pod keeps its process throughout: its memory, open files, threads and disk are
measured whenever no job is open, and a line is fitted to them. `--samples 100` runs 10,000 jobs; a sample is a hundred jobs.
In a long run the first ten minutes are left out of the line: for so long a worker keeps the connections of before a freeze, so
that their number grows until the first of them end.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any, Self

from bench.report import Figure, parse_args, report
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.cutting_proxy import CuttingProxy
from devkit.engine.build import engine_args, ensure_engine
from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT, free_port
from devkit.png import Picture
from worker.engine.event_loop import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.control_plane import JobHandle
    from devkit.control_plane.faults import FaultRoute
    from devkit.engine.build import Engine

JOBS_PER_SAMPLE = 100
WARM_UP = 100
IN_PEACE = 300
AT_ONCE = 20
JOBS_PER_TROUBLE = 20
WAIT_S = 600.0
WORKFLOWS = PROJECT / "devkit/workflows"
KEEP_MB = 1
FAILED_BOUND = 1
WRONG_BOUND, FILES_BOUND, THREADS_BOUND, MEMORY_BOUND_MB, DISK_BOUND_MB = 0, 3, 3, 10.0, KEEP_MB + 4.0
ROUTES: list[FaultRoute] = ["take", "stop", "result", "ping"]
TRANSIENT = {"engine_died", "engine_unreachable", "run_lost"}
"""What a job may answer whose ComfyUI was killed under it. The job is sent again, as a client would."""
CANCELLED = 42
KEPT_S = 600.0
"""How long a worker keeps the connections of before a freeze (`_OLD_S` in worker/sdk/job_loop.py)."""
LEAST_FITTED = 10


# --- jobs -----------------------------------------------------------------------------------------


def job_of(number: int) -> tuple[dict[str, Any], object]:
    """Return the job of a number, and what `came` tells of its end: ten in fifty are not the tiny picture."""
    others: dict[int, Callable[[int], tuple[dict[str, Any], object]]] = {
        **dict.fromkeys((7, 17, 27, 37), picture),
        **dict.fromkeys((14, 21), text),
        24: lambda _: ({"workflow": load("save_latent")}, [".latent"]),
        28: lambda _: ({"workflow": {"1": node("NoSuchNode")}}, "unknown_nodes"),
        35: lambda number: ({"workflow": long_sampling(number), "timeout_s": 0.3}, "job_timeout"),
        CANCELLED: lambda number: ({"workflow": long_sampling(number)}, "CANCELLED"),
    }
    return others.get(number % 50, tiny)(number)


def tiny(number: int) -> tuple[dict[str, Any], object]:
    """Return a job that paints one colour."""
    image = node("EmptyImage", width=8, height=8, batch_size=1, color=number)
    graph = {"1": image, "2": node("SaveImage", images=["1", 0], filename_prefix="soak")}
    return {"workflow": graph}, [Picture(8, 8, 64 * number.to_bytes(3))]


def picture(number: int) -> tuple[dict[str, Any], object]:
    """Return a job that gives back the picture that it brings."""
    sent = Picture.of(number % 200)
    graph = {"1": node("LoadImage", image="in.png"), "2": node("SaveImage", images=["1", 0], filename_prefix="soak")}
    return {"workflow": graph, "images": [{"name": "in.png", "image": base64.b64encode(sent.to_png()).decode()}]}, [sent]


def text(number: int) -> tuple[dict[str, Any], object]:
    """Return a job that tells its own number."""
    graph = load("preview_text")
    graph["1"]["inputs"]["width"] = 8 + number % 1000
    return {"workflow": graph}, [str(8 + number % 1000)]


def came(answer: dict[str, Any]) -> object:
    """Return what a job's client got: pictures, texts and files, or the code of an error, or else its status."""
    output = answer.get("output") or {}
    if answer["status"] != "COMPLETED":
        return output.get("code", answer["status"])
    pictures = [Picture.read(base64.b64decode(item["data"])) for item in output.get("images", ())]
    texts = [item["data"] for item in output.get("text", ())]
    return [*pictures, *texts, *(Path(item["filename"]).suffix for item in output.get("files", ()))]


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    """Return a node of a graph."""
    return {"class_type": class_type, "inputs": inputs}


def load(name: str) -> dict[str, Any]:
    """Return one of the project's workflows."""
    graph: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text())
    return graph


def long_sampling(seed: int) -> dict[str, Any]:
    """Return a graph that would sample for a minute."""
    graph = load("text_to_image")
    next(each for each in graph.values() if each["class_type"] == "KSampler")["inputs"].update(steps=10000, seed=seed)
    return graph


class Jobs:
    """Sends jobs, some at once and `limit` in all, and counts how they end."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._open: dict[JobHandle, int] = {}
        self.sent = self.failed_with_engine = 0
        self.limit = sys.maxsize
        self.wrong: list[str] = []

    def send(self, numbers: range) -> None:
        """Return when each of these jobs has ended. Raises `TimeoutError`."""
        for number in numbers:
            while len(self._open) >= AT_ONCE or self.sent >= self.limit:
                self._settle()
            self._submit(number)
            self.sent += 1
        while self._open:
            self._settle()

    def _submit(self, number: int) -> None:
        self._open[self._plane.submit(job_of(number)[0])] = number

    def _settle(self) -> None:
        """Wait until something has happened to an open job, or another one may be sent, and judge what has ended."""
        full = self.sent >= self.limit
        self._plane.wait_until(lambda: any(map(self._is_news, self._open)) or (full and self.sent < self.limit), WAIT_S)
        for job in list(filter(self._is_news, self._open)):
            if status_of(job) == "IN_PROGRESS":
                self._plane.cancel(job.id)
            self._judge(job, self._open.pop(job))

    def _is_news(self, job: JobHandle) -> bool:
        status = status_of(job)
        return status not in {"IN_QUEUE", "IN_PROGRESS"} or (status == "IN_PROGRESS" and self._open[job] % 50 == CANCELLED)

    def _judge(self, job: JobHandle, number: int) -> None:
        answer = job.status()
        if answer["status"] == "FAILED" and answer["output"].get("code") in TRANSIENT:
            self.failed_with_engine += 1
            self._submit(number)
        elif came(answer) != job_of(number)[1]:
            self.wrong.append(f"job {number}: {str(answer)[:500]}")
        if job.answers > 1 or (job.answers == 0 and answer["status"] != "CANCELLED") or job.late_updates or job.lost:
            self.wrong.append(f"job {number} was answered {job.answers} times: {job.posts}")


def status_of(job: JobHandle) -> str:
    """Return a job's status."""
    status: str = job.status()["status"]
    return status


# --- what goes wrong ------------------------------------------------------------------------------


class Endpoint:
    """Two pods. `steady` keeps its process, and has a proxy before its ComfyUI that can cut; `other` comes and goes."""

    def __init__(self, engine: Engine, folder: Path, plane: ControlPlane) -> None:
        self.engine, self.folder, self.plane = engine, folder, plane
        make_volume(engine, folder / "volume")
        self.loop = LoopThread("proxy")
        behind = free_port()
        self.proxy = self.loop.submit(CuttingProxy(f"127.0.0.1:{behind}").__aenter__()).result(10)
        proxied = {"COMFYUI_PORT": self.proxy.address.rpartition(":")[2], "WEBSOCKET_RECONNECT_DELAY_S": "1"}
        self.steady = self.pod("steady", f"--port {behind}", proxied)
        self.other = self.pod("other", "", {})

    def pod(self, pod_id: str, flags: str, environ: dict[str, str]) -> ProductionWorker:
        """Return a pod that is not started."""
        settings = {"COMFY_ARGS": " ".join([*engine_args(self.engine), flags]), "OUTPUT_KEEP_MB": str(KEEP_MB), **environ}
        folder = self.folder / pod_id
        folder.mkdir()
        return ProductionWorker(self.plane, self.engine, folder, self.folder / "volume", settings, pod_id=pod_id)

    def __enter__(self) -> Self:
        self.steady.start()
        self.steady.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for pod in (self.steady, self.other):
            self.plane.thaw_pod(pod.pod_id, cut=False)
            pod.stop()
        self.loop.submit(self.proxy.__aexit__()).result(10)
        self.loop.stop()

    def start_other(self) -> None:
        """Start the pod that comes and goes; what its predecessor had taken is given to the next worker, as RunPod does."""
        for job in self.plane.jobs:
            if status_of(job) == "IN_PROGRESS" and job.takes[-1:] == ["other"]:
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    self.plane.requeue(job.id)
        self.other.start()
        self.other.wait_ready()


class Troubles:
    """Does one thing after the other to an endpoint, one for so many jobs. A thread of its own, while it is entered."""

    def __init__(self, endpoint: Endpoint, jobs: Jobs) -> None:
        self._endpoint, self._plane, self._jobs = endpoint, endpoint.plane, jobs
        self._chance = random.Random(15)
        self._kinds: list[Callable[[], None]] = [
            self.kill_engine,
            self.kill_pod,
            self.stop_pod,
            self.cut_websocket,
            self.cut_requests,
            self.refuse,
            self.silence_result,
            self.silence,
            self.freeze,
            self.freeze,
        ]
        self._next = self._shuffled()
        self._due = jobs.sent
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self.counts: collections.Counter[str] = collections.Counter()
        self.lost_at_stop = 0

    def _shuffled(self) -> Iterator[Callable[[], None]]:
        while True:
            yield from self._chance.sample(self._kinds, len(self._kinds))

    def __enter__(self) -> Self:
        self._over.clear()
        self._thread = threading.Thread(target=self._run, name="troubles", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(WAIT_S)
        if self._failure:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.wait(0.05):
                if self._jobs.sent >= self._due:
                    trouble = next(self._next)
                    self.counts[trouble.__name__] += 1
                    trouble()
                    self._due += JOBS_PER_TROUBLE
                    self._jobs.limit = self._due + JOBS_PER_TROUBLE
        except BaseException as exc:  # noqa: BLE001 - the thread that measures raises it
            self._failure, self._jobs.limit = exc, sys.maxsize

    def _some_pod(self) -> ProductionWorker:
        return self._chance.choice([self._endpoint.steady, self._endpoint.other])

    def kill_engine(self) -> None:
        """Kill a pod's ComfyUI; a second kill before it is back would be a broken machine."""
        pod = self._some_pod()
        back = pod.log().count("ComfyUI is back")
        os.kill(pod.comfyui_pid(), signal.SIGKILL)
        wait(lambda: pod.log().count("ComfyUI is back") > back)

    def kill_pod(self) -> None:
        """Kill the other pod as a machine's death does."""
        self._endpoint.other.kill()
        self._endpoint.start_other()

    def stop_pod(self) -> None:
        """Let the other pod leave: it answers what it has taken."""
        status = self._endpoint.other.stop(timeout_s=120)
        jobs = (job for job in self._plane.jobs if status_of(job) == "IN_PROGRESS" and job.takes[-1:] == ["other"])
        self.lost_at_stop += sum(1 for _ in jobs) + (status != 0)
        self._endpoint.start_other()

    def cut_websocket(self) -> None:
        """Cut every connection between the steady pod and its ComfyUI."""

        async def cut() -> None:
            self._endpoint.proxy.cut()

        self._endpoint.loop.submit(cut()).result(10)

    def cut_requests(self) -> None:
        """Break some requests of workers off."""
        for route in self._chance.sample(ROUTES, 2):
            self._plane.fault("drop", route, count=self._chance.randint(1, 3))

    def refuse(self) -> None:
        """Answer some requests of workers with an error, as a page of HTML."""
        route = self._chance.choice(ROUTES)
        status = self._chance.choice([429, 500, 502, 503])
        self._plane.fault("status", route, status=status, body="<html>", content_type="text/html", count=2)

    def silence_result(self) -> None:
        """Take a result's connection and say nothing."""
        self._plane.fault("silent", "result")

    def silence(self) -> None:
        """Take any request's connection and say nothing."""
        self._plane.fault("silent", self._chance.choice(ROUTES))

    def freeze(self) -> None:
        """Freeze a pod for so short that it does not notice, or longer; its connections may be dead afterwards."""
        pod = self._some_pod()
        self._plane.freeze_pod(pod.pod_id)
        time.sleep(self._chance.choice([0.1, 1.0, 6.0]) * self._chance.uniform(0.5, 1.5))
        self._plane.thaw_pod(pod.pod_id, cut=self._chance.choice([True, False]))


def wait(happened: Callable[[], bool]) -> None:
    """Return once `happened()`. Raises `TimeoutError`."""
    until = time.monotonic() + WAIT_S
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError(f"it did not happen within {WAIT_S:g} s")
        time.sleep(0.2)


# --- what a pod holds -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """What the worker holds at a moment."""

    at_s: float
    jobs: int
    files: int
    threads: int
    rss_mb: float
    engine_rss_mb: float
    disk_mb: float

    @classmethod
    def of(cls, worker: ProductionWorker, at_s: float, jobs: int) -> Usage:
        """Look at the processes and at the folders of ComfyUI, so many seconds after the first look."""
        own, engine = Path(f"/proc/{worker.pid}"), Path(f"/proc/{worker.comfyui_pid()}")
        files = (path for path in worker.base_dir.rglob("*") if path.is_file() and not path.is_symlink())
        return cls(
            at_s,
            jobs,
            len(os.listdir(own / "fd")),  # noqa: PTH208 - only the count is wanted
            len(os.listdir(own / "task")),  # noqa: PTH208 - as above
            rss_mb(own),
            rss_mb(engine),
            sum(path.stat().st_size for path in files) / 1e6,
        )


def rss_mb(process: Path) -> float:
    """Return the resident memory of a process."""
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def settled(usage: list[Usage]) -> list[Usage]:
    """Return the samples since connections of before a freeze began to end. All, if those are few."""
    late = [each for each in usage if each.at_s >= KEPT_S]
    return late if len(late) >= LEAST_FITTED else usage


def growth(usage: list[Usage], field: str) -> float:
    """Return how much more of something there is at the end than at the first sample, by the line fitted to all of them."""
    jobs = [float(each.jobs) for each in usage]
    return linear_regression(jobs, [float(getattr(each, field)) for each in usage]).slope * (jobs[-1] - jobs[0])


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=10, short_samples=3)
    engine = ensure_engine()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        ControlPlane(poll_s=20) as plane,
        Endpoint(engine, Path(name), plane) as endpoint,
    ):
        jobs = Jobs(plane)
        jobs.send(range(WARM_UP))
        began = time.monotonic()
        jobs.send(range(WARM_UP, WARM_UP + IN_PEACE))
        peaceful_s = time.monotonic() - began
        endpoint.start_other()
        first = WARM_UP + IN_PEACE
        troubles = Troubles(endpoint, jobs)
        usage = [Usage.of(endpoint.steady, 0.0, first)]
        began = time.monotonic()
        for number in range(first, first + options.samples * JOBS_PER_SAMPLE, JOBS_PER_SAMPLE):
            with troubles:
                jobs.send(range(number, number + JOBS_PER_SAMPLE))
            usage.append(Usage.of(endpoint.steady, time.monotonic() - began, number + JOBS_PER_SAMPLE))
            print(f"{usage[-1]}, {len(jobs.wrong)} wrong", file=sys.stderr, flush=True)
        took_s = time.monotonic() - began
    for line in jobs.wrong[:20]:
        print(line, file=sys.stderr)
    print(f"{sum(troubles.counts.values())} troubles: {dict(troubles.counts)}", file=sys.stderr)
    count, kills = options.samples * JOBS_PER_SAMPLE, troubles.counts["kill_engine"]
    fitted = settled(usage)
    more = functools.partial(growth, fitted)

    def samples(field: str) -> list[float]:
        return [float(getattr(each, field)) for each in usage]

    return report(
        [
            Figure("soak_jobs", count, "jobs"),
            Figure("soak_minutes", took_s / 60, "min"),
            Figure("soak_troubles", sum(troubles.counts.values()), ""),
            Figure("soak_jobs_wrong", len(jobs.wrong), "jobs", WRONG_BOUND),
            Figure("soak_jobs_lost_at_stops", troubles.lost_at_stop, "jobs", WRONG_BOUND),
            Figure("soak_jobs_failed_for_each_killed_engine", jobs.failed_with_engine / max(1, kills), "jobs", FAILED_BOUND),
            Figure("soak_jobs_per_s", IN_PEACE / peaceful_s, "1/s"),
            Figure("soak_open_files_more", more("files"), "", FILES_BOUND, samples("files")),
            Figure("soak_threads_more", more("threads"), "", THREADS_BOUND, samples("threads")),
            Figure("soak_rss_more_mb", more("rss_mb"), "MB", MEMORY_BOUND_MB, samples("rss_mb")),
            Figure("soak_rss_more_mb_per_1000_jobs", more("rss_mb") / (fitted[-1].jobs - fitted[0].jobs) * 1000, "MB"),
            Figure("soak_engine_rss_mb", usage[-1].engine_rss_mb, "MB", None, samples("engine_rss_mb")),
            Figure("soak_disk_at_end_mb", usage[-1].disk_mb, "MB", DISK_BOUND_MB, samples("disk_mb")),
        ],
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
