"""What the worker itself holds in memory: idle, and at most while a file goes to a bucket, the volume, nowhere, or back.

The real worker and ComfyUI in production mode, in front of a stand-in of RunPod; ComfyUI writes a file of 1 GB, as a long video
is, or of 14 MB, about the largest that comes back as base64. Each sample is a worker of its own: what it holds when it has
started, and how much more at the peak of its first job, which the kernel counts (VmHWM, begun anew before the job). Limits:
90 MB idle, with a bucket or without one, and 80 MB more at the peak, so that a result is never in memory as a whole. As base64
it is, as text and as JSON around that: for information.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.report import Figure, parse_args, report
from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args, ensure_engine
from devkit.engine.models import make_volume
from devkit.s3 import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devkit.engine.build import Engine

IDLE_BOUND_MB: Final = 90.0
RISE_BOUND_MB: Final = 80.0
FULL_BYTES, SHORT_BYTES, BASE64_BYTES = 1_000_000_000, 200_000_000, 14_000_000
JOB_TIMEOUT_S: Final = 600.0
SETTLE_S: Final = 2.0  # what a start leaves to its threads, the import of boto3 among it, is over by then


@dataclass(frozen=True, slots=True)
class Way:
    """One place for a result: the settings that lead there, and the type of its item; `refused` for no place."""

    name: str
    expected: str
    size_bytes: int
    volume: Path
    environ: Mapping[str, str]
    bound_mb: float | None = RISE_BOUND_MB


@dataclass(frozen=True, slots=True)
class Sample:
    """One worker: idle, how much more at the peak of its job, and how fast that was."""

    idle_mb: float
    rise_mb: float
    mb_per_s: float


def status_mb(pid: int, field: str) -> float:
    """Return a figure of /proc/PID/status in MB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found  # noqa: S101 - every process has it
    return int(found[1]) * 1024 / 1e6


def measure(way: Way, engine: Engine, folder: Path) -> Sample:
    """Start a worker and send it one job. Raises RuntimeError when its result does not go that way."""
    folder.mkdir()
    flags = shlex.join([*engine_args(engine), *nodes.FLAGS])
    with ControlPlane(poll_s=20) as plane:
        worker = ProductionWorker(plane, engine, folder, way.volume, {"COMFY_ARGS": flags, **way.environ})
        nodes.install(worker.base_dir)
        with worker:
            worker.wait_ready()
            threading.Event().wait(SETTLE_S)
            idle_mb = status_mb(worker.pid, "VmRSS")
            Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the peak counts from here (proc_pid_clear_refs(5))
            began = time.perf_counter()
            answer = plane.submit({"workflow": graph(way.size_bytes)}, via="runsync").result(JOB_TIMEOUT_S)
            took_s = time.perf_counter() - began
            if item_type(answer) != way.expected:
                raise RuntimeError(f"expected {way.expected}: {str(answer)[:500]}\n{worker.log_tail()}")
            return Sample(idle_mb, status_mb(worker.pid, "VmHWM") - idle_mb, way.size_bytes / 1e6 / took_s)


def graph(size_bytes: int) -> dict[str, Any]:
    """Return a node that writes a file of this size."""
    return {"1": {"class_type": "FaultFile", "inputs": {"key": "gifs", "filename": "1.mp4", "size_bytes": size_bytes}}}


def item_type(answer: dict[str, Any]) -> str:
    """Return the type of the one output, or `refused`."""
    if answer["status"] == "FAILED":
        return "refused" if "result_too_large" in str(answer) else str(answer)
    output = answer.get("output") or {}
    return str(next(item["type"] for key in ("videos", "images", "files") for item in output.get(key) or ()))


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=5, short_samples=1)
    size_bytes = SHORT_BYTES if options.short else FULL_BYTES
    engine = ensure_engine()
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
        ways = [
            Way("s3", "s3_url", size_bytes, root / "volume", bucket),
            Way("volume", "volume_path", size_bytes, root / "volume", {}),
            Way("refused", "refused", size_bytes, root / "none", {}),
            Way("base64", "base64", BASE64_BYTES, root / "none", {}, None),
        ]
        taken = [
            (way, [measure(way, engine, root / f"worker-{way.name}-{number}") for number in range(options.samples)])
            for way in ways
        ]
    return report(list(figures(taken)), options)


def figures(taken: Sequence[tuple[Way, Sequence[Sample]]]) -> Iterator[Figure]:
    """Return the memory when idle, with and without a bucket, and the highest of the peaks."""
    for name, with_bucket in (("idle_mb", False), ("idle_with_bucket_mb", True)):
        idle = [each.idle_mb for way, samples in taken if bool(way.environ) is with_bucket for each in samples]
        yield Figure.of(name, idle, "MB", IDLE_BOUND_MB)
    for way, samples in taken:
        rises = [each.rise_mb for each in samples]
        yield Figure(f"{way.name}_rise_at_most_mb", max(rises), "MB", way.bound_mb, rises)
        if way.expected != "refused":
            yield Figure.of(f"{way.name}_mb_per_s", [each.mb_per_s for each in samples], "MB/s")


if __name__ == "__main__":
    sys.exit(main())
