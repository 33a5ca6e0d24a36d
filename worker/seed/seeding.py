"""Two actions: seeding, and its dry run."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from rich.text import Text

from worker.base.progress import ModelProgress
from worker.base.text import count, size_text
from worker.errors import EnsureCancelled, VolumeFull, WorkerError
from worker.model_spec import HubFile
from worker.plan.items import ItemState
from worker.plan.lookup import ask_sources
from worker.seed.errors import ModelUnavailable, SeedUsage
from worker.seed.outcome import NEWER, Outcome
from worker.seed.screen import dry_run_table, summary_table
from worker.store.inventory import Standing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Hub
    from worker.model_spec import ModelSpec
    from worker.models.sources import Sources
    from worker.plan.items import PlanItem
    from worker.seed.context import SeedContext, SeedTarget
    from worker.seed.fill import Filler
    from worker.seed.screen import SeedScreen
    from worker.seed.volumes import SeedVolume
    from worker.store.inventory import InventoryEntry


FAILED: Final = 1

_AT_ONCE: Final = 3
_TICK_S: Final = 0.2
_SLOW_S: Final = 5.0


def seed(context: SeedContext, place: SeedTarget, sources: Sources) -> int:
    """Seed: put every wanted model onto the volumes. Return the exit status. Raises `EnsureCancelled` if stopped."""
    began_s = time.monotonic()
    items = _models_to_seed(context, sources)
    unavailable = [item for item in items if item.state not in {ItemState.FETCH, ItemState.NO_ANSWER} or item.spec is None]
    wanted = [item for item in items if item not in unavailable]
    outcomes = [outcome for item in unavailable if not item.optional for outcome in _unavailable(item, place.filler.titles)]
    with context.screen() as screen:
        _warn_of_space(wanted, place, screen)
        screen.expect(
            [item.size_bytes or 0 for item in wanted] + [0] * (len(unavailable) - sum(map(_is_optional, unavailable)))
        )
        for item in unavailable:
            if item.optional:
                screen.say(f"{item.title}: {item.message}")
            else:
                screen.ended(item.title, [outcome for outcome in outcomes if outcome.model == item.title])
        for item in wanted:
            if item.state is ItemState.NO_ANSWER:
                screen.say(f"{item.title}: {_source_hosts(context, [item])} did not answer and is asked again.")
        outcomes += seed_models(context, [(item.spec, None) for item in wanted if item.spec], place.filler, screen)
    took_s = time.monotonic() - began_s
    values = [outcome.to_dict() for outcome in outcomes]
    context.show("summary", partial(summary_table, outcomes, took_s), seconds=round(took_s, 3), outcomes=values)
    return seeding_status(context, outcomes)


def seed_from_sibling(context: SeedContext, place: SeedTarget) -> int:
    """Seed from another volume: copy its sealed models. Return the exit code. Raises `EnsureCancelled` if it was stopped."""
    began_s = time.monotonic()
    if context.sibling is None:
        raise SeedUsage("Say with --sync which volume the models come from.")
    specs, left = context.sibling.models()
    for reason in left:
        context.tell(f"warning: {reason}")
    with context.screen() as screen:
        screen.expect([spec.size_bytes or 0 for spec in specs])
        outcomes = seed_models(context, [(spec, None) for spec in specs], place.filler, screen)
    took_s = time.monotonic() - began_s
    values = [outcome.to_dict() for outcome in outcomes]
    context.show("summary", partial(summary_table, outcomes, took_s), seconds=round(took_s, 3), outcomes=values)
    return seeding_status(context, outcomes) or (FAILED if left else 0)


def dry_run_seeding(context: SeedContext, place: SeedTarget, sources: Sources) -> int:
    """Report what `seed` would do. Return the exit status, 1 if something blocks it. Raises `VolumeFull`."""
    lines = dry_run_lines(_models_to_seed(context, sources), place.volumes, context.hub, context.cancel)
    send_bytes, free = sum(line.send_bytes for line in lines), place.volumes[0].free_bytes
    models = [line.to_dict() for line in lines]
    context.show("dry_run", partial(dry_run_table, lines), models=models, send_bytes=send_bytes, free_bytes=free)
    if not context.options.json:
        room = "RunPod's S3 API does not report free space" if free is None else f"{size_text(free)} are free"
        context.console.print(f"to send: {size_text(send_bytes)}; {room}.")
    if free is not None and send_bytes > free:
        raise VolumeFull(context.options.volume or context.settings.volume_path, send_bytes, free)
    return 0 if all(line.good for line in lines) else FAILED


def _models_to_seed(context: SeedContext, sources: Sources) -> tuple[PlanItem, ...]:
    """Return the models to seed with their sources' metadata."""
    hub = urlsplit(context.settings.hf_endpoint).hostname
    with _told_when_slow(context, f"waiting for an answer of {hub} about its files"):
        items = context.selection(sources).read(context.options.whats)
    if not items:
        raise SeedUsage("There is nothing to seed: name a manifest, a workflow, an address or a template; see --help.")
    with _told_when_slow(
        context, f"waiting for an answer of {_source_hosts(context, items)} about {count(len(items), 'model')}"
    ):
        asked = ask_sources(items, context.hub, lambda _: 0, context.cancel)
    if context.cancel.is_set():
        raise EnsureCancelled("seeding")
    return asked


def _source_hosts(context: SeedContext, items: Iterable[PlanItem]) -> str:
    """Return the hosts that are asked about the models to seed."""
    hub = urlsplit(context.settings.hf_endpoint).hostname or ""
    sources = [item.spec.source for item in items if item.spec]
    return ", ".join(sorted({hub if isinstance(source, HubFile) else source.host for source in sources}))


@contextlib.contextmanager
def _told_when_slow(context: SeedContext, text: str) -> Iterator[None]:
    """Say what the seeding waits for if it takes long."""
    timer = threading.Timer(_SLOW_S, context.tell, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def seed_models(
    context: SeedContext, wanted: Sequence[tuple[ModelSpec, object]], filler: Filler, screen: SeedScreen
) -> list[Outcome]:
    """Seed models onto the volumes, each with the stamp of the file that it replaces, or None.

    Three run at a time: while one or two are assembled by the server, the next is in transfer.
    """
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="seed") as pool:
        futures = [pool.submit(_one, context, spec, stamp, filler, screen) for spec, stamp in wanted]
        _wait_all(futures)
        return [outcome for future in futures for outcome in future.result()]


def _one(context: SeedContext, spec: ModelSpec, stamp: object, filler: Filler, screen: SeedScreen) -> list[Outcome]:
    model = f"{spec.folder}/{spec.name}"
    if context.cancel.is_set():
        return [Outcome(model, title, "cancelled") for title in filler.titles]
    screen.moved(model, ModelProgress("waiting"))
    outcomes = filler.ensure(spec, partial(screen.moved, model), context.cancel, replaces=stamp)
    screen.ended(model, outcomes)
    return outcomes


def seeding_status(context: SeedContext, outcomes: Sequence[Outcome]) -> int:
    """Return the exit status of seeding. Raises `EnsureCancelled` if stopped before the end."""
    if context.cancel.is_set() and any(outcome.how == "cancelled" for outcome in outcomes):
        raise EnsureCancelled("seeding")
    failed = [outcome for outcome in outcomes if not outcome.good]
    if failed and not context.options.json:
        again = any(outcome.error and outcome.error.retryable for outcome in failed)
        advice = " Nothing is lost: run the same command again to resume." if again else " What to do about each is said above."
        context.console.print(Text(f"{len(failed)} failed.{advice}", "red"))
    return FAILED if failed else 0


def _warn_of_space(items: Sequence[PlanItem], place: SeedTarget, screen: SeedScreen) -> None:
    """Warn before seeding about models that will not fit. Each is checked again when its turn comes."""
    for volume in place.volumes:
        if (free := volume.free_bytes) is None:
            continue
        specs = [(item.spec, item.size_bytes or 0) for item in items if item.spec]
        absent = [size for spec, size in specs if volume.look(spec.folder, spec.name).standing is Standing.ABSENT]
        needed = sum(absent)
        if needed > free:
            screen.say(f"warning: {volume.title} has {size_text(free)} free, but {size_text(needed)} must be downloaded.")


def _is_optional(item: PlanItem) -> bool:
    return item.optional


def _unavailable(item: PlanItem, titles: Iterable[str]) -> list[Outcome]:
    reason = ModelUnavailable(item.message or f"{item.title}: {item.state}", item.code)
    return [Outcome(item.title, title, "failed", item.size_bytes or 0, error=reason) for title in titles]


def _wait_all(futures: Iterable[Future[Any]]) -> None:
    """Wait for all models to be seeded, in slices, so that a signal is noticed at once."""
    left = set(futures)
    while left:
        _, left = wait(left, timeout=_TICK_S, return_when=FIRST_COMPLETED)


# --- the dry run ------------------------------------------------------------------------------------


_ASK_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class DryRunLine:
    """One model in the dry run of seeding. `send_bytes` are still to be sent, to all volumes together."""

    model: str
    size_bytes: int | None
    state: str
    source: str | None
    good: bool
    send_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the line for `--json`."""
        return {
            "model": self.model,
            "size_bytes": self.size_bytes,
            "state": self.state,
            "source": self.source,
            "ok": self.good,
            "send_bytes": self.send_bytes,
        }


def dry_run_lines(items: Sequence[PlanItem], volumes: Sequence[SeedVolume], hub: Hub, cancel: CancelToken) -> list[DryRunLine]:
    """Return the dry run's line for each model, in order. A model's error is in its line."""
    with ThreadPoolExecutor(_ASK_AT_ONCE, thread_name_prefix="look") as pool:
        return list(pool.map(lambda item: _line(item, volumes, hub, cancel), items))


def _line(item: PlanItem, volumes: Sequence[SeedVolume], hub: Hub, cancel: CancelToken) -> DryRunLine:
    spec, source = item.spec, str(item.spec.source) if item.spec else None
    if item.state is not ItemState.FETCH or spec is None:
        return DryRunLine(item.title, item.size_bytes, item.message or str(item.state), source, good=item.optional)
    states: list[str] = []
    send_bytes = 0
    good = True
    try:
        for volume in volumes:
            found = volume.look(spec.folder, spec.name)
            if found.standing is Standing.ABSENT:
                # A second look-up costs one small request, and shows which partial upload would be resumed.
                begun = volume.begun_bytes(spec, hub.look_up(spec.source, cancel))
                send_bytes += max(0, (item.size_bytes or 0) - begun)
                states.append(f"to send, {size_text(begun)} are there" if begun else "to send")
            else:
                state, is_good = _dry_run_word(found, item, volume.expected(spec, item.sha256))
                states.append(state)
                good = good and is_good
    except WorkerError as exc:
        return DryRunLine(item.title, item.size_bytes, str(exc), source, good=False)
    if len(set(states)) == 1:
        states = states[:1]
    else:
        states = [f"{state} ({volume.title})" for state, volume in zip(states, volumes, strict=True)]
    return DryRunLine(item.title, item.size_bytes, "; ".join(states), source, good=good, send_bytes=send_bytes)


def _dry_run_word(found: InventoryEntry, item: PlanItem, expected: str | None) -> tuple[str, bool]:
    """Return what seeding would do with an existing file, and whether that is as wanted. `expected` is its required hash."""
    pinned, sealed = item.spec.sha256 if item.spec else None, found.seal.sha256 if found.seal else None
    if found.standing is Standing.READY:
        if pinned and sealed and pinned != sealed:
            return f"there, but with the sha256 {sealed}: remove it to have the right one sent", False
        return ("there", True) if None in {sealed, item.sha256} or sealed == item.sha256 else (f"there; {NEWER}", True)
    if found.error:
        return str(found.error), False
    state = "there, replaced by hand" if found.standing is Standing.REPLACED else "there, put by hand"
    if expected and item.size_bytes not in {None, found.size_bytes}:
        return f"{state}, with {found.size_bytes} bytes, not {item.size_bytes}: remove it to have the right one sent", False
    return (f"{state}, its sha256 yet to be checked" if expected else state), True
