"""Check models: files that ComfyUI does not see or cannot load, partial downloads, and manifests. Touches the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.base.text import count, size_text
from worker.comfyui_data import known
from worker.doctor.findings import FolderCount, Severity, capped, first_names, listing, note, ok, problem
from worker.doctor.lock_check import LOCK
from worker.doctor.volume_checks import entries, names_in
from worker.errors import ManifestInvalid
from worker.links.scan import IN_FLIGHT, Scan
from worker.model_spec import WEIGHT_SUFFIXES
from worker.models.sources import Sources
from worker.store.byte_ranges import Ranges
from worker.store.inventory import Standing, look_at_file
from worker.store.layout import title_of_seal
from worker.store.locks import Locks
from worker.store.pod_links import is_absolute, relink
from worker.store.seals import read_seal, stat_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from worker.doctor.checking import Subject
    from worker.doctor.findings import Finding
    from worker.links.scan import ScannedFolder
    from worker.model_spec import ModelSpec
    from worker.store.inventory import InventoryEntry
    from worker.store.layout import Layout


_ACTIVE_S: Final = 60.0
_LOOKED_AT: Final = 5_000  # files: a stat and a seal for each cost some ms on a network volume


def check_models(layout: Layout, counted: Callable[[Iterable[FolderCount]], None]) -> Iterator[Finding]:
    """Yield files under `models/` that ComfyUI does not see or cannot load. Pass each folder's contents to `counted`."""
    root = layout.models
    link = layout.root / "models"
    if link.is_symlink() and not root.is_dir():
        told = f"{link} is a link to {link.readlink()}, which does not exist: no worker sees a model; rm {link}"
        yield problem(f"{told}, or link it to where the models are.", [str(link)])
        return
    if not root.is_dir():
        yield note(f"There is no {root} yet: the first download creates it, or put files under models/<folder>/.")
        return
    scan = Scan((os.path.realpath(layout.root), os.path.realpath(root)), leave_out="")
    tree = scan.root(str(root))
    files = list(_files_of(tree))
    looked = len(files) <= _LOOKED_AT
    if looked:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda file: file.look(layout), files))
    folders = list(_counts(tree, files))
    counted(folders)
    yield ok(f"{count(files, 'file')} in {count(folders, 'folder')}{'' if looked else ', too many to look at each'}")
    yield from capped([(str(found), found.path) for found in sorted(scan.problems, key=lambda found: found.path)])
    yield from _check_absolute_links(layout, scan)
    yield from _of_files(layout, files)
    yield from _of_folders(tree)
    yield from _hidden(tree)
    yield from _twins(tree)


def _check_absolute_links(layout: Layout, scan: Scan) -> Iterator[Finding]:
    """Yield a finding about links to models that name the volume by its mount point: only a worker resolves them."""
    link = str(layout.root / "models")
    found = scan.absolute | ({link: os.path.realpath(layout.models)} if is_absolute(link) else {})
    yield from capped(
        [
            (f"{path} names the volume by its mount, called otherwise in a Pod than in a worker: {relink(path, real)}", path)
            for path, real in sorted(found.items())
        ],
        Severity.NOTE,
    )


def _of_files(layout: Layout, files: Sequence[_File]) -> Iterator[Finding]:
    yield from capped([(file.trouble, str(layout.listed(file.path))) for file in files if file.trouble])
    by_hand = [file.path for file in files if file.standing is Standing.BY_HAND and not file.trouble]
    if by_hand:
        yield listing(Severity.NOTE, f"{count(by_hand, 'file')} put there by hand, used as is, not verified", by_hand)
    changed = [file.path for file in files if file.standing is Standing.REPLACED and not file.trouble]
    if changed:
        yield listing(Severity.NOTE, f"{count(changed, 'file')} changed after sealing, to be verified again", changed)


def _of_folders(tree: ScannedFolder) -> Iterator[Finding]:
    loose = sorted(name for name in tree.files if name.lower().endswith(WEIGHT_SUFFIXES))
    if loose:
        text = f"{count(loose, 'file')} directly in models/, where ComfyUI does not look; move each into its folder"
        yield listing(Severity.PROBLEM, text, loose)
    for top in sorted(tree.folders.keys() - known().folders):
        if meant := _similar_folder(top):
            yield note(f"ComfyUI's own loaders do not read models/{top}, but models/{meant}: rename it if you meant that.")
        for relative, folder in tree.folders[top].below(top):
            *_, above, kind = "/", *relative.split("/")
            if above == "models" and kind in known().folders and folder.count:
                yield problem(
                    f"models/{relative}/ lies too deep: move its {folder.count} files to models/{kind}/.", [folder.path]
                )


def _hidden(tree: ScannedFolder) -> Iterator[Finding]:
    busy = [path for relative, folder in tree.below("models") for path in _in_flight(relative, folder.path)]
    if busy:
        text = f"{count(busy, 'file')} named like a copy under way and hidden from ComfyUI; finish or remove"
        yield listing(Severity.NOTE, text, busy)


def _twins(tree: ScannedFolder) -> Iterator[Finding]:
    for first, second in known().same_folders:
        ours, theirs = _names_below(tree, first), _names_below(tree, second)
        if twins := sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]):
            text = f"{count(twins, 'name')} both in models/{first}, from where it is loaded, and in models/{second}"
            yield listing(Severity.NOTE, text, twins)


@dataclass(slots=True)
class _File:
    """A file under `models/`. `standing` is None until it was examined; `trouble` is why it cannot be loaded."""

    path: str
    size_bytes: int = 0
    standing: Standing | None = None
    trouble: str | None = None

    def look(self, layout: Layout) -> None:
        """Determine its state. Without a fitting seal, check that it is complete as far as its first bytes tell."""
        there = look_at_file(layout.listed(self.path), layout.seal_of(self.path))
        if there.standing is Standing.ABSENT:
            return
        self.size_bytes, self.standing = there.size_bytes, there.standing
        if self.standing is not Standing.READY and self.path.lower().endswith(WEIGHT_SUFFIXES):
            self.trouble = _trouble(layout.listed(self.path), there)
        elif there.error:
            self.trouble = str(there.error)


def _trouble(path: Path, there: InventoryEntry) -> str | None:
    try:
        with path.open("rb") as stream:
            head = stream.read(64).lstrip().lower()
        if head.startswith(b"version https://git-lfs"):
            return f"{path} is a Git LFS pointer, not the weights: fetch the file itself in its place."
        if head.startswith((b"<!doctype", b"<html", b"<?xml")):
            return f"{path} is a web page, not weights: its download needed a login; remove it and fetch it again."
        if not there.size_bytes:
            return f"{path} is empty: wait for the copy to finish, or remove it to have it fetched."
    except OSError as exc:
        return f"{path} cannot be read ({exc.strerror}): look at its permissions."
    return str(there.error) if there.error else None


def _files_of(tree: ScannedFolder) -> Iterator[_File]:
    for top, folder in sorted(tree.folders.items()):
        for relative, below in folder.below(top):
            yield from (_File(f"{relative}/{name}") for name in sorted(below.files))


def _counts(tree: ScannedFolder, files: Sequence[_File]) -> Iterator[FolderCount]:
    looked = len(files) <= _LOOKED_AT
    for top in sorted(tree.folders):
        here = [file for file in files if file.path.startswith(f"{top}/")]
        if here:
            size_bytes, sealed = sum(file.size_bytes for file in here), sum(file.standing is Standing.READY for file in here)
            yield FolderCount(top, len(here), size_bytes if looked else None, sealed if looked else None)


def _names_below(tree: ScannedFolder, top: str) -> dict[str, str]:
    """Return, to check for twins, the names of models that a loader of this folder sees, with the paths of their bytes."""
    below = tree.folders[top].below("") if top in tree.folders else ()
    return {f"{relative}/{name}".lstrip("/"): folder.real_path(name) for relative, folder in below for name in folder.files}


def _in_flight(relative: str, path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        yield from (f"{relative}/{entry.name}" for entry in entries if entry.name[0] != "." and entry.name.endswith(IN_FLIGHT))


def _similar_folder(name: str) -> str | None:
    """Return the folder of models that a misspelled one was meant to be, for the check of models."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    spelled = (plain, f"{plain}s", plain.removesuffix("s"), f"{plain}_models")
    return next((folder for folder in spelled if folder in known().folders), None)


# --- their seals ------------------------------------------------------------------------------------


def check_seals(layout: Layout) -> Iterator[Finding]:
    """Yield seals without a file, and interrupted publications."""
    paths = [Path(folder, name) for folder, _, names in os.walk(layout.seals) for name in names if name[0] != "."]
    sealed = [seal for seal in paths if seal.suffix == ".json"]
    yield ok(count(sealed, "seal") if sealed else "none yet")
    gone = [name for seal in sealed if stat_file(layout.listed(name := _sealed_by(layout, seal))) is None]
    if gone:
        text = f"{count(gone, 'seal')} whose file was removed; downloaded again if a job needs it"
        yield listing(Severity.NOTE, text, gone)
    unreadable = [str(seal) for seal in sealed if read_seal(seal) is None]
    if unreadable:
        text = f"{count(unreadable, 'seal')} that cannot be read; if you remove it, its file counts as put there by hand"
        yield listing(Severity.NOTE, text, unreadable)
    pending = [_sealed_by(layout, seal.with_suffix("")) for seal in paths if seal.suffix == ".pending"]
    if pending:
        text = f"{count(pending, 'publication')} running or interrupted; the next worker that needs it completes it"
        yield listing(Severity.NOTE, text, pending)


def _sealed_by(layout: Layout, seal: Path) -> str:
    return title_of_seal(seal.relative_to(layout.seals).as_posix())


# --- in the wrong place -----------------------------------------------------------------------------


_WALKED_FOLDERS: Final = 5_000
_WALKED_DEPTH: Final = 6
_NEVER_MODELS: Final = frozenset({"custom_nodes", "site-packages", "dist-packages", "node_modules", "__pycache__", "outputs"})
_SURE_SUFFIXES: Final = (".safetensors", ".sft", ".gguf", ".ckpt")


def check_misplaced(layout: Layout, comfyui_models: Path) -> Iterator[Finding]:
    """Yield weights where no worker looks."""
    ours = known().folders.union(names_in(layout.models), names_in(comfyui_models))
    groups: dict[tuple[str, str], list[str]] = {}
    stray: list[str] = []
    walk = _Walk(layout)
    for parts, names in walk:
        if belongs := _folder_for(parts, ours):
            found = groups.setdefault(belongs, [])
            found += ["/".join((*parts, name)) for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
        else:
            stray += ["/".join((*parts, name)) for name in names if name.lower().endswith(_SURE_SUFFIXES)]
    groups = {key: found for key, found in groups.items() if found}
    for (group, folder), found in sorted(groups.items()):
        to = layout.models / folder
        yield problem(f"{count(found, 'model file')} in {group}/, where no worker looks: move to {to}/.", found)
    if stray:
        text = f"{count(stray, 'model file')} outside models/, where no worker looks; move those that workflows use"
        yield listing(Severity.NOTE, text, stray)
    if walk.cut_short:
        yield note(f"Only the first {_WALKED_FOLDERS} folders outside models/ were looked at.")
    if not (groups or stray):
        yield ok("no weights outside models/")


def _folder_for(parts: tuple[str, ...], known: Collection[str]) -> tuple[str, str] | None:
    """Return the folder to which misplaced models belong, and their kind. None if the path does not tell the kind."""
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] in known and (at == 0 or parts[at - 1] == "models"):
            return "/".join(parts[: at + 1]), parts[at]
    return None


class _Walk:
    """For the check of misplaced models, the folders outside `models/` as (parts of the path, names of files), with limits."""

    def __init__(self, layout: Layout) -> None:
        self._root = os.path.realpath(layout.root)
        self._leave_out = {os.path.realpath(place) for place in (layout.models, layout.state, layout.host_cache.parent)}
        self.cut_short = False

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        for walked, (folder, below, names) in enumerate(os.walk(self._root)):
            if walked == _WALKED_FOLDERS:
                self.cut_short = True
                return
            parts = Path(folder).relative_to(self._root).parts
            deep = len(parts) >= _WALKED_DEPTH or "pyvenv.cfg" in names
            below[:] = [] if deep else sorted(name for name in below if self._enters(folder, name))
            yield parts, names

    def _enters(self, folder: str, name: str) -> bool:
        return name[0] != "." and name not in _NEVER_MODELS and f"{folder}/{name}" not in self._leave_out


# --- partial downloads, and what manifests name ---------------------------------------------------


def check_downloads(layout: Layout) -> Iterator[Finding]:
    """Yield partial downloads: their progress, who downloads, or when they stopped."""
    now_s = _now_s(layout)
    files = [path for folder in entries(layout.partials) for path in entries(folder)]
    parts = [path for path in files if path.suffix == ".part"]
    if not parts:
        yield ok("no download is running, none was interrupted")
    sealed = _complete_contents(layout) if parts else set()
    for part in parts:
        with contextlib.suppress(FileNotFoundError):  # published meanwhile
            yield _partial(layout, part, now_s, there=part.parent.name in sealed)
    yield from _records_without_partial(files, now_s)
    holders = [holder for lock in entries(layout.locks) for holder in entries(lock / "holders")]
    stale = [str(holder) for holder in holders if _age_s(holder, now_s) > _ACTIVE_S]
    if stale:
        text = f"{count(stale, 'lock')} of workers that are gone: nothing to do, the next worker takes over in 30 s."
        yield note(text, stale)
    uploads = [upload.name for upload in entries(layout.root / ".s3compat_uploads")]
    if uploads:
        text = f"{count(uploads, 'upload')} through S3 not completed; complete or abort it to free the space"
        yield listing(Severity.NOTE, text, uploads)


def _complete_contents(layout: Layout) -> set[str]:
    """Return, to check partial downloads, the sha256 of every sealed content."""
    seals = (read_seal(Path(folder, name)) for folder, _, names in os.walk(layout.seals) for name in names)
    return {seal.sha256 for seal in seals if seal and seal.sha256}


def _records_without_partial(files: list[Path], now_s: float) -> Iterator[Finding]:
    """Yield findings about records of partial downloads without their file: a worker was killed between the two."""
    there = {path.with_suffix("") for path in files if path.suffix == ".part"}
    strays = [str(path) for path in files if path.with_suffix("") not in there and _ACTIVE_S < _age_s(path, now_s) < math.inf]
    if strays:
        yield listing(Severity.NOTE, f"{count(strays, 'record')} of downloads that no longer exist; remove these files", strays)


def _partial(layout: Layout, part: Path, now_s: float, *, there: bool) -> Finding:
    journal, key = part.with_suffix(".journal"), part.parent.name
    size_bytes = part.stat().st_size
    try:
        done_bytes = Ranges((start, end) for start, end in json.loads(journal.read_bytes())["ranges"]).total
    except (OSError, ValueError, TypeError, KeyError):
        return note(f"{part} has no journal, so no worker can resume it: remove it.", [part])
    holder = Locks(layout, LOCK).holder(key)
    by = f"worker {holder.by}" if holder else "a worker"
    amount = f"{key[:12]}, {size_text(done_bytes)} of {size_text(size_bytes)}"
    age_s = min(_age_s(journal, now_s), _age_s(layout.lock_progress(key), now_s))
    if age_s <= _ACTIVE_S:
        rate = f" at {size_text(int(holder.bytes_per_s))}/s" if holder else ""
        return ok(f"{amount}: {by} downloads it{rate}")
    folder = part.parent.with_name(f"{key[:12]}*")
    then = "and the model is complete now: remove" if there else "the next download resumes it. If there will be none, remove"
    return note(f"{amount}: {by} stopped {_duration(age_s)} ago, {then} {folder}", [part])


def _now_s(layout: Layout) -> float:
    """Return the volume's time, for a check of how old partial downloads are. This machine's if nothing can be written."""
    with contextlib.suppress(OSError):
        return _touch_and_remove(layout.state)
    return time.time()


def _touch_and_remove(folder: Path) -> float:
    path = folder / f".doctor.{secrets.token_hex(4)}.tmp"
    try:
        path.touch()
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _age_s(path: Path, now_s: float) -> float:
    try:
        return max(0.0, now_s - path.stat().st_mtime)
    except OSError:
        return math.inf


def _duration(age_s: float) -> str:
    for unit, length_s in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= 2 * length_s:
            return f"{age_s / length_s:.0f} {unit}"
    return f"{age_s:.0f} s"


def check_manifests(layout: Layout, subject: Subject) -> Iterator[Finding]:
    """Yield whether the lists of models are readable, and what they name that is missing."""
    lists: list[dict[str, Any]] = [
        {"volume_manifest": layout.manifest},
        {"manifest": subject.manifest},
        {"models": subject.models},
    ]
    specs: list[ModelSpec] = []
    wrong = False
    for one in lists:
        try:
            sources = Sources.read(**one)
            specs += sources.manifest()
            faults: list[ManifestInvalid] = list(sources.odd)
        except ManifestInvalid as exc:
            faults = [exc]
        for fault in faults:
            wrong = True
            for text in fault.problems:
                yield problem(f"{fault.where}: {text}", [fault.where])
    names = {f"{spec.folder}/{spec.name}" for spec in specs}
    missing = sorted(name for name in names if stat_file(layout.listed(name)) is None)
    if missing:
        yield ok(f"{count(names, 'model')}, {len(missing)} still to be downloaded: {first_names(missing)}")
    elif names:
        yield ok(f"{count(names, 'model')}, all there")
    elif not wrong:
        yield ok("no model in models.toml, MODELS_MANIFEST or MODELS")
