"""32 cold workers on one network volume at once, against one: how much later the last is ready. The models are all there.

Each is a process of its own that does what a worker does with the volume at its start: link 100 models, read the manifest, find
every model ready by its seal, and read which models to have in memory. They begin together, when all have their imports behind
them, on four mounts of a real MooseFS volume.

A worker is ready when ComfyUI has booted and the volume is done with, which go on side by side:

    max(engine's boot, imports + the volume's part, the last of 32) / the same for one     bound 1.3

The boot is ComfyUI's alone, in the same run. Here 32 processes share the machine's cores, which on RunPod each has for itself:
the volume's part of 32 is more than a fleet would see.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.bare import BareEngine
from bench.report import Figure, leave_out, median, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.local_worker import PROJECT
from devkit.moosefs import MooseFS, available
from worker.models.layout import Layout
from worker.models.seals import Seal, write_seal
from worker.models.used import UsedModels

if TYPE_CHECKING:
    from collections.abc import Sequence

BOUND: Final = 1.3
WORKERS: Final = 32
MOUNTS: Final = 4
MODELS: Final = 100
FOLDERS: Final = ("checkpoints", "loras", "vae", "text_encoders", "diffusion_models")
ENDPOINT: Final = "bench"

_WORKER: Final = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from worker.boot import build_store, read_sources
from worker.models.links import ModelLinks
from worker.models.memory import free_memory_bytes
from worker.models.layout import Layout
from worker.models.used import UsedModels
from worker.settings import Settings
import worker.models.hub, worker.models.sources
base, volume, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
settings = Settings.from_env({"COMFYUI_BASE_DIR": str(base), "VOLUME_PATH": str(volume)})
stores = build_store(settings)  # connections and certificates: nothing of the volume
imports_s = time.perf_counter() - began
print("there", flush=True)
sys.stdin.readline()
began = time.perf_counter()
report = ModelLinks(base / "models", [volume / "models"]).refresh()
wanted = read_sources(settings).manifest()
ready = stores.ready_many((spec.folder, spec.name) for spec in wanted)
used = UsedModels(volume, Layout(volume).used("bench")).files()
free_memory_bytes()
took_s = time.perf_counter() - began
assert (report.files, len(ready), len(used)) == (count, count, 3), (report, len(ready), used)
print(json.dumps({"took_s": took_s, "imports_s": imports_s}), flush=True)
"""


def fill(volume: Path) -> None:
    """Sealed models, a manifest that names them, and the record of what jobs used."""
    layout, lines, paths = Layout(volume), [], []
    for number in range(MODELS):
        folder, name = FOLDERS[number % len(FOLDERS)], f"model-{number:03}.safetensors"
        path = layout.model(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
        write_seal(layout.seal(folder, name), Seal(size=10, mtime=int(path.stat().st_mtime), sha256="0" * 64))
        lines.append(f'[[model]]\nsource = "hf://org/repo/{name}"\nfolder = "{folder}"\nname = "{name}"\n')
        paths.append(path)
    layout.manifest.write_text("\n".join(lines))
    UsedModels(volume, layout.used(ENDPOINT)).note(paths[:3])


def start_together(root: Path, mounts: Sequence[Path], count: int) -> tuple[float, float]:
    """Seconds until the last of `count` is done with the volume, from when all were let go; and the median of their imports."""
    bases = [root / f"base-{count}-{time.monotonic_ns()}-{number}" for number in range(count)]
    for base in bases:
        (base / "models").mkdir(parents=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(base), str(mounts[number % len(mounts)]), str(MODELS)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, base in enumerate(bases)
    ]
    try:
        for process in processes:
            assert process.stdout  # noqa: S101 - asked for above
            if process.stdout.readline() != "there\n":
                raise RuntimeError(f"a worker ended with {process.wait()}")
        began = time.perf_counter()
        for process in processes:
            assert process.stdin  # noqa: S101 - asked for above
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [json.loads(process.stdout.readline()) for process in processes if process.stdout]
        took_s = time.perf_counter() - began
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return took_s, median([each["imports_s"] for each in told])


def boot_s(root: Path) -> float:
    """ComfyUI's own boot."""
    began = time.perf_counter()
    with BareEngine(ensure_engine(), root / "bare"):
        return time.perf_counter() - began


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=5, short_samples=2)
    if reason := available():
        leave_out(reason)
        return report([], options)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fleet-")))
        mounts = stack.enter_context(MooseFS(root / "volume", mounts=MOUNTS)).mounts
        fill(mounts[0])
        boot_s(root)  # ComfyUI's own files come into memory
        start_together(root, mounts, MOUNTS)  # and each mount knows the volume
        rows = [
            (boot_s(root), *start_together(root, mounts, 1), *start_together(root, mounts, WORKERS))
            for _ in range(options.samples)
        ]
    boot, one, imports, many, _ = (tuple(column) for column in zip(*rows, strict=True))
    # The imports of one: those of 32 at once are what this machine's cores make of them.
    ready_one = max(median(boot), median(imports) + median(one))
    ready_many = max(median(boot), median(imports) + median(many))
    return report(
        [
            Figure.of("engine_boot_s", boot, "s"),
            Figure.of("imports_s", imports, "s"),
            Figure.of("volume_part_of_1_s", one, "s"),
            Figure.of(f"volume_part_of_{WORKERS}_s", many, "s"),
            Figure(f"ready_{WORKERS}_over_1_ratio", ready_many / ready_one, "x", BOUND),
        ],
        options,
        data=root,
    )


if __name__ == "__main__":
    sys.exit(main())
