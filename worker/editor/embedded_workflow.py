"""Read the workflow from a picture or video that ComfyUI saved, or from a JSON file. Pure: it reads some bytes at a time.

ComfyUI's savers write two texts: `prompt`, the API graph exactly as it ran, and `workflow`, the editor's file that it came
from.

| file | written by | where |
| --- | --- | --- |
| PNG | SaveImage, PreviewImage | `tEXt` chunks |
| animated PNG | SaveAnimatedPNG | `comf` chunks behind the first frame |
| WEBP | SaveAnimatedWEBP | EXIF strings `prompt:{...}` and `workflow:{...}` |
| MP4, MOV | SaveVideo | `moov/udta/meta`: `keys` and `ilst` |
| WEBM, MKV | SaveWEBM | `Segment/Tags` |

The reader trusts no length: a part that does not fit into its file is skipped. It also skips pixels, frames and sound without
reading them, because a video has its texts behind them and may be larger than memory.
"""

from __future__ import annotations

import codecs
import json
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from worker.editor.saved_workflow import is_saved_workflow
from worker.graph.graph import without_notes

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""The longest text that is parsed, uncompressed. The largest real workflows have a few megabytes."""

_MAX_LOOKED_AT_BYTES = 4 * MAX_TEXT_BYTES  # of all texts together: a small file may unpack to any number of them
_MAX_EXIF_BYTES = 2 * MAX_TEXT_BYTES + (1 << 20)  # both texts, and the strings that a camera would write
_MAX_PARTS = 100_000  # chunks, boxes or tags that are read: a file with nothing else must not take for ever
_NAMES = ("prompt", "workflow")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as Windows PowerShell writes JSON


class Readable(Protocol):
    """A file that may embed a workflow: `bytes`, or an object that reads them from a disk on demand."""

    def __len__(self) -> int:
        """Return the number of bytes."""

    def __getitem__(self, where: slice, /) -> bytes:
        """Return some of the bytes, fewer at the end of the file."""


@dataclass(frozen=True, slots=True)
class EmbeddedTexts:
    """The texts in a file: `prompt` is the API graph that ran, `workflow` the editor's. One of them may be missing."""

    prompt: dict[str, Any] | None
    workflow: dict[str, Any] | None

    @property
    def best(self) -> dict[str, Any]:
        """Return the graph to run: the prompt, which made the file, or the workflow if there is no prompt.

        A workflow would be converted for this engine, with other choices at each `{a|b}`.
        """
        found = self.prompt if self.prompt is not None else self.workflow
        if found is None:
            raise AssertionError  # embedded_workflow creates none like this
        return found


def embedded_workflow(data: Readable) -> EmbeddedTexts | None:
    """Return the texts in this file. None if there are none, or if the file is damaged or of another kind.

    Raises only what `data` raises. At most some tens of MB are in memory at a time, and for most files some KB.
    """
    found: dict[str, dict[str, Any]] = {}
    if _begins_as_json(data):
        value = _json(data[: MAX_TEXT_BYTES + 1])
        return (
            None
            if value is None
            else EmbeddedTexts(None, value)
            if is_saved_workflow(value)
            else EmbeddedTexts(without_notes(value), None)
        )
    left_bytes = _MAX_LOOKED_AT_BYTES
    for read in (_png, _webp, _mp4, _matroska):
        for name, text in read(data):
            if name.lower() in _NAMES and name.lower() not in found and (value := _json(text)) is not None:
                found[name.lower()] = value
            left_bytes -= len(text)
            if left_bytes < 0 or len(found) == len(_NAMES):
                break
    prompt, workflow = found.get("prompt"), found.get("workflow")
    if workflow is not None and not is_saved_workflow(workflow):
        workflow = None
    if prompt is None and workflow is None:
        return None
    return EmbeddedTexts(None if prompt is None else without_notes(prompt), workflow)


def json_fault(name: str, data: Readable) -> str:
    """Return why a `.json` contains no workflow, as the end of a sentence.

    Empty for other names and for a file that is no text.
    """
    if not name.lower().endswith(".json"):
        return ""
    text = data[: MAX_TEXT_BYTES + 1]
    if not text.strip():
        return "is empty"
    if len(text) > MAX_TEXT_BYTES or (b"\0" in text and not _begins_as_json(text)):
        return ""
    try:
        value = json.loads(text.decode(json.detect_encoding(text)))
    except UnicodeDecodeError as exc:
        return f"is no JSON: byte {exc.start} is no text" if _begins_as_json(text) else ""
    except (ValueError, RecursionError) as exc:
        return f"is no JSON: {exc}"
    return "holds a JSON that is no workflow" if not isinstance(value, dict) or not value else ""


def _begins_as_json(data: Readable) -> bool:
    return data[:3] == codecs.BOM_UTF8 or data[:2] in _UTF_16 or data[:64].lstrip()[:1] == b"{"


def _json(text: bytes) -> dict[str, Any] | None:
    if len(text) > MAX_TEXT_BYTES:
        return None
    try:
        value = json.loads(text.decode(json.detect_encoding(text)).strip("\0 \r\n\t"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None


# --- PNG ----------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"


def _png(data: Readable) -> Iterator[tuple[str, bytes]]:
    if data[: len(_PNG)] != _PNG:
        return
    at = len(_PNG)
    for _ in range(_MAX_PARTS):
        if at + 12 > len(data):
            return
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind in {b"tEXt", b"iTXt", b"zTXt", b"comf"} and at + 8 + size <= len(data) and size <= MAX_TEXT_BYTES:
            yield from _png_text(kind, data[at + 8 : at + 8 + size])
        at += size + 12


def _png_text(kind: bytes, chunk: bytes) -> Iterator[tuple[str, bytes]]:
    key, _, rest = chunk.partition(b"\0")
    name = key.decode("latin-1")
    if name.lower() not in _NAMES:
        return
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:]
        rest = rest.partition(b"\0")[2].partition(b"\0")[2]  # the language, and the keyword in that language
        yield name, _inflated(rest) if packed else rest
    elif kind == b"zTXt":
        yield name, _inflated(rest[1:]).decode("latin-1").encode()
    else:
        yield name, rest.decode("latin-1").encode()


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


# --- WEBP ---------------------------------------------------------------------------------------

_ASCII = 2  # the type of a string in EXIF
_INLINE_BYTES = 4
_NAME_BYTES = 16


def _webp(data: Readable) -> Iterator[tuple[str, bytes]]:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return
    at = 12
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            return
        kind, size = struct.unpack("<4sI", data[at : at + 8])
        if kind == b"EXIF":
            yield from _exif_strings(data[at + 8 : at + 8 + min(size, _MAX_EXIF_BYTES)].removeprefix(b"Exif\0\0"))
        at += 8 + size + size % 2


def _exif_strings(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the strings of a picture's first EXIF directory. ComfyUI embeds texts as `name:text` under other tags."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:  # noqa: PLR2004 - the header
        return
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        _, kind, size, where = struct.unpack_from(f"{order}HHII", data, entry)
        if kind != _ASCII or size > MAX_TEXT_BYTES:
            continue
        where = entry + 8 if size <= _INLINE_BYTES else where
        name, colon, _ = data[where : where + _NAME_BYTES].partition(b":")
        if colon:
            yield name.decode("latin-1"), data[where + len(name) + 1 : where + size]


# --- MP4 ----------------------------------------------------------------------------------------

_CONTAINERS = {b"moov", b"udta"}


def _mp4(data: Readable) -> Iterator[tuple[str, bytes]]:
    if data[4:8] != b"ftyp":
        return
    waiting = [(0, len(data))]
    for _ in range(_MAX_PARTS):
        if not waiting:
            return
        start, end = waiting.pop()
        for kind, inner, after in _mp4_boxes(data, start, end):
            if kind in _CONTAINERS:
                waiting.append((inner, after))
            elif kind == b"meta":
                yield from _mp4_texts(data, inner, after)


def _mp4_boxes(data: Readable, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes of a video that may embed a workflow, between two offsets: kind, start and end of the content."""
    at = start
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            return
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        inner = at + 8
        if size == 1 and at + 16 <= end:
            (size,) = struct.unpack(">Q", data[inner : inner + 8])
            inner += 8
        elif size == 0:
            size = end - at
        if size < inner - at or at + size > end:
            return
        yield kind, inner, at + size
        at += size


def _mp4_texts(data: Readable, start: int, end: int) -> Iterator[tuple[str, bytes]]:
    """Yield the embedded texts of a video's `meta` box. `keys` names them from 1 on, `ilst` has them by that number."""
    boxes = list(_mp4_boxes(data, start + 4, end)) or list(
        _mp4_boxes(data, start, end)
    )  # QuickTime's has no version field before it
    names: list[str] = []
    for kind, inner, after in boxes:
        if kind == b"keys":
            names = [
                data[at : min(stop, at + 64)].decode("utf-8", "replace") for _, at, stop in _mp4_boxes(data, inner + 8, after)
            ]
    for kind, inner, after in boxes:
        if kind != b"ilst":
            continue
        for number, at, stop in _mp4_boxes(data, inner, after):
            index = int.from_bytes(number, "big") - 1
            texts = (
                data[a + 8 : min(b, a + 9 + MAX_TEXT_BYTES)] for what, a, b in _mp4_boxes(data, at, stop) if what == b"data"
            )
            if 0 <= index < len(names) and (text := next(texts, None)) is not None:
                yield names[index], text


# --- WEBM ---------------------------------------------------------------------------------------

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT, _TAGS, _TAG, _SIMPLE, _TAG_NAME, _TAG_STRING = 0x18538067, 0x1254C367, 0x7373, 0x67C8, 0x45A3, 0x4487
_MASTERS = {_SEGMENT, _TAGS, _TAG, _SIMPLE}


def _matroska(data: Readable) -> Iterator[tuple[str, bytes]]:
    if data[: len(_EBML)] != _EBML:
        return
    name = ""
    at = 0
    for _ in range(_MAX_PARTS):
        if at >= len(data):
            return
        element, at = _webm_number(data, at, keep_marker=True)
        size, at = _webm_number(data, at, keep_marker=False)
        if element is None or size is None:
            return
        if element in _MASTERS:
            continue  # its elements follow
        if element == _TAG_NAME:
            name = data[at : at + min(size, 64)].decode("utf-8", "replace").rstrip("\0")
        elif element == _TAG_STRING:
            yield name, data[at : at + min(size, MAX_TEXT_BYTES + 1)]
        at += size


def _webm_number(data: Readable, at: int, *, keep_marker: bool) -> tuple[int | None, int]:
    """Return a WebM file's number of one to eight bytes, whose first bits give its length, and where it ends, or None."""
    read = data[at : at + 8]
    length = 9 - read[0].bit_length() if read else 0
    if not 0 < length <= len(read):
        return None, at
    value = int.from_bytes(read[:length], "big")
    return value if keep_marker else value & ((1 << (7 * length)) - 1), at + length
