"""What the worker adds to a job: runsync of a tiny graph, against the bare engine plus the SDK alone, in one run.

The three are measured in turn, sample by sample, so that the machine's noise meets all of them. Each graph has another colour:
an identical one would be answered from ComfyUI's cache.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bare import BareEngine, BareSdk, Endpoint
from bench.report import Figure, median, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.local_worker import LocalWorker

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND, BOUND_MS = 1.25, 1.5
WARM_UP = 10


def graph() -> dict[str, Any]:
    """EmptyImage into SaveImage, in a colour of its own."""
    colour = random.randrange(1 << 24)
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "overhead"}},
    }


def timed_ms(action: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=200, short_samples=40)
    engine = ensure_engine()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "worker").mkdir()
        with (
            BareEngine(engine, folder / "bare") as bare,
            BareSdk() as sdk,
            LocalWorker(engine, folder / "worker", folder / "volume") as worker,
        ):
            worker.wait_ready()
            api = Endpoint(worker.port)

            def job() -> None:
                answer = api.post("/runsync", {"input": {"workflow": graph()}})
                if len(answer["output"]["images"]) != 1:
                    raise RuntimeError(f"the worker answered {answer}")

            rounds = [
                (timed_ms(lambda: bare.run(graph())), timed_ms(lambda: sdk.run({"workflow": graph()})), timed_ms(job))
                for _ in range(WARM_UP + options.samples)
            ][WARM_UP:]
    bare_ms, sdk_ms, worker_ms = (tuple(samples) for samples in zip(*rounds, strict=True))
    ratio = median(worker_ms) / (median(bare_ms) + median(sdk_ms))
    return report(
        [
            Figure.of("bare_engine_ms", bare_ms, "ms"),
            Figure.of("sdk_alone_ms", sdk_ms, "ms"),
            Figure.of("worker_ms", worker_ms, "ms"),
            Figure("job_overhead_ratio", ratio, "x", BOUND),
            Figure.of("job_overhead_ms", [ours - theirs - sdks for theirs, sdks, ours in rounds], "ms", BOUND_MS),
        ],
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
