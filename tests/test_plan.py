"""`python -m worker plan`: it says what a worker would do with a workflow, and does none of it."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from devkit.hub import Hub as StandIn
from devkit.local_worker import PROJECT
from worker import plan
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.settings import Settings
from worker.store.layout import Layout
from worker.store.partial import Partial
from worker.store.seals import Seal, whole_mtime, write_seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GB = 1_000_000_000


def weights(size_bytes: int, *, fill: int = 1) -> bytes:
    """A whole safetensors file of this length."""
    header = (
        json.dumps({"t": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes - 108]}}).encode().ljust(100)
    )
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * (size_bytes - 108)


def graph(*loaders: tuple[str, str, str]) -> dict[str, Any]:
    return {str(number): {"class_type": kind, "inputs": {name: value}} for number, (kind, name, value) in enumerate(loaders, 1)}


def lora(name: str) -> dict[str, Any]:
    return graph(("LoraLoader", "lora_name", name))


def listing(*models: tuple[str, str]) -> str:
    """A `models.toml`: folder/name and source of each."""
    return "\n".join(
        f'[[model]]\nsource = "{source}"\nfolder = "{path.partition("/")[0]}"\nname = "{path.partition("/")[2]}"\n'
        for path, source in models
    )


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    root = tmp_path_factory.mktemp("hub")
    for repo in ("org/open", "org/gated", "org/private"):
        (root / repo).mkdir(parents=True)
        (root / repo / "a.safetensors").write_bytes(weights(3_000_000))
    (root / "org/open/b.safetensors").write_bytes(weights(2_000_000, fill=2))
    with StandIn(root, gated=["org/gated"], private=["org/private"], tokens={"hf_all": ["*"]}) as hub:
        yield hub


class Planner:
    """A volume, an image and a hub, and the command run on them."""

    def __init__(self, tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
        self.stand_in = stand_in
        self.volume = tmp_path / "volume"
        self.comfyui = tmp_path / "comfyui"
        self.environ = {"VOLUME_PATH": str(self.volume), "COMFYUI_DIR": str(self.comfyui), "HF_ENDPOINT": stand_in.endpoint}
        self._workflow = tmp_path / "workflow.json"
        self._capsys = capsys
        self.comfyui.mkdir()
        self.volume.mkdir()

    def put(self, path: Path | str, data: bytes = weights(1000)) -> Path:
        target = self.volume / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return target

    def run(self, document: Mapping[str, Any] | bytes, *argv: str, **environ: str) -> tuple[int, str]:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self._workflow.write_bytes(data)
        settings = Settings.from_env({**self.environ, **environ})
        tokens = credentials(settings.hf_endpoint, settings.hf_token, settings.civitai_token)
        status = plan.run([str(self._workflow), *argv], settings, Hub(settings.hf_endpoint, Network(tokens), patience_s=0.2))
        return status, self._capsys.readouterr().out

    def report(self, document: Mapping[str, Any] | bytes, **environ: str) -> dict[str, Any]:
        status, out = self.run(document, "--json", **environ)
        said: dict[str, Any] = json.loads(out)
        assert status == (0 if said["can_run"] else 1)
        return said

    def item(self, document: Mapping[str, Any] | bytes, **environ: str) -> dict[str, Any]:
        """The only model of the workflow."""
        (item,) = self.report(document, **environ)["models"]
        return dict(item)


@pytest.fixture
def planner(tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> Iterator[Planner]:
    yield Planner(tmp_path, stand_in, capsys)
    stand_in.reset()


# --- what is there ------------------------------------------------------------------------------


def test_a_sealed_file_is_on_the_volume_and_an_unsealed_one_was_put_there_by_hand(planner: Planner) -> None:
    path = planner.put("models/loras/x.safetensors")
    item = planner.item(lora("x.safetensors"))
    assert (item["state"], item["size_bytes"], item["path"]) == ("by hand", 1000, str(path))
    seal = Seal(size=1000, mtime=whole_mtime(path.stat()), sha256="ab" * 32)
    write_seal(Layout(planner.volume).seal("loras", "x.safetensors"), seal)
    item = planner.item(lora("x.safetensors"))
    assert (item["state"], item["sha256"], item["blocking"]) == ("volume", "ab" * 32, False)


def test_a_file_that_is_shorter_than_its_header_says_stands_in_the_way(planner: Planner) -> None:
    path = planner.put("models/loras/x.safetensors", weights(1000)[:600])
    item = planner.item(lora("x.safetensors"))
    assert (item["state"], item["blocking"], item["code"]) == ("incomplete", True, "file_incomplete")
    assert str(path) in item["message"]


def test_models_of_the_image_and_of_the_containers_disk_count_as_there(planner: Planner) -> None:
    planner.put(planner.comfyui / "models/vae/in_image.safetensors")
    planner.put(planner.comfyui / "container-volume/models/loras/local.safetensors")
    loaders = ("VAELoader", "vae_name", "in_image.safetensors"), ("LoraLoader", "lora_name", "local.safetensors")
    report = planner.report(graph(*loaders))
    assert [item["state"] for item in report["models"]] == ["image", "container"]
    assert report["can_run"]


def test_a_folder_that_comfyui_reads_under_another_name_counts(planner: Planner) -> None:
    planner.put("models/unet/flux.safetensors")
    item = planner.item(graph(("UNETLoader", "unet_name", "flux.safetensors")))
    assert (item["state"], item["folder"]) == ("by hand", "unet")


def test_a_loader_that_nobody_knows_may_read_any_folder(planner: Planner) -> None:
    planner.put("models/sams/strange.pth", b"x")
    item = planner.item(graph(("StrangeLoader", "weights", "strange.pth")))
    assert (item["state"], item["folder"]) == ("by hand", "sams")


def test_the_machines_cache_is_used_before_anything_is_fetched(planner: Planner) -> None:
    planner.put("models.toml", listing(("loras/x.safetensors", "hf://org/open/a.safetensors")).encode())
    repo = Layout(planner.volume).host_cache_repo("org/open")
    planner.put(repo / "refs/main", b"c0ffee\n")
    planner.put(repo / "snapshots/c0ffee/a.safetensors", weights(5000))
    report = planner.report(lora("x.safetensors"))
    (item,) = report["models"]
    assert (item["state"], item["size_bytes"], report["fetch"]["files"]) == ("host cache", 5000, 0)
    assert planner.stand_in.requests == []
    planner.put(repo / "snapshots/c0ffee/a.safetensors", weights(5000)[:4000])
    assert planner.item(lora("x.safetensors"))["state"] == "fetch", "a file that is cut short there is not used"


# --- what would be fetched ----------------------------------------------------------------------


def test_what_is_missing_comes_with_its_source_the_list_that_knows_it_and_its_size(planner: Planner) -> None:
    manifest = planner.put("models.toml", listing(("loras/x.safetensors", "hf://org/open/a.safetensors")).encode())
    report = planner.report(lora("x.safetensors"))
    (item,) = report["models"]
    assert item["state"] == "fetch"
    assert item["source"] == "hf://org/open/a.safetensors"
    assert item["known_by"] == str(manifest)
    assert item["size_bytes"] == 3_000_000
    assert len(item["sha256"]) == 64
    assert report["fetch"] == {"files": 1, "bytes": 3_000_000, "unknown_sizes": 0}
    assert report["target"]["path"] == str(planner.volume)
    assert report["can_run"]


def test_nothing_is_downloaded_and_nothing_is_written(planner: Planner) -> None:
    planner.put("models.toml", listing(("loras/x.safetensors", "hf://org/open/a.safetensors")).encode())
    planner.put("models/vae/y.safetensors")
    before = {path: path.stat().st_mtime_ns for path in planner.volume.rglob("*")}
    assert planner.run(graph(("LoraLoader", "lora_name", "x.safetensors"), ("VAELoader", "vae_name", "y.safetensors")))[0] == 0
    assert planner.stand_in.bytes_sent("*.safetensors") == 0
    assert {request.origin for request in planner.stand_in.requests} == {"hub"}
    assert {path: path.stat().st_mtime_ns for path in planner.volume.rglob("*")} == before
    assert not list(planner.comfyui.iterdir())


def test_a_download_that_broke_off_has_to_fetch_the_rest_only(planner: Planner) -> None:
    planner.put("models.toml", listing(("loras/x.safetensors", "hf://org/open/a.safetensors")).encode())
    sha256 = planner.item(lora("x.safetensors"))["sha256"]
    partial = Partial.claim(Layout(planner.volume).partial(sha256), 3_000_000)
    partial.write(0, memoryview(weights(3_000_000))[:1_000_000])
    partial.settle()
    partial.close()
    report = planner.report(lora("x.safetensors"))
    assert report["models"][0]["begun_bytes"] == 1_000_000
    assert report["fetch"]["bytes"] == 2_000_000
    assert "1.0 MB of it are on the volume already" in planner.run(lora("x.safetensors"))[1]


def test_a_model_that_several_inputs_name_is_counted_once(planner: Planner) -> None:
    models = "loras=hf://org/open/a.safetensors"
    loaders = [("LoraLoader", "lora_name", "a.safetensors")] * 2
    report = planner.report(graph(*loaders, ("StrangeLoader", "weights", "a.safetensors")), MODELS=models)
    assert [[node["id"] for node in item["nodes"]] for item in report["models"]] == [["1", "2"], ["3"]]
    assert report["fetch"]["files"] == 1
    assert report["fetch"]["bytes"] == 3_000_000


def test_the_requests_own_models_come_first(planner: Planner) -> None:
    own = {"folder": "loras", "name": "a.safetensors", "source": "hf://org/open/b.safetensors"}
    job = {"input": {"workflow": lora("a.safetensors"), "models": [own]}}
    item = planner.item(job, MODELS="loras=hf://org/open/a.safetensors")
    assert (item["size_bytes"], item["known_by"]) == (2_000_000, "the request's 'models'")


# --- what stands in the way ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "state", "code", "said"),
    [
        ("hf://org/gated/a.safetensors", "gated", "repo_gated", "accept its terms"),
        ("hf://org/private/a.safetensors", "no access", "repo_not_found", "HF_TOKEN"),
        ("hf://org/nowhere/a.safetensors", "no access", "repo_not_found", "org/nowhere"),
        ("hf://org/open/none.safetensors", "not found", "file_not_in_repo", "none.safetensors"),
        ("hf://org/open/a.safetensors@v9", "not found", "revision_not_found", "v9"),
    ],
)
def test_a_source_that_refuses_is_told_with_what_to_do(planner: Planner, source: str, state: str, code: str, said: str) -> None:
    models = f"loras/x.safetensors={source}"
    item = planner.item(lora("x.safetensors"), MODELS=models)
    assert (item["state"], item["code"], item["blocking"]) == (state, code, True)
    assert said in item["message"]


def test_a_token_that_opens_the_repository_is_enough(planner: Planner) -> None:
    models = "loras/x.safetensors=hf://org/gated/a.safetensors"
    status, out = planner.run(lora("x.safetensors"), "--json", MODELS=models, HF_TOKEN="hf_all")
    assert status == 0
    assert "hf_all" not in out


def test_a_source_that_holds_another_file_than_promised_is_refused(planner: Planner) -> None:
    item = planner.item(lora("a.safetensors"), MODELS="loras=hf://org/open/a.safetensors#sha256=" + "0" * 64)
    assert (item["state"], item["code"]) == ("refused", "content_mismatch")


def test_a_name_that_nobody_knows_comes_with_near_ones_and_the_nodes(planner: Planner) -> None:
    models = "loras/style_ink_v2.safetensors=hf://org/open/a.safetensors"
    item = planner.item(lora("style_ink_v1.safetensors"), MODELS=models)
    assert item["state"] == "unknown"
    assert item["near"] == ["loras/style_ink_v2.safetensors"]
    assert "models/loras/style_ink_v1.safetensors" in item["message"]
    assert item["nodes"] == [{"id": "1", "class_type": "LoraLoader", "input": "lora_name"}]


def test_an_unknown_embedding_is_no_reason_not_to_run(planner: Planner) -> None:
    report = planner.report(graph(("CLIPTextEncode", "text", "a cat, embedding:nobody-knows")))
    assert [item["state"] for item in report["models"]] == ["unknown"]
    assert report["can_run"]


def test_a_name_with_two_meanings_lists_both(planner: Planner) -> None:
    models = "loras/x.safetensors=hf://org/open/a.safetensors sams/x.safetensors=hf://org/open/b.safetensors"
    item = planner.item(graph(("StrangeLoader", "weights", "x.safetensors")), MODELS=models)
    assert item["state"] == "ambiguous"
    assert len(item["candidates"]) == 2


def test_a_workflow_that_the_worker_would_refuse_cannot_run(planner: Planner) -> None:
    report = planner.report(lora("../../x.safetensors"))
    assert [problem["code"] for problem in report["problems"]] == ["unsafe_path"]
    assert [problem["code"] for problem in planner.report({})["problems"]] == ["workflow_empty"]


def test_a_wrong_manifest_is_told_and_the_other_lists_are_used(planner: Planner) -> None:
    planner.put("models.toml", b'[[model]]\nsource = "nonsense"\nfolder = "loras"\n')
    report = planner.report(lora("a.safetensors"), MODELS="loras=hf://org/open/a.safetensors")
    assert [problem["code"] for problem in report["problems"]] == ["manifest_invalid"]
    assert "line 2" in report["problems"][0]["message"]
    assert report["models"][0]["state"] == "fetch"
    planner.put("models/loras/a.safetensors")
    report = planner.report(lora("a.safetensors"))
    assert report["can_run"], "a job whose models are all there does not need the list"
    assert "line 2" in report["notes"][0]


# --- no network ---------------------------------------------------------------------------------


def test_without_network_each_model_says_so_and_the_rest_is_told(planner: Planner) -> None:
    planner.put("models/vae/there.safetensors")
    planner.stand_in.refuse("hub")
    loaders = ("LoraLoader", "lora_name", "a.safetensors"), ("VAELoader", "vae_name", "there.safetensors")
    report = planner.report(graph(*loaders), MODELS="loras=hf://org/open/a.safetensors")
    assert [item["state"] for item in report["models"]] == ["no answer", "by hand"]
    assert "refused" in report["models"][0]["message"]
    assert report["fetch"] == {"files": 1, "bytes": 0, "unknown_sizes": 1}
    assert report["can_run"], "what a worker can reach is not known here"


def test_a_source_that_never_answers_is_given_up(planner: Planner) -> None:
    planner.stand_in.fault("hang", count=None)
    settings = Settings.from_env({**planner.environ, "MODELS": "loras=hf://org/open/a.safetensors"})
    found = plan.make_plan(lora("a.safetensors"), settings, plan.make_hub(settings), deadline_s=0.3)
    assert [item.state for item in found.items] == [plan.ItemState.NO_ANSWER]


# --- room ---------------------------------------------------------------------------------------


def statvfs_with(free_of: Callable[[Path], int]) -> Any:
    real = os.statvfs

    def patched(path: str | Path) -> os.statvfs_result:
        found = list(real(path))
        found[1], found[4] = 1, free_of(Path(path))
        return os.statvfs_result(found)

    return mock.patch("os.statvfs", patched)


MODELS = {"MODELS": "loras=hf://org/open/a.safetensors"}


def test_what_does_not_fit_anywhere_cannot_run(planner: Planner) -> None:
    with statvfs_with(lambda _: 1000):
        report = planner.report(lora("a.safetensors"), **MODELS)
    (problem,) = report["problems"]
    assert problem["code"] == "volume_full"
    assert str(planner.volume) in problem["message"]


def test_what_the_volume_cannot_take_goes_to_the_containers_disk_unless_that_is_forbidden(planner: Planner) -> None:
    with statvfs_with(lambda path: 1000 if path == planner.volume else GB):
        report = planner.report(lora("a.safetensors"), **MODELS)
        refused = planner.report(lora("a.safetensors"), REQUIRE_VOLUME="true", **MODELS)
    assert report["can_run"]
    assert report["target"] == {"path": str(planner.comfyui / "container-volume"), "free_bytes": GB}
    assert "no room" in report["notes"][0]
    assert [problem["code"] for problem in refused["problems"]] == ["volume_full"]


def test_without_a_volume_models_go_to_the_containers_disk_unless_that_is_forbidden(planner: Planner) -> None:
    planner.volume.rmdir()
    report = planner.report(lora("a.safetensors"), **MODELS)
    assert report["can_run"]
    assert "There is no network volume" in report["notes"][0]
    refused = planner.report(lora("a.safetensors"), REQUIRE_VOLUME="true", **MODELS)
    assert [problem["code"] for problem in refused["problems"]] == ["volume_missing"]


# --- what it can be given -----------------------------------------------------------------------

EDITOR = {
    "nodes": [
        {
            "id": 1,
            "type": "LoraLoader",
            "widgets_values": ["a.safetensors", 1],
            "properties": {
                "models": [
                    {
                        "name": "a.safetensors",
                        "url": "https://huggingface.co/org/open/resolve/main/a.safetensors",
                        "directory": "loras",
                    }
                ]
            },
        }
    ]
}


def png(**texts: str) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    made = [chunk(b"tEXt", f"{key}\0{text}".encode("latin-1")) for key, text in texts.items()]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + b"".join(made) + chunk(b"IEND", b"")


def test_the_editors_format_can_run_and_its_metadata_is_read(planner: Planner) -> None:
    report = planner.report(EDITOR)
    assert report["can_run"], "the worker converts it"
    (item,) = report["models"]
    assert (item["state"], item["known_by"], item["size_bytes"]) == ("fetch", "the workflow's metadata", 3_000_000)
    assert item["nodes"] == [{"id": "1", "class_type": "LoraLoader", "input": "lora_name"}]


def test_metadata_that_a_request_may_not_fetch_is_told(planner: Planner) -> None:
    foreign = json.loads(json.dumps(EDITOR).replace("https://huggingface.co/org/open/resolve/main", "https://example.com"))
    item = planner.item(foreign)
    assert (item["state"], item["code"]) == ("refused", "model_host_not_allowed")


@pytest.mark.parametrize(
    "document",
    [
        {"prompt": lora("a.safetensors"), "extra_data": {"extra_pnginfo": {"workflow": EDITOR}}},
        {"output": lora("a.safetensors"), "workflow": EDITOR},
        {"input": {"workflow": lora("a.safetensors"), "extra_pnginfo": {"workflow": EDITOR}}},
        png(prompt=json.dumps(lora("a.safetensors")), workflow=json.dumps(EDITOR)),
    ],
    ids=["a body of POST /prompt", "what the frontend saves", "a job", "a picture"],
)
def test_a_graph_that_travels_with_the_editors_metadata_is_planned_by_both(planner: Planner, document: Any) -> None:
    report = planner.report(document)
    assert report["can_run"]
    assert [item["known_by"] for item in report["models"]] == ["the workflow's metadata"]


def test_a_picture_with_compressed_text_is_read(planner: Planner) -> None:
    text = json.dumps(lora("a.safetensors")).encode()
    for kind, data in ((b"zTXt", b"prompt\0\0" + zlib.compress(text)), (b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(text))):
        picture = png()[:8] + struct.pack(">I", len(data)) + kind + data + bytes(4)
        assert planner.item(picture, **MODELS)["state"] == "fetch"


def test_standard_input_is_read(planner: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planner.put("models/loras/x.safetensors")
    given = io.TextIOWrapper(io.BytesIO(json.dumps(lora("x.safetensors")).encode()))
    monkeypatch.setattr(sys, "stdin", given)
    assert plan.run(["-"], Settings.from_env(planner.environ)) == 0
    assert "standard input: 1 model, 1 present" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data",
    [b"not json", b"\xff\xfe", png(), png(prompt="{"), b'{"1": ' + b"1" * 5000 + b"}"],
    ids=["text", "bytes", "no text", "half", "digits"],
)
def test_what_is_no_workflow_at_all_is_a_wrong_argument(
    planner: Planner, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given"
    path.write_bytes(data)
    assert plan.run([str(path)], Settings.from_env(planner.environ)) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {path}: ")
    assert "sys." not in said.err
    assert said.out == ""


@pytest.mark.parametrize("argv", [[], ["/no/such/file"], ["a", "b"], ["--wrong"]])
def test_wrong_arguments_give_2(planner: Planner, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.run(argv, Settings.from_env(planner.environ)) == 2
    assert capsys.readouterr().err


# --- how it looks -------------------------------------------------------------------------------


def test_the_table_fits_a_terminal_and_ends_with_the_verdict(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    planner.environ["MODELS"] = "loras=hf://org/open/a.safetensors loras/g.safetensors=hf://org/gated/a.safetensors"
    monkeypatch.chdir(planner.volume)
    loaders = [("LoraLoader", "lora_name", f"{name}.safetensors") for name in ("g", "a", "unknown", "there")]
    planner.put("models/loras/there.safetensors")
    status, out = planner.run(graph(*loaders))
    assert status == 1
    lines = out.splitlines()
    assert lines[0].endswith("workflow.json: 4 models, 1 present, 1 to download, 2 blocking")
    rows = [line.split() for line in lines if line.endswith(".safetensors") and line.startswith("  ") and line[2] != " "]
    assert [row[0] for row in rows] == ["by", "fetch", "GATED", "UNKNOWN"], "what is to be acted upon comes last"
    assert len({line.index("loras/") for line in lines if line[2:3].strip() and "loras/" in line}) == 1, "aligned"
    assert all(len(line) <= 80 for line in lines[1:] if str(planner.volume) not in line)
    assert lines[-1] == "CANNOT RUN: 1 gated, 1 unknown"
    assert "\x1b" not in out


def test_a_workflow_without_models_can_run(planner: Planner) -> None:
    status, out = planner.run(json.loads((PROJECT / "devkit/workflows/scale_image.json").read_text()))
    assert (status, out.splitlines()[-1]) == (0, "can run")


def test_every_workflow_of_the_project_can_be_planned(planner: Planner) -> None:
    for path in sorted((PROJECT / "devkit/workflows").glob("*.json")):
        report = planner.report(json.loads(path.read_text()))
        assert not report["problems"], path
        assert all(item["state"] == "unknown" for item in report["models"]), path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_json_is_read_in_every_encoding_that_windows_writes(encoding: str, planner: Planner) -> None:
    planner.put("models/loras/画.safetensors")
    assert planner.item(json.dumps(lora("画.safetensors"), ensure_ascii=False).encode(encoding))["state"] == "by hand"


def test_a_workflow_may_be_its_json_wrapped_or_in_a_file_of_the_request(planner: Planner) -> None:
    planner.put("models/loras/a.safetensors")
    graph = lora("a.safetensors")
    data = base64.b64encode(json.dumps(graph).encode("utf-16")).decode()
    file = {"name": "w.json", "data": data}
    for request in (
        {"workflow": json.dumps(graph)},
        {"workflow": {"prompt": graph}},
        {"workflow": {"output": graph}},
        {"workflow_from": "w.json", "files": [file]},
    ):
        assert planner.item({"input": request})["state"] == "by hand", request
    fetched = {"workflow_from": "w.json", "files": [{"name": "w.json", "url": "https://example.com/w.json"}]}
    (problem,) = planner.report({"input": fetched})["problems"]
    assert problem["code"] == "field_invalid"
    broken = {"workflow_from": "w.json", "files": [{"name": "w.json", "data": base64.b64encode(b"{\n,}").decode()}]}
    (problem,) = planner.report({"input": broken})["problems"]
    assert problem["code"] == "no_workflow_in_file"
    assert "line 2 column 1" in str(problem)


def test_what_makes_room_for_a_workflow_is_told(planner: Planner) -> None:
    path = planner.put("models/loras/old.safetensors")
    layout = Layout(planner.volume)
    size = path.stat().st_size
    seal = Seal(size=size, mtime=whole_mtime(path.stat()), sha256="ab" * 32, repo="org/open", file="old.safetensors")
    write_seal(layout.seal("loras", "old.safetensors"), seal)
    os.utime(layout.seal("loras", "old.safetensors"), (1, 1))
    report = planner.report(lora("a.safetensors"), VOLUME_KEEP_GB=str(size / 1e9), **MODELS)
    assert report["can_run"]
    assert "to remove: loras/old.safetensors" in report["notes"][0]
    assert path.exists()
