"""The files that come with a job, put where ComfyUI looks for inputs, and taken away again. Touches disk."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from worker.errors import ImageNotBase64, UnsafePath

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.job import InputImage


class InputFiles:
    """ComfyUI's input folder. One job at a time uses it: two may send different files under one name."""

    def __init__(self, input_dir: Path) -> None:
        self._input_dir = input_dir

    @contextlib.contextmanager
    def placed(self, images: Sequence[InputImage]) -> Iterator[None]:
        """Have the job's files in the folder for as long as the context lasts; afterwards it is as it was.

        All are decoded before the first appears. A file of the image that has the same name is put aside meanwhile. Raises
        `ImageNotBase64` or `UnsafePath`, naming the file.
        """
        if not images:
            yield
            return
        self._input_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".job-", dir=self._input_dir) as staging, contextlib.ExitStack() as undo:
            staged = [(_stage(Path(staging), index, image), _relative(image.name)) for index, image in enumerate(images)]
            for path, name in staged:
                self._put(path, self._input_dir / name, undo)
            yield

    def _put(self, source: Path, target: Path, undo: contextlib.ExitStack) -> None:
        made = _make_parents(target, self._input_dir)
        undo.callback(_remove_empty, made)
        if target.exists():
            aside = source.with_suffix(".aside")
            target.replace(aside)
            undo.callback(aside.replace, target)
        else:
            undo.callback(target.unlink, missing_ok=True)
        source.replace(target)


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise UnsafePath("The name of an input image", name)
    return path


def _stage(folder: Path, index: int, image: InputImage) -> Path:
    path = folder / str(index)
    path.write_bytes(decode_base64(image.name, image.data))
    return path


def decode_base64(name: str, data: str) -> bytes:
    """The bytes of base64 text, with or without a `data:...;base64,` prefix and line breaks. Raises `ImageNotBase64`."""
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if not decoded:
        raise ImageNotBase64(name)
    return decoded


def _make_parents(target: Path, root: Path) -> list[Path]:
    """Create the folders above `target`; returns those that were not there, deepest first."""
    missing = [folder for folder in target.parents if folder.is_relative_to(root) and not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def clear_leftovers(input_dir: Path) -> None:
    """Remove what a killed worker left staged on a disk that outlives it."""
    for entry in os.scandir(input_dir) if input_dir.is_dir() else ():
        if entry.name.startswith(".job-"):
            shutil.rmtree(entry.path, ignore_errors=True)
