"""Values of a graph set by a request, and changed from run to run as the editor changes them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devkit.editor import INFO, inner, node, ui, with_instance
from worker.editor.convert import convert
from worker.errors import OverrideInvalid
from worker.graph.overrides import apply_overrides, next_values

GRAPH: dict[str, dict[str, Any]] = {
    "6": {"class_type": "Text", "inputs": {"text": "a", "clip": ["1", 0]}, "_meta": {"title": "Positive v1.5"}},
    "7": {"class_type": "Text", "inputs": {"text": "b", "clip": ["1", 0]}, "_meta": {"title": "Negative"}},
    "12:5": {"class_type": "KSampler", "inputs": {"seed": 1, "resize.width": 2}, "_meta": {"title": "KSampler"}},
    "1": {"class_type": "Loader", "inputs": {}},
}


@pytest.mark.parametrize(
    ("key", "node_id", "name"),
    [
        ("6.text", "6", "text"),
        ("Positive v1.5.text", "6", "text"),
        ("Negative.text", "7", "text"),
        ("12:5.seed", "12:5", "seed"),
        ("KSampler.seed", "12:5", "seed"),
        ("KSampler.resize.width", "12:5", "resize.width"),
        ("6.clip", "6", "clip"),
    ],
)
def test_an_input_is_named_by_id_title_or_class(key: str, node_id: str, name: str) -> None:
    before = copy.deepcopy(GRAPH)
    changed = apply_overrides(GRAPH, {key: "new"})
    assert changed[node_id]["inputs"][name] == "new"
    assert before == GRAPH
    assert sum(changed[each] != GRAPH[each] for each in GRAPH) == 1


def test_several_overrides_of_one_node_and_lists() -> None:
    changed = apply_overrides(GRAPH, {"6.text": ["x", "y"], "6.clip": ["7", 0], "KSampler.seed": [1, 2]})
    assert changed["6"]["inputs"] == {"text": {"__value__": ["x", "y"]}, "clip": ["7", 0]}
    assert changed["12:5"]["inputs"]["seed"] == {"__value__": [1, 2]}


@pytest.mark.parametrize("slot", [0.5, -1, -1.0, 1e999, float("nan")])
def test_a_link_to_what_is_no_output_is_refused(slot: float) -> None:
    with pytest.raises(OverrideInvalid, match=r"'6\.clip' takes output .* of node 7; an output is a whole number from 0"):
        apply_overrides(GRAPH, {"6.clip": ["7", slot]})
    assert apply_overrides(GRAPH, {"6.clip": ["7", 1.0]})["6"]["inputs"]["clip"] == ["7", 1]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("Text.text", "In 'set', 'Text.text' matches the nodes 6, 7; use one of these ids instead of 'Text'."),
        ("6.nothing", "In 'set', '6.nothing' finds no input 'nothing' at node 6 (Text), which has text, clip."),
        ("1.x", "finds no input 'x' at node 1 (Loader), which has none"),
        ("99.text", "finds no node by that id, title or class; there are 6 (Text), 7 (Text), 12:5 (KSampler), 1 (Loader)"),
        ("text", "is not NODE.INPUT"),
        (".", "is not NODE.INPUT"),
        ("", "is not NODE.INPUT"),
        ("a." * 1000, "is not NODE.INPUT"),
    ],
)
def test_what_names_no_input_or_several_is_refused_with_the_candidates(key: str, says: str) -> None:
    with pytest.raises(OverrideInvalid, match=re.escape(says)) as caught:
        apply_overrides(GRAPH, {key: 1})
    assert caught.value.code == "override_invalid"


def test_many_candidates_are_counted() -> None:
    graph = {str(at): {"class_type": "A", "inputs": {}} for at in range(30)}
    with pytest.raises(OverrideInvalid, match="0, 1, 2, 3, 4, 5, 6, 7 and 22 more"):
        apply_overrides(graph, {"A.x": 1})


@given(key=st.text(max_size=20), value=st.none() | st.integers() | st.lists(st.integers(), max_size=3))
def test_any_key_is_applied_or_refused(key: str, value: Any) -> None:
    try:
        changed = apply_overrides(GRAPH, {key: value})
    except OverrideInvalid:
        return
    assert changed != GRAPH or value in ("a", "b", 1, 2)


# --- from run to run ----------------------------------------------------------------------------


def sampler_after(values: list[Any], drawn: float = 0.5, **changes: Any) -> dict[str, Any]:
    converted = convert(ui(node(3, "Sampler", values)), INFO)
    graph = apply_overrides(converted.graph, {f"3.{name}": value for name, value in changes.items()})
    inputs: dict[str, Any] = next_values(graph, converted.controls, lambda: drawn)["3"]["inputs"]
    assert converted.graph["3"]["inputs"]["seed"] == values[0]
    return inputs


@pytest.mark.parametrize(
    ("mode", "seed"), [("fixed", 7), ("increment", 8), ("decrement", 6), ("randomize", 2**49), (True, 2**49), ("odd", 7)]
)
def test_a_seed_changes_as_the_editor_was_told(mode: Any, seed: int) -> None:
    assert sampler_after([7, mode])["seed"] == seed


def test_a_seed_stays_within_its_bounds() -> None:
    assert sampler_after([0, "decrement"])["seed"] == 0
    assert sampler_after([7, "randomize"], drawn=0.999999999)["seed"] < 2**50
    assert sampler_after([7, "randomize"], seed="text")["seed"] == "text"
    assert sampler_after([7, "increment"], seed=99)["seed"] == 100


def test_a_linked_seed_is_not_touched() -> None:
    sampler = node(3, "Sampler", [7, "randomize"], inputs={"seed*": 1})
    assert convert(ui(node(2, "Number"), sampler, links=[(1, 2, 0, 3, 2)]), INFO).controls == ()


def test_a_primitive_gives_all_its_targets_the_same_next_value() -> None:
    primitive = node(5, "PrimitiveNode", [7, "increment"])
    samplers = [node(at, "Sampler", [1, "fixed"], inputs={"seed*": at}) for at in (3, 4)]
    converted = convert(ui(primitive, *samplers, links=[(3, 5, 0, 3, 2), (4, 5, 0, 4, 2)]), INFO)
    [control] = converted.controls
    assert control.targets == (("3", "seed"), ("4", "seed"))
    changed = next_values(converted.graph, converted.controls, lambda: 0.5)
    assert [changed[key]["inputs"]["seed"] for key in "34"] == [8, 8]


def test_a_seed_that_an_instance_holds_changes_there() -> None:
    definition = inner()
    definition["nodes"].append(node(21, "Sampler", [9, "fixed"], inputs={"seed*": 8}))
    definition["nodes"][0]["inputs"].append({"name": "seed", "type": "INT", "link": 7, "widget": {"name": "seed"}})
    for link, target in ((7, 20), (8, 21)):
        definition["links"].append({"id": link, "origin_id": -10, "origin_slot": 2, "target_id": target, "target_slot": 2})
    definition["inputs"].append({"name": "seed", "type": "INT", "linkIds": [7, 8]})
    workflow = with_instance("In", [25, 40]) | {"definitions": {"subgraphs": [definition]}}
    converted = convert(workflow, INFO, frontend="1.58.1")
    [control] = converted.controls
    assert (control.mode, control.targets) == ("randomize", (("8:20", "seed"), ("8:21", "seed")))
    changed = next_values(converted.graph, converted.controls, lambda: 0.25)
    assert changed["8:20"]["inputs"]["seed"] == changed["8:21"]["inputs"]["seed"] == 2**48


@pytest.mark.parametrize(
    ("mode", "drawn", "option"),
    [("increment", 0, "c"), ("increment-wrap", 0, "a"), ("decrement", 0, "b"), ("randomize", 0.4, "b"), ("fixed", 0, "c")],
)
def test_a_combo_steps_through_its_options(mode: str, drawn: float, option: str) -> None:
    info = {
        "A": {"input": {"required": {"x": [["a", "b", "c"], {"control_after_generate": True}], "n": ["INT"]}}, "output": []}
    }
    converted = convert(ui(node(1, "A", ["c", mode, "", 5])), info)
    assert converted.graph["1"]["inputs"] == {"x": "c", "n": 5}
    assert next_values(converted.graph, converted.controls, lambda: drawn)["1"]["inputs"]["x"] == option
