"""Every workflow that ships with the project, through the worker: the right list, the right media type, a file that opens."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from devkit.engine.build import Engine
    from devkit.local_worker import LocalWorker

FOLDER = PROJECT / "devkit/workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
PICTURE = base64.b64encode((FOLDER / "in.png").read_bytes()).decode()


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")


def is_animated_png(data: bytes) -> bool:
    return is_png(data) and b"acTL" in data[:100] and data.count(b"fcTL") > 1


def is_animated_webp(data: bytes) -> bool:
    return (
        data[:4] == b"RIFF"
        and data[8:12] == b"WEBP"
        and int.from_bytes(data[4:8], "little") + 8 == len(data)
        and b"ANIM" in data
    )


def is_mp4(data: bytes) -> bool:
    """Whole: the boxes at the top add up to the file, with an index and samples among them."""
    kinds, offset = [], 0
    while offset < len(data):
        kinds.append(data[offset + 4 : offset + 8])
        offset += int.from_bytes(data[offset : offset + 4], "big") or len(data)
    return offset == len(data) and kinds[0] == b"ftyp" and {b"moov", b"mdat"} <= set(kinds)


def is_webm(data: bytes) -> bool:
    return data.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in data[:64]


def is_safetensors(data: bytes) -> bool:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return "latent_tensor" in header


@dataclass(frozen=True)
class Expected:
    """The one output of a workflow: the list it is in, what it is called and what it is."""

    kind: str
    media_type: str
    opens: Callable[[bytes], bool]


PNG = Expected("images", "image/png", is_png)
OTHERS = {
    "animated_png": Expected("images", "image/png", is_animated_png),
    "animated_webp": Expected("images", "image/webp", is_animated_webp),
    "audio_flac": Expected("audio", "audio/flac", lambda data: data.startswith(b"fLaC")),
    "audio_mp3": Expected("audio", "audio/mpeg", lambda data: data.startswith((b"ID3", b"\xff\xfb"))),
    "audio_opus": Expected("audio", "audio/ogg", lambda data: data.startswith(b"OggS") and b"OpusHead" in data[:100]),
    "save_latent": Expected("files", "application/octet-stream", is_safetensors),
    "text_to_video": Expected("images", "video/mp4", is_mp4),
    "video_mp4": Expected("images", "video/mp4", is_mp4),
    "video_webm": Expected("images", "video/webm", is_webm),
    "video_with_audio": Expected("images", "video/mp4", is_mp4),
}


def job(name: str, **more: Any) -> dict[str, Any]:
    graph = json.loads((FOLDER / f"{name}.json").read_text())
    return {"workflow": graph, "images": [{"name": "in.png", "image": PICTURE}], **more}


def test_there_are_twenty_six() -> None:
    assert len(NAMES) == 26


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("preview")])
def test_a_workflow_comes_back_complete(name: str, worker: LocalWorker, engine: Engine, volume: Path) -> None:
    if name == "text_to_image_clip_fp8":
        make_volume(engine, volume, ("large",))
    expected = OTHERS.get(name, PNG)
    answer = worker.runsync(job(name))
    assert answer["status"] == "COMPLETED", answer
    output = answer["output"]
    lists = {key: value for key, value in output.items() if value}
    assert set(lists) == {expected.kind}, output
    (item,) = lists[expected.kind]
    data = base64.b64decode(item["data"], validate=True)
    assert (item["type"], item["media_type"], item["size_bytes"]) == ("base64", expected.media_type, len(data))
    assert expected.opens(data), data[:64]
    assert "/" not in item["filename"]
    assert item["node_id"] in job(name)["workflow"]


def test_previews_come_back_when_they_are_asked_for(worker: LocalWorker) -> None:
    assert worker.runsync(job("preview_image"))["output"] == {"images": [], "status": "success_no_images"}
    items = worker.runsync(job("preview_image", previews=True))["output"]["images"]
    assert len(items) == job("preview_image")["workflow"]["1"]["inputs"]["batch_size"]
    assert all(is_png(base64.b64decode(item["data"])) for item in items)


def test_text_comes_back_as_text(worker: LocalWorker) -> None:
    output = worker.runsync(job("preview_text"))["output"]
    (item,) = output["text"]
    assert (item["type"], item["media_type"]) == ("text", "text/plain")
    assert item["data"]
    assert item["size_bytes"] == len(item["data"].encode())
