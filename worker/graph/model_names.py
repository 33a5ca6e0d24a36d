"""Find the model files that a graph names, and rewrite their names as the disk has them. Pure.

Node classes need not be installed: the names of the class and the input decide.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

from worker.base.text import is_legible
from worker.comfyui_data import known
from worker.errors import WorkflowInvalid
from worker.graph.graph import Graph, is_link, strings_in, with_inputs, with_strings
from worker.graph.paths import PATH_MAX_BYTES, SEPARATORS, escapes, is_prompt
from worker.model_spec import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


_MAX_MODELS = 1_000


# Inputs with the files that a job works on or writes, whatever their suffix.
_MEDIA_INPUT = re.compile(
    r"(.*_)?(image|images|mask|masks|video|videos|audio|audios|latent|upload)(_?\d+)?"
    r"|(file_?name|file|save|output|image)_?prefix|(save|output|export|dest|destination)_.*"
)


@lru_cache(maxsize=1024)
def _is_media_input(name: str) -> bool:
    return any(_MEDIA_INPUT.fullmatch(part) for part in name.lower().split("."))


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
    def titles(self) -> tuple[str, ...]:
        """Return every `folder/name` at which ComfyUI may find it. `?` stands for any folder."""
        folders: dict[str, None] = {}
        for folder in self.folders:
            folders.update(dict.fromkeys(next((pair for pair in known().same_folders if folder in pair), (folder,))))
        anywhere = () if folders and not self.guessed else ("?",)
        return tuple(f"{folder}/{name}" for folder in (*folders, *anywhere) for name in self.file_names)

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
    """Return every string of the graph that may be a model's name in another system's spelling: backslashes, accents."""
    texts = (
        text
        for node in graph.values()
        for name, value in node["inputs"].items()
        if not is_link(graph, value)
        for _, text in strings_in(name, value)
    )
    return frozenset(
        text for text in texts if ("\\" in text or not text.isascii()) and len(text) <= PATH_MAX_BYTES and text.isprintable()
    )


def renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """Return the graph with these model names replaced. Return the same object if nothing changes."""
    changed = dict(graph)
    for node_id, node in graph.items() if names else ():
        inputs = {
            name: with_strings(value, lambda text: names.get(text, text))
            for name, value in node["inputs"].items()
            if not is_link(graph, value) and any(text in names for _, text in strings_in(name, value))
        }
        if inputs:
            changed[node_id] = {**node, "inputs": node["inputs"] | inputs}
    return graph if changed == graph else changed


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
        for key, text in strings_in(input_name, value):
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
        and not is_prompt(class_type, key, text)
        and not _is_media_input(key)
        and _is_plain_name(text)
    )


def _is_plain_name(name: str) -> bool:
    parts = SEPARATORS.split(name)
    return all(part.strip() not in ("", ".", "..") for part in parts) and not escapes(name) and not parts[-1].startswith(".")


def _folders_of(class_type: str, leaf: str, name: str) -> tuple[str, ...]:
    folder = known().folder_of(class_type, leaf) or _folder_of_input(leaf.lower())
    if folder == "text_encoders" and "clipvision" in class_type.lower():
        folder = "clip_vision"  # CLIPVisionLoader and the many nodes derived from it name this input clip_name
    if folder == "vae" and name.rpartition(".")[0] in known().video_taes:
        folder = "vae_approx"
    return known().one_folder.get(folder, (folder,)) if folder else ()


def _folder_of_input(leaf: str) -> str | None:
    """Return the folder of models that an input's name implies, whatever the class."""
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


def _embeddings(text: str) -> Iterator[str]:
    r"""Yield the names of embeddings that ComfyUI's tokenizer finds in a prompt (comfy/sd1_clip.py, tokenize_with_weights).

    An embedding begins at the start of a weighted segment or after white space, and ends before the next white space, `<` or
    `[`. ComfyUI falls back to the name without its commas. `\(` and `\)` belong to a name; plain parentheses end a segment.
    (0.3.75 finds none after a tab, and reads past `<` and `[`.)
    """
    # A longer text is no prompt, and is not split into segments: that takes one pass for each level of parentheses.
    pieces = [text] if len(text) > _LONGEST_PROMPT else _prompt_segments(text.replace("\\)", "\0\1").replace("\\(", "\0\2"))
    for segment in pieces:
        words = re.split(r"(?:^|\s)embedding:", segment.replace("\0\1", ")").replace("\0\2", "("))
        for word in dict.fromkeys((word.split(maxsplit=1) or [""])[0] for word in words[1:]):
            name = re.split(r"[<\[]", word, maxsplit=1)[0].strip(",")
            if name and _is_plain_name(name):
                yield name


_LONGEST_PROMPT = 100_000
_NESTING_MAX = 32  # ComfyUI stops at its recursion limit; here each level costs one more pass over the text


def _prompt_segments(text: str) -> Iterator[str]:
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
    return body if body and _is_float(weight) else text


def _outer_pieces(text: str) -> list[str]:
    """Return a prompt that may name embeddings, split at each outermost pair of parentheses. An unpaired one is ignored."""
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


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _embedding_spellings(name: str) -> tuple[str, ...]:
    if name.lower().endswith(WEIGHT_SUFFIXES):
        return (name,)
    return (name, *(name + suffix for suffix in known().embedding_suffixes))
