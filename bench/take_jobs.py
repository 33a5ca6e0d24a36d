"""What it costs that a worker takes a job while ComfyUI boots: a simulated endpoint with `TAKE_JOBS` booting and ready.

Time is simulated; who gets which job is decided by the control plane's stand-in, the longest waiting worker first. Jobs arrive
at random, the same for both settings. A worker is started for each job that waits longer than RunPod's queue delay of 4 s, up
to five, and stopped after 5 s without a job. Its process starts 3 s later. It asks for a job 1 s after that (`booting`), or
when ComfyUI is up (`ready`), and runs one when ComfyUI is up and the weights are read. That takes 10 s, from its start if jobs
of the endpoint used them before, otherwise from when it takes its first job.

    known   ComfyUI boots in 7 s, the endpoint's jobs use the same weights
    slow    the same, but ComfyUI boots in 20 s: many custom nodes
    new     ComfyUI boots in 7 s, each new worker's first job uses weights that none used before

A wait is from a job's arrival to the start of its run. The table on standard error has mean, median and 95th percentile of
both settings; the figures are how much longer jobs wait on average with `booting`, and less than nothing where it is better.
"""

from __future__ import annotations

import heapq
import itertools
import random
import sys
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import mean, median, quantiles
from typing import TYPE_CHECKING, Final, Literal, get_args

from bench.report import Figure, parse_args, report
from devkit.control_plane.board import Board

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.control_plane.board import Poll

Setting = Literal["booting", "ready"]
Kind = Literal["known", "slow", "new"]

SEED: Final = 20
LOST_BOUND: Final = 0
JOBS: Final = 4000
SHORT_JOBS: Final = 400
MOST_WORKERS: Final = 5
QUEUE_DELAY_S: Final = 4.0
IDLE_S: Final = 5.0
COMES_S: Final = 3.0
TAKES_S: Final = 1.0
BOOT_S: Final = {"known": 7.0, "slow": 20.0, "new": 7.0}
READ_S: Final = 10.0
LENGTHS_S: Final = (2.0, 10.0, 40.0)
LOADS: Final = (0.1, 0.4, 0.8)
"""Of what five workers can do."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """The workers' first job, how long jobs are, and how many arrive."""

    kind: Kind
    length_s: float
    load: float
    jobs: int

    def arrivals(self) -> Iterator[tuple[float, float]]:
        """Yield when each job arrives and how long it runs."""
        chance = random.Random(f"{SEED}-{self.length_s}-{self.load}")
        now_s = 0.0
        for _ in range(self.jobs):
            now_s += chance.expovariate(self.load * MOST_WORKERS / self.length_s)
            yield now_s, self.length_s * chance.uniform(0.5, 1.5)


class Clock:
    """Simulated time: what is to happen, in order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when_s: float, happens: Callable[[], None]) -> None:
        """Have something happen."""
        heapq.heappush(self._waiting, (when_s, next(self._numbers), happens))

    def run(self) -> None:
        """Return when nothing is left to happen."""
        while self._waiting:
            self.now_s, _, happens = heapq.heappop(self._waiting)
            happens()


class Endpoint:
    """One endpoint with its queue and its workers."""

    def __init__(self, scenario: Scenario, setting: Setting) -> None:
        self.clock = Clock()
        self.board = Board(lambda: None)
        self.scenario = scenario
        self.setting = setting
        self.runs_s: dict[str, float] = {}
        self.waits_s: list[float] = []
        self.workers: list[Worker] = []
        self._arrived: dict[str, float] = {}
        self._late: deque[str] = deque()
        self._started = 0

    def simulate(self) -> None:
        """Let every job arrive and run."""
        for number, (when_s, length_s) in enumerate(self.scenario.arrivals()):
            job_id = f"job-{number}"
            self.runs_s[job_id] = length_s
            self.clock.at(when_s, partial(self._arrive, job_id))
        self.clock.run()

    def _arrive(self, job_id: str) -> None:
        self._arrived[job_id] = self.clock.now_s
        self.board.submit({"id": job_id}, 0, 0.0)
        self.hand_out()
        self.clock.at(self.clock.now_s + QUEUE_DELAY_S, partial(self._waited, job_id))

    def _waited(self, job_id: str) -> None:
        if self.board.jobs[job_id].status == "IN_QUEUE":
            self._late.append(job_id)
            self.scale()

    def scale(self) -> None:
        """Start a worker for each job that waits too long and that none is on its way for."""
        self._late = deque(job_id for job_id in self._late if self.board.jobs[job_id].status == "IN_QUEUE")
        coming = sum(not worker.has_polled for worker in self.workers)
        for _ in range(min(len(self._late) - coming, MOST_WORKERS - len(self.workers))):
            self._started += 1
            self.workers.append(Worker(self, f"pod-{self._started}"))

    def hand_out(self) -> None:
        """Give jobs to the workers whose turn it is."""
        for worker in list(self.workers):
            worker.look()

    def took(self, job_id: str, runs_at_s: float) -> None:
        """Note when a job that was handed out starts to run."""
        self.waits_s.append(runs_at_s - self._arrived[job_id])


class Worker:
    """One worker, by the rules of `worker/sdk`: it asks for a job whenever its ComfyUI is free, or boots."""

    def __init__(self, endpoint: Endpoint, pod_id: str) -> None:
        self._endpoint = endpoint
        self._pod_id = pod_id
        self._asked = ExitStack()
        self._poll: Poll | None = None
        self._process_s = endpoint.clock.now_s + COMES_S
        self._up_s = self._process_s + BOOT_S[endpoint.scenario.kind]
        self._is_first = True
        self.has_polled = False
        endpoint.clock.at(self._process_s + TAKES_S if endpoint.setting == "booting" else self._up_s, self._ask)

    def _ask(self) -> None:
        endpoint = self._endpoint
        self.has_polled = True
        self._poll = poll = self._asked.enter_context(endpoint.board.poll(self._pod_id, "take"))
        endpoint.hand_out()
        if self._poll is poll:  # an idle worker is counted from when it could have run a job
            endpoint.clock.at(max(endpoint.clock.now_s, self._up_s) + IDLE_S, partial(self._stop, poll))

    def look(self) -> None:
        """Take a job, if there is one and it is this worker's turn."""
        endpoint = self._endpoint
        if self._poll is None or not (jobs := endpoint.board.take(self._poll, 1)):
            return
        self._asked.close()
        self._poll = None
        runs_at_s = max(endpoint.clock.now_s, self._up_s, self._read_s())
        self._is_first = False
        endpoint.took(jobs[0].id, runs_at_s)
        endpoint.clock.at(runs_at_s + endpoint.runs_s[jobs[0].id], partial(self._answer, jobs[0].id))

    def _read_s(self) -> float:
        """Return when the weights of the job that is taken now have been read."""
        if not self._is_first:
            return 0.0
        return (self._endpoint.clock.now_s if self._endpoint.scenario.kind == "new" else self._process_s) + READ_S

    def _answer(self, job_id: str) -> None:
        self._endpoint.board.post_result(self._endpoint.board.find(job_id), self._pod_id, 0, {})
        self._ask()

    def _stop(self, poll: Poll) -> None:
        if self._poll is poll:
            self._asked.close()
            self._poll = None
            self._endpoint.workers.remove(self)
            self._endpoint.scale()


def waits_s(scenario: Scenario, setting: Setting) -> list[float]:
    """Return how long each job waits."""
    endpoint = Endpoint(scenario, setting)
    endpoint.simulate()
    return endpoint.waits_s


def main() -> int:
    """Simulate and report."""
    options = parse_args(__doc__, samples=1)
    jobs = SHORT_JOBS if options.short else JOBS
    figures: list[Figure] = []
    lost = 0
    print("mean, median, 95th percentile of the wait in s        booting              ready", file=sys.stderr)
    for kind, length_s, load in itertools.product(get_args(Kind), LENGTHS_S, LOADS):
        scenario = Scenario(kind, length_s, load, jobs)
        booting, ready = (waits_s(scenario, setting) for setting in get_args(Setting))
        lost += 2 * jobs - len(booting) - len(ready)
        shown = "  ".join(
            f"{mean(each):6.1f} {median(each):6.1f} {quantiles(each, n=20)[-1]:6.1f}" for each in (booting, ready)
        )
        name = f"{kind}_{length_s:g}s_load_{100 * load:g}"
        print(f"{name:45} {shown}", file=sys.stderr)
        figures.append(Figure(f"take_jobs_{name}_longer_s", mean(booting) - mean(ready), "s"))
    return report([*figures, Figure("take_jobs_never_run", lost, "", LOST_BOUND)], options)


if __name__ == "__main__":
    sys.exit(main())
