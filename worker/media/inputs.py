"""The files that come with a job, put where ComfyUI looks for inputs, and taken away again. Touches disk and the network."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from worker.errors import ImageNotBase64, InputNameInvalid, UnsafePath
from worker.media.fetch import Download, Fetcher
from worker.media.staging import StagedFile, storing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from worker.job import InputFile

_STAGING: Final = ".job-"
_LONGEST_PART_BYTES: Final = 255  # what Linux file systems take
_LONGEST_NAME_BYTES: Final = 1024  # with the folders above it well within what a system call takes
# Up to here data is decoded in the loop, in one piece: a hop to a thread costs more than decoding a picture does.
_PIECE_CHARACTERS: Final = 4 << 20


class InputFiles:
    """ComfyUI's input folder. One job at a time uses it: two may send different files under one name."""

    def __init__(self, input_dir: Path, fetcher: Fetcher | None = None) -> None:
        self._input_dir = input_dir
        self._fetcher = fetcher or Fetcher()

    @contextlib.asynccontextmanager
    async def placed(self, files: Sequence[InputFile]) -> AsyncIterator[None]:
        """Have the job's files in the folder for as long as the context lasts; afterwards it is as it was.

        All are decoded or fetched before the first appears; of two with one name the later counts, as in ComfyUI's own
        upload. A file of the image that has the same name is put aside meanwhile. Raises `UnsafePath`, `InputNameInvalid`,
        `ImageNotBase64`, `InputTooLarge`, `InputNotStored`, and what `Fetcher.fetch` raises, naming the file.
        """
        wanted = {_relative(file): file for file in files}
        _check_apart(list(wanted))
        if not wanted:
            yield
            return
        with contextlib.ExitStack() as undo:
            for name, file in wanted.items():
                self._target(name)
                if file.url is not None:
                    self._fetcher.check(file.name, file.url)
            staging = self._make_staging(undo)
            staged = {name: self._staged(staging / str(at), file) for at, (name, file) in enumerate(wanted.items())}
            await self._fill(staged, wanted)
            for name, source in staged.items():
                with storing(source.name):
                    self._put(source.path, self._target(name), undo)
            yield

    async def read(self, file: InputFile) -> bytes:
        """The bytes of one of the job's files, for who must look into it before the job's turn. Raises as `placed` does."""
        name = _relative(file)
        if file.url is not None:
            self._fetcher.check(file.name, file.url)
        with contextlib.ExitStack() as undo:
            staged = self._staged(self._make_staging(undo) / "0", file)
            await self._fill({name: staged}, {name: file})
            return staged.path.read_bytes()

    def _make_staging(self, undo: contextlib.ExitStack) -> Path:
        """A folder beside the final names, so that a rename is all it takes."""
        with storing(_STAGING):
            self._input_dir.mkdir(parents=True, exist_ok=True)
            # A thread of a cancelled job may still write there.
            folder = tempfile.TemporaryDirectory(prefix=_STAGING, dir=self._input_dir, ignore_cleanup_errors=True)
        return Path(undo.enter_context(folder))

    def _staged(self, path: Path, file: InputFile) -> StagedFile:
        return StagedFile(file.name, path, self._fetcher.limits.max_bytes)

    async def _fill(self, staged: Mapping[PurePosixPath, StagedFile], wanted: Mapping[PurePosixPath, InputFile]) -> None:
        for name, source in staged.items():
            data = wanted[name].data
            if data is not None:
                with source:
                    if len(data) <= _PIECE_CHARACTERS:
                        _decode(source, data)
                    else:
                        await asyncio.to_thread(_decode, source, data)
        downloads = [Download(url, source) for name, source in staged.items() if (url := wanted[name].url) is not None]
        if downloads:
            await self._fetcher.fetch(downloads)

    def _target(self, name: PurePosixPath) -> Path:
        """Where a file goes. Raises `UnsafePath` or `InputNameInvalid` for what the folder's own contents forbid."""
        target = self._input_dir / name
        if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(self._input_dir)):
            raise UnsafePath("The name of an input file, through a link,", str(name))
        above = [folder for folder in target.parents if folder.is_relative_to(self._input_dir)]
        if any(os.path.lexists(folder) and not folder.is_dir() for folder in above):
            raise InputNameInvalid(str(name), "lies below a name that is a file in ComfyUI's input folder")
        if target.is_dir() and not target.is_symlink():
            raise InputNameInvalid(str(name), "is a folder in ComfyUI's input folder")
        return target

    def _put(self, source: Path, target: Path, undo: contextlib.ExitStack) -> None:
        folders = (folder for folder in target.parents if folder.is_relative_to(self._input_dir))
        undo.callback(_remove_empty, [folder for folder in folders if not folder.exists()])
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            aside = source.with_suffix(".aside")
            target.replace(aside)
            undo.callback(aside.replace, target)
        else:
            undo.callback(target.unlink, missing_ok=True)
        source.replace(target)


def _relative(file: InputFile) -> PurePosixPath:
    """The file's name below the input folder. Raises `UnsafePath` or `InputNameInvalid`."""
    full = f"{file.subfolder}/{file.name}" if file.subfolder else file.name
    path = PurePosixPath(full)
    leaves = any(PurePosixPath(text).is_absolute() for text in (file.name, full)) or ".." in path.parts
    if leaves or "\\" in full or "\0" in full:
        raise UnsafePath("The name of an input file", full)
    if not path.parts or PurePosixPath(file.name).name != file.name.rpartition("/")[2]:
        raise InputNameInvalid(full, "is no name of a file")
    if path.parts[0].startswith(_STAGING):
        raise InputNameInvalid(full, f"begins with {_STAGING}, which is kept for the worker itself")
    try:
        lengths = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError:
        raise InputNameInvalid(ascii(full), "has characters that no file name can have") from None
    if max(lengths) > _LONGEST_PART_BYTES or sum(lengths) > _LONGEST_NAME_BYTES:
        raise InputNameInvalid(f"{full[:40]}...", f"is too long; {_LONGEST_PART_BYTES} bytes are the limit of each part")
    return path


def _check_apart(names: Sequence[PurePosixPath]) -> None:
    """Raise `InputNameInvalid` when one of the names would be a folder for another."""
    taken = set(names)
    for name in names:
        if below := taken.intersection(name.parents):
            raise InputNameInvalid(str(name), f"lies below '{below.pop()}', which is another file of the same job")


def _decode(target: StagedFile, data: str) -> None:
    for piece in base64_pieces(target.name, data):
        target.add(piece)
        if target.full:
            target.flush()
    target.flush()


def base64_pieces(name: str, data: str) -> Iterator[bytes]:
    """The bytes of base64 text, with or without a `data:...;base64,` prefix and line breaks, some at a time.

    Raises `ImageNotBase64`, also when there are none.
    """
    begin = (data.find(",") + 1 or len(data)) if data.startswith("data:") else 0
    ended, empty, rest = False, True, ""
    for at in range(begin, len(data), _PIECE_CHARACTERS):
        text = rest + "".join(data[at : at + _PIECE_CHARACTERS].split())
        whole = len(text) - len(text) % 4
        text, rest = text[:whole], text[whole:]
        try:
            piece = binascii.a2b_base64(text, strict_mode=True)
        except ValueError:
            raise ImageNotBase64(name) from None
        if piece:
            if ended:  # something comes after the padding
                raise ImageNotBase64(name)
            ended, empty = text.endswith("="), False
            yield piece
    if rest or empty:
        raise ImageNotBase64(name)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def clear_leftovers(input_dir: Path) -> None:
    """Remove what a killed worker left staged on a disk that outlives it."""
    for entry in os.scandir(input_dir) if input_dir.is_dir() else ():
        if entry.name.startswith(_STAGING):
            shutil.rmtree(entry.path, ignore_errors=True)
