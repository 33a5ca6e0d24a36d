"""Custom nodes on the volume: linked, their packages installed once and never over ComfyUI's own, failures named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.build import engine_args
from devkit.engine.models import make_volume
from devkit.local_worker import LocalWorker
from worker import doctor
from worker.engine.custom_nodes import (
    EnginePackages,
    NodeFolders,
    failed_import,
    link_custom_nodes,
    node_environment,
    read_failed_nodes,
    record_failed_nodes,
    report_failed_nodes,
)
from worker.settings import Settings
from worker.store.layout import Layout
from worker.store.locks import Locks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from devkit.engine.build import Engine


class Fleet:
    """Workers of one volume, with wheels of their own for a package index."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.volume = folder / "volume"
        self.nodes = self.volume / "custom_nodes"
        self.nodes.mkdir(parents=True)
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.engine = engine
        self.python = engine.python
        self.environ = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PATH": "/usr/bin:/bin",
            "PIP_CONFIG_FILE": "/dev/null",
        }
        self.held: list[str] = []
        self._folder = folder

    def node(self, name: str, code: str, requirements: str | None = None) -> Path:
        folder = self.nodes / name
        folder.mkdir()
        (folder / "__init__.py").write_text(code)
        if requirements is not None:
            (folder / "requirements.txt").write_text(requirements)
        return folder

    def wheel(self, name: str, version: str, needs: str = "", folder: Path | None = None) -> Path:
        path = (folder or self.wheels) / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        needed = f"Requires-Dist: {needs}\n" if needs else ""
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
        return path

    def folders(self, worker: str = "a") -> NodeFolders:
        base = self._folder / worker
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        return NodeFolders.below(self.volume, base, str(self.python))

    def start(self, worker: str = "a") -> Path | None:
        """What the worker adds to PYTHONPATH."""

        def once(key: str, done: Callable[[], bool]) -> AbstractContextManager[object]:
            self.held.append(worker)
            return Locks(Layout(self.volume), worker).hold(key, published=done, cancel=threading.Event())

        environ = node_environment(self.folders(worker), once, {**self.environ, "RUNPOD_POD_ID": worker})
        return Path(environ["PYTHONPATH"]) if "PYTHONPATH" in environ else None


@pytest.fixture
def fleet(tmp_path: Path, engine: Engine) -> Fleet:
    return Fleet(tmp_path, engine)


def test_nodes_are_linked_and_links_of_those_that_left_are_removed(fleet: Fleet) -> None:
    fleet.node("one", "")
    (fleet.nodes / "single.py").write_text("")
    for name in ("off.disabled", ".git", "__pycache__"):
        (fleet.nodes / name).mkdir()
    target = fleet.folders().target
    elsewhere = target / "elsewhere"
    elsewhere.symlink_to("/nowhere")
    assert link_custom_nodes(fleet.folders()) == ("one", "single.py")
    (fleet.nodes / "single.py").unlink()
    assert link_custom_nodes(fleet.folders()) == ("one",)
    assert sorted(path.name for path in target.iterdir()) == ["elsewhere", "one"]
    assert (target / "one").resolve() == fleet.nodes / "one"


def test_a_node_of_the_image_wins_and_the_log_says_so(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.node("one", "")
    (fleet.folders().target / "one").mkdir()
    assert link_custom_nodes(fleet.folders()) == ()
    assert "custom node 'one' of the volume is left out" in caplog.text


def test_packages_are_installed_by_the_first_worker_and_used_by_the_next(fleet: Fleet) -> None:
    fleet.wheel("nodepack", "1.5", needs="numpy")
    fleet.node("one", "", "nodepack\ntorch\n")
    fleet.node("two", "", "nodepack>=1\n")
    first = fleet.start("a")
    again = fleet.start("b")
    assert first == again
    assert fleet.held == ["a"]
    assert first is not None
    assert first.is_relative_to(fleet.volume)
    assert "torch2." in first.parent.name
    assert sorted(path.name for path in first.iterdir() if path.name != "__pycache__") == [
        "nodepack-1.5.dist-info",
        "nodepack.py",
    ]


def test_a_changed_requirement_or_another_engine_makes_another_layer(fleet: Fleet) -> None:
    engine = EnginePackages.of(str(fleet.engine.python))
    assert engine.versions["torch"].startswith("2.")
    assert engine.layer_name({"one": "a"}) != engine.layer_name({"one": "b"})
    other = EnginePackages(engine.python, {**engine.versions, "torch": "9.9"})
    assert "torch9.9" in other.layer_name({"one": "a"})
    assert other.layer_name({"one": "a"})[-12:] != engine.layer_name({"one": "a"})[-12:]


def test_what_conflicts_with_comfyui_is_named_and_does_not_stop_the_rest(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.wheel("torch", "1.0")
    fleet.wheel("nodepack", "1.5")
    fleet.node("greedy", "", "# a comment\ntorch<2\nnodepack  # wanted\n")
    fleet.node("modest", "", "nodepack\n")
    site = fleet.start()
    assert site is not None
    assert (site / "nodepack.py").is_file()
    assert not list(site.glob("torch*"))
    assert "custom node 'greedy' requires packages that conflict with ComfyUI's" in caplog.text
    assert "torch<2: " in caplog.text
    assert "custom node 'modest'" not in caplog.text
    caplog.clear()
    assert fleet.start("b") == site
    assert "custom node 'greedy'" in caplog.text, "said again at each start, from the layer's record"


def test_requirements_of_a_path_an_option_and_another_file_are_taken_as_pip_takes_them(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    extra = fleet.volume / "extra"
    extra.mkdir()
    wheel = fleet.wheel("elsewhere", "2.0", folder=extra)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    fleet.wheel("listed", "1.0")
    lines = [f"-f {extra}", "./bundled-1.0-py3-none-any.whl  # beside it", "--requirement more.txt"]
    lines += [f"elsewhere==2.0 --hash=sha256:{digest}", "absent"]
    node = fleet.node("one", "", "\n".join(lines))
    fleet.wheel("bundled", "1.0", folder=node)
    (node / "more.txt").write_text("listed\n")
    site = fleet.start()
    assert site is not None
    assert sorted(path.stem for path in site.glob("*.py")) == ["bundled", "elsewhere", "listed"]
    assert "absent: " in caplog.text
    assert "listed: " not in caplog.text


@pytest.mark.parametrize("record", ["", '{"v": 1}'])
def test_a_layer_whose_record_cannot_be_read_is_made_again(record: str, fleet: Fleet) -> None:
    fleet.wheel("nodepack", "1.5")
    fleet.node("one", "", "nodepack\n")
    site = fleet.start("a")
    assert site is not None
    (site.parent / "layer.json").write_text(record)
    (site / "nodepack.py").unlink()
    assert fleet.start("b") == site
    assert (site / "nodepack.py").is_file()
    assert fleet.start("c") == site
    assert fleet.held == ["a", "b"]


def test_a_volume_that_cannot_be_written_leaves_the_packages_in_the_container(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.wheel("nodepack", "1.5")
    fleet.node("one", "", "nodepack\n")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(fleet.volume))

    monkeypatch.setattr("worker.engine.custom_nodes._publish", read_only)
    site = fleet.start()
    assert site is not None
    assert not site.is_relative_to(fleet.volume)
    assert (site / "nodepack.py").is_file()
    assert "the packages stay in this container" in caplog.text


# A Python that installs when it is told to.
_SLOW_PYTHON = """#!/bin/sh
read -r _ < {pipe}
exec {python} "$@"
"""


def test_a_worker_that_waits_for_anothers_installation_says_whose_it_is(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fleet.wheel("nodepack", "1.5")
    fleet.node("one", "", "nodepack\n")
    pipe, fleet.python = tmp_path / "pipe", tmp_path / "venv/bin/python"
    os.mkfifo(pipe)
    fleet.python.parent.mkdir(parents=True)
    (tmp_path / "venv/lib").symlink_to(fleet.engine.python.parent.parent / "lib")
    fleet.python.write_text(_SLOW_PYTHON.format(pipe=pipe, python=fleet.engine.python))
    fleet.python.chmod(0o755)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fleet.start, "worker-a")
        with pipe.open("w") as told:  # returns when worker-a's pip waits to be told
            second = pool.submit(fleet.start, "worker-b")
            while "waiting for the custom nodes' packages, which worker worker-a installs since " not in caplog.text:
                assert not second.done()
                time.sleep(0.01)
            told.write("install\n")
        site = first.result(60)
        assert site == second.result(60)
    assert site is not None
    assert list((fleet.volume / ".worker/nodes").iterdir()) == [site.parent], "no note is left behind"


def test_two_workers_without_a_lock_end_with_one_whole_layer(fleet: Fleet) -> None:
    fleet.wheel("nodepack", "1.5")
    fleet.node("one", "", "nodepack\n")

    @contextlib.contextmanager
    def no_lock(_: str, __: Callable[[], bool]) -> Iterator[None]:
        yield

    sites: list[str] = []

    def start(worker: str) -> None:
        sites.append(node_environment(fleet.folders(worker), no_lock, fleet.environ)["PYTHONPATH"])

    threads = [threading.Thread(target=start, args=(worker,)) for worker in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(set(sites)) == 1
    assert (Path(sites[0]) / "nodepack.py").is_file()
    assert len(list((fleet.volume / ".worker/nodes").iterdir())) == 1


def test_no_requirements_no_layer(fleet: Fleet) -> None:
    fleet.node("one", "", "# nothing\n\n")
    assert fleet.start() is None
    assert fleet.held == []


def test_failures_are_read_from_comfyuis_own_line() -> None:
    found = failed_import("Cannot import /comfyui/custom_nodes/x-y module for custom nodes: No module named 'cv2'")
    assert found is not None
    assert (found.name, found.reason) == ("x-y", "No module named 'cv2'")
    assert failed_import("Import times for custom nodes:") is None


def test_a_record_of_failures_goes_when_they_are_gone(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fleet.node("bad", "")
    record_failed_nodes(fleet.folders(), ["Cannot import /c/bad module for custom nodes: boom"])
    assert [failed.name for failed in read_failed_nodes(fleet.volume)] == ["bad"]
    assert "custom node 'bad' could not be imported (boom)" in caplog.text
    record_failed_nodes(fleet.folders(), [])
    assert read_failed_nodes(fleet.volume) == []
    (fleet.volume / ".worker/nodes/failed.json").write_text("not json")
    assert read_failed_nodes(fleet.volume) == []


def test_comfyui_that_was_told_to_be_silent_says_nothing_about_its_nodes_either_way(fleet: Fleet) -> None:
    fleet.node("bad", "")
    line = "Cannot import /c/bad module for custom nodes: boom"
    for level, lines, known in (
        ("WARNING", [line], ["bad"]),
        ("ERROR", [], ["bad"]),
        ("CRITICAL", [], ["bad"]),
        ("INFO", [], []),
    ):
        environ = {"VOLUME_PATH": str(fleet.volume), "COMFY_LOG_LEVEL": level}
        report_failed_nodes(Settings.from_env(environ), lines)
        assert [failed.name for failed in read_failed_nodes(fleet.volume)] == known, level


_GOOD = """
import nodepack

class Version:
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return {"ui": {"text": [nodepack.VERSION]}}

NODE_CLASS_MAPPINGS = {"Version": Version}
"""


def test_a_worker_runs_a_node_of_the_volume_and_names_one_that_fails(
    fleet: Fleet, tmp_path: Path, workflow: Callable[[str], dict[str, Any]]
) -> None:
    node = fleet.node("good", _GOOD, "torch\n./nodepack-1.5-py3-none-any.whl\n")
    fleet.wheel("nodepack", "1.5", folder=node)
    fleet.node("broken", "import nothing_of_that_name\n")
    make_volume(fleet.engine, fleet.volume)
    args = [argument for argument in engine_args(fleet.engine) if argument != "--disable-all-custom-nodes"]
    environ = {**fleet.environ, "PATH": f"/usr/sbin:/sbin:{fleet.environ['PATH']}", "COMFY_ARGS": shlex.join(args)}
    with LocalWorker(fleet.engine, tmp_path, fleet.volume, environ) as local:
        local.wait_ready()
        answer = local.runsync({"workflow": {"1": {"class_type": "Version", "inputs": {}}}})
        assert answer["status"] == "COMPLETED", local.log_tail()
        assert "1.5" in json.dumps(answer["output"])
        assert local.runsync({"workflow": workflow("text_to_image")})["status"] == "COMPLETED"
        assert "custom node 'broken' could not be imported (No module named 'nothing_of_that_name')" in local.log()
    command = [sys.executable, "-m", "worker", "doctor"]
    done = subprocess.run(command, env={"VOLUME_PATH": str(fleet.volume)}, capture_output=True, text=True, check=False)
    assert "The custom node 'broken' could not be imported" in " ".join(done.stdout.split())
    assert done.returncode == doctor.PROBLEM_FOUND


def test_a_node_of_the_image_that_fails_is_named_and_a_volume_without_nodes_is_left_alone(fleet: Fleet, tmp_path: Path) -> None:
    volume = make_volume(fleet.engine, tmp_path / "another")
    args = [argument for argument in engine_args(fleet.engine) if argument != "--disable-all-custom-nodes"]
    local = LocalWorker(fleet.engine, tmp_path, volume, {"COMFY_ARGS": shlex.join(args)})
    broken = local.base_dir / "custom_nodes/broken"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import nothing_of_that_name\n")
    with local:
        local.wait_ready()
        assert "custom node 'broken' could not be imported (No module named 'nothing_of_that_name')" in local.log()
    assert not (volume / ".worker/nodes").exists()
