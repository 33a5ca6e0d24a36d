"""Deliver a job's outputs: in the result, in a bucket, or on the volume. Touches disk and network.

The result's size is known before a file is read: base64 has four characters for three bytes, and the rest is measured as JSON.
Only files that fit are read. Others go elsewhere, or the job fails with the size and what to set.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from worker.base.files import is_volume
from worker.base.text import count, encodable, size_text
from worker.errors import BucketFailed, OutputElsewhere, OutputGone, ResultTooLarge
from worker.job import OutputItem, Result
from worker.media.address_guard import AddressRules
from worker.media.bucket import Bucket, BucketUpload, BucketUploads, clean_id, job_target
from worker.media.kept_outputs import KeptOutputs
from worker.media.outputs import (
    CollectedOutputs,
    MissingOutput,
    Output,
    OutputFiles,
    missing_output_sentences,
)
from worker.media.picture_formats import PictureEncoding
from worker.media.s3 import S3Target
from worker.media.volume_copies import VolumeCopies, VolumeCopy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from worker.media.picture_formats import PictureFormat
    from worker.settings import Settings

log = logging.getLogger(__name__)

# What RunPod accepts (10 and 20 MB in its documentation), less what it and the SDK add around a result.
_RUN_LIMIT_BYTES: Final = 9_800_000
_RUNSYNC_LIMIT_BYTES: Final = 19_800_000
# Added after the measuring: the envelope, and the timings if the client asked for them.
_RESERVE_BYTES: Final = 4096
# Reading and encoding this much takes a few milliseconds, about as long as a hop to a thread when the loop is busy.
_ON_THE_LOOP_BYTES: Final = 4_000_000
# With a bucket, a larger text becomes a file in it. A smaller one is more useful in the result.
_LARGE_TEXT_BYTES: Final = 100_000
_BASE64_PIECE: Final = 3 << 18  # a multiple of 3, so that only the last piece is padded
# A hanging store or network file system must not hold up a cancelled job for longer.
_LEAVING_S: Final = 10.0

_T = TypeVar("_T", covariant=True)  # noqa: PLC0105 - the protocol below is its one use


class _DeliveryStep(Protocol[_T]):
    """A slow step of a delivery that runs in a thread and can be stopped from another."""

    def run(self) -> _T: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _PlannedOutput:
    """An output and how its delivery is planned."""

    output: Output
    item: OutputItem
    """With empty `data` if it will be base64."""

    @property
    def size_bytes(self) -> int:
        """Return its size in the result's JSON."""
        encoded = _base64_length(self.output.size_bytes) if self.item.type == "base64" else 0
        return _json_length(self.item.to_dict()) + encoded


class Delivery:
    """Delivers the outputs of ComfyUI's runs. The constructor neither imports boto3 nor touches the disk; call `start` once."""

    def __init__(
        self,
        output_dir: Path,
        temp_dir: Path,
        *,
        volume: Path | None = None,
        bucket: Bucket | None = None,
        result_limit_bytes: int | None = None,
        keep_bytes: int = 2_048_000_000,
        url_expiry_s: int = 604_800,
        allow_private: tuple[str, ...] = (),
        python: str = "python3",
    ) -> None:
        self._outputs = OutputFiles(output_dir, temp_dir)
        self._kept = KeptOutputs(output_dir, temp_dir, keep_bytes, spare=[volume] if volume else [])
        self._volume = volume
        self._bucket = bucket
        self._result_limit_bytes = result_limit_bytes
        self._url_expiry_s = url_expiry_s
        self._job_rules = AddressRules(private=allow_private)
        self._python = python

    @classmethod
    def of(cls, settings: Settings) -> Delivery:
        """Create it from the settings."""
        limit_mb = settings.result_limit_mb
        return cls(
            settings.base_dir / "output",
            settings.base_dir / "temp",
            volume=settings.volume_path,
            bucket=_settings_bucket(settings),
            result_limit_bytes=None if limit_mb is None else int(limit_mb * 1_000_000),
            keep_bytes=settings.output_keep_mb * 1_000_000,
            url_expiry_s=settings.bucket_url_expiry_s,
            allow_private=settings.input_url_allow_private,
            python=settings.comfyui_python,
        )

    def start(self) -> None:
        """Begin slow work in a thread, so that it does not delay the first job: import boto3, and list the folders."""
        threading.Thread(target=self._prepare, name="delivery", daemon=True).start()

    def job_bucket(self, s3_config: object) -> Bucket | None:
        """Return the bucket of a job that brings its own, or None. Pure: call it before the GPU is used.

        Raises `S3ConfigInvalid`.
        """
        target = job_target(s3_config)
        return Bucket(target, url_expiry_s=self._url_expiry_s, rules=self._job_rules) if target else None

    async def deliver(
        self,
        job_id: str,
        outputs: Mapping[str, Mapping[str, Any]],
        *,
        nodes: Collection[str] | None = None,
        previews: bool = False,
        bucket: Bucket | None = None,
        warnings: Sequence[str] = (),
        silent: Mapping[str, str] = MappingProxyType({}),
        cached: Collection[str] = (),
        pictures: PictureFormat | None = None,
    ) -> Result:
        """Return the result of a run. All outputs go to the bucket (the job's own, or the settings'), or into the result.

        If a bucket does not accept a file, the file comes in the result, or goes to the volume if it is too large, with a
        sentence in `warnings`. Without a bucket the largest files go to the volume until the rest fits. A listed file that is
        missing gets a sentence, and so does a node without outputs; `silent` are output nodes that are not in `outputs`, with
        their classes. PNGs are converted to `pictures`. On cancellation uploads and copies are stopped before this returns, and
        leave nothing unfinished.

        Raises `OutputGone` if a file of one of the `cached` nodes is missing, or if a file disappears meanwhile;
        `OutputElsewhere` if files are missing and nothing else is left; `ResultTooLarge`, or the `BucketFailed` that led to it,
        if there is no place for a file; `S3ConfigInvalid` for a bucket at an address that jobs must not reach.
        """
        collected = self._collect(outputs, nodes, previews=previews)
        found, missing = collected.outputs, collected.missing
        again = [
            item for item in missing if not (item.outside or {item.node_id, item.node_id.partition(".")[0]}.isdisjoint(cached))
        ]
        if again:
            raise OutputGone(again[0].path, frozenset(item.node_id for item in again))
        if missing and not found:
            raise OutputElsewhere(missing[0].path, missing=[str(item) for item in missing])
        said = [encodable(text) for text in (*warnings, *missing_output_sentences(nodes, collected, silent))]
        files = {item.source: item.size_bytes for item in found if isinstance(item.source, Path)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._kept.using(files))
            sent: Sequence[Output] = found
            if pictures:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pictures-", ignore_cleanup_errors=True))
                sent, notes = await _in_thread(PictureEncoding(self._python, found, pictures, Path(folder)))
                said += notes
            result = await _JobDelivery(self, clean_id(job_id), self._limit_bytes(job_id), bucket or self._bucket).deliver(
                sent, said
            )
        # The next job may be running by now, and some nodes overwrite a file of a fixed name.
        self._outputs.check_same(found)
        return result

    def _collect(
        self, outputs: Mapping[str, Mapping[str, Any]], nodes: Collection[str] | None, *, previews: bool
    ) -> CollectedOutputs:
        """Return the outputs. A file that was removed to make room, and replaced by an empty one, is missing."""
        collected = self._outputs.collect(outputs, nodes=nodes, previews=previews)
        held = [
            item
            for item in collected.outputs
            if isinstance(item.source, Path) and self._kept.is_gone(item.source, item.size_bytes)
        ]
        if not held:
            return collected
        missing = [MissingOutput(item.node_id, item.filename, "output", outside=False) for item in held]
        left = tuple(item for item in collected.outputs if item not in held)
        return replace(collected, outputs=left, missing=(*collected.missing, *missing))

    def job_ended(self) -> None:
        """Note that a job ended, and may have left files. If it is time, remove the oldest in a thread."""
        self._kept.count_job()
        if self._kept.due():
            threading.Thread(target=self._kept.sweep, name="keep-outputs", daemon=True).start()

    @property
    def volume(self) -> Path | None:
        """Return the network volume's root, or None."""
        return self._volume if self._volume and is_volume(self._volume) else None

    def no_volume(self) -> str:
        """Return why there is no volume, for a sentence."""
        return f"there is no network volume at {self._volume}" if self._volume else "there is no network volume"

    def _limit_bytes(self, job_id: str) -> int:
        if self._result_limit_bytes is not None:
            return self._result_limit_bytes
        # The ids of jobs sent through /runsync begin like this.
        return _RUNSYNC_LIMIT_BYTES if job_id.startswith("sync-") else _RUN_LIMIT_BYTES

    def _prepare(self) -> None:
        try:
            self._kept.start()
            if self._bucket:
                self._bucket.open()
        except Exception:
            log.exception("the delivery of results could not be prepared; the first job tries again")


class _JobDelivery:
    """The delivery of one job's outputs."""

    def __init__(self, delivery: Delivery, job_id: str, limit_bytes: int, bucket: Bucket | None) -> None:
        self._delivery = delivery
        self._job_id = job_id
        self._limit_bytes = limit_bytes
        self._bucket = bucket

    async def deliver(self, outputs: Sequence[Output], warnings: list[str]) -> Result:
        planned = [_PlannedOutput(output, _inline(output)) for output in outputs]
        failure = None
        if self._bucket:
            planned, failure = await self._upload(self._bucket, planned)
            if failure:
                warnings.append(f"{failure} What could not be uploaded is returned without the bucket.")
        planned = await self._fit(planned, warnings, failure)
        waiting_bytes = sum(each.output.size_bytes for each in planned if each.item.type == "base64")
        if waiting_bytes <= _ON_THE_LOOP_BYTES:
            items = _encoded_items(planned)
        else:
            items = await asyncio.to_thread(_encoded_items, planned)
        return _result(planned, items, warnings)

    async def _upload(self, bucket: Bucket, planned: list[_PlannedOutput]) -> tuple[list[_PlannedOutput], BucketFailed | None]:
        """Turn files and large texts into addresses. The second value is the first failure."""
        files = [each for each in planned if each.item.type != "text" or each.output.size_bytes > _LARGE_TEXT_BYTES]
        if not files:
            return planned, None
        began = time.monotonic()
        outcomes = await _in_thread(BucketUploads(bucket, self._job_id, [_upload(each.output) for each in files]))
        places = {id(each): outcome for each, outcome in zip(files, outcomes, strict=True) if isinstance(outcome, str)}
        failure = next((outcome for outcome in outcomes if isinstance(outcome, BucketFailed)), None)
        uploaded = [
            replace(each, item=replace(each.item, type="s3_url", data=places[id(each)])) if id(each) in places else each
            for each in planned
        ]
        if failure:
            log.warning("job %s: %s", self._job_id, failure)
        else:
            size = size_text(sum(each.output.size_bytes for each in files))
            took_s = time.monotonic() - began
            log.info("job %s: uploaded %s, %s in %.2f s", self._job_id, count(files, "file"), size, took_s)
        return uploaded, failure

    async def _fit(
        self, planned: list[_PlannedOutput], warnings: Sequence[str], failure: BucketFailed | None
    ) -> list[_PlannedOutput]:
        """Return the plan within the limit: the largest files go to the volume until the rest fits."""
        size_bytes = _size_as_json(planned, warnings)
        if size_bytes <= self._limit_bytes - _RESERVE_BYTES:
            return planned
        volume = self._delivery.volume
        if volume is None:
            raise failure or self._too_large(planned, size_bytes, self._delivery.no_volume())
        fitted, moved = self._copy_to_volume(planned, size_bytes)
        if _size_as_json(fitted, warnings) > self._limit_bytes - _RESERVE_BYTES:
            raise failure or self._too_large(planned, size_bytes, "the rest is too large even with every file on the volume")
        copies = [VolumeCopy(fitted[index].item.data, _source(planned[index].output)) for index in moved]
        try:
            await _in_thread(VolumeCopies(volume, copies))
        except OSError as exc:
            reason = f"the volume at {volume} did not take the files ({exc.strerror or exc})"
            raise failure or self._too_large(planned, size_bytes, reason) from exc
        log.info("job %s: the result is too large, moved %s to the volume", self._job_id, count(moved, "file"))
        return fitted

    def _copy_to_volume(self, planned: Sequence[_PlannedOutput], size_bytes: int) -> tuple[list[_PlannedOutput], list[int]]:
        """Return which of them go to the volume: as few as possible, the largest first."""
        fitted, moved = list(planned), []
        names: set[str] = set()
        for index in sorted(range(len(planned)), key=lambda index: -planned[index].size_bytes):
            each = planned[index]
            if size_bytes <= self._limit_bytes - _RESERVE_BYTES:
                break
            if each.item.type not in {"base64", "text"}:
                continue
            path = self._place(each.output, names)
            there = replace(each, item=replace(each.item, type="volume_path", data=path))
            if there.size_bytes < each.size_bytes:
                fitted[index] = there
                moved.append(index)
                size_bytes += there.size_bytes - each.size_bytes
        return fitted, moved

    def _place(self, output: Output, names: set[str]) -> str:
        """Return a path below the volume's root, also a key of its S3 API. It is unique among a job's outputs."""
        folder = "/".join(
            ["outputs", self._job_id, *(part for part in output.subfolder.split("/") if part not in {"", ".", ".."})]
        )
        name, count = f"{folder}/{output.filename}", 1
        while name in names:
            count += 1
            name = f"{folder}/{count}_{output.filename}"
        names.add(name)
        return name

    def _too_large(self, planned: Sequence[_PlannedOutput], size_bytes: int, volume: str) -> ResultTooLarge:
        files = [f"{each.output.filename} of node {each.output.node_id}: {each.output.size_bytes} bytes" for each in planned]
        return ResultTooLarge(size_bytes, self._limit_bytes, volume, files)


def result_size_bytes(result: Result) -> int:
    """Return the size of a result to deliver, as the SDK sends it. Raises ValueError for values outside JSON, such as NaN."""
    return _json_length(result.to_dict())


def _json_length(value: object) -> int:
    # As runpod 1.12 encodes a result, except allow_nan: it would send NaN, which no parser accepts.
    return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))


def _base64_length(size_bytes: int) -> int:
    return 4 * ((size_bytes + 2) // 3)


def _size_as_json(planned: Sequence[_PlannedOutput], warnings: Sequence[str]) -> int:
    """Return the exact size of a result to deliver as JSON, without encoding a file."""
    without = result_size_bytes(_result(planned, [each.item for each in planned], warnings))
    return without + sum(_base64_length(each.output.size_bytes) for each in planned if each.item.type == "base64")


def _inline(output: Output) -> OutputItem:
    text = output.source if isinstance(output.source, str) else None
    kind = "base64" if text is None else "text"
    return OutputItem(output.filename, kind, text or "", output.node_id, output.subfolder, output.media_type, output.size_bytes)


def _result(planned: Sequence[_PlannedOutput], items: Sequence[OutputItem], warnings: Sequence[str]) -> Result:
    def of(kind: str) -> tuple[OutputItem, ...]:
        return tuple(item for each, item in zip(planned, items, strict=True) if each.output.kind == kind)

    return Result(of("images"), tuple(warnings), videos=of("videos"), audio=of("audio"), text=of("text"), files=of("files"))


def _encoded_items(planned: Sequence[_PlannedOutput]) -> list[OutputItem]:
    return [each.item if each.item.type != "base64" else replace(each.item, data=_base64_of(each.output)) for each in planned]


def _base64_of(output: Output) -> str:
    """Encode a file to deliver into a text of known length, piece by piece: only one piece of its bytes is in memory."""
    source = _source(output)
    text, at = bytearray(_base64_length(output.size_bytes)), 0
    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
            while piece := stream.read(_BASE64_PIECE):
                encoded = base64.b64encode(piece)
                text[at : at + len(encoded)] = encoded
                at += len(encoded)
            length = stream.tell()
    except FileNotFoundError as exc:
        raise OutputGone(output.filename, frozenset({output.node_id})) from exc
    if length != output.size_bytes:
        # A node is writing it at this moment. Its earlier size was measured.
        raise OutputGone(output.filename, frozenset({output.node_id}))
    return text.decode("ascii")


def _source(output: Output) -> Path | bytes:
    return output.source.encode("utf-8", "replace") if isinstance(output.source, str) else output.source


def _upload(output: Output) -> BucketUpload:
    return BucketUpload(output.filename, output.media_type, _source(output))


async def _in_thread(work: _DeliveryStep[_T]) -> _T:
    """Run a step of a delivery in a thread. On cancellation stop it and wait for it, so that it leaves nothing unfinished."""
    running = asyncio.ensure_future(asyncio.to_thread(work.run))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        work.stop()
        # Nobody waits for its exceptions any more.
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({running}, timeout=_LEAVING_S)
        raise


def _settings_bucket(settings: Settings) -> Bucket | None:
    if settings.bucket_endpoint_url is None:
        return None
    target = S3Target.at(
        settings.bucket_endpoint_url,
        settings.bucket_access_key_id or "",
        settings.bucket_secret_access_key or "",
        bucket=settings.bucket_name,
        region=settings.bucket_region,
        addressing=settings.bucket_addressing,
    )
    return Bucket(target, prefix=settings.bucket_prefix or "", url_expiry_s=settings.bucket_url_expiry_s)
