"""Check whether the downloads fit at their destination. Reads the disk."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.base.text import size_text
from worker.base.volume import is_volume
from worker.errors import VolumeFull, VolumeMissing, VolumeReadOnly, no_volume
from worker.store.disk import free_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from worker.plan.items import Plan
    from worker.plan.places import Places
    from worker.settings import Settings


def with_room(plan: Plan, settings: Settings, places: Places) -> Plan:
    """Return the plan with the files' destination, the volume or the container's disk, and whether they fit."""
    volume = places.volume.root
    plan = replace(plan, target=volume, free_bytes=free_bytes(volume) if is_volume(volume) else None)
    problem = _no_room(plan, volume) if is_volume(volume) else VolumeMissing(volume)
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


def _no_room(plan: Plan, place: Path) -> VolumeReadOnly | VolumeFull | None:
    if not os.access(place, os.W_OK):
        return VolumeReadOnly(place, "it is read-only")
    if plan.free_bytes is not None and plan.fetch_bytes > plan.free_bytes:
        return VolumeFull(place, plan.fetch_bytes, plan.free_bytes)
    return None


def _reason(problem: VolumeMissing | VolumeReadOnly | VolumeFull) -> str:
    match problem:
        case VolumeMissing():
            return no_volume(problem.path)
        case VolumeReadOnly():
            return f"{problem.path} cannot be written"
        case VolumeFull():
            return f"{problem.path} has no room for {size_text(problem.needed_bytes)}, only for {size_text(problem.free_bytes)}"
