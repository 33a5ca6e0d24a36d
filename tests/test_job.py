"""Requests as worker-comfyui's clients send them, and the shapes they get back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.errors import ImagesInvalid, InputMissing, InputNotJson, RequestError, WorkflowMissing
from worker.job import InputImage, OutputItem, Request, Result

GRAPH = {"1": {"class_type": "X", "inputs": {}}}


def test_a_request_as_an_object() -> None:
    value = {"workflow": GRAPH, "images": [{"name": "a.png", "image": "QQ=="}], "comfy_org_api_key": "k", "unknown": 1}
    assert Request.parse(value) == Request(GRAPH, (InputImage("a.png", "QQ=="),), "k")


def test_a_request_as_a_json_string() -> None:
    assert Request.parse(json.dumps({"workflow": GRAPH})) == Request(GRAPH)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, InputMissing, "Please provide input"),
        ("{nope", InputNotJson, "Invalid JSON format in input"),
        ("[1]", InputNotJson, "Invalid JSON format in input"),
        ([1], InputNotJson, "Invalid JSON format in input"),
        ({}, WorkflowMissing, "Missing 'workflow' parameter"),
        ({"workflow": None}, WorkflowMissing, "Missing 'workflow' parameter"),
        ({"workflow": GRAPH, "images": {}}, ImagesInvalid, "'images' must be a list of objects with 'name' and 'image' keys"),
        ({"workflow": GRAPH, "images": ["a"]}, ImagesInvalid, "'images' must be"),
        ({"workflow": GRAPH, "images": [{"name": "a"}]}, ImagesInvalid, "'images' must be"),
        ({"workflow": GRAPH, "images": [{"name": 1, "image": "QQ=="}]}, ImagesInvalid, "'images' must be"),
        ({"workflow": GRAPH, "images": [{"name": "", "image": "QQ=="}]}, ImagesInvalid, "'images' must be"),
    ],
)
def test_bad_requests_get_the_sentence_that_clients_match_on(value: Any, error: type[RequestError], text: str) -> None:
    with pytest.raises(error) as caught:
        Request.parse(value)
    assert str(caught.value).startswith(text)


def test_a_result_has_the_keys_clients_know_and_more() -> None:
    item = OutputItem("a.png", "base64", "QQ==", "9", "sub", "image/png", 1)
    result = Result((item,)).to_dict()
    assert set(result) == {"images"}
    assert {"filename": "a.png", "type": "base64", "data": "QQ=="}.items() <= result["images"][0].items()


def test_a_result_without_pictures_says_so() -> None:
    assert Result().to_dict() == {"images": [], "status": "success_no_images"}


def test_dropped_outputs_are_named_beside_those_that_worked() -> None:
    assert Result((), ("node 6 was dropped",)).to_dict()["errors"] == ["node 6 was dropped"]
