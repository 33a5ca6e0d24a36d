"""The client against what two versions of ComfyUI said: each recorded exchange is replayed to it and must mean the same."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devkit.recorded_engine import Recording, recorded_engine
from worker.engine.client import ComfyClient, Versions
from worker.engine.engine import Engine
from worker.engine.events import RunFinished, RunTracker, decode_event, outcome_of
from worker.engine.process import EngineCommand, EngineProcess
from worker.errors import NodeFailed, RequestError, RunInterrupted, RunTimedOut
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from worker.engine.client import RunResult

    Run = Callable[[Coroutine[Any, Any, Any]], Any]

RECORDINGS = {path.stem: Recording.read(path) for path in sorted((Path(__file__).parent / "engine_api").glob("*.json"))}
TAKEN = [
    (version, name)
    for version, recording in RECORDINGS.items()
    for name, exchange in recording.exchanges.items()
    if "events" in exchange
]
REFUSED = [
    (version, name)
    for version, recording in RECORDINGS.items()
    for name, exchange in recording.exchanges.items()
    if exchange["status"] != 200 and not name.startswith("prompt_id_")
]
TIMEOUT_S = 60.0

# What a refusal must be called, whichever version gives it, and a piece of its sentence.
REFUSALS = {
    "missing_model": ("model_missing", "'missing.safetensors' in models/diffusion_models, which is not there"),
    "missing_model_and_bad_choice": ("workflow_rejected", "'nope' is no choice for 'vae_name', which takes 'tiny_taesd3_vae"),
    "two_missing_models": ("model_missing", "'absent.safetensors' in models/diffusion_models, which is not there"),
    "unknown_class": ("unknown_nodes", "NoSuchNode"),
    "unknown_class_unconnected": ("unknown_nodes", "NoSuchNode"),
    "no_class_type": ("workflow_rejected", "class_type"),
    "no_outputs": ("workflow_rejected", "the workflow has no output node; add one such as SaveImage"),
    "empty_prompt": ("workflow_rejected", "the workflow has no output node; add one such as SaveImage"),
    "bad_link_missing_node": ("workflow_rejected", "a link into it is bad"),
    "bad_link_slot": ("workflow_rejected", "a link into it is bad"),
    "bad_link_len": ("workflow_rejected", "length-2"),
    "type_mismatch": ("workflow_rejected", "received_type"),
    "missing_input": ("workflow_rejected", "Required input is missing"),
    "too_small": ("workflow_rejected", "smaller than min"),
    "too_big": ("workflow_rejected", "bigger than max"),
    "bad_int": ("workflow_rejected", "INT"),
    "missing_image": ("workflow_rejected", "Invalid image file"),
    "image_traversal": ("workflow_rejected", "Invalid image file"),
    "inputs_missing": ("workflow_rejected", "node 1"),
}


async def replayed(version: str, name: str, *, silent: bool = False, timeout_s: float = TIMEOUT_S) -> RunResult:
    recording = RECORDINGS[version]
    async with recorded_engine(recording, name) as engine:
        engine.silent = silent
        client = ComfyClient(engine.address, silence_s=0.05 if silent else TIMEOUT_S)
        try:
            assert await client.answers()
            assert client.versions.comfyui == recording.version
            await client.open()
            return await client.run(recording.exchanges[name]["request"]["prompt"], timeout_s=timeout_s)
        finally:
            assert not client.holds_prompt
            await client.close()


def test_there_are_recordings_of_an_old_and_a_newer_version() -> None:
    print(f"{len(TAKEN)} runs and {len(REFUSED)} refusals of ComfyUI {' and '.join(RECORDINGS)} are replayed")  # noqa: T201
    assert {"0.3.75", "0.33.0"} <= RECORDINGS.keys()


@pytest.mark.parametrize("silent", [False, True], ids=["by events", "by history"])
@pytest.mark.parametrize(("version", "name"), TAKEN)
def test_a_run_ends_as_its_history_says(version: str, name: str, *, silent: bool, run_async: Run) -> None:
    history = RECORDINGS[version].exchanges[name]["history"]
    expected = outcome_of(history)
    if isinstance(expected, RunFinished):
        result = run_async(replayed(version, name, silent=silent))
        assert result.outputs == history["outputs"]
        assert bool(result.dropped) == bool(RECORDINGS[version].exchanges[name]["answer"]["node_errors"])
    elif isinstance(expected, RunInterrupted):
        with pytest.raises(RunTimedOut):  # that is when it was interrupted
            run_async(replayed(version, name, silent=silent, timeout_s=0.5))
    else:
        with pytest.raises(NodeFailed) as failed:
            run_async(replayed(version, name, silent=silent))
        assert str(failed.value) == str(expected)


@pytest.mark.parametrize(("version", "name"), TAKEN)
def test_a_run_is_followed_by_its_events_alone(version: str, name: str) -> None:
    exchange = RECORDINGS[version].exchanges[name]
    tracker = RunTracker(exchange["answer"]["prompt_id"])
    for event in map(decode_event, map(json.dumps, exchange["events"])):
        if event is not None:
            tracker.feed(event)
    assert type(tracker.outcome) is type(outcome_of(exchange["history"]))


@pytest.mark.parametrize(("version", "name"), REFUSED)
def test_a_refusal_is_one_sentence_and_the_same_code_in_each_version(version: str, name: str, run_async: Run) -> None:
    code, piece = REFUSALS[name]
    with pytest.raises(RequestError) as refused:
        run_async(replayed(version, name))
    assert (refused.value.code, piece in str(refused.value)) == (code, True), str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_prompt_ids_have_the_form_that_the_strictest_version_takes(run_async: Run) -> None:
    ids = {name: each for name, each in RECORDINGS["0.33.0"].exchanges.items() if name.startswith("prompt_id_")}
    assert {each["status"] for each in ids.values()} == {200, 400}

    async def refused(exchange: Any) -> bool:
        """Whether the stand-in refuses the id that the real one was given."""
        async with recorded_engine(RECORDINGS["0.33.0"], "normal") as engine:
            client = ComfyClient(engine.address)
            await client.open()
            body = {**exchange["request"], "client_id": client._client_id}
            status, answer = await client._ask("POST", "/prompt", body)
            await client.close()
            return bool(status == 400 and answer["error"]["type"] == "invalid_prompt_id")

    for exchange in ids.values():
        if "prompt_id" in exchange["request"] and exchange["request"]["prompt_id"] is not None:
            assert run_async(refused(exchange)) == (exchange["status"] == 400), exchange["request"]["prompt_id"]


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        ("0.3.74", True),
        ("0.2.9", True),
        ("0.3.75", False),
        ("0.33.0", False),
        ("v0.46.0", False),
        ("1.0", False),
        ("odd", False),
    ],
)
def test_an_engine_from_before_the_oldest_supported_one_is_known(version: str, *, too_old: bool) -> None:
    assert Versions(version).too_old == too_old


def test_the_engines_version_is_logged_and_one_that_is_too_old_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = EngineProcess.spawn(EngineCommand((sys.executable, "-c", ""), tmp_path, dict(os.environ)))
    engine = Engine(Settings.from_env({}), EngineCommand((), tmp_path, {}), process)
    caplog.set_level(logging.INFO)
    for versions in (Versions("0.33.0", "1.49.6"), Versions("0.33.0", "1.49.6"), Versions("0.3.60")):
        engine._client.versions = versions
        engine._log_versions()
    told = [record.getMessage() for record in caplog.records if record.name == "worker.engine.engine"]
    assert told == [
        "ComfyUI 0.33.0 (editor 1.49.6)",
        "ComfyUI 0.3.60 (editor unknown)",
        "ComfyUI 0.3.60 is older than 0.3.75, the oldest that this worker is tested on: take an image with a newer one",
    ]


@pytest.mark.parametrize("body", [None, [], {}, {"system": None}, {"system": []}, {"system": {"comfyui_version": None}}])
def test_a_server_that_does_not_tell_its_version_has_none(body: object) -> None:
    assert Versions.of(body) == Versions()
    assert not Versions.of(body).too_old
