"""Put a model, verified and sealed, onto each volume: mounted, or several through S3. Touches disk and network."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from worker.base.files import FULL
from worker.base.progress import ModelProgress, metered
from worker.base.text import unicode_forms
from worker.errors import EnsureCancelled, VolumeReadOnly, WorkerError
from worker.seed.errors import S3Failed, SeedError
from worker.seed.outcome import NEWER, Outcome
from worker.seed.relay import Relay, RelayLoad, RelayUpload
from worker.seed.s3_api import UploadGone
from worker.store.download import ATTEMPTS, WrongFiles
from worker.store.inventory import Standing
from worker.store.seals import new_seal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from worker.base.progress import CancelToken, Listener, Phase
    from worker.fetch.hub import Hub, RemoteFile
    from worker.model_spec import ModelSpec
    from worker.seed.outcome import How
    from worker.seed.s3_volume import S3Volume
    from worker.seed.sibling import Sibling
    from worker.seed.volumes import SeedVolume
    from worker.store.store import Store

log = logging.getLogger(__name__)

_FINISHERS: Final = 4
_TICK_S: Final = 0.2
_BY: Final = "seeder"


class Filler(Protocol):
    """Fills volumes: puts models onto them, verified and sealed."""

    @property
    def titles(self) -> Sequence[str]:
        """Return the volumes' names."""
        ...

    def on(self, volume: SeedVolume) -> Filler:
        """Return a filler for one of the volumes."""
        ...

    def ensure(self, spec: ModelSpec, progress: Listener, cancel: CancelToken, *, replaces: object = None) -> list[Outcome]:
        """Return, for each volume, when the model is there or why it is not. Raises only defects.

        `replaces` is the stamp of a file that is replaced after the new one was verified. Any other existing file stays.
        """
        ...


class MountedFiller:
    """Fills a volume that is mounted here. The worker's own store does the work."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def titles(self) -> Sequence[str]:
        """Return the volume's name."""
        return (str(self._store.layout.root),)

    def on(self, volume: SeedVolume) -> MountedFiller:
        """Like `Filler.on`."""
        del volume
        return self

    def ensure(self, spec: ModelSpec, progress: Listener, cancel: CancelToken, *, replaces: object = None) -> list[Outcome]:
        """Like `Filler.ensure`."""
        model, volume, began_s = f"{spec.folder}/{spec.name}", self.titles[0], time.monotonic()
        try:
            self._check_writable(spec)
            if replaces is None:
                found = self._store.ensure(spec, progress, cancel)
            else:
                found = self._store.replace(spec, replaces, progress, cancel)
        except WorkerError as exc:
            return [_failed(model, volume, exc, began_s)]
        how: dict[str, How] = {"downloaded": "sent", "host_cache": "ready", "adopted": "adopted", "by_hand": "by_hand"}
        size_bytes = found.path.stat().st_size
        return [Outcome(model, volume, how.get(found.how, "ready"), size_bytes, found.bytes_fetched, found.seconds)]

    def _check_writable(self, spec: ModelSpec) -> None:
        """Raise `VolumeReadOnly` at once if a missing model cannot be written.

        The store is patient with a network volume, and asks the source first.
        """
        layout = self._store.layout
        if any(os.path.lexists(layout.model(spec.folder, form)) for form in unicode_forms(spec.name)):
            return
        for path in (layout.model(spec.folder, spec.name), layout.seal(spec.folder, spec.name)):
            folder = next(above for above in path.parents if above.is_dir())
            try:
                with tempfile.TemporaryFile(prefix=".", dir=folder):
                    pass
            except OSError as exc:
                if exc.errno not in FULL:
                    raise VolumeReadOnly(layout.root, exc.strerror or str(exc)) from exc


def _failed(model: str, volume: str, error: WorkerError, began_s: float) -> Outcome:
    how: How = "cancelled" if isinstance(error, EnsureCancelled) else "failed"
    return Outcome(model, volume, how, 0, 0, time.monotonic() - began_s, error)


@dataclass(slots=True)
class _S3Fill:
    """One model with which several volumes are filled through S3."""

    spec: ModelSpec
    remote: RemoteFile
    progress: Listener
    cancel: CancelToken
    began_s: float
    replaces: object = None

    @property
    def model(self) -> str:
        return f"{self.spec.folder}/{self.spec.name}"

    def meter(self, phase: Phase) -> Callable[[int], None]:
        """Return a function that turns byte counts into progress."""
        return metered(phase, self.remote.size_bytes, self.progress)

    def outcome(self, volume: S3Volume, how: How, moved_bytes: int = 0, note: str | None = None) -> Outcome:
        size_bytes, seconds = self.remote.size_bytes, time.monotonic() - self.began_s
        return Outcome(self.model, volume.title, how, size_bytes, moved_bytes, seconds, note=note)

    def failed(self, volume: S3Volume, error: WorkerError, moved_bytes: int = 0) -> Outcome:
        outcome = _failed(self.model, volume.title, error, self.began_s)
        return replace(outcome, size_bytes=self.remote.size_bytes, moved_bytes=moved_bytes)


class S3Filler:
    """Fills volumes through their S3 API. One download feeds them all.

    One file is in transfer at a time, with several connections. `ensure` of the next may begin while a server still assembles
    the last one.
    """

    def __init__(
        self,
        hub: Hub,
        volumes: Sequence[S3Volume],
        load: RelayLoad | None = None,
        away: Mapping[str, SeedError] | None = None,
        sibling: Sibling | None = None,
    ) -> None:
        """Set the volumes. `away` maps unreachable volumes to the reason: each model failed there.

        `sibling` is the volume that the bytes are read from, in place of each model's source.
        """
        self._sibling = sibling
        self._hub = hub
        self._volumes = volumes
        self._away = away or {}
        self._load = load or RelayLoad()
        self._streaming = threading.Lock()
        self._spare: list[bytearray] = []  # belongs to the thread that streams

    @property
    def titles(self) -> Sequence[str]:
        """Return the volumes' names."""
        return (*(volume.title for volume in self._volumes), *self._away)

    def on(self, volume: SeedVolume) -> S3Filler:
        """Like `Filler.on`."""
        return S3Filler(self._hub, [found for found in self._volumes if found is volume], self._load)

    def ensure(self, spec: ModelSpec, progress: Listener, cancel: CancelToken, *, replaces: object = None) -> list[Outcome]:
        """Like `Filler.ensure`."""
        away = [_failed(f"{spec.folder}/{spec.name}", title, error, time.monotonic()) for title, error in self._away.items()]
        return self._ensure(spec, progress, cancel, replaces) + away

    def _ensure(self, spec: ModelSpec, progress: Listener, cancel: CancelToken, replaces: object) -> list[Outcome]:
        began_s = time.monotonic()
        try:
            remote = self._sibling.look_up(spec) if self._sibling else self._hub.look_up(spec.source, cancel)
            remote.check_against(spec)
        except WorkerError as exc:
            return [_failed(f"{spec.folder}/{spec.name}", volume.title, exc, began_s) for volume in self._volumes]
        job = _S3Fill(spec, replace(remote, sha256=remote.sha256 or spec.sha256), progress, cancel, began_s, replaces)
        found: dict[S3Volume, Outcome] = {}
        missing: list[S3Volume] = []
        for volume in self._volumes:
            try:
                there = self._there(job, volume)
            except WorkerError as exc:
                found[volume] = job.failed(volume, exc)
            else:
                if there:
                    found[volume] = there
                else:
                    missing.append(volume)
        if missing:
            found |= self._send(job, missing)
        return [found[volume] for volume in self._volumes]

    def _there(self, job: _S3Fill, volume: S3Volume) -> Outcome | None:
        """Return the outcome for an existing file. None if there is none, or if it is to be replaced.

        For a sealed file only the model's own pin decides: a source without a pin may have changed.
        """
        found = volume.look(job.spec.folder, job.spec.name)
        if found.standing is Standing.ABSENT or (job.replaces is not None and found.stamp == job.replaces):
            return None
        if found.standing is Standing.READY:
            sha256 = found.seal.sha256 if found.seal else None
            volume.check(job.spec, "sha256", job.spec.sha256, sha256)
            moved_on = None not in {sha256, job.remote.sha256} and sha256 != job.remote.sha256
            outcome = job.outcome(volume, "ready", note=NEWER if moved_on else None)
            return replace(outcome, size_bytes=found.size_bytes)
        return job.outcome(volume, volume.adopt(job.spec, found, job.remote, job.meter("checking"), job.cancel))

    # --- sending

    def _send(self, job: _S3Fill, volumes: Sequence[S3Volume]) -> dict[S3Volume, Outcome]:
        """Send to these volumes, and again to those whose upload vanished. Download a file with a wrong byte again, once."""
        outcomes: dict[S3Volume, Outcome] = {}
        wrong = WrongFiles(job.model, job.remote)
        uploads = {volume: RelayUpload(volume.bucket, volume.key(job.spec.folder, job.spec.name)) for volume in volumes}
        error: WorkerError | None = None
        for _ in range(ATTEMPTS):
            try:
                sha256 = self._stream(job, uploads)
                if sha256 and job.remote.sha256 not in {None, sha256}:
                    for upload in uploads.values():
                        upload.abort()
                    wrong.add(sha256)
                elif sha256:
                    outcomes |= self._finish(job, uploads, sha256)
            except WorkerError as exc:
                error = exc
                break
            uploads = {volume: upload.renewed() for volume, upload in uploads.items() if volume not in outcomes}
            if not uploads:
                return outcomes
        return outcomes | {volume: self._given_up(job, volume, upload, error) for volume, upload in uploads.items()}

    def _given_up(self, job: _S3Fill, volume: S3Volume, upload: RelayUpload, error: WorkerError | None) -> Outcome:
        """Return why this volume does not have the model. Abort what cannot be resumed."""
        cause = upload.error if isinstance(upload.error, SeedError) else error
        if cause and not cause.retryable:
            upload.abort()
        lost = S3Failed(volume.title, f"The upload of {upload.key}", "it vanished from the server each time")
        return job.failed(volume, cause or lost, upload.all_sent_bytes)

    def _stream(self, job: _S3Fill, uploads: dict[S3Volume, RelayUpload]) -> str:
        """Return the sha256 of the content of every upload without an error. Empty if all of them vanished."""
        while not self._streaming.acquire(timeout=_TICK_S):
            if job.cancel.is_set():
                raise EnsureCancelled(job.model)
        job.began_s = time.monotonic()
        try:
            part_bytes = self._load.part_bytes_of(job.remote.size_bytes)
            for upload in uploads.values():
                try:
                    upload.open(job.remote.size_bytes, part_bytes)
                except SeedError as exc:
                    upload.error = exc
            living = [upload for upload in uploads.values() if upload.error is None]
            if not living:
                raise next(upload.error for upload in uploads.values() if upload.error)
            begin = partial(self._sibling.copy, job.spec) if self._sibling else None
            relay = Relay(self._hub, job.remote, living, self._load, job.cancel, spare=self._spare, begin=begin)
            return relay.run(job.meter("downloading"))
        except UploadGone:
            return ""
        finally:
            self._streaming.release()

    def _finish(self, job: _S3Fill, uploads: dict[S3Volume, RelayUpload], sha256: str) -> dict[S3Volume, Outcome]:
        """Complete and seal the files on all volumes in parallel. Leave out volumes whose upload vanished."""
        outcomes: dict[S3Volume, Outcome] = {}

        def finish(volume: S3Volume, upload: RelayUpload) -> None:
            try:
                if upload.error:
                    raise upload.error
                outcome = self._publish(job, volume, upload, sha256)
            except UploadGone:
                log.info("the upload of %s to %s is gone: starting again", job.model, volume.title)
            except WorkerError as exc:
                if not isinstance(exc, EnsureCancelled) and not exc.retryable:
                    upload.abort()
                outcomes[volume] = job.failed(volume, exc, upload.all_sent_bytes)
            else:
                outcomes[volume] = replace(outcome, moved_bytes=upload.all_sent_bytes)

        with ThreadPoolExecutor(_FINISHERS, thread_name_prefix="finish") as pool:
            list(pool.map(finish, uploads, uploads.values()))
        return outcomes

    def _publish(self, job: _S3Fill, volume: S3Volume, upload: RelayUpload, sha256: str) -> Outcome:
        """Announce, complete, check, seal. If this dies in between, the next run uses the record."""
        job.progress(ModelProgress("checking", job.remote.size_bytes, job.remote.size_bytes))
        spec = job.spec
        if there := self._there(job, volume):
            upload.abort()  # a worker, another seeder or a person was faster: an existing file is never overwritten
            return there
        seal = new_seal(spec, job.remote, sha256, _BY)
        volume.announce(spec.folder, spec.name, seal)
        upload.complete(job.remote.size_bytes, self._load, job.cancel)
        volume.seal(spec.folder, spec.name, seal)
        upload.sweep()
        return job.outcome(volume, "sent")
