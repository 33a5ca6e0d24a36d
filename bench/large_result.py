"""Eight pictures of noise through base64: runsync of a job with 21 MB of PNG, against the bare engine plus the SDK alone.

The bare engine makes the same files and leaves them on its disk; the SDK alone hands as many bytes, 28 MB of JSON, to its
client: it is started with the sizes of the worker's first answer, and in each round every one's bytes, the engine's too, must
be the same within 1 %. What is left is the worker's own: finding the files, reading and encoding them.

    large_result_ratio                    the worker / (the engine + the SDK)     bound 1.05
    large_result_over_engine_ratio        (the worker - the SDK) / the engine     bound 1.1
    large_result_with_sdk_over_engine     the worker / the engine                 informs: the SDK alone takes a seventh
"""

from __future__ import annotations

import base64
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bare import BareEngine, BareSdk, Endpoint
from bench.report import Figure, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.local_worker import LocalWorker

if TYPE_CHECKING:
    from collections.abc import Sequence

BOUND, OVER_ENGINE_BOUND = 1.05, 1.1
PICTURES = 8
SIDE = 1024
SAME = 0.01
"""By what share the sizes of two runs' noise may differ."""


def graph() -> dict[str, Any]:
    """Return a graph with noise that no earlier run made."""
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
    rounds: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "worker").mkdir()
        local = LocalWorker(engine, folder / "worker", folder / "volume", {"RESULT_LIMIT_MB": "100"})
        with BareEngine(engine, folder / "bare") as bare, local as worker:
            worker.wait_ready()
            api = Endpoint(worker.port)
            # The first run of each imports what the nodes need.
            sizes = sizes_of(api.post("/runsync", {"input": {"workflow": graph()}}))
            bare.run(graph())
            with BareSdk(sizes) as sdk:
                sdk.run({"workflow": {}})
                for _ in range(options.samples):
                    known = set((folder / "bare/output").iterdir())
                    marks = [time.perf_counter()]
                    bare.run(graph())
                    marks.append(time.perf_counter())
                    sdk.run({"workflow": {}})
                    marks.append(time.perf_counter())
                    answer = api.post("/runsync", {"input": {"workflow": graph()}})
                    marks.append(time.perf_counter())
                    rounds.append((marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]))
                    check_same(sizes, sizes_of(answer))
                    check_same(sizes, [path.stat().st_size for path in (folder / "bare/output").iterdir() if path not in known])
    bare_s, sdk_s, worker_s = (tuple(samples) for samples in zip(*rounds, strict=True))
    return report(
        [
            Figure("large_result_mb", sum(sizes) / 1e6, "MB"),
            Figure.of("bare_engine_s", bare_s, "s"),
            Figure.of("sdk_alone_s", sdk_s, "s"),
            Figure.of("worker_s", worker_s, "s"),
            Figure.of("large_result_with_sdk_over_engine", [ours / theirs for theirs, _, ours in rounds], "x"),
            Figure.of(
                "large_result_over_engine_ratio",
                [(ours - sdks) / theirs for theirs, sdks, ours in rounds],
                "x",
                OVER_ENGINE_BOUND,
            ),
            Figure.of("large_result_ratio", [ours / (theirs + sdks) for theirs, sdks, ours in rounds], "x", BOUND),
        ],
        options,
    )


def sizes_of(answer: dict[str, Any]) -> list[int]:
    """Return the sizes of the pictures in bytes. Raises unless every picture is complete."""
    pictures = [base64.b64decode(item["data"]) for item in answer["output"]["images"]]
    if len(pictures) != PICTURES or not all(data.endswith(b"IEND\xaeB`\x82") for data in pictures):
        raise RuntimeError("the worker did not return the pictures")
    return [len(data) for data in pictures]


def check_same(expected: Sequence[int], found: Sequence[int]) -> None:
    """Raise unless as many files have the same size, as nearly as noise does."""
    if len(found) != len(expected) or abs(sum(found) / sum(expected) - 1) > SAME:
        raise RuntimeError(f"what is compared is not the same: {sum(expected)} bytes in {len(expected)} files, {found}")


if __name__ == "__main__":
    sys.exit(main())
