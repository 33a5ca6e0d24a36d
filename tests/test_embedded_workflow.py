"""The workflow in a picture or a video: what ComfyUI's own savers write is read back, and damage is no harm."""

from __future__ import annotations

import base64
import codecs
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.editor.embedded_workflow import MAX_TEXT_BYTES, EmbeddedTexts, embedded_workflow

if TYPE_CHECKING:
    from collections.abc import Callable

    from devkit.local_worker import LocalWorker

PROMPT: dict[str, Any] = {"1": {"class_type": "A", "inputs": {"text": "ü 中", "n": 1.5}}}
WORKFLOW: dict[str, Any] = {"nodes": [{"id": 1, "type": "A"}], "links": [], "version": 0.4}


# --- files as ComfyUI writes them ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["empty_image", "animated_png", "animated_webp", "video_mp4", "video_webm"])
def test_what_comfyui_saved_is_read_back(worker: LocalWorker, workflow: Callable[[str], dict[str, Any]], name: str) -> None:
    graph = workflow(name)
    answer = worker.runsync({"workflow": graph, "extra_pnginfo": {"workflow": WORKFLOW}})
    assert answer["status"] == "COMPLETED", answer
    items = [item for items in answer["output"].values() if isinstance(items, list) for item in items]
    (data,) = [base64.b64decode(item["data"]) for item in items if item.get("type") == "base64"]
    found = embedded_workflow(data)
    assert found is not None
    assert found.workflow == WORKFLOW
    assert found.prompt is not None
    assert {key: each["inputs"] for key, each in found.prompt.items()} == {key: each["inputs"] for key, each in graph.items()}
    assert found.best is found.prompt


# --- every way to write a text into a PNG --------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def text(value: Any, *, ascii_only: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode()


PNGS = {
    "tEXt": png(chunk(b"tEXt", b"prompt\0" + text(PROMPT)), chunk(b"tEXt", b"workflow\0" + text(WORKFLOW))),
    "zTXt": png(chunk(b"zTXt", b"prompt\0\0" + zlib.compress(text(PROMPT)))),
    "iTXt": png(chunk(b"iTXt", b"prompt\0\0\0en\0Prompt\0" + text(PROMPT, ascii_only=False))),
    "iTXt, packed": png(chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(text(PROMPT, ascii_only=False)))),
    "comf": png(chunk(b"comf", b"prompt\0" + text(PROMPT))),
}


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_may_hold_it_in_any_text_chunk(kind: str) -> None:
    found = embedded_workflow(PNGS[kind])
    assert found is not None
    assert found.prompt == PROMPT


def test_a_workflow_alone_is_what_there_is_to_run() -> None:
    found = embedded_workflow(png(chunk(b"tEXt", b"workflow\0" + text(WORKFLOW))))
    assert found == EmbeddedTexts(None, WORKFLOW)
    assert found is not None
    assert found.best == WORKFLOW


def test_what_the_engine_noted_while_it_ran_is_left_out() -> None:
    noted = {"1": PROMPT["1"] | {"is_changed": [float("nan")]}}
    found = embedded_workflow(png(chunk(b"tEXt", b"prompt\0" + text(noted))))
    assert found is not None
    assert found.prompt == PROMPT


@pytest.mark.parametrize(
    ("data", "prompt", "workflow"),
    [
        (text(PROMPT), PROMPT, None),
        (b"\xef\xbb\xbf \n" + text(WORKFLOW), None, WORKFLOW),
        (b"  \n" + text(WORKFLOW), None, WORKFLOW),
        (text(PROMPT).decode().encode("utf-16"), PROMPT, None),
        (codecs.BOM_UTF16_BE + text(WORKFLOW).decode().encode("utf-16-be"), None, WORKFLOW),
    ],
)
def test_a_json_file_is_told_by_its_shape(data: bytes, prompt: Any, workflow: Any) -> None:
    assert embedded_workflow(data) == EmbeddedTexts(prompt, workflow)


# --- nothing in it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xd8\xff\xe0 a JPEG",
        png(),
        png(chunk(b"tEXt", b"prompt\0not json")),
        png(chunk(b"tEXt", b"prompt\0[1]")),
        png(chunk(b"tEXt", b"workflow\0" + text(PROMPT))),
        png(chunk(b"zTXt", b"prompt\0\0broken")),
        png(chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b'{"a": "' + b" " * (MAX_TEXT_BYTES + 10) + b'"}'))),
        png(chunk(b"tEXt", b"parameters\0steps: 20")),
        b"RIFF\x10\0\0\0WEBPEXIF\xff\xff\xff\xffII*\0\x08\0\0\0\xff\xff",
        b"\0\0\0\x08ftyp" + b"\0\0\0\x08moov" * 1000,
        b"\0\0\0\x08ftyp\0\0\0\1moov" + b"\xff" * 8,
        b"\x1a\x45\xdf\xa3\xff\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff",
    ],
)
def test_a_file_without_one_gives_none(data: bytes) -> None:
    assert embedded_workflow(data) is None


HEADS = [
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\0\0\0\0WEBPEXIF\x40\0\0\0II*\0",
    b"\0\0\0\x08ftyp",
    b"\x1a\x45\xdf\xa3",
    b"{",
    *PNGS.values(),
]


@given(head=st.sampled_from(HEADS), cut=st.integers(0, 400), tail=st.binary(max_size=300))
def test_damage_of_any_kind_is_no_harm(head: bytes, cut: int, tail: bytes) -> None:
    found = embedded_workflow(head[: max(cut, 12)] + tail)
    assert found is None or found.prompt is not None or found.workflow is not None
