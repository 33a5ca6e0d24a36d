"""What a run produced, read from disk in the shapes clients know."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest

from worker.errors import OutputGone, UnsafePath
from worker.media.outputs import OutputFiles, media_type

if TYPE_CHECKING:
    from pathlib import Path


def file(filename: str, subfolder: str = "", kind: str = "output") -> dict[str, Any]:
    return {"filename": filename, "subfolder": subfolder, "type": kind}


def test_saved_files_come_back_by_node_in_the_order_they_were_produced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.webp", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    outputs: dict[str, dict[str, Any]] = {
        "9": {"images": [file("c.mp4"), file("a.png")], "animated": [True]},
        "3": {"images": [file("b.webp", "sub"), file("preview.png", kind="temp")]},
        "4": {"text": ["hello"]},
        "5": {"images": None},
    }
    items = OutputFiles(tmp_path).images(outputs)
    assert [(item.node_id, item.filename, item.media_type) for item in items] == [
        ("9", "c.mp4", "video/mp4"),
        ("9", "a.png", "image/png"),
        ("3", "b.webp", "image/webp"),
    ]
    assert base64.b64decode(items[2].data) == b"sub/b.webp"
    assert (items[2].subfolder, items[2].size_bytes) == ("sub", 10)


def test_a_file_that_is_gone_is_an_error_not_a_hole(tmp_path: Path) -> None:
    with pytest.raises(OutputGone, match="gone"):
        OutputFiles(tmp_path).images({"9": {"images": [file("gone.png")]}})


@pytest.mark.parametrize(("filename", "subfolder"), [("passwd", "../etc"), ("../x", ""), ("x", "/etc")])
def test_a_node_cannot_have_files_from_elsewhere_delivered(filename: str, subfolder: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsafePath):
        OutputFiles(tmp_path / "out").images({"9": {"images": [file(filename, subfolder)]}})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.PNG", "image/png"),
        ("a.webm", "video/webm"),
        ("a.opus", "audio/ogg"),
        ("a.latent", "application/octet-stream"),
        ("a", "application/octet-stream"),
    ],
)
def test_media_types(name: str, expected: str) -> None:
    assert media_type(name) == expected
