"""What the worker itself holds in memory: idle, and at most while a gigabyte goes to a bucket, to the volume, or nowhere.

The real worker and ComfyUI in production mode, in front of a stand-in of RunPod; ComfyUI writes a file of 1 GB, as a long
video is. The peak is what the kernel counts (VmHWM, begun anew before each job). Limits: 90 MB idle and 80 MB more at the peak,
so that a result is never in memory as a whole. With a bucket boto3 and its client add 24 MB when idle; that is for information.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.report import Figure, parse_args, report
from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args, ensure_engine
from devkit.engine.models import make_volume
from devkit.s3 import S3Server

if TYPE_CHECKING:
    from devkit.engine.build import Engine
    from devkit.local_worker import LocalWorker

IDLE_BOUND_MB: Final = 90.0
RISE_BOUND_MB: Final = 80.0
FULL_BYTES, SHORT_BYTES = 1_000_000_000, 200_000_000
JOB_TIMEOUT_S: Final = 600.0
SETTLE_S: Final = 2.0  # what a start leaves to its threads, the import of boto3 among it, is over by then


def status_mb(pid: int, field: str) -> float:
    """A figure of /proc/PID/status in MB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found  # noqa: S101 - every process has it
    return int(found[1]) * 1024 / 1e6


def rise_mb(plane: ControlPlane, worker: LocalWorker, filename: str, size_bytes: int) -> tuple[float, dict[str, Any]]:
    """By how much a job with such an output raised the worker's memory at its peak, and the answer."""
    before = status_mb(worker.pid, "VmRSS")
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the peak counts from here (proc_pid_clear_refs(5))
    graph = {"1": {"class_type": "FaultFile", "inputs": {"key": "gifs", "filename": filename, "size_bytes": size_bytes}}}
    answer = plane.submit({"workflow": graph}).result(JOB_TIMEOUT_S)
    return status_mb(worker.pid, "VmHWM") - before, answer


def made(plane: ControlPlane, engine: Engine, folder: Path, volume: Path, **environ: str) -> ProductionWorker:
    """A worker with the node that writes large files."""
    folder.mkdir()
    flags = shlex.join([*engine_args(engine), *nodes.FLAGS])
    worker = ProductionWorker(plane, engine, folder, volume, {"COMFY_ARGS": flags, **environ})
    nodes.install(worker.base_dir)
    return worker


def item_type(answer: dict[str, Any]) -> str:
    """How the one output came: its type, or `refused`."""
    if answer["status"] == "FAILED":
        return "refused" if "result_too_large" in str(answer) else str(answer)
    output = answer.get("output") or {}
    return str(next(item["type"] for key in ("videos", "images", "files") for item in output.get(key) or ()))


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=3, short_samples=1)
    size_bytes = SHORT_BYTES if options.short else FULL_BYTES
    engine = ensure_engine()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as name, S3Server(folder=Path(name)) as s3:
        root = Path(name)
        make_volume(engine, root / "volume")
        bucket = {
            "BUCKET_ENDPOINT_URL": s3.endpoint_url,
            "BUCKET_NAME": s3.bucket("results"),
            "BUCKET_ACCESS_KEY_ID": s3.access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": s3.secret_access_key,
            "BUCKET_REGION": s3.region,
        }
        ways = {
            "s3": (root / "volume", bucket, "s3_url"),
            "volume": (root / "volume", {}, "volume_path"),
            "refused": (root / "none", {}, "refused"),
        }
        for way, (volume, environ, expected) in ways.items():
            with ControlPlane(poll_s=20) as plane, made(plane, engine, root / f"worker-{way}", volume, **environ) as worker:
                worker.wait_ready()
                threading.Event().wait(SETTLE_S)
                idle_bound_mb = None if environ else IDLE_BOUND_MB
                figures.append(Figure(f"idle_before_{way}_mb", status_mb(worker.pid, "VmRSS"), "MB", idle_bound_mb))
                rises, took = [], []
                for number in range(options.samples):
                    began = time.perf_counter()
                    rise, answer = rise_mb(plane, worker, f"{number}.mp4", size_bytes)
                    took.append(size_bytes / 1e6 / (time.perf_counter() - began))
                    rises.append(rise)
                    if item_type(answer) != expected:
                        raise RuntimeError(f"expected {expected}: {str(answer)[:500]}\n{worker.log_tail()}")
                figures.append(Figure(f"{way}_rise_mb", max(rises), "MB", RISE_BOUND_MB, tuple(rises)))
                if way != "refused":
                    figures.append(Figure.of(f"{way}_mb_per_s", took, "MB/s"))
    return report(figures, options)


if __name__ == "__main__":
    sys.exit(main())
