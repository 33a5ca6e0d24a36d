"""ComfyUI's refusal of a graph, as sentences a person can act on. Pure."""

from __future__ import annotations

import difflib
import posixpath
from typing import TYPE_CHECKING, Any

from worker.comfy.workflow import named_models
from worker.errors import ModelMissing, WorkflowInvalid, WorkflowRejected

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from worker.comfy.workflow import Graph, NamedModel
    from worker.errors import RequestError

_SHOWN_CHOICES = 8


def rejection(graph: Graph, body: object) -> RequestError:
    """The error for a 400 of `POST /prompt`, whose JSON is `body`."""
    if not isinstance(body, dict):
        return WorkflowInvalid("ComfyUI could not read it")
    problems, only_models = _node_problems(graph, body.get("node_errors") or {})
    if not problems:
        return WorkflowRejected([_graph_problem(body.get("error") or {})])
    return ModelMissing(problems) if only_models else WorkflowRejected(problems)


def dropped_outputs(graph: Graph, body: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences about the outputs that ComfyUI dropped from a graph it otherwise took (a 200 with `node_errors`)."""
    return tuple(_node_problems(graph, body.get("node_errors") or {})[0])


def _graph_problem(error: Mapping[str, Any]) -> str:
    kind, message, details = error.get("type"), str(error.get("message") or "no reason given"), str(error.get("details") or "")
    if kind == "prompt_no_outputs":
        return "the workflow has no output node; add one such as SaveImage"
    if kind == "invalid_prompt" and "does not exist" in message:
        return f"{message.rstrip('.')} ({details}); install its node pack in the image or on the volume"
    if kind == "prompt_outputs_failed_validation" and not details:
        return "the nodes form a cycle; remove the link that closes it"
    return f"{message.rstrip('.')} ({details})" if details else message


def _node_problems(graph: Graph, node_errors: Mapping[str, Any]) -> tuple[list[str], bool]:
    problems: list[str] = []
    only_models = True
    for node_id, report in node_errors.items():
        for error in report.get("errors") or ():
            missing = _missing_model(graph, node_id, error)
            only_models = only_models and missing is not None
            problems.append(missing or _node_problem(node_id, report.get("class_type", "?"), error))
    return list(dict.fromkeys(problems)), only_models


def _missing_model(graph: Graph, node_id: str, error: Mapping[str, Any]) -> str | None:
    """The sentence for a value that is not in a loader's list because the model file is not there."""
    if error.get("type") != "value_not_in_list":
        return None
    extra = error.get("extra_info") or {}
    name, input_name = extra.get("received_value"), extra.get("input_name")
    for model in named_models(graph):
        if (model.node_id, model.input_name) == (node_id, input_name):
            return missing_model(model, str(name), _choices(extra))
    return None


def missing_model(model: NamedModel, name: str, choices: Sequence[str]) -> str:
    """The sentence for a model that is nowhere; `choices` are the names its loader lists."""
    folder = model.folders[0] if model.folders else "(the folder its loader reads)"
    near = _similar(name, choices)
    there = f"there is {near}" if near else "nothing like it is there"
    return (
        f"node {model.node_id} ({model.class_type}) needs the model '{name}' in models/{folder}, which is not there and in "
        f"no manifest; {there}; correct the name, put the file on the volume, or name its source in 'models' or models.toml"
    )


def _node_problem(node_id: str, class_type: str, error: Mapping[str, Any]) -> str:
    extra = error.get("extra_info") or {}
    where = f"node {node_id} ({class_type})"
    if error.get("type") == "value_not_in_list":
        choices = _choices(extra)
        near = (
            _similar(str(extra.get("received_value")), choices) or ", ".join(map(repr, choices[:_SHOWN_CHOICES])) or "nothing"
        )
        return f"{where}: '{extra.get('received_value')}' is no choice for '{extra.get('input_name')}', which takes {near}"
    if str(error.get("type", "")).startswith("exception_during"):
        return f"{where}: a link into it is bad ({error.get('details')}); check the slot number of its inputs"
    message, details = str(error.get("message") or "invalid").rstrip("."), error.get("details")
    return f"{where}: {message}: {details}" if details else f"{where}: {message}"


def _choices(extra: Mapping[str, Any]) -> Sequence[str]:
    return options_of(extra.get("input_config")) or ()


def options_of(config: object) -> Sequence[str] | None:
    """A combo's options, in either of ComfyUI's two schema forms; None for an input that is no combo."""
    for part in config if isinstance(config, list) else ():
        if isinstance(part, list):
            return [str(choice) for choice in part]
        if isinstance(part, dict) and isinstance(part.get("options"), list):
            return [str(choice) for choice in part["options"]]
    return None


def _similar(name: str, choices: Sequence[str]) -> str:
    """Up to three choices like `name`, quoted; by whole name first, then by file name alone."""
    return ", ".join(f"'{choice}'" for choice in dict.fromkeys(_close(name, choices)))


def _close(name: str, choices: Sequence[str]) -> Iterator[str]:
    wanted = posixpath.basename(name).lower()
    yield from (choice for choice in choices if posixpath.basename(choice).lower() == wanted)
    yield from difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
