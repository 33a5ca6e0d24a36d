"""The cold start: overlapping steps, each with a logged duration.

ComfyUI takes longest, so it was started before this module was imported. Everything here happens while it boots.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.base.clock import RunningClock, process_start
from worker.base.files import is_volume
from worker.base.text import count
from worker.engine.custom_nodes import report_failed_nodes
from worker.engine.definitions import StoredDefinitions
from worker.engine.engine import Engine
from worker.engine.event_loop import BootMilestones, LoopThread
from worker.errors import VolumeMissing, WorkerError, no_volume
from worker.handler import JobHandler
from worker.links.model_links import ModelLinks
from worker.media.address_guard import AddressRules
from worker.media.delivery import Delivery
from worker.media.inputs import InputFiles, clear_leftover_inputs
from worker.media.url_inputs import UrlFetcher, UrlFetchLimits
from worker.models.job_models import JobModels
from worker.sdk.arguments import prepare_environ, takes_jobs
from worker.sdk.imports import import_sdk
from worker.store.host_cache import link_host_cache
from worker.store.layout import Layout
from worker.store.leases import Leases
from worker.store.pod_links import layout_at
from worker.warmup.warmup_workflow import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from worker.engine.process import EngineCommand, EngineProcess
    from worker.model_spec import ModelSpec
    from worker.models.sources import Sources
    from worker.settings import Settings
    from worker.store.room import Room
    from worker.store.store import Stores
    from worker.warmup.warmup import Warmup

log = logging.getLogger(__name__)


@dataclass(slots=True)
class BootStep:
    """One step of the cold start, in seconds since the process began."""

    name: str
    start_s: float
    end_s: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        took_s = self.end_s - self.start_s
        took = f"{took_s:.2f} s" if took_s >= 0.1 else f"{took_s * 1000:.0f} ms"  # noqa: PLR2004 - below this, ms are easier to read
        return f"{self.name} {took}" + (f" ({self.note})" if self.note else "")


class BootTimeline:
    """The steps of one cold start. Steps overlap and may be recorded from any thread."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._steps: list[BootStep] = []

    @contextlib.contextmanager
    def step(self, name: str, since: float | None = None) -> Iterator[BootStep]:
        """Record how long the body takes, counted from `since` if the step began before. The body may set the step's note."""
        step = BootStep(name, (since or time.monotonic()) - self._began)
        self._steps.append(step)
        yield step
        step.end_s = time.monotonic() - self._began

    def add(self, name: str, since: float, took_s: float, note: str) -> None:
        """Record a step that is over, or that continues while nothing waits for its end."""
        self._steps.append(BootStep(name, since - self._began, since - self._began + took_s, note))

    def summary(self) -> str:
        """Return one line: the whole, then each step in the order of their beginnings. The step that ended last is critical."""
        done = sorted((step for step in self._steps if step.end_s), key=lambda step: step.start_s)
        last = max(done, key=lambda step: step.end_s)
        parts = [f"{step}{', critical' if step is last else ''} [{step.start_s:.2f}-{step.end_s:.2f}]" for step in done]
        return f"cold start {last.end_s:.2f} s: " + "; ".join(parts)


def run(worker: Worker, settings: Settings, arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Boot everything else while ComfyUI boots, then serve. Return the exit status. Raises `StartError`."""
    prepare_environ(environ)
    try:
        early = settings.take_jobs == "booting" and settings.model_loading != "eager" and takes_jobs(arguments, environ)
        worker.start(lambda: import_sdk(arguments, environ), process_start(), wait=not early)

        from worker.sdk.serve import serve  # noqa: PLC0415 - it imports the SDK, which `start` did beside the links

        serve(worker, arguments, environ)
    finally:
        worker.stop()
    return 1 if worker.failed else 0


class Worker:
    """The worker that the cold start assembles: a loop with the engine on it, and the handler in front of them."""

    def __init__(self, settings: Settings, command: EngineCommand, process: EngineProcess, warmup: Warmup) -> None:
        self._settings = settings
        self._process = process
        self._spawned_at = process.spawned_at
        self.loop = LoopThread("engine-loop")
        models = settings.base_dir / "models"
        volume, local = layout_at(settings.volume_path), Layout(settings.local_store)
        roots = [volume.models, local.models]
        self.clock = RunningClock().start()
        self._links = ModelLinks(models, roots, within=[settings.volume_path], host_cache=_host_cache_links(settings))
        self._leases = Leases(volume, _worker_name(settings)) if is_volume(settings.volume_path) else None
        self._room = room_if_limited(settings, self._leases, self.clock) if self._leases else None
        self._job_models = JobModels(
            self._links,
            [volume, local],
            _host_cache_links(settings),
            lambda: read_sources(settings),
            lambda: load_stores(settings, self._room, self.clock),
            hosts=settings.request_hosts,
            leases=self._leases,
        )
        self.failed = False
        self.leave: Callable[[], None] = _terminate
        """What ends this worker when its engine is gone for good, from any thread."""
        self._boot = BootMilestones()
        self._waited_for = True
        self._stopped = False
        if self._leases:
            self.clock.on_thaw(self._leases.forget)
        self._engine = Engine(settings, command, process, self._give_up, self.clock)
        rules = AddressRules(settings.input_url_hosts, settings.input_url_allow_private)
        limits = UrlFetchLimits(settings.input_max_mb * 1_000_000, settings.input_timeout_s)
        inputs = InputFiles(settings.base_dir / "input", UrlFetcher(rules, limits, clock=self.clock))
        self._delivery = Delivery.of(settings)
        self._warmup = warmup
        state = volume.definitions if is_volume(settings.volume_path) else None
        nodes = [folder / "custom_nodes" for folder in dict.fromkeys((settings.comfyui_dir, settings.base_dir))]
        kept = StoredDefinitions(state, command, nodes)
        self.handler = JobHandler(
            settings, self._engine, self._job_models, inputs, self._delivery, warmup=self._warmup, boot=self._boot, kept=kept
        )

    def start(self, import_sdk: Callable[[], object], began: float, *, wait: bool = True) -> None:
        """Do everything that must be done before the first job, in parallel. With `wait` return when that is done.

        Without it return when the SDK is imported: jobs wait for what they need. If that never comes they fail with the cause,
        `failed` is set and `leave` called.

        Raises `VolumeMissing` if a volume is required and missing. With `wait` also `StartError` if ComfyUI does not start, and
        with MODEL_LOADING=eager `ManifestInvalid` and any `ModelError`.
        """
        if self._settings.require_volume and not is_volume(self._settings.volume_path):
            raise VolumeMissing(self._settings.volume_path)
        self._waited_for = wait
        if not wait:
            self.leave = _leave_later
        timeline = BootTimeline(began)
        up = self.loop.submit(self._start_engine(timeline))
        up.add_done_callback(self._look)
        threading.Thread(target=self._finish, args=(timeline, up), name="boot", daemon=True).start()
        with timeline.step("sdk"):
            import_sdk()
        self._delivery.start()
        if wait:
            self._boot.ready.wait_here()

    def _look(self, up: Future[None]) -> None:
        """End the start at once if ComfyUI does not come up: models may be on their way, or a volume may hang."""
        if not up.cancelled() and (error := up.exception()):
            self._fail(error)

    def _finish(self, timeline: BootTimeline, up: Future[None]) -> None:
        try:
            self._supply_models(timeline)
            up.result()
            if warmed := self._warmup.warmed():
                timeline.add("warm", warmed.began_s, warmed.seconds, warmed.what)
            if self._settings.warmup_workflow:
                began_s = time.monotonic()
                if note := self.loop.submit(self._run_warmup()).result():
                    timeline.add("warm-up", began_s, time.monotonic() - began_s, note)
            self._report_custom_nodes()
        except BaseException as exc:  # noqa: BLE001 - whatever it is, jobs wait for this
            self._fail(exc)
        else:
            if not self._stopped:  # a warm-up also ends if the worker leaves meanwhile
                log.info("%s", timeline.summary())
            self._boot.ready.reach()

    def _fail(self, error: BaseException) -> None:
        if self.failed or self._stopped:
            return
        self.failed = True
        self._job_models.stop()
        self._boot.linked.fail(error)
        self._boot.ready.fail(error)
        if not self._waited_for:
            log.error("%s", error, exc_info=None if isinstance(error, WorkerError) else error)
            self.leave()

    def _pin(self, wanted: Iterable[ModelSpec]) -> None:
        """Let workers of other endpoints know what this one's manifests name: they cannot read its environment."""
        if self._leases:
            self._leases.pin(f"{spec.folder}/{spec.name}" for spec in wanted)

    async def _start_engine(self, timeline: BootTimeline) -> None:
        with timeline.step("engine", self._spawned_at):
            await self._engine.start()

    def stop(self) -> None:
        """End the downloads, the engine and the loop."""
        self._stopped = True
        self._warmup.stop()
        self._job_models.stop()
        if self._room:
            self._room.stop()
        if self._leases:
            self._leases.stop()
        self.loop.submit(self._engine.stop()).result(timeout=30)
        self.loop.stop()
        self.clock.stop()

    async def _run_warmup(self) -> str:
        return await warm_up(self._engine, self._warmup.graph, self._settings.warmup_timeout_s)

    def _report_custom_nodes(self) -> None:
        """Report custom nodes that ComfyUI started without, also the image's, in the log and for `doctor`."""
        failed = self._process.failed_imports
        if failed or (self._settings.volume_path / "custom_nodes").is_dir():
            report_failed_nodes(self._settings, failed)

    def _give_up(self) -> None:
        """Leave as if RunPod had asked for it: accepted jobs get the engine's failure, no more are taken."""
        self.failed = True
        self.leave()

    def _supply_models(self, timeline: BootTimeline) -> None:
        settings = self._settings
        with timeline.step("links") as step:
            clear_leftover_inputs(settings.base_dir / "input")
            with self._warmup.standing_back():
                link_host_cache(self._warmup.copies(), Layout(settings.volume_path.resolve()), _host_cache_links(settings))
                report = self._links.refresh()
            step.note = f"{report.files} files"
        self._warmup.linked(self._job_models)
        self._boot.linked.reach()
        _log_volume(settings)
        if self._room:
            self._room.keep()
        if settings.model_loading == "eager":
            with timeline.step("models") as step:
                self._job_models.check_manifests()
                wanted = self._job_models.manifest()
                self._pin(wanted)
                step.note = f"{len(wanted)} in the manifests"
                self._job_models.fetch_first(wanted)
            return
        if not (settings.models_manifest or settings.models or Layout(settings.volume_path).manifest.is_file()):
            return
        wanted = self._job_models.manifest()
        self._pin(wanted)
        if settings.model_loading == "background":
            self._job_models.fetch_behind(wanted)


def _terminate() -> None:
    """End a worker whose boot failed, as if RunPod, or who runs the container, had asked for it."""
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_later() -> None:
    """Do nothing when the boot fails: the job loop, which has not begun, looks at `failed` when it does."""


def _host_cache_links(settings: Settings) -> Path:
    """Return the folder of links to RunPod's host cache, which every boot creates anew."""
    return settings.base_dir / "host-cache-links"


def _log_volume(settings: Settings) -> None:
    root = layout_at(settings.volume_path).models
    if not is_volume(settings.volume_path):
        log.warning("%s. Models are kept on this container's disk and are lost with it.", no_volume(settings.volume_path))
    elif not root.is_dir():
        log.info("there is no %s yet: the first download creates it", root)
    elif settings.network_volume_debug:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            log.info("volume: %s has %s: %s", folder, count(names, "file"), ", ".join(names) or "none")


def _worker_name(settings: Settings) -> str:
    """Return what other workers call the booted one."""
    return settings.runpod_pod_id or socket.gethostname()


def read_sources(settings: Settings) -> Sources:
    """Read, at boot or later, every list of models that these settings name."""
    from worker.models.sources import Sources  # noqa: PLC0415 - 25 ms, only for a job's missing models and for manifests

    manifest = Layout(settings.volume_path).manifest
    return Sources.gather(volume_manifest=manifest, manifest=settings.models_manifest, models=settings.models)


def room_if_limited(settings: Settings, leases: Leases, clock: Callable[[], float]) -> Room | None:
    """Build what the booted worker makes room on the volume with, if the settings limit how full it may get."""
    if settings.volume_keep_gb is None and settings.volume_free_gb is None:
        return None
    from worker import downloads  # noqa: PLC0415 - 0.2 s, only for workers that remove models

    return downloads.build_room(settings, _worker_name(settings), leases, lambda: read_sources(settings), clock)


def load_stores(settings: Settings, room: Room | None = None, clock: Callable[[], float] = time.monotonic) -> Stores:
    """Build, for the booted worker, the stores that its first missing model needs."""
    from worker import downloads  # noqa: PLC0415 - 0.2 s, only for workers that miss a model

    return downloads.build_store(settings, _worker_name(settings), room, clock)
