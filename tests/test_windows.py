"""What people run on Windows: a Python without POSIX's modules and calls runs it, or says in one sentence what it wants.

There is no Windows here. These processes lack what Python lacks there, from before the first import of the project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from devkit.hub import Hub as StandIn
from devkit.local_worker import PROJECT
from devkit.runpod import RunPodStandIn
from devkit.s3 import RunPodProxy, S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The standard library and the packages may use what they find; they are of their makers' Windows versions there.
AS_ON_WINDOWS = """
import asyncio, concurrent.futures, http.server, logging.config, multiprocessing, os, runpy, shutil, ssl, subprocess, sys
import tempfile, urllib.request
try:
    import boto3, botocore.session, filelock, httpx2, huggingface_hub.hf_api, rich.console, rich.progress, yaml
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
except ModuleNotFoundError:
    pass
for name in ("fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
usage = {root: shutil.disk_usage(root) for root in ("/",)}
shutil.disk_usage = lambda path: usage["/"]  # a Windows has its own
try:
    import filelock._unix, types
    filelock._unix.os = types.SimpleNamespace(**vars(os))  # it has a module of its own for Windows
except ModuleNotFoundError:
    pass
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "fork", "forkpty", "geteuid", "getuid", "killpg", "posix_fadvise",
             "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "setsid", "statvfs", "fstatvfs", "sysconf", "uname"):
    if hasattr(os, name):
        delattr(os, name)
import signal
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGPIPE", "SIGWINCH", "SIGSTOP"):
    delattr(signal, name)
sys.argv = sys.argv[1:]
if sys.argv[0] == "worker":
    runpy.run_module("worker", run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAME = "墨水.safetensors"


def weights(size_bytes: int = 200_000) -> bytes:
    header = json.dumps({"t": {"dtype": "U8", "shape": [size_bytes - 108], "data_offsets": [0, size_bytes - 108]}})
    return (100).to_bytes(8, "little") + header.encode().ljust(100) + bytes(size_bytes - 108)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    root = tmp_path_factory.mktemp("hub")
    (root / "org/open").mkdir(parents=True)
    (root / "org/open/a.safetensors").write_bytes(weights())
    with StandIn(root) as hub:
        yield hub


def run(*argv: str, **environ: str) -> tuple[int, str]:
    """The exit status, and all that it said, on a terminal that knows Western letters only."""
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, *argv],
        cwd=PROJECT,
        env=os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"} | environ,
        capture_output=True,
        check=False,
        timeout=120,
    )
    text = (done.stdout + done.stderr).decode("cp1252")
    assert "Traceback" not in text, text
    return done.returncode, text


def test_the_seeder_fills_volumes_over_s3(stand_in: StandIn) -> None:
    with S3Server() as server, RunPodProxy(server.endpoint_url, keys=[server.access_key_id]) as proxy:
        server.bucket("vol1")
        environ = {
            "HF_ENDPOINT": stand_in.endpoint,
            "RUNPOD_S3_ACCESS_KEY_ID": server.access_key_id,
            "RUNPOD_S3_SECRET_ACCESS_KEY": "rps_x",
        }
        where = ("--endpoint", proxy.endpoint_url, "--s3", "vol1")
        what = f"loras/{NAME}=hf://org/open/a.safetensors"
        assert run("scripts/seed_volume.py", what, *where, **environ)[0] == 0
        for action in ("--dry-run", "--verify"):
            status, text = run("scripts/seed_volume.py", what, action, *where, **environ)
            assert (status, "loras/" in text) == (0, True)
        body = server.client.get_object(Bucket="vol1", Key=f"models/loras/{NAME}")["Body"].read()
    assert body == weights()


def test_what_needs_a_mounted_volume_says_what_it_wants(tmp_path: Path) -> None:
    status, text = run("scripts/seed_volume.py", "vae=hf://org/open/a.safetensors", "--volume", str(tmp_path))
    assert (status, "Linux, macOS or WSL" in text) == (2, True)
    for command in ((), ("doctor",), ("convert", "x.json")):
        status, text = run("worker", *command)
        assert status == 1
        assert "needs Linux, macOS or WSL" in text


def test_plan_says_what_a_workflow_needs(stand_in: StandIn, tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "LoraLoader", "inputs": {"lora_name": NAME}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    workflow = tmp_path / "w.json"
    workflow.write_text(json.dumps({"input": {"workflow": graph, "models": [f"loras/{NAME}=hf://org/open/a.safetensors"]}}))
    (tmp_path / "volume/models/loras").mkdir(parents=True)
    environ = {"HF_ENDPOINT": stand_in.endpoint, "VOLUME_PATH": str(tmp_path / "volume")}
    for there, said in ((False, "1 to download"), (True, "1 present")):
        if there:
            (tmp_path / "volume/models/loras" / NAME).write_bytes(weights())
        status, text = run("worker", "plan", str(workflow), **environ)
        assert (status, said in text) == (0, True), text


def test_the_client_runs(tmp_path: Path) -> None:
    assert run("scripts/run_workflow.py", "--help")[0] == 0
    workflow = tmp_path / NAME
    workflow.write_text('{"1": {"class_type": "SaveImage", "inputs": {}}}')
    status, text = run("scripts/run_workflow.py", str(workflow), "--url", "http://127.0.0.1:9")
    assert status not in {0, 2}, text
    assert "127.0.0.1:9" in text


def test_up_makes_an_endpoint_and_removes_it(tmp_path: Path) -> None:
    with RunPodStandIn(tmp_path / "runpod") as runpod:
        environ = {**runpod.environ(), "XDG_STATE_HOME": str(tmp_path / "state")}
        workflow = str(PROJECT / "devkit/workflows/empty_image.json")
        more = ("--image", "docker.io/you/worker:1", "--yes", "--no-picture", "--output", str(tmp_path))
        status, text = run("scripts/up.py", workflow, *more, **environ)
        assert (status, runpod.billed()["endpoints"]) == (0, 1), text
        status, text = run("scripts/up.py", "down", "--name", "empty-image", "--yes", "--volume-too", **environ)
        assert (status, any(runpod.billed().values())) == (0, False), text
