"""The worker's image, really built and started: `make image-test`. No part of `make test`: it takes minutes and root."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.cache import cache_root
from devkit.engine.models import make_volume
from devkit.hub import hub_process
from devkit.image.build import IMAGE, ImageBuilder, own_bytes, report
from devkit.image.buildah import Buildah, BuildahFailed, Running, gone
from devkit.local_worker import PROJECT, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.engine.build import Engine

CHANGED = f"{IMAGE}:changed"
CHILD = f"{IMAGE}:child"
READY_S = 120.0
STARTS = 3
SLOWER_AT_MOST = 1.15
OWN_MB = 700  # unpacked
CODE_LAYER_MB = 2  # as it is pushed, which is compressed


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> ImageBuilder:
    made = ImageBuilder(Buildah.of(cache_root() / "image"), tmp_path_factory.mktemp("build"))
    made.prepare()
    made.build(IMAGE)
    return made


@pytest.fixture
def container(builder: ImageBuilder) -> Iterator[str]:
    with builder.buildah.container(IMAGE) as name:
        yield name


@pytest.fixture(scope="session")
def volume_dir(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume(engine, tmp_path_factory.mktemp("volume"))


class Ports:
    """The ports of one container, which shares this machine's network."""

    def __init__(self) -> None:
        self.api, self.comfyui = free_port(), free_port()

    @property
    def environ(self) -> dict[str, str]:
        return {"COMFYUI_PORT": str(self.comfyui), "SERVE_API_LOCALLY": "false", "OMP_NUM_THREADS": "2"}

    @property
    def command(self) -> list[str]:
        return ["/start.sh", "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(self.api)]


def post(address: str, body: object) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=READY_S) as response:
        return json.load(response)


def until(ask: Callable[[], Any], running: Running) -> Any:
    """The first answer; watches the container as well."""
    deadline = time.monotonic() + READY_S
    failure: Exception | None = None
    while True:
        try:
            if answer := ask():
                return answer
        except urllib.error.HTTPError as exc:
            raise AssertionError(f"{exc}: {exc.read()!r}") from exc
        except (OSError, ValueError) as exc:
            failure = exc
        else:
            failure = None
        if running.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"no answer ({failure}):\n{running.log()}")
        time.sleep(0.01)


def runsync(ports: Ports, running: Running, graph: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = until(
        lambda: post(f"http://127.0.0.1:{ports.api}/runsync", {"input": {"workflow": graph}}), running
    )
    return answer


def test_a_container_with_a_volume_answers_runsync_with_the_picture(
    builder: ImageBuilder, container: str, volume_dir: Path, tmp_path: Path, workflow: Callable[[str], dict[str, Any]]
) -> None:
    ports = Ports()
    volumes = [(volume_dir, "/runpod-volume")]
    with Running(
        builder.buildah, container, ports.command, tmp_path / "log", environ=ports.environ, volumes=volumes
    ) as running:
        answer = runsync(ports, running, workflow("text_to_image"))
        inside = running.processes()
    log = running.log()
    assert answer["status"] == "COMPLETED", log
    assert [(item["media_type"], item["size_bytes"]) for item in answer["output"]["images"]] == [("image/png", 14360)]
    for line in (
        "worker-comfyui: Starting ComfyUI",
        "worker-comfyui: Starting RunPod Handler",
        "worker-comfyui - Starting handler...",
    ):
        assert line in log
    assert "tini" in inside.values()
    assert gone(list(inside)), "SIGTERM to the first process ends all of them"
    assert "ERROR **" not in log


def test_a_start_finds_all_its_bytecode_in_the_image(
    builder: ImageBuilder, container: str, volume_dir: Path, tmp_path: Path, workflow: Callable[[str], dict[str, Any]]
) -> None:
    buildah, ports = builder.buildah, Ports()
    buildah("run", container, "--", "touch", "/built")
    with Running(
        buildah, container, ports.command, tmp_path / "log", environ=ports.environ, volumes=[(volume_dir, "/runpod-volume")]
    ) as running:
        assert runsync(ports, running, workflow("text_to_image"))["status"] == "COMPLETED"
    written = buildah("run", container, "--", "find", "/opt", "/comfyui", "-newer", "/built", "-name", "*.pyc")
    assert written == ""


def test_what_people_expect_of_an_image_is_in_it(builder: ImageBuilder, container: str) -> None:
    buildah = builder.buildah
    config = buildah.inspect(IMAGE)["OCIv1"]["config"]
    assert config["Entrypoint"] == ["/start.sh"]
    shown = buildah(
        "run", container, "--", "/start.sh", "ls", "/handler.py", "/start.sh", "/comfyui/main.py", "/opt/venv/bin/python"
    )
    assert len(shown.split()) == 4
    for tool in ("uv", "git", "setpriv", "tini", "comfy", "comfy-node-install", "comfy-manager-set-mode", "worker"):
        assert buildah("run", container, "--", "sh", "-c", f"command -v {tool}").startswith("/")
    preload = buildah("run", container, "--", "/start.sh", "sh", "-c", "cat /proc/self/maps")
    assert "libtcmalloc" in preload
    in_worker = "import importlib.util as u; print([n for n in ('torch', 'numpy', 'runpod') if u.find_spec(n)])"
    assert buildah("run", container, "--", "/opt/worker/bin/python", "-c", in_worker) == "['runpod']"
    assert buildah("run", container, "--", "find", "/comfyui/models", "-name", "put_*_here") == ""
    assert (
        buildah("run", container, "--", "sh", "-c", "find / -xdev -name .git; command -v gcc cc; ls /root/.cache; true") == ""
    )
    assert "VOLUME_PATH" in buildah("run", container, "--", "worker", "settings")
    assert buildah("run", container, "--", "python", "-c", "import ctypes; ctypes.CDLL('libGL.so.1'); print('GL')") == "GL"


def test_the_manager_is_set_offline(builder: ImageBuilder, container: str) -> None:
    run = builder.buildah
    for mode in ("public", "private", "offline"):
        run("run", container, "--", "comfy-manager-set-mode", mode)
        shown = run("run", container, "--", "cat", "/comfyui/user/default/ComfyUI-Manager/config.ini")
        assert shown == f"[default]\nnetwork_mode = {mode}"
    with pytest.raises(BuildahFailed, match="public\\|private\\|offline"):
        run("run", container, "--", "comfy-manager-set-mode", "loud")


def test_a_driver_that_is_too_old_is_said_in_a_sentence(builder: ImageBuilder, container: str, tmp_path: Path) -> None:
    # The kernel's file cannot be made up in a container; the script's address of it can.
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n")
    script = tmp_path / "start.sh"
    script.write_text((PROJECT / "image/start.sh").read_text().replace("/proc/driver/nvidia/version", "/check/version"))
    (tmp_path / "cuda-version").write_text("12.8\n")
    mounts = ["-v", f"{tmp_path}:/check", "-v", f"{tmp_path}/cuda-version:/opt/venv/cuda-version"]
    command = builder.buildah.command("run", *mounts, "--env", "COMFY_ARGS=", container, "--", "bash", "/check/start.sh")
    done = subprocess.run(
        command,
        env={"BUILDAH_ISOLATION": "chroot", "PATH": "/usr/bin:/bin:/usr/sbin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "NVIDIA driver 470.57 is too old for CUDA 12.8, which needs 525 or newer" in done.stderr


def test_comfy_model_download_fetches_into_the_models_folder(
    builder: ImageBuilder, container: str, volume_dir: Path, tmp_path: Path
) -> None:
    repo = tmp_path / "org/repo"
    repo.mkdir(parents=True)
    shutil.copy(next((volume_dir / "models/loras").glob("*.safetensors")), repo / "a.safetensors")
    with hub_process(tmp_path) as hub:
        url = f"{hub.endpoint}/org/repo/resolve/main/a.safetensors"
        where = ("--relative-path", "models/loras", "--filename", "b.safetensors")
        endpoint = f"HF_ENDPOINT={hub.endpoint}"
        builder.buildah("run", "--env", endpoint, container, "--", "comfy", "model", "download", "--url", url, *where)
    sizes = builder.buildah(
        "run", container, "--", "sh", "-c", "stat -c %s /comfyui/models/loras/*; ls -A /comfyui | grep -c worker || true"
    )
    assert sizes.split() == [str((repo / "a.safetensors").stat().st_size), "0"]


def test_a_child_image_with_a_node_from_git_and_a_handler_of_its_own(builder: ImageBuilder, tmp_path: Path) -> None:
    child = tmp_path / "child"
    child.mkdir()
    _make_repository(child / "greeting-nodes")
    (child / "handler.py").write_text(_HANDLER)
    (child / "Dockerfile").write_text(
        f"FROM {IMAGE}\nCOPY greeting-nodes /src/greeting-nodes\n"
        "RUN comfy-node-install file:///src/greeting-nodes@v1 && rm -rf /src\nCOPY handler.py /handler.py\n"
    )
    builder.build_child(child, CHILD)
    ports = Ports()
    with (
        builder.buildah.container(CHILD) as name,
        Running(builder.buildah, name, ports.command, tmp_path / "log", environ=ports.environ) as running,
    ):
        graph = {"1": {"class_type": "Greeting", "inputs": {"name": "Ada"}}}
        answer = runsync(ports, running, graph)
        inside = running.processes()
    assert answer["output"] == {"mine": {"1": {"text": ["hello Ada"]}}}, running.log()
    assert gone(list(inside))


def test_a_node_that_cannot_be_installed_stops_the_build_and_is_named(builder: ImageBuilder, container: str) -> None:
    with pytest.raises(BuildahFailed, match=r"comfy-node-install: file:///nowhere/some-nodes failed: .*git fetch"):
        builder.buildah("run", container, "--", "comfy-node-install", "file:///nowhere/some-nodes")
    assert "some-nodes" not in builder.buildah("run", container, "--", "ls", "/comfyui/custom_nodes")


def test_a_changed_line_of_the_worker_changes_one_small_layer(builder: ImageBuilder, container: str) -> None:
    before = builder.buildah.layers(IMAGE)
    print("\n" + "\n".join(report(before)))  # noqa: T201 - the figures are what this test is run for
    path = builder.context / "worker/models/store.py"
    path.write_text(path.read_text() + "# one more line\n")
    builder.build(CHANGED)
    after = builder.buildah.layers(CHANGED)
    new = [layer for layer in after if layer.digest not in {old.digest for old in before}]
    assert [layer.made_by for layer in new] == [after[-1].made_by]
    packed = int(builder.buildah("run", container, "--", "sh", "-c", "tar -cz -C /opt/worker src | wc -c"))
    print(f"a changed line: {new[0].size_bytes / 1e6:.2f} MB, {packed / 1e6:.2f} MB as it is pushed")  # noqa: T201 - as above
    assert packed < CODE_LAYER_MB * 1e6
    assert own_bytes(before) < OWN_MB * 1e6


def test_the_first_result_comes_hardly_later_than_from_the_engine_alone(
    builder: ImageBuilder, container: str, volume_dir: Path, tmp_path: Path, workflow: Callable[[str], dict[str, Any]]
) -> None:
    graph = workflow("text_to_image")
    volumes = [(volume_dir, "/runpod-volume")]
    ours: list[float] = []
    alone: list[float] = []
    for _ in range(STARTS):
        ports = Ports()
        began_s = time.monotonic()
        with Running(
            builder.buildah, container, ports.command, tmp_path / "log", environ=ports.environ, volumes=volumes
        ) as running:
            assert runsync(ports, running, graph)["status"] == "COMPLETED"
            ours.append(time.monotonic() - began_s)
        engine = ["/opt/venv/bin/python", "/comfyui/main.py", "--cpu", "--port", str(ports.comfyui), "--disable-auto-launch"]
        began_s = time.monotonic()
        with Running(builder.buildah, container, engine, tmp_path / "log", environ=ports.environ, volumes=volumes) as running:
            address = f"http://127.0.0.1:{ports.comfyui}"
            prompt_id = until(lambda: post(f"{address}/prompt", {"prompt": graph}), running)["prompt_id"]  # noqa: B023 - called here
            until(lambda: json.load(urllib.request.urlopen(f"{address}/history/{prompt_id}")), running)  # noqa: B023 - called here
            alone.append(time.monotonic() - began_s)
    ratio = statistics.median(ours) / statistics.median(alone)
    print(f"\nfirst result: {statistics.median(ours):.2f} s, the engine alone {statistics.median(alone):.2f} s: {ratio:.2f}")  # noqa: T201 - as above
    assert ratio <= SLOWER_AT_MOST


def _make_repository(folder: Path) -> None:
    folder.mkdir()
    (folder / "__init__.py").write_text(_NODES)
    (folder / "requirements.txt").write_text("torch>=1\nhumanize\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "nodes"], ["tag", "v1"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


_NODES = """
import humanize

class Greeting:
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "greet"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {"default": ""})}}

    def greet(self, name):
        assert humanize.ordinal(1) == "1st"
        return {"ui": {"text": [f"hello {name}"]}}

NODE_CLASS_MAPPINGS = {"Greeting": Greeting}
"""

# As handlers for worker-comfyui are written: it expects ComfyUI on its port and talks to it by itself.
_HANDLER = """
import json, os, time, urllib.request
import runpod

ADDRESS = "http://127.0.0.1:" + os.environ["COMFYUI_PORT"]

def ask(path, body=None):
    data = json.dumps(body).encode() if body else None
    return json.load(urllib.request.urlopen(urllib.request.Request(ADDRESS + path, data)))

def handler(job):
    deadline = time.time() + 60
    while time.time() < deadline:
        try:
            ask("/system_stats")
            break
        except OSError:
            time.sleep(0.1)
    prompt_id = ask("/prompt", {"prompt": job["input"]["workflow"]})["prompt_id"]
    while not (history := ask("/history/" + prompt_id)):
        time.sleep(0.05)
    return {"mine": history[prompt_id]["outputs"]}

if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
"""
