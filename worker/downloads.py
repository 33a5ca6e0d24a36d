"""Build what downloads models and makes room for them. Imported for the first model that is missing: that takes 0.2 s."""

from __future__ import annotations

import time
import urllib.request
from functools import cache, partial
from typing import TYPE_CHECKING

from worker.base.files import is_volume
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.pins import read_pins
from worker.store.eviction import EvictionLimits
from worker.store.layout import Layout
from worker.store.pod_links import layout_at
from worker.store.room import Room, source_check
from worker.store.store import RangeTuning, Store, Stores

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.models.sources import Sources
    from worker.settings import Settings
    from worker.store.leases import Leases


def build_room(
    settings: Settings, worker: str, leases: Leases, read_sources: Callable[[], Sources], clock: Callable[[], float]
) -> Room:
    """Build what makes room for downloads on the volume, whose fullness the settings limit."""
    return Room(
        layout_at(settings.volume_path),
        worker,
        EvictionLimits.of_gb(settings.volume_keep_gb, settings.volume_free_gb),
        lambda: read_pins(settings.volume_path, read_sources()),
        leases=leases,
        ask=source_check(cache(partial(build_hub, settings, clock))),
        # With the container's disk to fall back on, a job need not wait until models are out of use.
        patience_s=leases.timing.grace_s if settings.require_volume else 0.0,
        clock=clock,
    )


def build_hub(settings: Settings, clock: Callable[[], float] = time.monotonic) -> Hub:
    """Build the hub that downloads ask for their files."""
    network = Network(credentials(settings.hf_endpoint, settings.hf_token, settings.civitai_token), urllib.request.getproxies())
    return Hub(settings.hf_endpoint, network, clock=clock)


def build_store(settings: Settings, worker: str, room: Room | None, clock: Callable[[], float]) -> Stores:
    """Build the stores for downloads: the volume's, with the container's disk as fallback."""
    hub = build_hub(settings, clock)
    tuning = RangeTuning(connections=settings.download_connections)
    volume = layout_at(settings.volume_path)
    mounted = is_volume(settings.volume_path)
    local = Store(Layout(settings.local_store), hub, worker, tuning=tuning, host_cache=volume)
    shared = Store(volume, hub, worker, tuning=tuning, room=room) if mounted else None
    return Stores(settings.volume_path, shared, local, require_volume=settings.require_volume)
