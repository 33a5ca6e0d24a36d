"""Three actions on a seeded volume: list, verify (and repair), prune."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from worker.base.progress import ModelProgress
from worker.base.text import count, size_text
from worker.errors import EnsureCancelled, SpecInvalid, WorkerError
from worker.model_spec import HubFile, ModelSpec, parse_source
from worker.seed.errors import SeedUsage
from worker.seed.outcome import Outcome
from worker.seed.screen import least_used_table, sealed_table, summary_table, verification_table
from worker.seed.seeding import FAILED, seed_models, seeding_status
from worker.store.eviction import chosen_for_removal, idle_text
from worker.store.inventory import Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from worker.base.progress import CancelToken
    from worker.models.sources import Sources
    from worker.plan.items import PlanItem
    from worker.seed.context import SeedContext, SeedTarget
    from worker.seed.screen import SeedScreen
    from worker.seed.volumes import SealedModel, SeedVolume
    from worker.store.inventory import InventoryEntry


Verdict = Literal["whole", "touched", "damaged", "replaced", "missing", "unhashed", "unreadable"]


@dataclass(frozen=True, slots=True)
class VerifiedModel:
    """The result of verifying one sealed model.

    `touched`: its mtime differs from the seal, its content does not; it was sealed again. `damaged`: size and time equal its
    seal, the content differs. `replaced`: size or time differ, and so does the content: it was put there by hand. `unhashed`:
    its seal has no sha256. `stamp` is that of the file that was read.
    """

    sealed: SealedModel
    verdict: Verdict
    actual: str | None = None
    error: WorkerError | None = None
    stamp: object = None

    @property
    def good(self) -> bool:
        """Return whether a worker can trust it."""
        return self.verdict in {"whole", "touched", "unhashed"}

    def to_dict(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        seal = self.sealed.seal
        return {
            "model": self.sealed.title,
            "verdict": self.verdict,
            "size_bytes": seal.size,
            "sha256": seal.sha256,
            "actual_sha256": self.actual,
            "error": str(self.error) if self.error else None,
        }


def verify_sealed(
    volume: SeedVolume, found: SealedModel, on_bytes: Callable[[int], None], cancel: CancelToken
) -> VerifiedModel:
    """Read the file of a sealed model and compare. Write only a seal, and only for a right file. Raises `EnsureCancelled`."""
    try:
        there = volume.look(found.folder, found.name)
        if there.standing is Standing.ABSENT:
            return VerifiedModel(found, "missing")
        if there.size_bytes != found.seal.size:
            return VerifiedModel(found, "replaced", f"{there.size_bytes} bytes", stamp=there.stamp)
        if found.seal.sha256 is None:
            return VerifiedModel(found, "unhashed" if there.standing is Standing.READY else "replaced", stamp=there.stamp)
        return _compare(volume, found, there, on_bytes, cancel)
    except EnsureCancelled:
        raise
    except WorkerError as exc:
        return VerifiedModel(found, "unreadable", error=exc)


def _compare(
    volume: SeedVolume, found: SealedModel, there: InventoryEntry, on_bytes: Callable[[int], None], cancel: CancelToken
) -> VerifiedModel:
    if there.standing is Standing.READY and there.error:
        return VerifiedModel(found, "damaged", error=there.error, stamp=there.stamp)
    actual = volume.hash(found.folder, found.name, found.seal.size, on_bytes, cancel)
    is_ready = there.standing is Standing.READY
    if actual == found.seal.sha256:
        if not is_ready:
            volume.seal(found.folder, found.name, found.seal)
        return VerifiedModel(found, "whole" if is_ready else "touched", actual)
    changed = volume.look(found.folder, found.name).stamp != there.stamp  # while it was read
    return VerifiedModel(found, "damaged" if is_ready and not changed else "replaced", actual, stamp=there.stamp)


def repair_spec(found: SealedModel, known: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """Return the source to repair a sealed model from: its seal's commit, a list, or any address in its seal, or None.

    The commit comes first, because a list without a pin may mean a newer file by now. If the list has another source, the list
    comes first.
    """
    own, listed = _sealed_spec(found), known.get(found.title)
    if listed is None or (own and found.seal.commit and _is_same_origin(own, listed)):
        return own
    return listed


def _is_same_origin(own: ModelSpec, listed: ModelSpec) -> bool:
    """Return whether a list means the sealed file, at any revision."""
    if not (isinstance(own.source, HubFile) and isinstance(listed.source, HubFile)) or listed.sha256 not in {None, own.sha256}:
        return False
    return (own.source.repo, own.source.path) == (listed.source.repo, listed.source.path)


def _sealed_spec(found: SealedModel) -> ModelSpec | None:
    seal = found.seal
    try:
        if seal.repo and seal.file:
            source = HubFile(seal.repo, seal.file, seal.commit or "main")
            return ModelSpec(found.folder, found.name, source, seal.sha256, seal.size or None)
        if seal.file:
            return ModelSpec(found.folder, found.name, parse_source(seal.file), seal.sha256, seal.size or None)
    except SpecInvalid:
        return None
    return None


def sealed_but_unnamed(volume: SeedVolume, named: Collection[str]) -> list[SealedModel]:
    """Return the sealed models to prune: none of these `folder/name`s. Without files that no longer fit their seal.

    `?/name` is a name that may be in any folder.
    """
    sealed = [found for found in volume.sealed() if not {found.title, f"?/{found.name}"} & set(named)]
    return [found for found in sealed if is_as_sealed(volume, found)]


def is_as_sealed(volume: SeedVolume, found: SealedModel) -> bool:
    """Return whether the file to verify or prune still fits its seal."""
    return volume.look(found.folder, found.name).standing is Standing.READY


# --- reading and removing what is sealed ------------------------------------------------------------


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


def verify_all(context: SeedContext, place: SeedTarget, sources: Sources) -> int:
    """Read and hash what is sealed (of a WHAT, if given). With --repair download wrong files again."""
    named = _named_models(context, sources) if context.options.whats else None
    code = 0
    for volume in place.volumes:
        found = [sealed for sealed in volume.sealed() if named is None or sealed.title in named]
        with context.screen() as screen:
            screen.expect(sealed.seal.size for sealed in found)
            checked = [_check(context, volume, sealed, screen) for sealed in found]
        models = [item.to_dict() for item in checked]
        context.show("verified", partial(verification_table, checked), volume=volume.title, models=models)
        bad = [item for item in checked if not item.good]
        if bad and context.options.repair:
            code |= _repair(context, volume, bad, place, _named_models(context, sources))
        elif bad:
            code = FAILED
    return code


def _check(context: SeedContext, volume: SeedVolume, sealed: SealedModel, screen: SeedScreen) -> VerifiedModel:
    def on_bytes(done_bytes: int) -> None:
        screen.moved(sealed.title, ModelProgress("checking", done_bytes, sealed.seal.size))

    found = verify_sealed(volume, sealed, on_bytes, context.cancel)
    screen.ended(sealed.title, [Outcome(sealed.title, volume.title, "ready" if found.good else "failed", sealed.seal.size)])
    return found


def _repair(
    context: SeedContext, volume: SeedVolume, bad: Sequence[VerifiedModel], place: SeedTarget, known: Mapping[str, ModelSpec]
) -> int:
    """Download again what the verification found wrong, and replace it once verified; files put there by hand with --yes."""
    wanted: list[tuple[ModelSpec, object]] = []
    for item in bad:
        title, spec = item.sealed.title, repair_spec(item.sealed, known)
        if item.verdict == "replaced" and not context.options.yes:
            context.tell(f"{title} was replaced by hand and is left alone: --yes fetches the one that was sealed in its place.")
        elif item.verdict == "unreadable":
            context.tell(f"{title} cannot be read and was left alone: {item.error}")
        elif spec is None:
            context.tell(f"{title} cannot be repaired and was left alone: name its source in a manifest.")
        else:
            wanted.append((spec, item.stamp))
    with context.screen() as screen:
        outcomes = seed_models(context, wanted, place.filler.on(volume), screen)
    context.show("repaired", partial(summary_table, outcomes, 0.0), outcomes=[outcome.to_dict() for outcome in outcomes])
    return seeding_status(context, outcomes) or (FAILED if len(wanted) < len(bad) else 0)


def _named_models(context: SeedContext, sources: Sources) -> dict[str, ModelSpec]:
    """Return every model that a list or a WHAT names, and that pruning therefore keeps."""
    items = context.selection(sources).read(context.options.whats) if context.options.whats else ()
    named: dict[str, ModelSpec] = {}
    for spec in [*(item.spec for item in items if item.spec), *sources.manifest()]:
        named.setdefault(f"{spec.folder}/{spec.name}", spec)
    return named


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
    named = {*_named_models(context, sources), *(title for item in items for title in _titles_of(item))}
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
        context.tell(f"{sealed.title} changed meanwhile and was left alone")


def _agreed(context: SeedContext, question: str) -> bool:
    if context.options.yes:
        return True
    if not sys.stdin.isatty():
        raise SeedUsage(f"{question} Say so with --yes where nobody can be asked.")
    return context.console.input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


def _listed(sealed: SealedModel, *, good: bool) -> dict[str, Any]:
    seal = sealed.seal
    return {"model": sealed.title, "size_bytes": seal.size, "sha256": seal.sha256, "repo": seal.repo, "fits": good}
