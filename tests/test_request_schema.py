"""docs/request.schema.json and the code say the same about what a request is, in both directions."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devkit.local_worker import PROJECT
from worker.editor.convert import classes_to_convert, convert, is_saved_workflow
from worker.errors import RequestError
from worker.graph.graph import parse_graph
from worker.graph.overrides import apply_overrides
from worker.graph.paths import check_paths
from worker.job import Request
from worker.media.bucket import job_target
from worker.media.inputs import _check_apart, _input_name, base64_pieces
from worker.media.url_inputs import UrlFetcher
from worker.models import lists
from worker.models.sources import Sources
from worker.store.layout import Layout
from worker.volume_workflows import is_workflow_name

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA: dict[str, Any] = json.loads((PROJECT / "docs" / "request.schema.json").read_text("utf-8"))
BODY = jsonschema.Draft202012Validator(SCHEMA)
INPUT: dict[str, Any] = SCHEMA["$defs"]["input"]
HOSTS = ("huggingface.co", "civitai.com")
LISTS = Sources.read()
FETCHER = UrlFetcher()


# --- the two verdicts -----------------------------------------------------------------------------


def schema_accepts(body: object) -> bool:
    return bool(BODY.is_valid(body))


def refusal(body: dict[str, Any]) -> str | None:
    """The code of the error that the worker answers this request with before anything runs; None when it would be run."""
    try:
        _checked(body)
    except RequestError as exc:
        return exc.code
    return None


def _checked(body: dict[str, Any]) -> None:
    request = Request.parse(body.get("input"))
    job_target(body.get("s3Config"))
    LISTS.with_request(request.models, HOSTS)
    _check_apart([_input_name(file) for file in request.files])
    for file in request.files:
        if file.url is not None:
            FETCHER.check(file.name, file.url)
        if file.data is not None:
            list(base64_pieces(file.name, file.data))
    if request.workflow_from is not None:
        return  # what the file carries is no part of the request
    graph = request.workflow
    if is_workflow_name(graph):
        Layout(Path("/v")).workflow(str(graph))
        return  # what the file holds is no part of the request
    if is_saved_workflow(graph):
        if classes_to_convert(graph):
            return  # ComfyUI's definitions are needed to say more
        graph = convert(graph, {}).graph
    check_paths(apply_overrides(parse_graph(graph), request.set or {}))


# --- the same fields ------------------------------------------------------------------------------


class Recording(dict[str, Any]):
    """An object that remembers which of its keys were asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


GRAPH: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tiny"}, "_meta": {"title": "Save"}},
}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_it_has_the_fields_that_the_parser_asks_for_and_no_other() -> None:
    value = Recording({"workflow": GRAPH})
    Request.parse(value)
    assert set(INPUT["properties"]) == value.asked


def test_it_has_the_fields_of_a_request() -> None:
    # Where a request has one list of files, clients have two keys for it.
    assert set(INPUT["properties"]) == {field.name for field in dataclasses.fields(Request)} | {"images"}


@pytest.mark.parametrize(("key", "data_key"), [("images", "image"), ("files", "data")])
def test_it_has_the_fields_of_a_file(key: str, data_key: str) -> None:
    file = Recording({"name": "a", data_key: "QQ=="})
    Request.parse({"workflow": GRAPH, key: [file]})
    assert set(SCHEMA["$defs"][key.removesuffix("s")]["properties"]) == file.asked


def test_it_has_the_fields_of_a_model() -> None:
    known = lists._FIELDS | lists.OTHER_WORDS.keys() | lists._IGNORED
    assert set(SCHEMA["$defs"]["model"]["properties"]) == known


def test_it_has_the_fields_of_a_bucket() -> None:
    config = Recording(S3)
    job_target(config)
    (full,) = [form for form in SCHEMA["$defs"]["s3Config"]["anyOf"] if "properties" in form]
    assert set(full["properties"]) == set(full["required"]) == config.asked


def test_the_worker_reads_no_other_key_of_a_job_than_it_says() -> None:
    code = "\n".join(path.read_text("utf-8") for path in (PROJECT / "worker").rglob("*.py"))
    read = set(re.findall(r"""\bjob(?:\.get\(|\[)"(\w+)\"""", code))
    assert read - {"id"} == {"input", "s3Config"}  # RunPod gives each job its id
    assert set(SCHEMA["properties"]) == {"input", "s3Config"} | {"webhook", "policy"}  # the latter are RunPod's alone


# --- what people read in their editor -------------------------------------------------------------


def parts(schema: dict[str, Any], where: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in the schema, with the path to it."""
    yield where, schema
    for key in ("properties", "$defs"):
        for name, part in schema.get(key, {}).items():
            yield from parts(part, f"{where}/{key}/{name}")
    for key in ("items", "additionalProperties", "propertyNames", "if", "then", "else"):
        if isinstance(schema.get(key), dict):
            yield from parts(schema[key], f"{where}/{key}")
    for key in ("anyOf", "allOf", "oneOf"):
        for at, part in enumerate(schema.get(key, ())):
            yield from parts(part, f"{where}/{key}/{at}")


def described() -> dict[str, dict[str, Any]]:
    """The properties that a person completes: those of the body, the input, files, models, the bucket, the policy."""
    found = {where: part for where, part in parts(SCHEMA) if re.fullmatch(r".*/properties/[^/]+", where)}
    return {where: part for where, part in found.items() if not re.search(r"savedWorkflow|/(oneOf|allOf|if)/", where)}


@pytest.mark.parametrize("where", described())
def test_every_field_says_what_it_is_in_plain_sentences(where: str) -> None:
    part = described()[where]
    text = str(part.get("description") or SCHEMA["$defs"][part["$ref"].rpartition("/")[2]]["description"])
    assert text[-1] == "."
    assert len(text) <= 320
    assert "\n" not in text


@pytest.mark.parametrize(("where", "part"), [(where, part) for where, part in parts(SCHEMA) if "examples" in part])
def test_its_examples_are_right(where: str, part: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator({"$defs": SCHEMA["$defs"], **part})
    assert all(validator.is_valid(example) for example in part["examples"]), where


@pytest.mark.parametrize("body", SCHEMA["examples"])
def test_its_whole_examples_would_be_run(body: dict[str, Any]) -> None:
    # The second one's override names a node of the workflow that its picture carries.
    assert refusal(body) is None


def requests_people_copy() -> Iterator[Any]:
    """Every whole request in the pages and the examples, and RunPod's tests of the image."""
    for path in (PROJECT / "examples").rglob("*.json"):
        yield pytest.param(json.loads(path.read_text("utf-8")), id=str(path.relative_to(PROJECT)))
    for path in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]:
        for block in re.findall(r"^```json\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            if re.match(r'\s*\{\s*"input"', block):
                yield pytest.param(json.loads(block), id=path.name)
    for test in json.loads((PROJECT / ".runpod" / "tests.json").read_text("utf-8"))["tests"]:
        yield pytest.param({"input": test["input"]}, id=f".runpod/tests.json: {test['name']}")


@pytest.mark.parametrize("value", list(requests_people_copy()))
def test_what_people_copy_is_right(value: dict[str, Any]) -> None:
    body = value if "input" in value else {"input": {"workflow": value}}
    assert [error.message for error in BODY.iter_errors(body)] == []


def test_its_defaults_are_the_parsers() -> None:
    request = Request.parse({"workflow": GRAPH})
    defaults = {name: part["default"] for name, part in INPUT["properties"].items() if "default" in part}
    assert {name: getattr(request, name) for name in defaults} == defaults
    assert INPUT["properties"]["seed"]["anyOf"][1]["maximum"] == 2**64 - 1


# --- the same verdict -----------------------------------------------------------------------------

S3 = {"accessId": "a", "accessSecret": "b", "bucketName": "results", "endpointUrl": "https://s3.example.com"}
SAVED: dict[str, Any] = {"nodes": [{"id": 1, "type": "EmptyImage"}], "links": []}
LORA = {"folder": "loras", "name": "x.safetensors", "source": "hf://org/repo/x.safetensors"}
FILE = {"name": "a.png", "image": "QQ=="}


def job(**fields: Any) -> dict[str, Any]:
    return {"input": {"workflow": GRAPH, **fields}}


def images(**fields: Any) -> dict[str, Any]:
    return job(images=[FILE | fields])


def files(**fields: Any) -> dict[str, Any]:
    return job(files=[{"name": "a.mp4", "data": "QQ=="} | fields])


def model(**fields: Any) -> dict[str, Any]:
    return job(models=[LORA | fields])


def graph(**nodes: Any) -> dict[str, Any]:
    return {"input": {"workflow": {**GRAPH, **nodes}}}


GOOD: dict[str, dict[str, Any]] = {
    "a workflow": job(),
    "keys nobody knows": {"input": {"workflow": GRAPH, "unknown": 1}, "unknown": 2},
    "every field left out as null": job(**dict.fromkeys(set(INPUT["properties"]) - {"workflow"})),
    "every field": job(
        images=[FILE],
        files=[{"name": "b.mp4", "data": "QQ==", "subfolder": "clips"}],
        set={"1.width": 128, "SaveImage.filename_prefix": "x", "Save.images": ["1", 0]},
        seed="random",
        timeout_s=300,
        outputs=["2"],
        previews=True,
        return_timings=False,
        models=[LORA],
        comfy_org_api_key="k",
        extra_pnginfo={"workflow": SAVED},
    ),
    "a workflow as the editor saves it": {"input": {"workflow": SAVED}},
    "a saved workflow with links of both kinds": {
        "input": {
            "workflow": {
                "nodes": [{"id": 1, "type": "A"}, {"id": "2", "type": "B", "inputs": [{"name": "x", "link": 1}]}],
                "links": [
                    [1, 1, 0, 2, 0, "X"],
                    None,
                    {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 1},
                ],
            }
        }
    },
    "a saved workflow without links": {"input": {"workflow": {"nodes": [{"id": 1.0, "type": "A", "inputs": None}]}}},
    "a node that is called nodes": graph(nodes={"class_type": "X", "inputs": {}}),
    "a node without inputs": graph(x={"class_type": "X", "inputs": {}}),
    "a workflow from a file": {"input": {"workflow_from": "a.png", "images": [FILE]}},
    "a workflow from a file, the other null": {"input": {"workflow": None, "workflow_from": "a.png", "images": [FILE]}},
    "no images": job(images=[]),
    "an image with a prefix": images(image="data:image/png;base64,QQ=="),
    "an image by address": images(image=None, url="https://example.com/a.png?x=1"),
    "an image without its other key": {"input": {"workflow": GRAPH, "images": [{"name": "a", "url": "http://example.com"}]}},
    "an image in a folder": images(name="b/c.png", subfolder="a"),
    "an image in no folder": images(subfolder=""),
    "an image with a strange name": images(name="..a/ü ~.png"),
    "an image with a dot before": images(name="./a.png"),
    "a file": files(),
    "a file by address in capitals": files(data=None, url="HTTPS://EXAMPLE.COM/a.mp4"),
    "a seed": job(seed=0),
    "a seed as some languages write it": job(seed=42.0),
    "the largest seed": job(seed=2**64 - 1),
    "the next seed": job(seed="next"),
    "half a second": job(timeout_s=0.5),
    "outputs by number": job(outputs=[2, "57:3", 9.0]),
    "nothing to set": job(set={}),
    "a text to set": job(set={"1.color": "a fox"}),
    "an input to set whose name has a dot": {
        "input": {"workflow": {"r": {"class_type": "R", "inputs": {"t.width": 1}}}, "set": {"r.t.width": 2}}
    },
    "no models": job(models=[]),
    "a model named by its source": model(name=None),
    "a model in a folder of its folder": model(name="flux/x.gguf", sha256="sha256:" + "aB" * 32, size_bytes=7),
    "a model with all that ComfyUI says of one": model(hash="ab", hash_type="MD5", description="an ink lora"),
    "a model in ComfyUI's words": job(
        models=[{"directory": "vae", "name": "x.SFT", "url": "https://huggingface.co/o/r/resolve/main/x"}]
    ),
    "a model as a line": job(
        models=["loras=hf://org/repo/x.safetensors", "loras/flux/y.safetensors=hf://org/repo/x.safetensors"]
    ),
    "a model as a line with its hash": job(models=["loras=hf://org/repo/x.safetensors#sha256=" + "0" * 64]),
    "a model from Civitai": model(source="https://civitai.com/api/download/models/1?type=Model"),
    "an empty key": job(comfy_org_api_key=""),
    "no bucket": {**job(), "s3Config": {}},
    "no bucket at all": {**job(), "s3Config": None},
    "a bucket": {**job(), "s3Config": S3},
    "a bucket with its name in the address, and more": {
        **job(),
        "s3Config": {**S3, "endpointUrl": " http://10.0.0.5:9000/results/ ", "x": 1},
    },
    "RunPod's own": {
        **job(),
        "webhook": "https://example.com",
        "policy": {"executionTimeout": 5000, "ttl": 10000, "lowPriority": True},
    },
}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "input_missing"),
    "no input": ({"input": None}, "input_missing"),
    "a list as input": ({"input": [1]}, "input_not_json"),
    "no workflow": ({"input": {}}, "workflow_missing"),
    "a workflow that is null": ({"input": {"workflow": None}}, "workflow_missing"),
    "an empty graph": ({"input": {"workflow": {}}}, "workflow_empty"),
    "a list as workflow": ({"input": {"workflow": [1]}}, "workflow_invalid"),
    "a text as workflow": ({"input": {"workflow": "{}"}}, "workflow_empty"),
    "no text as workflow": ({"input": {"workflow": ""}}, "unsafe_path"),
    "a workflow's name upwards": ({"input": {"workflow": "../x"}}, "unsafe_path"),
    "a workflow's name upwards with backslashes": ({"input": {"workflow": "a\\..\\..\\x"}}, "unsafe_path"),
    "a workflow's name from the root": ({"input": {"workflow": "/etc/passwd"}}, "unsafe_path"),
    "a workflow's name with a NUL": ({"input": {"workflow": "a\0"}}, "unsafe_path"),
    "false as workflow": ({"input": {"workflow": False}}, "workflow_invalid"),
    "a wrapped graph": ({"input": {"workflow": {"prompt": GRAPH}}}, "workflow_invalid"),
    "a wrapped graph and more": ({"input": {"workflow": {"prompt": GRAPH, "client_id": "x"}}}, "workflow_invalid"),
    "a node that is a list": (graph(x=[]), "workflow_invalid"),
    "a node without a class": (graph(x={"inputs": {}}), "workflow_invalid"),
    "a node with an empty class": (graph(x={"class_type": "", "inputs": {}}), "workflow_invalid"),
    "a node with no object of inputs": (graph(x={"class_type": "X", "inputs": []}), "workflow_invalid"),
    "a node that lacks inputs": (graph(x={"class_type": "X"}), "workflow_invalid"),
    "an empty saved workflow": ({"input": {"workflow": {"nodes": [], "links": []}}}, "workflow_empty"),
    "a saved node without a type": ({"input": {"workflow": {"nodes": [{"id": 1}]}}}, "ui_workflow_invalid"),
    "a saved node without an id": ({"input": {"workflow": {"nodes": [{"type": "A"}]}}}, "ui_workflow_invalid"),
    "a saved node that is none": ({"input": {"workflow": {"nodes": [1]}}}, "ui_workflow_invalid"),
    "links that are no list": ({"input": {"workflow": SAVED | {"links": {}}}}, "ui_workflow_invalid"),
    "a link that is too short": ({"input": {"workflow": SAVED | {"links": [[1, 2]]}}}, "ui_workflow_invalid"),
    "both a workflow and a file": (job(workflow_from="a.png", images=[FILE]), "field_invalid"),
    "a file of no name": ({"input": {"workflow_from": "", "images": [FILE]}}, "field_invalid"),
    "a number for a file": ({"input": {"workflow_from": 1}}, "field_invalid"),
    "images that are no list": (job(images={}), "images_invalid"),
    "images that are a text": (job(images="x"), "images_invalid"),
    "an image that is a text": (job(images=["a"]), "images_invalid"),
    "an image without data": (job(images=[{"name": "a"}]), "images_invalid"),
    "an image without a name": (job(images=[{"image": "QQ=="}]), "images_invalid"),
    "an image whose name is a number": (images(name=1), "images_invalid"),
    "an image whose name is empty": (images(name=""), "images_invalid"),
    "an image whose data is a list": (images(image=[1]), "images_invalid"),
    "an image with a number as folder": (images(subfolder=0), "images_invalid"),
    "an image with a list as folder": (images(subfolder=[]), "images_invalid"),
    "an image with the key of a file": (job(images=[{"name": "a", "data": "QQ=="}]), "images_invalid"),
    "an image of no bytes": (images(image=""), "image_not_base64"),
    "an image name upwards": (images(name="../a.png"), "unsafe_path"),
    "an image name upwards in the middle": (images(name="a/../../b"), "unsafe_path"),
    "an image name from the root": (images(name="/etc/a"), "unsafe_path"),
    "an image name upwards with backslashes": (images(name="a\\..\\b"), "unsafe_path"),
    "an image name with a drive": (images(name="C:\\b"), "unsafe_path"),
    "a folder with a drive": (images(subfolder="c:\\"), "unsafe_path"),
    "an image name with a NUL": (images(name="a\0"), "unsafe_path"),
    "an image name that is a folder": (images(name="a/"), "input_name_invalid"),
    "an image name that is a dot": (images(name="."), "input_name_invalid"),
    "an image name of a folder alone": (images(name="./", subfolder="a"), "input_name_invalid"),
    "a folder upwards": (images(subfolder="a/.."), "unsafe_path"),
    "a folder from the root": (images(subfolder="/"), "unsafe_path"),
    "an address of another kind": (images(image=None, url="file:///etc/passwd"), "input_url_refused"),
    "an address without a host": (images(image=None, url="https://"), "input_url_refused"),
    "an address with a user": (images(image=None, url="https://u:p@example.com/a"), "input_url_refused"),
    "an address that is empty": (images(image=None, url=""), "images_invalid"),
    "files that are no list": (job(files={"name": "a"}), "field_invalid"),
    "a file with the key of an image": (job(files=[{"name": "a", "image": "QQ=="}]), "field_invalid"),
    "a list to set": (job(set=["1.width"]), "field_invalid"),
    "a name without a node to set": (job(set={"width": 1}), "override_invalid"),
    "a name without an input to set": (job(set={"1.": 1}), "override_invalid"),
    "dots to set": (job(set={"..": 1}), "override_invalid"),
    "a name of any length to set": (job(set={"1." + "x" * 1000: 1}), "override_invalid"),
    "a seed of another word": (job(seed="fixed"), "field_invalid"),
    "a seed below -1": (job(seed=-2), "field_invalid"),
    "half a seed": (job(seed=0.5), "field_invalid"),
    "a seed that is true": (job(seed=True), "field_invalid"),
    "a seed in a text": (job(seed="42"), "field_invalid"),
    "a seed that ComfyUI does not take": (job(seed=2**64), "field_invalid"),
    "a time that is true": (job(timeout_s=True), "field_invalid"),
    "a time in a text": (job(timeout_s="300"), "field_invalid"),
    "outputs that are a text": (job(outputs="9"), "field_invalid"),
    "outputs that are true": (job(outputs=[True]), "field_invalid"),
    "outputs that are half": (job(outputs=[0.5]), "field_invalid"),
    "outputs that are null": (job(outputs=[None]), "field_invalid"),
    "previews in a text": (job(previews="true"), "field_invalid"),
    "previews as a number": (job(previews=1), "field_invalid"),
    "a format of another word": (job(output_format="avif"), "field_invalid"),
    "a quality of 0": (job(quality=0), "field_invalid"),
    "a quality above 100": (job(quality=101), "field_invalid"),
    "half a quality": (job(quality=0.5), "field_invalid"),
    "timings in a text": (job(return_timings="yes"), "field_invalid"),
    "a key that is a number": (job(comfy_org_api_key=1), "field_invalid"),
    "a key that is an object": (job(comfy_org_api_key={}), "field_invalid"),
    "metadata in a text": (job(extra_pnginfo="{}"), "field_invalid"),
    "models that are no list": (job(models={}), "models_invalid"),
    "a model that is a number": (job(models=[1]), "models_invalid"),
    "a model without a folder": (model(folder=None), "model_spec_invalid"),
    "a model without a source": (model(source=None), "model_spec_invalid"),
    "a model whose name is a number": (model(name=1), "model_spec_invalid"),
    "a model upwards": (model(name="../x.safetensors"), "model_spec_invalid"),
    "a model from the root": (model(name="/x.safetensors"), "model_spec_invalid"),
    "a model in a folder upwards": (model(folder="../loras"), "model_spec_invalid"),
    "a model in a hidden folder": (model(folder=".git"), "model_spec_invalid"),
    "a model with backslashes": (model(name="a\\x.safetensors"), "model_spec_invalid"),
    "a model from nowhere": (model(source="x.safetensors"), "model_spec_invalid"),
    "a model by FTP": (model(source="ftp://huggingface.co/x.safetensors"), "model_spec_invalid"),
    "a model with a space in its source": (model(source="hf://org/repo/x y.safetensors"), "model_spec_invalid"),
    "a model that can hold code": (model(name="x.ckpt"), "model_suffix_not_allowed"),
    "a model without a suffix": (model(name="x"), "model_suffix_not_allowed"),
    "a model with a slip in a field's name": (model(sha265="0" * 64), "model_spec_invalid"),
    "a model with a field nobody knows": (model(x=None), "model_spec_invalid"),
    "a model with half a hash": (model(sha256="abc"), "model_spec_invalid"),
    "a model of no size": (model(size_bytes=0), "model_spec_invalid"),
    "a model as an address alone": (job(models=["hf://org/repo/x.safetensors"]), "model_spec_invalid"),
    "a model as a word": (job(models=["x.safetensors"]), "model_spec_invalid"),
    "a bucket that is a text": ({**job(), "s3Config": "https://s3.example.com"}, "s3_config_invalid"),
    "half a bucket": ({**job(), "s3Config": {"bucketName": "b"}}, "s3_config_invalid"),
    "a bucket with a blank name": ({**job(), "s3Config": {**S3, "bucketName": " "}}, "s3_config_invalid"),
    "a bucket with a number as key": ({**job(), "s3Config": {**S3, "accessId": 1}}, "s3_config_invalid"),
    "a bucket at no address": ({**job(), "s3Config": {**S3, "endpointUrl": "s3.example.com"}}, "s3_config_invalid"),
    "a bucket with a user": ({**job(), "s3Config": {**S3, "endpointUrl": "https://u:p@s3.example.com"}}, "s3_config_invalid"),
    "a bucket with a query": ({**job(), "s3Config": {**S3, "endpointUrl": "https://s3.example.com?a=b"}}, "s3_config_invalid"),
}

BEYOND_A_SCHEMA: dict[str, tuple[dict[str, Any], str]] = {
    "a workflow's name that no disk takes": ({"input": {"workflow": "a\ud800"}}, "unsafe_path"),
    # What is inside a text: a schema compares texts with patterns, it decodes none and reads no JSON in them.
    "JSON that is none": ({"input": "{nope"}, "input_not_json"),
    "a workflow as JSON that is none": ({"input": {"workflow": "{nope"}}, "workflow_invalid"),
    "the JSON of a list": ({"input": "[1]"}, "input_not_json"),
    "the JSON of a job without a workflow": ({"input": "{}"}, "workflow_missing"),
    "an image that is not base64": (images(image="%%%"), "image_not_base64"),
    # What one field says about another.
    "a link to nowhere": (job(workflow={"x": {"class_type": "X", "inputs": {"a": ["99", 0]}}}), "workflow_invalid"),
    "a link to itself": (job(workflow={"x": {"class_type": "X", "inputs": {"a": ["x", 0]}}}), "workflow_invalid"),
    "a link by number": (job(workflow={"1": {"class_type": "X", "inputs": {"a": [1, 0]}}}), "workflow_invalid"),
    "two saved nodes with one id": ({"input": {"workflow": {"nodes": SAVED["nodes"] * 2}}}, "ui_workflow_invalid"),
    "a saved workflow of notes": ({"input": {"workflow": {"nodes": [{"id": 1, "type": "Note"}]}}}, "workflow_empty"),
    "a node to set that is not there": (job(set={"99.width": 1}), "override_invalid"),
    "an input to set that is not there": (job(set={"1.steps": 1}), "override_invalid"),
    "a file below a file": (job(images=[FILE | {"name": "a"}, FILE | {"name": "a/b"}]), "input_name_invalid"),
    "a model whose source tells no name": (
        model(name=None, source="https://civitai.com/api/download/models/1"),
        "model_spec_invalid",
    ),
    "a model whose source tells a name with code": (
        model(name=None, source="hf://org/repo/x.ckpt"),
        "model_suffix_not_allowed",
    ),
    # Sizes in bytes, characters that no disk takes, and names that the worker keeps for itself.
    "a name that is too long": (images(name="ü" * 128), "input_name_invalid"),
    "half a character": (images(name="\ud800.png"), "input_name_invalid"),
    "a name that the worker keeps for itself": (images(name=".job-1/a"), "input_name_invalid"),
    # Numbers that JSON writes and no computer has.
    "a time for ever": (job(timeout_s=10**400), "field_invalid"),
    "infinite time": (job(timeout_s=json.loads("1e999")), "field_invalid"),
    "a size that is 7.0": (model(size_bytes=7.0), "model_spec_invalid"),
    # What a class's name, an input's name or a provider's address mean.
    "a file of the system": (graph(x={"class_type": "LoadImage", "inputs": {"image": "/etc/passwd"}}), "unsafe_path"),
    "an output prefix upwards": (graph(x={"class_type": "SaveImage", "inputs": {"filename_prefix": "../x"}}), "unsafe_path"),
    "a page of Hugging Face": (model(source="https://huggingface.co/org/repo"), "model_spec_invalid"),
    "half a repository": (model(source="hf://org/x.safetensors"), "model_spec_invalid"),
    # What the operator decides, and what addresses lead to.
    "a host that is not allowed": (model(source="https://example.com/x.safetensors"), "model_host_not_allowed"),
    "a plain http address": (model(source="http://civitai.com/api/download/models/1"), "model_spec_invalid"),
    "an address of this machine": (images(image=None, url="http://127.0.0.1/a"), "input_url_refused"),
    "an address in another spelling": (images(image=None, url="http://2130706433/a"), "input_url_refused"),
    "a bucket at no port": ({**job(), "s3Config": {**S3, "endpointUrl": "https://s3.example.com:port"}}, "s3_config_invalid"),
}

RUNPODS_OWN: dict[str, dict[str, Any]] = {
    "a webhook that is no address": {**job(), "webhook": "example.com"},
    "a policy in seconds": {**job(), "policy": {"executionTimeout": 300}},
    "more than a week": {**job(), "policy": {"ttl": 604_800_001}},
    "a priority in a text": {**job(), "policy": {"lowPriority": "yes"}},
}


@pytest.mark.parametrize("name", GOOD)
def test_both_accept(name: str) -> None:
    assert [error.message for error in BODY.iter_errors(GOOD[name])] == []
    assert refusal(GOOD[name]) is None


@pytest.mark.parametrize("name", BAD)
def test_both_refuse(name: str) -> None:
    body, code = BAD[name]
    assert refusal(body) == code
    assert not schema_accepts(body)


@pytest.mark.parametrize("name", BEYOND_A_SCHEMA)
def test_what_only_the_code_can_refuse(name: str) -> None:
    body, code = BEYOND_A_SCHEMA[name]
    assert refusal(body) == code
    assert schema_accepts(body), "the schema can say it after all: move it to BAD"


@pytest.mark.parametrize("name", RUNPODS_OWN)
def test_what_only_runpod_can_refuse(name: str) -> None:
    assert refusal(RUNPODS_OWN[name]) is None
    assert not schema_accepts(RUNPODS_OWN[name])


@pytest.mark.parametrize("name", [name for name, body in GOOD.items() if name != "keys nobody knows"])
def test_a_job_as_the_json_of_itself_is_the_same_job(name: str) -> None:
    body = {**GOOD[name], "input": json.dumps(GOOD[name]["input"])}
    assert schema_accepts(body)
    assert refusal(body) is None
    assert Request.parse(body["input"]) == Request.parse(GOOD[name]["input"])


# --- what nobody thought of -----------------------------------------------------------------------

# No line ends: Python's "$" also matches before one at the end, JavaScript's does not.
LETTERS = st.text("ab./\\~: \0", max_size=6)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | LETTERS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(LETTERS, inner, max_size=2),
    max_leaves=3,
)
NO_TEXT = ANYTHING.filter(lambda value: not isinstance(value, str))
URLS = st.sampled_from(["https://example.com/a", "http://example.com", "ftp://example.com", "https:/", "x", ""])


def a_file(data_key: str) -> st.SearchStrategy[Any]:
    """A file, or what is nearly one. Data of any text is left out: whether it is base64 no schema can say."""
    fields = {
        "name": LETTERS | NO_TEXT,
        "subfolder": LETTERS | NO_TEXT,
        data_key: st.sampled_from(["QQ==", "data:,QQ==", ""]) | NO_TEXT,
        "url": URLS | NO_TEXT,
    }
    paths = st.text("ab./", max_size=4) | LETTERS
    plain = st.fixed_dictionaries({"name": paths, data_key: st.just("QQ==")}, optional={"subfolder": paths})
    return plain | st.fixed_dictionaries({}, optional=fields) | ANYTHING


def a_model() -> st.SearchStrategy[Any]:
    name = LETTERS.map(lambda text: text.replace(" ", "c").replace("\0", "") + ".safetensors")
    folder = st.sampled_from(["loras", "a/b", "../a", "/a", "a//b", "a\\b", ".a", "C:a", "~a", ""])
    source = st.sampled_from(["hf://a/b/c.safetensors", " HF://a/b/c.gguf ", "huggingface.co/a/b", "hf:a", "hf://a/b/c d", ""])
    sha256 = st.sampled_from(["0" * 64, " sha256:" + "Ab" * 32, "0" * 63, ""])
    size = st.integers(-2, 5) | NO_TEXT.filter(lambda value: not isinstance(value, float))
    fields = {
        "name": name | NO_TEXT,
        "folder": folder | NO_TEXT,
        "source": source | NO_TEXT,
        "sha256": sha256,
        "size_bytes": size,
    }
    full = st.fixed_dictionaries({"folder": folder, "name": name, "source": source}, optional={"sha256": sha256})
    return full | st.fixed_dictionaries({}, optional=fields) | NO_TEXT


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "images": a_file("image").map(lambda file: [file]) | NO_TEXT,
    "files": a_file("data").map(lambda file: [file]) | NO_TEXT,
    "models": a_model().map(lambda model: [model]) | NO_TEXT,
    # Whether a name leads to an input no schema can say: these do, or cannot.
    "set": st.dictionaries(st.sampled_from(["1.width", "Save.images", "width", ".", ""]), st.integers(), max_size=2)
    | NO_TEXT.filter(lambda value: not isinstance(value, dict)),
    "seed": st.sampled_from(["random", "next", "1"]) | st.integers(0, 2**65) | ANYTHING,
    "timeout_s": ANYTHING,
    "outputs": st.lists(st.text(max_size=2) | ANYTHING, max_size=2) | ANYTHING,
    "previews": ANYTHING,
    "return_timings": ANYTHING,
    "output_format": st.sampled_from(["webp", "jpeg", "png"]) | ANYTHING,
    "quality": st.integers(0, 102) | ANYTHING,
    "comfy_org_api_key": ANYTHING,
    "extra_pnginfo": ANYTHING,
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_tried(field: str) -> None:
    @given(FIELDS[field])
    def agree(value: Any) -> None:
        body = job(**{field: value})
        assert schema_accepts(body) == (refusal(body) is None)

    agree()


def test_no_field_is_forgotten() -> None:
    assert set(FIELDS) | {"workflow", "workflow_from"} == set(INPUT["properties"])


@given(st.fixed_dictionaries({}, optional={"workflow": st.just(GRAPH) | ANYTHING, "workflow_from": ANYTHING}))
def test_every_workflow_is_tried(value: dict[str, Any]) -> None:
    body = {"input": value}
    assert schema_accepts(body) == (refusal(body) is None)
