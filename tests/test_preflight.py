"""Which graphs are worth a download: what definitions of node classes say beforehand, with the real ComfyUI as the judge."""

from __future__ import annotations

import json
import os
import random
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devkit.local_worker import PROJECT
from worker.errors import WorkerError
from worker.graph.graph import parse_graph
from worker.graph.model_names import named_models
from worker.graph.preflight import refused_nodes, runnable_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devkit.local_worker import LocalWorker

SEED = 20
MUTATIONS = int(os.environ.get("PREFLIGHT_MUTATIONS", "60"))
"""How many graphs the engine judges. `PREFLIGHT_MUTATIONS=200 pytest tests/test_preflight.py` takes a while."""
WORKFLOWS = sorted(path.stem for path in (PROJECT / "devkit/workflows").glob("*.json"))
BY_CODE = {"custom_validation_failed", "exception_during_validation", "exception_during_inner_validation"}
"""What is found by code that no definition shows, where no other finding is the reason."""

DEFINITIONS: dict[str, Any] = {
    "Load": {"input": {"required": {"name": [["a.safetensors"]], "how": [["default", "fast"]]}}, "output": ["MODEL"]},
    "Count": {"input": {"required": {"n": ["INT", {"min": 1, "max": 9}]}, "optional": {"any": ["*"]}}, "output": ["INT", "*"]},
    "Show": {
        "input": {"required": {"model": ["MODEL"], "more": ["COMFY_AUTOGROW_V3", {}]}, "optional": {"x": ["FLOAT,INT"]}},
        "output": [],
        "output_node": True,
    },
}


def graph(load: dict[str, Any] | None = None, count: dict[str, Any] | None = None, **show: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": "Load", "inputs": {"name": "b.safetensors", "how": "fast", **(load or {})}},
        "2": {"class_type": "Count", "inputs": {"n": 3, **(count or {})}},
        "3": {"class_type": "Show", "inputs": {"model": ["1", 0], "x": ["2", 0], **show}},
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
        ({**graph(), "1": {"class_type": "Load", "inputs": {"name": "a.safetensors"}}}, "1"),
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


def test_an_output_that_can_run_is_worth_its_files_whatever_the_others_are() -> None:
    two = {**graph(), "4": {"class_type": "Show", "inputs": {"model": ["2", 0]}}}
    assert runnable_outputs(two, DEFINITIONS) == ["3"]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))
GROUPS = JSON | st.dictionaries(st.sampled_from(["required", "optional"]), JSON | st.dictionaries(st.just("a"), JSON))


@given(st.fixed_dictionaries({"input": GROUPS, "output": JSON, "output_node": JSON}), JSON)
def test_no_definition_and_no_value_is_too_odd(definition: dict[str, Any], value: Any) -> None:
    odd = {"1": {"class_type": "A", "inputs": {"a": value}}, "2": {"class_type": "A", "inputs": {"a": ["1", 0]}}}
    runnable_outputs(odd, {"A": definition})


# --- the real ComfyUI as the judge --------------------------------------------------------------


class Judge:
    """The shared worker's ComfyUI, asked directly."""

    def __init__(self, worker: LocalWorker) -> None:
        self._root = f"http://127.0.0.1:{worker.comfyui_port}"
        self.definitions: dict[str, Any] = self.ask("/object_info")[1]

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                content = answer.read()
                return answer.status, json.loads(content) if content else None
        except urllib.error.HTTPError as exc:
            return exc.code, json.loads(exc.read() or b"null")

    def refusals(self, prompt: dict[str, Any]) -> set[str] | None:
        """Return the kinds of what is wrong, models and files left out; None for what it takes."""
        status, body = self.ask("/prompt", {"prompt": prompt})
        if status == 200:
            self.ask("/queue", {"clear": True})
            self.ask("/interrupt", {})
            return None
        models = {(model.node_id, model.input_name) for model in named_models(prompt)}
        kinds = set()
        for node_id, report in (body.get("node_errors") or {}).items():
            for error in report["errors"]:
                name = (error.get("extra_info") or {}).get("input_name")
                is_model = error["type"] == "value_not_in_list" and (node_id, name) in models
                kinds |= set() if is_model else {error["type"]}
        return kinds - {"custom_validation_failed"}  # a file that is not there


def mutated(number: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return one of the project's workflows with one to three of its inputs spoilt."""
    chance = random.Random(f"{SEED}-{number}")
    prompt: dict[str, Any] = json.loads((PROJECT / f"devkit/workflows/{WORKFLOWS[number % len(WORKFLOWS)]}.json").read_text())
    for _ in range(chance.randint(1, 3)):
        node = prompt[chance.choice(list(prompt))]
        if not node["inputs"]:
            continue
        name = chance.choice(list(node["inputs"]))
        other = chance.choice(list(prompt))
        outputs = len(definitions.get(prompt[other]["class_type"], {}).get("output") or ())
        values = ["no-such-choice", "nothing.safetensors", "12", 12, -7, 10**9, 0.5, True, None, [], ["1", 0, 0], [other, 0]]
        values += [[other, outputs + 3], {"__value__": [1, 2]}, {"a": 1}, "", list(prompt), "euler"]
        if chance.random() < 0.25:
            del node["inputs"][name]
        else:
            node["inputs"][name] = chance.choice(values)
    return prompt


def mutations(definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield those that are graphs at all."""
    for number in range(MUTATIONS):
        try:
            yield parse_graph(mutated(number, definitions))
        except WorkerError:
            continue


@pytest.mark.timeout(1800)
def test_nothing_that_comfyui_takes_is_held_back_and_nothing_that_it_refuses_is_fetched_for(worker: LocalWorker) -> None:
    judge = Judge(worker)
    known = judge.definitions
    judged = [(prompt, not runnable_outputs(prompt, known), judge.refusals(prompt)) for prompt in mutations(known)]
    held_back = [prompt for prompt, is_refused, kinds in judged if is_refused and not kinds]
    fetched = [(prompt, kinds) for prompt, is_refused, kinds in judged if kinds and kinds - BY_CODE and not is_refused]
    why = [[(prompt[key], name) for key, name in refused_nodes(prompt, known).items()] for prompt in held_back]
    assert not held_back, f"no definition forbids {why}"
    assert not fetched, f"the definitions forbid {fetched}"
    assert sum(is_refused for _, is_refused, _ in judged) >= len(judged) // 5, "the mutations refuse too little to say anything"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_projects_own_workflows_are_worth_their_models(name: str, worker: LocalWorker) -> None:
    prompt = json.loads((PROJECT / f"devkit/workflows/{name}.json").read_text())
    assert refused_nodes(prompt, Judge(worker).definitions) == {}
