"""`scripts/seed_volume.py`: what it takes, where it puts it, what it says and how it ends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from devkit.hub import Hub as StandIn
from devkit.local_worker import PROJECT
from devkit.s3 import RunPodProxy, S3Server
from worker.fetch.http import Network
from worker.fetch.hub import Hub
from worker.model_spec import HubFile, ModelSpec
from worker.seed import seeding
from worker.seed.s3_api import DATACENTERS
from worker.seed.seed_command import FAILED, STOPPED, USAGE, run
from worker.store.layout import Layout
from worker.store.seals import read_seal
from worker.store.store import Store
from worker.store.tombstones import tombstone_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devkit.moosefs import MooseFS

SIZE = 300_000
PART = 8 << 20
PARTS = 14  # of two killed runs each sends two, and four more may be on the way: enough is left to hold, and to send at last
MANIFEST = '[[model]]\nsource = "hf://org/open/a.safetensors"\nfolder = "loras"\n'


def weights(fill: int, size_bytes: int = SIZE) -> bytes:
    """A whole safetensors file."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [size_bytes - 108], "data_offsets": [0, size_bytes - 108]}})
    return (100).to_bytes(8, "little") + header.encode().ljust(100) + bytes([fill]) * (size_bytes - 108)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    root = tmp_path_factory.mktemp("hub")
    for repo in ("org/open", "org/gated"):
        (root / repo / "deep").mkdir(parents=True)
        for fill, name in enumerate(("a", "b", "deep/c", "deep/a"), 1):
            (root / repo / f"{name}.safetensors").write_bytes(weights(fill))
    (root / "org/open/readme.md").write_bytes(b"read me")
    (root / "org/large").mkdir()
    (root / "org/large/large.safetensors").write_bytes(weights(3, PARTS * PART))
    with StandIn(root, gated=["org/gated"]) as hub:
        yield hub


class Seeder:
    """A mounted volume and a hub, and the command run on them."""

    def __init__(self, tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = tmp_path
        self.volume = tmp_path / "volume"
        self.volume.mkdir()
        self.layout = Layout(self.volume)
        self.environ = {"HF_ENDPOINT": stand_in.endpoint, "VOLUME_PATH": str(self.volume)}
        self.stand_in = stand_in
        self._capsys = capsys

    def run(self, *argv: str | Path) -> tuple[int, str]:
        """The exit code, and everything it said."""
        stream = io.StringIO()
        code = run([str(word) for word in argv], self.environ, stream)
        return code, stream.getvalue() + self._capsys.readouterr().err

    def events(self, *argv: str | Path) -> tuple[int, list[dict[str, Any]]]:
        code, text = self.run(*argv, "--json")
        return code, [json.loads(line) for line in text.splitlines()]

    def write(self, name: str, content: object) -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    @property
    def models(self) -> list[str]:
        return sorted(str(path.relative_to(self.layout.models)) for path in self.layout.models.rglob("*") if path.is_file())

    def is_ready(self, model: str) -> bool:
        nowhere = Hub("http://127.0.0.1:9", Network())
        return Store(self.layout, nowhere, "worker").ready(*model.split("/", 1)) is not None


@pytest.fixture
def seeder(tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> Seeder:
    stand_in.reset()
    return Seeder(tmp_path, stand_in, capsys)


# --- what it takes ------------------------------------------------------------------------------


def graph(name: str) -> dict[str, Any]:
    return {"1": {"class_type": "LoraLoader", "inputs": {"lora_name": name}}}


def editors(name: str, **properties: Any) -> dict[str, Any]:
    return {"nodes": [{"id": 1, "type": "LoraLoader", "mode": 0, "widgets_values": [name, 1.0], "properties": properties}]}


SOURCE = "https://huggingface.co/org/open/resolve/main/a.safetensors"
KNOWN = {"models": [{"name": "a.safetensors", "url": SOURCE, "directory": "loras"}]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("models.toml", MANIFEST),
        ("m.json", {"models": [{"folder": "loras", "source": "hf://org/open/a.safetensors"}]}),
        ("comfy-lock.yaml", f"models:\n  - url: {SOURCE}\n    paths:\n      - path: models/loras/a.safetensors\n"),
        ("request.json", {"input": {"workflow": graph("a.safetensors"), "models": ["loras=hf://org/open/a.safetensors"]}}),
        ("saved.json", {"prompt": graph("a.safetensors"), "workflow": editors("a.safetensors", **KNOWN)}),
        ("editor.json", editors("a.safetensors", **KNOWN)),
    ],
)
def test_manifests_and_workflows_in_every_format(seeder: Seeder, name: str, content: object) -> None:
    assert seeder.run(seeder.write(name, content))[0] == 0
    assert seeder.models == ["loras/a.safetensors"]
    assert seeder.is_ready("loras/a.safetensors")


def test_a_workflow_is_looked_up_in_the_manifests_that_are_given_with_it(seeder: Seeder) -> None:
    manifest = seeder.write("mine.toml", MANIFEST.replace("loras", "loras") + 'name = "mine.safetensors"\n')
    for content in (graph("mine.safetensors"), editors("mine.safetensors")):
        code, [*_, summary] = seeder.events(seeder.write("w.json", content), manifest)
        assert code == 0
        assert [outcome["model"] for outcome in summary["outcomes"]] == ["loras/mine.safetensors"]


def test_one_odd_name_in_a_manifest_is_told_and_leaves_the_others_alone(seeder: Seeder) -> None:
    odd = '[[model]]\nsource = "hf://org/open/b.safetensors"\nfolder = "vae"\nname = "a\\u0007b.safetensors"\n'
    seeder.layout.manifest.write_text(MANIFEST + odd)
    for argv in ((), (seeder.write("mine.toml", MANIFEST + odd),)):
        code, text = seeder.run(*argv)
        assert code == FAILED
        assert text.count("name holds characters that cannot be printed") >= 1
        assert seeder.models == ["loras/a.safetensors"]


def test_addresses_patterns_and_short_lines(seeder: Seeder) -> None:
    assert seeder.run("hf://org/open/b.safetensors", "--folder", "vae")[0] == 0
    assert seeder.run("loras/x/y.safetensors=hf://org/open/a.safetensors")[0] == 0
    assert seeder.models == ["loras/x/y.safetensors", "vae/b.safetensors"]
    assert seeder.run("hf://org/open/*.safetensors", "--folder", "unet")[0] == 0
    assert seeder.models[:-1] == [
        "loras/x/y.safetensors",
        "unet/a.safetensors",
        "unet/b.safetensors",
        "unet/c.safetensors",
        "unet/deep/a.safetensors",
    ]


def test_the_name_of_an_official_template(seeder: Seeder) -> None:
    code, [*_, dry] = seeder.events("flux_dev_checkpoint_example", "--dry-run")
    assert code == FAILED  # the stand-in holds none of these
    assert {"diffusion_models/flux1-dev.safetensors", "vae/ae.safetensors"} <= {line["model"] for line in dry["models"]}


def test_a_workflow_that_its_comfyui_cannot_run_is_said_so_before_its_models_are_sent(seeder: Seeder) -> None:
    graph = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": "b.safetensors"}},
        "2": {"class_type": "QwenImage21Cache", "inputs": {"model": ["1", 0]}},
    }
    seeder.environ["MODELS"] = "vae=hf://org/open/b.safetensors"
    code, events = seeder.events(seeder.write("flow.json", graph))
    first, *others = events
    assert "flow.json CANNOT RUN; its models are sent all the same." in first["text"], events
    assert "needs a newer one for QwenImage21Cache (node 2)" in first["text"]
    assert "vae/b.safetensors" in json.dumps(others)
    assert (code, seeder.models) == (0, ["vae/b.safetensors"])
    _, text = seeder.run("audio_yue2_music_cover", "--dry-run")
    assert "warning: audio_yue2_music_cover CANNOT RUN" in text
    assert "YuE2GenerateMusic (node 25)" in text
    _, text = seeder.run("flux_dev_checkpoint_example", "--dry-run")
    assert "CANNOT RUN" not in text


def test_without_a_what_the_lists_of_the_volume_are_meant(seeder: Seeder) -> None:
    seeder.layout.manifest.write_text(MANIFEST)
    seeder.environ["MODELS"] = "vae=hf://org/open/b.safetensors"
    assert seeder.run()[0] == 0
    assert seeder.models == ["loras/a.safetensors", "vae/b.safetensors"]


# --- how it ends --------------------------------------------------------------------------------


def test_what_is_there_is_not_fetched_again(seeder: Seeder) -> None:
    manifest = seeder.write("models.toml", MANIFEST)
    seeder.run(manifest)
    seeder.stand_in.clear_log()
    code, text = seeder.run(manifest)
    assert code == 0
    assert "was there" in text
    assert seeder.stand_in.bytes_sent("*a.safetensors") == 0


def test_one_that_fails_leaves_the_others_alone(seeder: Seeder) -> None:
    code, text = seeder.run("loras=hf://org/gated/a.safetensors", "vae=hf://org/open/b.safetensors", "vae=hf://org/none/b.sft")
    assert code == FAILED
    assert "HF_TOKEN" in text
    assert "2 failed" in text
    assert [code for code in _codes(seeder) if code] == ["repo_gated", "repo_not_found"]
    assert seeder.models == ["vae/b.safetensors"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_fetched(seeder: Seeder) -> None:
    seeder.stand_in.clear_log()
    code, text = seeder.run("loras=hf://org/open/a.safetensors", "--volume", "/proc")
    assert code == FAILED
    assert "/proc cannot be written (No such file or directory): mount it writable" in text
    assert seeder.stand_in.bytes_sent("*a.safetensors") == 0


def test_a_source_that_does_not_answer_is_named_while_it_is_waited_for(seeder: Seeder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_SLOW_S", 0.05)
    for argv in (["--dry-run"], []):
        seeder.stand_in.fault("status", count=1)
        code, text = seeder.run("loras=hf://org/open/a.safetensors", *argv)
        assert code == 0
        assert "waiting for an answer of 127.0.0.1 about 1 model" in text


class Terminal(io.StringIO):
    """What a person sits at, who does something each time a pattern is shown."""

    def __init__(self, until: str, then: Callable[[], None]) -> None:
        super().__init__()
        self._until = re.compile(until)
        self._then = then

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        length = super().write(text)
        if self._until.search(shown(self.getvalue())):
            self._then()
        return length


def shown(text: str) -> str:
    """A terminal's text without its control sequences."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)


def test_at_a_terminal_there_are_bars_marks_and_a_summary(seeder: Seeder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    seeder.stand_in.fault("stall", file="*b.safetensors", after_bytes=SIZE // 2)
    screen = Terminal(until=r"vae/b\.safetensors +[━╸╺]", then=seeder.stand_in.release)
    argv = ["vae=hf://org/open/b.safetensors", "loras=hf://org/gated/a.safetensors"]
    assert run(argv, seeder.environ, screen) == FAILED
    text = shown(screen.getvalue())
    assert "total, 1 of 2 models" in text
    assert re.search(r"vae/b\.safetensors +[━╸╺]", text)
    assert "✓ vae/b.safetensors  seeded, 300.0 kB" in text
    assert "✗ loras/a.safetensors  FAILED" in text
    assert "1 of 2 there" in text
    assert "\x1b[?25h" in screen.getvalue()  # the cursor is back


def _codes(seeder: Seeder) -> list[str | None]:
    _, [*_, summary] = seeder.events("loras=hf://org/gated/a.safetensors", "vae=hf://org/none/b.sft")
    return [outcome["code"] for outcome in summary["outcomes"]]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["flux_dev_chekpoint_example"], "flux_dev_checkpoint_example"),
        (["hf://org/open/a.safetensors"], "--folder"),
        (["hf://nonsense", "--folder", "vae"], "hf://org/repo"),
        (["loras=hf://a"], "The argument loras=hf://a is wrong: "),
        (["--s3", "vol"], "EU-RO-1"),
        (["--s3", "vol", "--datacenter", "EU-XX-9"], ", ".join(DATACENTERS)),
        (["--s3", "vol", "--datacenter", "EU-RO-1"], "RUNPOD_S3_ACCESS_KEY_ID and RUNPOD_S3_SECRET_ACCESS_KEY"),
        (["--s3", "a", "--s3", "b", "--s3", "c", "--datacenter", "EU-RO-1", "--datacenter", "US-KS-2"], "one for each --s3"),
        (["--s3", "a", "--volume", "/x", "--datacenter", "EU-RO-1"], "not both"),
        (["--volume", "/no/such/folder"], "/no/such/folder"),
        (["--repair"], "--verify"),
        (["--prune", "--list"], ""),
        (["--prune"], "everything would go"),
        ([], "nothing to seed"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(seeder: Seeder, argv: list[str], said: str) -> None:
    code, text = seeder.run(*argv)
    assert code == USAGE
    assert said in text
    assert "Traceback" not in text
    code, _ = seeder.run(*argv, "--json")
    assert code == USAGE


def test_files_that_are_nothing_are_named(seeder: Seeder) -> None:
    for name, content in (
        ("broken.json", "{"),
        ("wrong.toml", "[[model]]\nfolder = 1"),
        ("empty.json", {"1": {"class_type": 3}}),
    ):
        code, text = seeder.run(seeder.write(name, content))
        assert code == USAGE
        assert name in text


def test_a_model_that_nobody_knows_is_reported(seeder: Seeder) -> None:
    code, text = seeder.run(seeder.write("w.json", graph("unheard-of.safetensors")))
    assert code == FAILED
    assert "unheard-of.safetensors" in text


def test_the_dry_run_writes_nothing(seeder: Seeder) -> None:
    manifest = seeder.write("models.toml", MANIFEST)
    seeder.run("vae=hf://org/open/b.safetensors")
    before = sorted(seeder.volume.rglob("*"))
    code, [dry] = seeder.events(manifest, "vae=hf://org/open/b.safetensors", "--dry-run")
    assert code == 0
    assert [(line["state"], line["size_bytes"], line["send_bytes"]) for line in dry["models"]] == [
        ("to send", SIZE, SIZE),
        ("there", SIZE, 0),
    ]
    assert dry["send_bytes"] == SIZE
    assert dry["free_bytes"] > 0
    assert sorted(seeder.volume.rglob("*")) == before
    assert "hf://org/open/a.safetensors" in seeder.run(manifest, "--dry-run")[1]


# --- upkeep -------------------------------------------------------------------------------------


def seeded(seeder: Seeder) -> None:
    assert seeder.run("loras=hf://org/open/a.safetensors", "vae=hf://org/open/b.safetensors")[0] == 0


def test_the_list_shows_what_is_sealed(seeder: Seeder) -> None:
    seeded(seeder)
    seeder.layout.model("vae", "mine.safetensors").write_bytes(weights(7))
    _, [listed] = seeder.events("--list")
    assert [(model["model"], model["fits"]) for model in listed["models"]] == [
        ("loras/a.safetensors", True),
        ("vae/b.safetensors", True),
    ]
    assert "2 sealed models, 600.0 kB" in seeder.run("--list")[1]


def test_verify_finds_a_damaged_byte_and_repairs_it(seeder: Seeder) -> None:
    seeded(seeder)
    path = seeder.layout.model("vae", "b.safetensors")
    mtime_ns = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    os.utime(path, ns=(mtime_ns, mtime_ns))
    code, events = seeder.events("--verify")
    assert code == FAILED
    verdicts = {model["model"]: model["verdict"] for model in events[-1]["models"]}
    assert verdicts == {"loras/a.safetensors": "whole", "vae/b.safetensors": "damaged"}
    assert path.read_bytes() != weights(2)
    assert seeder.run("--verify", "--repair")[0] == 0
    assert path.read_bytes() == weights(2)
    assert seeder.run("--verify")[0] == 0


def damage(path: Path) -> None:
    """Another byte, and a time as before."""
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    os.utime(path, ns=(before, before))


def verdicts_of(seeder: Seeder, *argv: str) -> dict[str, str]:
    _, events = seeder.events("--verify", *argv)
    (verified,) = (event for event in events if event["event"] == "verified")
    return {model["model"]: model["verdict"] for model in verified["models"]}


def test_repair_removes_nothing_that_it_cannot_put_back(seeder: Seeder) -> None:
    seeded(seeder)
    path = seeder.layout.model("vae", "b.safetensors")
    damage(path)
    damaged = path.read_bytes()
    seeder.stand_in.fault("status", status=404, file="*b.safetensors", count=None)
    code, text = seeder.run("--verify", "--repair")
    assert code == FAILED
    assert path.read_bytes() == damaged
    assert "Traceback" not in text
    seeder.stand_in.clear_faults()
    assert seeder.run("--verify", "--repair")[0] == 0
    assert (path.read_bytes(), seeder.is_ready("vae/b.safetensors")) == (weights(2), True)
    assert not list(seeder.layout.seals.rglob("*.pending"))


def test_repair_fetches_first_and_yields_to_a_file_that_comes_meanwhile(seeder: Seeder) -> None:
    seeded(seeder)
    path = seeder.layout.model("vae", "b.safetensors")
    damage(path)
    damaged = path.read_bytes()
    seeder.stand_in.fault("stall", file="*b.safetensors", after_bytes=1000, count=None)
    results: list[int] = []
    run = threading.Thread(target=lambda: results.append(seeder.run("--verify", "--repair")[0]))
    run.start()
    seeder.stand_in.wait_stalled(1)
    assert path.read_bytes() == damaged, "it stays until there is something to put in its place"
    mine = path.with_suffix(".mine")
    mine.write_bytes(weights(9))
    os.utime(mine, (1, 1))
    mine.replace(path)
    seeder.stand_in.clear_faults()
    run.join(60)
    assert path.read_bytes() == weights(9)
    assert results == [FAILED]


def test_a_file_that_a_person_put_over_a_sealed_one_is_named_and_left_alone(seeder: Seeder) -> None:
    seeded(seeder)
    longer, other = seeder.layout.model("loras", "a.safetensors"), seeder.layout.model("vae", "b.safetensors")
    longer.write_bytes(weights(7, SIZE + 5))
    other.write_bytes(weights(8))
    os.utime(other, (1, 1))
    assert verdicts_of(seeder) == {"loras/a.safetensors": "replaced", "vae/b.safetensors": "replaced"}
    for source_is_away in (False, True):
        if source_is_away:
            seeder.stand_in.fault("status", status=404, count=None)
        code, text = seeder.run("--verify", "--repair", *["--yes"] * source_is_away)
        assert code == FAILED
        assert "replaced by hand" in text
        assert (longer.read_bytes(), other.read_bytes()) == (weights(7, SIZE + 5), weights(8))
    seeder.stand_in.clear_faults()
    assert seeder.run("--verify", "--repair", "--yes")[0] == 0
    assert (longer.read_bytes(), other.read_bytes()) == (weights(1), weights(2))


def test_repair_brings_the_commit_that_was_sealed_where_the_list_has_no_pin(seeder: Seeder) -> None:
    seeder.layout.manifest.write_text(MANIFEST)
    assert seeder.run()[0] == 0
    path = seeder.layout.model("loras", "a.safetensors")
    seal = read_seal(seeder.layout.seal("loras", "a.safetensors"))
    assert seal is not None
    damage(path)
    seeder.stand_in.clear_log()
    assert seeder.run("--verify", "--repair")[0] == 0
    asked = {request.path.split("/")[4] for request in seeder.stand_in.requests if request.route == "resolve"}
    assert asked == {seal.commit}


WRONG = "ab" * 32


@pytest.mark.parametrize(
    ("there", "pin", "foretold"),
    [
        ("sealed", "", "there"),
        ("sealed", f'sha256 = "{WRONG}"', "there, but with the sha256"),
        ("touched", "", "there, replaced by hand"),
        ("same length", "", "there, replaced by hand"),
        ("same length", "own", "there, replaced by hand, its sha256 yet to be checked"),
        ("longer", "", "there, replaced by hand"),
        ("longer", "own", f"there, replaced by hand, with {SIZE + 5} bytes, not {SIZE}"),
        ("cut off", "", "wait for the copy to finish"),
        ("by hand", "", "there, put by hand"),
        ("by hand", "own", "there, put by hand, its sha256 yet to be checked"),
    ],
)
def test_the_dry_run_promises_nothing_that_the_run_does_not_keep(seeder: Seeder, there: str, pin: str, foretold: str) -> None:
    path = seeder.layout.model("loras", "a.safetensors")
    if there != "by hand":
        assert seeder.run(seeder.write("first.toml", MANIFEST))[0] == 0
    content = {"same length": weights(6), "longer": weights(6, SIZE + 5), "cut off": weights(6)[:-1], "by hand": weights(6)}
    if there in content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[there])
    if there != "sealed":
        os.utime(path, (1, 1))
    pin = f'sha256 = "{hashlib.sha256(weights(1)).hexdigest()}"' if pin == "own" else pin
    # The hub would refuse a pin that its file does not have before anything is looked at: this source tells no sha256.
    source = "hf://org/open/a.safetensors" if WRONG not in pin else f"{seeder.stand_in.endpoint}/files/org/open/a.safetensors"
    manifest = seeder.write("m.toml", MANIFEST.replace("hf://org/open/a.safetensors", source) + pin)
    code, [dry] = seeder.events(manifest, "--dry-run")
    (line,) = dry["models"]
    assert foretold in line["state"]
    before = path.read_bytes()
    ran = seeder.run(manifest)[0]
    assert path.read_bytes() == before
    if "yet to be checked" not in foretold:
        assert ran == code


def test_verify_seals_a_touched_file_anew_and_finds_a_missing_one(seeder: Seeder) -> None:
    seeded(seeder)
    os.utime(seeder.layout.model("loras", "a.safetensors"), (1, 1))
    seeder.layout.model("vae", "b.safetensors").unlink()
    assert not seeder.is_ready("loras/a.safetensors")
    code, events = seeder.events("--verify")
    assert code == FAILED
    verdicts = {model["model"]: model["verdict"] for model in events[-1]["models"]}
    assert verdicts == {"loras/a.safetensors": "touched", "vae/b.safetensors": "missing"}
    assert seeder.is_ready("loras/a.safetensors")
    assert seeder.run("--verify", "--repair")[0] == 0
    assert seeder.is_ready("vae/b.safetensors")


def test_prune_removes_what_no_list_names_and_never_what_a_person_put_there(seeder: Seeder) -> None:
    seeded(seeder)
    seeder.layout.model("vae", "mine.safetensors").write_bytes(weights(7))
    seeder.layout.model("loras", "swapped.safetensors").write_bytes(weights(8))
    assert seeder.run("loras/swapped.safetensors=hf://org/open/a.safetensors")[0] == 0
    manifest = seeder.write("models.toml", MANIFEST)
    assert "--yes" in seeder.run("--prune", manifest)[1]
    assert len(seeder.models) == 4
    assert seeder.run("--prune", manifest, "--yes")[0] == 0
    assert seeder.models == ["loras/a.safetensors", "loras/swapped.safetensors", "vae/mine.safetensors"]
    assert read_seal(seeder.layout.seal("vae", "b.safetensors")) is None


def test_prune_keeps_what_a_workflow_names_in_any_of_its_folders_and_from_anywhere(seeder: Seeder) -> None:
    names = {"clip/t.safetensors": "a", "vae/v.safetensors": "b", "loras/l.safetensors": "a"}
    assert seeder.run(*(f"{model}=hf://org/open/{name}.safetensors" for model, name in names.items()))[0] == 0
    nodes = {
        "1": {"class_type": "CLIPLoader", "inputs": {"clip_name": "t.safetensors"}},
        "2": {"class_type": "SomebodysLoader", "inputs": {"x_name": "v.safetensors"}},
    }
    assert seeder.run("--prune", seeder.write("w.json", nodes), "--yes")[0] == 0
    assert seeder.models == ["clip/t.safetensors", "vae/v.safetensors"]


# --- through S3 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy() -> Iterator[tuple[S3Server, RunPodProxy]]:
    with S3Server() as server, RunPodProxy(server.endpoint_url, keys=[server.access_key_id]) as found:
        yield server, found


class Cloud:
    """The same command with volumes in another place."""

    def __init__(self, seeder: Seeder, server: S3Server, proxy: RunPodProxy) -> None:
        server.reset()
        proxy.reset()
        for name in ("vol1", "vol2"):
            server.bucket(name)
        self.seeder, self.server, self.proxy = seeder, server, proxy
        seeder.environ |= {"RUNPOD_S3_ACCESS_KEY_ID": server.access_key_id, "RUNPOD_S3_SECRET_ACCESS_KEY": "rps_x"}
        self.where = ("--endpoint", proxy.endpoint_url, "--s3", "vol1")

    def put(self, model: str, data: bytes, volume: str = "vol1") -> None:
        self.server.client.put_object(Bucket=volume, Key=f"models/{model}", Body=data)

    def read(self, model: str, volume: str = "vol1") -> bytes:
        data: bytes = self.server.client.get_object(Bucket=volume, Key=f"models/{model}")["Body"].read()
        return data

    def reseal(self, model: str, volume: str = "vol1", mtime: int | None = None) -> None:
        """Write the seal again, after the file: with a time that is not the file's, the file is another one than was sealed."""
        key = f".worker/seals/{model}.json"
        seal = json.loads(self.server.client.get_object(Bucket=volume, Key=key)["Body"].read())
        self.server.client.put_object(Bucket=volume, Key=key, Body=json.dumps(seal | {"mtime": mtime}).encode())

    def files(self, volume: str = "vol1") -> list[str]:
        return [entry["Key"] for entry in self.server.client.list_objects_v2(Bucket=volume).get("Contents", ())]


@pytest.fixture
def cloud(seeder: Seeder, proxy: tuple[S3Server, RunPodProxy]) -> Cloud:
    return Cloud(seeder, *proxy)


def test_two_volumes_are_seeded_listed_verified_and_pruned_through_s3(cloud: Cloud) -> None:
    seeder, both = cloud.seeder, (*cloud.where, "--s3", "vol2")
    cloud.server.client.put_object(Bucket="vol1", Key="models.toml", Body=MANIFEST.encode())
    code, events = seeder.events("vae=hf://org/open/b.safetensors", *both)
    assert code == 0
    assert [outcome["volume"] for outcome in events[-1]["outcomes"]] == ["vol1", "vol2"]
    assert seeder.run(*both)[0] == 0  # models.toml on the first volume
    assert cloud.files("vol2") == [
        ".worker/seals/loras/a.safetensors.json",
        ".worker/seals/vae/b.safetensors.json",
        "models/loras/a.safetensors",
        "models/vae/b.safetensors",
    ]
    cloud.put("vae/b.safetensors", weights(5), "vol2")
    cloud.reseal("vae/b.safetensors", "vol2")
    assert seeder.run("--verify", *cloud.where)[0] == 0
    assert seeder.run("--verify", *both)[0] == FAILED
    assert seeder.run("--verify", "--repair", *both)[0] == 0
    assert seeder.run("--prune", "--yes", *both)[0] == 0
    assert cloud.files("vol2") == [".worker/seals/loras/a.safetensors.json", "models/loras/a.safetensors"]
    assert cloud.proxy.count("DeleteObjects", answered=False) == 0


def test_over_s3_a_damaged_file_stays_until_the_new_one_is_whole(cloud: Cloud) -> None:
    seeder = cloud.seeder
    assert seeder.run("vae=hf://org/open/b.safetensors", *cloud.where)[0] == 0
    cloud.put("vae/b.safetensors", weights(5))
    cloud.reseal("vae/b.safetensors")
    assert verdicts_of(seeder, *cloud.where) == {"vae/b.safetensors": "damaged"}
    seeder.stand_in.fault("status", status=404, file="*b.safetensors", count=None)
    assert seeder.run("--verify", "--repair", *cloud.where)[0] == FAILED
    assert cloud.read("vae/b.safetensors") == weights(5)
    seeder.stand_in.clear_faults()
    assert seeder.run("--verify", "--repair", *cloud.where)[0] == 0
    assert cloud.read("vae/b.safetensors") == weights(2)
    assert verdicts_of(seeder, *cloud.where) == {"vae/b.safetensors": "whole"}
    assert cloud.proxy.count("DeleteObject") == 2, "the two records of publications, no model"


@pytest.mark.parametrize("data", [weights(5), weights(5, SIZE + 5)])
def test_over_s3_a_file_that_a_person_put_over_a_sealed_one_is_left_alone(cloud: Cloud, data: bytes) -> None:
    seeder = cloud.seeder
    assert seeder.run("vae=hf://org/open/b.safetensors", *cloud.where)[0] == 0
    cloud.put("vae/b.safetensors", data)
    cloud.reseal("vae/b.safetensors", mtime=2_000_000_000)  # a worker had seen the file with this time
    assert verdicts_of(seeder, *cloud.where) == {"vae/b.safetensors": "replaced"}
    code, text = seeder.run("--verify", "--repair", *cloud.where)
    assert code == FAILED
    assert "vae/b.safetensors was replaced by hand and stays unchanged" in text
    assert seeder.run("--prune", "loras=hf://org/open/a.safetensors", "--yes", *cloud.where)[0] == 0
    assert cloud.read("vae/b.safetensors") == data
    assert seeder.run("--verify", "--repair", "--yes", *cloud.where)[0] == 0
    assert cloud.read("vae/b.safetensors") == weights(2)


def test_a_region_that_is_away_leaves_the_others_alone(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.seed.s3_api._ATTEMPTS", 2)
    seeder, both = cloud.seeder, (*cloud.where, "--s3", "vol2")
    for away, there in (("vol1", "vol2"), ("vol2", "vol1")):
        cloud.proxy.fault("*", "502", times=1_000, volume=away)
        code, [*_, summary] = seeder.events("vae=hf://org/open/b.safetensors", *both)
        assert code == FAILED
        hows = {outcome["volume"]: (outcome["how"], outcome["code"]) for outcome in summary["outcomes"]}
        assert hows == {there: ("sent", None), away: ("failed", "s3_unreachable")}
        for action in ("--list", "--verify"):
            code, text = seeder.run(action, *both)
            assert code == FAILED
            assert f"The volume {away} could not be reached" in text
            assert "vae/b.safetensors" in text
        cloud.proxy.clear_faults()
    cloud.proxy.fault("*", "502", times=1_000)
    code, text = seeder.run("vae=hf://org/open/b.safetensors", *both)
    assert code == FAILED
    assert "could not be reached" in text


def test_wrong_keys_and_volumes_are_one_sentence(cloud: Cloud) -> None:
    seeder = cloud.seeder
    code, text = seeder.run("vae=hf://org/open/b.safetensors", "--endpoint", cloud.proxy.endpoint_url, "--s3", "vol9")
    assert code == FAILED
    assert "no volume 'vol9'" in text
    seeder.environ["RUNPOD_S3_ACCESS_KEY_ID"] = "user_other"
    code, text = seeder.run("vae=hf://org/open/b.safetensors", *cloud.where)
    assert code == FAILED
    assert "The keys were refused" in text


def test_a_run_that_was_killed_is_gone_on_with(cloud: Cloud) -> None:
    command = [sys.executable, "scripts/seed_volume.py", "vae=hf://org/large/large.safetensors", *cloud.where, "--json"]
    environ = {**os.environ, **cloud.seeder.environ}
    for ending in (signal.SIGKILL, signal.SIGTERM):
        cloud.proxy.fault("UploadPart", "hold", times=100, after=2)
        process = subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=subprocess.PIPE, text=True)
        cloud.proxy.wait_held(1)
        process.send_signal(ending)
        said, _ = process.communicate(timeout=60)
        cloud.proxy.clear_faults()
    assert process.returncode == STOPPED
    assert "run the same command again" in said
    done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    sent = [call.part for call in cloud.proxy.calls if call.operation == "UploadPart" and call.fault is None]
    assert len(set(sent)) <= len(sent) <= PARTS
    body = cloud.server.client.get_object(Bucket="vol1", Key="models/vae/large.safetensors")["Body"].read()
    assert body == weights(3, PARTS * PART)


@pytest.mark.parametrize(("operation", "after"), [("CompleteMultipartUpload", 0), ("PutObject", 1)])
def test_a_run_that_was_killed_at_its_end_is_finished_without_sending(cloud: Cloud, operation: str, after: int) -> None:
    command = [sys.executable, "scripts/seed_volume.py", "vae=hf://org/open/b.safetensors", *cloud.where, "--json"]
    cloud.proxy.fault(operation, "hold", after=after)
    process = subprocess.Popen(command, cwd=PROJECT, env={**os.environ, **cloud.seeder.environ}, stdout=subprocess.DEVNULL)
    cloud.proxy.wait_held()
    process.kill()
    process.wait(60)
    cloud.proxy.clear_faults()  # what was asked last is done, and nobody hears of it
    assert cloud.seeder.run(*command[2:-1])[0] == 0
    assert cloud.proxy.count("UploadPart") == 1
    whole = [key for key in cloud.files() if not key.endswith(".pending")]  # a record may stay, and harms nobody
    assert whole == [".worker/seals/vae/b.safetensors.json", "models/vae/b.safetensors"]


# --- on a network volume ------------------------------------------------------------------------


def test_a_worker_on_another_host_finds_a_seeded_volume_ready(seeder: Seeder, moosefs: MooseFS, tmp_path: Path) -> None:
    here, there = (mount / tmp_path.name for mount in moosefs.mounts[:2])
    here.mkdir()
    assert seeder.run("vae=hf://org/open/b.safetensors", seeder.write("m.toml", MANIFEST), "--volume", here)[0] == 0
    seeder.stand_in.clear_log()
    store = Store(Layout(there), Hub(seeder.stand_in.endpoint, Network()), "worker")
    assert store.ready("vae", "b.safetensors") == there / "models/vae/b.safetensors"
    spec = ModelSpec("loras", "a.safetensors", HubFile("org/open", "a.safetensors"))
    phases: list[str] = []
    assert store.ensure(spec, lambda moment: phases.append(moment.phase)).how == "ready"
    assert phases == []  # neither downloaded nor hashed
    assert seeder.stand_in.requests == []


# --- making room --------------------------------------------------------------------------------


@pytest.fixture
def aged(seeder: Seeder) -> Seeder:
    """Two models that nobody has used for long, on a volume whose workers know that models may go."""
    seeded(seeder)
    for folder, name in (("loras", "a.safetensors"), ("vae", "b.safetensors")):
        os.utime(seeder.layout.seal(folder, name), (1, 1))
    seeder.layout.leases.mkdir()
    seeder.layout.leases_began.touch()
    os.utime(seeder.layout.leases_began, (1, 1))
    return seeder


def test_the_list_shows_what_would_be_removed_first_and_what_stays(aged: Seeder) -> None:
    aged.layout.manifest.write_text(MANIFEST)
    _, [listed] = aged.events("--list")
    assert [(model["model"], model["removed_as"], model["kept"]) for model in listed["models"]] == [
        ("loras/a.safetensors", None, "a manifest names it"),
        ("vae/b.safetensors", 1, None),
    ]
    said = aged.run("--list")[1]
    assert "stays: a manifest names it" in said
    assert "number 1, used" in said


def test_pruning_what_is_used_least_stops_where_the_rest_fits(aged: Seeder) -> None:
    sizes = {path: (aged.layout.models / path).stat().st_size for path in aged.models}
    code, said = aged.run("--prune", "--least-used", "--keep-gb", str(max(sizes.values()) / 1e9), "--yes")
    assert code == 0
    assert len(aged.models) == 1
    assert "removed" in said
    assert tombstone_of(aged.layout, *next(iter(set(sizes) - set(aged.models))).split("/"))


def test_pruning_says_what_cannot_be_removed(aged: Seeder) -> None:
    aged.layout.manifest.write_text(MANIFEST)
    code, said = aged.run("--prune", "--least-used", "--keep-gb", "0", "--yes")
    assert code == 1
    assert aged.models == ["loras/a.safetensors"]
    assert "nothing else may be removed" in said


def test_seeding_makes_room_for_what_comes(aged: Seeder) -> None:
    size = sum((aged.layout.models / path).stat().st_size for path in aged.models)
    assert aged.run("loras/c.safetensors=hf://org/open/deep/c.safetensors", "--keep-gb", str(size / 1e9))[0] == 0
    assert "loras/c.safetensors" in aged.models
    assert len(aged.models) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--least-used"],
        ["--prune", "--least-used"],
        ["--prune", "--keep-gb", "1"],
        ["--prune", "--least-used", "--keep-gb", "1", "models.toml"],
        ["--verify", "--keep-gb", "1"],
        ["--keep-gb", "-1"],
        ["--keep-gb", "1", "--s3", "V", "--datacenter", "EU-RO-1"],
    ],
)
def test_options_of_making_room_that_make_no_sense(seeder: Seeder, argv: list[str]) -> None:
    assert seeder.run(*argv)[0] == 2
