"""Put a job's files into ComfyUI's input folder, and remove them again. Touches disk and network."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, TypeVar

from worker.base.text import unicode_forms
from worker.errors import ImageNotBase64, InputNameInvalid, UnsafePath
from worker.media.staged_files import StagedBytes, StagedFile, as_not_stored
from worker.media.url_inputs import UrlDownload, UrlFetcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from worker.job import InputFile

T = TypeVar("T")

_STAGING: Final = ".job-"
_FOLDERS: Final = frozenset({"input", "output", "temp"})
_DRIVE: Final = re.compile("[A-Za-z]:")
_LONGEST_PART_BYTES: Final = 255  # the limit of Linux file systems
_MOST_FOLDERS: Final = 32
_LONGEST_NAME_BYTES: Final = 1024  # with the folders above it well below the limit of a system call
# Smaller data is decoded in the loop in one piece: a hop to a thread costs more than decoding a picture.
_PIECE_CHARACTERS: Final = 4 << 20
_AT_ONCE: Final = 16
_AROUND: Final = " \t\r\n\"'"


class InputFiles:
    """ComfyUI's input folder."""

    def __init__(self, input_dir: Path, fetcher: UrlFetcher | None = None) -> None:
        self._input_dir = input_dir
        self._fetcher = fetcher or UrlFetcher()

    @contextlib.contextmanager
    def of_job(self, files: Sequence[InputFile]) -> Iterator[JobInputFiles]:
        """Yield a job's files. None of them is in the folder yet."""
        with contextlib.ExitStack() as undo:
            yield JobInputFiles(self._input_dir, self._fetcher, files, undo)


class JobInputFiles:
    """A job's input files, decoded or fetched once for a run, even if one was read before."""

    def __init__(self, input_dir: Path, fetcher: UrlFetcher, files: Sequence[InputFile], undo: contextlib.ExitStack) -> None:
        self._input_dir = input_dir
        self._fetcher = fetcher
        self._files = files
        self._undo = undo
        self._early: dict[PurePosixPath, StagedFile] = {}
        self._fetching: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def placed(self) -> AsyncIterator[None]:
        """Keep the files in the folder while the context lasts. Afterwards the folder is as before.

        One job at a time: two may send different files under one name. All are decoded or fetched before the first appears. If
        two files of a job share a name, the later one counts, as in ComfyUI's own upload. A file of the image with the same
        name is moved away meanwhile. Raises `UnsafePath`, `InputNameInvalid`, `ImageNotBase64`, `InputTooLarge`,
        `InputNotStored`, and what `UrlFetcher.fetch` raises, naming the file.
        """
        wanted = self.check() if len(self._files) <= _AT_ONCE else await asyncio.to_thread(self.check)
        if not wanted:
            yield
            return
        if self._fetching:
            fetching, self._fetching = self._fetching, None
            await fetching
        with contextlib.ExitStack() as undo:
            staging, early = self._make_staging(undo), self._early
            self._early = {}
            missing = {name: file for name, file in wanted.items() if name not in early}
            staged = early | {name: self._staged(staging / str(at), file) for at, (name, file) in enumerate(missing.items())}
            await self._fill(staged, missing)
            for at, (name, source) in enumerate(staged.items()):
                with as_not_stored(source.name):
                    self._put(source.path, self._target(name), undo)
                if at % _AT_ONCE == 0:
                    await asyncio.sleep(0)
            yield

    def check(self) -> dict[PurePosixPath, InputFile]:
        """Return the files by target path. Raises for impossible names and addresses, before anything is awaited."""
        wanted = self._wanted()
        _check_apart(list(wanted))
        for name, file in wanted.items():
            self._target(name)
            if file.url is not None:
                self._fetcher.check(file.name, file.url)
        return wanted

    async def look_into(self, file_name: str, look: Callable[[StagedBytes], T]) -> T:
        """Run `look` on the job's file of this name, in a thread, and return its result. `placed` reuses the file.

        Raises what `look` raises, and otherwise what `placed` raises.
        """
        name = next(_input_name(file) for file in reversed(self._files) if file.name == file_name)
        file = (await asyncio.to_thread(self.check))[name]
        staged = self._staged(self._make_staging(self._undo) / "0", file)
        await self._fill({name: staged}, {name: file})
        self._early[name] = staged
        return await asyncio.to_thread(_look, staged, look)

    @property
    def has_addresses(self) -> bool:
        """Return whether a file comes from an address."""
        return any(file.url is not None for file in self._files)

    def fetch_ahead(self) -> None:
        """Begin to fetch the files that addresses name. `placed` waits for them, and raises what went wrong."""
        wanted = {name: file for name, file in self._wanted().items() if file.url is not None and name not in self._early}
        if wanted and self._fetching is None:
            staging = self._make_staging(self._undo)
            self._fetching = asyncio.create_task(self._fetch(wanted, staging), name="fetch-ahead")
            self._fetching.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # told by `placed`, or by nobody
            self._undo.callback(self._fetching.cancel)

    async def _fetch(self, wanted: Mapping[PurePosixPath, InputFile], staging: Path) -> None:
        staged = {name: self._staged(staging / str(at), file) for at, (name, file) in enumerate(wanted.items())}
        await self._fill(staged, wanted)
        self._early |= staged

    @property
    def names(self) -> list[str]:
        """Return the files' names, as a workflow loads them."""
        return [str(name) for name in self._wanted()]

    def as_placed(self, names: Iterable[str]) -> dict[str, str]:
        """Map names to the spelling of an existing file, if that differs.

        Backslashes may be separators, as on Windows, and accents may be in a Mac's form or not. The file is one of the job's,
        or in the folder of ComfyUI that the name's annotation says. An exact match wins.
        """
        wanted = self._wanted()
        found: dict[str, str] = {}
        for name in names:
            slashed = name.replace("\\", "/")
            others = [
                other for other in dict.fromkeys((slashed, *unicode_forms(name), *unicode_forms(slashed))) if other != name
            ]
            if not others or self._is_file(name, wanted):
                continue
            if other := next((other for other in others if self._is_file(other, wanted)), None):
                found[name] = other
        return found

    def _is_file(self, name: str, wanted: Collection[PurePosixPath]) -> bool:
        path, _, folder = (name if name.endswith("]") else f"{name} [input]").removesuffix("]").rpartition(" [")
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            return False
        if folder == "input" and relative in wanted:
            return True
        with contextlib.suppress(OSError, ValueError):
            return folder in _FOLDERS and (self._input_dir.with_name(folder) / relative).is_file()
        return False

    def _wanted(self) -> dict[PurePosixPath, InputFile]:
        return {_input_name(file): file for file in self._files}

    def _make_staging(self, undo: contextlib.ExitStack) -> Path:
        """Create a folder beside the final names, so that a rename is enough."""
        with as_not_stored(_STAGING):
            self._input_dir.mkdir(parents=True, exist_ok=True)
            # A thread of a cancelled job may still write there.
            folder = tempfile.TemporaryDirectory(prefix=_STAGING, dir=self._input_dir, ignore_cleanup_errors=True)
        return Path(undo.enter_context(folder))

    def _staged(self, path: Path, file: InputFile) -> StagedFile:
        return StagedFile(file.name, path, self._fetcher.limits.max_bytes)

    async def _fill(self, staged: Mapping[PurePosixPath, StagedFile], missing: Mapping[PurePosixPath, InputFile]) -> None:
        sent = [(staged[name], file.data) for name, file in missing.items() if file.data is not None]
        if len(sent) <= _AT_ONCE and sum(len(data) for _, data in sent) <= _PIECE_CHARACTERS:
            _decode_all(sent)
        else:
            await asyncio.to_thread(_decode_all, sent)
        downloads = [UrlDownload(file.url, staged[name]) for name, file in missing.items() if file.url is not None]
        if downloads:
            await self._fetcher.fetch(downloads)

    def _target(self, name: PurePosixPath) -> Path:
        """Return where a file goes. Raises `UnsafePath` or `InputNameInvalid` if existing entries forbid the name."""
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


def _input_name(file: InputFile) -> PurePosixPath:
    """Return an input file's name below the input folder, with `/`. Raises `UnsafePath` or `InputNameInvalid`."""
    full = f"{file.subfolder}/{file.name}" if file.subfolder else file.name
    name, slashed = file.name.replace("\\", "/"), full.replace("\\", "/")
    path, own = PurePosixPath(slashed), PurePosixPath(name).name
    leaves = any(PurePosixPath(text).is_absolute() for text in (name, slashed)) or ".." in path.parts
    drive = any("\\" in text and _DRIVE.match(text) for text in (file.name, file.subfolder))
    if leaves or drive or "\0" in full:
        raise UnsafePath("The name of an input file", full)
    if not own or own != name.rpartition("/")[2]:
        raise InputNameInvalid(full, "is no name of a file")
    if len(path.parts) > _MOST_FOLDERS:
        raise InputNameInvalid(f"{full[:40]}...", f"lies in more than {_MOST_FOLDERS} folders")
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
    """Raise `InputNameInvalid` if the name of one input file would be a folder for another."""
    taken = set(names)
    for name in names:
        if below := taken.intersection(name.parents):
            raise InputNameInvalid(str(name), f"lies below '{below.pop()}', which is another file of the same job")


def _look(staged: StagedFile, look: Callable[[StagedBytes], T]) -> T:
    with as_not_stored(staged.name), staged.path.open("rb", buffering=0) as stream:
        return look(StagedBytes(stream))


def _decode_all(files: Sequence[tuple[StagedFile, str]]) -> None:
    for staged, data in files:
        with staged as target:
            _decode(target, data)


def _decode(target: StagedFile, data: str) -> None:
    for piece in base64_pieces(target.name, data):
        target.add(piece)
        if target.full:
            target.flush()
    target.flush()


def base64_pieces(name: str, data: str) -> Iterator[bytes]:
    """Yield the bytes of an input file's base64, some at a time. It may have a `data:image/png;base64,` prefix and line breaks.

    It accepts what clients of worker-comfyui send: the prefix ends at the first comma, and quotes around the text or excess
    padding do no harm. Raises `ImageNotBase64`, also if there are no bytes.
    """
    begin = data.find(",") + 1  # base64 itself contains none
    end = len(data.rstrip(_AROUND + "="))
    padding, empty, rest = data.count("=", max(begin, end)), True, ""
    for at in range(begin, end, _PIECE_CHARACTERS):
        piece = data[at : min(at + _PIECE_CHARACTERS, end)]
        text = rest + "".join((piece.lstrip(_AROUND) if at == begin else piece).split())
        whole = len(text) - len(text) % 4
        text, rest = text[:whole], text[whole:]
        if "=" in text:  # something follows the padding
            raise ImageNotBase64(name)
        if text:
            empty = False
            yield _base64_decoded(name, text)
    missing = -len(rest) % 4
    if missing > padding or "=" in rest or (empty and not rest):
        raise ImageNotBase64(name)
    if rest:
        yield _base64_decoded(name, rest + "=" * missing)


def _base64_decoded(name: str, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise ImageNotBase64(name) from None


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def clear_leftover_inputs(input_dir: Path) -> None:
    """Remove input files that a killed worker left staged on a disk that outlives it."""
    for entry in os.scandir(input_dir) if input_dir.is_dir() else ():
        if entry.name.startswith(_STAGING):
            shutil.rmtree(entry.path, ignore_errors=True)
