"""What every action of the seeder shares: the target, the models, the output. Builds the parts."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Final

from rich.console import Console

from worker.errors import ManifestInvalid
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.fetch.ranges import RangeTuning
from worker.models.lists import SpecList
from worker.models.sources import Sources
from worker.pins import read_pins
from worker.seed.errors import S3Unreachable, SeedUsage
from worker.seed.fill import MountedFiller, S3Filler
from worker.seed.options import keys_from
from worker.seed.relay import RelayLoad
from worker.seed.s3_api import s3_api_at
from worker.seed.s3_volume import S3Volume
from worker.seed.screen import ScreenBars, ScreenJson, ScreenLines
from worker.seed.selection import Selection
from worker.seed.sibling import Sibling
from worker.seed.volumes import MountedVolume
from worker.store.eviction import EvictionLimits, survey_for_eviction
from worker.store.leases import LeaseTiming
from worker.store.pod_links import layout_at
from worker.store.room import Room, source_check
from worker.store.store import Store

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from worker.model_spec import ModelSpec
    from worker.seed.errors import SeedError
    from worker.seed.fill import Filler
    from worker.seed.options import SeedOptions
    from worker.seed.s3_api import S3Api
    from worker.seed.screen import SeedScreen
    from worker.seed.volumes import SeedVolume
    from worker.settings import Settings
    from worker.store.eviction import EvictionPins, Survey
    from worker.store.layout import Layout

_WIDE: Final = 160
_NAME: Final = f"seeder-{socket.gethostname()}"
_S3_CALLS: Final = 8


@dataclass(frozen=True, slots=True)
class SeedTarget:
    """What a seeder's run fills and maintains."""

    filler: Filler
    volumes: tuple[SeedVolume, ...]
    manifests: tuple[str, ...]
    """The text of `models.toml` on each volume that has one."""
    away: tuple[SeedError, ...] = ()
    """For each unreachable volume the reason."""


class SeedContext:
    """What every action of the seeder shares in one run."""

    def __init__(
        self, options: SeedOptions, settings: Settings, environ: Mapping[str, str], stream: IO[str], cancel: threading.Event
    ) -> None:
        self.options = options
        self.settings = settings
        self.cancel = cancel
        self.stream = stream
        self.console = Console(file=stream, highlight=False)
        if not self.console.is_terminal:
            self.console = Console(file=stream, highlight=False, width=_WIDE)
        self.left_out: set[str] = set()
        self.hub = _hub(settings)
        self._environ = environ
        self._volumes: tuple[SeedVolume, ...] = ()
        self.room: Room | None = None
        self.sibling: Sibling | None = None

    def place(self) -> SeedTarget:
        """Return the target. Raises `SeedUsage`, `S3KeysMissing`, and for S3 what `S3Api.check` raises."""
        place = self._place()
        self._volumes = place.volumes
        return place

    def _place(self) -> SeedTarget:
        if self.options.places:
            return self._over_s3()
        root = (self.options.volume or self.settings.volume_path).absolute()
        if not hasattr(os, "fork"):
            raise SeedUsage("A mounted volume can be filled on Linux, macOS or WSL; from Windows use --s3.")
        if not root.is_dir():
            raise SeedUsage(f"There is no folder {root}: say with --volume where the volume is mounted, or use --s3.")
        layout = layout_at(root)
        tuning = RangeTuning(connections=self.settings.download_connections)
        self.room = self._room(layout)
        store = Store(layout, self.hub, _NAME, tuning=tuning, room=self.room if self._limits() else None)
        manifests = (layout.manifest.read_text("utf-8-sig"),) if layout.manifest.is_file() else ()
        return SeedTarget(MountedFiller(store), (MountedVolume(layout),), manifests)

    def _limits(self) -> EvictionLimits:
        keep_gb = self.settings.volume_keep_gb if self.options.keep_gb is None else self.options.keep_gb
        return EvictionLimits.of_gb(keep_gb, self.settings.volume_free_gb)

    def _room(self, layout: Layout) -> Room:
        """Return what makes room on a mounted volume."""
        return Room(
            layout, _NAME, self._limits(), lambda: self.pins(layout), ask=source_check(lambda: self.hub), on_notice=self._wait
        )

    def _wait(self, left_s: float) -> None:
        self.tell(f"Workers on this volume have {left_s:.0f} s to say what they use before a model is removed; waiting.")

    def pins(self, layout: Layout) -> EvictionPins:
        """Return what people name on a mounted volume, and in this environment."""
        settings = self.settings
        sources = Sources.gather(volume_manifest=layout.manifest, manifest=settings.models_manifest, models=settings.models)
        return read_pins(layout.root, sources)

    def survey(self) -> Survey | None:
        """Return the uses of a mounted volume's models and their order. None through S3."""
        layout = self.room.layout if self.room else None
        return survey_for_eviction(layout, self.pins(layout), LeaseTiming()) if layout else None

    def _over_s3(self) -> SeedTarget:
        """Return all reachable volumes. Raises other errors of a volume, and an error if none is reachable."""
        keys, load = keys_from(self._environ), RelayLoad()
        buckets = [s3_api_at(place, keys, load.uploads + _S3_CALLS) for place in self.options.places]
        volumes: list[S3Volume] = []
        manifests: list[str] = []
        away: dict[str, SeedError] = {}
        # In parallel: an unreachable data centre takes minutes to time out.
        with ThreadPoolExecutor(len(buckets), thread_name_prefix="reach") as pool:
            for bucket, asked in [(bucket, pool.submit(_check_target, bucket)) for bucket in buckets]:
                try:
                    manifest = asked.result()
                except S3Unreachable as exc:
                    away[bucket.place.title] = exc
                    continue
                volumes.append(S3Volume(bucket))
                manifests += [manifest.decode("utf-8-sig")] if manifest else []
        if self.options.sync_from:
            source = s3_api_at(self.options.sync_from, keys, load.downloads + _S3_CALLS)
            source.check()
            self.sibling = Sibling(S3Volume(source))
        for error in away.values():
            if not volumes:
                raise error
            self.tell(f"warning: {error}")
        return SeedTarget(
            S3Filler(self.hub, volumes, load, away, self.sibling), tuple(volumes), tuple(manifests), tuple(away.values())
        )

    def sources(self, place: SeedTarget) -> Sources:
        """Return the lists of models as workers on these volumes have them."""
        sources = Sources.read(manifest=self.settings.models_manifest, models=self.settings.models)
        try:
            # A line end distinguishes the text of a manifest from its path.
            found = [Sources.read(manifest=f"{text}\n").manifests for text in place.manifests]
        except ManifestInvalid as exc:
            raise ManifestInvalid("models.toml on the volume", exc.problems) from exc
        on_volumes = [SpecList("models.toml", models.specs, odd=models.odd) for lists in found for models in lists]
        sources = replace(sources, manifests=(*on_volumes, *sources.manifests))
        self.warn(sources)
        return sources

    def warn(self, sources: Sources) -> None:
        """Warn about entries that were left out because no file can have their name."""
        for fault in sources.odd:
            if str(fault) not in self.left_out:
                self.left_out.add(str(fault))
                self.tell(f"warning: {fault}")

    def selection(self, sources: Sources) -> Selection:
        """Return the reader of the WHATs."""
        hosts, folder = self.settings.request_hosts, self.options.folder
        return Selection(sources, self.hub, hosts, folder, self.cancel, volumes=self._volumes, tell=self.tell, warn=self.warn)

    def named_models(self, sources: Sources) -> dict[str, ModelSpec]:
        """Return by `folder/name` every model that a list or a WHAT names."""
        items = self.selection(sources).read(self.options.whats) if self.options.whats else ()
        named: dict[str, ModelSpec] = {}
        for spec in [*(item.spec for item in items if item.spec), *sources.manifest()]:
            named.setdefault(f"{spec.folder}/{spec.name}", spec)
        return named

    def screen(self) -> SeedScreen:
        """Return the output for progress: JSON for a program, bars for a terminal, or lines for a log."""
        if self.options.json:
            return ScreenJson(self.stream)
        return ScreenBars(self.console) if self.console.is_terminal else ScreenLines(self.stream)

    def show(self, event: str, table: Callable[[], Any], **values: Any) -> None:  # noqa: ANN401 - JSON
        """Show a result: a table for people, an event for programs."""
        if self.options.json:
            ScreenJson(self.stream).tell(event, **values)
        else:
            self.console.print(table())

    def tell(self, text: str) -> None:
        """Show a sentence besides the result."""
        tell(text, self.stream, as_json=self.options.json)


def tell(text: str, stream: IO[str], *, as_json: bool) -> None:
    """Print a sentence in the seeder's context, where people or programs look for it."""
    if as_json:
        ScreenJson(stream).say(text)
    else:
        print(text, file=sys.stderr)  # noqa: T201 - the command's output


def _hub(settings: Settings) -> Hub:
    tokens = credentials(settings.hf_endpoint, settings.hf_token, settings.civitai_token)
    return Hub(settings.hf_endpoint, Network(tokens, urllib.request.getproxies()))


def _check_target(bucket: S3Api) -> bytes | None:
    """Check, for the seeder's context, that the target exists and the keys work. Return its `models.toml`."""
    bucket.check()
    return S3Volume(bucket).manifest()
