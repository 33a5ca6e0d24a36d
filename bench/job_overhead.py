"""What the worker adds to a job: runsync of a tiny graph, against the bare engine plus the SDK alone, in one run.

The three are measured in turn, sample by sample, so that the machine's noise meets all of them. Each graph has another colour:
an identical one would be answered from ComfyUI's cache.

A second graph names three models besides, on a real MooseFS volume where there can be one: loaders whose outputs are shown,
which ComfyUI answers from its cache from the second run on. What is left is the worker's own look for a job's models, a few
system calls for each that go to the volume. The bare engine's models folder is a link to the volume's, so that ComfyUI's look
at them goes there as well. It informs: the bounds are for the tiny job.

With `--worker-comfyui DIR`, a checkout of github.com/runpod-workers/worker-comfyui, its handler is measured in the same rounds:
the same graph, through the same SDK, to the bare engine. It imports `websocket`, which the kit lacks:
`pip install --target PACKAGES websocket-client`, and PYTHONPATH=PACKAGES.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.bare import BareEngine, BareSdk, Endpoint, WorkerComfyui
from bench.report import Figure, leave_out, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.engine.models import make_volume
from devkit.local_worker import LocalWorker
from devkit.moosefs import MooseFS, available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOUND, BOUND_MS, WORKER_COMFYUI_BOUND = 1.25, 2.0, 1.0
WARM_UP = 10
LOADERS = (
    ("UpscaleModelLoader", "model_name", "tiny_esrgan_x4.safetensors"),
    ("UpscaleModelLoader", "model_name", "tiny_compact_x2.safetensors"),
    ("VAELoader", "vae_name", "tiny_taesd3_vae.safetensors"),
)


def tiny() -> dict[str, Any]:
    """Return EmptyImage into SaveImage, in its own colour."""
    colour = random.randrange(1 << 24)
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "overhead"}},
    }


def with_models() -> dict[str, Any]:
    """Return the same, with three models loaded besides."""
    graph = tiny()
    for number, (loader, field, name) in enumerate(LOADERS):
        graph[f"{10 + number}"] = {"class_type": loader, "inputs": {field: name}}
        graph[f"{20 + number}"] = {"class_type": "PreviewAny", "inputs": {"source": [f"{10 + number}", 0]}}
    return graph


def timed_ms(action: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


class Round(NamedTuple):
    """What one job took in each place."""

    bare_ms: float
    sdk_ms: float
    worker_ms: float
    reference_ms: float | None

    @property
    def overhead_ms(self) -> float:
        """Return what the worker adds to ComfyUI and the SDK."""
        return self.worker_ms - self.bare_ms - self.sdk_ms


def main() -> int:
    """Measure and report."""
    options = parse_args(
        __doc__,
        samples=200,
        short_samples=40,
        add=lambda parser: parser.add_argument(
            "--worker-comfyui", type=Path, metavar="DIR", help="measure its handler as well"
        ),
    )
    engine = ensure_engine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        volume = folder / "volume"
        if reason := available():
            leave_out(reason, "MooseFS")
        else:
            volume = stack.enter_context(MooseFS(folder / "moosefs", mounts=1)).mounts[0]
        make_volume(engine, volume)
        (folder / "worker").mkdir()
        (folder / "bare").mkdir()
        (folder / "bare/models").symlink_to(volume / "models")
        bare = stack.enter_context(BareEngine(engine, folder / "bare"))
        sdk = stack.enter_context(BareSdk())
        worker = stack.enter_context(LocalWorker(engine, folder / "worker", volume))
        worker.wait_ready()
        api = Endpoint(worker.port)
        tree: Path | None = options.extra.worker_comfyui
        reference = stack.enter_context(WorkerComfyui(tree.resolve(), bare.address)) if tree else None

        def job(graph: dict[str, Any]) -> None:
            _check(api.post("/runsync", {"input": {"workflow": graph}}))

        def rounds(graph: Callable[[], dict[str, Any]]) -> list[Round]:
            return [
                Round(
                    timed_ms(lambda: bare.run(graph())),
                    timed_ms(lambda: sdk.run({"workflow": graph()})),
                    timed_ms(lambda: job(graph())),
                    timed_ms(lambda: _check(reference.run({"workflow": graph()}))) if reference else None,
                )
                for _ in range(WARM_UP + options.samples)
            ][WARM_UP:]

        judged = figures("job", rounds(tiny), BOUND, BOUND_MS, WORKER_COMFYUI_BOUND)
        return report([*judged, *figures("job_with_models", rounds(with_models))], options, data=volume)


def _check(answer: dict[str, Any]) -> None:
    if len(answer["output"]["images"]) != 1:
        raise RuntimeError(f"the worker answered {answer}")


def figures(
    name: str,
    rounds: list[Round],
    bound: float | None = None,
    bound_ms: float | None = None,
    reference_bound: float | None = None,
) -> Iterator[Figure]:
    """Return the figures of the rounds of one graph."""
    yield Figure.of(f"{name}_bare_engine_ms", [each.bare_ms for each in rounds], "ms")
    yield Figure.of(f"{name}_sdk_alone_ms", [each.sdk_ms for each in rounds], "ms")
    yield Figure.of(f"{name}_worker_ms", [each.worker_ms for each in rounds], "ms")
    ratios = [each.worker_ms / (each.bare_ms + each.sdk_ms) for each in rounds]
    yield Figure.of(f"{name}_overhead_ratio", ratios, "x", bound)
    yield Figure.of(f"{name}_overhead_ms", [each.overhead_ms for each in rounds], "ms", bound_ms)
    others = [(each.overhead_ms, each.reference_ms - each.bare_ms - each.sdk_ms) for each in rounds if each.reference_ms]
    if others:
        yield Figure.of(f"{name}_worker_comfyui_overhead_ms", [theirs for _, theirs in others], "ms")
        ratios = [ours / theirs for ours, theirs in others]
        yield Figure.of(f"{name}_overhead_per_worker_comfyui", ratios, "x", reference_bound)


if __name__ == "__main__":
    sys.exit(main())
