"""Which graphs are worth a download: what definitions of node classes say beforehand, with the real ComfyUI as the judge."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.preflight import WORKFLOWS, Judge, Verdict, of_mutations, of_templates
from devkit.local_worker import PROJECT
from worker.graph.preflight import refused_nodes, runnable_outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from devkit.engine.build import Engine

MUTATIONS = int(os.environ.get("PREFLIGHT_MUTATIONS", "60"))
TEMPLATES = int(os.environ.get("PREFLIGHT_TEMPLATES", "30"))
"""How many graphs the engine judges. `PREFLIGHT_MUTATIONS=200 PREFLIGHT_TEMPLATES=644 pytest tests/test_preflight.py`: all."""
OLD, NEW = "0.3.75", "0.33.0"

DEFINITIONS: dict[str, Any] = {
    "UNETLoader": {"input": {"required": {"name": [["a.safetensors"]], "how": [["default", "fast"]]}}, "output": ["MODEL"]},
    "KSampler": {
        "input": {"required": {"n": ["INT", {"min": 1, "max": 9}]}, "optional": {"any": ["*"]}},
        "output": ["INT", "*"],
    },
    "PreviewAny": {
        "input": {"required": {"model": ["MODEL"], "more": ["COMFY_AUTOGROW_V3", {}]}, "optional": {"x": ["FLOAT,INT"]}},
        "output": [],
        "output_node": True,
    },
}


def graph(load: dict[str, Any] | None = None, count: dict[str, Any] | None = None, **show: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"name": "b.safetensors", "how": "fast", **(load or {})}},
        "2": {"class_type": "KSampler", "inputs": {"n": 3, **(count or {})}},
        "3": {"class_type": "PreviewAny", "inputs": {"model": ["1", 0], "x": ["2", 0], **show}},
    }


def test_a_graph_that_lacks_nothing_but_a_file_is_worth_fetching_it() -> None:
    assert runnable_outputs(graph(), DEFINITIONS) == ["3"]


@pytest.mark.parametrize(
    ("wrong", "node_id"),
    [
        (graph(load={"how": "slow"}), "1"),
        (graph(count={"n": 0}), "2"),
        (graph(count={"n": "ten"}), "2"),
        (graph(count={"n": None}), "2"),
        (graph(count={"n": [1, 2, 3]}), "2"),
        (graph(model=["2", 0]), "3"),
        (graph(model=["1", 4]), "3"),
        ({**graph(), "1": {"class_type": "UNETLoader", "inputs": {"name": "a.safetensors"}}}, "1"),
    ],
)
def test_what_no_file_can_save_is_not(wrong: dict[str, Any], node_id: str) -> None:
    assert list(refused_nodes(wrong, DEFINITIONS)) == [node_id]
    assert runnable_outputs(wrong, DEFINITIONS) == []


@pytest.mark.parametrize(
    "odd",
    [
        graph(load={"how": "fast.json"}),
        graph(count={"n": "7"}),
        graph(count={"n": {"__value__": 4}}),
        graph(count={"any": ["1", 0], "undeclared": ["x", "y", "z"]}),
        graph(model=["2", 1]),
        {**graph(), "1": {"class_type": "Unheard", "inputs": {}}},
    ],
)
def test_what_is_not_certain_passes(odd: dict[str, Any]) -> None:
    assert "3" in runnable_outputs(odd, DEFINITIONS)


@pytest.mark.parametrize(("release", "refused"), [(None, []), (OLD, []), (NEW, ["1"]), ("v0.34.1", ["1"])])
def test_choices_in_their_newer_form_count_from_the_release_that_checks_them(release: str | None, refused: list[str]) -> None:
    newer = {
        **DEFINITIONS,
        "UNETLoader": {"input": {"required": {"how": ["COMBO", {"options": ["fast"]}]}}, "output": ["MODEL"]},
    }
    assert list(refused_nodes(graph(load={"how": "slow"}), newer, release)) == refused


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"size": "tall", "size.height": 5}, []),
        ({"size": "tall", "size.height": 500}, ["1"]),
        ({"size": "tall"}, ["1"]),
        ({"size": "wide", "size.height": 500}, []),
        ({}, []),
    ],
)
def test_what_a_choice_brings_is_required_with_it(values: dict[str, Any], refused: list[str]) -> None:
    brought = {"required": {"height": ["INT", {"max": 9}]}}
    options = {"options": [{"key": "wide", "inputs": {}}, {"key": "tall", "inputs": brought}]}
    definitions = {
        **DEFINITIONS,
        "UNETLoader": {"input": {"required": {"size": ["COMFY_DYNAMICCOMBO_V3", options]}}, "output": ["MODEL"]},
    }
    assert list(refused_nodes(graph(load=values), definitions, NEW)) == refused


@pytest.mark.parametrize("class_type", ["A custom node", "LoadImage"])
def test_values_of_a_class_that_may_check_them_by_its_own_code_pass(class_type: str) -> None:
    prompt = {**graph(count={"n": 0}), "1": {"class_type": class_type, "inputs": {"name": "a", "how": "slow"}}}
    definitions = {**DEFINITIONS, class_type: DEFINITIONS["UNETLoader"], "KSampler": DEFINITIONS["KSampler"]}
    assert list(refused_nodes(prompt, definitions, NEW)) == ["2"]
    del prompt["1"]["inputs"]["how"]
    assert list(refused_nodes(prompt, definitions, NEW)) == ["1", "2"]


@pytest.mark.parametrize("value", ["fast-1.5", "v1.5-lite", "7.1", "slow", "", 3])
def test_a_number_behind_a_dot_makes_no_file(value: object) -> None:
    assert list(refused_nodes(graph(load={"how": value}), DEFINITIONS)) == ["1"]


def test_an_output_that_can_run_is_worth_its_files_whatever_the_others_are() -> None:
    two = {**graph(), "4": {"class_type": "PreviewAny", "inputs": {"model": ["2", 0]}}}
    assert runnable_outputs(two, DEFINITIONS) == ["3"]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))
GROUPS = JSON | st.dictionaries(st.sampled_from(["required", "optional"]), JSON | st.dictionaries(st.just("a"), JSON))


@settings(deadline=None)
@given(st.fixed_dictionaries({"input": GROUPS, "output": JSON, "output_node": JSON}), JSON)
def test_no_definition_and_no_value_is_too_odd(definition: dict[str, Any], value: Any) -> None:
    odd = {
        "1": {"class_type": "VAEDecode", "inputs": {"a": value}},
        "2": {"class_type": "VAEDecode", "inputs": {"a": ["1", 0]}},
    }
    runnable_outputs(odd, {"VAEDecode": definition}, NEW)


# --- the real ComfyUI as the judge --------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """A ComfyUI that is asked which graphs it takes."""
    with Judge(engine, tmp_path_factory.mktemp("judge") / "comfyui") as judge:
        yield judge


def check(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the verdicts, if definitions alone refuse nothing that ComfyUI takes, and all that they show to be wrong."""
    found = list(verdicts)
    assert [each for each in found if each.is_held_back] == [], "no definition forbids these"
    assert [each for each in found if each.is_fetched_for] == [], "the definitions forbid these"
    return found


@pytest.mark.timeout(1800)
def test_nothing_that_comfyui_takes_is_held_back_and_nothing_that_it_refuses_is_fetched_for(judge: Judge) -> None:
    found = check(of_mutations(judge, MUTATIONS))
    assert sum(each.is_refused for each in found) >= len(found) // 5, "the mutations refuse too little to say anything"


@pytest.mark.timeout(1800)
def test_the_same_for_official_templates(judge: Judge) -> None:
    found = check(each for each in of_templates(judge, TEMPLATES) if each)
    assert sum(each.kinds is None for each in found) >= len(found) // 2, "the engine takes too few of them to say anything"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_projects_own_workflows_are_worth_their_models(name: str, judge: Judge) -> None:
    prompt = json.loads((PROJECT / f"devkit/workflows/{name}.json").read_text())
    assert refused_nodes(prompt, judge.definitions, judge.version) == {}
