"""How soon a worker lets go: of itself when it is ended, and of a job that is cancelled. Against a stand-in of RunPod.

    leaving_idle_s          SIGTERM to an idle worker until its process and its ComfyUI are gone     bound 2.0
    cancel_to_next_job_s    a job is cancelled while it samples: until the result of the job that
                            waits behind it, less what such a job takes otherwise                    bound 2.0

Each sample is a worker of its own, in production mode: RunPod holds its polls when the signal comes, and tells it of the
cancellation through another. Sampling stops between two steps. Here one takes milliseconds; a large model's is to be added.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Figure, median, parse_args, report
from bench.soak import long_sampling, tiny
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import ensure_engine
from devkit.engine.models import make_volume

if TYPE_CHECKING:
    from devkit.control_plane import JobHandle

# A worker that leaves waits 1.5 s for a job that may be on its way.
LEAVING_BOUND_S, CANCEL_BOUND_S = 2.0, 2.0
USUAL = 5
TIMEOUT_S = 60.0
TINY = 1
"""The number of a tiny job, of a random colour."""


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, short_samples=2)
    engine = ensure_engine()
    usual_s, cancel_s, leaving_s = [], [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ControlPlane(poll_s=TIMEOUT_S) as plane:
        root = Path(name)
        make_volume(engine, root / "volume")
        for number in range(options.samples):
            folder = root / f"worker-{number}"
            folder.mkdir()
            with ProductionWorker(plane, engine, folder, root / "volume", pod_id=f"pod-{number}") as worker:
                worker.wait_ready()
                plane.submit(tiny(TINY)[0]).result(TIMEOUT_S)  # the first one opens connections
                usual_s.append(median([tiny_job_s(plane) for _ in range(USUAL)]))
                cancel_s.append(next_after_cancel_s(plane, number) - usual_s[-1])
                plane.wait_polling(worker.pod_id)
                leaving_s.append(gone_s(worker))
                if left := plane.kill_pod(worker.pod_id):
                    raise RuntimeError(f"{left} processes of the worker outlived it:\n{worker.log_tail()}")
    return report(
        [
            Figure.of("leaving_idle_s", leaving_s, "s", LEAVING_BOUND_S),
            Figure.of("tiny_job_s", usual_s, "s"),
            Figure.of("cancel_to_next_job_s", cancel_s, "s", CANCEL_BOUND_S),
        ],
        options,
    )


def tiny_job_s(plane: ControlPlane) -> float:
    """Return the time of a tiny job, from its submission to its result."""
    began = time.perf_counter()
    completed(plane.submit(tiny(TINY)[0]))
    return time.perf_counter() - began


def next_after_cancel_s(plane: ControlPlane, seed: int) -> float:
    """Return the time from cancelling a sampling job to the result of the waiting one."""
    sampling = plane.submit({"workflow": long_sampling(seed)})
    plane.wait_until(lambda: any(update.value["type"] == "progress" for update in sampling.updates), TIMEOUT_S)
    following = plane.submit(tiny(TINY)[0])
    began = time.perf_counter()
    plane.cancel(sampling.id)
    completed(following)
    return time.perf_counter() - began


def completed(job: JobHandle) -> None:
    """Return when the job has; RuntimeError when it ended otherwise."""
    answer = job.result(TIMEOUT_S)
    if answer["status"] != "COMPLETED":
        raise RuntimeError(f"the worker answered {answer}")


def gone_s(worker: ProductionWorker) -> float:
    """Return the time from SIGTERM until the worker and its ComfyUI are gone."""
    waiting = {os.pidfd_open(pid) for pid in (worker.pid, worker.comfyui_pid())}
    try:
        began = time.perf_counter()
        os.kill(worker.pid, signal.SIGTERM)
        running = set(waiting)
        while running:
            ended, _, _ = select.select(running, [], [], TIMEOUT_S)
            if not ended:
                raise TimeoutError(f"still there after {TIMEOUT_S:g} s:\n{worker.log_tail()}")
            running.difference_update(ended)
        return time.perf_counter() - began
    finally:
        for fd in waiting:
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
