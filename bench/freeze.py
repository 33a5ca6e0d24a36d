"""Freezes at random moments, as FlashBoot's: what they cost, and that they cost no job.

A pod of the real worker and ComfyUI is stopped while it boots, idles, runs a job, uploads its picture or downloads a model.
It goes on up to an hour later by its clocks (`devkit.shifted_clock`), its connections to RunPod dead or alive. And workers that
hold the lock of a download are stopped until another one has taken it over. A sample is 70 freezes; `--samples 8` are 560.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bench.report import Figure, median, parse_args, report
from bench.soak import load, node
from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args, ensure_engine
from devkit.engine.models import make_volume
from devkit.fleet import Fleet, Worker
from devkit.hub import Hub
from devkit.png import Picture
from devkit.s3 import RunPodProxy, S3Server
from devkit.shifted_clock import ShiftedClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from devkit.control_plane import JobHandle
    from devkit.engine.build import Engine

PER_SAMPLE = {"boot": 4, "idle": 18, "run": 16, "upload": 12, "download": 8, "lock": 12}
LOST_BOUND, HUNG_BOUND, WRITERS_BOUND, FIRST_JOB_BOUND_MS = 0, 0, 0, 50.0
WAIT_S = 300.0
NOTICED_S, HOUR_S = 5.0, 3600.0
MIB = 1 << 20
VAE = "tiny_taesd3_vae.safetensors"
BUCKET = "results"


class Pod:
    """One pod after the other, on one volume, and what becomes of the jobs."""

    def __init__(self, engine: Engine, folder: Path, s3: S3Server, models: int) -> None:
        self.engine, self.folder, self.s3 = engine, folder, s3
        self.chance = random.Random(15)
        self.plane = ControlPlane(poll_s=600)
        self.hub = Hub(self._hub_root(models))
        self.proxy = RunPodProxy(s3.endpoint_url, keys=[s3.access_key_id]).__enter__()
        s3.bucket(BUCKET)
        self.models = iter(range(models))
        self.numbers = itertools.count(1)
        self.counts: collections.Counter[str] = collections.Counter()
        self.costs_ms: list[float] = []
        self.polling_ms: list[float] = []
        self.wrong: list[str] = []
        self.hung = self.answered_again = 0
        self.is_cut = False

    def _hub_root(self, models: int) -> Path:
        vae = (make_volume(self.engine, self.folder / "weights") / "models/vae" / VAE).read_bytes()
        root = self.folder / "hub/org/tiny"
        root.mkdir(parents=True)
        for number in range(models):
            (root / f"v{number}.safetensors").write_bytes(vae[:-2] + number.to_bytes(2))
        return root.parent.parent

    def close(self) -> None:
        """End everything."""
        self.proxy.__exit__()
        self.hub.close()
        self.plane.close()

    def live(self) -> None:
        """Have one pod from its boot to its end, with all the freezes of a sample."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.clock = ShiftedClock(folder / "ahead")
        environ = {
            **self.clock.environ,
            "COMFY_ARGS": " ".join([*engine_args(self.engine), *nodes.FLAGS]),
            "HF_ENDPOINT": self.hub.endpoint,
            "MODEL_LOADING": "on_demand",
            "BUCKET_ENDPOINT_URL": self.proxy.endpoint_url,
            "BUCKET_NAME": BUCKET,
            "BUCKET_ACCESS_KEY_ID": self.s3.access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": self.s3.secret_access_key,
        }
        (self.folder / "volume").mkdir(exist_ok=True)
        pod = ProductionWorker(self.plane, self.engine, folder, self.folder / "volume", environ)
        nodes.install(pod.base_dir)
        pod.start()
        try:
            self.boot()
            kinds: list[Callable[[], None]] = [self.idle, self.run, self.upload, self.download]
            todo = [kind for kind in kinds for _ in range(PER_SAMPLE[kind.__name__])]
            self.chance.shuffle(todo)
            for kind in todo:
                kind()
            if (status := pod.stop(timeout_s=60)) != 0:
                self.wrong.append(f"the pod ended with status {status}")
        except BaseException:
            print(pod.log_tail(40), file=sys.stderr)
            raise
        finally:
            self.plane.thaw_pod(cut=False)
            pod.stop()
            log = pod.log()
            self.hung += sum(log.count(word) for word in ("[engine_hung]", "is replaced", "restarting it"))

    def freeze(self, kind: str) -> None:
        """Stop the pod, move its clocks, let it go on."""
        self.counts[kind] += 1
        self.plane.freeze_pod()
        time.sleep(self.chance.choice([0.1, 1.0]) * self.chance.uniform(0.5, 1.5))
        cut = False
        if self.chance.randrange(10):
            seconds = NOTICED_S * (HOUR_S / NOTICED_S) ** self.chance.random()
            self.clock.jump(seconds, monotonic=self.chance.choice([True, False]))
            cut = self.chance.choice([True, False])  # nobody forgets a connection in a second
        self.is_cut = cut
        self.plane.thaw_pod(cut=cut)

    def some_time(self, at_most_s: float) -> None:
        """Let a random time pass."""
        time.sleep(self.chance.uniform(0.0, at_most_s))

    def job(self, seconds: float = 0.0) -> tuple[int, JobHandle]:
        """Send a job that takes a while."""
        number = next(self.numbers)
        graph = {
            "1": node("EmptyImage", width=8, height=8, batch_size=1, color=number),
            "2": node("FaultSleep", image=["1", 0], seconds=seconds, seed=number),
            "3": node("SaveImage", images=["2", 0], filename_prefix="frozen"),
        }
        return number, self.plane.submit({"workflow": graph, "timeout_s": 120})

    def check(self, number: int, job: JobHandle) -> None:
        """Note a job that has not ended once, and with its own picture; 0 stands for any picture.

        Where the connection died between a result and RunPod's word that it is there, it has to be sent again.
        """
        answer = job.result(WAIT_S)
        again = max(0, job.answers - 1) if self.is_cut else 0
        self.answered_again += again
        images = (answer.get("output") or {}).get("images", [])
        if answer["status"] != "COMPLETED" or job.answers - again != 1 or len(images) != 1:
            self.wrong.append(f"job {number}, answered {job.answers} times: {str(answer)[:500]}")
            print(self.wrong[-1], file=sys.stderr, flush=True)
            return
        key = urlsplit(images[0]["data"]).path.removeprefix(f"/{BUCKET}/")
        png = self.s3.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        if number and Picture.read(png) != Picture(8, 8, 64 * number.to_bytes(3)):
            self.wrong.append(f"job {number} has another picture")

    # --- when

    def boot(self) -> None:
        """Freeze while it comes up."""
        number, job = self.job()
        for _ in range(PER_SAMPLE["boot"]):
            self.some_time(4.0)
            self.freeze("boot")
        self.check(number, job)

    def idle(self) -> None:
        """Freeze while it waits for a job; compare the next one with one before."""
        warm_s = self.timed()
        self.some_time(0.5)
        self.freeze("idle")
        began_s = time.monotonic()
        self.plane.wait_polling(timeout_s=WAIT_S)
        self.polling_ms.append((time.monotonic() - began_s) * 1000)
        self.costs_ms.append((self.timed() - warm_s) * 1000)

    def timed(self) -> float:
        """Return how long a job takes."""
        self.plane.wait_polling(timeout_s=WAIT_S)
        began_s = time.monotonic()
        number, job = self.job()
        job.result(WAIT_S)
        took_s = time.monotonic() - began_s
        self.check(number, job)
        return took_s

    def run(self) -> None:
        """Freeze while a job runs."""
        number, job = self.job(seconds=1.0)
        self.plane.wait_until(lambda: bool(job.takes), WAIT_S)
        self.some_time(1.0)
        self.freeze("run")
        self.check(number, job)

    def upload(self) -> None:
        """Freeze while a job's picture is on its way to the bucket."""
        self.proxy.fault("PutObject", "hold")
        number, job = self.job()
        self.proxy.wait_held(timeout_s=WAIT_S)
        self.freeze("upload")
        self.proxy.release()
        self.check(number, job)

    def download(self) -> None:
        """Freeze while a job's model is on its way, with the lock of it."""
        model = f"v{next(self.models)}.safetensors"
        self.hub.fault("stall", file=f"*{model}", after_bytes=self.chance.randrange(MIB), route="cdn")
        graph = load("vae_round_trip")
        graph["1"] = node("EmptyImage", width=64, height=64, batch_size=1, color=next(self.numbers))
        graph["2"]["inputs"]["vae_name"] = model
        job = self.plane.submit({"workflow": graph, "timeout_s": 120, "models": [f"vae=hf://org/tiny/{model}"]})
        self.hub.wait_stalled(1, WAIT_S)
        self.some_time(0.5)
        self.freeze("download")
        self.hub.clear_faults()
        self.check(0, job)


def lock_freezes(folder: Path, hub: Hub, count: int, chance: random.Random) -> tuple[int, list[str]]:
    """Stop as many lock holders, each until another worker has had time to take over; return how many wrote the same name."""
    roots = {str(number): folder / str(number) for number in range(count)}
    source = "org/large/model.safetensors"
    workers = [Worker(f"{name}{end}", str(root), hub.endpoint, source) for name, root in roots.items() for end in "ab"]
    hub.fault("slow", route="cdn", bytes_per_s=4 * MIB, shared=False, count=None)
    with Fleet(*workers) as fleet:

        def stop_holder(name: str, before_s: float, frozen_s: float) -> None:
            pid = fleet.wait_for(lambda event: event.get("step") == "locked" and event["worker"][:-1] == name, WAIT_S)["pid"]
            time.sleep(before_s)
            with contextlib.suppress(ProcessLookupError):  # it was done before its turn
                fleet.kill(pid, signal.SIGSTOP)
                time.sleep(frozen_s)
                fleet.kill(pid, signal.SIGCONT)

        stops = [(name, chance.uniform(0.0, 1.5), chance.uniform(2.5, 4.0)) for name in roots]
        threads = [threading.Thread(target=stop_holder, args=stop) for stop in stops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ends = fleet.wait_ended(WAIT_S)
        wrote = collections.Counter(event["worker"][:-1] for event in fleet.events if event.get("step") == "replaced")
    hub.clear_faults()
    wrong = [str(end) for end in ends if end["event"] != "done"]
    content = (folder / "large").read_bytes()
    wrong += [name for name, root in roots.items() if (root / "models/checkpoints/model.safetensors").read_bytes() != content]
    return sum(each > 1 for each in wrote.values()), wrong


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=1, short_samples=1)
    engine = ensure_engine()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, S3Server() as s3:
        folder = Path(name)
        pod = Pod(engine, folder, s3, options.samples * PER_SAMPLE["download"])
        header = json.dumps({"t": {"dtype": "U8", "shape": [12 * MIB], "data_offsets": [0, 12 * MIB]}}).encode()
        (folder / "large").write_bytes(len(header).to_bytes(8, "little") + header + os.urandom(12 * MIB))
        (folder / "large-hub/org/large").mkdir(parents=True)
        os.link(folder / "large", folder / "large-hub/org/large/model.safetensors")
        writers, began_s = 0, time.monotonic()
        with Hub(folder / "large-hub") as hub:
            for number in range(options.samples):
                pod.live()
                (folder / f"locks{number}").mkdir()
                os.link(folder / "large", folder / f"locks{number}/large")
                both, wrong = lock_freezes(folder / f"locks{number}", hub, PER_SAMPLE["lock"], pod.chance)
                writers, pod.wrong = writers + both, pod.wrong + wrong
                pod.counts["lock"] += PER_SAMPLE["lock"]
                told = f"{dict(pod.counts)}, {len(pod.wrong)} wrong, {pod.hung} hung, {writers} written twice"
                print(f"{time.monotonic() - began_s:.0f} s: {told}", file=sys.stderr, flush=True)
        pod.close()
    return report(
        [
            Figure("freeze_count", pod.counts.total(), ""),
            Figure("freeze_jobs_lost", len(pod.wrong), "jobs", LOST_BOUND),
            Figure("freeze_results_sent_again", pod.answered_again, ""),
            Figure("freeze_false_hung", pod.hung, "", HUNG_BOUND),
            Figure("freeze_names_written_by_two_holders", writers, "", WRITERS_BOUND),
            Figure("freeze_first_job_more_ms", median(pod.costs_ms), "ms", FIRST_JOB_BOUND_MS, pod.costs_ms),
            Figure("freeze_until_it_asks_for_a_job_ms", median(pod.polling_ms), "ms", None, pod.polling_ms),
        ],
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
