"""Turn ComfyUI's refusal of a graph into sentences that say what to do. Pure."""

from __future__ import annotations

import difflib
import posixpath
import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from worker.base.text import quotable, shortened
from worker.comfyui_data import is_older, known
from worker.errors import ModelMissing, UnknownNodes, WorkflowInvalid, WorkflowRejected
from worker.graph.graph import BrokenLink, needed_nodes, reachable, takers_in
from worker.graph.model_names import named_models

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from worker.errors import RequestError
    from worker.graph.graph import Graph
    from worker.graph.model_names import NamedModel

_SHOWN_CHOICES = 8
_COMPARED = 2_000  # choices that are compared with the requested name
_MOST_FINDINGS = 200  # a client sees fifty
_EXPLAINED = 50
_SEND = "; send it in 'images' or 'files' under that name"
_NO_FILE = re.compile(r"\S+ - Invalid \w+ file: ")  # classes of nodes that load a file from ComfyUI's input folder
_QUOTED = 300  # characters of a value; some clients put a whole file where its name belongs


def rejection(graph: Graph, body: object, comfyui: str | None = None) -> RequestError:
    """Return the error for a 400 of `POST /prompt` with the JSON `body`, from a ComfyUI of this version."""
    if not isinstance(body, dict):
        return WorkflowInvalid("ComfyUI could not read it")
    found = _refusals(graph, body)
    problems = list(dict.fromkeys(finding.problem for finding in found))
    if not problems and (class_type := _unknown_class(graph, body.get("error") or {})):
        return unknown_nodes(node_origins(graph, {class_type}), comfyui)
    if not problems:
        return WorkflowRejected([_graph_problem(body.get("error") or {})])
    if all(finding.is_link for finding in found):
        return WorkflowInvalid("; ".join(problems))  # as for a graph that has no node left without these links
    return ModelMissing(problems) if all(finding.is_model for finding in found) else WorkflowRejected(problems)


def dropped_outputs(graph: Graph, body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return sentences about outputs that ComfyUI dropped from a graph that it accepted (a 200 with `node_errors`)."""
    found, takers = _refusals(graph, body), takers_in(graph)
    problems = dict.fromkeys(finding.problem + _lost_outputs(graph, takers, finding) for finding in found[:_EXPLAINED])
    return tuple(problems | dict.fromkeys(finding.problem for finding in found[_EXPLAINED:]))


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A problem that ComfyUI found in a node, and the outputs that it had dropped by then for any reason."""

    node_id: str
    problem: str
    dropped: Sequence[str]
    is_model: bool = False
    is_link: bool = False


def _refusals(graph: Graph, body: Mapping[str, Any]) -> list[_Refusal]:
    """Return all of ComfyUI's refusals, except models that only outputs with a broken link need: nobody looked for these."""
    reports = body.get("node_errors") or {}
    errors = [error for report in reports.values() for error in report.get("errors") or ()]
    named = named_models(graph) if any(error.get("type") == "value_not_in_list" for error in errors) else ()
    models = {(model.node_id, model.input_name): model for model in reversed(named)}
    findings = (finding for node_id, report in reports.items() for finding in _findings_in(graph, models, node_id, report))
    found = list(islice(findings, _MOST_FINDINGS))
    if not any(finding.is_model for finding in found):
        return found
    needed = needed_nodes(graph, {output for finding in found for output in finding.dropped if output in graph})
    return [each for each in found if not each.is_model or not each.dropped or each.node_id in needed] or found


def _findings_in(
    graph: Graph, models: Mapping[tuple[str, str], NamedModel], node_id: str, report: Mapping[str, Any]
) -> Iterator[_Refusal]:
    dropped = report.get("dependent_outputs") or ()
    for error in report.get("errors") or ():
        if (link := _broken_link(graph, node_id, error)) is not None:
            yield _Refusal(node_id, link.problem, dropped, is_link=True)
        elif model := _missing_model_refusal(models, node_id, error):
            yield _Refusal(node_id, model, dropped, is_model=True)
        else:
            yield _Refusal(node_id, _node_problem(node_id, report.get("class_type", "?"), error), dropped)


def _lost_outputs(graph: Graph, takers: Mapping[str, Sequence[str]], finding: _Refusal) -> str:
    """Return which outputs a refusal cost, if it is not their own. ComfyUI lists unrelated outputs with them."""
    spoiled = reachable([finding.node_id], takers) - {finding.node_id}
    nodes = [f"{node_id} ({graph[node_id]['class_type']})" for node_id in finding.dropped if node_id in spoiled]
    return f"; so there is no output of node {', '.join(nodes)}" if nodes else ""


def _broken_link(graph: Graph, node_id: str, error: Mapping[str, Any]) -> BrokenLink | None:
    if error.get("type") != "bad_linked_input":
        return None
    value = graph[node_id]["inputs"].get((error.get("extra_info") or {}).get("input_name"))
    return value if isinstance(value, BrokenLink) else None


def _graph_problem(error: Mapping[str, Any]) -> str:
    kind, message, details = error.get("type"), str(error.get("message") or "no reason given"), str(error.get("details") or "")
    if kind == "prompt_no_outputs":
        return "the workflow has no output node; add one such as SaveImage"
    if kind == "prompt_outputs_failed_validation" and not details:
        return "the nodes form a cycle; remove the link that closes it"
    return f"{message.rstrip('.')} ({details})" if details else message


def _missing_model_refusal(models: Mapping[tuple[str, str], NamedModel], node_id: str, error: Mapping[str, Any]) -> str | None:
    """Return the sentence for a refused value that is not in a loader's list because the model file is missing."""
    if error.get("type") != "value_not_in_list":
        return None
    extra = error.get("extra_info") or {}
    model = models.get((node_id, str(extra.get("input_name"))))
    return missing_model_sentence(model, str(extra.get("received_value")), _choices(extra)) if model else None


def missing_model_sentence(model: NamedModel, name: str, choices: Sequence[str]) -> str:
    """Return ComfyUI's refusal of a missing model as a sentence. `choices` are the names that its loader lists."""
    folder = model.folders[0] if model.folders else "(the folder its loader reads)"
    where = f"perhaps in models/{folder}" if model.guessed else f"in models/{folder}"
    name = shortened(name, _QUOTED)
    near = _similar_choices(name, choices)
    there = f"there is {near}" if near else "nothing like it is there"
    return (
        f"node {model.node_id} ({model.class_type}) needs the model '{name}' {where}, which is not there and in "
        f"no manifest; {there}; correct the name, put the file on the volume, or name its source in 'models' or models.toml"
    )


def _node_problem(node_id: str, class_type: str, error: Mapping[str, Any]) -> str:
    extra = error.get("extra_info") or {}
    where = f"node {node_id} ({class_type})"
    if error.get("type") == "value_not_in_list":
        choices = _choices(extra)
        value = shortened(str(extra.get("received_value")), _QUOTED)
        near = _similar_choices(value, choices) or ", ".join(map(repr, choices[:_SHOWN_CHOICES])) or "nothing"
        return f"{where}: '{value}' is no choice for '{extra.get('input_name')}', which takes {near}"
    details = shortened(str(error.get("details") or ""), _QUOTED)
    if str(error.get("type", "")).startswith("exception_during"):
        return f"{where}: a link into it is bad ({details}); check the slot number of its inputs"
    message = shortened(str(error.get("message") or "invalid"), _QUOTED).rstrip(".")
    todo = _SEND if error.get("type") == "custom_validation_failed" and _NO_FILE.match(details) else ""
    return f"{where}: {message}: {details}{todo}" if details else f"{where}: {message}"


def with_sent_files(problems: Iterable[str], sent: Sequence[str]) -> tuple[str, ...]:
    """Return ComfyUI's refusals as sentences. Those about a missing input file also list the files that the job sent."""
    names = ", ".join(f"'{shortened(name, 60)}'" for name in sent[:_SHOWN_CHOICES])
    more = f" and {len(sent) - _SHOWN_CHOICES} more" if len(sent) > _SHOWN_CHOICES else ""
    told = f"{_SEND}, as {names}{more} {'was' if len(sent) == 1 else 'were'}" if sent else _SEND
    return tuple(problem.replace(_SEND, told, 1) for problem in problems)


def _choices(extra: Mapping[str, Any]) -> Sequence[str]:
    return combo_options(extra.get("input_config")) or ()


def combo_options(config: object) -> Sequence[str] | None:
    """Return a combo's options from ComfyUI's refusal, or a definition, in either of two schema forms. None for others."""
    for part in config if isinstance(config, list) else ():
        if isinstance(part, list):
            return [str(choice) for choice in part]
        if isinstance(part, dict) and isinstance(part.get("options"), list):
            return [str(choice) for choice in part["options"]]
    return None


def _similar_choices(name: str, choices: Sequence[str]) -> str:
    """Return up to three quoted choices that resemble the refused `name`: first by whole name, then by file name."""
    return ", ".join(f"'{choice}'" for choice in dict.fromkeys(_close_matches(name, choices)))


def _close_matches(name: str, choices: Sequence[str]) -> Iterator[str]:
    wanted = posixpath.basename(name).lower()
    yield from (choice for choice in choices if posixpath.basename(choice).lower() == wanted)
    yield from difflib.get_close_matches(name, choices[:_COMPARED], n=3, cutoff=0.6)


# --- classes that ComfyUI does not have ---------------------------------------------------------

_CORE = "comfy-core"


@dataclass(frozen=True, slots=True)
class NodeOrigin:
    """A node that ComfyUI refuses and the source of its class. `saved` has the pack and version that the editor saved."""

    class_type: str
    node_id: str
    saved: Mapping[str, Any]

    def __str__(self) -> str:
        text = f"{quotable(self.class_type)} (node {quotable(self.node_id)})"
        pack = self._told("cnr_id") or self._told("aux_id")
        if not pack or pack == _CORE:
            return text
        version = self._told("ver")
        return f"{text} from {quotable(pack)}" + (f" {quotable(version)}" if version else "")

    @property
    def is_own(self) -> bool:
        """Return whether the class is ComfyUI's own: it was saved so, or a release or an official template has it."""
        pack = self._told("cnr_id") or self._told("aux_id")
        return pack == _CORE if pack else known().is_own(self.class_type)

    @property
    def release(self) -> str:
        """Return the oldest release of ComfyUI that is known to have the class, or an empty text."""
        saved = self._told("ver") if self._told("cnr_id") == _CORE else ""
        told = [version for version in (known().since(self.class_type), known().newer.get(self.class_type), saved) if version]
        return next((version for version in told if not any(is_older(other, version) for other in told)), "")

    def _told(self, key: str) -> str:
        value = self.saved.get(key)
        return value if isinstance(value, str) else ""


def node_origins(graph: Graph, class_types: Collection[str] | None = None) -> list[NodeOrigin]:
    """Return one node of each of these classes, or of all. Graphs that a modern editor exported name their sources."""
    found: dict[str, NodeOrigin] = {}
    for node_id, node in graph.items():
        if class_types is None or node["class_type"] in class_types:
            meta = node.get("_meta")
            found.setdefault(
                node["class_type"], NodeOrigin(node["class_type"], node_id, meta if isinstance(meta, dict) else {})
            )
    return list(found.values())


def unknown_nodes(missing: Iterable[NodeOrigin], comfyui: str | None) -> UnknownNodes:
    """Return the error for classes that this version of ComfyUI lacks. None means that the version is unknown."""
    packs, newer, gone, off = list[str](), list[NodeOrigin](), list[str](), list[str]()
    for node in missing:
        since = known().since(node.class_type)
        if not node.is_own:
            packs.append(str(node))
        elif not comfyui or since is None or is_older(comfyui, since):
            newer.append(node)
        elif any(
            node.class_type in names and is_older(release, comfyui, or_same=True) for release, names in known().gone.items()
        ):
            gone.append(str(node))
        else:
            off.append(str(node))
    return UnknownNodes(packs, list(map(str, newer)), gone, off, _release_with_classes(newer, comfyui), comfyui or "")


def _release_with_classes(newer: Sequence[NodeOrigin], comfyui: str | None) -> str:
    """Return the release that has all refused classes. Empty if one is unknown, or if it is not newer than this one."""
    releases = [node.release for node in newer]
    if not all(releases) or any(comfyui and is_older(release, comfyui, or_same=True) for release in releases):
        return ""
    return next((each for each in releases if not any(is_older(each, other) for other in releases)), "")


def _unknown_class(graph: Graph, error: Mapping[str, Any]) -> str | None:
    """Return the class that ComfyUI refuses the graph for. ComfyUI names only the first one."""
    kind, message = error.get("type"), str(error.get("message") or "")
    if kind == "missing_node_type" or (kind == "invalid_prompt" and "does not exist" in message):
        node = graph.get(str(error.get("details") or "").rpartition("#")[2].strip("'"))
        return str(node["class_type"]) if node else None
    return None
