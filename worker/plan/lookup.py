"""Resolve each name: which file, from where, how large. Reads files and asks the sources for metadata."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from worker.base.text import unicode_forms
from worker.errors import (
    AmbiguousModel,
    ContentMismatch,
    EnsureCancelled,
    ManifestInvalid,
    ModelError,
    RepoGated,
    RepoNotFound,
    SourceUnreachable,
    TokenRefused,
    WorkerError,
)
from worker.models.sources import Sources
from worker.plan.items import ItemState, PlanItem
from worker.store.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Hub, RemoteFile
    from worker.graph.model_names import NamedModel
    from worker.model_spec import ModelSpec
    from worker.models.lists import ModelList
    from worker.plan.places import Places
    from worker.settings import Settings

_ASK_AT_ONCE: Final = 16


def read_valid_sources(settings: Settings) -> tuple[Sources, list[ManifestInvalid]]:
    """Return the valid lists of models, for the plan's look-ups, and the mistakes of the others, for the plan to show."""
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
    sources = Sources.read(**lists)
    return sources, problems + list(sources.odd)


def look_up_offline(nodes: tuple[NamedModel, ...], sources: Sources, places: Places) -> PlanItem:
    """Return the plan's item of one model, as far as it is known without the network."""
    first = nodes[0]
    try:
        as_written = places.by_hand(first.folders, first.as_written().file_names) if first.written else None
        if there := as_written or places.find(first.folders, first.file_names):
            return replace(there, nodes=nodes)
        item = look_up_name(nodes, sources)
        if there := _elsewhere(item, places):
            return replace(
                item,
                name=there.name,
                folder=there.folder,
                state=there.state,
                size_bytes=there.size_bytes,
                path=there.path,
                message=there.message,
            )
    except WorkerError as exc:
        return item_refused(_nameless(nodes), exc)
    return _or_cached(item, places)


def _elsewhere(item: PlanItem, places: Places) -> PlanItem | None:
    """Look up the file in another folder than the guessed one: where a list says, or where it was put by hand."""
    if item.spec:
        return places.find((item.spec.folder,), (item.spec.name,))
    return places.find((), item.nodes[0].file_names) if is_guessed(item.nodes) and item.state is ItemState.UNKNOWN else None


def is_guessed(nodes: Iterable[NamedModel]) -> bool:
    """Return whether only the names of inputs tell the folders in which a model is looked up."""
    return all(node.guessed for node in nodes)


def look_up_name(nodes: tuple[NamedModel, ...], sources: Sources) -> PlanItem:
    """Look up the file that a model's name means, wherever it may exist already: to be downloaded, or why it cannot be."""
    first = nodes[0]
    try:
        files = (form for file in first.file_names for form in unicode_forms(file))
        known = (sources.find(file, first.folders, guessed=is_guessed(nodes)) for file in files)
        spec = next(filter(None, known), None)
    except WorkerError as exc:
        return item_refused(_nameless(nodes), exc)
    return item_of_spec(_nameless(nodes), spec, sources) if spec else _unknown(_nameless(nodes), first, sources)


def _nameless(nodes: tuple[NamedModel, ...]) -> PlanItem:
    return PlanItem(nodes[0].name, nodes[0].folders[0] if nodes[0].folders else None, ItemState.UNKNOWN, nodes=nodes)


def item_of_spec(item: PlanItem, spec: ModelSpec, sources: Sources) -> PlanItem:
    """Return the plan's item with the file that was looked up, to be downloaded."""
    item = replace(item, name=spec.name, folder=spec.folder, spec=spec, sha256=spec.sha256, known_by=_known_by(spec, sources))
    return replace(item, state=ItemState.FETCH, size_bytes=spec.size_bytes)


def _or_cached(item: PlanItem, places: Places) -> PlanItem:
    if item.spec and (path := places.cached(item.spec)):
        return replace(item, state=ItemState.HOST_CACHE, path=path, size_bytes=path.stat().st_size)
    return item


def _known_by(spec: ModelSpec, sources: Sources) -> str | None:
    volume = (sources.volume.models,) if sources.volume else ()
    lists: Iterable[ModelList] = (sources.request, sources.embedded, *volume, *sources.manifests, sources.catalog)
    return next((models.title for models in lists if spec in models.find(spec.name, (spec.folder,))), None)


def _unknown(item: PlanItem, node: NamedModel, sources: Sources) -> PlanItem:
    near = sources.near(node.name)
    place = f"models/{item.folder or '<folder>'}/{node.file_names[-1] if node.optional else node.name}"
    if item.optional:
        message = "No list of models knows this embedding; ComfyUI warns and goes on without it."
    else:
        own = "" if node.folders and not node.guessed else f" unless {node.class_type} brings it"
        where = f"where {node.class_type} looks for it (perhaps {place})" if node.guessed else f"at {place}"
        message = (
            f"No list of models knows it{own}: put the file {where} on the volume, "
            "or name its source in models.toml or in the request's 'models'."
        )
    return replace(item, message=message, near=near)


def item_refused(item: PlanItem, exc: WorkerError) -> PlanItem:
    """Return the plan's item with the reason why it cannot be looked up."""
    state = ItemState.AMBIGUOUS if isinstance(exc, AmbiguousModel) else ItemState.REFUSED
    candidates = tuple(exc.candidates) if isinstance(exc, AmbiguousModel) else ()
    return replace(item, state=state, message=str(exc), code=exc.code, candidates=candidates)


# --- what the sources say -----------------------------------------------------------------------


def ask_sources_in_time(
    items: Sequence[PlanItem], hub: Hub, begun: Callable[[RemoteFile], int], deadline_s: float
) -> tuple[PlanItem, ...]:
    """Like `ask_sources`. An item of the plan without an answer by the deadline is `no_answer`."""
    cancel = threading.Event()
    timer = threading.Timer(deadline_s, cancel.set)
    timer.daemon = True
    timer.start()
    try:
        return ask_sources(items, hub, begun, cancel)
    finally:
        timer.cancel()


def ask_sources(
    items: Sequence[PlanItem], hub: Hub, begun: Callable[[RemoteFile], int], cancel: CancelToken
) -> tuple[PlanItem, ...]:
    """Return the plan's items with their sources' metadata. `begun` returns how much an interrupted download left behind."""
    with ThreadPoolExecutor(_ASK_AT_ONCE, thread_name_prefix="ask") as pool:
        return tuple(pool.map(lambda item: _asked(item, hub, begun, cancel), items))


def _asked(item: PlanItem, hub: Hub, begun: Callable[[RemoteFile], int], cancel: CancelToken) -> PlanItem:
    if item.state is not ItemState.FETCH or item.spec is None:
        return item
    spec = item.spec
    try:
        remote = hub.look_up(spec.source, cancel)
        remote.check_against(spec)
    except (SourceUnreachable, EnsureCancelled) as exc:
        why = exc.reason if isinstance(exc, SourceUnreachable) else "no answer in time"
        message = f"Its source could not be asked ({why}): look at the network of this machine; a worker may well get it."
        return replace(item, state=ItemState.NO_ANSWER, message=message, code=SourceUnreachable.code)
    except ModelError as exc:
        return replace(item, state=_state_of(exc), message=str(exc), code=exc.code)
    sha256 = remote.sha256 or spec.sha256
    return replace(item, size_bytes=remote.size_bytes, sha256=sha256, begun_bytes=begun(remote))


def _state_of(exc: ModelError) -> ItemState:
    match exc:
        case RepoGated():
            return ItemState.GATED
        case RepoNotFound() | TokenRefused():
            return ItemState.NO_ACCESS
        case ContentMismatch():
            return ItemState.REFUSED
        case _:
            return ItemState.NOT_FOUND
