"""What a run produced, as the client gets it: files of the history read from disk. Touches disk."""

from __future__ import annotations

import base64
import mimetypes
from typing import TYPE_CHECKING, Any

from worker.errors import OutputGone, UnsafePath
from worker.job import OutputItem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# Not in every Debian's mime.types, and Python's own table lacks them before 3.13.
_MEDIA_TYPES = {
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".webm": "video/webm",
    ".flac": "audio/flac",
    ".opus": "audio/ogg",
}


class OutputFiles:
    """ComfyUI's output folder."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir

    def images(self, outputs: Mapping[str, Mapping[str, Any]]) -> tuple[OutputItem, ...]:
        """Every saved file that the history lists under `images`, by node, then as produced; previews are left out.

        ComfyUI lists the files of its video and animation savers under `images` too. Raises `OutputGone` for a file that
        is not there.
        """
        return tuple(self._item(node_id, file) for node_id, file in _saved(outputs))

    def _item(self, node_id: str, file: Mapping[str, Any]) -> OutputItem:
        filename, subfolder = str(file["filename"]), str(file.get("subfolder") or "")
        path = self._output_dir / subfolder / filename
        if not path.resolve().is_relative_to(self._output_dir.resolve()):
            raise UnsafePath(f"An output of node {node_id}", f"{subfolder}/{filename}")
        try:
            data = path.read_bytes()
        except FileNotFoundError as exc:
            raise OutputGone(filename) from exc
        return OutputItem(
            filename=filename,
            type="base64",
            data=base64.b64encode(data).decode("ascii"),
            node_id=node_id,
            subfolder=subfolder,
            media_type=media_type(filename),
            size_bytes=len(data),
        )


def media_type(filename: str) -> str:
    """The media type a file name stands for."""
    suffix = "." + filename.rsplit(".", 1)[-1].lower()
    return _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"


def _saved(outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for node_id, output in outputs.items():
        for file in output.get("images") or ():
            if isinstance(file, dict) and file.get("type") == "output" and file.get("filename"):
                yield node_id, file
