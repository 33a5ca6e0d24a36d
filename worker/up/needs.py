"""The models that a workflow needs on its volume, with their sources and sizes. Reads files and asks the sources."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worker.models.sources import Sources
from worker.plan.items import FETCHED
from worker.plan.lookup import ask_sources_in_time
from worker.plan.plan_command import make_hub
from worker.seed.selection import Selection
from worker.up.errors import ModelsNotReady

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.plan.items import PlanItem
    from worker.settings import Settings

_DEADLINE_S = 40.0


@dataclass(frozen=True, slots=True)
class Needs:
    """The models that a workflow needs. `digest` changes with the workflow and with the lists of models beside it."""

    items: tuple[PlanItem, ...]
    digest: str

    @property
    def fetched(self) -> tuple[PlanItem, ...]:
        """Return the models that go onto the volume."""
        return tuple(item for item in self.items if item.state in FETCHED and item.spec)

    @property
    def size_bytes(self) -> int:
        """Return their total size, as far as it is known."""
        return sum(item.size_bytes or 0 for item in self.fetched)

    @property
    def unknown_sizes(self) -> int:
        """Return how many have an unknown size."""
        return sum(item.size_bytes is None for item in self.fetched)

    def manifest(self) -> str:
        """Return the models as a manifest that the worker and the seeder read."""
        specs = [item.spec for item in self.fetched if item.spec]
        models = [
            {"folder": spec.folder, "name": spec.name, "source": str(spec.source)}
            | ({"sha256": spec.sha256} if spec.sha256 else {})
            for spec in specs
        ]
        return json.dumps({"models": models})

    def check(self) -> None:
        """Raise `ModelsNotReady` if something blocks the workflow that no volume can solve."""
        if blocking := [f"{item.title} ({item.state})" for item in self.items if item.blocking]:
            raise ModelsNotReady(blocking)


def needs_digest(workflow: str, whats: Sequence[str]) -> str:
    """Return a digest of a workflow and its lists of models, which changes with its needs."""
    found = hashlib.sha256()
    for what in (workflow, *whats):
        path = Path(what)
        found.update(path.read_bytes() if path.is_file() else what.encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def read_needs(workflow: str, whats: Sequence[str], settings: Settings, tell: Callable[[str], None]) -> Needs:
    """Return what the workflow needs, with its sources' answers. Raises what `Selection.read` raises."""
    hub = make_hub(settings)
    sources = Sources.read(manifest=settings.models_manifest, models=settings.models)
    wants = Selection(sources, hub, settings.request_hosts, None, threading.Event(), tell=tell)
    items = ask_sources_in_time(wants.read([workflow, *whats]), hub, lambda _: 0, _DEADLINE_S)
    return Needs(items, needs_digest(workflow, whats))
