"""Three models from the hub into a volume through S3, against a download and `upload_fileobj` in one run; then killed twice.

Hub, S3 server (moto's) and the proxy with RunPod's manners are real servers on loopback; each run is a process of its own, as
people start it, imports included. The reference is what one does without this: `hf_hub_download` to the local disk, then
boto3's `upload_fileobj`. It checks nothing on the way; ours hashes every byte and compares every part.

The killed run meets a 524 and a NoSuchUpload for a Complete that succeeded, 502s and slow HeadObjects, and is ended with
SIGKILL in the middle of the first and of the second model. What counts as sent again is every part that was begun twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Figure, Options, parse_args, report
from devkit.hub import hub_process
from devkit.local_worker import PROJECT
from devkit.s3 import RunPodProxy, S3Server
from worker.seed.relay import RelayLoad

if TYPE_CHECKING:
    from devkit.hub import RemoteHub

REPO = "org/models"
COUNT = 3
SIZE_BYTES, SHORT_BYTES = 300_000_000, 60_000_000
MEMORY_BOUND_MB = 250.0
AGAIN_BOUND, TIME_BOUND = 1.0, 1.0
KILLS = 2
_TICK_S = 0.02

_THEIRS = """
import sys
from pathlib import Path
import boto3
from botocore.config import Config
from huggingface_hub import hf_hub_download
folder, hub, endpoint, bucket, repo, *files = sys.argv[1:]
client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="user_devkit",
                      aws_secret_access_key="rps_devkit", config=Config(s3={"addressing_style": "path"}))
for file in files:
    path = hf_hub_download(repo, file, cache_dir=folder, endpoint=hub)
    with Path(path).open("rb") as stream:
        client.upload_fileobj(stream, bucket, f"models/loras/{file}")
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One process: how it ended, how long it took, what it held at most."""

    code: int
    seconds: float
    memory_mb: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What the runs work with."""

    root: Path
    hub: RemoteHub
    server: S3Server
    proxy: RunPodProxy
    size_bytes: int

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start one as a person would; what it says on standard error is shown."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_", "RUNPOD_"))}
        environ = {
            **clean,
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "RUNPOD_S3_ACCESS_KEY_ID": self.server.access_key_id,
            "RUNPOD_S3_SECRET_ACCESS_KEY": self.server.secret_access_key,
        }
        return subprocess.Popen([sys.executable, *command], cwd=PROJECT, env=environ, stdout=subprocess.DEVNULL)

    def ours(self) -> subprocess.Popen[bytes]:
        """Run the seeder."""
        where = ["--s3", "vol", "--endpoint", self.proxy.endpoint_url]
        return self.start(["scripts/seed_volume.py", "--folder", "loras", *where, "--json", f"hf://{REPO}/*.safetensors"])

    def theirs(self, folder: Path) -> subprocess.Popen[bytes]:
        """Run the reference."""
        files = [path.name for path in sorted((self.root / "hub" / REPO).iterdir())]
        return self.start(["-c", _THEIRS, str(folder), self.hub.endpoint, self.proxy.endpoint_url, "vol", REPO, *files])

    def empty(self) -> None:
        """Return a new volume."""
        self.server.reset()
        self.server.bucket("vol")
        self.proxy.reset()

    def check(self) -> None:
        """Check that every model is there and right. Raises RuntimeError."""
        for path in sorted((self.root / "hub" / REPO).iterdir()):
            with path.open("rb") as file:
                expected = hashlib.file_digest(file, "sha256").hexdigest()
            actual = hashlib.sha256()
            for chunk in self.server.client.get_object(Bucket="vol", Key=f"models/loras/{path.name}")["Body"].iter_chunks(
                1 << 20
            ):
                actual.update(chunk)
            seal = json.loads(
                self.server.client.get_object(Bucket="vol", Key=f".worker/seals/loras/{path.name}.json")["Body"].read()
            )
            if not expected == actual.hexdigest() == seal["sha256"]:
                raise RuntimeError(f"{path.name} is not what it should be on the volume")


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, short_samples=1)
    size_bytes = SHORT_BYTES if options.short else SIZE_BYTES
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        root = Path(name)
        _make_models(root / "hub" / REPO, size_bytes)
        with (
            hub_process(root / "hub") as hub,
            S3Server(folder=root) as server,
            RunPodProxy(server.endpoint_url, keys=[server.access_key_id]) as proxy,
        ):
            scene = Scene(root, hub, server, proxy, size_bytes)
            return report([*_killed(scene), *_speed(scene, options)], options)


def _make_models(folder: Path, size_bytes: int) -> None:
    """Write safetensors files of random bytes: a length, a header, one tensor."""
    folder.mkdir(parents=True)
    header = json.dumps({"t": {"dtype": "U8", "shape": [size_bytes - 108], "data_offsets": [0, size_bytes - 108]}}).encode()
    for number in range(COUNT):
        block = os.urandom(1 << 22)
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.write((100).to_bytes(8, "little") + header.ljust(100))
            while (left := size_bytes - file.tell()) > 0:
                file.write(block[:left])


def _wait(process: subprocess.Popen[bytes], began: float) -> Run:
    """Its end. The memory is what the kernel says while it lives: wait4 would add what this process had before the exec."""
    memory_mb = 0.0
    while process.poll() is None:
        memory_mb = max(memory_mb, _peak_mb(process.pid))
        time.sleep(_TICK_S)
    return Run(process.returncode, time.perf_counter() - began, memory_mb)


def _peak_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
    return int(peak) * 1024 / 1e6


def _killed(scene: Scene) -> list[Figure]:
    """Killed in the middle of the first and of the second model, each time gone on with, under every quirk."""
    scene.empty()
    proxy = scene.proxy
    proxy.fault("CompleteMultipartUpload", "524 done")
    proxy.fault("CompleteMultipartUpload", "NoSuchUpload done", after=1)
    proxy.fault("UploadPart", "502", times=2, after=5)
    proxy.fault("PutObject", "502")
    proxy.fault("HeadObject", "slow", times=4, seconds=1.0)
    parts = -(-scene.size_bytes // RelayLoad().part_bytes)
    runs = []
    for kill_at in (parts // 2, parts + parts // 2):
        process, began = scene.ours(), time.perf_counter()
        proxy.wait_for("UploadPart", kill_at)
        memory_mb = _peak_mb(process.pid)
        process.send_signal(signal.SIGKILL)
        runs.append(replace(_wait(process, began), memory_mb=memory_mb))
    runs.append(_wait(scene.ours(), time.perf_counter()))
    if [run.code for run in runs] != [-signal.SIGKILL, -signal.SIGKILL, 0]:
        raise RuntimeError(f"the runs ended with {[run.code for run in runs]}")
    scene.check()
    sent = [(call.key, call.part) for call in proxy.calls if call.operation == "UploadPart" and call.fault is None]
    again = len(sent) - len(set(sent))
    return [
        Figure("killed_twice_parts_sent_again_per_connection", again / (KILLS * RelayLoad().uploads), "parts", AGAIN_BOUND),
        Figure("killed_twice_parts", len(set(sent)), "parts"),
        Figure("killed_twice_peak_memory_mb", max(run.memory_mb for run in runs), "MB", MEMORY_BOUND_MB),
    ]


def _speed(scene: Scene, options: Options) -> list[Figure]:
    ours: list[Run] = []
    theirs: list[Run] = []
    for number in range(options.samples):
        scene.empty()
        with tempfile.TemporaryDirectory(dir=scene.root, prefix=f"local-{number}-") as folder:
            theirs.append(_wait(scene.theirs(Path(folder)), time.perf_counter()))
        scene.empty()
        ours.append(_wait(scene.ours(), time.perf_counter()))
        scene.check()
    if any(run.code for run in (*ours, *theirs)):
        raise RuntimeError("a run failed")
    total_mb = COUNT * scene.size_bytes / 1e6
    return [
        Figure.of("ours_mb_per_s", [total_mb / run.seconds for run in ours], "MB/s"),
        Figure.of("download_then_upload_fileobj_mb_per_s", [total_mb / run.seconds for run in theirs], "MB/s"),
        Figure.of("time_ratio", [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)], "x", TIME_BOUND),
        Figure.of("peak_memory_mb", [run.memory_mb for run in ours], "MB", MEMORY_BOUND_MB),
    ]


if __name__ == "__main__":
    sys.exit(main())
