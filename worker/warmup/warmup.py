"""Read weights into memory while ComfyUI boots, and optionally load them onto the GPU. Threads, disk.

This joins a graph's model names with their files, the reader, and the record for the endpoint's next workers. No error here
fails a job or a start: without a warm-up they are only slower.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.base.files import is_volume
from worker.base.text import count
from worker.errors import UnsafePath, WorkerError
from worker.graph.graph import parse_graph
from worker.graph.model_names import named_models, with_slashes
from worker.graph.paths import check_paths
from worker.store.host_cache import cached_copies
from worker.store.layout import Layout
from worker.warmup.loading_graph import loading_part, runnable_part
from worker.warmup.memory import free_memory_bytes
from worker.warmup.read_ahead import WeightsReader
from worker.warmup.recent_models import RecentModels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from worker.graph.graph import Graph
    from worker.graph.model_names import NamedModel
    from worker.models.job_models import JobModels, Name
    from worker.settings import Settings
    from worker.warmup.read_ahead import ReadAheadResult

log = logging.getLogger(__name__)

_NO_ENDPOINT: Final = "local"
# A record and a few seals take milliseconds. A longer wait would delay links, and with them jobs, for an optimisation.
_COPIES_S: Final = 3.0


class Warmup:
    """Reads ahead for a start and for jobs, and records models for the next start. No call waits for the disk.

    Safe to use from any thread. Call `begin` as early as possible, and `linked` when the models' names can be looked up.
    """

    def __init__(self, settings: Settings, warmer: WeightsReader | None = None) -> None:
        self._settings = settings
        self._job_models: JobModels | None = None
        self._warmer = warmer or WeightsReader(lambda: int(settings.warm_memory_share * free_memory_bytes()))
        self._reads = settings.warm_models != ()
        self._used: RecentModels | None = None
        self.graph: Future[Graph | None] = Future()
        """The warm-up workflow, if there is one, as soon as the volume gave it."""
        self._copies: Future[dict[Path, Path]] = Future()
        self._recent: list[Path] = []
        self._names: frozenset[Name] = frozenset()
        # One thread does all disk work, in order, while jobs continue.
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="warmth", daemon=True)

    def begin(self) -> None:
        """Begin to read what the endpoint's last jobs used. The record has the paths on the volume."""
        self._work.put(self._read_used)
        self._thread.start()

    def copies(self) -> dict[Path, Path]:
        """Return the volume's models with a copy in RunPod's host cache, which is read instead. Empty after a time-out.

        ComfyUI must then use the copies, or it reads files that were not read ahead.
        """
        with suppress(TimeoutError):
            return self._copies.result(_COPIES_S)
        return {}

    def linked(self, job_models: JobModels) -> None:
        """Note that ComfyUI can find the models, so that models known by name can be read as well."""
        self._work.put(lambda: self._read_named(job_models))

    def job(self, models: Iterable[NamedModel]) -> None:
        """Read the models of a job now, and nothing else. Do nothing if they are the last job's models."""
        names = _names_of(models)
        if self._reads and names and not self._names.issuperset(names):
            self._work.put(lambda: self._warmer.warm(_real_files(self._located(names))))
        self._names = frozenset(names) or self._names

    def fetched(self) -> None:
        """Note that a job's models were downloaded: what of them is not in memory is read, whichever job needs it."""
        self._names = frozenset()

    def is_new(self, models: Iterable[NamedModel]) -> bool:
        """Return whether a job with these models has something read."""
        names = _names_of(models)
        return self._reads and bool(names) and not self._names.issuperset(names)

    def standing_back(self) -> AbstractContextManager[None]:
        """Read nothing while the body runs: a job waits for a download to the same disk."""
        return self._warmer.standing_back()

    def ran(self, graph: Graph, models: Iterable[NamedModel]) -> None:
        """Record the models of a job that ran, for the endpoint's next workers."""
        if names := _names_of(models):
            self._work.put(lambda: self._remember(graph, names))

    def warmed(self) -> ReadAheadResult | None:
        """Return the state of the reading, or None if there was nothing to read."""
        warmed = self._warmer.warmed()
        return warmed if warmed.began_s else None

    def stop(self) -> None:
        """Stop reading and recording."""
        self._work.put(None)
        self._warmer.stop()

    # --- in the thread `warmup`

    def _run(self) -> None:
        while work := self._work.get():
            try:
                work()
            except Exception:
                log.exception("reading ahead stopped by a defect of the worker")

    def _read_used(self) -> None:
        copies: dict[Path, Path] = {}
        try:
            copies = cached_copies(Layout(self._settings.volume_path.resolve()))
        finally:
            self._copies.set_result(copies)
        self._used = _endpoint_record(self._settings)
        if self._used and self._settings.warm_models is None:
            self._recent = [copies.get(path, path) for path in self._used.files()]
        if self._recent:
            self._warmer.warm(self._recent)

    def _read_named(self, job_models: JobModels) -> None:
        """Read for the warm-up workflow, then for the settings, then for the last jobs."""
        self._job_models = job_models
        graph = self._warmup_graph()
        self.graph.set_result(graph)
        names = [_as_name(name) for name in self._settings.warm_models or ()]
        listed = self._located(names)
        if len(listed) < len(names):
            log.warning("WARM_MODELS names %s, of which %d exist", count(names, "model"), len(listed))
        files = _real_files([*self._located(_names_of(named_models(graph)) if graph else ()), *listed])
        if files and self._reads:
            self._warmer.warm([*files, *self._recent])

    def _remember(self, graph: Graph, names: Sequence[Name]) -> None:
        if self._used:
            part = loading_part(graph) if self._settings.warmup_workflow == "auto" else None
            self._used.note([self._on_volume(path) for path in self._located(names)], part)

    def _on_volume(self, path: Path) -> Path:
        """Return the volume's own file of a model, also if ComfyUI uses a copy of it."""
        with suppress(ValueError):
            own = self._settings.volume_path / "models" / path.relative_to(self._settings.base_dir / "models")
            return own if own.is_file() else path
        return path

    def _located(self, names: Sequence[Name]) -> list[Path]:
        return self._job_models.located(names) if self._job_models else []

    def _warmup_graph(self) -> Graph | None:
        wanted = self._settings.warmup_workflow
        if wanted is None:
            return None
        try:
            if isinstance(wanted, Path):
                graph = parse_graph(json.loads(wanted.read_bytes()))
                check_paths(graph)
                return with_slashes(graph, named_models(graph))
            # Anyone who can write to the volume could have written it: run only what this worker would have stored itself.
            remembered: Any = self._used.warmup() if self._used else None
            part = loading_part(parse_graph(remembered)) if remembered else None
            return runnable_part(part) if part else None
        except (OSError, ValueError, WorkerError) as exc:
            log.warning("no warm-up: %s: %s", wanted, exc)
            return None


def _endpoint_record(settings: Settings) -> RecentModels | None:
    """Return the endpoint's record of recent models for the warm-up. None without a volume, or if nothing would read it."""
    reads_it = settings.warm_models is None or settings.warmup_workflow == "auto"
    if not (reads_it and is_volume(settings.volume_path)):
        return None
    try:
        path = Layout(settings.volume_path).used(settings.runpod_endpoint_id or _NO_ENDPOINT)
    except UnsafePath:
        return None
    return RecentModels(settings.volume_path, path)


def _real_files(paths: Iterable[Path]) -> list[Path]:
    """Return the real files to warm up: ComfyUI's links and the record's names may be two paths to one."""
    return [path.resolve() for path in paths]


def _names_of(models: Iterable[NamedModel]) -> list[Name]:
    return list(dict.fromkeys((model.folders, model.file_names) for model in models))


def _as_name(text: str) -> Name:
    """Parse one model of the warm-up's setting: `folder/name`, or `name` for any folder."""
    folder, _, name = text.partition("/")
    return ((folder,), (name,)) if name else ((), (folder,))
