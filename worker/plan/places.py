"""Where models can be, and which are there. Reads the disk."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from worker.base.files import free_bytes, is_volume
from worker.base.text import size_text, unicode_forms
from worker.errors import VolumeFull, VolumeMissing, VolumeReadOnly, no_volume
from worker.models.sources import Sources
from worker.pins import read_pins
from worker.plan.items import ItemState, PlanItem
from worker.store.byte_ranges import Ranges
from worker.store.eviction import EvictionLimits, eviction_outlook, survey_for_eviction
from worker.store.host_cache import cached_file
from worker.store.inventory import Standing, look_up_file
from worker.store.layout import Layout
from worker.store.leases import LeaseTiming
from worker.store.pod_links import layout_at
from worker.store.seals import stat_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from worker.fetch.hub import RemoteFile
    from worker.model_spec import ModelSpec
    from worker.plan.items import Plan
    from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Places:
    """The places where a plan looks for models: the volume, the container's disk in the same layout, and ComfyUI's folders."""

    volume: Layout
    local: Layout
    image: Path

    @classmethod
    def of(cls, settings: Settings) -> Places:
        """Return the places that a worker with these settings uses."""
        return cls(layout_at(settings.volume_path), Layout(settings.local_store), settings.base_dir / "models")

    def find(self, folders: Sequence[str], files: Sequence[str]) -> PlanItem | None:
        """Return the first of these files that exists. Without folders: in any. Accents may be in either form."""
        files = [form for file in files for form in unicode_forms(file)]
        for root, find in (
            (self.volume.models, lambda folder, file: self._in_store(self.volume, folder, file)),
            (self.local.models, lambda folder, file: self._in_store(self.local, folder, file)),
            (self.image, self._in_image),
        ):
            for folder in folders or _folders_in(root):
                found = next((item for file in files if (item := find(folder, file))), None)
                if found:
                    return found
        return None

    def by_hand(self, folders: Sequence[str], files: Sequence[str]) -> PlanItem | None:
        """Return the first of these files. Their names contain characters that the worker never writes, such as a backslash."""
        roots = (
            (self.volume.models, ItemState.BY_HAND),
            (self.local.models, ItemState.CONTAINER),
            (self.image, ItemState.IMAGE),
        )
        for root, state in roots:
            for folder in folders or _folders_in(root):
                for file in files:
                    if found := stat_file(root / folder / file):
                        return PlanItem(file, folder, state, found.st_size, path=root / folder / file)
        return None

    def _in_store(self, layout: Layout, folder: str, file: str) -> PlanItem | None:
        there = look_up_file(layout, folder, file)
        if there.standing is Standing.ABSENT:
            return None
        path, on_volume = layout.model(folder, file), layout is self.volume
        item = PlanItem(file, folder, ItemState.VOLUME if on_volume else ItemState.CONTAINER, there.size_bytes, path=path)
        if there.standing is Standing.READY and there.seal:
            return replace(item, sha256=there.seal.sha256)
        if there.error:
            return replace(item, state=ItemState.INCOMPLETE, message=str(there.error), code=there.error.code)
        return replace(item, state=ItemState.BY_HAND) if on_volume else item

    def _in_image(self, folder: str, file: str) -> PlanItem | None:
        path = self.image / folder / file
        found = stat_file(path)
        if found is None:
            return None
        cached = path.resolve().is_relative_to(self.volume.host_cache)
        return PlanItem(file, folder, ItemState.HOST_CACHE if cached else ItemState.IMAGE, found.st_size, path=path)

    def cached(self, spec: ModelSpec) -> Path | None:
        """Return the model's file in RunPod's host cache, found by its name. The worker checks its hash."""
        return cached_file(self.volume, spec)

    def begun_bytes(self, remote: RemoteFile) -> int:
        """Return how much of a file an interrupted download left on the volume, to be resumed."""
        found = 0
        for journal in self.volume.partial(remote.key).glob("*.journal"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                said = json.loads(journal.read_bytes())
                if said["size"] == remote.size_bytes and journal.with_suffix(".part").exists():
                    found = max(found, Ranges((start, end) for start, end in said["ranges"]).total)
        return min(found, remote.size_bytes)


def _folders_in(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


# --- is there room ----------------------------------------------------------------------------------


def with_space(plan: Plan, settings: Settings, places: Places) -> Plan:
    """Return the plan with the place of the files, the volume or the container's disk, and whether they fit."""
    volume = places.volume.root
    plan = replace(plan, target=volume, free_bytes=free_bytes(volume) if is_volume(volume) else None)
    problem = _no_space(plan, volume) if is_volume(volume) else VolumeMissing(volume)
    limits = EvictionLimits.of_gb(settings.volume_keep_gb, settings.volume_free_gb)
    if plan.to_fetch and limits and isinstance(problem, VolumeFull | None):
        plan, problem = _with_removals(plan, problem, limits, settings, places)
    if problem is None:
        return plan
    if not plan.to_fetch:
        return replace(plan, notes=(*plan.notes, f"{_place_reason(problem)}."))
    if settings.require_volume:
        return replace(plan, problems=(*plan.problems, problem))
    local = next(place for place in (places.local.root, *places.local.root.parents) if place.is_dir())
    there = replace(plan, target=places.local.root, free_bytes=free_bytes(local))
    if too_full := _no_space(there, local):
        return replace(plan, problems=(*plan.problems, problem if isinstance(problem, VolumeFull) else too_full))
    note = f"{_place_reason(problem)}: downloads go to this container's disk, and are lost with it."
    return replace(there, notes=(*plan.notes, note))


def _with_removals(
    plan: Plan, problem: VolumeFull | None, limits: EvictionLimits, settings: Settings, places: Places
) -> tuple[Plan, VolumeFull | None]:
    """Return the plan with what the worker would remove from the place of its files, and the problem if that is not enough."""
    sources = Sources.gather(volume_manifest=places.volume.manifest, manifest=settings.models_manifest, models=settings.models)
    found = survey_for_eviction(places.volume, read_pins(places.volume.root, sources), LeaseTiming())
    short = plan.fetch_bytes - plan.free_bytes if plan.free_bytes is not None else 0
    limits = replace(limits, free_bytes=max(limits.free_bytes or 0, 0) if short > 0 else limits.free_bytes)
    if found.excess(limits, plan.fetch_bytes) <= 0:
        return plan, problem
    note = f"The volume makes room for these models; {eviction_outlook(found, limits, plan.fetch_bytes)}."
    enough = sum(one.size_bytes for one in found.removable) >= short
    return replace(plan, notes=(*plan.notes, note)), None if enough else problem


def _no_space(plan: Plan, place: Path) -> VolumeReadOnly | VolumeFull | None:
    if not os.access(place, os.W_OK):
        return VolumeReadOnly(place, "it is read-only")
    if plan.free_bytes is not None and plan.fetch_bytes > plan.free_bytes:
        return VolumeFull(place, plan.fetch_bytes, plan.free_bytes)
    return None


def _place_reason(problem: VolumeMissing | VolumeReadOnly | VolumeFull) -> str:
    match problem:
        case VolumeMissing():
            return no_volume(problem.path)
        case VolumeReadOnly():
            return f"{problem.path} cannot be written"
        case VolumeFull():
            return f"{problem.path} has no room for {size_text(problem.needed_bytes)}, only for {size_text(problem.free_bytes)}"
