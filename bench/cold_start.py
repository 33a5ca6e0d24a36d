"""From process start to the first picture, weights present: the worker against ComfyUI alone, in turn, in one run.

Both run the same text-to-image graph. ComfyUI alone has the weights in its own folder; the worker has them on its volume, and
its time includes Python's start, links, the SDK and the HTTP answer with the picture in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bare import BareEngine
from bench.report import Figure, parse_args, report
from devkit.engine.build import Engine, ensure_engine
from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT, LocalWorker

BOUND = 1.05


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


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=7)
    engine = ensure_engine()
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


if __name__ == "__main__":
    sys.exit(main())
