"""Two hundred mixed jobs through production mode, with everything real that can be, and things going wrong all the while.

The unmodified SDK, the real ComfyUI, a real S3 server and, where MooseFS can run, a real network volume with several mounts;
three pods of one endpoint. Of the jobs some are cancelled, some end their engine, some are wrong; websockets are cut, also
under a job that samples, engines killed, a pod is ended while it is busy. What a job returns tells it from others of its kind.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import random
import signal
import threading
import time
import urllib.request
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal

import pytest

from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.cutting_proxy import CuttingProxy
from devkit.engine.build import engine_args
from devkit.engine.models import make_volume
from devkit.local_worker import free_port
from devkit.moosefs import available
from devkit.png import Picture, chunks
from devkit.s3 import S3Server
from worker.engine.event_loop import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from devkit.control_plane import JobHandle
    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]

SEED = 20261123
JOB_KEY = "comfyui-org-secret-of-a-job"
WAIT_S = 280.0
BIG_BYTES = 15_000_000
CUT_STEPS = 60
"""A job that has shown the first of so many is at work for longer than a cut takes."""
TRANSIENT = {"engine_died", "engine_unreachable", "run_lost", "engine_gave_up"}
"""What a job may answer when its engine was killed under it."""


def tiny(colour: int, node: str | None = None, **inputs: Any) -> dict[str, Any]:
    graph: dict[str, Any] = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}},
    }
    if node:
        graph["3"] = {"class_type": node, "inputs": {"image": ["1", 0], "seed": colour, **inputs}}
        graph["2"]["inputs"]["images"] = ["3", 0]
    return graph


def drawn(png: bytes) -> str:
    """A digest of the pixels as one encoder writes them, without the metadata, which hold the job's own graph."""
    return hashlib.sha256(b"".join(chunk for kind, chunk in chunks(png) if kind == b"IDAT")).hexdigest()


@dataclass
class Sent:
    """A job, and what is to become of it."""

    kind: str
    job: JobHandle
    check: Callable[[dict[str, Any]], None]


class Endpoint:
    """Three pods: one without a bucket whose engine sits behind a proxy, two with one. And a file server for inputs.

    `volumes`: the one network volume as each pod sees it.
    """

    def __init__(self, engine: Engine, folder: Path, volumes: Mapping[str, Path], s3: S3Server) -> None:
        self.engine, self.folder, self.volumes, self.s3 = engine, folder, volumes, s3
        make_volume(engine, volumes["plain"])
        self.plane = ControlPlane(poll_s=20, run_limit_bytes=10_000_000)
        self.loop = LoopThread("proxy")
        self.served = folder / "served"
        self.files = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(self.served)))
        threading.Thread(target=self.files.serve_forever, daemon=True).start()
        self.behind = free_port()
        self.proxy = self.loop.submit(CuttingProxy(f"127.0.0.1:{self.behind}").__aenter__()).result(10)
        proxied = {"COMFYUI_PORT": self.proxy.address.rpartition(":")[2], "WEBSOCKET_RECONNECT_DELAY_S": "1"}
        self.pods = {
            "plain": self.start("plain", f"--port {self.behind}", proxied),
            "bucket": self.start("bucket", "", self.bucket()),
        }
        for pod in self.pods.values():
            pod.wait_ready()

    def bucket(self) -> dict[str, str]:
        """The settings of a worker that puts its results into the store."""
        with contextlib.suppress(self.s3.client.exceptions.BucketAlreadyOwnedByYou):
            self.s3.bucket("results")
        return {
            "BUCKET_ENDPOINT_URL": self.s3.endpoint_url,
            "BUCKET_NAME": "results",
            "BUCKET_ACCESS_KEY_ID": self.s3.access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": self.s3.secret_access_key,
        }

    def start(self, pod_id: str, flags: str, environ: dict[str, str]) -> ProductionWorker:
        """One more pod."""
        flags = " ".join([*engine_args(self.engine), *nodes.FLAGS, flags])
        environ = {"COMFY_ARGS": flags, "INPUT_URL_ALLOW_PRIVATE": "127.0.0.1", "HF_TOKEN": "hf_neverinlogs", **environ}
        environ["OMP_NUM_THREADS"] = "1"  # three engines with threads that wait actively would take seconds for each step
        folder = self.folder / pod_id
        folder.mkdir()
        pod = ProductionWorker(self.plane, self.engine, folder, self.volumes[pod_id], environ, pod_id=pod_id)
        nodes.install(pod.base_dir)
        pod.start()
        return pod

    def close(self) -> None:
        for pod in self.pods.values():
            pod.stop()
        self.plane.close()
        self.files.shutdown()
        self.loop.submit(self.proxy.__aexit__()).result(10)
        self.loop.stop()

    def cut(self) -> None:
        """Cut every connection between the plain pod and its engine."""
        self.loop.submit(run(self.proxy.cut)).result(10)

    def read(self, item: dict[str, Any]) -> bytes:
        """The bytes of an output, wherever they are."""
        if item["type"] == "base64":
            return base64.b64decode(item["data"], validate=True)
        if item["type"] == "volume_path":
            written: bytes = (self.volumes["plain"] / item["data"]).read_bytes()  # only a pod without a bucket writes there
            return written
        assert item["type"] == "s3_url", item
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(item["data"], timeout=30) as response:
            assert response.headers["Content-Type"] == item["media_type"]
            content: bytes = response.read()
            return content


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


async def run(function: Callable[[], None]) -> None:
    function()


@pytest.fixture(scope="module")
def endpoint(engine: Engine, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    if available() is None or os.environ.get("CI"):
        here, there = (mount / "production" for mount in request.getfixturevalue("moosefs").mounts[:2])
    else:
        here = there = folder / "volume"
    with S3Server() as s3:
        running = Endpoint(engine, folder, {"plain": here, "bucket": there, "third": there}, s3)
        yield running
        running.close()


class Jobs:
    """Makes the two hundred, each with the check of its answer."""

    def __init__(self, endpoint: Endpoint, workflow: Load) -> None:
        self.endpoint, self.workflow = endpoint, workflow
        self.sent: list[Sent] = []
        self.drawn: dict[tuple[int, int], str] = {}

    def send(self, kind: str, number: int) -> None:
        job_input, check = getattr(self, kind)(number)
        via: Literal["run", "runsync"] = "runsync" if number % 3 == 0 else "run"
        self.sent.append(Sent(kind, self.endpoint.plane.submit(job_input, via=via), check))

    def one(self, answer: dict[str, Any], kind: str = "images") -> bytes:
        assert answer["status"] == "COMPLETED", answer
        (item,) = answer["output"][kind]
        data = self.endpoint.read(item)
        assert item["size_bytes"] == len(data)
        return data

    def colour(self, number: int) -> Any:
        def check(answer: dict[str, Any]) -> None:
            assert Picture.read(self.one(answer)) == Picture(8, 8, 64 * number.to_bytes(3))

        return {"workflow": tiny(number), "comfy_org_api_key": JOB_KEY}, check

    def sampled(self, number: int, steps: int = 20) -> Any:
        """One of three seeds: each is to look the same whichever pod drew it, and as no other."""
        seed = number % 3

        def check(answer: dict[str, Any]) -> None:
            picture = drawn(self.one(answer))
            assert self.drawn.setdefault((seed, steps), picture) == picture
            assert picture not in {other for key, other in self.drawn.items() if key != (seed, steps)}

        return {"workflow": self.sampling(seed, steps), "return_timings": True}, check

    def cut(self, number: int) -> Any:
        """A job that samples for seconds, under which the websocket is cut where its pod is the one behind the proxy."""
        return self.sampled(number, CUT_STEPS)

    def sampling(self, seed: int, steps: int) -> dict[str, Any]:
        graph = self.workflow("text_to_image")
        next(node for node in graph.values() if node["class_type"] == "KSampler")["inputs"].update(seed=seed, steps=steps)
        return graph

    def picture(self, number: int) -> Any:
        """Another picture each, all under one name, by address or as base64; it comes back as it is."""
        sent = Picture.of(number)
        as_data = {"name": "in.png", "image": base64.b64encode(sent.to_png()).decode()}
        if number % 2:
            folder = self.endpoint.served / str(number)
            folder.mkdir(parents=True)
            (folder / "in.png").write_bytes(sent.to_png())
            as_data = {"name": "in.png", "url": f"http://127.0.0.1:{self.endpoint.files.server_port}/{number}/in.png"}

        def check(answer: dict[str, Any]) -> None:
            assert Picture.read(self.one(answer)) == sent

        graph = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "as_it_came"}},
        }
        return {"workflow": graph, "images": [as_data]}, check

    def big(self, number: int) -> Any:
        """A file of a name and a length of its own."""
        name, size_bytes = f"{number}.mp4", BIG_BYTES + number
        graph = {"1": {"class_type": "FaultFile", "inputs": {"key": "gifs", "filename": name, "size_bytes": size_bytes}}}

        def check(answer: dict[str, Any]) -> None:
            assert self.one(answer, "videos") == bytes(size_bytes)
            (item,) = answer["output"]["videos"]
            assert item["filename"] == name
            assert item["type"] in {"volume_path", "s3_url"}

        return {"workflow": graph}, check

    def text(self, number: int) -> Any:
        graph = self.workflow("preview_text")
        graph["1"]["inputs"]["width"] = 8 + number

        def check(answer: dict[str, Any]) -> None:
            assert answer["status"] == "COMPLETED", answer
            assert [(item["type"], item["data"]) for item in answer["output"]["text"]] == [("text", str(8 + number))]

        return {"workflow": graph}, check

    def wrong(self, number: int) -> Any:
        inputs: list[tuple[Any, str]] = [
            ({}, "workflow_missing"),
            ("{not json", "input_not_json"),
            ({"workflow": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}, "unknown_nodes"),
            (
                {"workflow": tiny(1), "images": [{"name": "a.png", "url": "http://10.0.0.1/x?sig=neverinlogs"}]},
                "input_url_refused",
            ),
            ({"workflow": tiny(1), "timeout_s": -1}, "field_invalid"),
        ]
        job_input, code = inputs[number % len(inputs)]

        def check(answer: dict[str, Any]) -> None:
            assert (answer["status"], answer["output"]["code"]) == ("FAILED", code)

        return job_input, check

    def slow(self, number: int) -> Any:
        def check(answer: dict[str, Any]) -> None:
            assert (answer["status"], answer["output"]["code"]) == ("FAILED", "job_timeout")

        return {"workflow": self.sampling(number, 10000), "timeout_s": 1.0}, check

    def cancelled(self, number: int) -> Any:
        def check(answer: dict[str, Any]) -> None:
            assert answer["status"] == "CANCELLED"

        return {"workflow": self.sampling(number, 10000)}, check

    def fatal(self, number: int) -> Any:
        def check(answer: dict[str, Any]) -> None:
            assert (answer["status"], answer["output"]["code"]) == ("FAILED", "engine_died")

        return {"workflow": tiny(number, "FaultDie", signal=11)}, check


def is_sampling(job: JobHandle) -> bool:
    """Whether it is at work; or has ended, because its engine was killed before it could be cancelled."""
    return bool(job.answers) or any(update.value["type"] == "progress" for update in job.updates)


def cancel_when_running(plane: ControlPlane, sent: list[Sent]) -> None:
    """Cancel the jobs that are to be: half of them in the queue, half at work, as their progress shows."""
    for number, each in enumerate(sent):
        if number % 2:
            plane.wait_until(functools.partial(is_sampling, each.job), WAIT_S)
        if not each.job.answers:
            plane.cancel(each.job.id)


def is_up(pod: ProductionWorker) -> bool:
    """Whether its ComfyUI is not just being restarted."""
    log = pod.log()
    return log.count("restarting it") == log.count("ComfyUI is back")


def ended(each: Sent) -> str:
    status: str = each.job.result(WAIT_S)["status"]
    return status


def cut_under(endpoint: Endpoint, sent: list[Sent]) -> list[Sent]:
    """Cut the websocket under each of these that samples in the plain pod; returns those that went on with their work."""
    hit = []
    for each in sent:
        endpoint.plane.wait_until(functools.partial(is_sampling, each.job), WAIT_S)
        if each.job.takes == ["plain"] and not each.job.answers:
            endpoint.cut()
            hit += [] if each.job.answers else [each]
    return hit


def surely_cut(jobs: Jobs, so_far: list[Sent]) -> None:
    """Send more jobs until one had its websocket cut while it was at work, and came to its end all the same."""
    for number in range(200, 220):
        if any(ended(each) == "COMPLETED" for each in so_far):
            return
        jobs.send("cut", number)  # the plain pod had none of the others, or its engine was killed under them
        so_far += cut_under(jobs.endpoint, jobs.sent[-1:])
    raise AssertionError("no cut hit a job at work that went on")


def test_two_hundred_mixed_jobs_are_each_answered_once_with_the_right_bytes(endpoint: Endpoint, workflow: Load) -> None:
    plane = endpoint.plane
    kinds = ["colour"] * 116 + ["sampled"] * 20 + ["cut"] * 4 + ["picture"] * 24 + ["big"] * 6 + ["text"] * 6
    kinds += ["wrong"] * 10 + ["slow"] * 3 + ["cancelled"] * 8 + ["fatal"] * 3
    random.Random(SEED).shuffle(kinds)
    jobs = Jobs(endpoint, workflow)
    for number, kind in enumerate(kinds):
        jobs.send(kind, number)
    assert len(jobs.sent) == 200

    def done(count: int) -> None:
        plane.wait_until(lambda: sum(bool(each.job.answers) for each in jobs.sent) >= count, WAIT_S)

    cancelling = threading.Thread(
        target=cancel_when_running, args=(plane, [each for each in jobs.sent if each.kind == "cancelled"]), daemon=True
    )
    cancelling.start()
    under_work: list[Sent] = []
    to_cut = [each for each in jobs.sent if each.kind == "cut"]
    cutting = threading.Thread(target=lambda: under_work.extend(cut_under(endpoint, to_cut)), daemon=True)
    cutting.start()
    for count in (20, 40, 60):
        done(count)
        endpoint.cut()
    done(70)
    plain = endpoint.pods["plain"]
    plane.wait_until(lambda: is_up(plain), WAIT_S)  # a ComfyUI that dies as it is restarted is one too many: its worker leaves
    os.kill(plain.comfyui_pid(), signal.SIGKILL)
    done(90)
    ending = endpoint.pods["bucket"]
    os.kill(ending.pid, signal.SIGTERM)
    endpoint.pods["third"] = endpoint.start("third", "", endpoint.bucket())
    assert ending.wait_exit(60) == 0
    done(120)
    endpoint.cut()
    cutting.join(WAIT_S)
    assert not cutting.is_alive()
    surely_cut(jobs, under_work)
    jobs.send("cut", len(jobs.sent))  # and one that nothing befalls, to compare with

    hit = []
    for each in jobs.sent:
        answer = each.job.result(WAIT_S)
        if answer["status"] == "FAILED" and answer["output"].get("code") in TRANSIENT and each.kind != "fatal":
            hit.append(each)  # ComfyUI was killed under it
        else:
            each.check(answer)
        assert each.job.answers == (0 if answer["status"] == "CANCELLED" else 1), each
        assert len(each.job.takes) <= 1
        assert not each.job.late_updates
        assert not each.job.lost
    cancelling.join(30)
    assert not cancelling.is_alive()
    assert len(hit) <= 1, [each.job.status() for each in hit]
    pods = {pod for each in jobs.sent for pod in each.job.takes}
    assert pods == {"plain", "bucket", "third"}
    types = {item["type"] for each in jobs.sent for item in each.job.status().get("output", {}).get("images", ())}
    assert types == {"base64", "s3_url"}


def test_nothing_secret_is_in_any_log(endpoint: Endpoint) -> None:
    logs = "".join(pod.log() for pod in endpoint.pods.values())
    assert "finished in" in logs
    for secret in (
        JOB_KEY,
        "hf_neverinlogs",
        "sig=neverinlogs",
        endpoint.s3.secret_access_key,
        "X-Amz-Signature",
        "data:image",
    ):
        assert secret not in logs
    for number in range(200):
        assert base64.b64encode(Picture.of(number).to_png()).decode()[100:140] not in logs


def test_an_engine_that_was_cut_off_again_and_again_still_serves(endpoint: Endpoint) -> None:
    before = time.monotonic()
    job = endpoint.plane.submit({"workflow": tiny(4711), "return_timings": True})
    output = job.result(60)["output"]
    assert set(output["timings"]) >= {"models_s", "inputs_s", "queueing_s", "running_s", "delivering_s", "total_s", "nodes_s"}
    assert 0 < output["timings"]["total_s"] < time.monotonic() - before
