"""Refuse a graph that makes ComfyUI read or write outside its folders. Pure.

The names of classes and inputs decide what is a path.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from worker.base.text import quotable
from worker.errors import UnsafePath
from worker.graph.graph import Graph, is_link, strings_in
from worker.model_spec import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def is_prompt(class_type: str, key: str, text: str) -> bool:
    """Return whether an input's value is prose and no path, judged by the input's name.

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
def _is_path_input(name: str) -> bool:
    return any(_PATH_INPUT.fullmatch(part) for part in name.lower().split("."))


# Linux refuses to open a longer path. A longer string is content (base64 in an image input).
PATH_MAX_BYTES = 4096
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_FILE_URL = re.compile(r"\s*file:", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")
_HOME = re.compile(r"~[\w-]*(/|\\|$)")
SEPARATORS = re.compile(r"[/\\]")
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
            for key, text in strings_in(name, value):
                if _leaves_folder(node["class_type"], key, text, feeds_path=node_id in feeders):
                    what = f"Input '{name}' of node {node_id} ({node['class_type']})"
                    raise UnsafePath(what=what, value=quotable(text, _SHOWN_CHARS))


def _feeders_of_paths(graph: Graph) -> frozenset[str]:
    """Return the nodes with an output that goes directly into an input that holds a path. Text nodes can feed paths."""
    inputs = ((name, value) for node in graph.values() for name, value in node["inputs"].items())
    return frozenset(value[0] for name, value in inputs if is_link(graph, value) and _is_path_input(name))


def _leaves_folder(class_type: str, key: str, text: str, *, feeds_path: bool) -> bool:
    if is_prompt(class_type, key, text) or _points_into_json(class_type, key, text):
        return feeds_path and _is_plainly_foreign(text)
    if _is_path_input(key) or (text.lower().endswith(WEIGHT_SUFFIXES) and not _URL.match(text)):
        return any(escapes(form) for form in _path_readings(text))
    return _is_plainly_foreign(text)


_OPENS_FILES = re.compile(r"dir|export|file|folder|import|load|open|read|save|write", re.IGNORECASE)


def _points_into_json(class_type: str, key: str, text: str) -> bool:
    """Return whether a value is a JSON pointer, such as `/data/0/url`, judged by the names of input and class."""
    if not text.startswith("/") or ".." in SEPARATORS.split(text):
        return False
    leaf = key.rpartition(".")[2].lower()
    if "pointer" in leaf:
        return True
    may_be = leaf in {"json_path", "jsonpath"} or not _is_path_input(key)
    return may_be and "json" in class_type.lower() and _OPENS_FILES.search(class_type) is None


def _path_readings(text: str) -> Iterator[str]:
    """Yield the path as nodes may read it: unchanged, and without the annotation."""
    yield text
    end = text.rfind("[")
    if end >= 0 and (found := _ANNOTATION.fullmatch(text, max(end - 1, 0))):
        yield text[: found.start()]


def escapes(text: str) -> bool:
    """Return whether a name, as some node reads it, leads out of the folder that it is joined to."""
    if "\0" in text or _FILE_URL.match(text):
        return True
    if _JPEG_BASE64.fullmatch(text) or _cannot_be_a_path(text):
        return False
    # A URL has no real folder between scheme and host, but nodes that normalise it still drop "https:/..".
    if ".." in (part.strip() for part in SEPARATORS.split(text)):
        return True
    if _URL.match(text):
        return False
    text = text.strip()
    return text.startswith(("/", "\\")) or bool(_DRIVE.match(text) or _HOME.match(text))


def _cannot_be_a_path(text: str) -> bool:
    """Return whether it is too long for a path, even after a node removes `//`, `/./` and `x/..`."""
    if len(text) <= PATH_MAX_BYTES:
        return False
    kept: list[str] = []
    for part in SEPARATORS.split(text):
        if part.strip() == ".." and kept and kept[-1] != "..":
            kept.pop()
        elif part not in ("", "."):
            kept.append(".." if part.strip() == ".." else part)
    return sum(len(part.encode("utf-8", "replace")) + 1 for part in kept if part != "..") > PATH_MAX_BYTES


def _is_plainly_foreign(text: str) -> bool:
    if "\0" in text or _FILE_URL.match(text):
        return True
    if not text or len(text) > PATH_MAX_BYTES or _URL.match(text) or any(char.isspace() for char in text):
        return False
    climbs = "/" in text and ".." in text.split("/")
    return climbs or _SYSTEM_PATH.fullmatch(text) is not None
