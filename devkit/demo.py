"""The main job, as a user would do it: an endpoint's volume, a worker, a request over HTTP, a picture. Prints for people."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.command import check, saved_line, tell_failure, watched
from client.errors import INTERRUPTED, ClientError
from client.request import Wishes, build
from client.save import Saved, save_outputs
from client.service import LocalWorkerApi
from client.wire import Wire
from devkit.engine.build import ensure_engine
from devkit.engine.cache import BuildFailed
from devkit.engine.models import make_volume
from devkit.hub import hub_process
from devkit.local_worker import JOB_TIMEOUT_S, PROJECT, LocalWorker, WorkerExitedError
from worker.plan.document import installed_release

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = PROJECT / ".demo"
BAR_WIDTH = 48
REPO = "demo/tiny"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when a file came back."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--workflow", type=Path, default=PROJECT / "devkit/workflows/text_to_image.json")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a file the workflow loads by its name")
    parser.add_argument("--serve", action="store_true", help="leave the worker running for requests of your own")
    parser.add_argument("--port", type=int, default=8000, help="the API's port with --serve")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    try:
        job = _job(options.workflow, options.image)
    except ClientError as exc:
        return tell_failure(exc, sys.stderr)
    say("building ComfyUI for the CPU (cached after the first time)")
    try:
        engine = ensure_engine()
        weights = make_volume(engine, FOLDER / "weights") / "models"
    except BuildFailed as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    version = installed_release(engine.comfyui_dir) or "of an unknown version"
    say(f"ComfyUI {version}; its weights here are tiny and random, so that pictures are noise")
    with hub_process(_publish(weights, FOLDER / "hub")) as hub:
        manifest = _write_manifest(weights, FOLDER / "models.toml")
        say(f"a stand-in of Hugging Face with {_model_count(weights)} tiny models: {hub.endpoint}")
        volume = _empty(FOLDER / "volume")
        say(f"an empty volume: {_shown(volume)}; the worker's manifest: {_shown(manifest)}")
        shutil.rmtree(FOLDER / "comfyui", ignore_errors=True)
        environ = {"HF_ENDPOINT": hub.endpoint, "MODELS_MANIFEST": str(manifest)}
        worker = LocalWorker(engine, FOLDER, volume, environ, port=options.port if options.serve else None)
        try:
            return _serve(worker, job) if options.serve else _one_job(worker, job)
        except (WorkerExitedError, TimeoutError) as exc:
            print(f"demo: {exc}", file=sys.stderr)
            return 1
        except ClientError as exc:
            return tell_failure(exc, sys.stderr)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _publish(weights: Path, root: Path) -> Path:
    """Put the weights where the stand-in serves them from: repository `demo/tiny`."""
    repo = _empty(root) / REPO
    shutil.copytree(weights, repo, copy_function=os.link)
    return root


def _write_manifest(weights: Path, path: Path) -> Path:
    """Name every model as an operator would; workflows say only `tiny_sd3.safetensors`."""
    files = sorted(file.relative_to(weights) for file in weights.rglob("*") if file.is_file())
    entries = (
        f'[[model]]\nsource = "hf://{REPO}/{file}"\nfolder = "{file.parts[0]}"\nname = "{Path(*file.parts[1:])}"\n'
        for file in files
    )
    path.write_text("\n".join(entries))
    return path


def _one_job(worker: LocalWorker, job: dict[str, Any]) -> int:
    began = time.monotonic()
    with worker:
        say(f"starting the worker: python -m worker --rp_serve_api (log: {_shown(worker.log_path)})")
        worker.wait_ready()
        ready_s = time.monotonic() - began
        url = f"http://127.0.0.1:{worker.port}"
        say(f"scripts/run_workflow.py --url {url}: POST {url}/runsync")
        answer = watched(LocalWorkerApi(Wire(url)), job, JOB_TIMEOUT_S)
        done_s = time.monotonic() - began
        log = worker.log()
    if answer is None:
        return INTERRUPTED
    print()
    print("\n".join(chart(log)))
    print(f"{'first request took':>28}  {done_s - ready_s:.2f} s")
    for name, size in _FETCHED.findall(log):
        print(f"{'fetched':>28}  {name} ({size})")
    print()
    check(answer)
    return _save(answer["output"])


def _serve(worker: LocalWorker, job: dict[str, Any]) -> int:
    request = FOLDER / "request.json"
    with worker:
        worker.wait_ready()
        request.write_text(json.dumps(job))
        say(
            f"serving until Ctrl-C; in another terminal:\n\n  curl -s http://127.0.0.1:{worker.port}/runsync \\\n"
            f"    -H 'content-type: application/json' -d @{_shown(request)} | head -c 300\n"
        )
        with subprocess.Popen(["tail", "-n", "+1", "-f", str(worker.log_path)]) as tail:
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    tail.wait()
            finally:
                tail.terminate()
    return 0


def _save(output: dict[str, Any]) -> int:
    """Save the files of a result; prints one line for each, with what proves that it is the same on every run."""
    saved = list(save_outputs(output, _empty(FOLDER / "pictures")))
    for each in saved:
        if not isinstance(each, Saved):
            return tell_failure(each, sys.stderr)
        line, _, text = saved_line(each).replace(f"{PROJECT}{os.sep}", "").partition("\n")
        proof = f"  sha256 {hashlib.sha256(each.path.read_bytes()).hexdigest()[:16]}" if each.path else ""
        print(f"{line}{proof}{text and chr(10)}{text}")
    if not saved:
        print("demo: the job finished and saved no file; give the workflow an output node such as SaveImage", file=sys.stderr)
        return 1
    return 0


_FETCHED = re.compile(r"model (\S+): ([\d.]+ MB) fetched")
_SUMMARY = re.compile(r"cold start ([\d.]+) s: (.*)")
_STEP = re.compile(r"(?P<text>\w[^;]*?) \[(?P<start>[\d.]+)-(?P<end>[\d.]+)\]")


def chart(log: str) -> Iterator[str]:
    """Return the worker's cold start line as bars over time."""
    found = _SUMMARY.search(log)
    if not found:
        return
    whole_s = float(found[1])
    yield f"{'cold start':>28}  {whole_s:.2f} s from process start to ready for jobs"
    for step in _STEP.finditer(found[2]):
        start, end = (round(float(step[key]) / whole_s * BAR_WIDTH) for key in ("start", "end"))
        yield f"{step['text']:>28}  {' ' * start}{'█' * max(1, end - start)}"


def _job(workflow: Path, images: list[str]) -> dict[str, Any]:
    """Return the client's request. It includes the project's own test picture if the workflow loads it."""
    if not images and workflow.is_file() and b'"in.png"' in workflow.read_bytes():
        images = [str(PROJECT / "devkit/workflows/in.png")]
    return build(Wishes(str(workflow), images=images))


def _model_count(weights: Path) -> int:
    return sum(path.is_file() for path in weights.rglob("*"))


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(text: str) -> None:
    """Print one step of the demo."""
    print(f"==> {text}", flush=True)


def _leave(number: int, _: object) -> None:
    """Unwind, so that everything that was started ends too. Ignore further signals meanwhile."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
