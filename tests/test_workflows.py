"""Every workflow that ships with the project, through the worker: the right list, the right media type, a file that opens."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT

if TYPE_CHECKING:
    from pathlib import Path

    from devkit.engine.build import Engine
    from devkit.local_worker import LocalWorker

FOLDER = PROJECT / "devkit/workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
PICTURE = base64.b64encode((FOLDER / "in.png").read_bytes()).decode()


# Opens a file to its end with the libraries that ComfyUI wrote it with, and says what is in it: each picture, frame and sample
# is decoded, each tensor is read.
OPEN = """
import json, sys

def picture(path):
    from PIL import Image
    with Image.open(path) as image:
        frames = set()
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.add(image.convert("RGB").tobytes())
        return {"format": image.format, "size": list(image.size), "different_frames": len(frames)}

def media(path):
    import av
    with av.open(path) as container:
        frames = {stream.index: [] for stream in container.streams}
        for packet in container.demux():
            frames[packet.stream.index] += packet.decode()
        told = {"format": container.format.name}
        for stream in container.streams:
            first, name = frames[stream.index][0], stream.codec_context.name
            if stream.type == "video":
                told["video"] = [name, first.width, first.height, len(frames[stream.index])]
            else:
                samples = sum(frame.samples for frame in frames[stream.index])
                told["audio"] = [name, first.layout.nb_channels, first.sample_rate, round(samples / first.sample_rate, 1)]
        return told

def tensors(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        return {name: list(file.get_tensor(name).shape) for name in file.keys()}

print(json.dumps({"picture": picture, "media": media, "tensors": tensors}[sys.argv[1]](sys.argv[2])))
"""


@dataclass(frozen=True)
class Expected:
    """The one output of a workflow: the list it is in, what it is called, how it is opened, and what is in it then."""

    kind: str
    media_type: str
    how: str
    content: dict[str, Any]


def picture(width: int, height: int, *, form: str = "PNG", frames: int = 1) -> Expected:
    content = {"format": form, "size": [width, height], "different_frames": frames}
    return Expected("images", f"image/{form.lower()}", "picture", content)


def media(kind: str, media_type: str, form: str, **streams: list[Any]) -> Expected:
    return Expected(kind, media_type, "media", {"format": form, **streams})


# Each animation has four colours for two frames each, of which Pillow's encoders make one.
MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
TEXT_TO_IMAGE = picture(128, 128)
OTHERS = {
    "animated_png": picture(64, 64, frames=4),
    "animated_webp": picture(64, 64, form="WEBP", frames=4),
    "audio_flac": media("audio", "audio/flac", "flac", audio=["flac", 2, 44100, 2.0]),
    "audio_mp3": media("audio", "audio/mpeg", "mp3", audio=["mp3float", 2, 44100, 2.0]),
    "audio_opus": media("audio", "audio/ogg", "ogg", audio=["opus", 2, 48000, 2.0]),
    "empty_image": picture(64, 64),
    "image_to_image": picture(64, 48),
    "save_latent": Expected(
        "files",
        "application/octet-stream",
        "tensors",
        {"latent_tensor": [1, 4, 8, 8], "latent_format_version_0": [0]},
    ),
    "scale_image": picture(96, 48),
    "text_to_video": media("images", "video/mp4", MP4, video=["h264", 64, 64, 9]),
    "upscale_compact": picture(128, 96),
    "upscale_esrgan": picture(256, 192),
    "vae_round_trip": picture(64, 48),
    "video_mp4": media("images", "video/mp4", MP4, video=["h264", 64, 64, 8]),
    "video_webm": media("images", "video/webm", "matroska,webm", video=["vp9", 64, 64, 8]),
    "video_with_audio": media("images", "video/mp4", MP4, video=["h264", 64, 64, 8], audio=["aac", 2, 44100, 1.0]),
}


def opened(how: str, data: bytes, engine: Engine, folder: Path) -> Any:
    """What is in a file, which ComfyUI's own Python opens: it has the libraries."""
    path = folder / "file"
    path.write_bytes(data)
    done = subprocess.run([engine.python, "-c", OPEN, how, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def job(name: str, **more: Any) -> dict[str, Any]:
    graph = json.loads((FOLDER / f"{name}.json").read_text())
    return {"workflow": graph, "images": [{"name": "in.png", "image": PICTURE}], **more}


def test_there_are_twenty_six() -> None:
    assert len(NAMES) == 26


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("preview")])
def test_a_workflow_comes_back_complete(name: str, worker: LocalWorker, engine: Engine, volume: Path, tmp_path: Path) -> None:
    if name == "text_to_image_clip_fp8":
        make_volume(engine, volume, ("large",))
    expected = OTHERS.get(name, TEXT_TO_IMAGE)
    answer = worker.runsync(job(name))
    assert answer["status"] == "COMPLETED", answer
    output = answer["output"]
    lists = {key: value for key, value in output.items() if value}
    assert set(lists) == {expected.kind}, output
    (item,) = lists[expected.kind]
    data = base64.b64decode(item["data"], validate=True)
    assert (item["type"], item["media_type"], item["size_bytes"]) == ("base64", expected.media_type, len(data))
    assert opened(expected.how, data, engine, tmp_path) == expected.content
    assert "/" not in item["filename"]
    assert item["node_id"] in job(name)["workflow"]


def test_previews_come_back_when_they_are_asked_for(worker: LocalWorker, engine: Engine, tmp_path: Path) -> None:
    assert worker.runsync(job("preview_image"))["output"] == {"images": [], "status": "success_no_images"}
    items = worker.runsync(job("preview_image", previews=True))["output"]["images"]
    asked = job("preview_image")["workflow"]["1"]["inputs"]
    assert len(items) == asked["batch_size"]
    for item in items:
        content = opened("picture", base64.b64decode(item["data"]), engine, tmp_path)
        assert content == picture(asked["width"], asked["height"]).content


def test_text_comes_back_as_text(worker: LocalWorker) -> None:
    output = worker.runsync(job("preview_text"))["output"]
    (item,) = output["text"]
    assert (item["type"], item["media_type"]) == ("text", "text/plain")
    assert item["data"] == "8"
    assert item["size_bytes"] == len(item["data"].encode())
