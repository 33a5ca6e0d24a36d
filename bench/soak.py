"""A thousand mixed jobs in production mode: open files, threads, memory and disk of the worker end where they began.

Most jobs are a tiny picture; others bring a file, preview a text, save a latent, fail validation, sample, are cancelled, or run
into their time limit. Measured after a warm-up of a hundred and after each further tenth; ComfyUI's memory is for information.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Figure, parse_args, report
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import ensure_engine
from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT

JOBS = 1000
WARM_UP = 100
AT_ONCE = 20
WORKFLOWS = PROJECT / "devkit/workflows"
PICTURE = base64.b64encode((WORKFLOWS / "in.png").read_bytes()).decode()
KEEP_MB = 1
WRONG_BOUND, FILES_BOUND, THREADS_BOUND, MEMORY_BOUND_MB, DISK_BOUND_MB = 0, 3, 3, 10.0, KEEP_MB + 4.0
REFUSED, TOO_LONG, CANCELLED = 28, 35, 42


@dataclass(frozen=True, slots=True)
class Usage:
    """What the worker holds at a moment."""

    files: int
    threads: int
    rss_mb: float
    engine_rss_mb: float
    disk_mb: float

    @classmethod
    def of(cls, worker: ProductionWorker) -> Usage:
        """Look at the processes and at the folders of ComfyUI."""
        own, engine = Path(f"/proc/{worker.pid}"), Path(f"/proc/{worker.comfyui_pid()}")
        files = (path for path in worker.base_dir.rglob("*") if path.is_file() and not path.is_symlink())
        return cls(
            len(os.listdir(own / "fd")),  # noqa: PTH208 - only the count is wanted
            len(os.listdir(own / "task")),  # noqa: PTH208 - as above
            rss_mb(own),
            rss_mb(engine),
            sum(path.stat().st_size for path in files) / 1e6,
        )

    def more_than(self, before: Usage) -> Usage:
        """What has come since then."""
        return Usage(
            self.files - before.files,
            self.threads - before.threads,
            self.rss_mb - before.rss_mb,
            self.engine_rss_mb - before.engine_rss_mb,
            self.disk_mb - before.disk_mb,
        )


def rss_mb(process: Path) -> float:
    """The resident memory of a process."""
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def load(name: str) -> dict[str, Any]:
    """One of the project's workflows."""
    graph: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text())
    return graph


def job_input(number: int) -> dict[str, Any]:
    """The job of a number: seven in fifty are not the tiny picture."""
    tiny = load("empty_image")
    tiny["1"]["inputs"]["color"] = random.randrange(1 << 24)
    with_file = {"workflow": load("scale_image"), "images": [{"name": "in.png", "image": PICTURE}]}
    others: dict[int, dict[str, Any]] = {
        7: with_file,
        14: {"workflow": load("preview_text")},
        21: {"workflow": load("save_latent")},
        27: with_file,
        REFUSED: {"workflow": {"1": {"class_type": "NoSuchNode", "inputs": {}}}},
        TOO_LONG: {"workflow": long_sampling(number), "timeout_s": 0.3},
        CANCELLED: {"workflow": long_sampling(number)},
    }
    return others.get(number % 50, {"workflow": tiny})


def long_sampling(seed: int) -> dict[str, Any]:
    """A graph that would sample for a minute."""
    graph = load("text_to_image")
    next(node for node in graph.values() if node["class_type"] == "KSampler")["inputs"].update(steps=10000, seed=seed)
    return graph


def send(plane: ControlPlane, numbers: range) -> int:
    """Send the jobs, some at once, and wait for the end of each; how many ended as a job of their kind should."""
    right, open_jobs = 0, []
    for number in numbers:
        open_jobs.append((number, plane.submit(job_input(number))))
        if len(open_jobs) == AT_ONCE or number == numbers[-1]:
            for each, job in open_jobs:
                if each % 50 == CANCELLED:
                    plane.wait_until(lambda job=job: bool(job.takes), 120)  # type: ignore[misc]  # mypy infers no default
                    plane.cancel(job.id)
                expected = {REFUSED: "FAILED", TOO_LONG: "FAILED", CANCELLED: "CANCELLED"}.get(each % 50, "COMPLETED")
                right += job.result(120)["status"] == expected
            open_jobs = []
    return right


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=10, short_samples=2)
    engine = ensure_engine()
    jobs = JOBS * options.samples // 10
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ControlPlane(poll_s=20) as plane:
        folder = Path(name)
        make_volume(engine, folder / "volume")
        environ = {"OUTPUT_KEEP_MB": str(KEEP_MB)}
        with ProductionWorker(plane, engine, folder, folder / "volume", environ) as worker:
            worker.wait_ready()
            send(plane, range(WARM_UP))
            usage = [Usage.of(worker)]
            began, right = time.monotonic(), 0
            for tenth in range(options.samples):
                first = WARM_UP + tenth * jobs // options.samples
                right += send(plane, range(first, WARM_UP + (tenth + 1) * jobs // options.samples))
                usage.append(Usage.of(worker))
            took_s = time.monotonic() - began
    more = [each.more_than(usage[0]) for each in usage[1:]]
    return report(
        [
            Figure("soak_jobs_wrong", jobs - right, "jobs", WRONG_BOUND),
            Figure("soak_jobs_per_s", jobs / took_s, "1/s"),
            Figure("soak_open_files_more", more[-1].files, "", FILES_BOUND),
            Figure("soak_threads_more", more[-1].threads, "", THREADS_BOUND),
            Figure("soak_rss_more_at_end_mb", more[-1].rss_mb, "MB", MEMORY_BOUND_MB, [each.rss_mb for each in more]),
            Figure("soak_engine_rss_more_at_end_mb", more[-1].engine_rss_mb, "MB", None, [each.engine_rss_mb for each in more]),
            Figure("soak_disk_at_end_mb", usage[-1].disk_mb, "MB", DISK_BOUND_MB, [each.disk_mb for each in usage]),
        ],
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
