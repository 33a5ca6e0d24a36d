"""A workflow as the editor saves it becomes the graph that the editor itself would have sent."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devkit.editor import INFO, LOADER, inner, node, outer, subgraph, ui, with_instance
from devkit.engine.cache import cache_root
from devkit.local_worker import PROJECT
from devkit.recorded import recorded_pairs, recording
from scripts.make_catalog import fetch_wheel, templates
from worker.editor.convert import classes_to_convert, convert, is_saved_workflow
from worker.errors import RequestError, UiWorkflowInvalid, UnknownNodes
from worker.graph.graph import parse_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

FOLDER = PROJECT / "tests/ui"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CLASSIC, MODERN = "1.32.9", "1.58.1"


def graph_of(value: Any, frontend: str = MODERN, info: Mapping[str, Any] = INFO) -> dict[str, dict[str, Any]]:
    """The inputs of each node of the converted workflow."""
    converted = convert(value, info, frontend=frontend, now=NOW, random=lambda: 0.0).graph
    assert parse_graph(converted or {"0": {"class_type": "X", "inputs": {}}})
    return {node_id: each["inputs"] for node_id, each in converted.items()}


# --- told apart ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "is_it"),
    [
        ({"nodes": []}, True),
        ({"nodes": {"class_type": "A", "inputs": {}}}, False),
        ({"1": {"class_type": "A", "inputs": {}}}, False),
        ([], False),
        (None, False),
    ],
)
def test_the_editors_format_is_told_by_its_shape(value: object, is_it: bool) -> None:  # noqa: FBT001 - a parametrized answer
    assert is_saved_workflow(value) is is_it


def test_the_classes_a_workflow_needs() -> None:
    inner = subgraph("S", node(1, "Text"), node(2, "Reroute"), links=())
    workflow = ui(LOADER, node(2, "Note"), node(3, "S"), node(4, "GetNode"), definitions={"subgraphs": [inner]})
    assert classes_to_convert(workflow) == {"Loader", "Text"}
    assert classes_to_convert(ui(node(1, "T2IAdapterLoader"))) == {"T2IAdapterLoader", "ControlNetLoader"}


def test_a_class_that_was_renamed_gets_its_new_name() -> None:
    info = {"ControlNetLoader": {"input": {"required": {"control_net_name": [["a.pth"]]}}, "output": ["CONTROL_NET"]}}
    graph = convert(ui(node(1, "T2IAdapterLoader", ["b.pth"])), info).graph
    assert (graph["1"]["class_type"], graph["1"]["inputs"]) == ("ControlNetLoader", {"control_net_name": "b.pth"})


# --- widgets ------------------------------------------------------------------------------------


def test_values_go_to_the_widgets_in_the_editors_order_past_the_seeds_control() -> None:
    values = [7, "randomize", 30, 6.5, "slow", False]
    [sampler] = graph_of(ui(node(3, "Sampler", values))).values()
    assert sampler == {"seed": 7, "steps": 30, "cfg": 6.5, "mode": "slow", "tiled": False}


@pytest.mark.parametrize("values", [None, [], [0]])
def test_missing_values_are_the_defaults_as_javascript_writes_them(values: Any) -> None:
    converted = convert(ui(node(3, "Sampler", values)), INFO).graph
    assert json.dumps(converted["3"]["inputs"]) == '{"seed": 0, "steps": 20, "cfg": 8, "mode": "fast", "tiled": true}'


def test_too_many_values_and_values_of_any_type_pass() -> None:
    values = [True, "fixed", "x", [1, 2], None, {"a": 2.0}, "more", "more"]
    [modern] = graph_of(ui(node(3, "Sampler", values))).values()
    assert modern == {"seed": True, "steps": "x", "cfg": {"__value__": [1, 2]}, "mode": "fast", "tiled": {"a": 2}}
    [classic] = graph_of(ui(node(3, "Sampler", values)), CLASSIC).values()
    assert classic["mode"] is None


def test_numbers_are_those_of_javascript() -> None:
    [sampler] = graph_of(ui(node(3, "Sampler", [2**64 - 1, "fixed", 8.0, 0.1]))).values()
    assert sampler["seed"] == 18446744073709552000
    assert isinstance(sampler["steps"], int)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"steps": 9, "seed": 4, "videopreview": {}}, 9),  # as the code of some custom nodes saves them
        ({"0": 4, "2": 9, "1": "fixed", "length": 3}, 9),
    ],
)
def test_values_in_an_object_go_by_name_or_by_index(values: Any, steps: int) -> None:
    [sampler] = graph_of(ui(node(3, "Sampler", values))).values()
    assert (sampler["seed"], sampler["steps"], sampler["mode"]) == (4, steps, "fast")


def test_the_place_that_old_editors_kept_for_a_forced_input_is_skipped() -> None:
    assert graph_of(ui(node(1, "Forced", [99, 6, "x"])))["1"] == {"b": 6, "c": "x"}
    assert graph_of(ui(node(1, "Forced", [6, "x"])))["1"] == {"b": 6, "c": "x"}


def test_a_text_area_holds_text() -> None:
    workflow = ui(*(node(number, "Text", [value]) for number, value in enumerate([12.5, True, ["a", 2.0], {"a": 1}])))
    assert [inputs["text"] for inputs in graph_of(workflow).values()] == ["12.5", "true", "a,2", "[object Object]"]


def test_a_combo_without_options_has_no_value_and_no_input() -> None:
    info = {"A": {"input": {"required": {"file": [[]], "n": ["INT", {}]}}, "output": []}}
    assert graph_of(ui(node(1, "A")), info=info) == {"1": {"n": 0}}


def test_a_classic_file_chooser_without_any_file_sends_nothing() -> None:
    info = {"LoadImage": {"input": {"required": {"image": [[], {"image_upload": True}]}}, "output": ["IMAGE"]}}
    assert graph_of(ui(node(1, "LoadImage", [None, "image"])), CLASSIC, info) == {"1": {}}


def test_a_classic_file_chooser_takes_what_an_upload_leaves() -> None:
    values = [{"filename": "d.png", "subfolder": "s", "type": "input"}, ["l.png", "m.png"], "", "y.png"]
    workflow = ui(*(node(number, "LoadImage", [value, "image"]) for number, value in enumerate(values)))
    assert [inputs["image"] for inputs in graph_of(workflow, CLASSIC).values()] == ["s/d.png", "l.png", "x.png", "y.png"]
    assert [inputs["image"] for inputs in graph_of(workflow).values()][1] == {"__value__": ["l.png", "m.png"]}


# --- V3 schemas ---------------------------------------------------------------------------------


def test_a_dynamic_combo_brings_the_inputs_of_its_option() -> None:
    chosen = node(1, "Resize", ["size", 64, 32, "lanczos"])
    assert graph_of(ui(chosen))["1"] == {"kind": "size", "kind.width": 64, "kind.height": 32, "method": "lanczos"}
    assert graph_of(ui(node(1, "Resize", ["like", "yes", "area"])))["1"] == {
        "kind": "like",
        "kind.crop": "yes",
        "method": "area",
    }
    assert graph_of(ui(node(1, "Resize", [])))["1"] == {"kind": "size", "kind.width": 512, "kind.height": 0, "method": "area"}
    assert graph_of(ui(node(1, "Resize", ["gone", "area"])))["1"] == {"kind": "gone", "method": "area"}
    # null leaves the combo as it was, and its inputs come too late for their values
    assert graph_of(ui(node(1, "Resize", [None, "area"])))["1"] == {
        "kind": "size",
        "kind.width": 512,
        "kind.height": 0,
        "method": "area",
    }


def test_a_link_to_an_input_of_the_chosen_option_stays() -> None:
    image = node(2, "LoadImage", ["x.png"], outputs=("IMAGE",))
    resize = node(1, "Resize", ["like", "no", "area"], inputs={"kind.image": 1, "input": 2})
    inputs = graph_of(ui(image, resize, links=[(1, 2, 0, 1, 0), (2, 2, 0, 1, 1)]))["1"]
    assert (inputs["kind.image"], inputs["input"]) == (["2", 0], ["2", 0])


def test_a_group_that_grows_sends_what_is_linked_gaps_kept() -> None:
    image = node(2, "LoadImage", ["x.png"], outputs=("IMAGE",))
    batch = node(1, "Batch", inputs={"images.i0": 1, "images.i1": None, "images.i2": 2})
    workflow = ui(image, batch, links=[(1, 2, 0, 1, 0), (2, 2, 0, 1, 2)])
    assert graph_of(workflow)["1"] == {"images.i0": ["2", 0], "images.i2": ["2", 0]}


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
def test_a_link_replaces_its_widgets_value_whatever_the_order_of_the_inputs(frontend: str) -> None:
    sampler = node(3, "Sampler", [7], inputs={"steps*": 2, "model": 1})
    links = [(1, 1, 0, 3, 0), (2, 2, 0, 3, 4)]  # neither slot number is right
    inputs = graph_of(ui(LOADER, node(2, "Number"), sampler, links=links), frontend)["3"]
    assert (inputs["model"], inputs["steps"], inputs["seed"]) == (["1", 0], ["2", 0], 7)


def test_both_schemas_of_links_and_ids_as_strings() -> None:
    link = {"id": 1, "origin_id": "l", "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "MODEL"}
    workflow = {"version": 1, "nodes": [LOADER | {"id": "l"}, node(3, "Sampler", inputs={"model": 1})], "links": [link]}
    assert graph_of(workflow)["3"]["model"] == ["l", 0]


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
def test_a_link_that_only_the_list_of_links_knows_is_kept(frontend: str) -> None:
    sampler = {"id": 3, "type": "Sampler"}
    assert graph_of(ui(LOADER, sampler, links=[(1, 1, 0, 3, 0)]), frontend)["3"]["model"] == ["1", 0]


def test_a_widget_that_the_class_lost_goes_with_its_link_and_an_unknown_socket_stays() -> None:
    sampler = node(3, "Sampler", inputs={"gone*": 1, "extra": 1})
    inputs = graph_of(ui(LOADER, sampler, links=[(1, 1, 0, 3, 1)]))["3"]
    assert "gone" not in inputs
    assert inputs["extra"] == ["1", 0]


def test_a_link_whose_origin_is_gone_is_refused_by_name() -> None:
    workflow = ui(node(3, "Sampler", inputs={"model": 1}, title="Mine"), links=[(1, 9, 0, 3, 0)])
    with pytest.raises(UiWorkflowInvalid, match=r"input 'model' of node 3 \(Sampler 'Mine'\) is linked to node 9"):
        convert(workflow, INFO)


def test_a_link_that_is_not_in_the_list_counts_as_none() -> None:
    assert "model" not in graph_of(ui(node(3, "Sampler", inputs={"model": 77})))["3"]


# --- nodes that exist in the editor only ---------------------------------------------------------


def reroutes(**more: Any) -> dict[str, Any]:
    first = node(5, "Reroute", inputs={"": 1}, outputs=("*",))
    second = node(6, "Reroute", inputs={"": 2}, outputs=("*",)) | more
    links = [(1, 1, 0, 5, 0), (2, 5, 0, 6, 0), (3, 6, 0, 3, 0)]
    return ui(LOADER, first, second, node(3, "Sampler", inputs={"model": ("MODEL", 3)}), links=links)


def test_reroutes_pass_through_and_a_muted_one_cuts_in_modern_editors() -> None:
    assert graph_of(reroutes())["3"]["model"] == ["1", 0]
    assert graph_of(reroutes(mode=4))["3"]["model"] == ["1", 0]
    assert graph_of(reroutes(mode=2), CLASSIC)["3"]["model"] == ["1", 0]
    assert "model" not in graph_of(reroutes(mode=2))["3"]


def test_notes_are_left_out() -> None:
    workflow = ui(LOADER, node(2, "Note", ["hi"]), node(3, "MarkdownNote", ["# hi"]), node(4, "Label (rgthree)"))
    assert list(graph_of(workflow)) == ["1"]


def test_a_setter_gives_to_the_getters_of_its_name() -> None:
    setter = node(5, "SetNode", ["m"], inputs={"MODEL": 1}, outputs=("*",))
    getter = node(6, "GetNode", ["m"], outputs=("MODEL",))
    links = [(1, 1, 0, 5, 0), (2, 6, 0, 3, 0)]
    workflow = ui(LOADER, setter, getter, node(3, "Sampler", inputs={"model": 2}), links=links)
    assert graph_of(workflow)["3"]["model"] == ["1", 0]
    getter["widgets_values"] = ["other"]
    with pytest.raises(UiWorkflowInvalid, match="node 6"):
        convert(workflow, INFO)


@pytest.mark.parametrize(
    ("value", "steps", "cfg"),
    [(33, 33, 33), (1000, 100, 100), (-4, 1, 1), (3.5, 4, 3.5), (3.25, 3, 3.3)],
)
def test_a_primitive_is_copied_into_its_targets_within_their_bounds(value: float, steps: int, cfg: float) -> None:
    primitive = node(5, "PrimitiveNode", [value, "fixed"], outputs=("INT",))
    sampler = node(3, "Sampler", inputs={"steps*": 1, "cfg*": 2})
    inputs = graph_of(ui(primitive, sampler, links=[(1, 5, 0, 3, 3), (2, 5, 0, 3, 4)]))["3"]
    assert (inputs["steps"], inputs["cfg"]) == (steps, cfg)


def test_a_primitive_behind_a_reroute_does_nothing() -> None:
    primitive, reroute = node(5, "PrimitiveNode", [33]), node(6, "Reroute", inputs={"": 1})
    sampler = node(3, "Sampler", [1, "fixed", 25], inputs={"steps*": 2})
    links = [(1, 5, 0, 6, 0), (2, 6, 0, 3, 3)]
    assert graph_of(ui(primitive, reroute, sampler, links=links))["3"]["steps"] == 25


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
@pytest.mark.parametrize(("kind", "port", "sampler"), [("In", "steps", "8:20"), ("Out", "count", "8:10:20")])
def test_a_primitive_that_feeds_a_subgraphs_input_counts(frontend: str, kind: str, port: str, sampler: str) -> None:
    workflow = with_instance(kind, [44])
    workflow["nodes"][1]["inputs"].append({"name": port, "type": "INT", "widget": {"name": port}, "link": 7})
    workflow["nodes"].append(node(5, "PrimitiveNode", [333, "randomize"], outputs=("INT",)))
    workflow["links"].append([7, 5, 0, 8, 1, "INT"])
    converted = convert(workflow, INFO, frontend=frontend)
    assert converted.graph[sampler]["inputs"]["steps"] == 100, "the largest that the inner widget takes"
    assert (((sampler, "steps"),), "randomize") in [(control.targets, control.mode) for control in converted.controls]


# --- values that the code of a node pack saves --------------------------------------------------

PACKS: dict[str, Any] = {
    "Power Lora Loader (rgthree)": {"input": {"required": {"model": ["MODEL"]}, "optional": {}}, "output": ["MODEL"]},
    "Lora Loader (LoraManager)": {
        "input": {"required": {"model": ["MODEL"], "text": ["STRING", {"multiline": True}]}, "optional": {}},
        "output": ["MODEL"],
    },
    "New Lora Loader (LoraManager)": {
        "input": {"required": {"model": ["MODEL"], "text": ["AUTOCOMPLETE_TEXT_LORAS", {}], "loras": ["LORAS", {}]}},
        "output": ["MODEL"],
    },
    "TriggerWord Toggle (LoraManager)": {
        "input": {"required": {"group_mode": ["BOOLEAN", {"default": True}]}, "optional": {}},
        "output": ["STRING"],
    },
    "Combine": {
        "input": {"required": {"images": ["IMAGE"], "format": [["gif", "mp4"]], "save": ["BOOLEAN", {"default": True}]}},
        "output": [],
        "output_node": True,
    },
    "Show": {"input": {"required": {"text": ["STRING", {"forceInput": True}]}}, "output": ["STRING"], "output_node": True},
    "Count": {"input": {"required": {"count": ["INT", {"default": 1}]}}, "output": ["INT"]},
}
PACKS = INFO | {name: {**definition, "python_module": "custom_nodes.pack"} for name, definition in PACKS.items()}
ROW = {"on": True, "lora": "a.safetensors", "strength": 0.5, "strengthTwo": None}


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
@pytest.mark.parametrize(
    ("properties", "second"), [({}, {}), ({"Show Strengths": "Separate Model & Clip"}, {"strengthTwo": 1})]
)
def test_rows_of_loras_are_sent_by_number(frontend: str, properties: Any, second: dict[str, Any]) -> None:
    values = [{}, {"type": "PowerLoraLoaderHeaderWidget"}, ROW, {**ROW, "on": False}, {}, ""]
    power = node(1, "Power Lora Loader (rgthree)", values, properties=properties)
    row = {"lora": "a.safetensors", "strength": 0.5, **second}
    assert graph_of(ui(power), frontend, PACKS)["1"] == {"lora_1": {"on": True, **row}, "lora_2": {"on": False, **row}}


LORAS = [{"name": "a", "strength": 1, "active": True}]
WORDS = [{"text": "fox", "active": True}]


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
@pytest.mark.parametrize(
    ("kind", "values", "sent"),
    [
        ("Lora Loader (LoraManager)", ["<lora:a:1>", LORAS], {"text": "<lora:a:1>", "loras": {"__value__": LORAS}}),
        (
            "New Lora Loader (LoraManager)",
            [{"version": 1, "textWidgetName": "text"}, "<lora:a:1>", LORAS],
            {"text": "<lora:a:1>", "loras": {"__value__": LORAS}},
        ),
        (
            "TriggerWord Toggle (LoraManager)",
            [False, WORDS, "fox"],
            {"group_mode": False, "toggle_trigger_words": {"__value__": WORDS}, "orinalMessage": "fox"},
        ),
    ],
)
def test_lists_of_loras_and_words_are_sent_as_lists(frontend: str, kind: str, values: Any, sent: Any) -> None:
    manager = node(1, kind, values, inputs={"text*": None, "loras*": None})
    assert graph_of(ui(manager), frontend, PACKS)["1"] == sent


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
def test_values_that_were_saved_by_name_are_sent_by_name_also_where_a_link_replaces_them(frontend: str) -> None:
    values = {"format": "mp4", "save": False, "crf": 8, "audio": None, "videopreview": {"params": {"fullpath": "/x/y.mp4"}}}
    combine = node(3, "Combine", values, inputs={"depth*": 1})
    assert graph_of(ui(combine), frontend, PACKS)["3"] == {"format": "mp4", "save": False, "crf": 8}
    combine = node(3, "Combine", {**values, "depth": 10}, inputs={"depth*": 1})
    inputs = graph_of(ui(node(1, "Number"), combine, links=[(1, 1, 0, 3, 0)]), frontend, PACKS)["3"]
    assert (inputs["crf"], inputs["depth"]) == (8, ["1", 0])


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        ("Count", [1, "2 more"], "'2 more'"),
        ("Count", [1, {"on": True, "lora": "x.safetensors"}], "an object with 'on', 'lora'"),
        ("Count", [1, "", None, [7, 8]], "a list of 2"),
        ("Combine", ["mp4", True, 17], "17"),
        ("Power Lora Loader (rgthree)", [ROW, "x"], "'x'"),
    ],
)
def test_a_value_that_nothing_is_known_to_take_is_refused_unless_its_node_does_not_run(
    kind: str, values: list[Any], named: str
) -> None:
    for frontend in (CLASSIC, MODERN):
        with pytest.raises(UiWorkflowInvalid, match=rf"node 1 \({kind[:5]}") as caught:
            convert(ui(node(1, kind, values)), PACKS, frontend=frontend)
        assert f"was saved with {named}, which" in str(caught.value)
        assert graph_of(ui(node(1, kind, values, mode=2), node(2, "Number")), frontend, PACKS) == {"2": {"value": 1}}


@pytest.mark.parametrize(
    ("kind", "values", "sent"),
    [
        ("Show", [["what it showed", "last time"]], {}),
        ("Count", [5, "fixed"], {"count": 5}),
        ("Count", [5, "image"], {"count": 5}),
        ("Count", [5, "<tr><td>a text below the node</td></tr>"], {"count": 5}),
        ("Count", [5, None, "", {}, []], {"count": 5}),
    ],
)
def test_what_a_node_shows_and_its_buttons_are_no_values(kind: str, values: list[Any], sent: Any) -> None:
    for frontend in (CLASSIC, MODERN):
        assert graph_of(ui(node(1, kind, values)), frontend, PACKS) == {"1": sent}


# --- muted and bypassed -------------------------------------------------------------------------


def patched(mode: int, kind: str = "MODEL") -> dict[str, Any]:
    patch = node(2, "Patch", inputs={"clip": ("CLIP", 2), "model": ("MODEL", 1)}, outputs=("MODEL", "CLIP"), mode=mode)
    links = [(1, 1, 0, 2, 1), (2, 1, 1, 2, 0), (3, 2, 0, 3, 0)]
    return ui(LOADER, patch, node(3, "Sampler", inputs={"model": (kind, 3)}), links=links)


def test_a_bypassed_node_passes_on_its_first_input_of_the_same_type() -> None:
    assert graph_of(patched(0))["3"]["model"] == ["2", 0]
    bypassed = graph_of(patched(4))
    assert "2" not in bypassed
    assert bypassed["3"]["model"] == ["1", 0]


def test_a_chain_of_bypassed_nodes_is_followed_to_its_end() -> None:
    workflow = patched(4)
    workflow["nodes"].append(
        node(4, "Patch", inputs={"clip": ("CLIP", None), "model": ("MODEL", 3)}, outputs=("MODEL", "CLIP"), mode=4)
    )
    workflow["nodes"][2]["inputs"][0]["link"] = 4
    workflow["links"] = [*workflow["links"][:2], [3, 2, 0, 4, 1, "*"], [4, 4, 0, 3, 0, "*"]]
    assert graph_of(workflow)["3"]["model"] == ["1", 0]


def test_a_muted_node_is_left_out_with_the_links_to_it() -> None:
    assert "model" not in graph_of(patched(2))["3"]


def test_what_a_muted_node_fed_keeps_its_own_value_in_modern_editors() -> None:
    sampler = node(3, "Sampler", [1, "fixed", 25], inputs={"steps*": 1})
    workflow = ui(node(2, "Number", mode=2), sampler, links=[(1, 2, 0, 3, 3)])
    assert graph_of(workflow)["3"]["steps"] == 25
    assert "steps" not in graph_of(workflow, CLASSIC)["3"]


# --- subgraphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
def test_a_subgraph_is_expanded_to_any_depth_its_ids_joined(frontend: str) -> None:
    graph = graph_of(with_instance("Out"), frontend)
    assert list(graph) == ["1", "9", "8:10:20"]
    assert graph["8:10:20"] == {"seed": 5, "steps": 25, "cfg": 8, "mode": "fast", "tiled": True, "model": ["1", 0]}
    assert graph["9"]["images"] == ["8:10:20", 0]


@pytest.mark.parametrize("frontend", [CLASSIC, MODERN])
def test_an_instance_holds_the_value_of_a_promoted_widget(frontend: str) -> None:
    assert graph_of(with_instance("In", [44]), frontend)["8:20"]["steps"] == 44
    assert graph_of(with_instance("Out", [44]), frontend)["8:10:20"]["steps"] == 44
    proxied = with_instance("In", [3, 44], properties={"proxyWidgets": [["20", "cfg"], ["-1", "steps"]]})
    assert graph_of(proxied, frontend)["8:20"]["steps"] == 44


def test_a_modern_instance_holds_values_of_widgets_that_no_input_stands_for() -> None:
    proxies = {
        "proxyWidgets": [["20", "cfg"], ["20", "20: seed"], ["20", "control_after_generate"], ["99", "x"], ["20", "$$p"]]
    }
    inputs = graph_of(with_instance("In", [3.5, 77], properties=proxies))["8:20"]
    assert (inputs["cfg"], inputs["seed"]) == (3.5, 77)
    inputs = graph_of(with_instance("In", [3.5, 77], properties={"proxyWidgets": json.dumps([["20", "cfg"]])}))["8:20"]
    assert inputs["cfg"] == 3.5
    assert graph_of(with_instance("In", [3.5], properties=proxies), CLASSIC)["8:20"]["cfg"] == 8


def test_a_linked_instance_input_wins_over_its_value() -> None:
    workflow = with_instance("In", [44])
    workflow["nodes"] += [node(7, "Number")]
    workflow["nodes"][1]["inputs"].append({"name": "steps", "type": "INT", "link": 5, "widget": {"name": "steps"}})
    workflow["links"].append([5, 7, 0, 8, 1, "INT"])
    assert graph_of(workflow)["8:20"]["steps"] == ["7", 0]


def test_two_instances_have_their_own_values() -> None:
    workflow = with_instance("In", [44])
    workflow["nodes"].append(node(12, "In", [55]))
    graph = graph_of(workflow)
    assert (graph["8:20"]["steps"], graph["12:20"]["steps"]) == (44, 55)
    assert "model" not in graph["12:20"]


def test_inner_ids_that_are_taken_are_renumbered_as_modern_editors_do() -> None:
    workflow = with_instance("In")
    workflow["nodes"].append(node(20, "Number"))
    assert list(graph_of(workflow)) == ["1", "9", "20", "8:31"]
    assert list(graph_of(workflow, CLASSIC)) == ["1", "9", "20", "8:20"]


def test_a_muted_or_bypassed_subgraph() -> None:
    assert list(graph_of(with_instance("In", mode=2))) == ["1", "9"]
    muted = graph_of(with_instance("In", mode=2), CLASSIC)
    assert muted["9"]["images"] == ["8:20", 0]  # the editor mutes the inner nodes as well, when it is asked to
    assert list(graph_of(with_instance("In", mode=4))) == ["1", "9"]
    assert "images" not in graph_of(with_instance("In", mode=4))["9"]  # no input has an image's type


def test_an_input_wired_straight_to_an_output() -> None:
    through = subgraph("P", links=[(1, -10, 0, -20, 0)], inputs=[("m", "MODEL", [1])], outputs=[("m", "MODEL", [1])])
    instance = node(8, "P", inputs={"m": 1}, outputs=("MODEL",))
    workflow = ui(
        LOADER,
        instance,
        node(3, "Sampler", inputs={"model": 2}),
        links=[(1, 1, 0, 8, 0), (2, 8, 0, 3, 0)],
        definitions={"subgraphs": [through]},
    )
    assert graph_of(workflow)["3"]["model"] == ["1", 0]


def test_a_primitive_inside_a_subgraph_works_in_modern_editors() -> None:
    definition = inner()
    definition["nodes"].append(node(21, "PrimitiveNode", [66]))
    definition["nodes"][0]["inputs"].append({"name": "cfg", "type": "FLOAT", "link": 9, "widget": {"name": "cfg"}})
    definition["links"].append({"id": 9, "origin_id": 21, "origin_slot": 0, "target_id": 20, "target_slot": 4})
    workflow = with_instance("In") | {"definitions": {"subgraphs": [definition]}}
    assert graph_of(workflow)["8:20"]["cfg"] == 66
    assert graph_of(workflow, CLASSIC)["8:20"]["cfg"] == 8


def test_definitions_inside_definitions_are_found() -> None:
    nested = outer() | {"definitions": {"subgraphs": [inner()]}}
    assert "8:10:20" in graph_of(with_instance("Out") | {"definitions": {"subgraphs": [nested]}})


# --- texts and titles ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a {red|blue} cat", "a red cat"),
        ("{a {b|c}|d}", "a b"),
        (r"\{kept\|\}", "{kept|}"),
        ("one // gone\ntwo /* gone */three", "one \ntwo three"),
        ("see https://x.y", "see https:"),
        ("{open|end", "open"),
        ("close} | bar", "close} | bar"),
        ("no /* end", "no /* end"),
        ("/* a */ // b /* c\nd /* e", " \nd /* e"),
    ],
)
def test_a_prompts_choices_are_made_and_its_comments_cut(text: str, sent: str) -> None:
    assert graph_of(ui(node(1, "Text", [text])))["1"]["text"] == sent


def test_chance_decides_among_the_choices() -> None:
    graph = convert(ui(node(1, "Text", ["{a|b|c}"])), INFO, random=lambda: 0.99).graph
    assert graph["1"]["inputs"]["text"] == "c"


def test_braces_without_end_are_refused() -> None:
    with pytest.raises(UiWorkflowInvalid, match="braces"):
        convert(ui(node(1, "Text", ["{" * 5000])), INFO)
    with pytest.raises(UiWorkflowInvalid, match="braces"):
        convert(ui(node(1, "Text", ["{}" * 50_000])), INFO)


@pytest.mark.parametrize(
    ("prefix", "sent"),
    [
        ("%date:yyyy-MM-dd hh:mm:ss%", "2026-01-02 03:04:05"),
        ("%date:yy M d h m s yyy%", "26 1 2 3 4 5 yyy"),
        ("%Text.text%", "a_b"),
        ("%Mine.steps%_%width%_%Nobody.x%_%Mine.nothing%", "25_%width%_%Nobody.x%_%Mine.nothing%"),
        ("plain", "plain"),
    ],
)
def test_a_file_name_takes_in_dates_and_values(prefix: str, sent: str) -> None:
    sampler = node(3, "Sampler", [1, "fixed", 25], title="Mine")
    assert graph_of(ui(node(1, "Text", ["a/b"]), sampler, node(2, "SaveImage", [prefix])))["2"]["filename_prefix"] == sent


def test_titles_and_in_modern_editors_the_pack() -> None:
    properties = {"cnr_id": "pack", "ver": "v1.2", "aux_id": 3}
    workflow = ui(node(1, "Text", title="Mine", properties=properties), node(2, "Text"), node(3, "Number"))
    modern = convert(workflow, INFO, frontend=MODERN).graph
    assert modern["1"]["_meta"] == {"title": "Mine", "cnr_id": "pack", "ver": "1.2"}
    assert [each["_meta"]["title"] for each in modern.values()] == ["Mine", "Text Encode", "Number"]
    assert convert(workflow, INFO, frontend=CLASSIC).graph["1"]["_meta"] == {"title": "Mine"}


def test_the_engine_tells_which_editor_it_has() -> None:
    workflow = ui(node(2, "Number", mode=2), node(3, "Sampler", inputs={"steps*": 1}), links=[(1, 2, 0, 3, 3)])
    modern = {name: entry | {"has_intermediate_output": False} for name, entry in INFO.items()}
    assert "steps" in convert(workflow, modern).graph["3"]["inputs"]
    assert "steps" not in convert(workflow, INFO).graph["3"]["inputs"]
    assert "steps" not in convert(workflow, modern, frontend="v1.33.0").graph["3"]["inputs"]


# --- refused ------------------------------------------------------------------------------------


def test_all_unknown_classes_are_named_with_their_packs() -> None:
    workflow = ui(
        node(1, "A", properties={"cnr_id": "pack-a", "ver": "1.0"}),
        node(2, "B", properties={"aux_id": "user/repo"}),
        node(3, "A"),
        node(4, "C", mode=2),
        LOADER | {"id": 5},
    )
    with pytest.raises(UnknownNodes) as caught:
        convert(workflow, INFO)
    assert caught.value.nodes == ["A (node 1) from pack-a 1.0", "B (node 2) from user/repo"]
    assert "A (node 1) from pack-a 1.0; B (node 2) from user/repo; install" in str(caught.value)
    assert caught.value.code == "unknown_nodes"


def test_a_bypassed_unknown_node_is_passed_through_by_its_saved_inputs() -> None:
    unknown = node(2, "Nope", inputs={"m": ("MODEL", 1)}, outputs=("MODEL",), mode=4)
    workflow = ui(LOADER, unknown, node(3, "Sampler", inputs={"model": ("MODEL", 2)}), links=[(1, 1, 0, 2, 0), (2, 2, 0, 3, 0)])
    assert graph_of(workflow)["3"]["model"] == ["1", 0]


@pytest.mark.parametrize(
    ("kind", "says"),
    [("Anything Everywhere", "feeds other nodes without links"), ("workflow>G", "group node"), ("workflow/G", "group node")],
)
def test_what_only_the_editors_own_code_can_expand_is_refused(kind: str, says: str) -> None:
    info = INFO | {"Anything Everywhere": {"input": {"optional": {"anything": ["*"]}}, "output": []}}
    with pytest.raises(UiWorkflowInvalid, match=says):
        convert(ui(node(1, kind)), info)
    assert graph_of(ui(node(1, kind, mode=2)), info=info) == {}


def test_subgraphs_without_names_are_named_by_their_ids() -> None:
    definitions = [subgraph("a", node(1, "b"), links=()) | {"name": ""}, subgraph("b", node(1, "a"), links=()) | {"name": None}]
    with pytest.raises(UiWorkflowInvalid, match=r"in a circle: '(a' -> 'b' -> 'a|b' -> 'a' -> 'b)'"):
        convert(ui(node(1, "a"), definitions={"subgraphs": definitions}), INFO)


def test_a_subgraph_without_its_definition_is_told_as_such() -> None:
    kind = "0f3a8c1e-7b2d-4c55-9d1f-2a6b7c8d9e0f"
    with pytest.raises(UiWorkflowInvalid, match=r"node 1 .* is a subgraph whose definition the workflow lacks; save it again"):
        convert(ui(node(1, kind)), INFO)
    assert graph_of(ui(node(1, kind, mode=2))) == {}


def test_what_only_a_browser_can_make_is_refused() -> None:
    info = {"Load3D": {"input": {"required": {"image": ["LOAD_3D", {}]}}, "output": []}}
    with pytest.raises(UiWorkflowInvalid, match=r"node 1 \(Load3D\) takes its 'image' from the browser"):
        convert(ui(node(1, "Load3D", [""])), info)


def expanding(depth: int, width: int) -> dict[str, Any]:
    definitions = [subgraph(f"s{at}", *(node(n, f"s{at + 1}") for n in range(width)), links=()) for at in range(depth)]
    return ui(node(1, "s0"), definitions={"subgraphs": [*definitions, subgraph(f"s{depth}", node(1, "Number"), links=())]})


def nested_list(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([], "no list 'nodes'"),
    "a node is no object": ({"nodes": [3]}, "no node"),
    "a node without id": ({"nodes": [{"type": "A"}]}, "has no id"),
    "a node without type": ({"nodes": [{"id": 1}]}, "no 'type'"),
    "true as id": ({"nodes": [{"id": True, "type": "A"}]}, "has no id"),
    "a very long id": (ui(node("x" * 1000, "Number")), "short string"),
    "an id twice": (ui(LOADER, LOADER), "two nodes with the id 1"),
    "links are no list": ({"nodes": [], "links": {"1": []}}, "'links' of the workflow are no list"),
    "a short link": ({"nodes": [], "links": [[1, 2]]}, "has a link that is neither"),
    "a link slot as text": ({"nodes": [], "links": [[1, 2, "x", 3, 0]]}, "names no slot"),
    "inputs are no list": ({"nodes": [node(1, "A") | {"inputs": 3}]}, "inputs and outputs of node 1"),
    "definitions are no list": ({"nodes": [], "definitions": {"subgraphs": 3}}, "no list of objects"),
    "a definition without id": ({"nodes": [], "definitions": {"subgraphs": [{"nodes": []}]}}, "has no id"),
    "a definition without nodes": ({"nodes": [], "definitions": {"subgraphs": [{"id": "a"}]}}, "has no list 'nodes'"),
    "a circle of subgraphs": (
        ui(
            node(1, "a"),
            definitions={"subgraphs": [subgraph("a", node(1, "b"), links=()), subgraph("b", node(1, "a"), links=())]},
        ),
        "in a circle",
    ),
    "a circle of links": (
        ui(
            node(1, "Reroute", inputs={"": 1}),
            node(3, "Sampler", inputs={"model": 2}),
            links=[(1, 1, 0, 1, 0), (2, 1, 0, 3, 0)],
        ),
        "form a circle",
    ),
    "subgraphs that explode": (expanding(40, 2), "5000 nodes once its subgraphs are expanded"),
    "too many nodes": (ui(*(node(at, "Number") for at in range(5001))), "more than 5000 nodes"),
    "too many definitions": (expanding(1001, 1), "subgraph definitions"),
    "too many slots": (ui(node(1, "Nope", inputs={f"i{at}": None for at in range(50_001)})), "inputs and outputs"),
    "a wide instance many times": (
        ui(
            *(node(at, "w") for at in range(4000)),
            definitions={"subgraphs": [subgraph("w", links=(), inputs=[(f"i{at}", "X", []) for at in range(20_000)])]},
        ),
        "too many nodes and inputs",
    ),
    "a long type": (ui(node(1, "Nope", inputs={"a": ("x," * 5000, None)})), "10000 characters"),
    "a value nested too deep": (ui(node(3, "Sampler", [nested_list(500)])), "nested too deep"),
    "more values than a graph has": (ui(node(3, "Sampler", [[0] * 300_000])), "more values"),
    "a text in a thousand instances": (
        ui(
            *(node(at, "t") for at in range(1000)),
            definitions={"subgraphs": [subgraph("t", node(1, "Text", ["x" * 100_000]), links=())]},
        ),
        "more values or text",
    ),
    "proxies that are no pairs": (with_instance("In", [1], properties={"proxyWidgets": [[1]]}), "no pairs"),
    "a file name of a megabyte": (ui(node(2, "SaveImage", ["%date:d%" * 100_000])), "characters"),
    "an output that is not there": (
        ui(*with_instance("In")["nodes"], links=[(1, 1, 0, 8, 0), (2, 8, 5, 9, 0)], definitions={"subgraphs": [inner()]}),
        "does not have it",
    ),
    "an object of many values": (ui(node(3, "Sampler", {str(at): 0 for at in range(10_001)})), "10001 widgets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_workflow_is_refused_with_a_sentence(case: str) -> None:
    value, says = REFUSED[case]
    for frontend in (CLASSIC, MODERN):
        with pytest.raises(UiWorkflowInvalid, match="cannot be converted") as caught:
            convert(value, INFO, frontend=frontend)
        assert says in str(caught.value)
        assert len(str(caught.value)) < 400
        assert caught.value.code == "ui_workflow_invalid"


@pytest.mark.parametrize("odd", [None, 3, "x", [], {"input": 3}, {"input": {"required": [1]}, "output": "IMAGE"}, {}])
def test_an_odd_definition_is_no_obstacle(odd: Any) -> None:
    info = INFO | {"Number": odd, "Batch": {"input": {"required": {"x": odd, "y": ["COMBO", odd]}}, "output": [["a"], 3]}}
    with suppress(UnknownNodes):
        convert(ui(node(1, "Number", [1]), node(2, "Batch", [1])), info)


# --- against ComfyUI's own frontend -------------------------------------------------------------

# What is different on purpose: a link that this frontend loses, and scenes that only a browser can draw.
KEPT_LINK = {"api_flux2"}
NEEDS_BROWSER = {"api_hunyuan3d_part", "api_hunyuan3d_retopo_uv", "api_hunyuan3d_smart_topology"}


@cache
def fixture(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def official() -> dict[str, dict[str, Any]]:
    """Every official template by name."""
    return {name.removesuffix(".json"): template for name, template in templates(fetch_wheel(cache_root() / "wheels"))}


@pytest.mark.parametrize(("generation", "count"), [("classic", 97), ("modern", 334)])
def test_official_templates_become_what_comfyuis_own_frontend_makes_of_them(
    official: dict[str, dict[str, Any]], generation: str, count: int
) -> None:
    expected = fixture("templates.json")["graphs"][generation]
    different = set()
    for name, digest in expected.items():
        info, frontend = fixture(f"object_info_{generation}.json"), fixture("templates.json")["frontends"][generation]
        if name in NEEDS_BROWSER:
            with pytest.raises(UiWorkflowInvalid, match="from the browser"):
                convert(official[name], info, frontend=frontend)
            continue
        converted = convert(official[name], info, frontend=frontend, now=NOW, random=lambda: 0.0).graph
        text = json.dumps(converted, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            different.add(name)
    assert different == (KEPT_LINK if generation == "modern" else set())
    assert len(expected) == count


# A link that the frontend loses, a node without a class, a file list that only the server of that day had.
DIFFERENT_PAIRS = {
    (CLASSIC, "node_without_inputs_key"),
    (MODERN, "api_flux2"),
    (MODERN, "link_target_slots_wrong"),
    (MODERN, "old_type_aliases"),
    (MODERN, "upload_widgets"),
}


@pytest.mark.parametrize("path", recorded_pairs().values(), ids=list(recorded_pairs()))
def test_a_recorded_pair(path: Path) -> None:
    """Run with WORKFLOW_PAIRS=FOLDER, see devkit/recorded.py."""
    pair, info = recording(path)
    name = path.stem.partition("__")[2].removesuffix("__fe158")
    if name in NEEDS_BROWSER:
        with pytest.raises(UiWorkflowInvalid, match="from the browser"):
            convert(pair["ui"], info, frontend=pair["frontend"])
        return
    converted = convert(pair["ui"], info, frontend=pair["frontend"], now=NOW, random=lambda: 0.0).graph
    same = json.dumps(converted, sort_keys=True) == json.dumps(pair["api"], sort_keys=True)
    assert same is ((pair["frontend"], name) not in DIFFERENT_PAIRS)


# --- anything at all ----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner_values: st.lists(inner_values, max_size=4) | st.dictionaries(st.text(max_size=8), inner_values, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(
    ["id", "type", "mode", "inputs", "outputs", "widgets_values", "properties", "title", "nodes", "links"]
) | (
    st.sampled_from(["definitions", "name", "link", "widget", "subgraphs", "linkIds", "proxyWidgets", "origin_id", "target_id"])
)
LIKE_A_WORKFLOW = st.recursive(
    JSON | st.sampled_from([1, 2, 8, 20, -10, -20, "In", "Out", "Sampler", "Reroute", "PrimitiveNode", "SetNode", "GetNode"]),
    lambda inner_values: st.lists(inner_values, max_size=5) | st.dictionaries(KEYS, inner_values, max_size=8),
    max_leaves=25,
)


@given(value=LIKE_A_WORKFLOW, frontend=st.sampled_from([CLASSIC, MODERN]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_anything_is_converted_or_refused(value: Any, frontend: str) -> None:
    for candidate in (value, {"nodes": value, "links": value}, {"nodes": [value]}):
        with suppress(RequestError):
            convert(candidate, INFO, frontend=frontend)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*prefix, key)
        yield from places(value[key], (*prefix, key))


SEEDS = [
    with_instance("Out", [44], properties={"proxyWidgets": [["10", "steps"], ["-1", "count"]]}),
    with_instance("In", [44, 2.5], properties={"proxyWidgets": [["20", "steps"], ["20", "cfg"]]}),
    patched(4),
    reroutes(),
    ui(node(5, "PrimitiveNode", [3.5, "fixed"]), node(3, "Sampler", inputs={"steps*": 1}), links=[(1, 5, 0, 3, 3)]),
    ui(node(1, "Resize", ["like", "yes"], inputs={"kind.image": 1}), node(2, "LoadImage"), links=[(1, 2, 0, 1, 0)]),
]


@given(seed=st.sampled_from(SEEDS), data=st.data(), frontend=st.sampled_from([CLASSIC, MODERN]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_workflow_with_something_changed_is_converted_or_refused(seed: Any, data: st.DataObject, frontend: str) -> None:
    workflow = json.loads(json.dumps(seed))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(workflow))))
        holder = workflow
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = data.draw(JSON | st.sampled_from([1, 2, 8, 20, 10, -10, "In", "Out", "Sampler", "Reroute"]))
    with suppress(RequestError):
        convert(workflow, INFO, frontend=frontend)
