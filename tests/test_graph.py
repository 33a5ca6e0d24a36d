"""What a graph names, whether it is one, and whether it stays inside its folders."""

from __future__ import annotations

import ast
import json
import math
import random
import subprocess
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.comfyui_data import known
from worker.errors import (
    UnsafePath,
    WorkflowEmpty,
    WorkflowInvalid,
    WorkflowMissing,
    WorkflowNotFinite,
    WorkflowUiFormat,
)
from worker.graph.graph import BrokenLink, is_link, needed_nodes, parse_graph, without_wrapper
from worker.graph.model_names import NamedModel, named_models, with_accents, with_slashes
from worker.graph.paths import check_paths
from worker.graph.rejection import dropped_outputs, rejection

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from devkit.engine.build import Engine

LOADER = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "out"}}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"1": {"class_type": class_type, "inputs": inputs}}


# --- is it a graph ------------------------------------------------------------------------------


def test_names_are_written_as_the_files_have_them() -> None:
    old, new = "e\u0301.safetensors", "é.safetensors"
    rows = {"on": True, "lora": old, "strength": 1}
    graph: dict[str, Any] = {
        "1": {"class_type": "LoraLoader", "inputs": {"lora_name": old, "row": rows, "other": "x.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a embedding:e\u0301 cat, e\u0301"}},
    }
    models = named_models(graph)
    forms = {(model.folders, model.file_names): "NFC" for model in models if not model.name.isascii()}
    after = with_accents(graph, models, forms)  # type: ignore[arg-type] # the two forms are plain texts here
    assert after["1"]["inputs"] == {"lora_name": new, "row": rows | {"lora": new}, "other": "x.safetensors"}
    assert after["2"]["inputs"]["text"] == "a embedding:é cat, e\u0301"
    assert graph["1"]["inputs"]["row"]["lora"] == old


def test_a_graph_is_handed_on_as_the_very_same_object_unchanged() -> None:
    graph = {"1": LOADER, "2": SAVE | {"_meta": {"title": "Save"}, "is_changed": [None]}}
    before = json.dumps(graph)
    assert parse_graph(graph) is graph
    assert json.dumps(graph) == before


def test_no_workflow() -> None:
    with pytest.raises(WorkflowMissing, match="Missing 'workflow' parameter"):
        parse_graph(None)


def test_an_empty_graph() -> None:
    with pytest.raises(WorkflowEmpty):
        parse_graph({})


@pytest.mark.parametrize(
    "ui",
    [
        {"nodes": [], "links": []},
        {"last_node_id": 3, "nodes": [{"id": 1, "type": "SaveImage"}], "links": [], "version": 0.4},
    ],
)
def test_the_editors_own_format_has_to_be_converted_first(ui: object) -> None:
    with pytest.raises(WorkflowUiFormat, match="worker convert"):
        parse_graph(ui)


def test_an_editors_workflow_in_a_wrapping_is_told_to_come_out() -> None:
    with pytest.raises(WorkflowInvalid, match="wrapped in 'workflow'"):
        parse_graph({"workflow": {"nodes": [{"id": 1}], "links": []}})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([LOADER], "the workflow is a list; send an object"),
        ('{"1": {}}', "the workflow is a string; send an object"),
        (7, "the workflow is a number"),
        (True, "the workflow is true or false"),
        ({"prompt": {"1": LOADER}, "client_id": "x"}, "wrapped in 'prompt'; send the object inside 'prompt'"),
        ({"input": {"workflow": {"1": LOADER}}}, "wrapped in 'input'"),
        ({"workflow": {"nodes": []}, "output": {"1": LOADER}}, "wrapped in 'output'"),
        ({"1": None}, "node 1 is null"),
        ({"1": "SaveImage"}, "node 1 is a string"),
        ({"1": LOADER, "version": 0.4}, "node version is a number; the workflow may hold nodes only"),
        ({"1": {"inputs": {}}}, "node 1 has no 'class_type'"),
        ({"1": {"inputs": {}, "_meta": {"title": "My node"}}}, r"node 1 \('My node'\) has no 'class_type'.*install"),
        ({"1": {"class_type": "", "inputs": {}}}, "no 'class_type'"),
        ({"1": {"class_type": 5, "inputs": {}}}, "no 'class_type'"),
        ({"1": {"class_type": "SaveImage"}}, r"node 1 \(SaveImage\) has no object 'inputs'"),
        ({"1": {"class_type": "SaveImage", "inputs": []}}, r"node 1 \(SaveImage\) has no object 'inputs'"),
        ({1: LOADER}, "write node ids as strings"),
    ],
)
def test_what_is_no_graph_is_said_in_a_sentence(value: object, says: str) -> None:
    with pytest.raises(WorkflowInvalid, match=f"^Workflow validation failed: .*{says}"):
        parse_graph(value)


def test_a_node_may_be_called_like_a_wrapper() -> None:
    assert parse_graph({"prompt": LOADER, "output": SAVE | {"inputs": {"images": ["prompt", 0]}}})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["{}", "[1, {}]", '{{"__value__": [{{"x": {}}}]}}'])
def test_a_number_that_json_cannot_carry_is_found_wherever_it_is(number: float, place: str) -> None:
    value = json.loads(place.format(json.dumps(number)))
    with pytest.raises(WorkflowNotFinite) as caught:
        parse_graph({"1": LOADER, "2": {"class_type": "KSampler", "inputs": {"steps": 20, "cfg": value}}})
    assert (caught.value.node_id, caught.value.input_name) == ("2", "cfg")


def test_a_number_too_large_for_a_float_is_infinite() -> None:
    with pytest.raises(WorkflowNotFinite, match="input 'cfg' of node 1"):
        parse_graph(json.loads('{"1": {"class_type": "KSampler", "inputs": {"cfg": 1e999}}}'))


def test_not_a_number_beside_the_inputs() -> None:
    with pytest.raises(WorkflowNotFinite, match="input '_meta' of node 1"):
        parse_graph({"1": LOADER | {"_meta": {"x": math.nan}}})


@pytest.mark.parametrize(
    ("link", "says"),
    [
        (["9", 0], "comes from node 9, which is not in the workflow"),
        (["", 0], "comes from node , which is not in the workflow"),
        (["9", 0.5], "comes from node 9, which is not in the workflow"),
        (["1", "0"], r"takes output '0' of node 1 \(CheckpointLoaderSimple\); an output is a whole number from 0"),
        (["1", 0.0], "takes output 0.0 of node 1"),
        (["1", None], "takes output None of node 1"),
        ([1, 0], r'comes from node 1 as a number; write the node id as a string: \["1", 0\]'),
    ],
)
def test_a_bad_link_names_both_ends_and_the_input(link: list[Any], says: str) -> None:
    with pytest.raises(WorkflowInvalid, match=rf"bad link: input 'images' of node 2 \(SaveImage\) {says}"):
        parse_graph({"1": LOADER, "2": {"class_type": "SaveImage", "inputs": {"images": link, "model": ["1", 0]}}})


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["1"],
        ["a", "b"],
        ["", ""],
        [1, 2, 3],
        [512, 768],
        [0.5, 0.25],
        [["1", 0], ["9", 0]],
        {"__value__": ["9", 0]},
        {"__value__": []},
        {"__type__": "CURVE", "__value__": [[0, 0], [1, 1]]},
        {"image": "a.png", "camera_info": {"position": {"x": 10.0}}},
    ],
)
def test_lists_and_objects_that_may_be_values_are_left_to_comfyui(value: object) -> None:
    assert parse_graph({"1": LOADER, "2": {"class_type": "Any", "inputs": {"value": value}}})


def test_links_to_every_slot_and_between_subgraph_ids() -> None:
    assert parse_graph({"57:12:1": LOADER, "2": {"class_type": "Any", "inputs": {"a": ["57:12:1", 0], "b": ["57:12:1", 2]}}})


@pytest.mark.parametrize(
    ("links", "cycle"),
    [
        ({"1": "1"}, "1 -> 1"),
        ({"1": "2", "2": "1"}, "(1 -> 2 -> 1|2 -> 1 -> 2)"),
        ({"1": "2", "2": "3", "3": "2"}, "(2 -> 3 -> 2|3 -> 2 -> 3)"),
    ],
)
def test_a_cycle_names_its_nodes(links: dict[str, str], cycle: str) -> None:
    graph = {to: {"class_type": "Any", "inputs": {"x": [source, 0]}} for to, source in links.items()}
    with pytest.raises(WorkflowInvalid, match=f"the links form a cycle, nodes {cycle}; remove one"):
        parse_graph(graph)


def test_a_cycle_of_many_nodes_is_named_by_some_of_them() -> None:
    graph = {str(i): {"class_type": "Any", "inputs": {"x": [str((i + 1) % 3000), 0]}} for i in range(3000)}
    with pytest.raises(WorkflowInvalid, match=r"nodes 0 -> 2999 -> 2998 -> .* -> \.\.\. -> 0; remove") as caught:
        parse_graph(graph)
    assert len(str(caught.value)) < 400


GOOD = {"1": {"class_type": "EmptyImage", "inputs": {}}, "2": SAVE}


def link(source: Any, slot: Any = 0, class_type: str = "PreviewImage") -> dict[str, Any]:
    return {"class_type": class_type, "inputs": {"images": [source, slot]}}


@pytest.mark.parametrize(
    ("others", "broken"),
    [
        ({"8": link("77")}, {"8": "comes from node 77, which is not in the workflow"}),
        ({"8": link("1", "0")}, {"8": "takes output '0' of node 1"}),
        ({"8": link("1", -1)}, {"8": "takes output -1 of node 1"}),
        ({"8": link("1", 0.0)}, {"8": "takes output 0.0 of node 1"}),
        ({"8": link(1)}, {"8": 'write the node id as a string: ["1", 0]'}),
        ({"7": link("77"), "8": link("7")}, {"7": "comes from node 77"}),
        ({"7": link("9"), "9": link("7")}, {"9": "the links form a cycle, nodes 7 -> 9 -> 7; remove one"}),
        ({"7": link("7"), "8": link("7")}, {"7": "the links form a cycle, nodes 7 -> 7; remove one"}),
    ],
)
def test_a_broken_branch_leaves_the_rest_to_comfyui(others: dict[str, Any], broken: dict[str, str]) -> None:
    given = {**GOOD, **others}
    before = json.dumps(given)
    graph = parse_graph(given)
    assert json.dumps(given) == before
    found = {node_id: node["inputs"]["images"] for node_id, node in graph.items() if "images" in node["inputs"]}
    problems = {node_id: value.problem for node_id, value in found.items() if isinstance(value, BrokenLink)}
    assert problems.keys() == broken.keys()
    for node_id, says in broken.items():
        assert says in problems[node_id]
    sent = json.loads(json.dumps(graph))
    assert all(sent[node_id]["inputs"]["images"] == [] for node_id in broken)
    assert parse_graph(graph) == graph
    check_paths(graph)
    assert needed_nodes(graph, ["2", "8"] if "8" in graph else ["2"]) == {"1", "2"}


def test_cycles_within_cycles_are_all_opened() -> None:
    chance = random.Random(5)
    for _ in range(200):
        size = chance.randint(2, 12)
        nodes: dict[str, dict[str, Any]] = {
            str(i): {
                "class_type": "Any",
                "inputs": {str(j): [str(chance.randrange(size)), 0] for j in range(chance.randint(0, 3))},
            }
            for i in range(size)
        }
        graph = parse_graph({**GOOD, **{f"x{i}": {**node, "inputs": prefixed(node)} for i, node in nodes.items()}})
        looped = {node_id for node_id, node in graph.items() if any(isinstance(v, BrokenLink) for v in node["inputs"].values())}
        sources = {node_id: [v[0] for v in node["inputs"].values() if is_link(graph, v)] for node_id, node in graph.items()}
        TopologicalSorter(sources).prepare()
        before = {f"x{i}": {f"x{v[0]}" for v in node["inputs"].values()} for i, node in nodes.items()}
        for node_id, taken in before.items():
            if node_id in above(before, taken):
                assert looped & {node_id, *above(sources, [node_id])}, "whoever is in a cycle depends on a link that was broken"


def prefixed(node: dict[str, Any]) -> dict[str, Any]:
    return {name: [f"x{source}", slot] for name, (source, slot) in node["inputs"].items()}


def above(sources: Mapping[str, Iterable[str]], starts: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        node_id = waiting.pop()
        if node_id not in found:
            found.add(node_id)
            waiting.extend(sources.get(node_id, ()))
    return found


def test_only_what_the_outputs_take_from_is_needed() -> None:
    graph = parse_graph({**GOOD, "3": LOADER, "4": {"class_type": "LoraLoader", "inputs": {"model": ["3", 0]}}, "5": LOADER})
    assert needed_nodes(graph, ["2"]) == {"1", "2"}
    assert needed_nodes(graph, ["2", "4"]) == {"1", "2", "3", "4"}
    assert needed_nodes(graph, []) == set()


def report(graph: dict[str, Any], node_id: str, *outputs: str) -> dict[str, Any]:
    """What ComfyUI says of a list in an input that is none of two elements."""
    error = {"type": "bad_linked_input", "message": "Bad linked input", "extra_info": {"input_name": "images"}}
    entry = {"errors": [error], "dependent_outputs": list(outputs), "class_type": graph[node_id]["class_type"]}
    return {"error": {"type": "prompt_outputs_failed_validation"}, "node_errors": {node_id: entry}}


def test_what_comfyui_drops_for_a_broken_link_is_said_as_before_with_what_it_costs() -> None:
    graph = parse_graph({**GOOD, "7": link("77", class_type="ImageInvert"), "8": link("7"), "9": link("78")})
    why = "bad link: input 'images' of node 7 (ImageInvert) comes from node 77, which is not in the workflow"
    assert dropped_outputs(graph, report(graph, "7", "9", "8")) == (f"{why}; so there is no output of node 8 (PreviewImage)",)
    refused = rejection(graph, report(graph, "7", "8"))
    assert isinstance(refused, WorkflowInvalid)
    assert str(refused) == f"Workflow validation failed: {why}."


def test_a_missing_model_that_only_a_broken_branch_wants_is_not_complained_of() -> None:
    graph = parse_graph(
        {**GOOD, "3": LOADER, "7": {"class_type": "Mix", "inputs": {"images": ["77", 0], "model": ["3", 0]}}, "8": link("7")}
    )
    extra = {"input_name": "ckpt_name", "received_value": "a.safetensors", "input_config": [[], {}]}
    absent = {"errors": [{"type": "value_not_in_list", "extra_info": extra}], "dependent_outputs": ["8"], "class_type": "X"}
    body = report(graph, "7", "8")
    body["node_errors"] = {"3": absent, **body["node_errors"]}
    (error,) = dropped_outputs(graph, body)
    assert "comes from node 77" in error
    assert isinstance(rejection(graph, body), WorkflowInvalid)
    graph["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "model": ["3", 0]}}
    absent["dependent_outputs"] = ["8", "2"]
    missing, broken = dropped_outputs(graph, body)
    assert "needs the model 'a.safetensors'" in missing
    assert "comes from node 77" in broken


def test_a_long_chain_is_no_trouble() -> None:
    chain = {str(i): {"class_type": "Any", "inputs": {"x": [str(i - 1), 0]}} for i in range(1, 5000)}
    assert parse_graph({"0": LOADER, **chain})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["1", "nodes", "class_type", "inputs"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["1", "2", "nodes", "prompt", "class_type", "inputs", "image", "text"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_at_all_is_a_graph_or_one_of_our_errors(value: object) -> None:
    try:
        graph = parse_graph(value)
        check_paths(graph)
    except (WorkflowMissing, WorkflowEmpty, WorkflowInvalid, WorkflowUiFormat, WorkflowNotFinite, UnsafePath):
        return
    named_models(graph)


# --- is it safe ---------------------------------------------------------------------------------

HOSTILE = [
    "/etc/passwd",
    "/etc/passwd [input]",
    "/",
    "//etc/passwd",
    "///proc/self/environ",
    "..",
    "../x.png",
    "../../../etc/passwd",
    "a/../../x.png",
    "a/..",
    "..x[input]",  # ComfyUI cuts the annotation with one character before it
    ".. [input]",
    "a/..x[temp]",
    "../x.png [output]",
    "../x.png [temp]",
    "..\\x.png",
    "a\\..\\..\\x.png",
    "..\\../x.png",
    "\\etc\\passwd",
    "\\\\server\\share\\x.png",
    "C:\\Windows\\win.ini",
    "c:/x.png",
    "C:x.png",
    "~",
    "~/x.png",
    "~root/.ssh/id_rsa",
    "~\\x.png",
    "a\0.png",
    "\0/etc/passwd",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    " /etc/passwd",
    "\t../x",
    "https://x/../../../etc/passwd",
    "/9j/../etc/passwd",
    "/" * 5000 + "etc/passwd",
    "/." * 3000 + "/etc/passwd",
    "a/../" * 2000 + "x",
]

INNOCENT = [
    "",
    "example.png",
    "example.png [input]",
    "example [final].png",
    "[input]",
    "sub/folder/example.png",
    "sub\\example.png",
    "clipspace/clipspace-mask-1.png [input]",
    "threed/scene_1767323045000 (2).png [temp]",
    "a..b.png",
    "...",
    "..a/b",
    "a../b",
    ".hidden/x.png",
    "./x.png",
    "~x.png",
    "back~up.png",
    "2026-01-02 03:04:05/123_%width%",
    "%date:yyyy-MM-dd%/ComfyUI",
    "video/ComfyUI",
    "ÅÄÖ 日本語.png",
    "https://example.com/a/b.png?x=../y",
    "data:image/png;base64,iVBORw0KGgo//8=",
    "/9j/4AAQSkZJRgABAQAAAQABAAD//2Q=",  # base64 of a JPEG
    "//uQ" + "x/Zz" * 4000,  # base64 too long to be a path
]

PATH_INPUTS = [
    ("LoadImage", "image"),
    ("LoadImageMask", "image"),
    ("LoadImageOutput", "image"),
    ("LoadVideo", "file"),
    ("LoadAudio", "audio"),
    ("LoadLatent", "latent"),
    ("Load3D", "model_file"),
    ("SaveImage", "filename_prefix"),
    ("SaveLatent", "filename_prefix"),
    ("CheckpointLoaderSimple", "ckpt_name"),
    ("CheckpointLoader", "config_name"),
    ("LoadTrainingDataset", "folder_name"),
    ("LoadImageDataSetFromFolder", "folder"),
    ("VHS_LoadVideo", "video"),
    ("VHS_LoadImagesPath", "directory"),
    ("Image Save", "output_path"),
    ("Load Image Batch", "path"),
    ("SomebodysNode", "image_path"),
    ("SomebodysNode", "video_2"),
    ("SomebodysNode", "output_dir"),
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize(("class_type", "name"), PATH_INPUTS)
def test_a_path_out_of_its_folder_is_refused(class_type: str, name: str, value: str) -> None:
    with pytest.raises(UnsafePath) as caught:
        check_paths(node(class_type, **{name: value}))
    assert str(caught.value).startswith(f"Input '{name}' of node 1 ({class_type}) is '")
    assert "which leaves its folder" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("value", INNOCENT, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize(("class_type", "name"), PATH_INPUTS)
def test_a_path_inside_its_folder_passes(class_type: str, name: str, value: str) -> None:
    check_paths(node(class_type, **{name: value}))


@pytest.mark.parametrize(
    "value",
    [
        {"image": "../../x.png [temp]", "mask": "m.png", "normal": "n.png"},
        {"image": "i.png", "mask": "m.png", "normal": "/etc/passwd", "recording": ""},
        {"__value__": ["a.png", "../b.png"]},
        {"filename": "d.png", "subfolder": "../..", "type": "temp"},
        ["a.png", "b.png", "../c.png"],
    ],
)
def test_a_path_deep_in_a_value_is_refused(value: object) -> None:
    with pytest.raises(UnsafePath, match=r"Input 'image' of node 1 \(Load3D\)"):
        check_paths(node("Load3D", image=value))


@pytest.mark.parametrize("value", ["/x/a.safetensors", "../a.gguf", "..\\a.ckpt", "~/a.pt", "C:\\a.bin", "a/../../b.sft"])
def test_a_model_name_that_leaves_its_folder_is_refused_in_any_input(value: str) -> None:
    with pytest.raises(UnsafePath):
        check_paths(node("SomebodysNode", whatever=value))


@pytest.mark.parametrize(
    "name", ["text", "text_g", "prompt", "positive", "negative_prompt", "t5xxl", "clip_l", "lyrics", "tags"]
)
@pytest.mark.parametrize(
    "value",
    [
        "/imagine a cat --ar 16:9",
        "/imagine",
        "a.. b",
        "and so on ../ and so forth",
        "../",
        "../../etc/passwd",
        "~ a tilde",
        "C: the language",
        "either/or/..",
        "line one\n/etc/passwd\n..",
        "file: a drawing of a file",
        "ends in a domain.pt",
    ],
)
def test_a_prompt_is_never_a_path(name: str, value: str) -> None:
    check_paths(node("CLIPTextEncode", **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", "/imagine a cat"),
        ("value", "/"),
        ("value", "//"),
        ("value", ".."),
        ("value", "a / .. / b"),
        ("value", "/home is where the heart is"),
        ("endpoint", "/v1/chat/completions"),
        ("sampler_name", "dpmpp_2m"),
        ("model", "x-ai/grok-4.5"),
        ("reference_latents_method", "uxo/uno"),
        ("regex_pattern", r"^\s*\..\d"),
        ("string_b", r"\n?```\s*$"),
        ("url", "https://example.com/a/../b.safetensors"),
        ("expression", "a/b/../c"),
        ("value", "https://example.com/../x"),
    ],
)
def test_what_is_only_like_a_path_passes_elsewhere(name: str, value: str) -> None:
    check_paths(node("Any", **{name: value}))


@pytest.mark.parametrize(
    "value", ["/etc/passwd", "/proc/self/environ", "../../x.png", "a/../b", "/runpod-volume/x", "file:///etc/x"]
)
def test_what_can_only_be_a_path_out_is_refused_in_any_input_but_a_prompt(value: str) -> None:
    with pytest.raises(UnsafePath):
        check_paths(node("PrimitiveString", value=value))


def test_a_text_that_goes_straight_into_a_path_is_one() -> None:
    text = {"class_type": "Text Multiline", "inputs": {"text": "/etc/passwd"}}
    reader = {"class_type": "VHS_LoadVideoPath", "inputs": {"video": ["1", 0]}}
    encoder = {"class_type": "CLIPTextEncode", "inputs": {"text": ["1", 0]}}
    check_paths({"1": text, "2": encoder})
    with pytest.raises(UnsafePath, match="Input 'text' of node 1"):
        check_paths({"1": text, "2": reader})


def test_the_prompt_of_a_node_that_makes_an_image_is_still_a_prompt() -> None:
    maker = {"class_type": "TextToImageNode", "inputs": {"prompt": "/imagine a cat, and/or ../ a dog"}}
    check_paths({"1": maker, "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0]}}})


def test_a_link_is_no_path_whatever_the_node_is_called() -> None:
    check_paths({"../1": LOADER, "2": {"class_type": "LoadImage", "inputs": {"image": ["../1", 0]}}})


# --- which models it names ----------------------------------------------------------------------

# (class, input) -> folder, as ComfyUI's own loaders have called folder_paths.get_filename_list since 0.3.75.
CORE_LOADERS = {
    ("AudioEncoderLoader", "audio_encoder_name"): "audio_encoders",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("CLIPVisionLoader", "clip_name"): "clip_vision",
    ("CheckpointLoader", "ckpt_name"): "checkpoints",
    ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
    ("ControlNetLoader", "control_net_name"): "controlnet",
    ("CreateHookLora", "lora_name"): "loras",
    ("CreateHookLoraModelOnly", "lora_name"): "loras",
    ("CreateHookModelAsLora", "ckpt_name"): "checkpoints",
    ("CreateHookModelAsLoraModelOnly", "ckpt_name"): "checkpoints",
    ("DiffControlNetLoader", "control_net_name"): "controlnet",
    ("DualCLIPLoader", "clip_name1"): "text_encoders",
    ("DualCLIPLoader", "clip_name2"): "text_encoders",
    ("GLIGENLoader", "gligen_name"): "gligen",
    ("HypernetworkLoader", "hypernetwork_name"): "hypernetworks",
    ("ImageOnlyCheckpointLoader", "ckpt_name"): "checkpoints",
    ("LatentUpscaleModelLoader", "model_name"): "latent_upscale_models",
    ("LoraLoader", "lora_name"): "loras",
    ("LoraLoaderModelOnly", "lora_name"): "loras",
    ("ModelPatchLoader", "name"): "model_patches",
    ("PhotoMakerLoader", "photomaker_model_name"): "photomaker",
    ("QuadrupleCLIPLoader", "clip_name1"): "text_encoders",
    ("QuadrupleCLIPLoader", "clip_name2"): "text_encoders",
    ("QuadrupleCLIPLoader", "clip_name3"): "text_encoders",
    ("QuadrupleCLIPLoader", "clip_name4"): "text_encoders",
    ("StyleModelLoader", "style_model_name"): "style_models",
    ("TrainLoraNode", "existing_lora"): "loras",
    ("TripleCLIPLoader", "clip_name1"): "text_encoders",
    ("TripleCLIPLoader", "clip_name2"): "text_encoders",
    ("TripleCLIPLoader", "clip_name3"): "text_encoders",
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("UpscaleModelLoader", "model_name"): "upscale_models",
    ("unCLIPCheckpointLoader", "ckpt_name"): "checkpoints",
}

# Of later releases, and of custom nodes whose source says so.
LATER_AND_CUSTOM_LOADERS = {
    ("ConditioningLoader", "conditioning_name"): "embeddings",
    ("FrameInterpolationModelLoader", "model_name"): "frame_interpolation",
    ("LTXAVTextEncoderLoader", "ckpt_name"): "checkpoints",
    ("LTXAVTextEncoderLoader", "text_encoder"): "text_encoders",
    ("LTXVAudioVAELoader", "ckpt_name"): "checkpoints",
    ("LoadBackgroundRemovalModel", "bg_removal_name"): "background_removal",
    ("LoadDA3Model", "model_name"): "geometry_estimation",
    ("LoadMediaPipeFaceLandmarker", "model_name"): "detection",
    ("LoadMoGeModel", "model_name"): "geometry_estimation",
    ("LoraLoaderBypass", "lora_name"): "loras",
    ("OpticalFlowLoader", "model_name"): "optical_flow",
    ("SAM3DBody_Loader", "model_file"): "detection",
    ("CLIPLoaderGGUF", "clip_name"): "text_encoders",
    ("CLIPVisionLoaderMultiGPU", "clip_name"): "clip_vision",
    ("DualCLIPLoaderGGUF", "clip_name2"): "text_encoders",
    ("Efficient Loader", "ckpt_name"): "checkpoints",
    ("Efficient Loader", "vae_name"): "vae",
    ("IPAdapterModelLoader", "ipadapter_file"): "ipadapter",
    ("InstantIDModelLoader", "instantid_file"): "instantid",
    ("LoRA Stacker", "lora_name_1"): "loras",
    ("Lora Loader Stack (rgthree)", "lora_02"): "loras",
    ("PulidFluxModelLoader", "pulid_file"): "pulid",
    ("SAMLoader", "model_name"): "sams",
    ("UltralyticsDetectorProvider", "model_name"): "ultralytics",
    ("UnetLoaderGGUF", "unet_name"): "diffusion_models",
    ("WanVideoLoraSelect", "lora"): "loras",
    ("WanVideoModelLoader", "model"): "diffusion_models",
    ("WanVideoVAELoader", "model_name"): "vae",
    ("easy fullLoader", "ckpt_name"): "checkpoints",
}
BY_TWO_NAMES = {
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "controlnet": ("controlnet", "t2i_adapter"),
}


@pytest.mark.parametrize(("loader", "folder"), (CORE_LOADERS | LATER_AND_CUSTOM_LOADERS).items())
def test_a_loader_tells_the_folder(loader: tuple[str, str], folder: str) -> None:
    class_type, name = loader
    guessed = loader not in CORE_LOADERS and known().folder_of(class_type, name) is None
    assert named_models(node(class_type, **{name: "sub/m.safetensors"})) == (
        NamedModel("sub/m.safetensors", BY_TWO_NAMES.get(folder, (folder,)), "1", class_type, name, guessed=guessed),
    )


def folders_read(call: ast.AST) -> Iterator[str]:
    for part in ast.walk(call):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr == "get_filename_list":
            assert isinstance(part.args[0], ast.Constant)
            yield str(part.args[0].value)


def loaders_in(source: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """((class, input), folder) of each file list that a node class offers, in both of ComfyUI's ways to define inputs."""
    for definition in (part for part in ast.walk(ast.parse(source.read_text())) if isinstance(part, ast.ClassDef)):
        names = [
            keyword.value.value
            for part in ast.walk(definition)
            if isinstance(part, ast.Call)
            for keyword in part.keywords
            if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
        ]
        class_type = str(names[0]) if names else definition.name
        for part in ast.walk(definition):
            fields: list[tuple[ast.expr | None, ast.AST]] = []
            if isinstance(part, ast.Dict):
                fields = [
                    (key, value) for key, value in zip(part.keys, part.values, strict=True) if isinstance(value, ast.Tuple)
                ]
            elif (
                isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr == "Input" and part.args
            ):
                fields = [(part.args[0], part)]
            for key, value in fields:
                if isinstance(key, ast.Constant):
                    yield from (((class_type, str(key.value)), folder) for folder in folders_read(value))


def test_the_loaders_of_this_comfyui_are_told_the_folders_that_its_source_says(engine: Engine) -> None:
    comfyui = engine.comfyui_dir
    sources = [comfyui / "nodes.py", *sorted((comfyui / "comfy_extras").glob("*.py"))]
    found = dict(loader for source in sources for loader in loaders_in(source))
    configs = found.pop(("CheckpointLoader", "config_name"))
    assert configs == "configs"  # YAML, no weights
    assert found.items() >= CORE_LOADERS.items()
    told = {
        (class_type, name): named_models(node(class_type, **{name: "m.safetensors"}))[0].folders for class_type, name in found
    }
    assert told == {loader: BY_TWO_NAMES.get(folder, (folder,)) for loader, folder in found.items()}


@pytest.mark.parametrize(
    ("class_type", "name", "value"),
    [
        ("SomebodysLoader", "model_name", "a/b.gguf"),
        ("SomebodysLoader", "model", "m.onnx"),
        ("SomebodysLoader", "whatever", "m.PTH"),
        ("SomebodysLoader", "whatever", "my model (v2).Safetensors"),
        ("PrimitiveString", "value", "m.ckpt"),
    ],
)
def test_an_unknown_loaders_model_may_be_in_any_folder(class_type: str, name: str, value: str) -> None:
    assert named_models(node(class_type, **{name: value})) == (NamedModel(value, (), "1", class_type, name),)


def test_every_suffix_that_loaders_read() -> None:
    for suffix in ("safetensors", "sft", "gguf", "ckpt", "pt", "pt2", "bin", "pth", "pkl", "onnx"):
        assert [model.name for model in named_models(node("X", m=f"a.{suffix}"))] == [f"a.{suffix}"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", "looks_like.bin"),
        ("audio", "x.pt"),
        ("video", "x.bin"),
        ("latent", "x.safetensors"),
        ("filename_prefix", "x.safetensors"),
        ("output_name", "x.safetensors"),
        ("save_path", "x.safetensors"),
        ("text", "buy it at shop.pt"),
        ("positive_prompt", "a cat.safetensors"),
        ("style", "two\nlines.safetensors"),
        ("prompt", "https://example.com/a.safetensors"),
        ("value", "https://huggingface.co/a/b/resolve/main/c.safetensors"),
        ("value", "two\nlines.safetensors"),
        ("value", ".safetensors"),
        ("value", "a/.safetensors"),
        ("value", "a//b.safetensors"),
        ("value", "../b.safetensors"),
        ("value", "/b.safetensors"),
        ("value", "safetensors"),
        ("value", "a.safetensors.txt"),
        ("ckpt_name", 7),
        ("ckpt_name", None),
        ("ckpt_name", ["1", 0]),
        ("lora_name", "None"),
    ],
)
def test_what_is_no_model_name(name: str, value: object) -> None:
    assert named_models(node("LoadImage", **{name: value})) == ()


TEXT_INPUTS = ["clip_l", "clip_g", "t5xxl", "style", "lora_style", "text", "prompt", "llama", "description"]


@pytest.mark.parametrize("name", TEXT_INPUTS)
@pytest.mark.parametrize("class_type", ["SomebodysLoader", "LoadWanVideoT5TextEncoder", "Lora Style Stack"])
def test_one_word_that_ends_like_a_model_is_one_whatever_its_input_is_called(class_type: str, name: str) -> None:
    assert [model.name for model in named_models(node(class_type, **{name: "sub/x.safetensors"}))] == ["sub/x.safetensors"]
    with pytest.raises(UnsafePath):
        check_paths(node(class_type, **{name: "../x.safetensors"}))
    assert named_models(node(class_type, **{name: "in the style of x.safetensors"})) == ()
    check_paths(node(class_type, **{name: "in the style of ../x.safetensors"}))


@pytest.mark.parametrize("name", TEXT_INPUTS)
@pytest.mark.parametrize(
    "class_type",
    [
        "CLIPTextEncode",
        "CLIPTextEncodeFlux",
        "CLIPTextEncodeRegional",
        "BNK_CLIPTextEncodeAdvanced",
        "smZ CLIPTextEncode",
        "WanVideoTextEncode",
        "Text Encode",
    ],
)
def test_a_prompt_that_is_encoded_is_never_a_model(class_type: str, name: str) -> None:
    assert named_models(node(class_type, **{name: "x.safetensors"})) == ()
    check_paths(node(class_type, **{name: "../x.safetensors"}))


@pytest.mark.parametrize("name", ["text", "value"])
def test_an_embedding_by_its_files_name_is_no_other_model(name: str) -> None:
    assert [model.name for model in named_models(node("X", **{name: "embedding:a.pt"}))] == ["a.pt"]


def test_a_windows_name_is_told_with_slashes() -> None:
    [model] = named_models(node("LoraLoader", lora_name="style\\anime\\x.safetensors"))
    assert model.name == "style/anime/x.safetensors"
    assert model.file_names == ("style/anime/x.safetensors",)


@pytest.mark.parametrize("short", ["taesd", "taesdxl", "taesd3", "taef1"])
def test_a_taesd_is_an_encoder_and_a_decoder_in_vae_approx(short: str) -> None:
    encoder, decoder = named_models(node("VAELoader", vae_name=short))
    assert (encoder.name, decoder.name) == (f"{short}_encoder", f"{short}_decoder")
    assert encoder.folders == decoder.folders == ("vae_approx",)
    assert f"{short}_encoder.safetensors" in encoder.file_names
    assert f"{short}_decoder.pth" in decoder.file_names
    assert not encoder.optional


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ae.safetensors", "vae"),
        ("taehv.safetensors", "vae_approx"),
        ("lighttaew2_1.pth", "vae_approx"),
        ("taehv_x.pth", "vae"),
    ],
)
def test_the_vae_loaders_folders(name: str, folder: str) -> None:
    assert [model.folders for model in named_models(node("VAELoader", vae_name=name))] == [(folder,)]


def test_pixel_space_is_no_file() -> None:
    assert named_models(node("VAELoader", vae_name="pixel_space")) == ()


def test_rows_of_loras_and_lists() -> None:
    graph = node(
        "Power Lora Loader (rgthree)",
        PowerLoraLoaderHeaderWidget={"type": "PowerLoraLoaderHeaderWidget"},
        lora_1={"on": True, "lora": "a.safetensors", "strength": 1},
        lora_2={"on": False, "lora": "b.safetensors", "strength": 1},
        lora_3={"on": True, "lora": "None", "strength": 1},
        models={"__value__": ["c.safetensors", "d.gguf"]},
    )
    found = [(model.name, model.folders, model.input_name) for model in named_models(graph)]
    assert found == [
        ("a.safetensors", ("loras",), "lora_1"),
        ("c.safetensors", (), "models"),
        ("d.gguf", (), "models"),
    ]


def test_the_order_is_the_graphs_and_each_place_is_named() -> None:
    graph = {
        "9": {"class_type": "LoraLoader", "inputs": {"model": ["3", 0], "lora_name": "l.safetensors"}},
        "3": LOADER,
        "4": LOADER,
        "5": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "t5.safetensors", "clip_name2": "l.safetensors"}},
    }
    assert [(model.node_id, model.input_name, model.name) for model in named_models(graph)] == [
        ("9", "lora_name", "l.safetensors"),
        ("3", "ckpt_name", "a.safetensors"),
        ("4", "ckpt_name", "a.safetensors"),
        ("5", "clip_name1", "t5.safetensors"),
        ("5", "clip_name2", "l.safetensors"),
    ]
    assert named_models(graph) == named_models(graph)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("embedding:bad", ["bad"]),
        ("a cat, embedding:bad, a dog", ["bad"]),
        ("a cat embedding:bad.pt", ["bad.pt"]),
        ("a cat\nembedding:bad\nmore", ["bad"]),
        ("(embedding:bad:1.2)", ["bad"]),
        ("((embedding:bad)), (a:1.1) embedding:good", ["bad", "good"]),
        ("(a cat, embedding:bad:1.2)", ["bad"]),
        ("a\tembedding:bad", ["bad"]),
        ("embedding:bad<0.5> embedding:good[1]", ["bad", "good"]),
        ("embedding:<bad>", []),
        ("embedding:sub/bad", ["sub/bad"]),
        ("embedding:sub\\bad", ["sub/bad"]),
        (r"embedding:bad_\(v2\) x", ["bad_(v2)"]),
        ("embedding: bad", ["bad"]),
        ("(embedding:bad:heavy)", ["bad:heavy"]),
        ("(embedding:bad", []),  # unbalanced, so it is no segment
        ("embedding:one embedding:two embedding:one", ["one", "two"]),
        ("a,embedding:bad", []),  # the tokenizer wants a space, a line's end or a parenthesis before it
        ("myembedding:bad", []),
        ("embedding:", []),
        ("embedding: , x", []),
        ("embedding:../../etc/passwd", []),
        ("embedding:/etc/passwd", []),
    ],
)
def test_the_embeddings_that_the_tokenizer_sees(text: str, names: list[str]) -> None:
    models = named_models(node("CLIPTextEncode", text=text))
    assert [model.name for model in models] == names
    assert all(model.folders == ("embeddings",) and model.optional for model in models)


# Runs under the engine's Python: ComfyUI's own tokenizer, with no vocabulary, says which embeddings it would look for.
ASK_COMFYUI = """
import json, sys
import comfy.options
sys.argv[1:] = ["--cpu"]
comfy.options.enable_args_parsing()
import comfy.sd1_clip

class NoWords:
    def __call__(self, text):
        return {"input_ids": [1]}

asked = []
comfy.sd1_clip.load_embed = lambda name, *rest: asked.append(name)
tokenizer = comfy.sd1_clip.SDTokenizer.__new__(comfy.sd1_clip.SDTokenizer)
vars(tokenizer).update(
    tokenizer=NoWords(), max_length=77, min_length=None, min_padding=None, pad_left=False, pad_with_end=True,
    pad_to_max_length=False, tokenizer_adds_end_token=True, tokens_start=1, start_token=1, end_token=2, pad_token=0,
    max_word_length=8, embedding_directory="/x", embedding_identifier="embedding:", embedding_size=768, embedding_key="clip_l",
    disable_weights=False,
)
answers = []
for text in json.load(sys.stdin):
    asked.clear()
    try:
        tokenizer.tokenize_with_weights(text)
        answers.append(sorted(set(asked)))
    except IndexError:  # its answer to "embedding:" with nothing behind it
        answers.append(None)
print(json.dumps(answers))
"""


def test_the_tokenizers_rule_is_comfyuis(engine: Engine) -> None:
    pieces = [
        "embedding:",
        "embedding:aa",
        "embedding:bb.pt",
        "embedding:sub/cc",
        " embedding:dd",
        "a,embedding:ff",
        "embedding:gg,",
    ]
    pieces += [" ", "\n", ",", "(", ")", "(", ")", ":1.2", ":x", "\\(", "\\)", "cat"]
    if '"0.3.' not in (engine.comfyui_dir / "comfyui_version.py").read_text():
        pieces += ["\tembedding:ee", "embedding:hh<3>", "embedding:ii[0]"]
    chance = random.Random(7)
    texts = ["".join(chance.choices(pieces, k=chance.randint(1, 9))) for _ in range(3000)]
    ask = subprocess.run(
        [engine.python, "-c", ASK_COMFYUI],
        cwd=engine.comfyui_dir,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers: list[list[str] | None] = json.loads(ask.stdout)
    compared = 0
    for text, asked in zip(texts, answers, strict=True):
        if asked is not None:
            compared += 1
            names = {name.strip(",") for name in asked} - {""}
            assert {model.name for model in named_models(node("CLIPTextEncode", text=text))} == names, text
    assert compared > 2000


def test_parentheses_without_end_are_no_trouble() -> None:
    for text in ("(" * 10_000 + "embedding:a" + ")" * 10_000, "(" * 10_000 + "embedding:a", ")" * 10_000 + " embedding:a"):
        assert len(named_models(node("CLIPTextEncode", text=text))) <= 1
    assert [model.name for model in named_models(node("X", text="(" * 9 + "embedding:a:1.1" + ")" * 9))] == ["a"]


def test_an_embedding_may_be_named_without_its_suffix() -> None:
    bare, full = named_models(node("CLIPTextEncode", text="embedding:a.b embedding:c.pt"))
    assert bare.file_names == ("a.b", "a.b.safetensors", "a.b.pt", "a.b.bin")
    assert full.file_names == ("c.pt",)


def test_a_link_is_what_leads_to_a_node() -> None:
    graph = parse_graph({"1": LOADER, "2": SAVE})
    assert is_link(graph, ["1", 0])
    assert not is_link(graph, ["7", 0])
    assert not is_link(graph, "1")


def test_names_as_windows_spells_them_become_this_disks_and_nothing_else_is_touched() -> None:
    row = {"on": True, "lora": "style\\ink.safetensors", "note": "style\\ink"}
    text = "a \\(cat\\).safetensors\\n, (embedding:e\\f\\(1\\):1.2), embedding:e\\f2, embedding:e\\f"
    graph: dict[str, dict[str, Any]] = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "sub\\x.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["1", 0]}},
        "3": {"class_type": "Power", "inputs": {"lora_1": row, "loras": {"__value__": [row, "sub\\y.pt", 1]}}},
        "4": {"class_type": "SaveImage", "inputs": {"filename_prefix": "day\\pic", "images": ["3", 0]}},
    }
    before = json.dumps(graph)
    changed = with_slashes(graph, named_models(graph))
    slashed = {**row, "lora": "style/ink.safetensors"}
    assert changed["1"]["inputs"] == {"unet_name": "sub/x.safetensors", "weight_dtype": "default"}
    assert changed["2"]["inputs"]["text"] == (
        "a \\(cat\\).safetensors\\n, (embedding:e/f\\(1\\):1.2), embedding:e/f2, embedding:e/f"
    )
    assert changed["3"]["inputs"] == {"lora_1": slashed, "loras": {"__value__": [slashed, "sub/y.pt", 1]}}
    assert changed["4"] is graph["4"]
    assert json.dumps(graph) == before
    assert with_slashes(changed, named_models(changed)) is changed


def test_a_name_whose_backslash_is_a_character_stays_as_it_is_written() -> None:
    graph = {
        "1": {"class_type": "LoraLoader", "inputs": {"lora_name": "a\\b.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "embedding:a\\b, embedding:a\\bc"}},
    }
    lora, first, second = named_models(graph)
    assert [lora.as_written().file_names, first.as_written().file_names[:2]] == [
        ("a\\b.safetensors",),
        ("a\\b", "a\\b.safetensors"),
    ]
    changed = with_slashes(graph, [lora.as_written(), first.as_written(), second])
    assert changed["1"] is graph["1"]
    assert changed["2"]["inputs"]["text"] == "embedding:a\\b, embedding:a/bc"


@pytest.mark.parametrize("key", ["prompt", "output"])
def test_a_graph_that_is_wrapped_and_nothing_else_is_unwrapped(key: str) -> None:
    graph = {"1": LOADER}
    assert without_wrapper({key: graph}) is graph
    assert without_wrapper({key: graph, "client_id": "x"}) == {key: graph, "client_id": "x"}
    assert without_wrapper({key: LOADER}) == {key: LOADER}, "a node may have any id"
    assert without_wrapper(graph) is graph


def test_what_comfyui_noted_in_a_graph_is_left_out() -> None:
    noted: dict[str, dict[str, Any]] = {"1": LOADER | {"is_changed": [math.nan]}, "2": SAVE}
    assert parse_graph(without_wrapper(noted)) == {"1": LOADER, "2": SAVE}
    assert "is_changed" in noted["1"]


@pytest.mark.parametrize(
    ("class_type", "name", "value", "is_path"),
    [
        ("JSONGetValue", "json_path", "/data/0/url", False),
        ("JsonExtract", "value", "/home/items/0", False),
        ("AnyNode", "json_pointer", "/data/0/url", False),
        ("LoadJSON", "json_path", "/data/0/url", True),
        ("JSONGetValue", "file_path", "/data/0/url", True),
        ("JSONGetValue", "json_path", "/../etc/passwd", True),
        ("AnyNode", "value", "/data/0/url", True),
        ("AnyNode", "json_path", "/data/0/url", True),
    ],
)
def test_a_json_pointer_is_no_path(class_type: str, name: str, value: str, is_path: bool) -> None:  # noqa: FBT001 - an answer
    graph = node(class_type, **{name: value})
    if is_path:
        with pytest.raises(UnsafePath):
            check_paths(graph)
    else:
        check_paths(graph)


@pytest.mark.parametrize(
    "text", ["a/../" * 3_000 + "../etc/passwd", "x" * 5_000 + "/../../etc/passwd", "a\\\\..\\\\" * 3_000 + "..\\\\x"]
)
def test_what_dots_cancel_does_not_make_a_path_too_long_to_be_one(text: str) -> None:
    with pytest.raises(UnsafePath):
        check_paths(node("LoadImage", image=text))
