"""From process start to the first picture, weights present: the worker against ComfyUI alone, in turn, in one run.

Both run the same text-to-image graph. ComfyUI alone has the weights in its own folder; the worker has them on its volume, and
its time includes Python's start, links, the SDK and the HTTP answer with the picture in it.

With --dropped: from process start to ready, with this machine's page cache emptied before each start (root only), with and
without the list of files that are read ahead. Both again with reads limited to 200 MB/s (by a control group, version 1).

    dropped_ready_ratio    cold with the list / warm                                          bound 1.15
    slow_loss_ratio        what a cold start on the slow disk loses, with the list / without  bound 0.5
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bare import BareEngine
from bench.report import Figure, leave_out, parse_args, report
from devkit.engine.build import Engine, ensure_engine
from devkit.engine.models import make_volume
from devkit.engine.start_files import record, start_files
from devkit.local_worker import PROJECT, LocalWorker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from bench.report import Options

BOUND = 1.05
DROPPED_BOUND = 1.15
SLOW_BOUND = 0.5
SLOW_BYTES_PER_S = 200_000_000
_DROP = Path("/proc/sys/vm/drop_caches")
_GROUPS = Path("/sys/fs/cgroup/blkio")


def bare_s(engine: Engine, base_dir: Path, graph: dict[str, Any]) -> float:
    """Return the time of ComfyUI alone to its first result."""
    began = time.perf_counter()
    with BareEngine(engine, base_dir) as bare:
        bare.run(graph)
        return time.perf_counter() - began


def worker_s(engine: Engine, folder: Path, volume: Path, graph: dict[str, Any]) -> float:
    """Return the time of the worker to its first result, in a new folder each time: no links are left from the last run."""
    began = time.perf_counter()
    with LocalWorker(engine, folder, volume) as worker:
        worker.wait_ready()
        answer = worker.runsync({"workflow": graph})
        took_s = time.perf_counter() - began
    if answer["status"] != "COMPLETED":
        raise RuntimeError(f"the worker answered {answer}")
    return took_s


def ready_s(engine: Engine, folder: Path, volume: Path, *, cold: bool, listed: bool) -> float:
    """Return the time from process start to ready."""
    folder.mkdir()
    if cold:
        os.sync()
        _DROP.write_text("3")
    environ = {} if listed else {"START_FILES": "none"}
    began = time.perf_counter()
    with LocalWorker(engine, folder, volume, environ) as worker:
        worker.wait_ready()
        return time.perf_counter() - began


@contextlib.contextmanager
def slow_reads(device: int) -> Iterator[None]:
    """Limit what this process and its children read from a disk. Raises `OSError` if the kernel cannot."""
    group = _GROUPS / f"bench-{os.getpid()}"
    group.mkdir()
    try:
        limit = f"{os.major(device)}:{os.minor(device)} {SLOW_BYTES_PER_S}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (_GROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def dropped(engine: Engine, root: Path, options: Options) -> int:
    """Measure starts with an empty page cache, and report."""
    if not os.access(_DROP, os.W_OK):
        leave_out("only root may empty the page cache")
        return report([], options)
    if not start_files(engine).is_file():
        record(engine)
    volume = make_volume(engine, root / "volume")
    numbers = itertools.count()

    def take(*, cold: bool = True, listed: bool = True) -> float:
        return ready_s(engine, root / f"worker-{next(numbers)}", volume, cold=cold, listed=listed)

    warm, without, ahead, slow_without, slow_ahead = ([] for _ in range(5))
    take(cold=False)  # everything comes into memory
    for _ in range(options.samples):
        without.append(take(listed=False))
        warm.append(take(cold=False))
        ahead.append(take())
        try:
            with slow_reads(engine.root.stat().st_dev):
                slow_without.append(take(listed=False))
                slow_ahead.append(take())
        except OSError as exc:
            leave_out(str(exc), "a slow disk")
    return report(_figures(warm, without, ahead, slow_without, slow_ahead), options, data=engine.root)


def _figures(
    warm: list[float], without: list[float], ahead: list[float], slow_without: list[float], slow_ahead: list[float]
) -> list[Figure]:
    figures = [
        Figure.of("warm_ready_s", warm, "s"),
        Figure.of("dropped_ready_without_list_s", without, "s"),
        Figure.of("dropped_ready_s", ahead, "s"),
        Figure.of("dropped_ready_ratio", [ours / best for ours, best in zip(ahead, warm, strict=True)], "x", DROPPED_BOUND),
    ]
    if not slow_ahead:
        return figures
    losses = [(with_list - best) / (none - best) for with_list, none, best in zip(slow_ahead, slow_without, warm, strict=True)]
    return [
        *figures,
        Figure.of("slow_ready_without_list_s", slow_without, "s"),
        Figure.of("slow_ready_s", slow_ahead, "s"),
        Figure.of("slow_loss_ratio", losses, "x", SLOW_BOUND),
    ]


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=7, add=_arguments)
    engine = ensure_engine()
    if options.extra.dropped:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            return dropped(engine, Path(name), options)
    graph = json.loads((PROJECT / "devkit/workflows/text_to_image.json").read_text())
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name)
        make_volume(engine, root / "volume")
        make_volume(engine, root / "bare")
        bare: list[float] = []
        worker: list[float] = []
        for number in range(options.samples + 1):
            folder = root / f"worker-{number}"
            folder.mkdir()
            bare.append(bare_s(engine, root / "bare", graph))
            worker.append(worker_s(engine, folder, root / "volume", graph))
    bare, worker = bare[1:], worker[1:]  # the first of each warmed the page cache
    return report(
        [
            Figure.of("bare_first_result_s", bare, "s"),
            Figure.of("worker_first_result_s", worker, "s"),
            Figure.of("cold_start_ratio", [ours / theirs for ours, theirs in zip(worker, bare, strict=True)], "x", BOUND),
        ],
        options,
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dropped", action="store_true", help="empty the machine's page cache before each start")


if __name__ == "__main__":
    sys.exit(main())
