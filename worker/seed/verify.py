"""Two actions on a seeded volume: verify, which reads every sealed model, and repair, which downloads wrong ones again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from worker.base.progress import ModelProgress
from worker.errors import EnsureCancelled, WorkerError
from worker.model_spec import HubFile, ModelSpec
from worker.seed.outcome import Outcome
from worker.seed.screen import summary_table, verification_table
from worker.seed.seeding import FAILED, seed_models, seeding_status
from worker.store.inventory import Standing
from worker.store.seals import redownload_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from worker.base.progress import CancelToken
    from worker.models.sources import Sources
    from worker.seed.context import SeedContext, SeedTarget
    from worker.seed.screen import SeedScreen
    from worker.seed.volumes import SeedVolume
    from worker.store.inventory import InventoryEntry
    from worker.store.seals import SealedModel


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
    """Verify a sealed model: read its file and compare. Write only a seal, of a right file. Raises `EnsureCancelled`."""
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
    own, listed = redownload_spec(found.title, found.seal), known.get(found.title)
    if listed is None or (own and found.seal.commit and _is_same_origin(own, listed)):
        return own
    return listed


def _is_same_origin(own: ModelSpec, listed: ModelSpec) -> bool:
    """Return whether a list means the sealed file, at any revision."""
    if not (isinstance(own.source, HubFile) and isinstance(listed.source, HubFile)) or listed.sha256 not in {None, own.sha256}:
        return False
    return (own.source.repo, own.source.path) == (listed.source.repo, listed.source.path)


def verify_all(context: SeedContext, place: SeedTarget, sources: Sources) -> int:
    """Read and hash what is sealed (of a WHAT, if given). With --repair download wrong files again."""
    named = context.named_models(sources) if context.options.whats else None
    code = 0
    for volume in place.volumes:
        found = [sealed for sealed in volume.sealed() if named is None or sealed.title in named]
        with context.screen() as screen:
            screen.expect(sealed.seal.size for sealed in found)
            checked = [_verify_one(context, volume, sealed, screen) for sealed in found]
        models = [item.to_dict() for item in checked]
        context.show("verified", partial(verification_table, checked), volume=volume.title, models=models)
        bad = [item for item in checked if not item.good]
        if bad and context.options.repair:
            code |= _repair(context, volume, bad, place, context.named_models(sources))
        elif bad:
            code = FAILED
    return code


def _verify_one(context: SeedContext, volume: SeedVolume, sealed: SealedModel, screen: SeedScreen) -> VerifiedModel:
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
            context.tell(f"{title} was replaced by hand and stays unchanged: --yes downloads the sealed file again.")
        elif item.verdict == "unreadable":
            context.tell(f"{title} cannot be read and stays unchanged: {item.error}")
        elif spec is None:
            context.tell(f"{title} cannot be repaired and stays unchanged: name its source in a manifest.")
        else:
            wanted.append((spec, item.stamp))
    with context.screen() as screen:
        outcomes = seed_models(context, wanted, place.filler.on(volume), screen)
    context.show("repaired", partial(summary_table, outcomes, 0.0), outcomes=[outcome.to_dict() for outcome in outcomes])
    return seeding_status(context, outcomes) or (FAILED if len(wanted) < len(bad) else 0)
