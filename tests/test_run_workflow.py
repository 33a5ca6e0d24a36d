"""scripts/run_workflow.py as people use it, a process of its own: RunPod's stand-in, a local worker, servers that refuse."""

from __future__ import annotations

import ast
import base64
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from client import command
from client.errors import OutputNotSaved
from client.progress import bar_line, plain_line, size
from client.save import Saved, file_name, save_outputs
from client.service import News
from devkit import nodes
from devkit.control_plane import ControlPlane, ProductionWorker
from devkit.engine.build import engine_args
from devkit.engine.models import make_volume
from devkit.hub import Hub
from devkit.local_worker import PROJECT, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from devkit.engine.build import Engine
    from devkit.local_worker import LocalWorker

    Load = Callable[[str], dict[str, Any]]

REPO = "org/tiny"
NAMES = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")
SCRIPT = str(PROJECT / "scripts/run_workflow.py")
EMPTY = str(PROJECT / "devkit/workflows/empty_image.json")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def hub(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    weights = make_volume(engine, folder / "weights") / "models"
    shutil.copytree(weights, folder / "root" / REPO, copy_function=os.link)
    with Hub(folder / "root") as running:
        yield running


@pytest.fixture(scope="module")
def pod(engine: Engine, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProductionWorker]:
    """The worker in production mode behind RunPod's stand-in, on an empty volume; it fetches what jobs name."""
    folder = tmp_path_factory.mktemp("pod")
    (folder / "volume").mkdir()
    models = " ".join(f"{name.split('/')[0]}=hf://{REPO}/{name}" for name in NAMES)
    flags = " ".join([*engine_args(engine), *nodes.FLAGS])
    environ = {"HF_ENDPOINT": hub.endpoint, "MODELS": models, "MODEL_LOADING": "on_demand", "COMFY_ARGS": flags}
    with ControlPlane() as plane, ProductionWorker(plane, engine, folder, folder / "volume", environ) as worker:
        worker.stop()
        nodes.install(worker.base_dir)
        worker.start()
        worker.wait_ready()
        yield worker


def environ(base_url: str, key: str = "rpa_user", **more: str) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    return {**mine, "RUNPOD_ENDPOINT_BASE_URL": base_url, "RUNPOD_API_KEY": key, **more}


def client(
    *arguments: str, cwd: Path, base_url: str = "", key: str = "rpa_user", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the client to its end, `more` being variables of its environment."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=cwd,
        env=environ(base_url, key, **more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def on_pod(pod: ProductionWorker, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return client(*arguments, "--endpoint", pod.plane.endpoint_id, cwd=cwd, base_url=pod.plane.base_url)


def begun(pod: ProductionWorker, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The client as a process that goes on."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments, "--endpoint", pod.plane.endpoint_id],
        cwd=cwd,
        env=environ(pod.plane.base_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def written(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def sleeping(seconds: float, seed: int) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}},
        "2": {"class_type": "FaultSleep", "inputs": {"image": ["1", 0], "seed": seed, "seconds": seconds}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "slept"}},
    }


# --- an endpoint --------------------------------------------------------------------------------


def test_a_job_waits_for_its_models_and_is_cancelled_by_ctrl_c(pod: ProductionWorker, hub: Hub, tmp_path: Path) -> None:
    # So little comes on each connection that connections made anew do not bring the whole file meanwhile.
    hub.fault("stall", file="*tiny_sd3.safetensors", after_bytes=1 << 14, count=None)
    before = len(pod.plane.jobs)
    running = begun(pod, str(PROJECT / "devkit/workflows/text_to_image.json"), cwd=tmp_path)
    assert running.stderr is not None
    said = []
    for line in running.stderr:
        said.append(line)
        if line.startswith("downloading"):
            break
    running.send_signal(signal.SIGINT)
    _, rest = running.communicate(timeout=240)
    job = pod.plane.jobs[before]
    assert running.returncode == 130, (said, rest)
    assert "interrupted: it was cancelled" in rest
    assert job.status()["status"] == "CANCELLED"
    assert f"job {job.status()['id']}\n" in said
    assert any("%" in line and "MB" in line and "tiny" in line for line in said), said
    hub.clear_faults()
    hub.release()
    pod.plane.wait_until(lambda: "cancelled after" in pod.log())


def test_outputs_are_saved_under_their_names_and_over_no_other_file(pod: ProductionWorker, tmp_path: Path) -> None:
    for _ in range(2):
        done = on_pod(pod, EMPTY, "--output", "out", "--set", "SaveImage.filename_prefix=sub/pic", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("saved  ")[1].split("  ")[0], (tmp_path / "out/sub")
    assert first.startswith("out/sub/pic_")
    assert len(list(second.iterdir())) == 2
    (second / "pic_00003_.png").write_bytes(b"mine")
    (second / "pic_00003_-2.png").write_bytes(b"mine, too")
    done = on_pod(pod, EMPTY, "--output", "out", "--set", "SaveImage.filename_prefix=sub/pic", "--seed", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (second / "pic_00003_.png").read_bytes() == b"mine"
    assert all(path.read_bytes().startswith((PNG, b"mine")) for path in second.iterdir())


def test_a_picture_carries_its_workflow_and_values_are_json_or_text(pod: ProductionWorker, tmp_path: Path) -> None:
    first = on_pod(pod, EMPTY, "--json", "--output", "a", cwd=tmp_path)
    answer = json.loads(first.stdout)
    picture = tmp_path / "a" / answer["output"]["images"][0]["filename"]
    assert picture.read_bytes() == base64.b64decode(answer["output"]["images"][0]["data"])
    again = on_pod(
        pod,
        str(picture),
        "--set",
        "EmptyImage.width=24",
        "--set",
        "SaveImage.filename_prefix=again",
        "--output",
        "b",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    (path,) = (tmp_path / "b").iterdir()
    assert path.name.startswith("again_")
    assert int.from_bytes(path.read_bytes()[16:20]) == 24


def test_the_whole_answer_is_printed_and_nothing_saved_unless_asked(pod: ProductionWorker, tmp_path: Path) -> None:
    done = on_pod(pod, EMPTY, "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["status"]) == (0, "COMPLETED")
    assert {"id", "executionTime", "output"} <= set(answer)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_job_says_its_sentence_and_code(pod: ProductionWorker, tmp_path: Path) -> None:
    graph = {"1": {"class_type": "VAELoader", "inputs": {"vae_name": "nobody_knows.safetensors"}}}
    done = on_pod(pod, written(tmp_path / "w.json", graph), "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "FAILED"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Workflow validation failed: ")


def test_what_may_pass_is_said_to(pod: ProductionWorker, tmp_path: Path) -> None:
    graph = sleeping(0.0, 1)
    graph["2"] = {"class_type": "FaultDie", "inputs": {"image": ["1", 0], "seed": 1, "signal": 9}}
    done = on_pod(pod, written(tmp_path / "w.json", graph), cwd=tmp_path)
    assert done.returncode == 1
    assert "[engine_died]" in done.stderr
    assert "This may pass" in done.stderr


def test_a_job_that_is_overdue_is_cancelled(pod: ProductionWorker, tmp_path: Path) -> None:
    before = len(pod.plane.jobs)
    done = on_pod(pod, written(tmp_path / "w.json", sleeping(40.0, 2)), "--timeout", "1.5", cwd=tmp_path)
    assert done.returncode == 1
    assert "was not done after 1.5 s; it was cancelled; raise --timeout" in done.stderr
    assert pod.plane.jobs[before].status()["status"] == "CANCELLED"


def test_a_job_can_be_taken_up_again_and_an_unknown_one_is_said_to_be(pod: ProductionWorker, tmp_path: Path) -> None:
    job = pod.plane.submit({"workflow": json.loads((PROJECT / "devkit/workflows/empty_image.json").read_text())})
    done = on_pod(pod, "--job", job.result(60)["id"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs").iterdir())) == 1
    lost = on_pod(pod, "--job", "nobody", cwd=tmp_path)
    assert lost.returncode == 1
    assert "does not know the job nobody" in lost.stderr


def test_a_job_cancelled_elsewhere_and_one_that_runpod_ended(pod: ProductionWorker, tmp_path: Path) -> None:
    for end, words in ((pod.plane.cancel, "was cancelled"), (pod.plane.time_out, "RunPod ended the job")):
        job = pod.plane.submit({"workflow": sleeping(0.5, 3)})
        end(job.id)
        done = on_pod(pod, "--job", job.id, cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr


def test_a_terminal_gets_one_line_that_changes(pod: ProductionWorker, tmp_path: Path) -> None:
    """The sampler's steps, by the node's class, drawn over each other."""
    graph = json.loads((PROJECT / "devkit/workflows/text_to_image.json").read_text())
    workflow = written(tmp_path / "w.json", graph)
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, SCRIPT, workflow, "--endpoint", pod.plane.endpoint_id],
        cwd=tmp_path,
        env=environ(pod.plane.base_url),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not data:
            break
        drawn += data
    os.close(ours)
    assert running.wait(240) == 0, drawn
    lines = drawn.decode().split("\r\x1b[K")
    assert any("queued" in line or "running" in line for line in lines), drawn
    assert lines[-1] == ""
    assert drawn.count(b"\n") == 1  # the job's id, which stays


# --- a local worker -----------------------------------------------------------------------------


def test_a_local_worker_runs_it_with_a_picture_sent_along(worker: LocalWorker, tmp_path: Path) -> None:
    picture = PROJECT / "devkit/workflows/in.png"
    scale = str(PROJECT / "devkit/workflows/scale_image.json")
    done = client(scale, "--url", f"http://127.0.0.1:{worker.port}/", "--image", f"in.png={picture}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("saved  outputs/")


def test_a_text_is_printed_and_saved(worker: LocalWorker, tmp_path: Path) -> None:
    done = client(str(PROJECT / "devkit/workflows/preview_text.json"), "--url", f"http://127.0.0.1:{worker.port}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("text_*.txt")
    assert path.read_text() in done.stdout


def test_a_local_workers_failure_is_a_sentence(worker: LocalWorker, tmp_path: Path) -> None:
    done = client(written(tmp_path / "w.json", {}), "--url", f"http://127.0.0.1:{worker.port}", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Workflow validation failed: the workflow has no nodes")


# --- whoever refuses ----------------------------------------------------------------------------


@dataclass
class Scripted:
    """A server that answers each request with the next of its answers, the last again and again; it remembers the requests."""

    answers: list[tuple[int, dict[str, str], bytes]]
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)

    def __enter__(self) -> Self:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                script.requests.append((self.command, self.path, dict(self.headers.items())))
                status, headers, body = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - the base class's names

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def said(value: object, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps(value).encode()


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (said({"error": "unauthorized"}, 401), 3, "refused the key (status 401): check RUNPOD_API_KEY"),
        (said({}, 403), 3, "refused the key (status 403)"),
        (said({"error": "not found"}, 404), 3, "does not exist (status 404): copy the endpoint's id"),
        (said({"error": "body too large"}, 413), 3, "(status 413: body too large): RunPod accepts up to 10 MB"),
        (said({"title": "down"}, 503), 3, "failed (status 503: down): try again in a minute"),
        ((502, {}, b"<html>Bad gateway</html>"), 3, "status 502: <html>Bad gateway</html>"),
        ((200, {}, b"<html>hello</html>"), 3, "answered with '<html>hello</html>', which no endpoint does"),
        ((200, {}, b"[1]"), 3, "answered with the JSON of a list"),
        (said({"no": "id"}), 3, "answered with no job's id"),
        (said({"id": "j", "status": "COMPLETED"}), 1, "completed, but RunPod has no result of it"),
        (said({"id": "j", "status": "FAILED", "error": "it broke"}), 1, "error: it broke [job_failed]"),
        (
            said({"id": "j", "status": "FAILED", "error": json.dumps({"error_type": "X", "error_message": "boom"})}),
            1,
            "The worker broke: boom; its log has more.",
        ),
        (said({"id": "j", "status": "FAILED"}), 1, "RunPod says no more"),
    ],
)
def test_each_refusal_is_one_sentence(answer: tuple[int, dict[str, str], bytes], code: int, words: str, tmp_path: Path) -> None:
    with Scripted([answer]) as server:
        done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in done.stderr
    assert len(server.requests) == 1
    assert (server.requests[0][1], server.requests[0][2]["Authorization"]) == ("/ep/run", "Bearer rpa_user")


def test_the_key_goes_nowhere_else(tmp_path: Path) -> None:
    with Scripted([said({"id": "j", "status": "COMPLETED", "output": {}})]) as other, Scripted([]) as server:
        server.answers.append((302, {"location": f"{other.url}/ep/run"}, b""))
        done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
        assert (done.returncode, other.requests) == (3, [])
        assert "answered with a redirect" in done.stderr


def test_a_busy_endpoint_is_asked_again_and_a_short_outage_is_waited_out(tmp_path: Path) -> None:
    final = {"id": "j", "status": "COMPLETED", "output": {"images": []}}
    answers = [
        said({}, 429),
        said({"id": "j", "status": "IN_QUEUE"}),
        said({}, 502),
        (200, {"content-length": "10"}, b"{"),
        said({}, 429),
        said(final),
    ]
    with Scripted(answers) as server:
        done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path for _, path, _ in server.requests] == ["/ep/run", "/ep/run", *["/ep/status/j"] * 4]
    assert "too many requests, trying again" in done.stderr
    assert "no answer, trying again" in done.stderr


def test_a_key_refused_while_the_job_runs_leaves_its_id_to_take_it_up_again(tmp_path: Path) -> None:
    with Scripted([said({"id": "j-1", "status": "IN_QUEUE"}), said({}, 401)]) as server:
        done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
    assert done.returncode == 3
    assert "take it up again with --job j-1" in done.stderr


def test_an_answer_that_is_lost_may_have_left_a_job(tmp_path: Path) -> None:
    note = "The request may have arrived: look at the endpoint's requests before you send it again."
    cut = (200, {"content-length": "10"}, b"{")
    for answer, noted in ((cut, True), (said({}, 504), True), (said({"no": "id"}), True), (said({}, 401), False)):
        with Scripted([answer]) as server:
            done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
        assert (done.returncode, len(server.requests), note in done.stderr) == (3, 1, noted), done.stderr
    for nobody in (f"http://127.0.0.1:{free_port()}", "http://nobody.invalid"):
        done = client(EMPTY, "--endpoint", "ep", base_url=nobody, cwd=tmp_path, NO_PROXY="*")
        assert (done.returncode, note in done.stderr) == (3, False), done.stderr


def test_a_folder_that_cannot_be_written_is_found_before_the_job_is_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Scripted([said({"id": "j", "status": "COMPLETED", "output": {}})]) as server:
        for output in ("file", "file/below", "/proc/outputs"):
            done = client(EMPTY, "--endpoint", "ep", "--output", output, base_url=server.url, cwd=tmp_path)
            assert (done.returncode, "give another folder with --output" in done.stderr) == (2, True), done.stderr
        assert server.requests == []
        done = client(EMPTY, "--endpoint", "ep", "--output", "new/folder", base_url=server.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nobody_there_and_no_key(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    done = client(EMPTY, "--endpoint", "ep", base_url=nobody, cwd=tmp_path)
    assert (done.returncode, "cannot be reached (Connection refused)" in done.stderr) == (3, True), done.stderr
    done = client(EMPTY, "--url", nobody, cwd=tmp_path)
    assert (done.returncode, "is the worker running?" in done.stderr) == (3, True), done.stderr
    done = client(EMPTY, "--endpoint", "ep", base_url=nobody, key="", cwd=tmp_path)
    assert (done.returncode, "RUNPOD_API_KEY is not set" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of the arguments --endpoint --url is required"),
        (["--url", "http://127.0.0.1:1"], "Give either a workflow or --job ID"),
        (["--url", "http://127.0.0.1:1", "--job", "x"], "--job goes with --endpoint"),
        (["missing.json", "--url", "http://127.0.0.1:1"], "missing.json cannot be read (No such file or directory)"),
        ([SCRIPT, "--url", "http://127.0.0.1:1"], "is neither JSON"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--set", "6=x"], "--set takes NODE.INPUT=VALUE"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--image", "a.png=gone.png"], "gone.png cannot be read"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--image", "=x"], "--image takes NAME=PATH"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--model", "x=y"], "--model takes FOLDER/NAME=SOURCE"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--seed", "often"], "--seed takes random, next, -1 or a whole number"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--seed", "9" * 5000], "not '9999"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--seed", str(2**64)], "--seed takes random, next, -1 or a whole number up to"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--timeout", "0"], "must be a number of seconds, more than 0"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--timeout", "abc"], "must be a number of seconds, more than 0"),
        ([EMPTY, "--url", "http://127.0.0.1:1", "--image", "a.png=~nobody-of-this-name/a.png"], "a home folder"),
        ([EMPTY, "--url", "127.0.0.1:8000"], "is no whole address: write http://127.0.0.1:8000"),
        ([EMPTY, "--url", "http://[::1"], "is no http:// or https:// address"),
        ([EMPTY, "--url", "http://127.0.0.1:port"], "is no http:// or https:// address"),
        ([EMPTY, "--url", "http://127.0.0.1/ä"], "is no http:// or https:// address"),
        ([EMPTY, "--endpoint", ""], "--endpoint is empty"),
        ([EMPTY, "--endpoint", "ä"], "--endpoint takes an id alone"),
        ([EMPTY, "--endpoint", "https://api.runpod.ai/v2/abc/run"], "--endpoint takes an id alone"),
        (["--job", "", "--endpoint", "ep"], "--job is empty"),
        (["--job", "\n", "--endpoint", "ep"], "--job takes an id alone"),
    ],
)
def test_a_wrong_command_line_is_status_2_and_a_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = client(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "9" * 100 not in done.stderr


@pytest.mark.parametrize("key", ["rpa_first\nsecond", "rpa_first second", "rpa_first\N{LATIN SMALL LETTER A WITH DIAERESIS}"])
def test_a_key_that_cannot_be_one_is_said_to_be_and_not_shown(key: str, tmp_path: Path) -> None:
    done = client(EMPTY, "--endpoint", "ep", base_url="http://127.0.0.1:1", key=key, cwd=tmp_path)
    assert done.returncode == 2
    assert "RUNPOD_API_KEY has a blank, a line break or another character" in done.stderr
    assert "first" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "option", "words"),
    [
        ({"set": ["a"]}, ("--set", "1.a=1"), "has 'set' that is no object: correct it, or leave out --set"),
        ({"images": {"a": 1}}, ("--image", "a.png=https://example.com/a.png"), "has 'images' that is no list"),
        ({"models": "x"}, ("--model", "vae/a=hf://o/r/a"), "has 'models' that is no list: correct it, or leave out --model"),
    ],
)
def test_what_cannot_be_added_to_a_request_is_said(
    given: dict[str, Any], option: tuple[str, str], words: str, tmp_path: Path
) -> None:
    request = written(tmp_path / "r.json", {"input": {"workflow": {"1": {}}, **given}})
    done = client(request, "--url", "http://127.0.0.1:1", *option, cwd=tmp_path)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_an_older_python_says_which_one_is_needed(tmp_path: Path) -> None:
    """With its grammar, and a version that says so: there is none on this machine."""
    for script, needed in ((SCRIPT, "3.10"), (str(PROJECT / "scripts/seed_volume.py"), "3.11")):
        text = Path(script).read_text("utf-8")
        ast.parse(text, feature_version=(3, 4))
        code = f"import sys; sys.version_info = (3, 9, 18); exec(compile({text!r}, 'x', 'exec'), {{'__name__': '__main__'}})"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"{Path(script).name} needs Python {needed} or newer; this is Python 3.9.\n"


def test_the_seeder_without_its_packages_says_how_to_have_them(tmp_path: Path) -> None:
    script = str(PROJECT / "scripts/seed_volume.py")
    done = subprocess.run([sys.executable, "-S", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ".venv/bin/pip install --no-deps -r requirements.lock" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_defect_is_a_sentence_without_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: object) -> dict[str, Any]:
        raise KeyError("rpa_secret")

    monkeypatch.setattr(command, "build", broken)
    assert command.run([EMPTY, "--endpoint", "ep"], {"RUNPOD_API_KEY": "rpa_secret"}) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: The client failed .* \(KeyError in client/command\.py, line \d+\): .* \[client_defect\]\n", said
    )
    assert "rpa_secret" not in said


def test_the_request_holds_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    request = {
        "input": {"workflow": {"1": {}}, "set": {"1.a": 1}, "seed": 9, "models": [{"folder": "vae"}]},
        "s3Config": {"k": "v"},
    }
    with Scripted([said({"id": "j", "status": "COMPLETED", "output": {}})]) as server:
        bodies = capture_bodies(server)
        done = client(
            *(
                written(tmp_path / "r.json", request),
                "--endpoint",
                "ep",
                "--set",
                '1.b="12"',
                "--set",
                "1.c=12",
                "--set",
                "1.d=NaN",
            ),
            *("--image", "x.png=https://example.com/x.png", "--file", "a.bin", "--seed", "0", "--timeout", "60", "--previews"),
            *("--model", "loras/s/x.safetensors=hf://o/r/x.safetensors"),
            base_url=server.url,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(bodies[0]) == {
        "input": {
            "workflow": {"1": {}},
            "set": {"1.a": 1, "1.b": "12", "1.c": 12, "1.d": "NaN"},
            "images": [{"name": "x.png", "url": "https://example.com/x.png"}],
            "files": [{"name": "a.bin", "data": "YWJj"}],
            "models": [{"folder": "vae"}, {"folder": "loras", "name": "s/x.safetensors", "source": "hf://o/r/x.safetensors"}],
            "seed": 0,
            "timeout_s": 60.0,
            "previews": True,
        },
        "s3Config": {"k": "v"},
    }


def capture_bodies(server: Scripted) -> list[bytes]:
    """Have the server keep what is sent to it."""
    bodies: list[bytes] = []
    handler = server._server.RequestHandlerClass
    read = handler.do_POST  # type: ignore[attr-defined]  # of the class made there

    def keep(self: Any) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        bodies.append(raw)
        del self.headers["content-length"]
        read(self)

    handler.do_POST = keep  # type: ignore[attr-defined]  # as above
    return bodies


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("a.png", "a.png"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\x.png", "x.png"),
        ("..", "output"),
        ("", "output"),
        (".", "output"),
        ("a\x1b[2Jb\n.png", "a_[2Jb_.png"),
        ("c:d*?.png", "c_d__.png"),
        ("ä" * 300 + ".png", "ä" * 98 + ".png"),
        ("日本語.png", "日本語.png"),
    ],
)
def test_a_name_is_no_more_than_a_name(name: str, clean: str) -> None:
    assert file_name(name) == clean


def item(name: str, data: str = "QUJD", kind: str = "base64", subfolder: str = "") -> dict[str, Any]:
    return {"filename": name, "data": data, "type": kind, "subfolder": subfolder, "media_type": "x/y", "size_bytes": 3}


def saved(folder: Path, *items: dict[str, Any]) -> list[Saved | OutputNotSaved]:
    return list(save_outputs({"images": list(items)}, folder))


def test_no_output_leaves_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    found = saved(
        folder, item("../a"), item("b", subfolder="../../x"), item("c", subfolder="link"), item("d", subfolder="/abs/y")
    )
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == ["a", "abs/y/d", "c", "x/b"]
    assert all(isinstance(each, Saved) for each in found)
    assert list(outside.iterdir()) == []


def test_what_cannot_be_saved_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    with Scripted([said({}, 403)]) as refusing:
        found = saved(
            tmp_path,
            item("a.png", "!!"),
            item("b.png", f"{refusing.url}/secret?sig=abc", "s3_url"),
            item("c.png", "file:///etc/passwd", "s3_url"),
            item("f.png", f"{refusing.url}/two words?sig=abc", "s3_url"),
            item("g.png", "https://[::1?sig=abc", "s3_url"),
            item("h.png", "\N{SNOWMAN}"),
            item("d.png", kind="carrier_pigeon"),
            {"filename": "e.png", "type": "base64"},
            item("good.png"),
        )
    assert [type(each) for each in found] == [OutputNotSaved] * 8 + [Saved]
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]
    assert not any("sig=abc" in str(each) for each in found)
    assert "status 403" in str(found[1])


def test_a_signed_address_is_downloaded_and_tried_again_when_cut(tmp_path: Path) -> None:
    with Scripted([(200, {"content-length": "6"}, b"ABC"), (200, {}, b"ABCDEF")]) as bucket:
        (found,) = saved(tmp_path, item("v.mp4", f"{bucket.url}/v.mp4?x=1", "s3_url"))
    assert isinstance(found, Saved)
    assert (tmp_path / "v.mp4").read_bytes() == b"ABCDEF"
    assert all("Authorization" not in headers for _, _, headers in bucket.requests)


def test_a_file_on_the_volume_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    result = {"images": [], "videos": [item("v.mp4", "outputs/job/v.mp4", "volume_path")], "errors": ["one is missing"]}
    with Scripted([said({"id": "j", "status": "COMPLETED", "output": result})]) as server:
        done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
    assert done.returncode == 0
    assert "on the volume  outputs/job/v.mp4" in done.stdout
    assert "aws s3 cp s3://VOLUME_ID/outputs/job/v.mp4" in done.stdout
    assert "export AWS_ACCESS_KEY_ID=$RUNPOD_S3_ACCESS_KEY_ID" in done.stdout
    assert "warning: one is missing" in done.stderr


def answered(result: object, *arguments: str, tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The client, told that its job is done with this result."""
    with Scripted([said({"id": "j", "status": "COMPLETED", "output": result})]) as server:
        return client(EMPTY, "--endpoint", "ep", *arguments, base_url=server.url, cwd=tmp_path, **more)


def test_a_terminal_is_given_nothing_to_obey(tmp_path: Path) -> None:
    evil = "\x1b[2J\x9b31m\x07"
    on_volume = {**item("v.mp4", f"outputs/a'; b {evil}/v.mp4", "volume_path"), "media_type": evil}
    shown = {**item("t.txt", f"a\N{IDEOGRAPHIC SPACE}b{evil}", "text"), "media_type": evil}
    answer = {"id": f"j{evil}", "status": "COMPLETED", "output": {"videos": [on_volume], "text": [shown], "errors": [evil]}}
    with Scripted([said(answer)]) as server:
        done = client(EMPTY, "--endpoint", "ep", base_url=server.url, cwd=tmp_path)
        whole = client(EMPTY, "--endpoint", "ep", "--json", base_url=server.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr, whole.stdout, whole.stderr):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), text
    assert """aws s3 cp 's3://VOLUME_ID/outputs/a'"'"'; b ?[2J?31m?/v.mp4' . --region""" in done.stdout
    assert "a\N{IDEOGRAPHIC SPACE}b?[2J?31m?" in done.stdout
    assert "warning: ?[2J?31m?" in done.stderr
    assert json.loads(whole.stdout) == answer


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_an_encoding_lacks_stops_nothing(encoding: str, tmp_path: Path) -> None:
    result = {"images": [item("\N{SNOWMAN}.png")], "text": [item("t.txt", "\N{SNOWMAN}\ud800", "text")]}
    done = answered(result, tmp_path=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["t.txt", "\N{SNOWMAN}.png"]
    assert (tmp_path / "outputs/t.txt").read_text("utf-8") == "\N{SNOWMAN}\\ud800"
    whole = answered(result, "--json", tmp_path=tmp_path, PYTHONIOENCODING=encoding)
    assert json.loads(whole.stdout)["output"] == result


def test_a_result_of_another_shape_is_said_and_ends_nothing(tmp_path: Path) -> None:
    odd = {"images": 5, "videos": {"filename": "v"}, "audio": [item("a.mp3"), "b.mp3"], "errors": "one", "text": None}
    done = answered(odd, tmp_path=tmp_path)
    assert done.returncode == 1
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["a.mp3"]
    assert done.stderr.count("is not saved: ") == 3
    assert "warning: one\n" in done.stderr
    assert "The result can be fetched again with --job j within 30 minutes." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_costs_no_output(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with Scripted([said({"id": "j", "status": "COMPLETED", "output": {"images": [item("a.png"), item("b.png")]}})]) as server:
        done = subprocess.run(
            [sys.executable, SCRIPT, EMPTY, "--endpoint", "ep"],
            cwd=tmp_path,
            env=environ(server.url),
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    os.close(theirs)
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["a.png", "b.png"]


# --- lines --------------------------------------------------------------------------------------

DOWNLOAD = {"type": "download", "value": 12e9, "max": 24e9, "bytes_per_s": 2e8, "file": "flux.safetensors"}
STEP = {"type": "progress", "value": 12, "max": 20, "node": "3"}


@pytest.mark.parametrize(
    ("news", "line"),
    [
        (News("IN_QUEUE", 75.0), "queued  1:15"),
        (News("IN_QUEUE", 75.0, queue="workers: 1 initializing"), "queued  1:15  (workers: 1 initializing)"),
        (
            News("IN_PROGRESS", 3.0, progress=DOWNLOAD),
            "downloading flux.safetensors  ▕████████████            ▏ 50 %  12.0 GB of 24.0 GB",
        ),
        (News("IN_PROGRESS", 3.0, progress=STEP), "KSampler (node 3)  ▕██████████████▍         ▏ 12/20"),
        (News("IN_PROGRESS", 4000.0, progress={"type": "other"}), "running  1:06:40"),
        (News("IN_PROGRESS", 1.0, progress={"type": "progress", "value": "x", "max": None}), "running  0:01"),
        (News("IN_PROGRESS", 1.0, trouble="no answer"), "running  0:01  (no answer)"),
    ],
)
def test_a_line_says_how_the_job_stands(news: News, line: str) -> None:
    assert bar_line(news, {"3": "KSampler"}, 200).startswith(line)
    assert len(bar_line(news, {"3": "KSampler"}, 20)) <= 20


def test_plain_lines_have_no_bar_and_no_clock() -> None:
    assert plain_line(News("IN_QUEUE", 5.0), {}) == "queued"
    assert plain_line(News("IN_PROGRESS", 5.0, progress=DOWNLOAD), {}).startswith(
        "downloading flux.safetensors: 50 %  12.0 GB of"
    )
    assert plain_line(News("IN_PROGRESS", 5.0, progress=STEP), {}) == "node 3: 12/20"
    evil = {**STEP, "node": "\x1b[2J"}
    assert "\x1b" not in plain_line(News("IN_PROGRESS", 5.0, progress=evil), {})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (14360, "14.4 kB"), (23.8e9, "23.8 GB"), (4e15, "4000.0 TB")]
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size(count) == text
