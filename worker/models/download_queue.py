"""The order of downloads: a job's own models first, then those of the manifests in the background. Touches threads.

There is one queue, and a few downloads run at a time, because each takes memory and connections. While any job waits for a
model, no background download runs: it stops at once and resumes later from what it has. A download that no job waits for and no
manifest names stops.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from worker.base.text import size_text
from worker.errors import EnsureCancelled, InternalError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from worker.base.progress import CancelToken, Listener, ModelProgress
    from worker.model_spec import ModelSpec
    from worker.store.download import ReadyModel

log = logging.getLogger(__name__)

_FILES_AT_ONCE = 3
_TELL_EVERY_S = 0.5


class Ensurer(Protocol):
    """What makes a model of the download queue available. `Stores` is one."""

    def ensure(self, spec: ModelSpec, progress: Listener, cancel: CancelToken | None) -> ReadyModel:
        """Return when the model is available. Raises a `WorkerError`."""
        ...


@dataclass(frozen=True, slots=True)
class JobWait:
    """What a job waits for in the download queue, all its models together."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    models: tuple[tuple[str, ModelProgress | None], ...]
    """`folder/name` of each model that is not there yet, with its progress."""

    def __str__(self) -> str:
        return "; ".join(f"{name}: {progress or 'queued'}" for name, progress in self.models)


@dataclass(eq=False, slots=True)
class _QueuedDownload:
    """The download of one model in the queue, for whoever wants it."""

    spec: ModelSpec
    order: int
    wanted: bool = False
    """A manifest names it: it is downloaded even if no job waits."""
    jobs: int = 0
    running: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    progress: ModelProgress | None = None
    result: ReadyModel | None = None
    error: WorkerError | None = None

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def rank(self) -> tuple[bool, int]:
        """Return the sort key, smallest first: what jobs wait for, then the order of requests."""
        return (self.jobs == 0, self.order)

    @property
    def place(self) -> tuple[str, str]:
        """Return where its file belongs. Two models that differ in source or pin may belong to one place."""
        return (self.spec.folder, self.spec.name)


class DownloadQueue:
    """Downloads models in the right order. Safe to use from any thread. Its own threads end when there is no work.

    `on_ready` is called in a download thread for each model that is available, before any waiter continues.
    """

    def __init__(
        self, store: Ensurer, on_ready: Callable[[ModelSpec, ReadyModel], None], files_at_once: int = _FILES_AT_ONCE
    ) -> None:
        self._store = store
        self._on_ready = on_ready
        self._slots = files_at_once
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._fetches: dict[ModelSpec, _QueuedDownload] = {}
        self._stopped = threading.Event()

    def want(self, specs: Iterable[ModelSpec]) -> None:
        """Download these in the background and return at once. Errors are logged and do not affect the others."""
        with self._changed:
            for spec in specs:
                self._fetch_of(spec).wanted = True
            self._schedule()

    def wait(
        self, specs: Sequence[ModelSpec], cancel: CancelToken, on_progress: Callable[[JobWait], None] | None = None
    ) -> None:
        """Return when all are available. They go before everything that no job waits for.

        `on_progress` is called about twice a second. Raises the first model's error, whatever happens to the others;
        `EnsureCancelled` soon after `cancel` is set, and at once after `stop`.
        """
        with self._changed:
            fetches = self._joined(specs)
        self._finish(fetches, cancel, on_progress)

    def settle(self, specs: Sequence[ModelSpec]) -> None:
        """Request these, and return when each is available or has failed. Raises the first error, or `EnsureCancelled`."""
        with self._changed:
            fetches = self._joined(specs)
            for fetch in fetches:
                fetch.wanted = True
        self._finish(fetches, threading.Event(), None)

    def stop(self) -> None:
        """End every download and start none any more. Any worker can resume them."""
        self._stopped.set()
        with self._changed:
            for fetch in self._fetches.values():
                fetch.wanted = False
                fetch.stop.set()
            self._drop_unwanted()
            self._changed.notify_all()

    def _joined(self, specs: Iterable[ModelSpec]) -> list[_QueuedDownload]:
        fetches = [self._fetch_of(spec) for spec in specs]
        for fetch in fetches:
            fetch.jobs += 1
        self._schedule()
        return fetches

    def _finish(
        self, fetches: Sequence[_QueuedDownload], cancel: CancelToken, on_progress: Callable[[JobWait], None] | None
    ) -> None:
        try:
            self._await(fetches, cancel, on_progress)
        finally:
            with self._changed:
                for fetch in fetches:
                    fetch.jobs -= 1
                self._drop_unwanted()
                self._schedule()

    def _await(
        self, fetches: Sequence[_QueuedDownload], cancel: CancelToken, on_progress: Callable[[JobWait], None] | None
    ) -> None:
        while True:
            with self._changed:
                for fetch in fetches:
                    if fetch.error:
                        raise fetch.error
                waiting = _waiting(fetches)
                if not waiting.models:
                    return
                if not self._is_over(cancel):
                    self._changed.wait(_TELL_EVERY_S)
            if self._is_over(cancel):
                raise EnsureCancelled(waiting.models[0][0])
            if on_progress:
                on_progress(waiting)

    def _is_over(self, cancel: CancelToken) -> bool:
        return cancel.is_set() or self._stopped.is_set()

    def _fetch_of(self, spec: ModelSpec) -> _QueuedDownload:
        """Return the running download of this very model, or a new one. A finished one is checked again."""
        fetch = self._fetches.get(spec)
        if fetch is None or fetch.ended:
            fetch = self._fetches[spec] = _QueuedDownload(spec, next(self._numbers))
        return fetch

    def _schedule(self) -> None:
        """Start the first ones in the free slots, and make room for jobs."""
        if self._stopped.is_set():
            return
        open_ = sorted((fetch for fetch in self._fetches.values() if not fetch.ended), key=lambda fetch: fetch.rank)
        jobs_wait = any(fetch.jobs for fetch in open_)
        for fetch in open_:
            if jobs_wait and not fetch.jobs:
                fetch.stop.set()
        running = [fetch for fetch in open_ if fetch.running]
        # A job does not wait until a paused download has ended; the next background download does.
        staying = [fetch for fetch in running if not fetch.stop.is_set()]
        for fetch in open_:
            if len(staying if fetch.jobs else running) >= self._slots:
                break
            if fetch.running or not (fetch.jobs or (fetch.wanted and not jobs_wait)):
                continue
            if any(other.place == fetch.place for other in staying):
                continue  # both would download all of it, one of them for nothing
            self._start(fetch)
            running.append(fetch)
            staying.append(fetch)

    def _start(self, fetch: _QueuedDownload) -> None:
        fetch.running = True
        fetch.stop = threading.Event()
        threading.Thread(target=self._run, args=(fetch,), name=f"fetch-{fetch.spec.name}", daemon=True).start()

    def _drop_unwanted(self) -> None:
        for fetch in self._fetches.values():
            if not (fetch.wanted or fetch.jobs):
                fetch.stop.set()
        self._fetches = {
            spec: fetch
            for spec, fetch in self._fetches.items()
            if fetch.running or ((fetch.wanted or fetch.jobs) and not fetch.ended)
        }

    def _run(self, fetch: _QueuedDownload) -> None:
        def listen(progress: ModelProgress) -> None:
            fetch.progress = progress

        began, name = time.monotonic(), f"{fetch.spec.folder}/{fetch.spec.name}"
        result: ReadyModel | None = None
        error: WorkerError | None = None
        try:
            result = self._store.ensure(fetch.spec, listen, fetch.stop)
            self._on_ready(fetch.spec, result)
        except EnsureCancelled as exc:
            error = exc
        except WorkerError as exc:
            log.error("model %s: %s", name, exc)  # noqa: TRY400 - the sentence says it all
            error = exc
        except Exception:
            log.exception("model %s: a defect of the worker", name)
            error = InternalError()
        if result and result.bytes_fetched:
            rate = round(result.bytes_fetched / max(time.monotonic() - began, 1e-6))
            log.info("model %s: downloaded %s at %s/s", name, size_text(result.bytes_fetched), size_text(rate))
        with self._changed:
            fetch.running = False
            if isinstance(error, EnsureCancelled) and fetch.stop.is_set():
                # It paused for a job, or nobody wants it. In the first case it is in the queue again.
                fetch.progress = None
            else:
                fetch.result, fetch.error = (result, None) if error is None else (None, error)
            self._drop_unwanted()
            self._schedule()
            self._changed.notify_all()


def _waiting(fetches: Collection[_QueuedDownload]) -> JobWait:
    missing = [fetch for fetch in fetches if fetch.result is None]
    known = [fetch.progress for fetch in missing if fetch.progress]
    return JobWait(
        done_bytes=sum(progress.done_bytes for progress in known),
        total_bytes=sum(progress.total_bytes for progress in known),
        bytes_per_s=sum(progress.bytes_per_s for progress in known),
        models=tuple((f"{fetch.spec.folder}/{fetch.spec.name}", fetch.progress) for fetch in missing),
    )
