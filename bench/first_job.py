"""A cold worker's first job with large weights on a network volume, cold and read ahead, against the parts it is made of.

The weights are a network of real shape (SD 3's, 19 blocks: 2.0 GB in 16 bits) that ComfyUI reads and copies tensor by tensor.
The job loads it and does nothing else, so that no sampling hides the reading. They lie on a real MooseFS volume whose line
carries 200 MB/s, what is quoted for RunPod's; before each measurement nothing of them is in this host's memory.

    first_job_read_ahead / (max(engine's boot, reading once) + the job when warm)     bound 1.15
    first_job_cold       / the same                                                   informs: what it costs without
    first_job_taken_booting / the same                                                bound 1.05
    first_job_taken_ready   / the same                                                informs: as with TAKE_JOBS=ready

The last two are in production mode, with a job that waits in the queue and weights that no job of the endpoint used before:
what is read ahead is what the job itself names. `wrong_request_s` is from the worker's start to the answer to a request that
is wrong in itself; bound 2.5 s.

The boot and the warm job are ComfyUI's alone, without a worker. Reading once is four readers through plain reads, measured with
nothing else going on. The second worker knows what to read from the record that the first one's job left on the volume.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.bare import BareEngine
from bench.report import Figure, leave_out, parse_args, report
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import ensure_engine
from devkit.local_worker import LocalWorker
from devkit.moosefs import MooseFS, MooseFSError, available

if TYPE_CHECKING:
    import argparse

    from devkit.engine.build import Engine

BOUND: Final = 1.15
BOOTING_BOUND: Final = 1.05
WRONG_BOUND_S: Final = 2.5
LINE_BYTES_PER_S: Final = 200_000_000
FULL_DEPTH, SHORT_DEPTH = 19, 15
"""2.0 GB, and 1.0 GB: in the short run the boot and the reading take about as long as each other."""
NAME: Final = "large.safetensors"
BLOCK: Final = 1 << 20

GRAPH: Final[dict[str, Any]] = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": NAME, "weight_dtype": "default"}},
    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}

_SHAPES: Final = """
import json, sys
sys.path.insert(0, sys.argv[1])
depth, sys.argv = int(sys.argv[2]), ["shapes", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ops, torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
network = MMDiT(input_size=None, patch_size=2, in_channels=16, depth=depth, adm_in_channels=2048, num_patches=1024,
                context_embedder_config=context, pos_embed_max_size=32, qk_norm="rms", dtype=torch.float16, device="meta",
                operations=comfy.ops.disable_weight_init)
print(json.dumps({key: list(like.shape) for key, like in network.state_dict().items()}))
"""


def write_weights(engine: Engine, path: Path, depth: int) -> int:
    """Write a safetensors file that ComfyUI takes for an SD 3, of noise; its size in bytes."""
    command = [str(engine.python), "-P", "-c", _SHAPES, str(engine.comfyui_dir), str(depth)]
    shapes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * _product(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    noise = bytes(byte & 0xBF for byte in os.urandom(BLOCK))  # no exponent of all ones: every value is a number
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for offset in range(0, end, BLOCK):
            stream.write(noise[: end - offset])
        stream.flush()
        os.fsync(stream.fileno())
    return path.stat().st_size


def evict(path: Path) -> None:
    """Drop a file from this host's memory. The chunk server's cache belongs to another machine."""
    with path.open("rb", buffering=0) as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _product(shape: list[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


@dataclass(frozen=True, slots=True)
class Scene:
    """One volume with one model, and where workers and ComfyUI are put."""

    engine: Engine
    volume: MooseFS
    root: Path

    @property
    def weights(self) -> Path:
        """Return the model on the volume."""
        return self.volume.mounts[0] / "models/diffusion_models" / NAME

    def read_once_s(self) -> float:
        """Return the time of four readers through the whole file."""
        evict(self.weights)
        began = time.perf_counter()
        with self.weights.open("rb", buffering=0) as stream:
            offsets = deque(range(0, self.weights.stat().st_size, 8 * BLOCK))

            def read() -> None:
                buffer = bytearray(8 * BLOCK)
                while offsets:
                    os.preadv(stream.fileno(), [buffer], offsets.popleft())

            threads = [threading.Thread(target=read) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return time.perf_counter() - began

    def bare_s(self) -> tuple[float, float]:
        """Return the time of ComfyUI alone: its boot, then the job with the weights in memory."""
        folder = self.root / "bare/models/diffusion_models"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / NAME).is_symlink():
            (folder / NAME).symlink_to(self.weights)
        began = time.perf_counter()
        with BareEngine(self.engine, self.root / "bare") as bare:
            booted = time.perf_counter()
            bare.run(GRAPH)
            return booted - began, time.perf_counter() - booted

    def worker_s(self, name: str, **environ: str) -> float:
        """Return the time from a worker's start to its first result, with no weights in memory."""
        folder = self.root / name
        folder.mkdir()
        evict(self.weights)
        began = time.perf_counter()
        with LocalWorker(self.engine, folder, self.volume.mounts[0], environ) as worker:
            worker.wait_ready()
            answer = worker.runsync({"workflow": GRAPH})
            took_s = time.perf_counter() - began
        if answer["status"] != "COMPLETED":
            raise RuntimeError(f"the worker answered {answer}:\n{worker.log_tail()}")
        return took_s

    def queued_s(self, name: str, job_input: object, status: str, **environ: str) -> float:
        """From a worker's start in production mode to the answer of the job that waits, nothing of the weights in memory."""
        folder = self.root / name
        folder.mkdir()
        evict(self.weights)
        with ControlPlane(poll_s=60.0) as plane:
            job = plane.submit(job_input)
            began = time.perf_counter()
            # An endpoint of its own: nobody has left a record of what to read.
            volume = self.volume.mounts[0]
            with ProductionWorker(plane, self.engine, folder, volume, {"RUNPOD_ENDPOINT_ID": name, **environ}) as worker:
                answer = job.result(600)
                took_s = time.perf_counter() - began
        if answer["status"] != status:
            raise RuntimeError(f"the worker answered {answer}:\n{worker.log_tail()}")
        return took_s


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=5, short_samples=1, add=_arguments)
    if reason := available():
        leave_out(reason)
        return report([], options)
    engine = ensure_engine()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-first-", dir=options.extra.data)))
        volume = stack.enter_context(MooseFS(root / "volume", mounts=1))
        scene = Scene(engine, volume, root)
        size_bytes = write_weights(engine, scene.weights, SHORT_DEPTH if options.short else FULL_DEPTH)
        try:
            volume.limit_line(LINE_BYTES_PER_S)
        except MooseFSError as exc:
            leave_out(str(exc))
            return report([], options)
        scene.bare_s()  # ComfyUI's own files come into memory
        rows = []
        for number in range(options.samples):
            read_s = scene.read_once_s()
            boot_s, warm_s = scene.bare_s()
            cold_s = scene.worker_s(f"cold-{number}", WARM_MODELS="none", RUNPOD_ENDPOINT_ID="bench")
            if number == 0:
                scene.worker_s("recorder", RUNPOD_ENDPOINT_ID="bench")
            ahead_s = scene.worker_s(f"ahead-{number}", RUNPOD_ENDPOINT_ID="bench")
            ready_s = scene.queued_s(f"ready-{number}", {"workflow": GRAPH}, "COMPLETED", TAKE_JOBS="ready")
            booting_s = scene.queued_s(f"booting-{number}", {"workflow": GRAPH}, "COMPLETED", TAKE_JOBS="booting")
            wrong_s = scene.queued_s(f"wrong-{number}", {"workflow": GRAPH, "timeout_s": -1}, "FAILED")
            rows.append((read_s, boot_s, warm_s, cold_s, ahead_s, ready_s, booting_s, wrong_s))
    read, boot, warm, cold, ahead, ready, booting, wrong = (tuple(column) for column in zip(*rows, strict=True))
    parts = [max(row[1], row[0]) + row[2] for row in rows]
    return report(
        [
            Figure.of("line_mb_per_s", [size_bytes / 1e6 / seconds for seconds in read], "MB/s"),
            Figure.of("read_once_s", read, "s"),
            Figure.of("engine_boot_s", boot, "s"),
            Figure.of("warm_job_s", warm, "s"),
            Figure.of("first_job_cold_s", cold, "s"),
            Figure.of("first_job_read_ahead_s", ahead, "s"),
            Figure.of("first_job_taken_ready_s", ready, "s"),
            Figure.of("first_job_taken_booting_s", booting, "s"),
            Figure.of("wrong_request_s", wrong, "s", WRONG_BOUND_S),
            Figure.of("first_job_taken_ready_ratio", [ours / theirs for ours, theirs in zip(ready, parts, strict=True)], "x"),
            Figure.of(
                "first_job_taken_booting_ratio",
                [ours / theirs for ours, theirs in zip(booting, parts, strict=True)],
                "x",
                BOOTING_BOUND,
            ),
            Figure.of("first_job_cold_ratio", [ours / theirs for ours, theirs in zip(cold, parts, strict=True)], "x"),
            Figure.of(
                "first_job_read_ahead_ratio", [ours / theirs for ours, theirs in zip(ahead, parts, strict=True)], "x", BOUND
            ),
        ],
        options,
        data=root,
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="a folder on the disk that the volume's content should lie on")


if __name__ == "__main__":
    sys.exit(main())
