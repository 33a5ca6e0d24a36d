"""Workflows as the editor saves them, and files that carry one, through the worker and the real ComfyUI."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
import threading
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

import pytest

from devkit.local_worker import PROJECT, LocalWorker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from devkit.engine.build import Engine

    Load = Callable[[str], dict[str, Any]]


def editor(colour: int = 255, prefix: str = "editor") -> dict[str, Any]:
    """EmptyImage through a Reroute into SaveImage, as frontend 1.32 saves it, with a note beside."""
    return {
        "last_node_id": 4,
        "last_link_id": 2,
        "version": 0.4,
        "nodes": [
            node(1, "EmptyImage", [64, 64, 1, colour], outputs=[("IMAGE", "IMAGE", [1])]),
            node(2, "Reroute", None, inputs=[("", "*", 1)], outputs=[("", "IMAGE", [2])]),
            node(3, "SaveImage", [prefix], inputs=[("images", "IMAGE", 2)]),
            node(4, "Note", ["ignore me"]),
        ],
        "links": [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 3, 0, "IMAGE"]],
        "groups": [],
        "config": {},
        "extra": {},
    }


def node(number: int, kind: str, values: Any, inputs: Any = (), outputs: Any = ()) -> dict[str, Any]:
    return {
        "id": number,
        "type": kind,
        "pos": [number * 100, 0],
        "size": [200, 100],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [{"name": name, "type": type_, "links": links} for name, type_, links in outputs],
        "properties": {"Node name for S&R": kind},
        **({} if values is None else {"widgets_values": values}),
    }


def picture(answer: dict[str, Any]) -> bytes:
    assert answer["status"] == "COMPLETED", answer
    (item,) = answer["output"]["images"]
    return base64.b64decode(item["data"])


def test_a_workflow_as_the_editor_saves_it_runs_and_is_embedded_in_its_picture(worker: LocalWorker) -> None:
    png = picture(worker.runsync({"workflow": editor()}))
    assert b"ignore me" in png
    assert png.startswith(b"\x89PNG")


def test_a_picture_can_be_sent_as_the_workflow_that_made_it(worker: LocalWorker) -> None:
    first = picture(worker.runsync({"workflow": editor(colour=77)}))
    carrier = {"name": "made.png", "image": base64.b64encode(first).decode()}
    answer = worker.runsync({"workflow_from": "made.png", "images": [carrier], "set": {"SaveImage.filename_prefix": "again"}})
    assert answer["output"]["images"][0]["filename"].startswith("again")
    assert pixels(picture(answer)) == pixels(first)


class Site:
    """Serves one picture, and says how often it was asked for."""

    def __init__(self, body: bytes) -> None:
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/made.png"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def carrying(prompt: dict[str, Any]) -> bytes:
    """A white picture whose text comes behind its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff" * 24) * 8))
    return (
        b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"tEXt", b"prompt\0" + json.dumps(prompt).encode()) + chunk(b"IEND", b"")
    )


def test_a_picture_at_an_address_is_fetched_once_though_it_is_the_workflow_and_its_input(
    engine: Engine, tmp_path: Path
) -> None:
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "made.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "again"}},
    }
    (tmp_path / "volume").mkdir()
    with (
        Site(carrying(graph)) as site,
        LocalWorker(engine, tmp_path, tmp_path / "volume", {"INPUT_URL_ALLOW_PRIVATE": "127.0.0.1"}) as own,
    ):
        own.wait_ready()
        answer = own.runsync({"workflow_from": "made.png", "images": [{"name": "made.png", "url": site.url}]})
        assert answer["output"]["images"][0]["filename"].startswith("again")
        assert zlib.decompressobj().decompress(pixels(picture(answer))[4:])[1:4] == b"\xff\xff\xff"
        assert site.asked == ["/made.png"]
        assert [
            path for path in (own.base_dir / "input").rglob("*") if path.is_file()
        ] == []  # newer ones make input/3d at start


def pixels(png: bytes) -> bytes:
    at = png.index(b"IDAT")
    return png[at : at + int.from_bytes(png[at - 4 : at], "big")]


def test_values_can_be_set_by_id_title_or_class_in_either_format(worker: LocalWorker, workflow: Load) -> None:
    plain = picture(worker.runsync({"workflow": editor(colour=1)}))
    by_class = picture(worker.runsync({"workflow": editor(colour=9), "set": {"EmptyImage.color": 1}}))
    by_id = picture(worker.runsync({"workflow": editor(colour=9), "set": {"1.color": 1}}))
    assert pixels(plain) == pixels(by_class) == pixels(by_id)
    api = worker.runsync({"workflow": workflow("empty_image"), "set": {"SaveImage.filename_prefix": "chosen"}})
    assert api["output"]["images"][0]["filename"].startswith("chosen")


def test_seeds_stay_as_saved_unless_another_is_asked_for(worker: LocalWorker, workflow: Load) -> None:
    def sampled(**more: Any) -> bytes:
        return pixels(picture(worker.runsync({"workflow": workflow("text_to_image"), **more})))

    assert sampled() == sampled()
    assert sampled(seed=5) == sampled(seed=5) != sampled()
    assert sampled(seed="random") != sampled(seed="random")


@pytest.mark.parametrize(
    ("job_input", "code", "words"),
    [
        ({"workflow": {**editor(), "nodes": [node(1, "NoSuchNode", [])], "links": []}}, "unknown_nodes", "NoSuchNode"),
        ({"workflow": editor(), "set": {"KSampler.seed": 1}}, "override_invalid", "KSampler.seed"),
        ({"workflow": editor(), "set": [1]}, "field_invalid", "'set'"),
        ({"workflow": editor(), "seed": "sometimes"}, "field_invalid", "'seed'"),
        ({"workflow_from": "a.png"}, "field_invalid", "'workflow_from'"),
        ({"workflow": editor(), "workflow_from": "a.png"}, "field_invalid", "in place of 'workflow'"),
        ({"workflow_from": "a.png", "images": [{"name": "a.png", "image": "QUJD"}]}, "no_workflow_in_file", "'a.png'"),
        (
            {"workflow_from": "w.json", "files": [{"name": "w.json", "data": "ewosfQ=="}]},
            "no_workflow_in_file",
            "line 2 column 1",
        ),
        ({"workflow": {"nodes": "x", "links": []}}, "workflow_invalid", "node nodes is a string"),
        ({"workflow": {**editor(), "links": "x"}}, "ui_workflow_invalid", ""),
        ({"workflow": {"nodes": [], "links": []}}, "workflow_empty", "no nodes"),
    ],
)
def test_what_cannot_be_converted_faithfully_is_refused_in_a_sentence(
    job_input: dict[str, Any], code: str, words: str, worker: LocalWorker
) -> None:
    answer = worker.runsync(job_input)
    assert answer["status"] == "FAILED", answer
    assert words in answer["error"]
    assert answer["error"].count("\n") == 0
    assert code in worker.log_tail(6), worker.log_tail(6)


def converted(*arguments: str, port: str) -> subprocess.CompletedProcess[str]:
    """What `python -m worker convert` prints, asking the ComfyUI on a port."""
    return subprocess.run(
        [sys.executable, "-m", "worker", "convert", *arguments],
        cwd=PROJECT,
        env={**os.environ, "COMFYUI_PORT": port},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_prints_what_the_editor_would_send(worker: LocalWorker, tmp_path: Path) -> None:
    path = tmp_path / "ui.json"
    path.write_text(json.dumps(editor(colour=3)))
    done = converted(str(path), port=worker.comfyui_port)
    assert done.returncode == 0, done.stderr
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.comfyui_port}/object_info/EmptyImage", timeout=30) as answer:
        title = json.load(answer)["EmptyImage"]["display_name"]  # "EmptyImage" up to 0.3.75, "Empty Image" later
    assert json.loads(done.stdout) == {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 3},
            "_meta": {"title": title},
        },
        "3": {
            "class_type": "SaveImage",
            "inputs": {"filename_prefix": "editor", "images": ["1", 0]},
            "_meta": {"title": "Save Image"},
        },
    }
    picture(worker.runsync({"workflow": json.loads(done.stdout)}))


@pytest.mark.parametrize(("content", "words"), [(b"no json", "contains no workflow"), (None, "cannot be read")])
def test_the_command_says_in_a_line_what_it_cannot_read(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ui.json"
    if content:
        path.write_bytes(content)
    done = converted(str(path), port="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert words in done.stderr


def test_the_command_says_whom_it_asked(tmp_path: Path) -> None:
    path = tmp_path / "ui.json"
    path.write_text(json.dumps(editor()))
    done = converted(str(path), port="1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No ComfyUI answers at 127.0.0.1:1" in done.stderr
