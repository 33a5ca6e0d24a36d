"""32 cold workers on one network volume at once, against one: how much later the last is ready. The models are all there.

Each is a process of its own that runs the worker's own code for the volume at a start (`bench/fleet_part.py`), with ComfyUI
left out: the look for custom nodes and their packages, RunPod's cache on the host, the record of what jobs used and the reading
of that, leftovers, links to 100 models, the manifest. They begin together, when all have their imports behind them, on four
mounts of a real MooseFS volume.

A worker is ready when ComfyUI has booted and the volume is done with, which go on side by side:

    max(engine's boot, imports + the volume's part)

The boot is ComfyUI's alone, in the same run, and the imports are those of one. 32 processes share this machine's cores, which
on RunPod each has for itself, so the same 32 run on a local disk as well: what the volume adds to that is what a fleet would
see of the other workers, and is put on top of what one takes.

    ready_32_over_1_ratio            one's volume part + what the volume adds for 32     bound 1.3
    ready_32_over_1_on_these_cores   the volume's part of 32 as it was                   informs
    volume_part_of_32_over_boot      the volume's part of 32 / the engine's boot         bound 1: the boot hides it
    volume_part_of_32_over_disk      the volume's part of 32 / the same on the disk      informs

What goes on behind the first job is timed as well, for information: until each has read ahead, and has looked at each of the
manifest's models. Not shown is what 32 hosts do to the line and the servers of a real volume: the servers are here, and share
the cores.
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
from worker.store.layout import Layout
from worker.store.seals import Seal, write_seal
from worker.warmup.recent_models import RecentModels

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
    RecentModels(volume, layout.used(ENDPOINT)).note(paths[:USED])
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
        logs = [worker.log() for worker in workers]
    if not all(f"({MODELS} files)" in line for line in links) or set(read_bytes) != {USED * len(MODEL)} or any(logs):
        raise RuntimeError(f"not every worker found everything: {links}, {read_bytes}, {logs}")
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
        """Return its next message."""
        assert self._process.stdout  # noqa: S101 - asked for above
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self._process.wait()}: {self.log()}")
        value: dict[str, Any] = json.loads(line)
        return value

    def log(self) -> str:
        """Return the end of its errors."""
        self._log.seek(0)
        return self._log.read()[-2000:]

    def let_go(self) -> None:
        """Let it begin."""
        assert self._process.stdin  # noqa: S101 - asked for above
        self._process.stdin.write("go\n")
        self._process.stdin.flush()


def boot_s(root: Path) -> float:
    """Return the time of ComfyUI's own boot."""
    began = time.perf_counter()
    with BareEngine(ensure_engine(), root / "bare"):
        return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Round:
    """The boot, one worker, and 32 on the volume and on the disk, one after the other."""

    boot_s: float
    one: Start
    many: Start
    on_disk: Start

    def ready_ratio(self, many_s: float) -> float:
        """Return how much later all are ready than one, if the volume's part takes as long as for 32."""
        one_s = max(self.boot_s, self.one.imports_s + self.one.volume_s)
        return max(self.boot_s, self.one.imports_s + many_s) / one_s

    @property
    def without_cores_s(self) -> float:
        """Return the volume's part of 32 workers that have their own cores."""
        return self.one.volume_s + max(0.0, self.many.volume_s - self.on_disk.volume_s)


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=5, short_samples=1)
    if reason := available():
        leave_out(reason)
        return report([], options)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fleet-")))
        mounts = stack.enter_context(MooseFS(root / "volume", mounts=MOUNTS)).mounts
        disk = root / "disk"
        fill(mounts[0])
        fill(disk)
        boot_s(root)  # ComfyUI's own files come into memory
        for places in (mounts, [disk]):  # each mount knows the volume, and the packages of its nodes are there
            start_together(root, places, len(places))
        rounds = [
            Round(
                boot_s(root),
                start_together(root, mounts, 1),
                start_together(root, mounts, WORKERS),
                start_together(root, [disk], WORKERS),
            )
            for _ in range(options.samples)
        ]
    return report(figures(rounds), options, data=root)


def figures(rounds: Sequence[Round]) -> list[Figure]:
    """Return the figures of the rounds."""
    return [
        Figure.of("engine_boot_s", [each.boot_s for each in rounds], "s"),
        Figure.of("imports_s", [each.one.imports_s for each in rounds], "s"),
        Figure.of("volume_part_of_1_s", [each.one.volume_s for each in rounds], "s"),
        Figure.of(f"volume_part_of_{WORKERS}_s", [each.many.volume_s for each in rounds], "s"),
        Figure.of(f"volume_part_of_{WORKERS}_on_disk_s", [each.on_disk.volume_s for each in rounds], "s"),
        Figure.of("settled_1_s", [each.one.settled_s for each in rounds], "s"),
        Figure.of(f"settled_{WORKERS}_s", [each.many.settled_s for each in rounds], "s"),
        Figure.of(f"settled_{WORKERS}_on_disk_s", [each.on_disk.settled_s for each in rounds], "s"),
        Figure.of(f"volume_part_of_{WORKERS}_over_disk", [each.many.volume_s / each.on_disk.volume_s for each in rounds], "x"),
        Figure.of(
            f"volume_part_of_{WORKERS}_over_boot", [each.many.volume_s / each.boot_s for each in rounds], "x", HIDDEN_BOUND
        ),
        Figure.of(f"ready_{WORKERS}_over_1_on_these_cores", [each.ready_ratio(each.many.volume_s) for each in rounds], "x"),
        Figure.of(f"ready_{WORKERS}_over_1_ratio", [each.ready_ratio(each.without_cores_s) for each in rounds], "x", BOUND),
    ]


if __name__ == "__main__":
    sys.exit(main())
