"""Requests as worker-comfyui's clients send them, and the shapes they get back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from worker.errors import (
    FieldInvalid,
    ImagesInvalid,
    InputMissing,
    InputNotJson,
    InputTooDeep,
    RequestError,
    WorkflowInvalid,
    WorkflowMissing,
)
from worker.job import InputFile, OutputItem, Request, Result
from worker.preparation import check_outputs

if TYPE_CHECKING:
    from worker.graph.graph import Graph

GRAPH = {"1": {"class_type": "X", "inputs": {}}}


def test_a_request_as_an_object() -> None:
    value = {"workflow": GRAPH, "images": [{"name": "a.png", "image": "QQ=="}], "comfy_org_api_key": "k", "unknown": 1}
    assert Request.parse(value) == Request(GRAPH, (InputFile("a.png", "QQ=="),), "k")


def test_a_request_as_a_json_string() -> None:
    assert Request.parse(json.dumps({"workflow": GRAPH})) == Request(GRAPH)


def test_a_workflow_as_a_json_string() -> None:
    assert Request.parse({"workflow": f"\n {json.dumps(GRAPH)}"}) == Request(GRAPH)
    assert Request.parse({"workflow": "portrait"}) == Request("portrait"), "the name of one"
    with pytest.raises(WorkflowInvalid, match="a string that is no JSON"):
        Request.parse({"workflow": '{"1": '})
    with pytest.raises(InputTooDeep):
        Request.parse({"workflow": '{"1": ' + "[" * 200 + "]" * 200 + "}"})


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


def nested(levels: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize(
    "place",
    [
        lambda deep: {"workflow": {"1": {"class_type": "X", "inputs": {"undeclared": deep}}}},
        lambda deep: {"workflow": {"1": {"class_type": "X", "inputs": {}, "more": deep}}},
        lambda deep: {"workflow": {"nodes": [], "extra": deep}},
        lambda deep: {"workflow": GRAPH, "extra_pnginfo": {"workflow": deep}},
        lambda deep: {"workflow": GRAPH, "set": {"1.a": deep}},
    ],
)
def test_what_is_nested_deeper_than_comfyui_survives_is_refused(place: Any, kind: type) -> None:
    assert Request.parse(place(nested(90, kind)))
    for levels in (101, 500, 100_000):
        with pytest.raises(InputTooDeep) as caught:
            Request.parse(place(nested(levels, kind)))
        assert str(caught.value).startswith("The input has lists or objects nested more than 100 levels deep")


ITEM = OutputItem("a.png", "base64", "QQ==", "9", "sub", "image/png", 1)


def test_a_result_has_the_keys_clients_know_and_more() -> None:
    result = Result((ITEM,)).to_dict()
    assert result == {
        "images": [
            {
                "filename": "a.png",
                "type": "base64",
                "data": "QQ==",
                "node_id": "9",
                "subfolder": "sub",
                "media_type": "image/png",
                "size_bytes": 1,
            }
        ]
    }


def test_the_other_lists_are_there_when_they_hold_something_and_images_always() -> None:
    result = Result(videos=(ITEM,), audio=(ITEM,), text=(ITEM,), files=(ITEM,), timings={"run_s": 1.5}).to_dict()
    assert list(result) == ["images", "videos", "audio", "text", "files", "timings"]
    assert result["images"] == []
    assert result["timings"] == {"run_s": 1.5}


@pytest.mark.parametrize("kind", ["images", "videos", "audio", "text", "files"])
def test_a_result_with_anything_in_it_has_no_status(kind: str) -> None:
    lists: dict[str, Any] = {kind: (ITEM,)}
    assert "status" not in Result(**lists).to_dict()


def test_a_result_with_nothing_in_it_says_so() -> None:
    assert Result().to_dict() == {"images": [], "status": "success_no_images"}


def test_what_is_missing_is_named_beside_what_is_there() -> None:
    assert Result((), ("node 6 was dropped",)).to_dict()["errors"] == ["node 6 was dropped"]


def test_whole_numbers_may_come_as_json_writes_them_elsewhere() -> None:
    request = Request.parse({"workflow": GRAPH, "seed": 42.0, "outputs": [2, 9.0, "57:3"]})
    assert (request.seed, type(request.seed)) == (42, int)
    assert request.outputs == frozenset({"2", "9", "57:3"})


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("timeout_s", 10**400, "'timeout_s' must be a number of seconds"),  # longer than any float
        ("seed", 2**64, "'seed' must be 'random' or -1, 'next', or a whole number"),
        ("outputs", "9", "'outputs' must be a list of node ids"),
        ("comfy_org_api_key", 7, "'comfy_org_api_key' must be a string"),  # not the worker's own key in its place
        ("extra_pnginfo", "{}", "'extra_pnginfo' must be an object"),
        ("files", [{"name": "a", "data": "QQ==", "subfolder": 0}], "'files' must be a list of objects"),
    ],
)
def test_what_was_meant_otherwise_is_not_passed_over(field: str, value: Any, text: str) -> None:
    with pytest.raises(FieldInvalid) as caught:
        Request.parse({"workflow": GRAPH, field: value})
    assert str(caught.value).startswith(text)


def test_what_says_nothing_changes_nothing() -> None:
    request = Request.parse({"workflow": GRAPH, "timeout_s": 0, "outputs": [], "seed": -1})
    assert (request.timeout_s, request.outputs, request.seed) == (None, None, "random")


def test_of_an_image_with_data_and_an_address_the_data_counts() -> None:
    entry = {"name": "a.png", "image": "QQ==", "url": "https://example.com/a.png"}
    assert Request.parse({"workflow": GRAPH, "images": [entry]}).files == (InputFile("a.png", data="QQ=="),)


def test_outputs_of_nodes_that_the_workflow_does_not_have_are_refused_before_it_runs() -> None:
    graph: Graph = {"5": {"class_type": "X", "inputs": {}}, "57:3": {"class_type": "X", "inputs": {}}}
    check_outputs(graph, None)
    check_outputs(graph, {"5", "57:3", "5.0.1"})
    with pytest.raises(FieldInvalid, match="'outputs' names nodes that the workflow does not have: 57, 99"):
        check_outputs(graph, {"5", "99", "57"})


@pytest.mark.parametrize(("key", "name"), [("images", "image"), ("files", "data")])
@pytest.mark.parametrize("address", ["https://example.com/in.png", "HTTP://example.com/a,b", " https://example.com/in.png\n"])
def test_an_address_in_the_place_of_base64_is_one(key: str, name: str, address: str) -> None:
    request = Request.parse({"workflow": {}, key: [{"name": "in.png", name: address, "url": None}]})
    assert request.files == (InputFile("in.png", url=address.strip()),)
