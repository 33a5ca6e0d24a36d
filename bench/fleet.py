"""32 cold workers on one network volume at once, against one: how much later the last is ready. The models are all there.

Each is a process of its own that runs the worker's own code for the volume at a start (`bench/fleet_part.py`), with ComfyUI
left out: the look for custom nodes and their packages, RunPod's cache on the host, the record of what jobs used and the reading
of that, leftovers, links to 100 models, the manifest. They begin together, when all have their imports behind them, on four
mounts of a real MooseFS volume.

A worker is ready when ComfyUI has booted and the volume is done with, which go on side by side:

    max(engine's boot, imports + the volume's part, the last of 32) / the same for one     bound 1.3
    the volume's part, the last of 32 / the engine's boot                                  bound 1.0: hidden behind the boot

The boot is ComfyUI's alone, in the same run, and the imports are those of one. 32 processes and the volume's servers share this
machine's cores, which on RunPod each worker has for itself: the volume's part of 32 is mostly that, and more than a fleet would
see. It cannot show what 32 hosts do to the line and the servers of a real volume.

What goes on behind the first job is timed as well, for information: until each has read ahead, and found the manifest's models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from bench.bare import BareEngine
from bench.fleet_part import ENDPOINT
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
HIDDEN_BOUND: Final = 1.0
WORKERS: Final = 32
MOUNTS: Final = 4
MODELS: Final = 100
FOLDERS: Final = ("checkpoints", "loras", "vae", "text_encoders", "diffusion_models")

MODEL: Final = b"\2\0\0\0\0\0\0\0{}"
USED: Final = 3
NODES: Final = {"a_node": "", "a_node_with_packages": "packaging\n"}
"""Custom nodes and their requirements.txt; the package is there already, so none is fetched."""


def fill(volume: Path) -> None:
    """Sealed models, one of them in the host's cache as well, a manifest, what jobs used, and custom nodes."""
    layout, lines, paths = Layout(volume), [], []
    for number in range(MODELS):
        folder, name, sha256 = FOLDERS[number % len(FOLDERS)], f"model-{number:03}.safetensors", f"{number:064x}"
        path = layout.model(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MODEL)
        write_seal(layout.seal(folder, name), Seal(size=len(MODEL), mtime=int(path.stat().st_mtime), sha256=sha256))
        lines.append(f'[[model]]\nsource = "hf://org/repo/{name}"\nfolder = "{folder}"\nname = "{name}"\n')
        paths.append(path)
    blob = layout.host_cache_repo("org/repo") / "blobs" / f"{0:064x}"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(MODEL)
    layout.manifest.write_text("\n".join(lines))
    UsedModels(volume, layout.used(ENDPOINT)).note(paths[:USED])
    for name, requirements in NODES.items():
        node = volume / "custom_nodes" / name
        node.mkdir(parents=True)
        (node / "__init__.py").touch()
        (node / "requirements.txt").write_text(requirements)


@dataclass(frozen=True, slots=True)
class Start:
    """Workers that began together; seconds, the first two from when they were let go."""

    volume_s: float
    """Until the last had everything that its first job waits for."""
    settled_s: float
    """Until nothing went on behind that any more."""
    imports_s: float
    """The median of them, before."""


def start_together(root: Path, mounts: Sequence[Path], count: int) -> Start:
    """Start so many on the mounts in turn; raises RuntimeError unless each found everything."""
    bases = [root / f"base-{count}-{time.monotonic_ns()}-{number}" for number in range(count)]
    with ExitStack() as stack:
        workers = [stack.enter_context(Part(base, mounts[number % len(mounts)])) for number, base in enumerate(bases)]
        imports = [worker.told()["imports_s"] for worker in workers]
        began = time.perf_counter()
        for worker in workers:
            worker.let_go()
        links = [worker.told()["links"] for worker in workers]
        volume_s = time.perf_counter() - began
        read_bytes = [worker.told()["read_bytes"] for worker in workers]
        settled_s = time.perf_counter() - began
    if not all(f"({MODELS} files)" in line for line in links) or set(read_bytes) != {USED * len(MODEL)}:
        raise RuntimeError(f"not every worker found everything: {links}, {read_bytes}")
    return Start(volume_s, settled_s, median(imports))


class Part:
    """One `bench.fleet_part`; a context manager that kills it."""

    def __init__(self, base_dir: Path, volume: Path) -> None:
        (base_dir / "models").mkdir(parents=True)
        self._log = (base_dir / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.fleet_part", str(base_dir), str(volume)],
            cwd=PROJECT,
            env={**os.environ, "PIP_NO_INDEX": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def told(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self._process.stdout  # noqa: S101 - asked for above
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"a worker ended with {self._process.wait()}: {self._log.read()[-2000:]}")
        value: dict[str, Any] = json.loads(line)
        return value

    def let_go(self) -> None:
        """Have it begin."""
        assert self._process.stdin  # noqa: S101 - asked for above
        self._process.stdin.write("go\n")
        self._process.stdin.flush()


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
            (boot_s(root), start_together(root, mounts, 1), start_together(root, mounts, WORKERS))
            for _ in range(options.samples)
        ]
    return report(
        [
            Figure.of("engine_boot_s", [boot for boot, _, _ in rows], "s"),
            Figure.of("imports_s", [one.imports_s for _, one, _ in rows], "s"),
            Figure.of("volume_part_of_1_s", [one.volume_s for _, one, _ in rows], "s"),
            Figure.of(f"volume_part_of_{WORKERS}_s", [many.volume_s for _, _, many in rows], "s"),
            Figure.of("settled_1_s", [one.settled_s for _, one, _ in rows], "s"),
            Figure.of(f"settled_{WORKERS}_s", [many.settled_s for _, _, many in rows], "s"),
            Figure.of(
                f"volume_part_of_{WORKERS}_over_boot", [many.volume_s / boot for boot, _, many in rows], "x", HIDDEN_BOUND
            ),
            Figure.of(f"ready_{WORKERS}_over_1_ratio", [_ready_ratio(*row) for row in rows], "x", BOUND),
        ],
        options,
        data=root,
    )


def _ready_ratio(boot_s: float, one: Start, many: Start) -> float:
    """The imports of one: those of 32 at once are what this machine's cores make of them."""
    return max(boot_s, one.imports_s + many.volume_s) / max(boot_s, one.imports_s + one.volume_s)


if __name__ == "__main__":
    sys.exit(main())
