"""A child's life and death, on real little programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker.engine.custom_nodes import FailedNode, failed_import
from worker.engine.process import _IN_COMFYUI, EngineCommand, EngineExit, EngineProcess, gpu_visible, prepare_base_dir
from worker.errors import EngineNotFound, NoGpu
from worker.settings import Settings


def spawn(code: str, tmp_path: Path) -> EngineProcess:
    return EngineProcess.spawn(EngineCommand((sys.executable, "-c", code), tmp_path, dict(os.environ)))


def gone(pid: int) -> bool:
    """Whether the process is dead; one that is dead but not reaped counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "exit_", "text"),
    [
        ("print('a'); raise SystemExit(3)", EngineExit(3), "exited with code 3"),
        ("print('a'); import os; os.kill(os.getpid(), 9)", EngineExit(-9), "was killed by SIGKILL (exit code -9"),
        ("print('a'); import os; os.kill(os.getpid(), 11)", EngineExit(-11), "was killed by SIGSEGV (exit code -11)"),
    ],
)
def test_the_cause_of_an_exit_is_known_with_the_last_lines(code: str, exit_: EngineExit, text: str, tmp_path: Path) -> None:
    process = spawn(code, tmp_path)
    assert process.exited.result(10) == exit_
    assert str(exit_).startswith(text)
    assert process.last_lines == ("a",)


_THREADS = """
import sys, threading

def prompt_worker():
    sys.exit(7)

for target in (sys.exit, prompt_worker):
    threading.Thread(target=target).start()
"""


def test_sys_exit_in_the_thread_of_workflows_is_noticed_and_the_sitecustomize_of_an_image_is_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('of the image')")
    paths = os.pathsep.join((str(_IN_COMFYUI), str(tmp_path)))
    command = EngineCommand((sys.executable, "-c", _THREADS), tmp_path, {**os.environ, "PYTHONPATH": paths})
    process = EngineProcess.spawn(command)
    assert process.prompts_ended.result(60) == "SystemExit: 7"
    assert process.exited.result(60) == EngineExit(0)
    assert sorted(process.last_lines)[1:] == ["SystemExit: 7", "of the image"]


def test_only_the_last_state_of_a_progress_bar_is_kept_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    process = spawn(r"import sys; sys.stdout.buffer.write(b' 10%|\r 50%|\r100%|\n\xff\xfe\n\n')", tmp_path)
    process.exited.result(10)
    assert process.last_lines == ("100%|", "\ufffd\ufffd")


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        (r"\x1b[32m[INFO]\x1b[0m got prompt\n", ("got prompt",)),
        (r"\x1b[32m[INFO]\x1b[0m \x1b[32mPrompt executed in 0.01 seconds\x1b[0m\n", ("Prompt executed in 0.01 seconds",)),
        (r"\x1b[1m\x1b[31m[ERROR]\x1b[0m   - Value not in list\n", ("[ERROR]   - Value not in list",)),
        (r"\x1b[32m[INFO]\x1b[0m \n\x1b[32m[INFO]\x1b[0m\n", ()),
        (r"\x1b]0;a title\x07\x1b[2Ktext\n", ("text",)),
        (r"[info] as it is\n", ("[info] as it is",)),
    ],
)
def test_a_line_is_kept_without_colours_and_without_an_ordinary_level(
    printed: str, kept: tuple[str, ...], tmp_path: Path
) -> None:
    process = spawn(f"import sys; sys.stdout.buffer.write(b'{printed}')", tmp_path)
    process.exited.result(60)
    assert process.last_lines == kept


def test_a_failed_import_is_known_in_colour_too(tmp_path: Path) -> None:
    line = r"\x1b[1m\x1b[33m[WARNING]\x1b[0m Cannot import /a/odd module for custom nodes: No module named \'x\'\n"
    process = spawn(f"import sys; sys.stdout.buffer.write(b'{line}')", tmp_path)
    process.exited.result(60)
    assert [failed_import(each) for each in process.failed_imports] == [FailedNode("odd", "No module named 'x'")]


def test_stopping_asks_first(tmp_path: Path) -> None:
    process = spawn("import time; print('up', flush=True); time.sleep(60)", tmp_path)
    assert process.stop() == EngineExit(-signal.SIGTERM)


def test_stopping_kills_what_does_not_listen_and_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    process = spawn(code, tmp_path)
    deadline = time.monotonic() + 30
    while len(process.last_lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    child = max(int(line) for line in process.last_lines)
    assert process.stop(grace_s=0.2) == EngineExit(-signal.SIGKILL)
    wait_until_gone(child)


def test_a_child_that_the_engine_forked_does_not_outlive_it_and_keep_its_port(tmp_path: Path) -> None:
    code = (
        "import os, socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)"
    )
    process = spawn(code, tmp_path)
    deadline = time.monotonic() + 30
    while not process.last_lines and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(process.last_lines[0])
    os.kill(process.pid, signal.SIGKILL)
    process.exited.result(10)
    wait_until_gone(child)


def test_the_engine_dies_with_a_worker_that_is_killed() -> None:
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from worker.engine.process import EngineCommand, EngineProcess\n"
        "program = 'import time; print(1, flush=True); time.sleep(600)'\n"
        "process = EngineProcess.spawn(EngineCommand((sys.executable, '-c', program), Path('/'), dict(os.environ)))\n"
        "while not process.last_lines: time.sleep(0.01)\n"
        "print(process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_until_gone(pid)


def comfyui(tmp_path: Path, **environ: str) -> Settings:
    (tmp_path / "main.py").touch()
    return Settings.from_env({"COMFYUI_DIR": str(tmp_path), "COMFYUI_PYTHON": sys.executable, **environ})


def test_no_comfyui_at_the_path_is_one_sentence_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFound, match=r"main\.py does not exist: set COMFYUI_DIR"):
        EngineCommand.of(Settings.from_env({"COMFYUI_DIR": str(tmp_path)}), {})


def test_no_python_at_the_path_is_one_sentence_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFound, match="set COMFYUI_PYTHON"):
        EngineCommand.of(comfyui(tmp_path, COMFYUI_PYTHON="/no/python"), {})


@pytest.mark.skipif(gpu_visible(), reason="this machine has a GPU")
def test_no_gpu_is_one_sentence_unless_the_cpu_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NoGpu, match="--cpu"):
        EngineCommand.of(comfyui(tmp_path), {})
    EngineCommand.of(comfyui(tmp_path, COMFY_ARGS="--cpu"), {})


def test_a_base_directory_gets_the_folders_comfyui_dies_without(tmp_path: Path) -> None:
    prepare_base_dir(Settings.from_env({"COMFYUI_BASE_DIR": str(tmp_path / "base")}))
    assert (tmp_path / "base" / "custom_nodes").is_dir()
    prepare_base_dir(Settings.from_env({}))


def test_a_gpu_is_known_by_its_device(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert not gpu_visible(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert gpu_visible(tmp_path)


def test_the_command_carries_the_settings_and_the_operators_flags_last(tmp_path: Path) -> None:
    settings = comfyui(tmp_path, COMFY_ARGS="--cpu --lowvram", COMFYUI_PORT="9", COMFYUI_BASE_DIR="/data")
    command = EngineCommand.of(settings, {"A": "b"})
    line = " ".join(command.argv)
    assert "--listen 127.0.0.1 --port 9" in line
    assert "--base-directory /data" in line
    assert line.endswith("--cpu --lowvram")
    assert command.environ["A"] == "b"
    assert "0.0.0.0" in EngineCommand.of(comfyui(tmp_path, COMFY_ARGS="--cpu", SERVE_API_LOCALLY="true"), {}).argv


def test_comfyui_is_not_told_the_secrets_that_no_node_needs(tmp_path: Path) -> None:
    (tmp_path / "main.py").touch()
    environ = {"COMFYUI_DIR": str(tmp_path), "COMFYUI_PYTHON": sys.executable, "COMFY_ARGS": "--cpu"}
    secret = {"BUCKET_SECRET_ACCESS_KEY": "secret", "RUNPOD_AI_API_KEY": "secret", "COMFY_ORG_API_KEY": "secret"}
    command = EngineCommand.of(Settings.from_env(environ), {**environ, **secret, "HF_TOKEN": "hf_for_nodes"})
    assert "secret" not in command.environ.values()
    assert command.environ["HF_TOKEN"] == "hf_for_nodes"


@pytest.mark.parametrize(
    ("arguments", "in_memory"),
    [
        ("", True),
        ("--disable-metadata", True),
        ("--database-url sqlite:////data/comfyui.db", False),
        ("--database-url=sqlite:////data/comfyui.db", False),
        ("--enable-assets", False),
    ],
)
def test_comfyuis_database_stays_in_memory_unless_somebody_wants_it(arguments: str, *, in_memory: bool, tmp_path: Path) -> None:
    command = EngineCommand.of(comfyui(tmp_path, COMFY_ARGS=f"--cpu {arguments}"), dict(os.environ))
    assert ("sqlite:///:memory:" in command.argv) == in_memory
