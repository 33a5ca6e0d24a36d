"""What a run produced, sorted: history -> files and texts, each checked to be there. Touches disk; reads no file's content."""

from __future__ import annotations

import json
import mimetypes
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.errors import OutputGone, UnsafePath

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Mapping, Sequence

# Not in every Debian's mime.types, and Python's own table lacks them before 3.13.
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
# Which list of the result the files of a history key go to; those of any other key go to `files`.
_KINDS: Final = {
    "images": "images",
    "gifs": "videos",  # VideoHelperSuite's name for all it makes
    "videos": "videos",
    "video": "videos",
    "audio": "audio",
}
_TEXT_KEYS: Final = ("text", "string")
# Preview3D names its model by a path in the output folder, beside values that are none.
_PATH_KEYS: Final = ("result",)


@dataclass(frozen=True, slots=True)
class Output:
    """One thing to deliver; `kind` is the result's list it belongs to."""

    kind: str
    node_id: str
    filename: str
    subfolder: str
    media_type: str
    size_bytes: int
    source: Path | str
    """Where the file is, or the text itself."""
    stamp: tuple[int, int] = (0, 0)
    """Inode and time of change: a node may write another job's file under the same name."""


class OutputFiles:
    """ComfyUI's output folder, and its folder of previews."""

    def __init__(self, output_dir: Path, temp_dir: Path | None = None) -> None:
        self._folders = {"output": output_dir, "temp": temp_dir or output_dir.parent / "temp"}

    def collect(
        self, outputs: Mapping[str, Mapping[str, Any]], *, nodes: Collection[str] | None = None, previews: bool = False
    ) -> tuple[Output, ...]:
        """Everything that the history lists and that is a file or a text: by node id (9 before 10), then as produced.

        The order in which nodes ran depends on what ComfyUI had cached, so it is not kept. `nodes` limits whose outputs are
        returned; `previews` adds the files of preview nodes. A file that is listed twice by a node comes once. Raises
        `OutputGone` for a file that is not there, `UnsafePath` for one that is elsewhere.
        """
        found: dict[tuple[str, object], Output] = {}
        for node_id in sorted(outputs, key=node_order):
            if nodes is None or node_id in nodes:
                for item in self._of_node(node_id, outputs[node_id], previews=previews):
                    found.setdefault((node_id, item.source if isinstance(item.source, Path) else item.filename), item)
        return tuple(found.values())

    def _of_node(self, node_id: str, output: Mapping[str, Any], *, previews: bool) -> Iterator[Output]:
        for key, values in output.items():
            for value in _entries(values):
                if _is_file(value):
                    kind = value.get("type") or "output"
                    if kind == "output" or (previews and kind == "temp"):
                        yield self._file(_KINDS.get(key, "files"), node_id, value, kind)
                elif key in _PATH_KEYS and isinstance(value, str) and (item := self._named(node_id, value)):
                    yield item
        yield from _texts(node_id, output)

    def _file(self, kind: str, node_id: str, entry: Mapping[str, Any], folder: str) -> Output:
        name, subfolder = entry["filename"], str(entry.get("subfolder") or "")
        path = self._folders[folder] / subfolder / name
        # Following every part of the path costs more than the rest of it all; a plain file right in the folder is nowhere else.
        plain = not subfolder and "/" not in name and "\0" not in name and not path.is_symlink()
        if not plain and ("\0" in str(path) or not path.resolve().is_relative_to(self._folders[folder].resolve())):
            raise UnsafePath(f"An output of node {node_id}", f"{subfolder}/{name}")
        found = _regular(path)
        if found is None:
            raise OutputGone(path.name)
        name = clean(path.name)
        return Output(kind, node_id, name, clean(subfolder), media_type(path.name), found.st_size, path, _stamp(found))

    @staticmethod
    def check_same(found: Sequence[Output]) -> None:
        """Raise `OutputGone` when one of these files is no longer the one that was found."""
        for item in found:
            if isinstance(item.source, Path):
                now = _regular(item.source)
                if now is None or _stamp(now) != item.stamp:
                    raise OutputGone(item.filename)

    def _named(self, node_id: str, text: str) -> Output | None:
        """A file of the output folder named by a plain string; None for any other string."""
        name = text.removesuffix(" [output]")
        root = self._folders["output"]
        path = root / name
        if "\0" in name or not Path(name).suffix or not path.resolve().is_relative_to(root.resolve()):
            return None
        found = _regular(path)
        if found is None:
            return None
        subfolder = str(path.relative_to(root).parent)
        subfolder = "" if subfolder == "." else clean(subfolder)
        name = clean(path.name)
        return Output("files", node_id, name, subfolder, media_type(path.name), found.st_size, path, _stamp(found))


def unanswered(nodes: Collection[str] | None, found: Sequence[Output]) -> list[str]:
    """A sentence for each node that was asked for and gave nothing that is returned."""
    there = {item.node_id for item in found}
    return [
        f"Node {node_id} was asked for in 'outputs', but it produced nothing to return."
        for node_id in sorted(set(nodes or ()) - there, key=node_order)
    ]


def node_order(node_id: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts node ids as people count: 9 before 10, 57:3 (a node of a subgraph) after 57."""
    parts = re.findall(r"0*([0-9]+)|([^0-9]+)", node_id)
    ordered = [(0, len(number), number) if number else (1, 0, text) for number, text in parts]
    return (*ordered, (-1, 0, node_id))


def media_type(filename: str) -> str:
    """The media type a file name stands for."""
    suffix = "." + filename.rsplit(".", 1)[-1].lower()
    return _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"


def clean(text: str) -> str:
    """The same text without halves of characters, which no UTF-8 can carry: the SDK fails on them and loses the result."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _texts(node_id: str, output: Mapping[str, Any]) -> Iterator[Output]:
    values = [value for key in _TEXT_KEYS for value in _entries(output.get(key)) if value is not None and not _is_file(value)]
    safe_id = re.sub(r"[^A-Za-z0-9._-]", "-", node_id)
    for index, value in enumerate(values):
        text = clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        yield Output("text", node_id, f"text_{safe_id}_{index}.txt", "", "text/plain", len(text.encode()), text)


def _entries(values: object) -> Sequence[Any]:
    return values if isinstance(values, list | tuple) else [values]


def _is_file(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("filename"), str) and value["filename"] != ""


def _regular(path: Path) -> os.stat_result | None:
    """What is known of a file; None when there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns
