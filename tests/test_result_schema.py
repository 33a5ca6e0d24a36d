"""docs/result.schema.json and the code say the same about what comes back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import pytest

from devkit.local_worker import PROJECT
from scripts.make_errors import classes, example
from worker.base.progress import ModelProgress
from worker.engine.events import NodeProgress
from worker.error_reply import error_reply
from worker.errors import WorkerError
from worker.handler import sampling_progress
from worker.job import OutputItem, Result
from worker.job_timings import JobTimings
from worker.models.download_queue import JobWait
from worker.preparation import download_progress

SCHEMA: dict[str, Any] = json.loads((PROJECT / "docs" / "result.schema.json").read_text("utf-8"))
DEFINED = SCHEMA["$defs"]
OUTPUT = jsonschema.Draft202012Validator(SCHEMA)

ITEM = OutputItem("a.png", "base64", "QQ==", "9", "", "image/png", 1)
ERRORS = [kind for kind in classes() if issubclass(kind, WorkerError)]


def part(name: str) -> Any:
    return jsonschema.Draft202012Validator({"$defs": DEFINED, "$ref": f"#/$defs/{name}"})


def test_the_schema_is_one_and_its_examples_are_right() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert all(OUTPUT.is_valid(value) for value in SCHEMA["examples"])


def test_it_has_the_fields_of_a_result_and_of_an_item() -> None:
    named = {field.name for field in dataclasses.fields(Result)}
    assert set(DEFINED["result"]["properties"]) == named - {"warnings"} | {"errors", "status"}
    item = DEFINED["item"]
    assert set(item["properties"]) == set(item["required"]) == set(ITEM.to_dict())


@pytest.mark.parametrize(
    "result",
    [
        Result(),
        Result((ITEM,)),
        Result(warnings=("node 6 was dropped",)),
        Result(
            (ITEM, ITEM), ("one file is missing",), (ITEM,), (ITEM,), (ITEM,), (ITEM,), JobTimings().to_dict(0.1, {"3": 1.5})
        ),
        *(Result((dataclasses.replace(ITEM, type=kind, data="x"),)) for kind in DEFINED["item"]["properties"]["type"]["enum"]),
    ],
)
def test_a_result_is_one(result: Result) -> None:
    value = json.loads(json.dumps(result.to_dict()))
    assert [error.message for error in part("result").iter_errors(value)] == []
    assert OUTPUT.is_valid(value)
    assert not part("failure").is_valid(value)


def test_it_has_the_times_that_a_job_can_ask_for() -> None:
    timings = DEFINED["timings"]
    assert set(timings["properties"]) == set(timings["required"]) == set(JobTimings().to_dict(0.0, {}))


@pytest.mark.parametrize("kind", ERRORS)
def test_every_failure_is_one(kind: type[WorkerError]) -> None:
    error = example(kind)
    assert isinstance(error, WorkerError)
    value = json.loads(json.dumps(error_reply(error, str)))
    assert [problem.message for problem in part("failure").iter_errors(value)] == []
    assert OUTPUT.is_valid(value)
    assert not part("result").is_valid(value)
    assert set(value) - {"refresh_worker"} <= set(DEFINED["failure"]["properties"])  # the SDK takes that one out


PROGRESS = [
    sampling_progress(NodeProgress("p", "3", 12, 20)),
    sampling_progress(NodeProgress("p", None, 0, 0)),
    download_progress(JobWait(5, 10, 2.5, (("vae/a.safetensors", ModelProgress("waiting")),))),
    download_progress(JobWait(0, 0, 0.0, (("vae/a.safetensors", None), ("vae/b.safetensors", None)))),
]


@pytest.mark.parametrize("value", PROGRESS)
def test_progress_is_one(value: dict[str, Any]) -> None:
    assert [problem.message for problem in part("progress").iter_errors(value)] == []
    (form,) = [form for form in DEFINED["progress"]["anyOf"] if form["properties"]["type"]["const"] == value["type"]]
    assert set(form["properties"]) == set(form["required"]) == set(value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"images": None},
        {"images": [{"filename": "a.png", "type": "base64", "data": "QQ=="}]},
        {"images": [ITEM.to_dict() | {"type": "file"}]},
        {"images": [ITEM.to_dict() | {"node_id": 9}]},
        {"images": [], "videos": []},
        {"images": [], "errors": []},
        {"images": [], "status": "success"},
        {"error": "a sentence"},
        {"error": {"message": "no sentence"}, "code": "internal", "retryable": False},
        {"error": "a sentence", "code": "Not A Code", "retryable": False},
        {"error": "a sentence", "code": "internal", "retryable": "no"},
    ],
)
def test_what_the_worker_never_returns_is_none(value: dict[str, Any]) -> None:
    assert not OUTPUT.is_valid(value)
