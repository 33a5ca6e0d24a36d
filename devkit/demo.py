"""The main job, as a user would do it: an endpoint's volume, a worker, a request over HTTP, a picture. Prints for people."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devkit.engine.build import ensure_engine
from devkit.engine.models import make_volume
from devkit.hub import hub_process
from devkit.local_worker import PROJECT, LocalWorker, WorkerExitedError

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
    workflow = _read_workflow(options.workflow)
    say("building ComfyUI for the CPU (cached after the first time)")
    engine = ensure_engine()
    weights = make_volume(engine, FOLDER / "weights") / "models"
    with hub_process(_publish(weights, FOLDER / "hub")) as hub:
        manifest = _write_manifest(weights, FOLDER / "models.toml")
        say(f"a stand-in of Hugging Face with {_model_count(weights)} tiny models: {hub.endpoint}")
        volume = _empty(FOLDER / "volume")
        say(f"an empty volume: {_shown(volume)}; the worker's manifest: {_shown(manifest)}")
        shutil.rmtree(FOLDER / "comfyui", ignore_errors=True)
        environ = {"HF_ENDPOINT": hub.endpoint, "MODELS_MANIFEST": str(manifest)}
        worker = LocalWorker(engine, FOLDER, volume, environ, port=options.port if options.serve else None)
        try:
            return _serve(worker, workflow) if options.serve else _one_job(worker, _job_input(workflow, options.image))
        except (WorkerExitedError, TimeoutError) as exc:
            print(f"demo: {exc}", file=sys.stderr)
            return 1


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


def _one_job(worker: LocalWorker, job_input: dict[str, Any]) -> int:
    began = time.monotonic()
    with worker:
        say(f"starting the worker: python -m worker --rp_serve_api (log: {_shown(worker.log_path)})")
        worker.wait_ready()
        ready_s = time.monotonic() - began
        say(f"POST http://127.0.0.1:{worker.port}/runsync")
        answer = worker.runsync(job_input)
        done_s = time.monotonic() - began
        log = worker.log()
    print()
    print("\n".join(chart(log)))
    print(f"{'first request took':>28}  {done_s - ready_s:.2f} s")
    for name, size in _FETCHED.findall(log):
        print(f"{'fetched':>28}  {name} ({size})")
    print()
    return _save(answer)


def _serve(worker: LocalWorker, workflow: dict[str, Any]) -> int:
    request = FOLDER / "request.json"
    with worker:
        worker.wait_ready()
        request.write_text(json.dumps({"input": {"workflow": workflow}}))
        say(
            f"serving until Ctrl-C; in another terminal:\n\n  curl -s http://127.0.0.1:{worker.port}/runsync \\\n"
            f"    -H 'content-type: application/json' -d @{_shown(request)} | head -c 300\n"
        )
        with subprocess.Popen(["tail", "-n", "+1", "-f", str(worker.log_path)]) as tail:
            try:
                tail.wait()
            except KeyboardInterrupt:
                tail.terminate()
    return 0


def _save(answer: dict[str, Any]) -> int:
    """Write the files of a result; prints one line for each, with what proves that it is the same on every run."""
    if answer["status"] != "COMPLETED":
        print(f"demo: the job failed: {answer.get('error')}", file=sys.stderr)
        return 1
    folder = FOLDER / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for item in answer["output"]["images"]:
        data = base64.b64decode(item["data"])
        path = folder / item["filename"]
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()[:16]
        print(f"picture  {_shown(path)}  ({item['media_type']}, {len(data):,} bytes, sha256 {digest})")
    if not answer["output"]["images"]:
        print("demo: the job finished and saved no file; give the workflow an output node such as SaveImage", file=sys.stderr)
        return 1
    return 0


_FETCHED = re.compile(r"model (\S+): ([\d.]+ MB) fetched")
_SUMMARY = re.compile(r"cold start ([\d.]+) s: (.*)")
_STEP = re.compile(r"(?P<text>\w[^;]*?) \[(?P<start>[\d.]+)-(?P<end>[\d.]+)\]")


def chart(log: str) -> Iterator[str]:
    """The cold start's line of the worker's log, drawn as bars over time."""
    found = _SUMMARY.search(log)
    if not found:
        return
    whole_s = float(found[1])
    yield f"{'cold start':>28}  {whole_s:.2f} s from process start to ready for jobs"
    for step in _STEP.finditer(found[2]):
        start, end = (round(float(step[key]) / whole_s * BAR_WIDTH) for key in ("start", "end"))
        yield f"{step['text']:>28}  {' ' * start}{'█' * max(1, end - start)}"


def _read_workflow(path: Path) -> dict[str, Any]:
    try:
        workflow: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError as exc:
        sys.exit(f"demo: {path} cannot be read ({exc.strerror}); pass WORKFLOW=file.json")
    except ValueError as exc:
        sys.exit(f"demo: {path} is not JSON ({exc})")
    return workflow


def _job_input(workflow: dict[str, Any], images: list[str]) -> dict[str, Any]:
    """The request; the project's own test picture goes along when the workflow loads it."""
    files = [Path(image) for image in images]
    if not files and '"in.png"' in json.dumps(workflow):
        files = [PROJECT / "devkit/workflows/in.png"]
    return {
        "workflow": workflow,
        "images": [{"name": file.name, "image": base64.b64encode(file.read_bytes()).decode()} for file in files],
    }


def _model_count(weights: Path) -> int:
    return sum(path.is_file() for path in weights.rglob("*"))


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(text: str) -> None:
    """One step of the demo."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
