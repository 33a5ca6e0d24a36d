"""What a client is told of an error: short enough to arrive, without secrets, whatever is in it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from worker.base.text import shortened
from worker.error_reply import DETAIL_CHARACTERS, DETAILS, SENTENCE_CHARACTERS, error_reply, reply_sentences
from worker.errors import EngineDied, EngineGaveUp, NodeFailed, WorkflowMissing, WorkflowRejected
from worker.graph.rejection import dropped_outputs, rejection, with_sent_files
from worker.logs import RedactingFilter

TOKEN = "hf_" + "a1B2" * 8
SIGNED = "https://s3.example.com/b/k?X-Amz-Signature=0123456789abcdef"
PICTURE = "iVBORw0KGgo" * 500_000


def redact(text: str) -> str:
    return RedactingFilter(["a secret of the settings"]).redact(text)


@pytest.mark.parametrize("length", [0, 99, 100, 101, 5_000_000])
def test_a_shortened_text_keeps_its_beginning_its_end_and_the_bound(length: int) -> None:
    text = "b" * (length // 2) + "e" * (length - length // 2)
    short = shortened(text, 100)
    assert len(short) <= 100
    assert (short == text) == (length <= 100)
    assert short[:10] + short[-10:] == text[:10] + text[-10:]


def test_a_picture_in_place_of_its_name_does_not_come_back() -> None:
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": PICTURE}}}
    report: dict[str, Any] = {
        "type": "custom_validation_failed",
        "message": "Custom validation failed for node",
        "details": f"image - Invalid image file: {PICTURE}",
        "extra_info": {"input_name": "image", "received_value": PICTURE},
    }
    found = {"1": {"class_type": "LoadImage", "errors": [report], "dependent_outputs": ["2"]}}
    body = {"error": {"type": "prompt_outputs_failed_validation", "message": "failed", "details": ""}, "node_errors": found}
    result = error_reply(rejection(graph, body), redact)
    assert len(json.dumps(result)) < 2_000
    assert "Invalid image file: iVBORw0KGgo" in result["error"]
    assert all(len(text) < 1_000 for text in dropped_outputs(graph, body))
    listed = {**report, "type": "value_not_in_list", "extra_info": {**report["extra_info"], "input_config": [["a.png"], {}]}}
    found["1"]["errors"] = [listed]
    assert len(json.dumps(error_reply(rejection(graph, body), redact))) < 2_000


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ([], "under that name"),
        (["a.png"], "under that name, as 'a.png' was"),
        ([f"{at}.png" for at in range(9)], "under that name, as '0.png', .*, '7.png' and 1 more were"),
    ],
)
def test_an_input_file_that_was_not_sent_is_told_as_such(sent: list[str], told: str) -> None:
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "zz.png"}}}
    report: dict[str, Any] = {
        "type": "custom_validation_failed",
        "message": "Custom validation failed for node",
        "details": "image - Invalid image file: zz.png",
        "extra_info": {"input_name": "image"},
    }
    found = {"1": {"class_type": "LoadImage", "errors": [report], "dependent_outputs": ["1"]}}
    error = rejection(graph, {"error": {"type": "prompt_outputs_failed_validation"}, "node_errors": found})
    assert isinstance(error, WorkflowRejected)
    (problem,) = with_sent_files(error.problems, sent)
    assert re.fullmatch(rf".*Invalid image file: zz\.png; send it in 'images' or 'files' {told}", problem)
    report["details"] = "image - too small"
    (problem,) = with_sent_files(dropped_outputs(graph, {"node_errors": found}), sent)
    assert problem.endswith("image - too small")


def test_no_error_is_larger_than_what_runpod_carries() -> None:
    error = EngineDied("x" * 10_000_000, ["y" * 10_000_000] * 1_000)
    result = error_reply(error, redact)
    assert len(result["error"]) <= SENTENCE_CHARACTERS
    assert len(result["details"]) == DETAILS + 1
    assert result["details"][-1] == f"... and {1_000 - DETAILS} more"
    assert len(json.dumps(result)) < DETAILS * DETAIL_CHARACTERS + 10_000


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "0123456789abcdef",
        "a secret of the settings",
        pytest.param("5f3a9c", id="an Azure signature"),
        pytest.param("hunter22", id="a user's password"),
    ],
)
def test_no_secret_is_told(secret: str) -> None:
    lines = [
        f"HF_TOKEN={TOKEN}",
        f"GET {SIGNED}",
        "a secret of the settings",
        "https://x.blob.core.windows.net/c/b?sv=2024&sig=5f3a9c%3D",
        "https://me:hunter22@example.com/file",
    ]
    for error in (EngineDied("\n".join(lines), lines), NodeFailed("X", "1", " ".join(lines)), EngineGaveUp(3, "died", lines)):
        assert secret not in json.dumps(error_reply(error, redact))
    assert secret not in " ".join(reply_sentences(lines, redact))


def test_what_is_told_can_be_sent() -> None:
    result = error_reply(NodeFailed("X", "1", "half a character: \ud83d"), redact)
    json.dumps(result, ensure_ascii=False).encode()


def test_where_worker_comfyui_has_a_nodes_failure_it_is_as_well() -> None:
    result = error_reply(NodeFailed("KSampler", "3", "no"), redact)
    assert result["error"] == "Job processing failed: Workflow execution error: Node Type: KSampler, Node ID: 3, Message: no"
    assert result["details"] == ["Workflow execution error: Node Type: KSampler, Node ID: 3, Message: no"]


def test_an_error_without_more_has_no_details() -> None:
    assert "details" not in error_reply(WorkflowMissing(), redact)
