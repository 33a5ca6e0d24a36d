"""PNGs as WEBP and JPEG, by ComfyUI's own Pillow: smaller, with the workflow in them, and never lost."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from worker.editor.embedded_workflow import embedded_workflow
from worker.media.delivery import Delivery
from worker.media.outputs import Output
from worker.media.picture_formats import PictureEncoding, PictureFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from devkit.engine.build import Engine
    from devkit.local_worker import LocalWorker

    RunAsync = Callable[[Coroutine[Any, Any, Any]], Any]

PROMPT = {"1": {"class_type": "KSampler", "inputs": {"text": "a fox 狐"}}}
WORKFLOW = {"nodes": [{"id": 1, "type": "KSampler"}], "links": []}
MAKE = """
import json, sys
from PIL import Image, PngImagePlugin
from random import Random
folder, prompt, workflow = sys.argv[1:]
info = PngImagePlugin.PngInfo()
info.add_text("prompt", prompt)
info.add_text("workflow", workflow)
noise = Random(1).randbytes(64 * 48 * 3)
picture = Image.frombytes("RGB", (64, 48), noise).resize((512, 384), 3)
picture.save(f"{folder}/plain.png", pnginfo=info)
picture.convert("L").save(f"{folder}/grey.png")
clear = picture.convert("RGBA")
clear.putalpha(0)
clear.save(f"{folder}/clear.png")
Image.new("I;16", (8, 8), 40000).save(f"{folder}/deep.png")
picture.save(f"{folder}/moving.png", save_all=True, append_images=[clear.convert("RGB"), picture.rotate(90)])
"""
LOOK = """
import json, sys
from PIL import Image
found = []
for path in sys.argv[1:]:
    with Image.open(path) as image:
        image.load()
        found.append([image.format, list(image.size), image.mode, list(image.convert("RGB").getpixel((5, 5)))])
print(json.dumps(found))
"""


@pytest.fixture
def folder(engine: Engine, tmp_path: Path) -> Path:
    """ComfyUI's output folder, with PNGs of each kind."""
    output = tmp_path / "output"
    output.mkdir()
    argv = [str(engine.python), "-c", MAKE, str(output), json.dumps(PROMPT), json.dumps(WORKFLOW)]
    subprocess.run(argv, check=True)
    (output / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return output


def output_of(path: Path, source: Path | bytes | None = None) -> Output:
    return Output("images", "9", path.name, "", "image/png", path.stat().st_size, path if source is None else source)


def look(engine: Engine, *outputs: Output) -> list[list[Any]]:
    argv = [str(engine.python), "-c", LOOK, *(str(item.source) for item in outputs)]
    found: list[list[Any]] = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.parametrize(("kind", "suffix"), [("webp", ".webp"), ("jpeg", ".jpg")])
def test_pngs_are_encoded_and_keep_their_size(kind: str, suffix: str, folder: Path, engine: Engine, tmp_path: Path) -> None:
    names = ("plain", "grey", "clear")
    given = [output_of(folder / f"{name}.png") for name in names]
    given.append(output_of(folder / "plain.png", (folder / "plain.png").read_bytes()))  # as it came through a websocket
    made, said = PictureEncoding(str(engine.python), given, PictureFormat(kind, 90), tmp_path).run()
    assert said == []
    assert [item.filename for item in made] == [f"{name}{suffix}" for name in (*names, "plain")]
    assert {item.media_type for item in made} == {f"image/{kind}"}
    assert all(item.size_bytes < each.size_bytes for item, each in zip(made, given, strict=True) if item.filename[0] != "c")
    found = look(engine, *made)
    assert [(each[0], each[1]) for each in found] == [(kind.upper(), [512, 384])] * 4
    if kind == "webp":
        assert found[2][2] == "RGBA"
    else:
        assert found[2][2:] == ["RGB", [255, 255, 255]]  # what is transparent is white


def test_a_lower_quality_is_smaller(folder: Path, engine: Engine, tmp_path: Path) -> None:
    sizes = []
    for quality in (30, 95):
        (made,), _ = PictureEncoding(
            str(engine.python), [output_of(folder / "plain.png")], PictureFormat("webp", quality), tmp_path
        ).run()
        sizes.append(made.size_bytes)
    assert sizes[0] < sizes[1]


def test_the_workflow_goes_with_the_picture(folder: Path, engine: Engine, tmp_path: Path) -> None:
    (webp,), _ = PictureEncoding(
        str(engine.python), [output_of(folder / "plain.png")], PictureFormat("webp", 90), tmp_path
    ).run()
    assert isinstance(webp.source, type(tmp_path))
    found = embedded_workflow(webp.source.read_bytes())
    assert found is not None
    assert (found.prompt, found.workflow) == (PROMPT, WORKFLOW)
    (jpeg,), _ = PictureEncoding(
        str(engine.python), [output_of(folder / "plain.png")], PictureFormat("jpeg", 90), tmp_path
    ).run()
    assert isinstance(jpeg.source, type(tmp_path))
    assert f"prompt:{json.dumps(PROMPT)}".encode() in jpeg.source.read_bytes()


def test_what_cannot_be_encoded_comes_as_it_is_and_is_named(folder: Path, engine: Engine, tmp_path: Path) -> None:
    given = [output_of(folder / f"{name}.png") for name in ("moving", "plain", "deep", "broken")]
    text = Output("text", "3", "text_3_0.txt", "", "text/plain", 2, "hi")
    made, said = PictureEncoding(str(engine.python), [*given, text], PictureFormat("webp", 90), tmp_path).run()
    assert [item.filename for item in made] == ["moving.png", "plain.webp", "deep.png", "broken.png", "text_3_0.txt"]
    assert [sentence.split()[2] for sentence in said] == ["moving.png", "deep.png", "broken.png"]
    assert said[0] == "The picture moving.png is returned as it is, not as webp: it is animated."


@pytest.mark.parametrize("python", ["/no/such/python", "false"])
def test_without_an_encoder_pictures_come_as_they_are(python: str, folder: Path, tmp_path: Path) -> None:
    given = [output_of(folder / "plain.png")]
    made, said = PictureEncoding(python, given, PictureFormat("webp", 90), tmp_path).run()
    assert made == given
    assert said == ["The picture plain.png is returned as it is, not as webp: the encoder did not answer."]


def test_an_encoder_that_is_stopped_ends_at_once(folder: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 300\n")
    slow.chmod(0o755)
    encoding = PictureEncoding(str(slow), [output_of(folder / "plain.png")], PictureFormat("webp", 90), tmp_path)
    running = threading.Thread(target=encoding.run)
    running.start()
    while encoding._process is None:
        threading.Event().wait(0.01)
    encoding.stop()
    running.join(30)
    assert not running.is_alive()


def test_nothing_of_it_stays_on_the_disk(
    folder: Path, engine: Engine, tmp_path: Path, run_async: RunAsync, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    delivery = Delivery(folder, tmp_path / "temp", python=str(engine.python))
    outputs = {"9": {"images": [{"filename": "plain.png", "subfolder": "", "type": "output"}]}}
    result = run_async(delivery.deliver("j", outputs, pictures=PictureFormat("jpeg", 80)))
    (item,) = result.images
    assert (item.filename, item.media_type, item.size_bytes) == ("plain.jpg", "image/jpeg", len(base64.b64decode(item.data)))
    assert list(scratch.iterdir()) == []
    assert (folder / "plain.png").exists()


def test_a_job_has_its_pictures_as_it_asks(worker: LocalWorker, workflow: Callable[[str], dict[str, Any]]) -> None:
    graph = workflow("text_to_image")
    png = worker.runsync({"workflow": graph})["output"]["images"][0]
    answer = worker.runsync({"workflow": graph, "output_format": "webp", "quality": 80})
    assert answer["status"] == "COMPLETED", answer
    (item,) = answer["output"]["images"]
    data = base64.b64decode(item["data"])
    assert (item["media_type"], data[:4], data[8:12]) == ("image/webp", b"RIFF", b"WEBP")
    assert item["filename"] == png["filename"].removesuffix(".png") + ".webp"
    assert item["size_bytes"] < png["size_bytes"]
    found = embedded_workflow(data)
    assert found is not None
    assert found.prompt == graph
