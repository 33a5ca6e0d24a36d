"""A cold worker's first job with large weights on a network volume, cold and read ahead, against the parts it is made of.

The weights are a network of real shape (SD 3's, 19 blocks: 2.0 GB in 16 bits) that ComfyUI reads and copies tensor by tensor.
The job loads it and does nothing else, so that no sampling hides the reading. They lie on a real MooseFS volume whose line
carries 200 MB/s, what is quoted for RunPod's; before each measurement nothing of them is in this host's memory.

    first_job_read_ahead / (max(engine's boot, reading once) + the job when warm)     bound 1.15
    first_job_cold       / the same                                                   informs: what it costs without
    first_job_taken_booting / the same                                                bound 1.05
    first_job_taken_ready   / the same                                                informs: as with TAKE_JOBS=ready
    first_job_hub_booting / (max(engine's boot, one download) + the job when warm)    bound 1.05
    first_job_hub_ready   / the same                                                  informs: as with TAKE_JOBS=ready
    first_job_hub_booting / (boot and download side by side, then the job when warm)  informs: what this machine can do at best

All but the first two are in production mode, with a job that waits in the queue and weights that no job of the endpoint used
before: what is read ahead is what the job itself names. For `hub` the weights are not on the volume but on a hub that sends
200 MB/s; they are written to the same volume. `wrong_request_s` is from the worker's start to the answer to a request that is
wrong in itself; bound 2.5 s.

The boot and the warm job are ComfyUI's alone, without a worker. Reading once is four readers through plain reads, one download
is four connections whose bytes are dropped, both measured with nothing else going on. The second worker knows what to read from
the record that the first one's job left on the volume.

On this one machine run the hub and the volume's servers as well. A boot beside a download leaves them too little of two cores,
so that both take longer than alone. Side by side is measured without a worker: ComfyUI boots while four connections write to
the volume, and nothing is checked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.bare import BareEngine
from bench.report import Figure, leave_out, parse_args, report
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import ensure_engine
from devkit.hub import hub_process
from devkit.local_worker import LocalWorker
from devkit.moosefs import MooseFS, MooseFSError, available
from worker.store.layout import Layout

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from devkit.engine.build import Engine
    from devkit.hub import RemoteHub

BOUND: Final = 1.15
BOOTING_BOUND: Final = 1.05
WRONG_BOUND_S: Final = 2.5
LINE_BYTES_PER_S: Final = 200_000_000
FULL_DEPTH, SHORT_DEPTH = 19, 15
"""2.0 GB, and 1.0 GB: in the short run the boot and the reading take about as long as each other."""
NAME: Final = "large.safetensors"
BLOCK: Final = 1 << 20

HUB_NAME: Final = "fetched.safetensors"
FOLDER: Final = "diffusion_models"
REPO: Final = "org/large"
CONNECTIONS: Final = 4
DEFINITIONS_S: Final = 60.0
PARTS: Final = ("ahead", "volume", "hub")


def graph(name: str) -> dict[str, Any]:
    """Return a job that loads the weights and does nothing else."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": "default"}},
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
    parts: list[tuple[float, float, float]]
    """What was measured for `parts_s`."""

    @property
    def weights(self) -> Path:
        """Return the model on the volume."""
        return self.volume.mounts[0] / "models" / FOLDER / NAME

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
            bare.run(graph(NAME))
            return booted - began, time.perf_counter() - booted

    def parts_s(self, arrives_s: float) -> float:
        """Return how long the parts of a first job take: the boot or the weights, whichever is longer, and the job."""
        boot_s, warm_s = self.bare_s()
        self.parts.append((arrives_s, boot_s, warm_s))
        return max(boot_s, arrives_s) + warm_s

    def worker_s(self, name: str, **environ: str) -> float:
        """Return the time from a worker's start to its first result, with no weights in memory."""
        folder = self.root / name
        folder.mkdir()
        evict(self.weights)
        began = time.perf_counter()
        with LocalWorker(self.engine, folder, self.volume.mounts[0], environ) as worker:
            worker.wait_ready()
            answer = worker.runsync({"workflow": graph(NAME)})
            took_s = time.perf_counter() - began
        if answer["status"] != "COMPLETED":
            raise RuntimeError(f"the worker answered {answer}:\n{worker.log_tail()}")
        return took_s

    def queued_s(self, name: str, job_input: object, status: str = "COMPLETED", **environ: str) -> float:
        """Return the time from a worker's start in production mode to the answer of the job that waits in the queue.

        Nothing of the weights is in memory.
        """
        folder = self.root / name
        folder.mkdir()
        evict(self.weights)
        with ControlPlane(poll_s=60.0) as plane:
            job = plane.submit(job_input)
            began = time.perf_counter()
            # An endpoint of its own: nobody has left a record of what to read.
            environ = {"RUNPOD_ENDPOINT_ID": name, **environ}
            with ProductionWorker(plane, self.engine, folder, self.volume.mounts[0], environ) as worker:
                answer = job.result(600)
                took_s = time.perf_counter() - began
                log = worker.log()
                if answer["status"] != status:
                    raise RuntimeError(f"the worker answered {answer}:\n{log}")
                self._wait_for_definitions()
        print(_at_a_glance(name, log), file=sys.stderr)
        return took_s

    def _wait_for_definitions(self) -> None:
        """Return when a worker has left on the volume what ComfyUI says of its node classes, for the next one that boots."""
        until_s = time.monotonic() + DEFINITIONS_S
        while not any(Layout(self.volume.mounts[0]).definitions.glob("*.json")):
            if time.monotonic() > until_s:
                raise TimeoutError("the worker left no definitions of node classes on the volume")
            time.sleep(0.1)

    def download_s(self, hub: RemoteHub, path: Path = Path(os.devnull)) -> float:
        """Return the time of four connections through the whole file, whose bytes nobody keeps, or that write to `path`."""
        address = f"{hub.endpoint}/{REPO}/resolve/main/{HUB_NAME}"
        size_bytes = self.weights.stat().st_size
        ends = [size_bytes * at // CONNECTIONS for at in range(CONNECTIONS + 1)]

        def receive(begin: int, end: int) -> None:
            request = urllib.request.Request(address, headers={"Range": f"bytes={begin}-{end - 1}"})
            with path.open("r+b") as stream, urllib.request.urlopen(request, timeout=60) as response:
                stream.seek(begin)
                while block := response.read1(BLOCK):
                    stream.write(block)

        began = time.perf_counter()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(receive, ends[:-1], ends[1:]))
        return time.perf_counter() - began

    def side_by_side_s(self, hub: RemoteHub) -> float:
        """Return the time of ComfyUI's boot beside a plain download to the volume, and of the job after both."""
        plain = self.volume.mounts[0] / "plain" / HUB_NAME
        plain.parent.mkdir(exist_ok=True)
        link = self.root / "bare/models" / FOLDER / HUB_NAME
        if not link.is_symlink():
            link.symlink_to(plain)
        plain.unlink(missing_ok=True)
        plain.touch()
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            download = pool.submit(self.download_s, hub, plain)
            with BareEngine(self.engine, self.root / "bare") as bare:
                download.result()
                bare.run(graph(HUB_NAME))
                took_s = time.perf_counter() - began
        plain.unlink()  # nothing of it is written behind what is measured next
        return took_s

    def fetched_s(self, name: str, hub: RemoteHub, **environ: str) -> float:
        """Return the same as `queued_s` for a job whose weights are on the hub only."""
        there = Layout(self.volume.mounts[0])
        there.model(FOLDER, HUB_NAME).unlink(missing_ok=True)
        there.seal(FOLDER, HUB_NAME).unlink(missing_ok=True)
        environ = {
            "HF_ENDPOINT": hub.endpoint,
            "MODELS": f"{FOLDER}=hf://{REPO}/{HUB_NAME}",
            "MODEL_LOADING": "on_demand",
            **environ,
        }
        return self.queued_s(name, {"workflow": graph(HUB_NAME)}, **environ)


def _at_a_glance(name: str, log: str) -> str:
    """Return the lines of a worker's log that say what its time went into."""
    said = [
        line
        for line in log.splitlines()
        if any(word in line for word in ("cold start ", "read ahead", ": downloaded", "Prompt executed"))
    ]
    return "\n".join([f"{name}:", *said])


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
        scene = Scene(engine, volume, root, [])
        size_bytes = write_weights(engine, scene.weights, SHORT_DEPTH if options.short else FULL_DEPTH)
        try:
            volume.limit_line(LINE_BYTES_PER_S)
        except MooseFSError as exc:
            leave_out(str(exc))
            return report([], options)
        scene.bare_s()  # ComfyUI's own files come into memory
        figures: list[Figure] = []
        for name, measure in {"ahead": _read_ahead, "volume": _from_volume, "hub": _from_hub}.items():
            if name in options.extra.parts:
                figures += measure(scene, options.samples)
        columns = zip(*scene.parts, strict=True)
        names = ("arrives_once_s", "engine_boot_s", "warm_job_s")
        figures += [Figure.of(name, column, "s") for name, column in zip(names, columns, strict=True)]
        return report([Figure("weights_mb", size_bytes / 1e6, "MB"), *figures], options, data=root)


def _read_ahead(scene: Scene, samples: int) -> Iterator[Figure]:
    rows = []
    for number in range(samples):
        parts_s = scene.parts_s(scene.read_once_s())
        cold_s = scene.worker_s(f"cold-{number}", WARM_MODELS="none", RUNPOD_ENDPOINT_ID="bench")
        if number == 0:
            scene.worker_s("recorder", RUNPOD_ENDPOINT_ID="bench")
        ahead_s = scene.worker_s(f"ahead-{number}", RUNPOD_ENDPOINT_ID="bench")
        rows.append((parts_s, cold_s, ahead_s))
    parts, cold, ahead = zip(*rows, strict=True)
    yield from _judged("first_job_cold", cold, parts)
    yield from _judged("first_job_read_ahead", ahead, parts, BOUND)


def _from_volume(scene: Scene, samples: int) -> Iterator[Figure]:
    rows = []
    job = {"workflow": graph(NAME)}
    for number in range(samples):
        parts_s = scene.parts_s(scene.read_once_s())
        ready_s = scene.queued_s(f"ready-{number}", job, TAKE_JOBS="ready")
        booting_s = scene.queued_s(f"booting-{number}", job, TAKE_JOBS="booting")
        wrong_s = scene.queued_s(f"wrong-{number}", {**job, "timeout_s": -1}, "FAILED")
        rows.append((parts_s, ready_s, booting_s, wrong_s))
    parts, ready, booting, wrong = zip(*rows, strict=True)
    yield from _judged("first_job_taken_ready", ready, parts)
    yield from _judged("first_job_taken_booting", booting, parts, BOOTING_BOUND)
    yield Figure.of("wrong_request_s", wrong, "s", WRONG_BOUND_S)


def _from_hub(scene: Scene, samples: int) -> Iterator[Figure]:
    shelf = scene.root / "hub" / REPO / HUB_NAME
    shelf.parent.mkdir(parents=True)
    shutil.copyfile(scene.weights, shelf)
    rows = []
    with hub_process(scene.root / "hub") as hub:
        hub.fault("slow", bytes_per_s=LINE_BYTES_PER_S, count=None, route="cdn")
        scene.fetched_s("keeper", hub)  # leaves what ComfyUI says of its node classes
        for number in range(samples):
            download_s = scene.download_s(hub)
            scene.read_once_s()
            parts_s = scene.parts_s(download_s)
            beside_s = scene.side_by_side_s(hub)
            ready_s = scene.fetched_s(f"hub-ready-{number}", hub, TAKE_JOBS="ready")
            booting_s = scene.fetched_s(f"hub-booting-{number}", hub, TAKE_JOBS="booting")
            rows.append((parts_s, beside_s, ready_s, booting_s))
    parts, beside, ready, booting = zip(*rows, strict=True)
    yield from _judged("first_job_hub_ready", ready, parts)
    yield from _judged("first_job_hub_booting", booting, parts, BOOTING_BOUND)
    yield Figure.of("side_by_side_s", beside, "s")
    yield Figure.of("hub_booting_to_side_by_side", [ours / plain for ours, plain in zip(booting, beside, strict=True)], "x")


def _judged(name: str, took_s: Sequence[float], parts_s: Sequence[float], bound: float | None = None) -> Iterator[Figure]:
    """Return the times, and what each is against the parts of its own round."""
    yield Figure.of(f"{name}_s", took_s, "s")
    yield Figure.of(f"{name}_ratio", [ours / theirs for ours, theirs in zip(took_s, parts_s, strict=True)], "x", bound)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="a folder on the disk that the volume's content should lie on")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure (default: all)")


if __name__ == "__main__":
    sys.exit(main())
