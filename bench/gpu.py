"""SDXL at its real size on a real GPU: the worker against the same ComfyUI alone, and what its GPU's faults cost.

    COMFYUI_DIR=/comfyui COMFYUI_PYTHON=/opt/venv/bin/python python -m bench.gpu --data /workspace/bench

The weights are noise (`devkit/engine/make_sdxl.py`), 6.9 GB in four files, made in `--data` once and kept there; a network of
noise takes as long as the one that people use. The graph is the usual one: two prompts, 20 steps, 1024x1024.

    gpu_warm_job         a warm job through `runsync`: the worker / ComfyUI alone                       bound 1.05
    gpu_first_result     process start to the first result, weights in the page cache: the same         bound 1.05
    gpu_first_job_*      ready to the first result with nothing in the page cache: not read ahead; read ahead; run once
    after_*              the next job's result after the GPU's memory ran out, and after a kernel broke the process

Without a GPU that ComfyUI's Python can use it says so and measures nothing. `--cpu` tries the script itself out, with a small
picture and one step.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.bare import BareEngine
from bench.first_job import evict
from bench.report import Figure, leave_out, median, parse_args, report
from devkit import nodes
from devkit.engine.build import Engine, ensure_engine
from devkit.local_worker import PROJECT, LocalWorker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

BOUND: Final = 1.05
GB: Final = 1_000_000_000
WARM_JOBS: Final = 3
_ASK: Final = "import torch; d = torch.cuda; print(d.is_available() and f'{d.get_device_name()}, torch {torch.__version__}')"


def graph(seed: int, *, size: int, steps: int, batch: int = 1) -> dict[str, Any]:
    """Return SDXL's usual text-to-image graph."""
    clips = {"clip_name1": "sdxl_clip_l.safetensors", "clip_name2": "sdxl_clip_g.safetensors", "type": "sdxl"}
    sampling = {"seed": seed, "steps": steps, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wires = {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "sdxl_unet.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "DualCLIPLoader", "inputs": clips},
        "3": {"class_type": "VAELoader", "inputs": {"vae_name": "sdxl_vae.safetensors"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "a lighthouse in a storm"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "blurry"}},
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": batch}},
        "7": {"class_type": "KSampler", "inputs": {**sampling, **wires}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["3", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "sdxl"}},
    }


def broken_gpu() -> dict[str, Any]:
    """Return a graph that reads outside a tensor on the GPU, after which CUDA no longer works in its process."""
    picture = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    return {
        "1": {"class_type": "EmptyImage", "inputs": picture},
        "2": {"class_type": "FaultGpu", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }


@dataclass(frozen=True, slots=True)
class Scene:
    """One ComfyUI, one volume with SDXL on it, and the sizes of a job."""

    engine: Engine
    args: Sequence[str]
    volume: Path
    root: Path
    size: int
    steps: int

    def job(self, seed: int, **more: int) -> dict[str, Any]:
        """Return a job that no cache answers, unless its seed was used before."""
        return graph(seed, **{"size": self.size, "steps": self.steps, **more})

    def weights(self) -> list[Path]:
        """Return the files of the model."""
        return sorted((self.volume / "models").rglob("*.safetensors"))

    def read(self) -> None:
        """Read all of the weights into the page cache."""
        for path in self.weights():
            with path.open("rb", buffering=0) as stream:
                while stream.read(64 << 20):
                    pass

    def bare(self, number: int) -> tuple[float, list[float]]:
        """Return the times of ComfyUI alone: process start to the first result, then warm jobs; seconds."""
        folder = self.root / f"bare-{number}"
        folder.mkdir()
        (folder / "models").symlink_to(self.volume / "models")
        began = time.perf_counter()
        with BareEngine(self.engine, folder, self.args) as engine:
            engine.run(self.job(0))
            first_s = time.perf_counter() - began
            return first_s, [timed(lambda seed=seed: engine.run(self.job(seed))) for seed in range(1, WARM_JOBS + 1)]

    def worker(self, name: str, **environ: str) -> LocalWorker:
        """Return a worker on the volume, with the nodes that break things."""
        folder = self.root / name
        folder.mkdir()
        nodes.install(folder / "comfyui")
        flags = shlex.join([*self.args, *nodes.FLAGS])
        return LocalWorker(self.engine, folder, self.volume, {"COMFY_ARGS": flags, "RUNPOD_ENDPOINT_ID": "bench", **environ})

    def through_worker(self, number: int) -> tuple[float, list[float]]:
        """Return the times of the same jobs through the worker, each with its picture in the answer; seconds."""
        began = time.perf_counter()
        with self.worker(f"worker-{number}") as worker:
            worker.wait_ready()
            run(worker, self.job(0))
            first_s = time.perf_counter() - began
            return first_s, [timed(lambda seed=seed: run(worker, self.job(seed))) for seed in range(1, WARM_JOBS + 1)]

    def first_job(self, name: str, **environ: str) -> tuple[float, float]:
        """Process start to ready, and from there to the first result, with nothing in the page cache; seconds."""
        for path in self.weights():
            evict(path)
        began = time.perf_counter()
        with self.worker(name, **environ) as worker:
            worker.wait_ready()
            ready = time.perf_counter()
            run(worker, self.job(0))
            return ready - began, time.perf_counter() - ready

    def faults(self) -> tuple[float, float]:
        """Return the next job's time after the GPU's memory ran out, and after a kernel broke its context; seconds."""
        with self.worker("faults") as worker:
            worker.wait_ready()
            run(worker, self.job(0))
            fail(worker, self.job(1, size=16384, batch=16), "the GPU's memory ran out")
            after_memory_s = timed(lambda: run(worker, self.job(2)))
            engine = worker.comfyui_pid()
            fail(worker, broken_gpu(), "being restarted, send the job again")
            after_fault_s = timed(lambda: run(worker, self.job(3)))
            if worker.comfyui_pid() == engine:
                raise RuntimeError("ComfyUI was not replaced after its GPU's context broke")
            return after_memory_s, after_fault_s


def timed(action: Any) -> float:  # noqa: ANN401 - anything without arguments
    """Return how long it takes, in seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def run(worker: LocalWorker, workflow: dict[str, Any]) -> None:
    """Run one job that has to return a picture."""
    answer = worker.runsync({"workflow": workflow})
    if answer["status"] != "COMPLETED" or not answer["output"]["images"]:
        raise RuntimeError(f"the worker answered {json.dumps(answer)[:1000]}:\n{worker.log_tail()}")


def fail(worker: LocalWorker, workflow: dict[str, Any], says: str) -> None:
    """Run one job that has to fail with such a sentence."""
    answer = worker.runsync({"workflow": workflow})
    print(answer.get("error"), file=sys.stderr)
    if answer["status"] != "FAILED" or says not in answer["error"]:
        raise RuntimeError(f"not '{says}': {json.dumps(answer)[:1000]}:\n{worker.log_tail()}")


def find_engine(root: Path) -> Engine:
    """Return the ComfyUI that COMFYUI_DIR and COMFYUI_PYTHON name, or the tests' own."""
    if "COMFYUI_DIR" not in os.environ:
        return ensure_engine()
    web = root / "web"
    web.mkdir()
    (web / "index.html").write_text("<!doctype html><title>no front end</title>\n")
    return Engine(root, Path(os.environ["COMFYUI_DIR"]), Path(os.environ.get("COMFYUI_PYTHON", "python3")), web)


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=3, short_samples=1, add=_arguments)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=options.extra.data)))
        engine = find_engine(root)
        asked = subprocess.run([engine.python, "-c", _ASK], capture_output=True, text=True, check=False).stdout.strip()
        if asked in {"", "False"} and not options.extra.cpu:
            leave_out(f"{engine.python} finds no GPU")
            return report([], options)
        print(f"{asked}, ComfyUI at {engine.comfyui_dir}", file=sys.stderr)
        volume = (options.extra.data or root) / "volume"
        if not (volume / "models/vae/sdxl_vae.safetensors").is_file():
            maker = PROJECT / "devkit/engine/make_sdxl.py"
            subprocess.run([engine.python, "-P", maker, engine.comfyui_dir, volume / "models"], check=True, stdout=sys.stderr)
        args = ["--front-end-root", str(engine.web_dir), "--database-url", "sqlite:///:memory:"]
        args += ["--disable-api-nodes", "--disable-all-custom-nodes", *(["--cpu"] if options.extra.cpu else [])]
        size, steps = (64, 1) if options.extra.cpu else (1024, 20)
        return report(
            measure(Scene(engine, args, volume, root, size, steps), options.samples, options.extra), options, data=root
        )


def measure(scene: Scene, samples: int, chosen: argparse.Namespace) -> list[Figure]:
    """Measure everything, in one run."""
    scene.read()
    scene.bare(-1)  # what ComfyUI and CUDA themselves keep on disk comes into memory
    bare, worker, unread, ahead, warmed = [], [], [], [], []
    for number in range(samples):
        bare.append(scene.bare(number))
        worker.append(scene.through_worker(number))
        unread.append(scene.first_job(f"unread-{number}", WARM_MODELS="none"))
        ahead.append(scene.first_job(f"ahead-{number}"))
        warmed.append(scene.first_job(f"warmed-{number}", WARMUP_WORKFLOW="auto"))
    figures = [
        Figure("weights_gb", sum(path.stat().st_size for path in scene.weights()) / GB, "GB"),
        Figure.of("gpu_bare_first_result_s", [first for first, _ in bare], "s"),
        Figure.of("gpu_worker_first_result_s", [first for first, _ in worker], "s"),
        Figure.of("gpu_first_result_ratio", [w / b for (w, _), (b, _) in zip(worker, bare, strict=True)], "x", BOUND),
        Figure.of("gpu_bare_warm_job_s", [each for _, warm in bare for each in warm], "s"),
        Figure.of("gpu_worker_warm_job_s", [each for _, warm in worker for each in warm], "s"),
        Figure.of(
            "gpu_warm_job_ratio", [median(w) / median(b) for (_, w), (_, b) in zip(worker, bare, strict=True)], "x", BOUND
        ),
    ]
    for name, pairs in (("not_read_ahead", unread), ("read_ahead", ahead), ("run_once", warmed)):
        figures.append(Figure.of(f"gpu_ready_{name}_s", [ready for ready, _ in pairs], "s"))
        figures.append(Figure.of(f"gpu_first_job_{name}_s", [job for _, job in pairs], "s"))
    if not chosen.cpu:
        after_memory_s, after_fault_s = scene.faults()
        figures += [Figure("after_out_of_memory_s", after_memory_s, "s"), Figure("after_gpu_fault_s", after_fault_s, "s")]
    return figures


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="where the weights are made and kept; a temporary folder when not given")
    parser.add_argument("--cpu", action="store_true", help="try the script out: a small picture and one step, on the CPU")


if __name__ == "__main__":
    sys.exit(main())
