"""What a person hands in -> a workflow and what came with it: JSON, a request, a PNG. Reads files."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.comfy.workflow import check_paths, named_models, parse_graph
from worker.job import Request
from worker.models.sources import embedded_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.comfy.workflow import NamedModel


class Unreadable(Exception):  # noqa: N818 - a command says it, and ends
    """Why there is no document, as the end of a sentence."""


def read_document(path: str) -> object:
    """The JSON of a file, of standard input (`-`), or embedded in a PNG that ComfyUI saved: its graph and its metadata.

    Raises `Unreadable`, which says what would be right.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as exc:
        raise Unreadable(f"it cannot be read: {exc.strerror or exc}") from None
    try:
        if data.startswith(_PNG):
            found = {key: json.loads(text) for key, text in _png_texts(data) if key in {"prompt", "workflow"}}
        else:
            found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        raise Unreadable(f"it is no JSON ({exc}): give a workflow that was exported in the API format") from None
    if not found and data.startswith(_PNG):
        raise Unreadable("the picture holds no workflow: give one that ComfyUI saved with its metadata")
    return found


_PNG: Final = b"\x89PNG\r\n\x1a\n"


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """The text chunks of a PNG; a broken one ends the list."""
    at = len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk, at = data[at + 8 : at + 8 + length], at + 12 + length
        key, _, value = chunk.partition(b"\0")
        with contextlib.suppress(zlib.error, IndexError, UnicodeDecodeError):
            if kind == b"tEXt":
                yield key.decode("latin-1"), value.decode("latin-1")
            elif kind == b"zTXt":
                yield key.decode("latin-1"), zlib.decompress(value[1:]).decode("latin-1")
            elif kind == b"iTXt":
                text = value[2:].split(b"\0", 2)[2]
                yield key.decode("latin-1"), (zlib.decompress(text) if value[0] else text).decode("utf-8")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was handed in: the workflow, the request's `models`, and where the editor's own form of it is, if anywhere."""

    workflow: object
    models: object = None
    metadata: object = None

    @classmethod
    def read(cls, document: object) -> Wanted:
        """Take a workflow, a job (`{"input": {...}}`), its input, a body of `POST /prompt`, or what a PNG holds."""
        if isinstance(document, dict):
            if _wraps(document, "input"):
                return cls._of_request(document["input"])
            for key in ("prompt", "output"):
                if _wraps(document, key):
                    return cls(document[key], metadata=document)
            if _wraps(document, "workflow"):
                return cls._of_request(document)
        return cls(document, metadata=document)

    @classmethod
    def _of_request(cls, value: object) -> Wanted:
        request = Request.parse(value)
        metadata = request.extra_pnginfo if embedded_models(request.extra_pnginfo) else request.workflow
        return cls(request.workflow, request.models, metadata)

    def names(self) -> list[tuple[NamedModel, ...]]:
        """The models, each with every input that names it. Raises a `RequestError` for what the worker would refuse."""
        graph = parse_graph(self.workflow)
        check_paths(graph)
        found: dict[object, list[NamedModel]] = {}
        for model in named_models(graph):
            found.setdefault((model.folders, model.file_names), []).append(model)
        return [tuple(nodes) for nodes in found.values()]


def _wraps(document: dict[str, Any], key: str) -> bool:
    inner = document.get(key)
    return isinstance(inner, dict) and "class_type" not in inner and not isinstance(document.get("nodes"), list)
