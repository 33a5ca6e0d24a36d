"""From an address to a checked, sealed file on the volume, against `hf_hub_download` in one run; and what is there already.

The hub is a stand-in in a process of its own, on loopback. Both clients fetch the same file onto the same file system, in turn,
each in a fresh process whose imports are not counted. Ours also takes the sha256 of what it stored, which `hf_hub_download`
does not. A third process only writes as many bytes: where the volume is this machine's own work, that is the ceiling. Where one
connection of eight is slow, aria2c is the measure. The last figures are what a worker that waits asks of the volume, and what
a fleet waits when its one downloader is killed, or the host of it dies, with the worker's own timings: from then until another
worker holds the lock, and until that one has finished a small file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Figure, Options, leave_out, parse_args, report
from devkit.fleet import Fleet, Worker
from devkit.hub import hub_process
from devkit.local_worker import PROJECT
from devkit.moosefs import MooseFS, available
from worker.base.progress import ModelProgress
from worker.links.model_links import ModelLinks
from worker.models.job_models import JobModels
from worker.models.sources import Sources
from worker.store.layout import Layout
from worker.store.locks import Locks
from worker.store.seals import Seal, write_seal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devkit.hub import RemoteHub
    from worker.models.download_queue import Ensurer

REPO, FILE = "org/large", "large.safetensors"
SIZE_BYTES, SHORT_BYTES = 3 * 10**9, 3 * 10**8
# The project's goal is a rate of 1.6 and 1.25 times theirs: as times, ours over theirs, that is at most the inverse.
TIME_BOUNDS = {"ext4": 1 / 1.6, "moosefs": 1 / 1.25}
MEMORY_BOUND_MB = 150.0
STRAGGLER_FILE, STRAGGLER_BYTES = "org/straggler/model.safetensors", 64 * 2**20
STRAGGLER_RATE, USUAL_RATE = 20_000, 4 * 2**20  # bytes a second of the one slow connection, and of the seven others
STRAGGLER_BOUNDS = {"aria2c": 1.5, "without": 1.3}
WAITING_BOUND = 5.0
WAITING_S = 10.0
TAKEOVER_FILE, TAKEOVER_BYTES = "org/small/small.safetensors", 10**8
TAKEOVER_BOUND_S = 45.0
TAKEOVER_RATE = 10**6  # of each of the victim's connections: it is in the middle when it dies
TAKEOVER_PATIENCE_S = 180.0
READY_COUNT = 1000
READY_BOUNDS_MS = {"ext4": 100.0, "moosefs": 1000.0}

_OURS = """
import json, resource, sys, time
from pathlib import Path
from worker.fetch.hub import Hub, credentials
from worker.store.layout import Layout
from worker.model_spec import HubFile, ModelSpec
from worker.store.store import Store
from worker.fetch.http import Network
root, endpoint, repo, file = sys.argv[1:5]
store = Store(Layout(Path(root)), Hub(endpoint, Network(credentials(endpoint, None, None))), "bench")
idle_kb = int(Path("/proc/self/statm").read_text().split()[1]) * 4
began = time.perf_counter()
found = store.ensure(ModelSpec("checkpoints", file, HubFile(repo, file)))
took_s = time.perf_counter() - began
assert found.how == "downloaded" and store.ready("checkpoints", file)
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"s": took_s, "memory_mb": (peak_kb - idle_kb) / 1000}))
"""

_THEIRS = """
import json, sys, time
from huggingface_hub import hf_hub_download
root, endpoint, repo, file = sys.argv[1:5]
began = time.perf_counter()
hf_hub_download(repo, file, cache_dir=root, endpoint=endpoint)
print(json.dumps({"s": time.perf_counter() - began}))
"""

_WRITE = """
import json, os, sys, time
block = os.urandom(1 << 22)
left = int(sys.argv[5])
began = time.perf_counter()
file = os.open(sys.argv[1] + "/plain", os.O_CREAT | os.O_WRONLY)
while left:
    left -= os.write(file, block[:left])
os.fsync(file)
print(json.dumps({"s": time.perf_counter() - began}))
"""


_ARIA2C = (
    *("aria2c", "--quiet", "--no-conf", "--file-allocation=none", "--max-connection-per-server=8", "--split=8"),
    "--min-split-size=1M",
)

_WAIT = """
import contextlib, sys, threading
from pathlib import Path
from worker.store.layout import Layout
from worker.store.locks import Locks, LockTiming
from worker.store.store import PublishedOrCancelled
layout, key = Layout(Path(sys.argv[1])), sys.argv[2]
path = layout.model("checkpoints", "model.safetensors")
heard = lambda progress: print("heard" if progress.total_bytes else "waits", flush=True)
with PublishedOrCancelled(threading.Event(), path, path.exists, LockTiming().look_s) as watch:
    with Locks(layout, "waiter").hold(key, published=lambda: False, cancel=watch, on_wait=heard):
        pass
"""


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=5, short_samples=3)
    size_bytes = SHORT_BYTES if options.short else SIZE_BYTES
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name)
        _make_file(root / "hub" / REPO / FILE, size_bytes)
        _make_file(root / "hub" / TAKEOVER_FILE, TAKEOVER_BYTES)
        _make_file(root / "hub" / STRAGGLER_FILE, STRAGGLER_BYTES)
        with hub_process(root / "hub") as hub:
            figures += _straggler(root / "straggler", hub, options.samples)
            for where, folder, volume in _volumes(root):
                figures += _throughput(where, folder, hub, options, size_bytes)
                figures.append(_ready(where, folder, options))
                if volume:
                    figures.append(_waiting(volume))
                    figures += _takeover(volume, hub, options.samples)
    return report(figures, options)


def _volumes(root: Path) -> Iterator[tuple[str, Path, MooseFS | None]]:
    (root / "ext4").mkdir()
    yield "ext4", root / "ext4", None
    reason = available()
    if reason:
        leave_out(reason, "MooseFS")
        return
    with MooseFS(root / "moosefs") as volume:
        yield "moosefs", volume.mounts[0], volume


def _make_file(path: Path, size_bytes: int) -> None:
    """A safetensors file of random bytes: an eight-byte length, a header, one tensor."""
    path.parent.mkdir(parents=True)
    header = b""
    for _ in range(3):  # the header's own length is part of what it says
        length = size_bytes - 8 - len(header)
        header = json.dumps({"t": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    block = os.urandom(1 << 24)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while (left := size_bytes - file.tell()) > 0:
            file.write(block[:left])


def _throughput(where: str, folder: Path, hub: RemoteHub, options: Options, size_bytes: int) -> list[Figure]:
    """Ours, theirs, and what a program that only writes gets: neither client can be faster than the file system takes bytes.

    One after the other in each round, and the ratio is of neighbours: a shared machine's speed halves and doubles in minutes.
    """
    runs: dict[str, list[float]] = {_OURS: [], _THEIRS: [], _WRITE: []}
    memory_mb: list[float] = []
    for number in range(options.samples + 1):
        for code, seconds in runs.items():
            target = folder / f"run-{number}"
            result = _run(code, target, hub.endpoint, size_bytes)
            shutil.rmtree(target)
            if number:  # the first of each warmed the page cache
                seconds.append(result["s"])
                memory_mb += [result["memory_mb"]] if "memory_mb" in result else []
    pairs = list(zip(runs[_OURS], runs[_THEIRS], strict=True))
    return [
        *(
            Figure.of(f"{where}_{name}_mb_per_s", [size_bytes / 1e6 / took_s for took_s in runs[code]], "MB/s")
            for name, code in (("ours", _OURS), ("hf_hub_download", _THEIRS), ("plain_write", _WRITE))
        ),
        Figure.of(f"{where}_time_ratio", [ours_s / theirs_s for ours_s, theirs_s in pairs], "x", TIME_BOUNDS[where]),
        Figure.of(f"{where}_memory_above_idle_mb", memory_mb, "MB", MEMORY_BOUND_MB),
    ]


def _run(code: str, target: Path, endpoint: str, size_bytes: int, source: str = f"{REPO}/{FILE}") -> dict[str, Any]:
    repo, _, file = source.rpartition("/")
    target.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ = {**clean, "HF_HOME": str(target / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), endpoint, repo, file, str(size_bytes)],
        cwd=PROJECT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _straggler(folder: Path, hub: RemoteHub, count: int) -> list[Figure]:
    """One of eight connections at 20 KB/s for as long as it lives: ours, aria2c on the same source, and ours without it."""
    times: dict[str, list[float]] = {"ours": [], "aria2c": [], "without": []}
    has_aria2c = shutil.which("aria2c") is not None
    if not has_aria2c:
        leave_out("aria2c is missing: apt-get install aria2", "the comparison with aria2c")
    for _ in range(count):
        for way, seconds in times.items():
            if way == "aria2c" and not has_aria2c:
                continue
            folder.mkdir()
            if way != "without":
                hub.fault("slow", bytes_per_s=STRAGGLER_RATE, shared=False, sticky=True, count=1, route="cdn", skip=1)
            hub.fault("slow", bytes_per_s=USUAL_RATE, shared=False, count=None, route="cdn")
            seconds.append(_timed(way, folder, hub.endpoint))
            hub.clear_faults()
            shutil.rmtree(folder)
    ratios = {
        other: [ours_s / theirs_s for ours_s, theirs_s in zip(times["ours"], seconds, strict=True)]
        for other, seconds in times.items()
        if other != "ours" and seconds
    }
    return [
        *(Figure.of(f"straggler_{way}_s", seconds, "s") for way, seconds in times.items() if seconds),
        *(Figure.of(f"straggler_ratio_to_{way}", found, "x", STRAGGLER_BOUNDS[way]) for way, found in ratios.items()),
    ]


def _timed(way: str, folder: Path, endpoint: str) -> float:
    repo, _, file = STRAGGLER_FILE.rpartition("/")
    if way != "aria2c":
        return float(_run(_OURS, folder / "ours", endpoint, STRAGGLER_BYTES, STRAGGLER_FILE)["s"])
    began_s = time.monotonic()
    subprocess.run([*_ARIA2C, f"--dir={folder}", f"{endpoint}/{repo}/resolve/main/{file}"], check=True, capture_output=True)
    return time.monotonic() - began_s


def _waiting(volume: MooseFS) -> Figure:
    """What one worker that waits for another's download asks of the volume, by the counters of its mount."""
    here, there = (mount / "waiting" for mount in volume.mounts[:2])
    Layout(here).model("checkpoints", "model.safetensors").parent.mkdir(parents=True)
    key = "k" * 64
    with Locks(Layout(here), "holder").hold(key, published=lambda: False, cancel=threading.Event()) as hold:
        ended = threading.Event()

        def report_on() -> None:
            for done in itertools.count():
                if ended.wait(0.2):
                    return
                hold.report(ModelProgress("downloading", done, 10**12))

        reporter = threading.Thread(target=report_on)
        reporter.start()
        command = [sys.executable, "-c", _WAIT, str(there), key]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as waiter:
                # Until it has heard the holder twice, it takes part in the lock.
                heard = (line for line in waiter.stdout or () if line.startswith("heard"))
                for _ in range(4):
                    next(heard)
                before = _operations(volume.mounts[1])
                time.sleep(WAITING_S)
                asked = _operations(volume.mounts[1]) - before
                waiter.kill()
        finally:
            ended.set()
            reporter.join()
    return Figure.of("moosefs_waiting_operations_per_s", [asked / WAITING_S], "1/s", WAITING_BOUND)


def _operations(mount: Path) -> int:
    lines = (mount / ".stats").read_text(encoding="utf-8").splitlines()
    return next(int(line.partition(": ")[2]) for line in lines if line.startswith("fuse_ops: "))


def _ready(where: str, folder: Path, options: Options) -> Figure:
    """How long the worker takes from a manifest to the decision that all of it is there: no network, nothing that fetches."""
    layout = Layout(folder / "full")
    lines = []
    for number in range(READY_COUNT):
        name = f"model_{number:04}.safetensors"
        path = layout.model("loras", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        write_seal(layout.seal("loras", name), Seal(size=0, mtime=int(path.stat().st_mtime), sha256=None))
        lines.append(f'[[model]]\nsource = "hf://org/repo/{name}"\nfolder = "loras"\n')
    layout.manifest.write_text("\n".join(lines))
    samples = []
    for number in range(options.samples):
        base = folder / f"base-{number}"
        links = ModelLinks(base / "models", [layout.models])
        places = [layout, Layout(base / "container-volume")]
        job_models = JobModels(links, places, base / "nearer", lambda: Sources.read(volume_manifest=layout.manifest), _no_store)
        began = time.perf_counter()
        wanted = job_models.manifest()
        job_models.fetch_behind(wanted)
        samples.append((time.perf_counter() - began) * 1000)
        if len(wanted) != READY_COUNT:
            raise RuntimeError(f"{len(wanted)} of {READY_COUNT} are named")
    with contextlib.suppress(OSError):
        shutil.rmtree(layout.root)
    return Figure.of(f"{where}_ready_{READY_COUNT}_ms", samples, "ms", READY_BOUNDS_MS[where])


def _no_store() -> Ensurer:
    raise RuntimeError("something is to be fetched where everything is there")


def _takeover(volume: MooseFS, hub: RemoteHub, count: int) -> list[Figure]:
    """How long nobody downloads when the one who does is killed with -9, and when its mount is: a dead host.

    All pairs of a victim and an heir run at once, each on a folder of its own, so their deaths cost one wait.
    """
    here, heirs_mount = volume.mounts[:2]
    mounts = {"killed_worker": here, "dead_host": volume.mount()}
    pairs = [f"{kind}_{number}" for kind in mounts for number in range(count)]
    for pair in pairs:
        (here / pair).mkdir()
    victims = [_worker(pair, mounts[pair.rpartition("_")[0]], hub) for pair in pairs]
    heirs = [_worker(pair, heirs_mount, hub) for pair in pairs]
    hub.fault("slow", bytes_per_s=TAKEOVER_RATE, shared=False, count=None, route="cdn")
    with Fleet(*victims) as doomed:
        pids = {pair: doomed.wait_step("moving", of=pair)["pid"] for pair in pairs}
        with Fleet(*heirs) as fleet:
            for pair in pairs:
                fleet.wait_step("waiting", of=pair)
            hub.clear_faults()
            died_s = time.monotonic()
            volume.kill_mount(volume.mounts.index(mounts["dead_host"]))
            for pair in pairs:
                if pair.startswith("killed_worker"):
                    doomed.kill(pids[pair])
            ends = fleet.wait_ended(TAKEOVER_PATIENCE_S)
            if sorted(end["worker"] for end in ends if end.get("how") == "downloaded") != sorted(pairs):
                raise RuntimeError(f"not every heir took over: {ends}")
            held = {pair: fleet.wait_step("locked", of=pair)["at_s"] - died_s for pair in pairs}
    finished = {end["worker"]: end["at_s"] - died_s for end in ends}
    return [
        Figure.of(
            f"moosefs_{kind}_until_{what}_s",
            [taken_s for pair, taken_s in times.items() if pair.startswith(kind)],
            "s",
            TAKEOVER_BOUND_S,
        )
        for kind in mounts
        for what, times in (("held", held), ("finished", finished))
    ]


def _worker(pair: str, mount: Path, hub: RemoteHub) -> Worker:
    """One with the timings and the tuning that the product has."""
    return Worker(pair, str(mount / pair), hub.endpoint, TAKEOVER_FILE, timing={}, tuning={})


if __name__ == "__main__":
    sys.exit(main())
