"""Another volume as the source: its sealed models, read through its S3 API. Touches the network."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from worker.errors import EnsureCancelled
from worker.fetch.hub import RemoteFile
from worker.seed.errors import S3Failed
from worker.store.inventory import Standing
from worker.store.seals import redownload_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import CancelToken
    from worker.fetch.ranges import RangeTuning, Sink
    from worker.model_spec import ModelSpec
    from worker.seed.s3_volume import S3Volume
    from worker.store.seals import Seal

_TICK_S: Final = 0.2


class Sibling:
    """The sibling: a volume that others are filled from. What is read from it is checked against the sha256 in its seals."""

    def __init__(self, volume: S3Volume) -> None:
        self._volume = volume
        self._seals: dict[str, Seal] = {}

    def models(self) -> tuple[list[ModelSpec], list[str]]:
        """Return the models to copy, and a sentence about each that cannot be."""
        specs: list[ModelSpec] = []
        left: list[str] = []
        for found in self._volume.sealed():
            spec = redownload_spec(found.title, found.seal)
            if self._volume.look(found.folder, found.name).standing is not Standing.READY:
                left.append(f"{found.title} is left out: it is not the file that was sealed")
            elif spec is None or found.seal.sha256 is None:
                left.append(f"{found.title} is left out: its seal has no sha256, or no source")
            else:
                self._seals[found.title] = found.seal
                specs.append(spec)
        return specs, left

    def look_up(self, spec: ModelSpec) -> RemoteFile:
        """Return what the volume holds for a model of `models`."""
        seal = self._seals[f"{spec.folder}/{spec.name}"]
        return RemoteFile(spec.source, seal.size, seal.sha256, seal.etag, seal.commit, url="")

    def copy(self, spec: ModelSpec, sink: Sink, tuning: RangeTuning, cancel: CancelToken) -> SiblingCopy:
        """Return a copy of a model's bytes into the sink, to be run."""
        return SiblingCopy(self._volume, self._volume.key(spec.folder, spec.name), sink, tuning, cancel)


class SiblingCopy:
    """One file of a sibling volume on its way into a sink, in order, over several connections. In place of `RangeFetch`."""

    def __init__(self, volume: S3Volume, key: str, sink: Sink, tuning: RangeTuning, cancel: CancelToken) -> None:
        self._volume = volume
        self._key = key
        self._sink = sink
        self._cancel = cancel
        self._connections = tuning.connections
        step = tuning.request_bytes
        gaps = sink.gaps()
        self._left = deque((at, min(at + step, end)) for start, end in gaps for at in range(start, end, step))
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self.fetched_bytes = 0

    def run(self, on_bytes: Callable[[int], None]) -> None:
        """Return when all bytes are in the sink. Raises a `SeedError`, or `EnsureCancelled`."""
        threads = [threading.Thread(target=self._work, name="copy", daemon=True) for _ in range(self._connections)]
        for thread in threads:
            thread.start()
        # A thread may wait for room in the sink, which only the caller ends: none is waited for after an error.
        while any(thread.is_alive() for thread in threads) and self._error is None:
            threads[0].join(_TICK_S)
            for thread in threads[1:]:
                thread.join(0)
            on_bytes(self.fetched_bytes)
            if self._cancel.is_set():
                raise EnsureCancelled(self._key)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while self._error is None and (piece := self._next()):
                self._read(*piece)
        except BaseException as exc:  # noqa: BLE001 - handed over to the thread that runs this
            self._error = self._error or exc

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            return self._left.popleft() if self._left else None

    def _read(self, at: int, end: int) -> None:
        while at < end:
            if self._cancel.is_set():
                raise EnsureCancelled(self._key)
            data = self._volume.bucket.read(self._key, at, end - at)
            if not data:
                raise S3Failed(self._volume.title, f"GetObject of {self._key}", f"it ends at {at} of {end} bytes")
            self._sink.write(at, memoryview(data))
            at += len(data)
            with self._lock:
                self.fetched_bytes += len(data)
