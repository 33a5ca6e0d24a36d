"""Three actions on a seeded volume: list, verify (and repair), prune."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from worker.base.progress import Progress
from worker.base.text import count, size_text
from worker.seed import tables
from worker.seed.errors import SeedUsage
from worker.seed.outcome import Outcome
from worker.seed.seeding import FAILED, code_of, fill
from worker.seed.verify import Checked, is_as_sealed, repair_spec, unnamed, verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from worker.models.sources import Sources
    from worker.plan.items import Item
    from worker.seed.context import Desk, Place
    from worker.seed.s3_volume import Sealed
    from worker.seed.screen import Screen
    from worker.seed.verify import Volume
    from worker.spec import ModelSpec


def list_sealed(desk: Desk, place: Place) -> int:
    """Show what is sealed on each volume. Return 0."""
    for volume in place.volumes:
        found = sorted(volume.sealed(), key=lambda sealed: sealed.title)
        fits = [is_as_sealed(volume, sealed) for sealed in found]
        models = [_listed(sealed, good=good) for sealed, good in zip(found, fits, strict=True)]
        if not desk.options.json:
            total = size_text(sum(sealed.seal.size for sealed in found))
            desk.console.print(f"{volume.title}: {count(len(found), 'sealed model')}, {total}")
        desk.show("list", partial(tables.listing, found, fits), volume=volume.title, models=models)
    return 0


def verify_all(desk: Desk, place: Place, sources: Sources) -> int:
    """Read and hash what is sealed (of a WHAT, if given). With --repair download wrong files again."""
    named = _named(desk, sources) if desk.options.whats else None
    code = 0
    for volume in place.volumes:
        found = [sealed for sealed in volume.sealed() if named is None or sealed.title in named]
        with desk.screen() as screen:
            screen.expect(sealed.seal.size for sealed in found)
            checked = [_check(desk, volume, sealed, screen) for sealed in found]
        models = [item.to_dict() for item in checked]
        desk.show("verified", partial(tables.verification, checked), volume=volume.title, models=models)
        bad = [item for item in checked if not item.good]
        if bad and desk.options.repair:
            code |= _repair(desk, volume, bad, place, _named(desk, sources))
        elif bad:
            code = FAILED
    return code


def _check(desk: Desk, volume: Volume, sealed: Sealed, screen: Screen) -> Checked:
    def on_bytes(done_bytes: int) -> None:
        screen.moved(sealed.title, Progress("checking", done_bytes, sealed.seal.size))

    found = verify(volume, sealed, on_bytes, desk.cancel)
    screen.ended(sealed.title, [Outcome(sealed.title, volume.title, "ready" if found.good else "failed", sealed.seal.size)])
    return found


def _repair(desk: Desk, volume: Volume, bad: Sequence[Checked], place: Place, known: Mapping[str, ModelSpec]) -> int:
    """Download wrong files again. Replace a file after the new one was verified; one put there by hand only with --yes."""
    wanted: list[tuple[ModelSpec, object]] = []
    for item in bad:
        title, spec = item.sealed.title, repair_spec(item.sealed, known)
        if item.verdict == "replaced" and not desk.options.yes:
            desk.tell(f"{title} was replaced by hand and is left alone: --yes fetches the one that was sealed in its place.")
        elif item.verdict == "unreadable":
            desk.tell(f"{title} cannot be read and was left alone: {item.error}")
        elif spec is None:
            desk.tell(f"{title} cannot be repaired and was left alone: name its source in a manifest.")
        else:
            wanted.append((spec, item.stamp))
    with desk.screen() as screen:
        outcomes = fill(desk, wanted, place.filler.on(volume), screen)
    desk.show("repaired", partial(tables.summary, outcomes, 0.0), outcomes=[outcome.to_dict() for outcome in outcomes])
    return code_of(desk, outcomes) or (FAILED if len(wanted) < len(bad) else 0)


def _named(desk: Desk, sources: Sources) -> dict[str, ModelSpec]:
    """Return every model that a list or a WHAT names."""
    items = desk.wants(sources).read(desk.options.whats) if desk.options.whats else ()
    named: dict[str, ModelSpec] = {}
    for spec in [*(item.spec for item in items if item.spec), *sources.manifest()]:
        named.setdefault(f"{spec.folder}/{spec.name}", spec)
    return named


def titles_of(item: Item) -> Iterator[str]:
    """Yield every `folder/name` at which a worker would find this model, whether or not its source is known."""
    yield item.title
    for node in item.nodes:
        yield from (f"{folder}/{name}" for folder in node.folders for name in node.file_names)


def prune(desk: Desk, place: Place, sources: Sources) -> int:
    """Remove the sealed models that nothing names, after a question. Files put there by hand are not even examined."""
    items = desk.wants(sources).read(desk.options.whats) if desk.options.whats else ()
    named = {*_named(desk, sources), *(title for item in items for title in titles_of(item))}
    if not named:
        raise SeedUsage("No manifest and no WHAT names any model, so everything would go: name what is to stay.")
    for volume in place.volumes:
        gone = unnamed(volume, named)
        total = size_text(sum(sealed.seal.size for sealed in gone))
        models = [_listed(sealed, good=True) for sealed in gone]
        desk.show("prune", partial(tables.listing, gone, [True] * len(gone)), volume=volume.title, models=models)
        if gone and _agreed(desk, f"Remove {count(len(gone), 'model')}, {total}, from {volume.title}?"):
            for sealed in gone:
                _remove(desk, volume, sealed)
            desk.tell(f"removed {count(len(gone), 'model')}, {total}")
    return 0


def _remove(desk: Desk, volume: Volume, sealed: Sealed) -> None:
    """Remove a model, unless the file was replaced while the question was open."""
    if is_as_sealed(volume, sealed):
        volume.remove(sealed.folder, sealed.name)
    else:
        desk.tell(f"{sealed.title} changed meanwhile and was left alone")


def _agreed(desk: Desk, question: str) -> bool:
    if desk.options.yes:
        return True
    if not sys.stdin.isatty():
        raise SeedUsage(f"{question} Say so with --yes where nobody can be asked.")
    return desk.console.input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


def _listed(sealed: Sealed, *, good: bool) -> dict[str, Any]:
    seal = sealed.seal
    return {"model": sealed.title, "size_bytes": seal.size, "sha256": seal.sha256, "repo": seal.repo, "fits": good}
