"""Two actions on a seeded volume: list what is sealed, and prune what nothing names."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from worker.base.text import count, size_text
from worker.seed.errors import SeedUsage
from worker.seed.screen import least_used_table, sealed_table
from worker.seed.seeding import FAILED
from worker.store.eviction import chosen_for_removal, idle_text
from worker.store.inventory import Standing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from worker.models.sources import Sources
    from worker.plan.items import PlanItem
    from worker.seed.context import SeedContext, SeedTarget
    from worker.seed.volumes import SeedVolume
    from worker.store.seals import SealedModel


def sealed_but_unnamed(volume: SeedVolume, named: Collection[str]) -> list[SealedModel]:
    """Return the sealed models to prune: none of these `folder/name`s. Without files that no longer fit their seal.

    `?/name` is a name that may be in any folder.
    """
    sealed = [found for found in volume.sealed() if not {found.title, f"?/{found.name}"} & set(named)]
    return [found for found in sealed if is_as_sealed(volume, found)]


def is_as_sealed(volume: SeedVolume, found: SealedModel) -> bool:
    """Return whether the file to list or prune still fits its seal."""
    return volume.look(found.folder, found.name).standing is Standing.READY


def list_sealed(context: SeedContext, place: SeedTarget) -> int:
    """Maintain a volume: show what is sealed on each. Return 0."""
    for volume in place.volumes:
        found = sorted(volume.sealed(), key=lambda sealed: sealed.title)
        fits = [is_as_sealed(volume, sealed) for sealed in found]
        words = _outlook(context)
        models = [_listed(sealed, good=good) | words.get(sealed.title, {}) for sealed, good in zip(found, fits, strict=True)]
        if not context.options.json:
            total = size_text(sum(sealed.seal.size for sealed in found))
            context.console.print(f"{volume.title}: {count(len(found), 'sealed model')}, {total}")
        shown = [_in_words(words.get(sealed.title)) for sealed in found] if words else None
        context.show("list", partial(sealed_table, found, fits, shown), volume=volume.title, models=models)
    return 0


def _outlook(context: SeedContext) -> dict[str, dict[str, Any]]:
    """Return for each sealed model on a mounted volume when it would be removed to make room, or why it would not."""
    found = context.survey()
    order = {one.title: place for place, one in enumerate(found.removable, 1)} if found else {}
    return {
        name.title: {"idle_s": round(one.idle_s), "removed_as": order.get(one.title), "kept": one.kept}
        for one in (found.contents if found else ())
        for name in one.names
    }


def _in_words(word: Mapping[str, Any] | None) -> str:
    if word is None:
        return ""
    return f"stays: {word['kept']}" if word["kept"] else f"number {word['removed_as']}, {idle_text(word['idle_s'])}"


def _titles_of(item: PlanItem) -> Iterator[str]:
    """Yield every `folder/name` at which a worker would find this model, so that pruning keeps it."""
    yield item.title
    for node in item.nodes:
        yield from (f"{folder}/{name}" for folder in node.folders for name in node.file_names)


def prune(context: SeedContext, place: SeedTarget, sources: Sources) -> int:
    """Remove the sealed models that nothing names, after a question. Files put there by hand are not even examined."""
    if context.options.least_used:
        return _prune_least_used(context)
    items = context.selection(sources).read(context.options.whats) if context.options.whats else ()
    named = {*context.named_models(sources), *(title for item in items for title in _titles_of(item))}
    if not named:
        raise SeedUsage("No manifest and no WHAT names any model, so everything would go: name what is to stay.")
    for volume in place.volumes:
        gone = sealed_but_unnamed(volume, named)
        total = size_text(sum(sealed.seal.size for sealed in gone))
        models = [_listed(sealed, good=True) for sealed in gone]
        context.show("prune", partial(sealed_table, gone, [True] * len(gone)), volume=volume.title, models=models)
        if gone and _agreed(context, f"Remove {count(len(gone), 'model')}, {total}, from {volume.title}?"):
            for sealed in gone:
                _prune_one(context, volume, sealed)
            context.tell(f"removed {count(len(gone), 'model')}, {total}")
    return 0


def _prune_least_used(context: SeedContext) -> int:
    """Remove what jobs use least until the rest is as small as was said, after a question."""
    room, found = context.room, context.survey()
    if room is None or found is None:
        raise SeedUsage("--least-used needs a mounted volume: links and uses do not show through S3.")
    over = found.excess(room.limits)
    gone = chosen_for_removal(found.removable, over) if over > 0 else []
    models = [{"model": one.title, "size_bytes": one.size_bytes, "idle_s": round(one.idle_s)} for one in gone]
    context.show("prune", partial(least_used_table, gone), volume=str(room.layout.root), models=models)
    total = size_text(sum(one.size_bytes for one in gone))
    if gone and _agreed(context, f"Remove {count(len(gone), 'model')}, {total}, from {room.layout.root}?"):
        freed = room.fit(0, context.cancel)
        context.tell(f"removed {size_text(freed)}")
        over -= freed
    elif gone:
        return 0
    if over > 0:
        context.tell(f"{size_text(over)} more than --keep-gb allows stay, because nothing else may be removed: see --list")
    return FAILED if over > 0 else 0


def _prune_one(context: SeedContext, volume: SeedVolume, sealed: SealedModel) -> None:
    """Remove a model while pruning, unless the file was replaced while the question was open."""
    if is_as_sealed(volume, sealed):
        volume.remove(sealed.folder, sealed.name)
    else:
        context.tell(f"{sealed.title} changed meanwhile and stays")


def _agreed(context: SeedContext, question: str) -> bool:
    if context.options.yes:
        return True
    if not sys.stdin.isatty():
        raise SeedUsage(f"{question} Say so with --yes where nobody can be asked.")
    return context.console.input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


def _listed(sealed: SealedModel, *, good: bool) -> dict[str, Any]:
    seal = sealed.seal
    return {"model": sealed.title, "size_bytes": seal.size, "sha256": seal.sha256, "repo": seal.repo, "fits": good}
