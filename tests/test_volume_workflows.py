"""Workflows that are kept on the volume: found by name, never from elsewhere, by a job, the plan, the seeder and the client."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import unicodedata
from typing import TYPE_CHECKING, Any

import pytest

from client.request import Wishes, build
from devkit.hub import Hub as StandIn
from devkit.s3 import S3Server
from worker import plan
from worker.errors import NoWorkflowInFile, UnsafePath, WorkflowUnknown
from worker.seed.s3_api import S3Api, S3Place
from worker.seed.s3_volume import S3Volume
from worker.seed.seed_command import USAGE, run
from worker.settings import Settings
from worker.volume_workflows import is_workflow_name, read_workflow, workflow_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devkit.local_worker import LocalWorker

TINY: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "named"}},
}
LORA: dict[str, Any] = {"1": {"class_type": "LoraLoader", "inputs": {"lora_name": "a.safetensors"}}}
SAVED: dict[str, Any] = {
    "nodes": [
        {
            "id": 1,
            "type": "EmptyImage",
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "widgets_values": [64, 64, 1, 255],
        },
        {
            "id": 2,
            "type": "SaveImage",
            "mode": 0,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
            "outputs": [],
            "widgets_values": ["saved"],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "version": 0.4,
}


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A volume with workflows: `tiny`, `upscale/4x`, `lora`, and files that are none."""
    folder = tmp_path / "volume/workflows"
    (folder / "upscale").mkdir(parents=True)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "upscale/4x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY).encode())
    (folder / "lora.json").write_text(json.dumps(LORA))
    (folder / "broken.json").write_text("{")
    (folder / "notes.txt").write_text("no workflow")
    (folder / "folder.json").mkdir()
    return tmp_path / "volume"


@pytest.mark.parametrize("name", ["tiny", "tiny.json", "upscale/4x", "upscale\\4x"])
def test_a_workflow_is_found_by_its_name(name: str, shelf: Path) -> None:
    assert read_workflow(shelf, name) == TINY


def test_an_unknown_name_lists_what_there_is(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkflowUnknown) as caught:
        read_workflow(shelf, "portrait")
    assert caught.value.details() == workflow_names(shelf) == ["broken", "lora", "tiny", "upscale/4x"]
    assert "no workflow 'portrait' (there are broken, lora, tiny, upscale/4x); put it there" in str(caught.value)
    for name in ("folder", "tiny/below", "x" * 300):
        with pytest.raises(WorkflowUnknown):
            read_workflow(shelf, name)
    with pytest.raises(WorkflowUnknown, match="there are none"):
        read_workflow(tmp_path / "no volume", "tiny")


@pytest.mark.parametrize("name", ["../models", "/etc/hostname", "a/../../b", "..\\x", "", ".", "a//b", "a\0", "half\ud83d"])
def test_no_name_leaves_the_folder(name: str, shelf: Path) -> None:
    with pytest.raises(UnsafePath):
        read_workflow(shelf, name)


@pytest.mark.parametrize("name", ["", "a/", "a//b", "a\nb", "."])
def test_a_name_that_no_file_can_have_is_not_said_to_leave_the_folder(name: str, shelf: Path) -> None:
    with pytest.raises(UnsafePath, match="which cannot be a file name there") as caught:
        read_workflow(shelf, name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsafePath, match="leaves its folder"):
        read_workflow(shelf, "../a//b")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_is_found_in_either_form(forms: tuple[Any, Any], shelf: Path) -> None:
    asked, there = (unicodedata.normalize(form, "café/für") for form in forms)
    (shelf / f"workflows/{there}.json").parent.mkdir()
    (shelf / f"workflows/{there}.json").write_text(json.dumps(TINY))
    assert read_workflow(shelf, asked) == TINY


@pytest.mark.timeout(30)
def test_what_is_no_file_is_not_read(shelf: Path) -> None:
    os.mkfifo(shelf / "workflows/pipe.json")  # with no writer, opening it waits for ever
    for name in ("pipe", "folder"):
        with pytest.raises(WorkflowUnknown, match=rf"workflows/{name}\.json is no file: put one in its place"):
            read_workflow(shelf, name)


def test_no_link_leaves_the_folder(shelf: Path) -> None:
    (shelf / "secret.json").write_text(json.dumps(TINY))
    (shelf / "workflows/link.json").symlink_to(shelf / "secret.json")
    with pytest.raises(UnsafePath, match="through a link"):
        read_workflow(shelf, "link")


def test_a_file_that_holds_no_workflow_is_said_so(shelf: Path) -> None:
    with pytest.raises(NoWorkflowInFile, match=r"broken\.json"):
        read_workflow(shelf, "broken")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"1":\n  {,}}', r"is no JSON: .*line 2 column 4"),
        ('{"1":\n  {,}}'.encode("utf-16"), r"is no JSON: .*line 2 column 4"),
        (b'{"1": "\xff"}', "is no JSON: byte 7 is no text"),
        (b"a note", r"is no JSON: .*line 1 column 1"),
        (b"[1]", "holds a JSON that is no workflow"),
        (b"{}", "holds a JSON that is no workflow"),
        (b"\0\1\2\3\0", "contains no workflow: use a PNG"),
    ],
)
def test_a_broken_file_is_told_where(data: bytes, fault: str, shelf: Path) -> None:
    (shelf / "workflows/bad.json").write_bytes(data)
    with pytest.raises(NoWorkflowInFile, match=rf"The file 'bad\.json' {fault}"):
        read_workflow(shelf, "bad")


def test_the_json_of_a_workflow_is_no_name() -> None:
    values: list[object] = ["x", " {", "{}", {}, None, 1]
    assert [is_workflow_name(value) for value in values] == [True, False, False, False, False, False]


# --- by a job


def put(worker: LocalWorker, name: str, workflow: dict[str, Any]) -> None:
    folder = worker.folder / "volume/workflows"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(workflow))


def size(item: dict[str, Any]) -> tuple[int, int]:
    width, height = struct.unpack(">II", base64.b64decode(item["data"])[16:24])
    return width, height


def test_a_job_runs_a_workflow_by_name_with_values_on_top(worker: LocalWorker) -> None:
    put(worker, "by-name", TINY)
    answer = worker.runsync({"workflow": "by-name", "set": {"1.width": 96}})
    assert answer["status"] == "COMPLETED", answer
    (item,) = answer["output"]["images"]
    assert (item["filename"][:5], size(item)) == ("named", (96, 64))


def test_a_job_runs_a_saved_workflow_by_name(worker: LocalWorker) -> None:
    put(worker, "saved", SAVED)
    answer = worker.runsync({"workflow": "saved", "set": {"EmptyImage.height": 32}})
    assert answer["status"] == "COMPLETED", answer
    (item,) = answer["output"]["images"]
    assert (item["filename"][:5], size(item)) == ("saved", (64, 32))
    assert b"tEXtworkflow" in base64.b64decode(item["data"])  # as the editor embeds it


def test_a_job_with_an_unknown_name_is_told_those_that_there_are(worker: LocalWorker) -> None:
    put(worker, "known", TINY)
    answer = worker.runsync({"workflow": "unknown"})
    assert answer["status"] == "FAILED"
    assert "no workflow 'unknown' (there are " in answer["error"]
    assert "known" in answer["error"].partition("there are")[2]
    assert "leaves its folder" in worker.runsync({"workflow": "../models.toml"})["error"]


# --- by the plan


@pytest.mark.parametrize("request_file", [False, True])
def test_the_plan_takes_the_name(
    request_file: bool,  # noqa: FBT001 - a case
    shelf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = Settings.from_env({"VOLUME_PATH": str(shelf), "COMFYUI_DIR": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})
    what = "lora"
    if request_file:
        what = str(tmp_path / "request.json")
        (tmp_path / "request.json").write_text(json.dumps({"input": {"workflow": "lora"}}))
    assert plan.run([what, "--json"], settings) == 1
    told = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in told["models"]] == ["a.safetensors"]
    assert plan.run(["portrait"], settings) == 2
    assert "there are broken, lora, tiny, upscale/4x" in capsys.readouterr().err


# --- by the seeder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    root = tmp_path_factory.mktemp("hub")
    (root / "org/open").mkdir(parents=True)
    (root / "org/open/a.safetensors").write_bytes(b"x" * 300)
    with StandIn(root) as found:
        yield found


def test_the_seeder_takes_the_name(shelf: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"HF_ENDPOINT": hub.endpoint, "VOLUME_PATH": str(shelf)}
    (shelf / "models.toml").write_text('[[model]]\nsource = "hf://org/open/a.safetensors"\nfolder = "loras"\n')
    stream = io.StringIO()
    assert run(["lora", "--dry-run", "--json"], environ, stream) == 0
    (event,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [model["model"] for model in event["models"]] == ["loras/a.safetensors"]
    assert run(["portrait", "--dry-run"], environ, stream) == USAGE
    assert "the volume's workflows are broken, lora, tiny, upscale/4x" in stream.getvalue() + capsys.readouterr().err


def test_a_volume_through_s3_has_workflows_too() -> None:
    with S3Server() as server:
        bucket = server.bucket("vol1")
        for name in ("tiny", "upscale/4x"):
            server.client.put_object(Bucket=bucket, Key=f"workflows/{name}.json", Body=json.dumps(TINY).encode())
        volume = S3Volume(S3Api(S3Place(bucket, "EU-RO-1", server.endpoint_url), server.client))
        assert volume.workflow_names() == ["tiny", "upscale/4x"]
        assert json.loads(volume.workflow("upscale/4x") or b"") == TINY
        assert volume.workflow("portrait") is None
        server.client.put_object(Bucket=bucket, Key="workflows/cafe\u0301.json", Body=json.dumps(TINY).encode())
        assert volume.workflow("caf\u00e9") is not None
        assert volume.workflow("../models.toml") is None


# --- by the client


@pytest.mark.parametrize("name", ["portrait", "upscale/4x", "hochformat ü"])
def test_the_client_sends_the_name_of_what_is_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = build(Wishes(name, values=["6.text=a fox"], seed="random"))
    assert job == {"input": {"workflow": name, "set": {"6.text": "a fox"}, "seed": "random"}}


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "portrait").write_text(json.dumps(TINY))
    assert build(Wishes("portrait")) == {"input": {"workflow": TINY}}
    (tmp_path / "request.json").write_text(json.dumps({"workflow": "portrait", "seed": 1}))
    assert build(Wishes("request.json")) == {"input": {"workflow": "portrait", "seed": 1}}


def test_the_client_sends_a_json_as_windows_powershell_writes_it(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_bytes(json.dumps(TINY).encode("utf-16"))
    assert build(Wishes(str(tmp_path / "w.json"))) == {"input": {"workflow": TINY}}
