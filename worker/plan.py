"""`python -m worker plan WORKFLOW`: what a workflow needs, what of it is there, what fetching the rest takes.

Reads the disk and asks the sources for metadata, in parallel and with deadlines. Nothing is downloaded, nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import struct
import sys
import textwrap
import threading
import urllib.request
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.comfy.workflow import check_paths, named_models, parse_graph
from worker.errors import (
    AmbiguousModel,
    ContentMismatch,
    EnsureCancelled,
    FileIncomplete,
    ManifestInvalid,
    ModelError,
    RepoGated,
    RepoNotFound,
    RequestError,
    SourceUnreachable,
    TokenRefused,
    VolumeFull,
    VolumeMissing,
    VolumeReadOnly,
    WorkerError,
    WorkflowUiFormat,
)
from worker.job import Request
from worker.models.disk import check_whole, free_bytes
from worker.models.hub import Hub, credentials
from worker.models.layout import Layout
from worker.models.partial import Ranges
from worker.models.progress import size_text
from worker.models.seals import read_seal, stat_file
from worker.models.sources import Sources, embedded_models
from worker.models.spec import HubFile
from worker.models.wire import Network

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.comfy.workflow import NamedModel
    from worker.models.hub import Remote
    from worker.models.sources import ModelList
    from worker.models.spec import ModelSpec
    from worker.settings import Settings

CANNOT_RUN: Final = 1
USAGE: Final = 2

_PATIENCE_S: Final = 8.0
_DEADLINE_S: Final = 20.0
_ASK_AT_ONCE: Final = 16


class State(StrEnum):
    """How it stands with a model, in the order in which people see it: what they have to act upon comes last."""

    VOLUME = "volume"
    BY_HAND = "by hand"  # on the volume, put there by somebody: used as it is
    CONTAINER = "container"  # on the container's disk, because the volume could not take it
    IMAGE = "image"
    HOST_CACHE = "host cache"
    FETCH = "fetch"
    NO_ANSWER = "no answer"  # to be fetched as well; its source could not be asked just now
    INCOMPLETE = "incomplete"
    GATED = "gated"
    NO_ACCESS = "no access"
    NOT_FOUND = "not found"
    REFUSED = "refused"
    AMBIGUOUS = "ambiguous"
    UNKNOWN = "unknown"


_THERE: Final = frozenset({State.VOLUME, State.BY_HAND, State.CONTAINER, State.IMAGE, State.HOST_CACHE})
_FETCHED: Final = frozenset({State.FETCH, State.NO_ANSWER})


@dataclass(frozen=True, slots=True)
class Item:
    """One model that the workflow names. `folder` is where it is or would go, None while nobody knows.

    `begun_bytes` of a file to fetch are on the volume already. `message` says what is the matter and what to do.
    """

    name: str
    folder: str | None
    state: State
    size_bytes: int | None = None
    begun_bytes: int = 0
    path: Path | None = None
    spec: ModelSpec | None = None
    known_by: str | None = None
    sha256: str | None = None
    message: str | None = None
    code: str | None = None
    near: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    nodes: tuple[NamedModel, ...] = ()

    @property
    def title(self) -> str:
        """The model as people write it."""
        return f"{self.folder or '?'}/{self.name}"

    @property
    def optional(self) -> bool:
        """ComfyUI runs without it when nobody knows it."""
        return bool(self.nodes) and all(node.optional for node in self.nodes)

    @property
    def blocking(self) -> bool:
        """A job with this workflow fails because of it."""
        return not (self.state in _THERE or self.state in _FETCHED or (self.state is State.UNKNOWN and self.optional))

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "folder": self.folder,
            "state": self.state,
            "blocking": self.blocking,
            "optional": self.optional,
            "size_bytes": self.size_bytes,
            "begun_bytes": self.begun_bytes,
            "path": str(self.path) if self.path else None,
            "source": str(self.spec.source) if self.spec else None,
            "known_by": self.known_by,
            "sha256": self.sha256,
            "message": self.message,
            "code": self.code,
            "near": list(self.near),
            "candidates": list(self.candidates),
            "nodes": [{"id": node.node_id, "class_type": node.class_type, "input": node.input_name} for node in self.nodes],
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a workflow needs. `problems` are about the whole; those of one model are in its item.

    `target` is where fetched models go and `free_bytes` what the file system says is free there.
    """

    items: tuple[Item, ...] = ()
    problems: tuple[WorkerError, ...] = ()
    notes: tuple[str, ...] = ()
    target: Path | None = None
    free_bytes: int | None = None

    @property
    def to_fetch(self) -> tuple[Item, ...]:
        """What a job would have fetched, each file once however many inputs name it."""
        found = {(item.folder, item.spec.name): item for item in self.items if item.state in _FETCHED and item.spec}
        return tuple(found.values())

    @property
    def fetch_bytes(self) -> int:
        """How many bytes are still to come, of the files whose size is known."""
        return sum((item.size_bytes or 0) - item.begun_bytes for item in self.to_fetch)

    @property
    def unknown_sizes(self) -> int:
        """How many files to fetch have a size that nobody could tell."""
        return sum(item.size_bytes is None for item in self.to_fetch)

    @property
    def can_run(self) -> bool:
        """Nothing that is known stands in the way."""
        return not self.problems and not any(item.blocking for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "can_run": self.can_run,
            "problems": [{"code": problem.code, "message": str(problem)} for problem in self.problems],
            "notes": list(self.notes),
            "models": [item.to_dict() for item in self.items],
            "fetch": {"files": len(self.to_fetch), "bytes": self.fetch_bytes, "unknown_sizes": self.unknown_sizes},
            "target": {"path": str(self.target) if self.target else None, "free_bytes": self.free_bytes},
        }


# --- the command --------------------------------------------------------------------------------


def run(argv: Sequence[str], settings: Settings, hub: Hub | None = None) -> int:
    """Print the plan of the workflow that `argv` names; 0 when it can run, 1 when it cannot, 2 when it cannot be read.

    `hub` answers for the sources; without one it is made from the settings.
    """
    parser = argparse.ArgumentParser(
        prog="python -m worker plan",
        description="What a workflow needs, what of it is there, and what would be fetched. Nothing is downloaded.",
    )
    parser.add_argument("workflow", help="a JSON file in ComfyUI's API format, a whole request, a PNG, or - for standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse_args(list(argv))
    except SystemExit as exc:
        return int(exc.code or 0)
    try:
        document = read_document(options.workflow)
    except _Unreadable as exc:
        print(f"error: {options.workflow}: {exc}", file=sys.stderr)  # noqa: T201 - the command's output
        return USAGE
    plan = make_plan(document, settings, hub or make_hub(settings))
    shown = "standard input" if options.workflow == "-" else options.workflow
    if options.json:
        text = json.dumps({"workflow": shown, **plan.to_dict()}, indent=2)
    else:
        text = "\n".join(_lines(shown, plan, shutil.get_terminal_size((100, 24)).columns))
    print(text)  # noqa: T201 - the command's output
    return 0 if plan.can_run else CANNOT_RUN


def make_hub(settings: Settings) -> Hub:
    """The sources as the worker reaches them, with less patience: somebody waits."""
    tokens = credentials(settings.hf_endpoint, settings.hf_token, settings.civitai_token)
    network = Network(tokens, urllib.request.getproxies(), connect_timeout_s=5.0, read_timeout_s=10.0)
    return Hub(settings.hf_endpoint, network, patience_s=_PATIENCE_S)


def make_plan(document: object, settings: Settings, hub: Hub, deadline_s: float = _DEADLINE_S) -> Plan:
    """The plan of a workflow as `read_document` gives it. Whatever is wrong is in the plan; raises nothing for it."""
    sources, wrong_lists = _read_sources(settings)
    places = Places.of(settings)
    problems: list[WorkerError] = []
    items: list[Item] = []
    try:
        wanted = _Wanted.read(document)
        sources = sources.with_request(wanted.models, settings.model_hosts)
        sources = sources.with_workflow(wanted.metadata, settings.model_hosts)
        items += [_look(nodes, sources, places) for nodes in wanted.names()]
    except WorkflowUiFormat as exc:
        # It cannot be run as it is, but what its metadata names can be told all the same.
        problems.append(exc)
        items += _items_of_metadata(sources, places)
    except RequestError as exc:
        problems.append(exc)
    # A worker reads the lists for models that are missing, and at its start when it is to have all of them first.
    if settings.model_loading == "eager" or not all(item.state in _THERE for item in items):
        problems += wrong_lists
        wrong_lists = []
    plan = Plan(_ask(items, hub, places, deadline_s), tuple(problems), tuple(map(str, wrong_lists)))
    return _with_room(plan, settings, places)


# --- reading ------------------------------------------------------------------------------------


class _Unreadable(Exception):  # noqa: N818 - never leaves this module
    """Why there is no document, as the end of a sentence."""


def read_document(path: str) -> object:
    """The JSON of a file, of standard input (`-`), or embedded in a PNG that ComfyUI saved: its graph and its metadata.

    Raises `_Unreadable`, which says what would be right.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as exc:
        raise _Unreadable(f"it cannot be read: {exc.strerror or exc}") from None
    try:
        if data.startswith(_PNG):
            found = {key: json.loads(text) for key, text in _png_texts(data) if key in {"prompt", "workflow"}}
        else:
            found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        raise _Unreadable(f"it is no JSON ({exc}): give a workflow that was exported in the API format") from None
    if not found and data.startswith(_PNG):
        raise _Unreadable("the picture holds no workflow: give one that ComfyUI saved with its metadata")
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
class _Wanted:
    """What was handed in: the workflow, the request's `models`, and where the editor's own form of it is, if anywhere."""

    workflow: object
    models: object = None
    metadata: object = None

    @classmethod
    def read(cls, document: object) -> _Wanted:
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
    def _of_request(cls, value: object) -> _Wanted:
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


def _read_sources(settings: Settings) -> tuple[Sources, list[ManifestInvalid]]:
    """The lists of models, without those that are wrong, and what is wrong with them."""
    lists: dict[str, Any] = {
        "volume_manifest": Layout(settings.volume_path).manifest,
        "manifest": settings.models_manifest,
        "models": settings.models,
    }
    problems: list[ManifestInvalid] = []
    for key in tuple(lists):
        try:
            Sources.read(**{key: lists[key]})
        except ManifestInvalid as exc:
            problems.append(exc)
            del lists[key]
    return Sources.read(**lists), problems


# --- what is there ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where models can lie: the volume, the container's own disk laid out the same, and ComfyUI's own folder in the image."""

    volume: Layout
    local: Layout
    image: Path

    @classmethod
    def of(cls, settings: Settings) -> Places:
        """As the worker has them."""
        return cls(Layout(settings.volume_path), Layout(settings.local_store), settings.base_dir / "models")

    def find(self, folders: Sequence[str], files: Sequence[str]) -> Item | None:
        """The first of these files that is there; no folders: in any."""
        for root, look in (
            (self.volume.models, lambda folder, file: self._in_store(self.volume, folder, file)),
            (self.local.models, lambda folder, file: self._in_store(self.local, folder, file)),
            (self.image, self._in_image),
        ):
            for folder in folders or _folders_of(root):
                found = next((item for file in files if (item := look(folder, file))), None)
                if found:
                    return found
        return None

    def _in_store(self, layout: Layout, folder: str, file: str) -> Item | None:
        path = layout.model(folder, file)
        found = stat_file(path)
        if found is None:
            return None
        item = Item(file, folder, State.VOLUME if layout is self.volume else State.CONTAINER, found.st_size, path=path)
        seal = read_seal(layout.seal(folder, file))
        if seal and seal.size == found.st_size and (seal.mtime is None or seal.fits(found)):
            return replace(item, sha256=seal.sha256)
        try:
            check_whole(path, found.st_size)
        except FileIncomplete as exc:
            return replace(item, state=State.INCOMPLETE, message=str(exc), code=exc.code)
        except OSError as exc:
            return replace(item, state=State.INCOMPLETE, message=f"{path} cannot be read ({exc.strerror}): look at the volume.")
        return replace(item, state=State.BY_HAND) if layout is self.volume else item

    def _in_image(self, folder: str, file: str) -> Item | None:
        path = self.image / folder / file
        found = stat_file(path)
        if found is None:
            return None
        cached = path.resolve().is_relative_to(self.volume.host_cache)
        return Item(file, folder, State.HOST_CACHE if cached else State.IMAGE, found.st_size, path=path)

    def cached(self, spec: ModelSpec) -> Path | None:
        """The model's file in RunPod's host cache, by its name there: what it hashes to is for the worker to check."""
        source = spec.source
        if not isinstance(source, HubFile):
            return None
        repo = self.volume.host_cache_repo(source.repo, source.repo_type)
        commits = [source.revision]
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commits.append((repo / "refs" / source.revision).read_text().strip())
        for commit in commits:
            path = repo / "snapshots" / commit / source.path
            with contextlib.suppress(OSError, FileIncomplete):
                size_bytes = path.stat().st_size
                check_whole(path, size_bytes)
                if spec.size_bytes in {None, size_bytes}:
                    return path
        return None

    def begun_bytes(self, remote: Remote) -> int:
        """How much of a file a download that ended has left on the volume, to be gone on with."""
        found = 0
        for journal in self.volume.partial(remote.key).glob("*.journal"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                said = json.loads(journal.read_bytes())
                if said["size"] == remote.size_bytes and journal.with_suffix(".part").exists():
                    found = max(found, Ranges((start, end) for start, end in said["ranges"]).total)
        return min(found, remote.size_bytes)


def _folders_of(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


# --- what each name means -----------------------------------------------------------------------


def _look(nodes: tuple[NamedModel, ...], sources: Sources, places: Places) -> Item:
    """How it stands with one model, as far as that can be told without the network."""
    first = nodes[0]
    item = Item(first.name, first.folders[0] if first.folders else None, State.UNKNOWN, nodes=nodes)
    try:
        if there := places.find(first.folders, first.file_names):
            return replace(there, nodes=nodes)
        known = ((file, sources.find(file, first.folders)) for file in first.file_names)
        spec = next((spec for _, spec in known if spec), None)
    except WorkerError as exc:
        return _refused(item, exc)
    return _of_spec(item, spec, sources, places) if spec else _unknown(item, first, sources)


def _of_spec(item: Item, spec: ModelSpec, sources: Sources, places: Places) -> Item:
    item = replace(item, name=spec.name, folder=spec.folder, spec=spec, sha256=spec.sha256, known_by=_known_by(spec, sources))
    if path := places.cached(spec):
        return replace(item, state=State.HOST_CACHE, path=path, size_bytes=path.stat().st_size)
    return replace(item, state=State.FETCH, size_bytes=spec.size_bytes)


def _known_by(spec: ModelSpec, sources: Sources) -> str | None:
    volume = (sources.volume.models,) if sources.volume else ()
    lists: Iterable[ModelList] = (sources.request, sources.embedded, *volume, *sources.manifests, sources.catalog)
    return next((models.title for models in lists if spec in models.find(spec.name, (spec.folder,))), None)


def _unknown(item: Item, node: NamedModel, sources: Sources) -> Item:
    near = sources.near(node.name)
    place = f"models/{item.folder or '<folder>'}/{node.file_names[-1] if node.optional else node.name}"
    if item.optional:
        message = "No list of models knows this embedding; ComfyUI warns and goes on without it."
    else:
        own = "" if node.folders else f" unless {node.class_type} brings it"
        message = (
            f"No list of models knows it{own}: put the file at {place} on the volume, "
            "or name its source in models.toml or in the request's 'models'."
        )
    return replace(item, message=message, near=near)


def _refused(item: Item, exc: WorkerError) -> Item:
    state = State.AMBIGUOUS if isinstance(exc, AmbiguousModel) else State.REFUSED
    candidates = tuple(exc.candidates) if isinstance(exc, AmbiguousModel) else ()
    return replace(item, state=state, message=str(exc), code=exc.code, candidates=candidates)


def _items_of_metadata(sources: Sources, places: Places) -> Iterator[Item]:
    """The models that a workflow in the editor's format names in its metadata."""
    for spec in dict.fromkeys(sources.embedded.specs):
        there = places.find((spec.folder,), (spec.name,))
        yield there or _of_spec(Item(spec.name, spec.folder, State.UNKNOWN), spec, sources, places)
    for entry in sources.refused:
        folder, _, name = entry.path.partition("/")
        yield _refused(Item(name, folder, State.REFUSED), entry.error)


# --- what the sources say -----------------------------------------------------------------------


def _ask(items: Sequence[Item], hub: Hub, places: Places, deadline_s: float) -> tuple[Item, ...]:
    """The items with what their sources hold; whoever has not answered by the deadline is `no_answer`."""
    cancel = threading.Event()
    timer = threading.Timer(deadline_s, cancel.set)
    timer.daemon = True
    timer.start()
    try:
        with ThreadPoolExecutor(_ASK_AT_ONCE, thread_name_prefix="ask") as pool:
            return tuple(pool.map(lambda item: _asked(item, hub, places, cancel), items))
    finally:
        timer.cancel()


def _asked(item: Item, hub: Hub, places: Places, cancel: threading.Event) -> Item:
    if item.state is not State.FETCH or item.spec is None:
        return item
    spec = item.spec
    try:
        remote = hub.look_up(spec.source, cancel)
        _check_promises(spec, remote)
    except (SourceUnreachable, EnsureCancelled) as exc:
        why = exc.reason if isinstance(exc, SourceUnreachable) else "no answer in time"
        message = f"Its source could not be asked ({why}): look at the network of this machine; a worker may well get it."
        return replace(item, state=State.NO_ANSWER, message=message, code=SourceUnreachable.code)
    except ModelError as exc:
        return replace(item, state=_state_of(exc), message=str(exc), code=exc.code)
    begun = places.begun_bytes(remote)
    return replace(item, size_bytes=remote.size_bytes, sha256=remote.sha256 or spec.sha256, begun_bytes=begun)


def _check_promises(spec: ModelSpec, remote: Remote) -> None:
    if spec.sha256 and remote.sha256 and spec.sha256 != remote.sha256:
        raise ContentMismatch(remote.where, "sha256", spec.sha256, remote.sha256)
    if spec.size_bytes not in {None, remote.size_bytes}:
        raise ContentMismatch(remote.where, "size", str(spec.size_bytes), str(remote.size_bytes))


def _state_of(exc: ModelError) -> State:
    match exc:
        case RepoGated():
            return State.GATED
        case RepoNotFound() | TokenRefused():
            return State.NO_ACCESS
        case ContentMismatch():
            return State.REFUSED
        case _:
            return State.NOT_FOUND


# --- room ---------------------------------------------------------------------------------------


def _with_room(plan: Plan, settings: Settings, places: Places) -> Plan:
    """The plan with where its files would go, and whether they fit there: on the volume, else on the container's disk."""
    volume = places.volume.root
    plan = replace(plan, target=volume, free_bytes=free_bytes(volume) if volume.is_dir() else None)
    problem = _no_room(plan, volume)
    if problem is None:
        return plan
    if not plan.to_fetch:
        return replace(plan, notes=(*plan.notes, f"{_reason(problem)}."))
    if settings.require_volume:
        return replace(plan, problems=(*plan.problems, problem))
    local = next(place for place in (places.local.root, *places.local.root.parents) if place.is_dir())
    there = replace(plan, target=places.local.root, free_bytes=free_bytes(local))
    if too_full := _no_room(there, local):
        return replace(plan, problems=(*plan.problems, problem if isinstance(problem, VolumeFull) else too_full))
    note = f"{_reason(problem)}: what is fetched goes to this container's disk, and is gone with it."
    return replace(there, notes=(*plan.notes, note))


def _no_room(plan: Plan, place: Path) -> VolumeMissing | VolumeReadOnly | VolumeFull | None:
    if not place.is_dir():
        return VolumeMissing(place)
    if not os.access(place, os.W_OK):
        return VolumeReadOnly(place, "it is read-only")
    if plan.free_bytes is not None and plan.fetch_bytes > plan.free_bytes:
        return VolumeFull(place, plan.fetch_bytes, plan.free_bytes)
    return None


def _reason(problem: VolumeMissing | VolumeReadOnly | VolumeFull) -> str:
    match problem:
        case VolumeMissing():
            return f"There is no network volume at {problem.path}"
        case VolumeReadOnly():
            return f"{problem.path} cannot be written"
        case VolumeFull():
            return f"{problem.path} has no room for {size_text(problem.needed_bytes)}, only for {size_text(problem.free_bytes)}"


# --- for people ---------------------------------------------------------------------------------

_WHAT_TO_DO_WITH_UNKNOWN: Final = (
    "No list of models knows what is UNKNOWN: put the file under models/ on the volume, "
    "or name its source in models.toml or in the request's 'models'."
)
_LABEL_WIDTH: Final = max(map(len, State))
_SIZE_WIDTH: Final = len("999.9 GB")
_INDENT: Final = 2 + _LABEL_WIDTH + 2 + _SIZE_WIDTH + 2


def _lines(title: str, plan: Plan, width: int) -> Iterator[str]:
    """The plan as a terminal shows it: what there is to act upon comes last."""
    there, blocking = sum(item.state in _THERE for item in plan.items), sum(item.blocking for item in plan.items)
    stopping = f", {blocking} in the way" if blocking else ""
    yield f"{title}: {_count(len(plan.items), 'model')}, {there} there, {len(plan.to_fetch)} to fetch{stopping}"
    yield ""
    for item in sorted(plan.items, key=_rank):
        yield _row(item.state.upper() if item.blocking else item.state, item.size_bytes, item.title)
        for text in _details(item):
            yield from _wrapped(text, _INDENT, width)
    if plan.items:
        yield ""
    yield from _totals(plan, width)


def _rank(item: Item) -> tuple[bool, int]:
    return item.blocking, list(State).index(item.state)


def _row(label: str, size_bytes: int | None, text: str) -> str:
    size = "?" if size_bytes is None else size_text(size_bytes)
    return f"  {label:<{_LABEL_WIDTH}}  {size:>{_SIZE_WIDTH}}  {text}"


def _details(item: Item) -> Iterator[str]:
    if item.spec and item.state in _FETCHED:
        yield f"{item.spec.source}" + (f" ({item.known_by})" if item.known_by else "")
    if item.begun_bytes:
        yield f"{size_text(item.begun_bytes)} of it are on the volume already"
    if item.message and not (item.state is State.UNKNOWN and item.blocking):
        yield item.message
    if item.blocking and item.nodes:
        yield "named by " + ", ".join(f"node {node.node_id} ({node.class_type})" for node in item.nodes)
    if item.near:
        yield f"near: {', '.join(item.near)}"


def _totals(plan: Plan, width: int) -> Iterator[str]:
    if plan.to_fetch:
        unknown = f", {plan.unknown_sizes} of unknown size" if plan.unknown_sizes else ""
        yield _row("to fetch", plan.fetch_bytes, f"in {_count(len(plan.to_fetch), 'file')}{unknown}")
    if plan.free_bytes is not None:
        yield _row("free", plan.free_bytes, f"on {plan.target}, less if there is a quota")
    yield ""
    for text in plan.notes:
        yield from _wrapped(text, 0, width)
    if any(item.state is State.UNKNOWN and item.blocking for item in plan.items):
        yield from _wrapped(_WHAT_TO_DO_WITH_UNKNOWN, 0, width)
    for problem in plan.problems:
        yield from _wrapped(str(problem), 0, width)
    yield _verdict(plan)


def _verdict(plan: Plan) -> str:
    if plan.can_run:
        unasked = sum(item.state is State.NO_ANSWER for item in plan.items)
        return "can run" + (f", if the {_count(unasked, 'model')} without an answer can be fetched" if unasked else "")
    states = Counter(item.state for item in sorted(plan.items, key=_rank) if item.blocking)
    reasons = [f"{count} {state}" for state, count in states.items()]
    if plan.problems:
        reasons.append(_count(len(plan.problems), "problem"))
    return f"CANNOT RUN: {', '.join(reasons)}"


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    margin = " " * indent
    # Addresses and paths stay whole: they are there to be copied.
    return textwrap.wrap(
        text,
        max(width, indent + 40),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
