"""Sort a run's outputs: from the history to files and texts, and what cannot be returned. Touches disk; reads no file."""

from __future__ import annotations

import errno
import json
import mimetypes
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.base.text import encodable, shortened
from worker.errors import OutputGone

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

# Not in every Debian's mime.types, and missing in Python's own table before 3.13.
_MEDIA_TYPES: Final = {
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".exr": "image/x-exr",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".wav": "audio/wav",
    ".opus": "audio/ogg",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".obj": "model/obj",
    ".stl": "model/stl",
}
# The list of the result for the files of each history key. Files of any other key go to `files`.
_KINDS: Final = {
    "images": "images",
    "gifs": "videos",  # VideoHelperSuite's key for all its outputs
    "videos": "videos",
    "video": "videos",
    "audio": "audio",
}
# Under these keys any value is a text. Under others, strings and numbers are.
_TEXT_KEYS: Final = ("text", "string")
# Preview3D names its model by a path in the output folder, beside values that are no paths.
_PATH_KEYS: Final = ("result",)
_SHOWN_CHARACTERS: Final = 200
_LONGEST_PATH: Final = 4096


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run, to be delivered. `kind` is its list in the result."""

    kind: str
    node_id: str
    filename: str
    subfolder: str
    media_type: str
    size_bytes: int
    source: Path | str | bytes
    """The file's path, the text itself, or the bytes of a picture that was never a file."""
    stamp: tuple[int, int] = (0, 0)
    """Inode and time of change: a node may write another job's file under the same name."""


@dataclass(frozen=True, slots=True)
class MissingOutput:
    """An output that a node lists but that is not in the folder where ComfyUI keeps such files."""

    node_id: str
    path: str
    folder: str
    outside: bool
    """The node itself says that the file is elsewhere, so that running it again changes nothing."""

    def __str__(self) -> str:
        where = "is outside of" if self.outside else "is not in"
        return (
            f"Node {self.node_id} lists the file '{shortened(self.path, _SHOWN_CHARACTERS)}', which {where} "
            f"ComfyUI's {self.folder} folder: it is not returned."
        )


@dataclass(frozen=True, slots=True)
class CollectedOutputs:
    """A run's outputs, sorted: those that can be returned, missing listed files, and nodes without outputs."""

    outputs: tuple[Output, ...] = ()
    missing: tuple[MissingOutput, ...] = ()
    empty: tuple[str, ...] = ()
    """Nodes that list no files although they have a list for them."""
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By node id, the keys whose values are neither files nor texts, if the node has no others."""
    silent: tuple[str, ...] = ()
    """Nodes without any output."""


class OutputFiles:
    """ComfyUI's output folder, and its folder of previews."""

    def __init__(self, output_dir: Path, temp_dir: Path | None = None) -> None:
        self._folders = {"output": output_dir, "temp": temp_dir or output_dir.parent / "temp"}

    def collect(
        self, outputs: Mapping[str, Mapping[str, Any]], *, nodes: Collection[str] | None = None, previews: bool = False
    ) -> CollectedOutputs:
        """Return every listed file and text: by node id (9 before 10), then in the order of creation.

        The order in which nodes ran depends on ComfyUI's cache, so it is not kept. `nodes` limits whose outputs are returned;
        `previews` adds the files of preview nodes. A file that a node lists twice is returned once.
        """
        found: dict[tuple[str, object], Output] = {}
        missing: dict[MissingOutput, None] = {}
        empty, passed_over, silent = [], {}, []
        for node_id in sorted(outputs, key=node_order):
            if nodes is not None and node_id not in nodes:
                continue
            items = tuple(self._of_node(node_id, outputs[node_id], previews=previews))
            for item in items:
                if isinstance(item, MissingOutput):
                    missing[item] = None
                else:
                    found.setdefault((node_id, item.source if isinstance(item.source, Path) else item.filename), item)
            if items or _has_files(outputs[node_id]):  # such as previews that nobody asked for
                continue
            if left := tuple(key for key, values in outputs[node_id].items() if _says_something(values)):
                passed_over[node_id] = left
            elif outputs[node_id].keys().isdisjoint(_KINDS):
                silent.append(node_id)
            else:
                empty.append(node_id)
        return CollectedOutputs(tuple(found.values()), tuple(missing), tuple(empty), passed_over, tuple(silent))

    def _of_node(self, node_id: str, output: Mapping[str, Any], *, previews: bool) -> Iterator[Output | MissingOutput]:
        texts: dict[str, None] = {}
        for key, values in output.items():
            for value in _as_list(values):
                if _is_file(value):
                    if item := self._listed(key, node_id, value, previews=previews):
                        yield item
                elif (
                    isinstance(value, str)
                    and (key in _PATH_KEYS or value.startswith("/"))
                    and (item := self._named(node_id, value))
                ):
                    yield item
                elif key not in (*_TEXT_KEYS, *_PATH_KEYS):
                    texts.update((str(text), None) for text in _as_list(value) if _is_text(text))
        yield from _output_texts(node_id, output, texts)

    def _listed(self, key: str, node_id: str, entry: Mapping[str, Any], *, previews: bool) -> Output | MissingOutput | None:
        """Return an entry of a list of files. None for an input, and for a preview that nobody asked for."""
        if isinstance(entry.get("data"), bytes):
            return _sent(node_id, entry)
        folder = str(entry.get("type") or "output")
        if folder == "input" or (folder == "temp" and not previews):
            return None
        return self._file(_KINDS.get(key, "files"), node_id, entry, folder)

    def _file(self, kind: str, node_id: str, entry: Mapping[str, Any], folder: str) -> Output | MissingOutput:
        name, subfolder = entry["filename"], str(entry.get("subfolder") or "")
        listed = encodable(f"{subfolder}/{name}" if subfolder else name)
        if folder not in self._folders:
            return MissingOutput(node_id, listed, encodable(shortened(folder, _SHOWN_CHARACTERS)), outside=True)
        path = self._folders[folder] / subfolder / name
        # Resolving every part of the path costs more than all the rest. A plain file directly in the folder is nowhere else.
        linked = os.path.islink(path)  # noqa: PTH114 - Path.is_symlink raises for a name that is too long
        plain = not subfolder and "/" not in name and "\0" not in name and not linked
        if not plain and not _is_below(path, self._folders[folder]):
            return MissingOutput(node_id, listed, folder, outside=True)
        found = _stat_output(path)
        if found is None:
            return MissingOutput(node_id, listed, folder, outside=False)
        name = encodable(path.name)
        return Output(
            kind, node_id, name, encodable(subfolder), media_type(path.name), found.st_size, path, _output_stamp(found)
        )

    @staticmethod
    def check_same(found: Sequence[Output]) -> None:
        """Raise `OutputGone` if one of these files is no longer the one that was found."""
        for item in found:
            if isinstance(item.source, Path):
                now = _stat_output(item.source)
                if now is None or _output_stamp(now) != item.stamp:
                    raise OutputGone(item.filename, frozenset({item.node_id}))

    def _named(self, node_id: str, text: str) -> Output | None:
        """Return a file of the output folder that a plain string names, or None."""
        name = text.removesuffix(" [output]")
        root = self._folders["output"]
        path = root / name
        if len(name) > _LONGEST_PATH or not Path(name).suffix:
            return None
        if path.is_absolute() and not path.is_relative_to(root) and path.is_relative_to(root.resolve()):
            path = root / path.relative_to(root.resolve())
        if not path.is_relative_to(root) or not _is_below(path, root):
            return None
        found = _stat_output(path)
        if found is None:
            return None
        subfolder = str(path.relative_to(root).parent)
        subfolder = "" if subfolder == "." else encodable(subfolder)
        name = encodable(path.name)
        return Output("files", node_id, name, subfolder, media_type(path.name), found.st_size, path, _output_stamp(found))


def missing_output_sentences(
    nodes: Collection[str] | None, collected: CollectedOutputs, silent: Mapping[str, str]
) -> list[str]:
    """Return a sentence for each output that is missing in the result.

    `silent` are output nodes that ran without reporting anything to ComfyUI, with their classes. Many nodes have nothing to
    report, but one that saves does. If nothing at all is returned, each gets a sentence.
    """
    there = {item.node_id for item in collected.outputs} | {item.node_id for item in collected.missing}
    said: dict[str, list[str]] = {}
    for item in collected.missing:
        said.setdefault(item.node_id, []).append(str(item))
    for node_id in set(nodes or ()) - there:
        said[node_id] = [f"Node {node_id} was asked for in 'outputs', but it produced nothing to return."]
    for node_id, keys in collected.passed_over.items():
        shown = shortened(", ".join(keys), _SHOWN_CHARACTERS)
        said.setdefault(
            node_id, [f"Node {node_id} put out only what is neither a file nor a text ({shown}): it is not returned."]
        )
    for node_id in collected.empty:
        said.setdefault(node_id, [f"Node {node_id} ran and lists no file; what it saved, if anything, is not returned."])
    quiet = dict.fromkeys(collected.silent, "") | {
        node: name for node, name in silent.items() if nodes is None or node in nodes
    }
    for node_id, class_type in quiet.items():
        if not collected.outputs or "save" in class_type.lower():
            name = f"Node {node_id} ({class_type})" if class_type else f"Node {node_id}"
            said.setdefault(node_id, [f"{name} ran and told ComfyUI of no file and no text: nothing of it is returned."])
    return [text for node_id in sorted(said, key=node_order) for text in said[node_id]]


def node_order(node_id: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that orders outputs by node id as people count: 9 before 10, 57:3 (a subgraph's node) after 57."""
    parts = re.findall(r"0*([0-9]+)|([^0-9]+)", node_id)
    ordered = [(0, len(number), number) if number else (1, 0, text) for number, text in parts]
    return (*ordered, (-1, 0, node_id))


def media_type(filename: str) -> str:
    """Return the media type of an output, by its file name."""
    suffix = "." + filename.rsplit(".", 1)[-1].lower()
    return _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"


def _output_texts(node_id: str, output: Mapping[str, Any], more: Iterable[str]) -> Iterator[Output]:
    """Yield the texts of the output keys that are meant for them, then those of other keys, each of these once."""
    values = [value for key in _TEXT_KEYS for value in _as_list(output.get(key)) if value is not None and not _is_file(value)]
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    texts += [text for text in more if text not in texts]
    for index, text in enumerate(map(encodable, texts)):
        yield Output("text", node_id, f"text_{_safe(node_id)}_{index}.txt", "", "text/plain", len(text.encode()), text)


def _sent(node_id: str, entry: Mapping[str, Any]) -> Output:
    name, data = entry["filename"], entry["data"]
    return Output("images", node_id, name, "", media_type(name), len(data), data)


def _safe(node_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", node_id)


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _says_something(values: object) -> bool:
    """Return whether an output key's values are more than flags and empty lists."""
    return any(isinstance(value, dict | list) and value for value in _as_list(values))


def _has_files(output: Mapping[str, Any]) -> bool:
    return any(_is_file(value) for values in output.values() for value in _as_list(values))


def _as_list(values: object) -> Sequence[Any]:
    return values if isinstance(values, list | tuple) else [values]


def _is_file(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("filename"), str) and value["filename"] != ""


def _stat_output(path: Path) -> os.stat_result | None:
    """Return the stat of an output that is a regular file, or None if there is none or the name is impossible."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as exc:
        if exc.errno == errno.ENAMETOOLONG:
            return None
        raise
    return found if stat.S_ISREG(found.st_mode) else None


def _is_below(path: Path, folder: Path) -> bool:
    """Return whether an output's path, with its links followed, stays in a folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except ValueError:  # characters that no file name can contain
        return False


def _output_stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns
