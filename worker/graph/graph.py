"""A graph in ComfyUI's API format: validation, path checks, and the models and files that it names. Pure.

This module does not know which node classes are installed. Where ComfyUI decides by a class's definition, this module decides
by the names of the class and the input. It is strict only where ComfyUI would answer with an exception's text, or would open a
file outside its folders.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from worker.base.text import is_legible, shown
from worker.comfyui_data import known
from worker.errors import (
    UnsafePath,
    WorkflowEmpty,
    WorkflowInvalid,
    WorkflowMissing,
    WorkflowNotFinite,
    WorkflowUiFormat,
)
from worker.spec import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

Graph: TypeAlias = dict[str, dict[str, Any]]
"""Maps a node id to `{"class_type": str, "inputs": {name: value or [node id, slot]}, ...}`, as `POST /prompt` expects it."""

# --- is it a graph ------------------------------------------------------------------------------

_LINK_LENGTH = 2
# Several times what real workflows use. ComfyUI is asked about each class, and each name is matched against patterns.
_MAX_CLASSES = 2_000
_MAX_NAME_CHARS = 500
_MAX_MODELS = 1_000


class BrokenLink(list[Any]):
    """A link that leads nowhere or closes a cycle, as ComfyUI gets it: an empty list. `problem` says what is wrong.

    ComfyUI refuses an input that holds an empty list, drops the outputs that need its node, and runs the others. With the link
    itself, ComfyUI 0.3.75 does so only if the class declares the input. For any other input the link ends the thread that runs
    all prompts. It also drops outputs behind a cycle silently.
    """

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem = problem


def parse_graph(value: object) -> Graph:
    """Return a request's workflow, unchanged, after checking that it is a graph.

    Every node has a class and inputs, every number is finite, every link leads to a node, and links form no cycle. Links that
    break these rules become `BrokenLink`s in a copy, if something that may be an output does not need them. ComfyUI decides
    which nodes are outputs.

    Raises:
        WorkflowMissing: there is no workflow.
        WorkflowUiFormat: it is in the editor's format; `convert` comes first.
        WorkflowEmpty: it has no nodes.
        WorkflowNotFinite: a number in it is NaN or infinite.
        WorkflowInvalid: anything else, naming the node and what to do.
    """
    if value is None:
        raise WorkflowMissing
    if not isinstance(value, dict):
        raise WorkflowInvalid(f"the workflow is {_kind(value)}; send an object in ComfyUI's API format")
    if isinstance(value.get("nodes"), list):
        raise WorkflowUiFormat
    if not value:
        raise WorkflowEmpty
    _check_not_wrapped(value)
    for node_id, node in value.items():
        _check_node(node_id, node)
    if len({node["class_type"] for node in value.values()}) > _MAX_CLASSES:
        raise WorkflowInvalid(f"it names more than {_MAX_CLASSES} node classes")
    return _with_links_broken(cast("Graph", value))


def bare(value: object) -> object:
    """Return a workflow without its wrapper, `{"prompt": ...}` or `{"output": ...}`, and without ComfyUI's notes."""
    match value:
        case {"prompt": dict(inner), **rest} | {"output": dict(inner), **rest} if not rest and "class_type" not in inner:
            value = inner
    return without_notes(value) if isinstance(value, dict) else value


def without_notes(graph: dict[str, Any]) -> dict[str, Any]:
    """Return a graph without `is_changed`. ComfyUI adds it while it runs, and it is often not a finite number."""
    if not any(isinstance(node, dict) and "is_changed" in node for node in graph.values()):
        return graph
    return {
        node_id: {name: value for name, value in node.items() if name != "is_changed"} if isinstance(node, dict) else node
        for node_id, node in graph.items()
    }


def _check_not_wrapped(value: dict[str, Any]) -> None:
    # What people paste: a POST /prompt body, the frontend's {output, workflow}, or a whole request.
    for key in ("prompt", "output", "workflow", "input"):
        inner = value.get(key)
        if not isinstance(inner, dict) or "class_type" in inner:
            continue
        raise WorkflowInvalid(f"the graph is wrapped in '{key}'; send the object inside '{key}' as the workflow")


def _check_node(node_id: object, node: object) -> None:
    if not isinstance(node_id, str):
        raise WorkflowInvalid(f"node {node_id} has {_kind(node_id)} as its id; write node ids as strings")
    if not isinstance(node, dict):
        raise WorkflowInvalid(
            f"node {node_id} is {_kind(node)}; the workflow may hold nodes only, each an object with 'class_type' and 'inputs'"
        )
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not class_type:
        raise WorkflowInvalid(
            f"node {_titled(node_id, node)} has no 'class_type'; the editor exports that for a node it does not know: "
            "install its custom node there and export again, or remove it"
        )
    if len(class_type) > _MAX_NAME_CHARS:
        raise WorkflowInvalid(f"node {_titled(node_id, node)} has a 'class_type' of {len(class_type)} characters")
    # Even if it is unused: ComfyUI accepts such a graph, reads every node's inputs, and its prompt thread ends (0.3.75).
    if not isinstance(node.get("inputs"), dict):
        raise WorkflowInvalid(f"node {node_id} ({class_type}) has no object 'inputs'; send {{}} where there are none")
    for name, value in node["inputs"].items():
        if not is_finite(value):
            raise WorkflowNotFinite(node_id=node_id, input_name=name)
    for name, value in node.items():
        if name != "inputs" and not is_finite(value):
            raise WorkflowNotFinite(node_id=node_id, input_name=name)


def _titled(node_id: str, node: dict[str, Any]) -> str:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return f"{node_id} ('{title}')" if isinstance(title, str) and title else node_id


def is_finite(value: object) -> bool:
    """Return whether JSON can represent every number in it: no NaN and no infinity."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                return False
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return True


def _with_links_broken(graph: Graph) -> Graph:
    broken = dict(_broken_links(graph))
    if not broken:
        return graph
    if not _leaves_an_output(graph, {node_id for node_id, _ in broken}):
        raise WorkflowInvalid(next(iter(broken.values())).problem)
    links: dict[str, dict[str, BrokenLink]] = {}
    for (node_id, name), link in broken.items():
        links.setdefault(node_id, {})[name] = link
    return with_inputs(graph, links)


def with_inputs(graph: Graph, values: Mapping[str, Mapping[str, Any]]) -> Graph:
    """Return a copy of the graph with these inputs set, by node. Copy each changed node once."""
    changed = {
        node_id: {**graph[node_id], "inputs": {**graph[node_id]["inputs"], **inputs}} for node_id, inputs in values.items()
    }
    return {**graph, **changed}


def _broken_links(graph: Graph) -> Iterator[tuple[tuple[str, str], BrokenLink]]:
    """Yield node, input and problem: first for links that lead nowhere, then for one link of each cycle."""
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, BrokenLink):
                yield (node_id, name), value
            elif isinstance(value, list) and len(value) == _LINK_LENGTH and (problem := _link_problem(graph, value)):
                where = f"input '{name}' of node {node_id} ({node['class_type']})"
                yield (node_id, name), BrokenLink(f"bad link: {where} {problem}")
    for node_id, name, cycle in _closing_links(graph):
        yield (node_id, name), BrokenLink(f"the links form a cycle, nodes {cycle}; remove one of them")


def _leaves_an_output(graph: Graph, broken: Iterable[str]) -> bool:
    """Return whether a possible output needs none of these nodes. It takes a link, and no node takes a link from it."""
    takers = takers_in(graph)
    spoiled = reached(broken, takers)
    takes = {taker for each in takers.values() for taker in each}
    return any(node_id not in spoiled and (node_id in takes or node_id not in takers) for node_id in graph)


def takers_in(graph: Graph) -> dict[str, list[str]]:
    """Map a node's id to the nodes that take a link from it, or that try to and name its output or its id wrongly."""
    takers: dict[str, list[str]] = {}
    for node_id, node in graph.items():
        for value in node["inputs"].values():
            meant = isinstance(value, list) and len(value) == _LINK_LENGTH and isinstance(value[0], (str, int))
            if meant and str(value[0]) in graph:
                takers.setdefault(str(value[0]), []).append(node_id)
    return takers


def reached(starts: Iterable[str], nexts: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """Return the starts and everything that can be reached from them."""
    found = set(starts)
    waiting = list(found)
    while waiting:
        fresh = set(nexts.get(waiting.pop(), ())) - found
        found |= fresh
        waiting.extend(fresh)
    return frozenset(found)


def _link_problem(graph: Graph, pair: list[Any]) -> str | None:
    """Return what is wrong with a two-element list. None for a good link and for a possible plain value.

    ComfyUI treats a two-element list as a link if the class declares the input for one. It accepts lists in other inputs as
    they are (validate_inputs in its execution.py). A list that can only be meant as a link, and that would end in ComfyUI's
    `exception_during_validation`, is refused here. ComfyUI judges the rest.
    """
    source, slot = pair
    number = isinstance(slot, (int, float))
    if isinstance(source, str) and source in graph:
        if isinstance(slot, int) and slot >= 0:  # ComfyUI counts a negative index from the end
            return None
        return f"takes output {slot!r} of node {source} ({graph[source]['class_type']}); an output is a whole number from 0"
    if isinstance(source, str) and number:
        return f"comes from node {source}, which is not in the workflow"
    if isinstance(source, int) and number and str(source) in graph:
        return f'comes from node {source} as a number; write the node id as a string: ["{source}", {slot}]'
    return None


_SHOWN_CYCLE = 20  # nodes of a cycle that a sentence lists


def _closing_links(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """Yield node, input and the cycle's nodes, for links whose removal breaks every cycle."""
    done: set[str] = set()
    for root in graph:
        if root in done:
            continue
        path, place = [root], {root: 0}
        following = [_links_into(graph, root)]
        while path:
            node_id = path[-1]
            for name, source in following[-1]:
                if source in place:
                    yield node_id, name, _cycle(path, place[source])
                elif source not in done:
                    place[source] = len(path)
                    path.append(source)
                    following.append(_links_into(graph, source))
                    break
            else:
                following.pop()
                done.add(path.pop())
                del place[node_id]


def _links_into(graph: Graph, node_id: str) -> Iterator[tuple[str, str]]:
    return ((name, value[0]) for name, value in graph[node_id]["inputs"].items() if is_link(graph, value))


def _cycle(path: Sequence[str], start: int) -> str:
    """Return the nodes of the path from `start` on, in the order in which data flows."""
    behind = path[max(start + 1, len(path) - _SHOWN_CYCLE) :]
    left_out = ["..."] if len(path) - start - 1 > len(behind) else []
    return " -> ".join([path[start], *reversed(behind), *left_out, path[start]])


def is_link(graph: Graph, value: object) -> bool:
    """Return whether an input's value is a link to a node of this graph: `[node id, slot]`."""
    return (
        isinstance(value, list)
        and len(value) == _LINK_LENGTH
        and isinstance(value[0], str)
        and value[0] in graph
        and isinstance(value[1], (int, float))
    )


def _kind(value: object) -> str:
    kinds = {str: "a string", list: "a list", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


# --- every string in it -------------------------------------------------------------------------


def _strings(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield every string of an input's value with its dotted name, in order.

    Lists arrive as `{"__value__": [...]}`, which is the frontend's way to tell them from links. Some inputs are objects
    (Load3D's `image`, a row of LoRAs), so a file name may be nested. Raises `WorkflowInvalid` for names that are too long.
    """
    stack: list[tuple[str, object]] = [(name, value)]
    while stack:
        key, item = stack.pop()
        if len(key) > _MAX_NAME_CHARS:
            raise WorkflowInvalid(f"an input has a name of {len(key)} characters, '{shown(key, _SHOWN_CHARS)}'")
        if isinstance(item, str):
            yield key, item
        elif isinstance(item, dict):
            stack.extend((key if inner == "__value__" else f"{key}.{inner}", item[inner]) for inner in reversed(item))
        elif isinstance(item, list):
            stack.extend((key, inner) for inner in reversed(item))


# Inputs whose names say that they hold text for a model or a program. Prompts may begin with "/" and end in ".pt".
_TEXT_INPUT = re.compile(
    r"(.*_)?(text|texts|prompt|prompts|positive|negative|caption|captions|tags|lyrics|instruction|instructions|query|question"
    r"|message|messages|expression|regex|pattern|find|replace|replacement|search|code|script|json|description|title|delimiter"
    r"|separator|style|comment|note|notes|wildcards?)(_?[a-z0-9]{1,2})?"
    r"|clip_[lg]|t5xxl|mt5xl|llama|bert|regex_pattern|json_string|system_instruction"
)

# Inputs that name a file or folder that ComfyUI or a custom node opens.
_PATH_INPUT = re.compile(
    r"(.*_)?(image|images|mask|masks|video|videos|audio|audios|file|files|filename|filenames|file_?name|path|paths|filepath|dir"
    r"|directory|folder|subfolder|latent|name|upload|(file|name|filename|save|output|image|path)_?prefix)(_?\d+)?"
)


# Nodes that encode a prompt, but not loaders of text encoders. CLIPTextEncodeFlux names its two prompts clip_l and t5xxl.
_ENCODES_TEXT = re.compile(r"[Tt]ext[ _]?[Ee]ncode(?!r)")


def _is_prompt(class_type: str, key: str, text: str) -> bool:
    """Return whether an input's value is prose, judged by the input's name.

    A single word that ends like a model file is a file name, unless the node encodes text: loaders also have inputs such as
    `clip_l`, `t5xxl` and `lora_style`.
    """
    if not _is_text_input(key):
        return False
    one_word = len(text.split(maxsplit=1)) == 1
    return not (one_word and text.lower().endswith(WEIGHT_SUFFIXES)) or _ENCODES_TEXT.search(class_type) is not None


# A list may hold a million strings under one name.
@lru_cache(maxsize=1024)
def _is_text_input(name: str) -> bool:
    return _TEXT_INPUT.fullmatch(name.rpartition(".")[2].lower()) is not None


@lru_cache(maxsize=1024)
def _is_media_input(name: str) -> bool:
    return any(_MEDIA_INPUT.fullmatch(part) for part in name.lower().split("."))


@lru_cache(maxsize=1024)
def _is_path_input(name: str) -> bool:
    return any(_PATH_INPUT.fullmatch(part) for part in name.lower().split("."))


# --- is it safe ---------------------------------------------------------------------------------

# Linux refuses to open a longer path. A longer string is content (base64 in an image input).
_PATH_MAX_BYTES = 4096
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_FILE_URL = re.compile(r"\s*file:", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")
_HOME = re.compile(r"~[\w-]*(/|\\|$)")
_SEPARATORS = re.compile(r"[/\\]")
_JPEG_BASE64 = re.compile(r"/9j/[A-Za-z0-9+/]*={0,2}")  # the one file type whose base64 begins like an absolute path
# folder_paths.annotated_filepath removes the annotation and the ONE character before it, whatever that is.
_ANNOTATION = re.compile(r".?\[(?:input|output|temp)\]", re.DOTALL)
_SYSTEM_PATH = re.compile(
    r"/+(bin|boot|comfyui|data|dev|etc|home|lib|lib64|media|mnt|opt|proc|root|run|runpod-volume|sbin|srv|sys|tmp|usr|var|workspace)/\S*"
)
_SHOWN_CHARS = 200


def check_paths(graph: Graph) -> None:
    """Raise if a value makes ComfyUI read or write outside the folder of an input's files.

    ComfyUI's LoadImage and similar nodes join the value to the input folder without a check, so an absolute path or `..` reads
    any file of the container. Custom nodes do the same when they write.

    - An input whose name says that it holds a path, or whose value ends like a model file: every way out is refused. That is an
      absolute path (also after a backslash), `..` between slashes of either kind, `~`, a drive letter and NUL, with or without
      ComfyUI's ` [input]`, ` [output]` and ` [temp]`.
    - Other inputs: only a value that is nothing but a path out (`../x`, `/etc/x`) is refused. A prompt is checked only if its
      node feeds an input that holds a path. A web address is not a path.

    A path that nodes assemble while the graph runs cannot be checked here.

    Raises:
        UnsafePath: naming node, input and value.
    """
    feeders = _feeders_of_paths(graph)
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if is_link(graph, value):
                continue
            for key, text in _strings(name, value):
                if _leaves_folder(node["class_type"], key, text, feeds_path=node_id in feeders):
                    what = f"Input '{name}' of node {node_id} ({node['class_type']})"
                    raise UnsafePath(what=what, value=shown(text, _SHOWN_CHARS))


def _feeders_of_paths(graph: Graph) -> frozenset[str]:
    """Return the nodes with an output that goes directly into an input that holds a path. Text nodes can feed paths."""
    inputs = ((name, value) for node in graph.values() for name, value in node["inputs"].items())
    return frozenset(value[0] for name, value in inputs if is_link(graph, value) and _is_path_input(name))


def _leaves_folder(class_type: str, key: str, text: str, *, feeds_path: bool) -> bool:
    if _is_prompt(class_type, key, text) or _points_into_json(class_type, key, text):
        return feeds_path and _is_plainly_foreign(text)
    if _is_path_input(key) or (text.lower().endswith(WEIGHT_SUFFIXES) and not _URL.match(text)):
        return any(_escapes(form) for form in _readings(text))
    return _is_plainly_foreign(text)


_OPENS_FILES = re.compile(r"dir|export|file|folder|import|load|open|read|save|write", re.IGNORECASE)


def _points_into_json(class_type: str, key: str, text: str) -> bool:
    """Return whether a value is a JSON pointer, such as `/data/0/url`, judged by the names of input and class."""
    if not text.startswith("/") or ".." in _SEPARATORS.split(text):
        return False
    leaf = key.rpartition(".")[2].lower()
    if "pointer" in leaf:
        return True
    may_be = leaf in {"json_path", "jsonpath"} or not _is_path_input(key)
    return may_be and "json" in class_type.lower() and _OPENS_FILES.search(class_type) is None


def _readings(text: str) -> Iterator[str]:
    """Yield the value as nodes may read it: unchanged, and without the annotation."""
    yield text
    end = text.rfind("[")
    if end >= 0 and (found := _ANNOTATION.fullmatch(text, max(end - 1, 0))):
        yield text[: found.start()]


def _escapes(text: str) -> bool:
    if "\0" in text or _FILE_URL.match(text):
        return True
    if _JPEG_BASE64.fullmatch(text) or _cannot_be_a_path(text):
        return False
    # A URL has no real folder between scheme and host, but nodes that normalise it still drop "https:/..".
    if ".." in (part.strip() for part in _SEPARATORS.split(text)):
        return True
    if _URL.match(text):
        return False
    text = text.strip()
    return text.startswith(("/", "\\")) or bool(_DRIVE.match(text) or _HOME.match(text))


def _cannot_be_a_path(text: str) -> bool:
    """Return whether it is too long for a path, even after a node removes `//`, `/./` and `x/..`."""
    if len(text) <= _PATH_MAX_BYTES:
        return False
    kept: list[str] = []
    for part in _SEPARATORS.split(text):
        if part.strip() == ".." and kept and kept[-1] != "..":
            kept.pop()
        elif part not in ("", "."):
            kept.append(".." if part.strip() == ".." else part)
    return sum(len(part.encode("utf-8", "replace")) + 1 for part in kept if part != "..") > _PATH_MAX_BYTES


def _is_plainly_foreign(text: str) -> bool:
    if "\0" in text or _FILE_URL.match(text):
        return True
    if not text or len(text) > _PATH_MAX_BYTES or _URL.match(text) or any(char.isspace() for char in text):
        return False
    climbs = "/" in text and ".." in text.split("/")
    return climbs or _SYSTEM_PATH.fullmatch(text) is not None


# --- which models it names ----------------------------------------------------------------------

# Inputs with the files that a job works on or writes, whatever their suffix.
_MEDIA_INPUT = re.compile(
    r"(.*_)?(image|images|mask|masks|video|videos|audio|audios|latent|upload)(_?\d+)?"
    r"|(file_?name|file|save|output|image)_?prefix|(save|output|export|dest|destination)_.*"
)


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model file that a graph names.

    `folders` are the folders under `models/` that its loader reads, first the one for new files. It is empty if any folder is
    possible. `guessed`: only the input's name tells the folders. `spellings` are the file names that satisfy it where ComfyUI
    completes the name; otherwise the name is the file's. `optional`: ComfyUI runs without it (it warns about a missing
    embedding in a prompt). `written` is the name with the graph's backslashes, or empty.
    """

    name: str
    folders: tuple[str, ...]
    node_id: str
    class_type: str
    input_name: str
    spellings: tuple[str, ...] = ()
    optional: bool = False
    guessed: bool = False
    written: str = ""

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the file names that satisfy it, in the order to try, relative to a folder, separated by `/`."""
        return self.spellings or (self.name,)

    @property
    def loader(self) -> tuple[str, str] | None:
        """Return a class and an input of ComfyUI's own that list the files of the first folder."""
        return _loaders().get(self.folders[0]) if self.folders else None

    def as_written(self) -> NamedModel:
        """Return the model whose name contains the backslash as a character, not as a separator."""
        spellings = tuple(self.written + file.removeprefix(self.name) for file in self.spellings)
        return replace(self, name=self.written, spellings=spellings, written="")


def named_models(graph: Graph) -> tuple[NamedModel, ...]:
    """Return every model file that the graph names, once for each input, in the order of nodes and inputs.

    A name is any string that ends like a weights file, in any node; an `embedding:name` in any text; a VAELoader's short name.
    Left out are inputs whose names say that they are media or outputs, prompts that happen to end so (several words, or text
    that a node encodes), web addresses, LoRA rows that are off, and names that leave their folder (`check_paths` refuses
    those).
    """
    models = (model for node_id, node in graph.items() for model in _models_of_node(graph, node_id, node))
    found: dict[NamedModel, None] = {}
    for model in models:
        found[model] = None
        if len(found) > _MAX_MODELS:
            raise WorkflowInvalid(f"it names more than {_MAX_MODELS} models")
    return tuple(found)


def needed_nodes(graph: Graph, outputs: Collection[str]) -> frozenset[str]:
    """Return the nodes that run if these are the graph's output nodes: those that can run, and all their inputs.

    ComfyUI ignores the values of all other nodes (validate_prompt in its execution.py), so their models need not exist.
    """
    broken = (node_id for node_id, node in graph.items() if any(isinstance(v, BrokenLink) for v in node["inputs"].values()))
    spoiled = reached(broken, takers_in(graph))
    return ancestry(graph, *(node_id for node_id in outputs if node_id not in spoiled))


def last_nodes(graph: Graph) -> dict[str, str]:
    """Return the nodes that no other node takes from, with their classes. Each of them that runs is an output."""
    taken = {source for node_id in graph for _, source in _links_into(graph, node_id)}
    return {node_id: node["class_type"] for node_id, node in graph.items() if node_id not in taken}


def ancestry(graph: Graph, *node_ids: str) -> frozenset[str]:
    """Return these nodes and all nodes that they take from."""
    return reached(node_ids, {node_id: [source for _, source in _links_into(graph, node_id)] for node_id in graph})


def with_slashes(graph: Graph, models: Iterable[NamedModel]) -> Graph:
    r"""Return the graph with model names as Linux spells them. Return the same object if nothing changes.

    An editor on Windows exports `sub\x.safetensors` for `sub/x.safetensors`, and ComfyUI accepts only the names of its own
    listing. This includes names in rows, lists and objects, and embeddings in a prompt.
    """
    names: dict[str, dict[str, object]] = {}
    for model in models:
        if model.written:
            held = names.setdefault(model.node_id, {})
            value = held.get(model.input_name, graph[model.node_id]["inputs"][model.input_name])
            held[model.input_name] = with_strings(value, partial(_with_slashes, model=model))
    changed = with_inputs(graph, names)
    return graph if changed == graph else changed


def respellable_names(graph: Graph) -> frozenset[str]:
    """Return every string of the graph that may be a file name in another system's spelling: backslashes, accents."""
    texts = (
        text
        for node in graph.values()
        for name, value in node["inputs"].items()
        if not is_link(graph, value)
        for _, text in _strings(name, value)
    )
    return frozenset(
        text for text in texts if ("\\" in text or not text.isascii()) and len(text) <= _PATH_MAX_BYTES and text.isprintable()
    )


def renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """Return the graph with these strings replaced. Return the same object if nothing changes."""
    changed = dict(graph)
    for node_id, node in graph.items() if names else ():
        inputs = {
            name: with_strings(value, lambda text: names.get(text, text))
            for name, value in node["inputs"].items()
            if not is_link(graph, value) and any(text in names for _, text in _strings(name, value))
        }
        if inputs:
            changed[node_id] = {**node, "inputs": node["inputs"] | inputs}
    return graph if changed == graph else changed


def declares(definition: Mapping[str, Any], input_name: str) -> bool:
    """Return whether a class, as /object_info describes it, has this input or a group that it belongs to."""
    groups = definition.get("input") or {}
    return any(name in group for group in groups.values() for name in (input_name, input_name.partition(".")[0]))


def with_strings(value: object, change: Callable[[str], str]) -> object:
    """Return a copy of an input's value with `change` applied to each string in it."""
    root: list[Any] = [value]
    waiting: list[tuple[Any, Any]] = [(root, 0)]
    while waiting:
        holder, key = waiting.pop()
        item = holder[key]
        if isinstance(item, str):
            holder[key] = change(item)
        elif isinstance(item, (list, dict)):
            copy = holder[key] = item.copy()
            waiting.extend((copy, inner) for inner in (copy if isinstance(copy, dict) else range(len(copy))))
    return root[0]


def with_accents(
    graph: Graph,
    models: Iterable[NamedModel],
    forms: Mapping[tuple[tuple[str, ...], tuple[str, ...]], Literal["NFC", "NFD"]],
) -> Graph:
    """Return the graph with model names spelled as the files are. ComfyUI compares letter by letter.

    `forms` maps folders and file names to the normalisation form of files whose accents differ from the graph's.
    """
    changed = dict(graph)
    for model in models:
        if form := forms.get((model.folders, model.file_names)):
            node = changed[model.node_id]
            change = partial(_respelled, old=model.name, new=unicodedata.normalize(form, model.name))
            value = with_strings(node["inputs"][model.input_name], change)
            changed[model.node_id] = {**node, "inputs": {**node["inputs"], model.input_name: value}}
    return changed


def _respelled(text: str, old: str, new: str) -> str:
    return new if text == old else text.replace(f"embedding:{old}", f"embedding:{new}")


def _with_slashes(text: str, model: NamedModel) -> str:
    if text == model.written:
        return model.name
    return _EMBEDDING.sub(partial(_embedding_with_slashes, written=model.written), text) if model.optional else text


# The end of an embedding's name: a comma, a weight or the end of a segment may follow.
_EMBEDDING = re.compile(r"(?<![^\s(])embedding:\S+")
_NAME_ENDS = frozenset(",:()")


def _embedding_with_slashes(found: re.Match[str], written: str) -> str:
    name = found[0].removeprefix("embedding:").replace("\\(", "(").replace("\\)", ")")
    if not name.startswith(written) or name[len(written) : len(written) + 1] not in {"", *_NAME_ENDS}:
        return found[0]
    return re.sub(r"\\(?![()])", "/", found[0])


def _models_of_node(graph: Graph, node_id: str, node: dict[str, Any]) -> Iterator[NamedModel]:
    class_type = node["class_type"]
    for input_name, value in node["inputs"].items():
        if is_link(graph, value) or _is_switched_off(value):
            continue
        for key, text in _strings(input_name, value):
            for found in _names_in(class_type, key, text):
                name = found.written.replace("\\", "/")
                yield NamedModel(
                    name,
                    found.folders,
                    node_id,
                    class_type,
                    input_name,
                    found.spellings,
                    optional=bool(found.spellings) and found.folders == ("embeddings",),
                    guessed=found.guessed,
                    written="" if name == found.written else found.written,
                )


def _is_switched_off(value: object) -> bool:
    # A row of rgthree's Power Lora Loader: {"on": false, "lora": "x.safetensors", "strength": 1}.
    return isinstance(value, dict) and value.get("on") is False


@dataclass(frozen=True, slots=True)
class _Name:
    """A model's name as it appears in one string."""

    written: str
    folders: tuple[str, ...]
    spellings: tuple[str, ...] = ()
    guessed: bool = False


def _names_in(class_type: str, key: str, text: str) -> Iterator[_Name]:
    if "embedding:" in text:
        for name in dict.fromkeys(_embeddings(text)):
            yield _Name(name, ("embeddings",), _embedding_spellings(name.replace("\\", "/")))
    leaf = key.rpartition(".")[2]
    if text in known().image_taes and leaf == "vae_name":
        for part in ("encoder", "decoder"):
            stem = f"{text}_{part}"
            yield _Name(stem, ("vae_approx",), tuple(stem + suffix for suffix in known().tae_suffixes))
    elif _is_model_name(class_type, key, text):
        folders = _folders_of(class_type, leaf, text)
        yield _Name(text, folders, guessed=bool(folders) and known().folder_of(class_type, leaf) is None)


def _is_model_name(class_type: str, key: str, text: str) -> bool:
    return (
        text.lower().endswith(WEIGHT_SUFFIXES)
        and is_legible(text)
        and "://" not in text
        and "embedding:" not in text
        and not _is_prompt(class_type, key, text)
        and not _is_media_input(key)
        and _is_plain_name(text)
    )


def _is_plain_name(name: str) -> bool:
    parts = _SEPARATORS.split(name)
    return all(part.strip() not in ("", ".", "..") for part in parts) and not _escapes(name) and not parts[-1].startswith(".")


def _folders_of(class_type: str, leaf: str, name: str) -> tuple[str, ...]:
    folder = known().folder_of(class_type, leaf) or _folder_of_input(leaf.lower())
    if folder == "text_encoders" and "clipvision" in class_type.lower():
        folder = "clip_vision"  # CLIPVisionLoader and the many nodes derived from it name this input clip_name
    if folder == "vae" and name.rpartition(".")[0] in known().video_taes:
        folder = "vae_approx"
    return known().one_folder.get(folder, (folder,)) if folder else ()


def _folder_of_input(leaf: str) -> str | None:
    """Return the folder that an input's name implies, whatever the class."""
    return next((folder for pattern, folder in _input_folders() if pattern.fullmatch(leaf)), None)


@cache
def _loaders() -> Mapping[str, tuple[str, str]]:
    inputs = {
        name: found for name, found in known().class_folders.items() if not isinstance(found, str) and known().since(name)
    }
    return {folder: (name, key) for name, found in inputs.items() for key, folder in found.items()}


@cache
def _input_folders() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), folder) for pattern, folder in known().input_folders)


# --- embeddings in a prompt ---------------------------------------------------------------------


def _embeddings(text: str) -> Iterator[str]:
    r"""Yield the embeddings that ComfyUI's tokenizer finds in a prompt (comfy/sd1_clip.py, tokenize_with_weights).

    An embedding begins at the start of a weighted segment or after white space, and ends before the next white space, `<` or
    `[`. ComfyUI falls back to the name without its commas. `\(` and `\)` belong to a name; plain parentheses end a segment.
    (0.3.75 finds none after a tab, and reads past `<` and `[`.)
    """
    # A longer text is no prompt, and is not split into segments: that takes one pass for each level of parentheses.
    pieces = [text] if len(text) > _LONGEST_PROMPT else _segments(text.replace("\\)", "\0\1").replace("\\(", "\0\2"))
    for segment in pieces:
        words = re.split(r"(?:^|\s)embedding:", segment.replace("\0\1", ")").replace("\0\2", "("))
        for word in dict.fromkeys((word.split(maxsplit=1) or [""])[0] for word in words[1:]):
            name = re.split(r"[<\[]", word, maxsplit=1)[0].strip(",")
            if name and _is_plain_name(name):
                yield name


_LONGEST_PROMPT = 100_000
_NESTING_MAX = 32  # ComfyUI stops at its recursion limit; here each level costs one more pass over the text


def _segments(text: str) -> Iterator[str]:
    """Yield the segments into which ComfyUI's weights split a prompt, without the weights: `a (b:1.2)` gives `a ` and `b`."""
    waiting = [(text, 0)]
    while waiting:
        piece, depth = waiting.pop()
        if depth == 0 or (depth < _NESTING_MAX and len(piece) > 1 and piece.startswith("(") and piece.endswith(")")):
            inner = _without_weight(piece[1:-1]) if depth else piece
            waiting.extend((part, depth + 1) for part in reversed(_outer_pieces(inner)))
        else:
            yield piece


def _without_weight(text: str) -> str:
    body, _, weight = text.rpartition(":")
    return body if body and _is_number(weight) else text


def _outer_pieces(text: str) -> list[str]:
    """Return the text split at each outermost pair of parentheses. An unpaired one is ignored, as in ComfyUI."""
    pieces, start, depth = [], 0, 0
    for at, char in enumerate(text):
        if char == "(":
            if depth == 0:
                pieces.append(text[start:at])
                start = at
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : at + 1])
                start = at + 1
    return [*pieces, text[start:]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _embedding_spellings(name: str) -> tuple[str, ...]:
    if name.lower().endswith(WEIGHT_SUFFIXES):
        return (name,)
    return (name, *(name + suffix for suffix in known().embedding_suffixes))
