"""Eight pictures of noise through base64: runsync of a job with 25 MB of PNG, against the bare engine plus the SDK alone.

The bare engine makes the same files and leaves them on its disk; the SDK alone hands 34 MB of JSON to its client. What is left
is the worker's own: finding the files, reading and encoding them.
"""

from __future__ import annotations

import base64
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bare import BareEngine, BareSdk, Endpoint
from bench.report import Figure, median, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.local_worker import LocalWorker

BOUND = 1.05
PICTURES = 8
SIDE = 1024
PNG_BYTES = 3_155_000
"""About what a picture of noise takes as PNG."""


def graph() -> dict[str, Any]:
    """Noise that no earlier run made."""
    seed = random.randrange(1 << 48)
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": SIDE, "height": SIDE, "batch_size": PICTURES, "color": 0x808080}},
        "2": {"class_type": "ImageAddNoise", "inputs": {"image": ["1", 0], "seed": seed, "strength": 0.5}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "noise"}},
    }


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=7)
    engine = ensure_engine()
    bare_s: list[float] = []
    sdk_s: list[float] = []
    worker_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "worker").mkdir()
        local = LocalWorker(engine, folder / "worker", folder / "volume", {"RESULT_LIMIT_MB": "100"})
        with BareEngine(engine, folder / "bare") as bare, BareSdk([PNG_BYTES] * PICTURES) as sdk, local as worker:
            worker.wait_ready()
            api = Endpoint(worker.port)
            for turn in range(1 + options.samples):
                marks = [time.perf_counter()]
                bare.run(graph())
                marks.append(time.perf_counter())
                sdk.run({"workflow": {}})
                marks.append(time.perf_counter())
                answer = api.post("/runsync", {"input": {"workflow": graph()}})
                marks.append(time.perf_counter())
                check(answer)
                if turn:  # the first run of each imports what the nodes need
                    for samples, began, ended in zip((bare_s, sdk_s, worker_s), marks, marks[1:], strict=False):
                        samples.append(ended - began)
    return report(
        [
            Figure.of("bare_engine_s", bare_s, "s"),
            Figure.of("sdk_alone_s", sdk_s, "s"),
            Figure.of("worker_s", worker_s, "s"),
            Figure("large_result_over_engine_ratio", median(worker_s) / median(bare_s), "x"),
            Figure("large_result_ratio", median(worker_s) / (median(bare_s) + median(sdk_s)), "x", BOUND),
        ],
        options,
    )


def check(answer: dict[str, Any]) -> None:
    """Raise unless every picture is there, whole."""
    pictures = [base64.b64decode(item["data"]) for item in answer["output"]["images"]]
    if len(pictures) != PICTURES or not all(data.endswith(b"IEND\xaeB`\x82") for data in pictures):
        raise RuntimeError("the worker did not return the pictures")


if __name__ == "__main__":
    sys.exit(main())
