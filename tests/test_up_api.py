"""What `up` makes of RunPod's answers: each refusal a sentence with its code, nothing doubled by a lost answer. No engine.

The last tests hold what `up` sends, and what the stand-in answers, to RunPod's own OpenAPI, where a copy of it is at hand:

    curl -s https://api.runpod.io/v2/openapi.json -o openapi.json && RUNPOD_OPENAPI=openapi.json pytest tests/test_up_api.py

It is RunPod's and no part of this repository. CI fetches it every week, so that a change of theirs is seen.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from devkit.engine.cache import cache_root
from devkit.hub import Hub
from devkit.local_worker import PROJECT
from devkit.runpod import RunPodStandIn, bodies
from devkit.runpod.market import MIG
from scripts.make_catalog import fetch_wheel, specs_in, templates
from worker.model_spec import HubFile
from worker.models.catalog import Catalog
from worker.up import api, options, plan, runpod_offer, up_command
from worker.up.api import ApiRetries, RunPodApi
from worker.up.errors import ApiKeyMissing, StateInvalid, UpUsage
from worker.up.runpod_offer import volume_gb, volume_usd_month, wanted_gpu_gb
from worker.up.state import UpState, state_lock, state_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devkit.runpod import Call

IMAGE = "ghcr.io/you/comfyui-volume-worker:1.0.0"
NAMES = ("diffusion_models/tiny_sd3.safetensors", "text_encoders/tiny_clip_l.pt", "vae/tiny_taesd3_vae.safetensors")


@dataclass
class Said:
    """What a run of the command ended with."""

    status: int
    events: list[dict[str, Any]]
    text: str

    @property
    def code(self) -> str:
        return next(str(event["code"]) for event in self.events if event["event"] == "error")

    @property
    def sentence(self) -> str:
        return next(str(event["text"]) for event in self.events if event["event"] == "error")


@dataclass
class Desk:
    """Somebody with an account. Models are left to the first job, and no job is sent: no worker is needed."""

    folder: Path
    runpod: RunPodStandIn
    hub: Hub
    more: dict[str, str] = field(default_factory=dict)

    def run(self, *argv: str) -> Said:
        environ = {
            **self.runpod.environ(),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "HF_ENDPOINT": self.hub.endpoint,
            **self.more,
        }
        stream = io.StringIO()
        status = up_command.run([*argv, "--json"], environ, stream)
        return Said(status, [json.loads(line) for line in stream.getvalue().splitlines()], stream.getvalue())

    def up(self, *argv: str) -> Said:
        models = self.folder / "models.toml"
        entries = [f'[[models]]\nfolder = "{name.partition("/")[0]}"\nsource = "hf://org/tiny/{name}"\n' for name in NAMES]
        models.write_text("".join(entries))
        workflow = str(PROJECT / "devkit/workflows/text_to_image.json")
        quiet = ["--yes", "--fill", "job", "--no-picture", "--output", str(self.folder / "out")]
        return self.run(workflow, str(models), "--name", "tiny", "--image", IMAGE, *quiet, *argv)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        path = root / "org/tiny" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(1000))
    with Hub(root, tokens={"hf_secret": ["*"]}) as running:
        yield running


@pytest.fixture
def desk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(api, "ApiRetries", lambda: ApiRetries(patience_s=3.0, first_s=0.01, longest_s=0.05))
    with RunPodStandIn(tmp_path / "runpod") as runpod:
        yield Desk(tmp_path, runpod, hub)


# --- refusals -----------------------------------------------------------------------------------


def test_no_key(desk: Desk) -> None:
    desk.more = {"RUNPOD_API_KEY": ""}
    said = desk.up()
    assert (said.status, said.code) == (2, "api_key_missing")
    assert "Settings > API Keys" in said.sentence


def test_a_wrong_key(desk: Desk) -> None:
    desk.more = {"RUNPOD_API_KEY": "rpa_wrong"}
    said = desk.up()
    assert (said.status, said.code) == (2, "api_key_refused")
    assert "rpa_wrong" not in said.text


def test_a_key_that_may_only_look(desk: Desk) -> None:
    desk.runpod.fault("POST *", 403)
    assert desk.up().code == "api_key_lacks_rights"


def test_an_empty_balance(desk: Desk) -> None:
    desk.runpod.account.balance = 0.0
    said = desk.up()
    assert said.code == "no_balance"
    assert "Billing" in said.sentence
    assert desk.runpod.billed()["volumes"] == 0
    desk.runpod.account.balance = 25.0
    assert desk.up().status == 0


def test_no_gpu_is_free(desk: Desk) -> None:
    desk.runpod.account.market.stock = {(place, "*"): "NONE" for place in desk.runpod.account.market.centres}
    said = desk.up()
    assert said.code == "no_gpu_free"
    assert "ADA_24" in said.sentence
    assert desk.runpod.operations() == []


def test_the_data_centre_that_has_gpus_is_taken(desk: Desk) -> None:
    desk.runpod.account.market.stock = {("EU-RO-1", "*"): "NONE", ("US-KS-2", "*"): "LOW"}
    assert desk.up().status == 0
    volume = next(iter(desk.runpod.account.things["network-volumes"].values()))
    assert volume["dataCenter"] == "AP-JP-1"  # more are free there
    said = desk.up("--name", "other", "--datacenter", "EU-RO-1")
    assert said.code == "no_gpu_free"
    assert "EU-RO-1" in said.sentence


def test_the_image_is_not_there(desk: Desk) -> None:
    desk.runpod.account.images = lambda _: False
    said = desk.up()
    assert said.code == "image_not_found"
    assert IMAGE in said.sentence
    assert desk.runpod.billed()["pods"] == 0  # it shows before anything was fetched


def test_too_many_workers_for_the_account(desk: Desk) -> None:
    said = desk.up("--max-workers", "9")
    assert said.code == "worker_quota"
    assert "quota (5)" in said.sentence


def test_a_pod_cannot_be_had(desk: Desk) -> None:
    market = desk.runpod.account.market
    market.stock = {(place, cpu): "NONE" for place in market.centres for cpu in market.cpus}
    said = desk.up("--fill", "pod")
    assert said.code == "no_cpu_free"
    assert "--fill s3" in said.sentence


def test_each_kind_of_pod_is_tried(desk: Desk) -> None:
    desk.runpod.fault("POST pods", 400, detail="There are no longer any instances available")
    desk.runpod.fault("POST pods", 402)
    assert desk.up("--fill", "pod").code == "no_balance"
    pods = [call for call in desk.runpod.calls if call.operation == "POST pods"]
    assert [call.body["cpu"]["id"] for call in pods] == ["cpu3c", "cpu5c"]


def test_the_volume_is_not_of_this_account(desk: Desk) -> None:
    assert desk.up("--volume", "nobodys").code == "volume_unknown"


def test_a_model_that_nobody_knows_stops_it_before_anything_is_made(desk: Desk) -> None:
    workflow = str(PROJECT / "devkit/workflows/text_to_image.json")
    said = desk.run(workflow, "--name", "tiny", "--image", IMAGE, "--yes")
    assert said.code == "models_not_ready"
    assert "tiny_sd3.safetensors (unknown)" in said.sentence
    assert desk.runpod.operations() == []


def test_nobody_is_there_to_be_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    workflow = str(PROJECT / "devkit/workflows/empty_image.json")
    assert desk.run(workflow, "--image", IMAGE).code == "up_usage"
    assert desk.runpod.operations() == []


def test_the_quota_of_requests(desk: Desk) -> None:
    desk.runpod.fault("POST network-volumes", 429)
    assert desk.up().status == 0
    assert desk.runpod.billed()["volumes"] == 1


# --- what fails on its way ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 0])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("operation", ["POST network-volumes", "POST serverless"])
def test_a_lost_answer_doubles_nothing(desk: Desk, operation: str, status: int, done: bool) -> None:  # noqa: FBT001 - a parameter
    desk.runpod.fault(operation, status, done=done)
    assert desk.up().status == 0
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 0}
    assert desk.runpod.operations().count(operation) == 1


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("operation", ["POST network-volumes", "POST serverless"])
def test_a_list_that_lags_doubles_nothing(desk: Desk, operation: str, lag: int) -> None:
    """What was made is not in the lists yet when its lost answer is asked after; with a long lag the second one is removed."""
    desk.runpod.account.lag, desk.runpod.account.quota = lag, 20
    desk.runpod.fault(operation, 502, done=True)
    assert desk.up().status == 0
    desk.up()
    there = desk.runpod.billed()
    assert (there["volumes"], there["endpoints"]) == (1, 1)
    desk.runpod.account.lag = 0
    assert desk.run("down", "--name", "tiny", "--yes", "--volume-too").status == 0
    assert not any(desk.runpod.billed().values())


@pytest.mark.parametrize("operation", ["GET *", "PATCH *", "DELETE *"])
def test_what_may_be_sent_twice_is_sent_again(desk: Desk, operation: str) -> None:
    desk.runpod.fault(operation, 503, times=2)
    desk.runpod.fault(operation, 0, times=1, done=True)
    assert desk.up().status == 0
    assert desk.up("--size", "50").status == 0
    assert desk.run("down", "--name", "tiny", "--yes", "--volume-too").status == 0
    assert not any(desk.runpod.billed().values())


@pytest.mark.parametrize(("status", "code"), [(502, "runpod_failed"), (0, "runpod_unreachable")])
def test_what_stays_broken_is_told(desk: Desk, status: int, code: str) -> None:
    desk.runpod.fault("POST serverless", status, times=1000)
    said = desk.up()
    assert (said.status, said.code) == (1, code)
    desk.runpod.clear_faults()
    assert desk.up().status == 0
    assert desk.runpod.operations().count("POST network-volumes") == 1


def test_runpod_cannot_be_reached(desk: Desk) -> None:
    desk.more = {"RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}
    assert desk.up().code == "runpod_unreachable"


# --- what is made ---------------------------------------------------------------------------------


def test_the_endpoint_has_what_the_workflow_wants(desk: Desk) -> None:
    desk.more = {"HF_TOKEN": "hf_secret"}
    said = desk.up("--image", f"{IMAGE}-cu128", "--gpu", "ADA_24,AMPERE_24", "--max-workers", "2", "--registry", "reg1")
    body = next(call.body for call in desk.runpod.calls if call.operation == "POST serverless")
    assert body["gpu"] == {
        "pools": ["ADA_24", "AMPERE_24"],
        "count": 1,
        "minCudaVersion": "12.8",
        "excludedTypes": [MIG],  # a slice of a GPU, in the pool of whole ones
    }
    assert (body["workers"], body["registry"]) == ({"min": 0, "max": 2, "idleTimeout": 5}, "reg1")
    assert body["env"]["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in said.text
    assert not any("hf_secret" in path.read_text() for path in (desk.folder / "state").rglob("*") if path.is_file())


def test_a_volume_of_ones_own_is_used_and_never_removed(desk: Desk) -> None:
    body = {"name": "mine", "size": 10, "dataCenter": "US-KS-2"}
    mine = desk.runpod.account.create("network-volumes", body)["id"]
    assert desk.up("--volume", mine).status == 0
    assert desk.up().status == 0  # the second run knows it
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 0}
    said = desk.run("down", "--name", "tiny", "--yes", "--volume-too")
    assert said.events[-1]["removed"]["volumes"] == []
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 0, "workers": 0}


def test_an_endpoint_that_runpod_scaled_down_is_raised_again(desk: Desk) -> None:
    """As RunPod does after seven days without a request."""
    desk.up()
    account = desk.runpod.account
    (endpoint,) = account.things["serverless"]
    account.update("serverless", endpoint, {"workers": {"max": 0}})
    shown = desk.run("status", "--name", "tiny")
    assert shown.events[-1]["endpoints"] == [endpoint]
    assert desk.up().status == 0
    assert account.one("serverless", endpoint)["workers"]["max"] == 3


def test_a_volume_that_was_removed_by_hand_is_made_again(desk: Desk) -> None:
    desk.up()
    account = desk.runpod.account
    for kind in ("serverless", "network-volumes"):
        for thing_id in list(account.things[kind]):
            account.delete(kind, thing_id)
    assert desk.up().status == 0
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 0}


def test_a_dry_run_makes_nothing_and_says_everything(desk: Desk) -> None:
    said = desk.up("--dry-run")
    assert said.status == 0
    (shown,) = [event for event in said.events if event["event"] == "plan"]
    assert {offer["datacenter"] for offer in shown["offers"]} == {"EU-RO-1", "US-KS-2", "AP-JP-1"}
    assert shown["volume_usd_month"] == 0.7
    assert desk.runpod.operations() == []
    assert not list((desk.folder / "state").rglob("*.json"))


def test_later_options_change_what_is_there(desk: Desk) -> None:
    desk.up()
    account = desk.runpod.account
    (endpoint,) = account.things["serverless"]
    assert desk.up("--gpu", "ADA_24,AMPERE_24", "--max-workers", "1", "--image", f"{IMAGE}-cu128").status == 0
    shown = account.one("serverless", endpoint)
    assert (shown["gpu"]["pools"], shown["gpu"]["excludedTypes"]) == (["ADA_24", "AMPERE_24"], [MIG])
    assert (shown["workers"]["max"], shown["image"]) == (1, f"{IMAGE}-cu128")
    said = desk.up("--datacenter", "US-KS-2")
    assert (said.code, "EU-RO-1" in said.sentence) == ("up_usage", True)
    assert desk.runpod.billed() == {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 0}


def test_a_file_that_is_missing_ends_it_before_anything_is_made(desk: Desk) -> None:
    assert desk.up("--image-file", "in.png=nowhere.png").code == "file_unreadable"
    assert desk.runpod.operations() == []


def test_no_s3_api_where_the_volume_is(desk: Desk) -> None:
    assert desk.up("--datacenter", "AP-JP-1", "--fill", "s3").code == "up_usage"


@pytest.mark.parametrize(("answer", "volumes"), [("n", 0), ("y", 1)])
def test_a_person_is_asked_once(desk: Desk, answer: str, volumes: int) -> None:
    leader, follower = pty.openpty()
    workflow = str(PROJECT / "devkit/workflows/empty_image.json")
    argv = [sys.executable, "-m", "worker", "up", workflow, "--image", IMAGE, "--no-picture", "--output", str(desk.folder)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    environ = {**own, **desk.runpod.environ(), "XDG_STATE_HOME": str(desk.folder / "state")}
    process = subprocess.Popen(argv, cwd=PROJECT, env=environ, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    said = b""
    while b"[y/N]" not in said:
        said += os.read(leader, 1024)
    os.write(leader, f"{answer}\n".encode())
    with contextlib.suppress(OSError):  # how a terminal whose program has ended reads
        while part := os.read(leader, 1024):
            said += part
    assert process.wait(60) == (1 if answer == "n" else 0)
    assert said.count(b"[y/N]") == 1
    assert (b"$0.70 a month" in said, b"Nothing was created" in said) == (True, answer == "n")
    assert desk.runpod.billed()["volumes"] == volumes


def test_what_a_person_reads(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {**desk.runpod.environ(), "RUNPOD_API_KEY": "rpa_wrong"}
    assert up_command.run(["status", "--name", "tiny"], environ) == 2
    assert capsys.readouterr().err == (
        "error: RunPod does not accept RUNPOD_API_KEY (status 401): copy it again, or make a new one under "
        "Settings > API Keys. [api_key_refused]\n"
    )


# --- values ---------------------------------------------------------------------------------------

GB = 1_000_000_000


def test_how_large_and_how_dear_a_volume_is() -> None:
    assert [volume_gb(size) for size in (0, 5 * GB, 20_700_000_000, 200 * GB, 9000 * GB)] == [10, 10, 26, 220, 4096]
    assert [round(volume_usd_month(size), 2) for size in (10, 1000, 2000)] == [0.7, 70.0, 120.0]


def test_which_gpus_a_workflow_fits_into(desk: Desk) -> None:
    pools = runpod_offer.pools_of(desk.runpod.account.market.gpus_shown(available=True))
    assert wanted_gpu_gb(20_700_000_000) == 23
    assert [pool.name for pool in runpod_offer.fitting_pools(pools, 23)][:3] == ["AMPERE_24", "ADA_24", "AMPERE_48"]
    assert [pool.name for pool in runpod_offer.fitting_pools(pools, 90)] == ["BLACKWELL_96", "HOPPER_141", "BLACKWELL_180"]
    assert [pool.name for pool in runpod_offer.fitting_pools(pools, 500)] == ["BLACKWELL_180"]  # the largest there is
    assert pools["AMPERE_24"].slices == (MIG,)


@pytest.mark.parametrize(
    ("image", "small"),
    [
        (IMAGE, f"{IMAGE}-cpu"),
        (f"{IMAGE}-cu128", f"{IMAGE}-cpu"),
        ("docker.io/you/comfyui-volume-worker:1", "docker.io/you/comfyui-volume-worker:1"),
        ("ghcr.io/you/comfyui-volume-worker:1@sha256:0", "ghcr.io/you/comfyui-volume-worker:1@sha256:0"),
        ("ghcr.io/you/mine:1", "ghcr.io/you/mine:1"),
    ],
)
def test_the_image_that_fills_a_volume(image: str, small: str) -> None:
    assert plan.planned_cpu_image(image) == small


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["examples/z-image-turbo/workflow.json"], "z-image-turbo"),
        (["a/Flux Dev (1).json"], "flux-dev-1"),
        (["x.json", "--name", "mine"], "mine"),
        (["down", "--name", "mine"], "mine"),
    ],
)
def test_what_a_deployment_is_called(argv: list[str], name: str) -> None:
    assert options.parse_up_options(argv).name == name


@pytest.mark.parametrize(
    "argv",
    [[], ["a.json", "--name", "Not/Good"], ["down", "x"], ["a.json", "--volume-too"], ["a.json", "--max-workers", "0"]],
)
def test_a_command_line_that_makes_no_sense(argv: list[str]) -> None:
    with pytest.raises(UpUsage):
        options.parse_up_options(argv)


def test_the_image_is_that_of_whoever_the_checkout_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    given = options.parse_up_options(["x.json"])
    monkeypatch.setattr(plan, "_clone_owner", lambda: "Somebody")
    assert plan.planned_image(given) == "ghcr.io/somebody/comfyui-volume-worker:1.0.0"
    monkeypatch.setattr(plan, "_clone_owner", lambda: None)
    with pytest.raises(UpUsage, match="--image"):
        plan.planned_image(given)


def test_the_key_goes_over_tls_only_and_is_a_key() -> None:
    with pytest.raises(UpUsage, match="https"):
        RunPodApi("rpa_x", "http://example.com")
    with pytest.raises(UpUsage, match="blank"):
        RunPodApi("rpa_x y")
    with pytest.raises(ApiKeyMissing):
        RunPodApi("")


def test_the_state_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = state_path("x", {"XDG_STATE_HOME": str(tmp_path)})
    state = UpState.load(path)
    assert not state.exists
    state.put("volume", id="v1")
    path.with_suffix(".new").write_text('{"volume": ')  # killed while the next one was written
    assert UpState.load(path).get("volume") == {"id": "v1"}
    path.write_text("{")
    with pytest.raises(StateInvalid):
        UpState.load(path)


def test_two_of_a_name_do_not_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with state_lock(path), pytest.raises(UpUsage, match="Another"), state_lock(path):
        pass
    with state_lock(path):
        pass


# --- in the image, which has no client -----------------------------------------------------------


def without_client(*argv: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the worker's command as the image does: the packages are there, this project's client is not."""
    hidden = "import os, sys; sys.modules['client'] = None; from worker.__main__ import main"
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "HF_"))}
    return subprocess.run(
        [sys.executable, "-c", f"{hidden}; sys.exit(main(sys.argv[1:], os.environ))", *argv],
        env={**own, **(environ or {})},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_image_fills_a_volume_without_the_client(hub: Hub, tmp_path: Path) -> None:
    entry = {"folder": "vae", "name": "a.safetensors", "source": "hf://org/tiny/nowhere.safetensors"}
    environ = {"HF_ENDPOINT": hub.endpoint, "VOLUME_PATH": str(tmp_path), "UP_MODELS": json.dumps({"models": [entry]})}
    done = without_client("up", "fill", environ=environ)
    assert done.returncode == 1, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1] == {"event": "filled", "code": 1}
    assert "nowhere.safetensors" in next(event["error"] for event in events if event["event"] == "ended")


def test_the_image_has_no_other_part_of_it() -> None:
    done = without_client("up", "x.json")
    assert (done.returncode, "command_unknown" in done.stderr) == (1, True)


# --- the official templates -----------------------------------------------------------------------

TEMPLATES = 50


def test_fifty_official_templates_are_planned_and_sized_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every one names its models, their sources and bytes, a GPU and a data centre, from the workflow alone."""
    monkeypatch.setattr("builtins.input", None)
    monkeypatch.setattr("sys.stdin", None)
    official = dict(templates(fetch_wheel(cache_root() / "wheels")))
    known = Catalog()
    picked = sorted(known.templates)[:: len(known.templates) // TEMPLATES][:TEMPLATES]
    assert len(picked) == TEMPLATES
    # The catalogue's sources, and those that the templates' own metadata names.
    catalogued = [spec for name in picked for spec in known.of_template(name)]
    own = [spec for name in picked for spec in specs_in(official[f"{name}.json"])]
    sizes: dict[str, int] = {}
    for number, spec in enumerate([*catalogued, *own]):
        assert isinstance(spec.source, HubFile)
        file = tmp_path / "hub" / spec.source.repo / spec.source.path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(bytes(1000 + number))
        sizes[str(spec.source)] = file.stat().st_size
    with Hub(tmp_path / "hub") as hub, RunPodStandIn(tmp_path / "runpod") as runpod:
        desk = Desk(tmp_path, runpod, hub)
        models = 0
        for name in picked:
            file = tmp_path / f"{name}.json"
            # The hub's files are not the true ones, so their hashes are none of these.
            file.write_text(re.sub(r'"hash": "[0-9a-f]{64}", ', "", json.dumps(official[file.name])))
            said = desk.run(str(file), "--name", "template", "--image", IMAGE, "--dry-run")
            assert said.status == 0, f"{name}: {said.text}"
            (shown,) = [event for event in said.events if event["event"] == "plan"]
            found = {f"{model['folder']}/{model['name']}": model["size_bytes"] for model in shown["models"]}
            assert found.keys() >= {f"{spec.folder}/{spec.name}" for spec in known.of_template(name)}, name
            assert list(found.values()) == [sizes[model["source"]] for model in shown["models"]], name
            assert shown["size_bytes"] == sum(found.values()), name
            assert (shown["datacenter"], bool(shown["pools"])) == ("EU-RO-1", True), name
            models += len(found)
        assert runpod.operations() == []
    with capsys.disabled():
        sys.stdout.write(f"\nofficial templates planned for an endpoint: {len(picked)}, with {models} models\n")


# --- RunPod's own OpenAPI -------------------------------------------------------------------------

OPENAPI = os.environ.get("RUNPOD_OPENAPI", "")
ROOT = "urn:runpod"
LISTS = {"network-volumes": "NetworkVolumes", "serverless": "Endpoints", "pods": "Pods"}
KINDS = {"network-volumes": "NetworkVolume", "serverless": "Endpoint", "pods": "Pod"}
CATALOGS = {"gpus": "ListGpuTypesResponse", "cpus": "ListCpuTypesResponse", "datacenters": "ListDataCentersResponse"}
needs_openapi = pytest.mark.skipif(not OPENAPI, reason="RUNPOD_OPENAPI names no copy of RunPod's OpenAPI")


class Contract:
    """RunPod's OpenAPI."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._registry: Registry[Any] = Registry().with_resource(ROOT, DRAFT202012.create_resource(document))

    def errors(self, schema: str, value: object) -> list[str]:
        reference = {"$ref": f"{ROOT}#/components/schemas/{schema}"}
        found = Draft202012Validator(reference, registry=self._registry).iter_errors(value)
        return [f"{schema} {'.'.join(map(str, error.path))}: {error.message}" for error in found]


@pytest.fixture(scope="module")
def contract() -> Contract:
    return Contract(json.loads(Path(OPENAPI).read_text("utf-8")))


@pytest.fixture
def whole_life(desk: Desk) -> list[Call]:
    """Every kind of request that `up` makes, with its answer."""
    desk.more = {"CIVITAI_TOKEN": "a"}
    assert desk.up("--fill", "pod", "--registry", "reg1").status == 0
    assert desk.up("--size", "50").status == 0
    account = desk.runpod.account
    account.update("serverless", next(iter(account.things["serverless"])), {"workers": {"max": 0}})
    assert desk.up().status == 0
    assert desk.run("status", "--name", "tiny").status == 0
    assert desk.run("down", "--name", "tiny", "--yes", "--volume-too").status == 0
    assert desk.up("--high-performance", "--fill", "job").status == 0
    kinds = {call.operation for call in desk.runpod.calls}
    assert {"POST network-volumes", "PATCH network-volumes", "POST serverless", "PATCH serverless", "POST pods"} <= kinds
    return desk.runpod.calls


@needs_openapi
def test_every_request_is_one_that_runpod_takes(contract: Contract, whole_life: list[Call]) -> None:
    wrong = []
    for call in whole_life:
        method, kind = call.operation.split(" ")
        if method in {"POST", "PATCH"} and kind in KINDS:
            schema = f"{'Create' if method == 'POST' else 'Update'}{KINDS[kind]}Request"
            wrong += contract.errors(schema, call.body)
        path = call.path.partition("?")[0]
        known = [template for template in contract.document["paths"] if _matches(template, path)]
        assert known, f"RunPod has no {path}"
        assert any(method.lower() in contract.document["paths"][template] for template in known), call.operation
    assert not wrong


@needs_openapi
def test_every_answer_of_the_stand_in_is_one_that_runpod_gives(contract: Contract, whole_life: list[Call]) -> None:
    wrong = []
    for call in whole_life:
        if not call.done or call.answer is None:
            continue
        method, what = call.operation.split(" ")
        path = call.path.partition("?")[0].removeprefix("/v2/")
        if what.startswith("catalog/"):
            schema = CATALOGS[what.removeprefix("catalog/")]
        elif what == "workers":
            schema = "ListEndpointWorkersResponse"
        else:
            schema = f"List{LISTS[what]}Response" if path == what and method == "GET" else KINDS[what]
        wrong += contract.errors(schema, call.answer)
    assert not wrong


@needs_openapi
def test_what_the_stand_in_refuses_runpod_refuses_too(contract: Contract) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("CreateNetworkVolumeRequest", {"name": "a", "size": 9, "dataCenter": "EU-RO-1"}),
        ("CreateNetworkVolumeRequest", {"name": "a", "size": 10, "dataCenterId": "EU-RO-1"}),
        ("CreateEndpointRequest", {"name": "a", "image": "b", "type": "QUEUE", "gpu": {"pools": ["ADA_24"]}}),
        ("UpdateEndpointRequest", {"gpu": {"excludedTypes": ["NVIDIA L4"]}}),
        ("CreatePodRequest", {"name": "a", "image": "b", "cpu": {"id": "cpu3c", "vcpuCount": 2, "memory": 4}}),
    ]
    ours = {"CreateNetworkVolume": "network-volumes", "CreateEndpoint": "serverless", "CreatePod": "pods"}
    for schema, body in bad:
        assert contract.errors(schema, body), schema
        name = schema.removesuffix("Request")
        mine = bodies.CREATE[ours[name]] if name in ours else bodies.UPDATE["serverless"]
        assert list(Draft202012Validator(mine).iter_errors(body)), schema


@needs_openapi
def test_the_base_address_is_theirs(contract: Contract) -> None:
    runpod = RunPodApi("rpa_x")
    assert contract.document["servers"][0]["url"] + "/v2/" == str(runpod._client.base_url)
    runpod.close()


def _matches(template: str, path: str) -> bool:
    parts, others = template.strip("/").split("/"), path.strip("/").split("/")
    return len(parts) == len(others) and all(a == b or a.startswith("{") for a, b in zip(parts, others, strict=True))
