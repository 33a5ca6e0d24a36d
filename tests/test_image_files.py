"""The files around the image: what can be known of them without building it. `make image-test` builds it."""

from __future__ import annotations

import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import yaml  # type: ignore[import-untyped]  # types-PyYAML is no dependency

from devkit.engine.build import TORCH
from devkit.engine.cache import BuildFailed
from devkit.image.base import mirror
from devkit.image.build import ImageBuilder
from devkit.local_worker import PROJECT
from worker.settings import Settings
from worker.up.options import parse_up_options

if TYPE_CHECKING:
    from devkit.local_worker import LocalWorker

SHELL = [
    "image/start.sh",
    "image/install_packages.sh",
    "image/slim.sh",
    "image/bin/comfy-manager-set-mode",
    ".ci/packages",
    ".ci/run",
    ".ci/suite",
]
PYTHON = [
    *("image/fetch_source.py", "image/install_engine.py", "image/comfyui_only.py", "image/record_start.py"),
    "image/record_definitions.py",
    *("image/bin/comfy", "image/bin/comfy-node-install", "handler.py"),
]
CATEGORIES = {"audio", "embedding", "language", "video", "image"}
INPUT_TYPES = {"string", "number", "boolean", "huggingface"}


def text(path: str) -> str:
    return (PROJECT / path).read_text("utf-8")


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing: .ci/packages or .ci/run installs it")
        pytest.skip(f"{name} is not installed here")
    return found


@pytest.mark.parametrize("script", [*SHELL, "image/bin/worker"])
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    done = subprocess.run([tool("shellcheck"), PROJECT / script], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([tool("hadolint"), PROJECT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize("script", PYTHON)
def test_scripts_compile_and_those_that_are_commands_can_be_run(script: str) -> None:
    compile(text(script), script, "exec", dont_inherit=True)
    if text(script).startswith("#!"):
        assert os.access(PROJECT / script, os.X_OK)


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    kept = {line.removeprefix("!") for line in text(".dockerignore").splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", text("Dockerfile"), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (PROJECT / source).exists(), source
            assert source.split("/")[0] in kept, source


def test_what_is_left_out_is_in_the_lock_and_the_worker_asks_for_none_of_it() -> None:
    left_out = [line for line in text("image/left_out.txt").splitlines() if not line.startswith("#")]
    locked = set(re.findall(r"^([a-z0-9-]+)==", text("requirements.lock"), re.MULTILINE))
    wanted = re.findall(r'"([\w-]+)', text("pyproject.toml").partition("dependencies = [")[2].partition("]")[0])
    assert set(left_out) <= locked
    assert not set(left_out) & {name.replace("_", "-") for name in wanted}
    assert "runpod" in wanted


def bake_targets() -> dict[str, str]:
    return dict(re.findall(r'^target "(\w+)" \{$(.*?)^\}$', text("docker-bake.hcl"), re.MULTILINE | re.DOTALL))


def test_the_same_versions_everywhere() -> None:
    pins = dict(re.findall(r"^ARG (\w+)=(\S+)$", text("Dockerfile"), re.MULTILINE))
    for name in ("BASE_IMAGE", "TORCH_VERSION", "TORCHVISION_VERSION", "TORCHAUDIO_VERSION", "COMFYUI_REF"):
        assert f'variable "{name}" {{ default = "{pins[name]}" }}' in text("docker-bake.hcl")
    assert f"v{locked_version()}" == pins["COMFYUI_REF"]
    assert f"torch=={pins['TORCH_VERSION']}" == TORCH
    flavour = pins["TORCH_INDEX_URL"].rpartition("/")[2]
    assert flavour == "cu130"
    assert [name for name, target in bake_targets().items() if ':${VERSION}"' in target] == [flavour]
    assert hub()["config"]["allowedCudaVersions"] == ["13.0"]
    assert json.loads(text(".runpod/tests.json"))["config"]["allowedCudaVersions"] == ["13.0"]
    assert re.findall(r'"minCudaVersion": "([\d.]+)"', text("docs/deployment.md")) == ["13.0"]
    assert parse_up_options(["workflow.json"]).cuda == "13.0", "what `up` asks of a host"


def test_every_flavour_of_torch_is_one_that_was_made_and_none_brings_a_setuptools_without_pkg_resources() -> None:
    # PyTorch has CUDA 12.8 only up to 2.11; torchvision goes with exactly one torch.
    goes_with = {"2.13.0": "0.28.0", "2.11.0": "0.26.0"}
    default = dict(re.findall(r'^variable "(TORCH\w+)" \{ default = "([\d.]+)"', text("docker-bake.hcl"), re.MULTILINE))
    for name in ("cu126", "cu128", "cu130", "cpu"):
        versions = {**default, **dict(re.findall(r'(TORCH\w*_VERSION) += "([\d.]+)"', bake_targets()[name]))}
        assert versions["TORCHVISION_VERSION"] == goes_with[versions["TORCH_VERSION"]], name
        assert name != "cu128" or versions["TORCH_VERSION"] == "2.11.0"
    assert "'setuptools<82'" in text("Dockerfile")


def locked_version() -> str:
    found = re.match(r"# What ComfyUI ([\d.]+) asks for", text("image/engine.lock"))
    assert found
    return found[1]


def installer() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT / "image/install_engine.py"))


def lines_of_the_lock() -> str:
    return "".join(f"{line[1:].strip()}\n" for line in re.findall(r"^# {3}.+$", text("image/engine.lock"), re.MULTILINE))


def test_the_lock_answers_its_release_with_hashes_and_names_no_host() -> None:
    lock = text("image/engine.lock")
    assert installer()["unanswered"](lines_of_the_lock(), lock) == []
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", lock, re.MULTILINE))
    asked = {re.split(r"[<>=~]", line)[0].lower() for line in lines_of_the_lock().splitlines()}
    assert {"transformers", "comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package"} <= asked
    with_torch = {"torch", "torchvision", "torchaudio", "numpy", "pillow", "filelock"}
    assert asked - pinned.keys() == {*with_torch, "comfyui-embedded-docs"}
    assert pinned.keys() & with_torch == set()
    assert [entry for entry in re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:] if "--hash=sha256:" not in entry] == []
    assert re.findall(r"https?://|file:|index-url|find-links", lock) == []


def test_what_comfyui_and_the_worker_both_want_is_in_the_image_once() -> None:
    def pins(path: str) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", text(path), re.MULTILINE))

    image, worker = pins("image/engine.lock"), pins("requirements.lock")
    assert {"aiohttp", "huggingface-hub", "requests"} <= image.keys() & worker.keys()
    assert [name for name in image.keys() & worker.keys() if image[name] != worker[name]] == []


def test_another_comfyui_gets_what_it_asks_for_and_the_locks_versions_of_all_else() -> None:
    def names(requirements: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9-]+)==", script["held"](requirements, lock), re.MULTILINE))

    script, lock = installer(), text("image/engine.lock")
    asked = lines_of_the_lock()
    assert script["held"](asked, lock) == lock[re.search(r"^[a-z]", lock, re.MULTILINE).start() :]  # type: ignore[union-attr]
    newer = asked.replace("comfy-kitchen==0.2.31", "comfy-kitchen==0.2.40  # newer") + "Some_New.Package>=1\n"
    assert script["unanswered"](newer, lock) == ["comfy-kitchen==0.2.40", "Some_New.Package>=1"]
    assert names(asked) - names(newer) == {"comfy-kitchen"}
    older = asked.replace("PyOpenGL>=3.1.8\n", "").replace("comfy-kitchen==0.2.31\n", "")
    assert names(asked) - names(older) == {"pyopengl", "comfy-kitchen"}, "what it does not ask for is not there"
    assert names(newer) < names(asked) > names(older)


def test_compose_and_workflows_are_yaml_and_every_action_is_pinned() -> None:
    services = yaml.safe_load(text("docker-compose.yml"))["services"]
    assert all("./volume:/runpod-volume" in service["volumes"] for service in services.values())
    for path in sorted((PROJECT / ".github/workflows").glob("*.yml")):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
        assert used
        assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []
    assert ".ci/run" in text(".github/workflows/ci.yml")


def test_the_suite_runs_on_each_python_from_the_oldest_to_the_images_and_on_comfyui_by_its_name_in_the_dockerfile(
    tmp_path: Path,
) -> None:
    matrix = workflow_file("ci")["jobs"]["suite"]["strategy"]["matrix"]
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', text("pyproject.toml"))
    of_image = re.search(r"^ARG BASE_IMAGE=python:(3\.\d+)", text("Dockerfile"), re.MULTILINE)
    assert oldest
    assert of_image
    assert {oldest[1], of_image[1]} <= set(matrix["python"])
    made = tmp_path / "make"
    made.write_text('#!/bin/sh\necho "$1 $ENGINE_REF"\n')
    made.chmod(0o755)
    pip = tmp_path / ".venv/bin/python"
    pip.parent.mkdir(parents=True)
    pip.symlink_to("/bin/true")
    for name in (".ci/suite", "Dockerfile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    release = re.search(r"^ARG COMFYUI_REF=(\S+)", text("Dockerfile"), re.MULTILINE)
    assert release
    for chosen, said in (
        ("pinned", "demo \ntest \n"),
        ("image", f"demo {release[1]}\nimage-test {release[1]}\ntest {release[1]}\n"),
    ):
        assert chosen in matrix["comfyui"]
        done = subprocess.run(
            [tmp_path / ".ci/suite", chosen],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == said


def test_the_handler_on_the_page_is_the_images() -> None:
    assert f"```python\n{text('handler.py')}```" in text("docs/customization.md")


def workflow_file(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(text(f".github/workflows/{name}.yml"))
    return read


@pytest.mark.parametrize("name", ["ci", "release"])
def test_shellcheck_has_nothing_to_say_of_the_workflows_commands(name: str) -> None:
    commands = [step["run"] for job in workflow_file(name)["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        done = subprocess.run(
            [tool("shellcheck"), "--shell=bash", "-"], input=command, capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


def test_a_release_takes_what_did_not_change_from_the_last_ones_cache_and_each_job_may_do_what_it_must() -> None:
    release = workflow_file("release")
    image, github = release["jobs"]["image"], release["jobs"]["release"]
    assert release["permissions"] == {"contents": "read"}
    assert image["permissions"] == {"contents": "read", "packages": "write"}
    assert (github["permissions"], github["needs"]) == ({"contents": "write"}, "image")
    bake = image["steps"][-1]["run"]
    assert 'cache="type=registry,ref=$REGISTRY/comfyui-volume-worker:cache-$FLAVOUR"' in bake
    assert re.search(r"cache-from=\$cache\".*cache-to=\$cache,mode=max", bake)
    given = {*re.findall(r"\b([A-Z_]+)=", bake), *image["steps"][-1]["env"]}
    assert set(re.findall(r'^variable "(\w+)"', text("docker-bake.hcl"), re.MULTILINE)) & given == {
        "REGISTRY",
        "VERSION",
        "SOURCE",
        "BASE_IMAGE",
    }


def test_the_build_of_the_tests_takes_torch_from_where_the_engine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, str] = {}

    class Recorder:
        def build(self, *_: object, args: dict[str, str], **__: object) -> str:
            built.update(args)
            return ""

    monkeypatch.setenv("ENGINE_TORCH_INDEX_URL", "https://torch.example/cpu")
    builder = ImageBuilder(Recorder(), tmp_path)  # type: ignore[arg-type]  # only builds
    builder.build("tag")
    assert built["TORCH_INDEX_URL"] == "https://torch.example/cpu"
    # Every version that the Dockerfile has for torch's packages is one that the build hands in.
    assert set(re.findall(r"^ARG (TORCH\w*)=", text("Dockerfile"), re.MULTILINE)) <= built.keys()


def hub() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text(".runpod/hub.json"))
    return found


def test_the_hubs_listing_is_what_runpod_documents() -> None:
    listing = hub()
    assert {"title", "description", "type", "category", "config"} <= listing.keys()
    assert listing["type"] == "serverless"
    assert listing["category"] in CATEGORIES
    config = listing["config"]
    assert config["runsOn"] == "GPU"
    assert config["containerDiskInGb"] >= 20
    assert all(re.fullmatch(r"[A-Z]+_\d+(_PRO)?", pool) for pool in config["gpuIds"].split(","))
    for item in config["env"]:
        assert item["input"]["type"] in INPUT_TYPES
        assert {"name", "description"} <= item["input"].keys()
    assert all((PROJECT / name).is_file() for name in ("handler.py", "Dockerfile", "README.md"))


def test_the_hubs_variables_and_their_defaults_are_the_workers() -> None:
    def value(item: dict[str, Any]) -> str:
        return str(item["input"]["default"]).lower() if item["input"]["type"] == "boolean" else str(item["input"]["default"])

    variables = {item["key"]: value(item) for item in hub()["config"]["env"]}
    fields = {name.upper() for name in Settings.__dataclass_fields__}
    assert set(variables) <= fields
    assert Settings.from_env(variables) == Settings.from_env({})
    for item in hub()["config"]["env"]:
        for option in item["input"].get("options", []):
            Settings.from_env({item["key"]: option["value"]})


def test_the_hubs_tests_run_without_any_weights(worker: LocalWorker) -> None:
    listing = json.loads(text(".runpod/tests.json"))
    assert {"gpuTypeId", "gpuCount", "allowedCudaVersions"} <= listing["config"].keys()
    for test in listing["tests"]:
        assert test["timeout"] >= 10_000
        assert "Loader" not in json.dumps(test["input"])
        answer = worker.runsync(test["input"])
        assert answer["status"] == "COMPLETED"
        assert [item["media_type"] for item in answer["output"]["images"]] == ["image/png"]


def test_the_mirror_is_read_from_either_format_of_apts_sources(tmp_path: Path) -> None:
    folder = tmp_path / "sources.list.d"
    folder.mkdir()
    (folder / "a.sources").write_text("Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\n")
    (tmp_path / "sources.list").write_text(
        "# deb http://no.example x\ndeb [arch=amd64] http://old.example/debian bookworm main\n"
    )
    assert mirror("trixie", tmp_path) == "http://mirror.example/debian"
    assert mirror("bookworm", tmp_path) == "http://old.example/debian"
    with pytest.raises(BuildFailed, match="no mirror for Debian sid"):
        mirror("sid", tmp_path)


@pytest.mark.parametrize(
    ("manager", "environ"),
    [
        ("comfyui", {}),
        ("runpod-volume", {}),
        ("workspace", {}),
        ("elsewhere", {"VOLUME_PATH": "elsewhere"}),
        ("base", {"COMFYUI_BASE_DIR": "base"}),
        ("nowhere", {"COMFY_ARGS": "--enable-manager"}),
        (None, {}),
    ],
)
def test_a_manager_is_set_offline_before_the_first_start_wherever_it_is(
    manager: str | None, environ: dict[str, str], tmp_path: Path
) -> None:
    if manager:
        (tmp_path / manager / "custom_nodes/ComfyUI-Manager").mkdir(parents=True)
    for command in ("tini", "setpriv", "comfy-manager-set-mode"):
        (tmp_path / command).write_text('#!/bin/sh\necho "${0##*/} $*"\n')
        (tmp_path / command).chmod(0o755)
    # The same script with the container's folders below this test's.
    script = re.sub(r"(?<=[{,-])/(?=(comfyui|runpod-volume|workspace)[,}])", f"{tmp_path}/", text("image/start.sh"))
    (tmp_path / "start.sh").write_text(script)
    done = subprocess.run(
        ["bash", tmp_path / "start.sh"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **{name: str(tmp_path / path) for name, path in environ.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "tini -s" in done.stdout, done.stderr
    assert ("comfy-manager-set-mode offline" in done.stdout) == bool(manager)


def test_a_container_without_anything_finds_the_self_test() -> None:
    """The worker runs ./test_input.json where there is nothing else to serve; the container starts in /."""
    dockerfile = text("Dockerfile")
    assert re.search(r"^COPY (\S+ )*image/test_input\.json (\S+ )*/$", dockerfile, re.MULTILINE)
    assert re.findall(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)[-1] == "/"
    graph = json.loads(text("image/test_input.json"))["input"]["workflow"]
    assert {node["class_type"] for node in graph.values()} == {"EmptyImage", "SaveImage"}  # no model is needed


# Debian 12's first Python 3.11 has no filters for archives; deleting them is as near as another Python comes.
FETCH = """
import runpy, sys, tarfile
if sys.argv[1] == "without":
    del tarfile.data_filter
sys.argv[:2] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def fetched(archive: Path, out: Path, filters: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FETCH, filters, str(PROJECT / "image/fetch_source.py"), archive.as_uri(), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("filters", ["with", "without"])
def test_the_source_archive_is_unpacked_without_its_top_folder(filters: str, tmp_path: Path) -> None:
    tree = tmp_path / "ComfyUI-0.3.75"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").write_text("1")
    (tree / "comfy/a.py").write_text("2")
    (tree / "comfy/linked.py").symlink_to("../main.py")
    (tree / "comfy/hard.py").hardlink_to(tree / "comfy/a.py")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tree, tree.name)
    out = tmp_path / "out"
    done = fetched(tmp_path / "a.tar.gz", out, filters)
    assert done.returncode == 0, done.stderr
    assert {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.py")} == {
        "main.py": "1",
        "comfy/a.py": "2",
        "comfy/linked.py": "1",
        "comfy/hard.py": "2",
    }


@pytest.mark.parametrize("filters", ["with", "without"])
@pytest.mark.parametrize(
    "members",
    [
        [("top/../../out.py", tarfile.REGTYPE, "")],
        [("top/link", tarfile.SYMTYPE, "/etc")],
        [("top/link", tarfile.SYMTYPE, "../..")],
        [("top/a", tarfile.SYMTYPE, "b"), ("top/b", tarfile.SYMTYPE, ".."), ("top/a/out.py", tarfile.REGTYPE, "")],
        [("top/hard", tarfile.LNKTYPE, "top/../../secret")],
        [("top/pipe", tarfile.FIFOTYPE, "")],
    ],
)
def test_an_archive_that_leaves_its_folder_is_refused(
    members: list[tuple[str, bytes, str]], filters: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    done = fetched(tmp_path / "a.tar", tmp_path / "in/out", filters)
    assert done.returncode != 0
    assert "tarfile." in done.stderr.splitlines()[-1], "refused, not failed by chance"
    assert not list(tmp_path.rglob("out.py"))


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Busy, then broken off, then whole."""

    agents: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.agents.append(self.headers["User-Agent"])
        self.send_response(404 if self.path == "/nowhere" else 503 if len(self.agents) == 1 else 200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"wh" if len(self.agents) == 2 else b"whol")

    def log_message(self, *_: object) -> None:
        pass


def test_a_busy_host_and_a_broken_connection_are_asked_again_by_a_name_and_a_refusal_is_final() -> None:
    fetch = runpy.run_path(str(PROJECT / "image/fetch_source.py"))["fetch"]
    with http.server.HTTPServer(("127.0.0.1", 0), Unsteady) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert fetch(f"{address}/file", pause_s=0.0) == b"whol"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(f"{address}/nowhere", pause_s=0.0)
        server.shutdown()
    assert Unsteady.agents == ["comfyui-volume-worker"] * 4


@pytest.mark.parametrize(
    ("command", "nodes"),
    [
        (["comfy", "node", "install", "--exit-on-fail", "kjnodes@1.1.0", "--mode", "remote"], ["--fails", "kjnodes@1.1.0"]),
        (
            ["comfy", "--workspace", "/comfyui", "--skip-prompt", "node", "install", "a", "b", "--mode=remote"],
            ["--fails", "a", "b"],
        ),
    ],
)
def test_nodes_are_installed_as_dockerfiles_for_comfy_cli_say_it(command: list[str], nodes: list[str], tmp_path: Path) -> None:
    told = tmp_path / "comfy-node-install"
    told.write_text('#!/bin/sh\nprintf "%s\\n" --fails "$@"\nexit 1\n')
    told.chmod(0o755)
    done = subprocess.run(
        [sys.executable, PROJECT / "image/bin" / command[0], *command[1:]],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (1, nodes)
