"""Upload a job's files to a bucket, in parallel and streamed, and sign their addresses. Touches the network.

For a bucket that a request names, each connection is judged by `AddressRules`. The check uses the address of the connected
socket, before a byte is sent, so a name that resolves to something else a moment later gains nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import socket
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import httpx2

from worker.errors import BucketFailed, BucketRefused, BucketUnreachable, OutputGone, S3ConfigInvalid
from worker.media.address_guard import PRIVATE, bare_host
from worker.media.s3 import S3Target, make_client

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from worker.media.address_guard import AddressRules

log = logging.getLogger(__name__)

_MIB: Final = 1 << 20
# Files and parts of files in transfer at once. Each holds one connection and a buffer, no part of a file.
_PARALLEL: Final = 8
_MULTIPART_FROM_BYTES: Final = 32 * _MIB
_PART_BYTES: Final = 16 * _MIB
_LONGEST_SUFFIX: Final = 16
_LONGEST_ID: Final = 128

_CREDENTIALS: Final = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "TokenRefreshRequired"})
_DENIED: Final = frozenset({"AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden", "Unauthorized", "401", "403"})
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "InvalidBucketName", "404"})
_REGION: Final = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "InvalidRegionName",
        "301",
        "307",
    }
)
_PASSING: Final = frozenset({"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "Throttling", "429"})


@dataclass(frozen=True, slots=True)
class BucketUpload:
    """One object to upload to the bucket: a file on the disk, or bytes."""

    filename: str
    media_type: str
    source: Path | bytes


class Bucket:
    """The destination of results. It builds its client at first use, or earlier with `open`. Safe to use from many threads.

    `rules` are for a bucket that a request names: they say which addresses may be connected to.
    """

    def __init__(
        self, target: S3Target, *, prefix: str = "", url_expiry_s: int = 604_800, rules: AddressRules | None = None
    ) -> None:
        self.target = target
        self._prefix = [part for part in prefix.split("/") if part]
        self._url_expiry_s = url_expiry_s
        self._rules = rules
        self._lock = threading.Lock()
        self._client: Any = None

    @property
    def name(self) -> str:
        """Return the bucket's name. Without one in the settings it is the month's, as in worker-comfyui."""
        return self.target.bucket or datetime.now(UTC).strftime("%m-%y")

    def open(self) -> Any:  # noqa: ANN401 - boto3 makes its classes at run time
        """Return the client, created once. This imports boto3 and loads its description of S3, which takes half a second."""
        with self._lock:
            if self._client is None:
                if self._rules is None:
                    self._client = make_client(self.target)
                else:
                    # The environment's proxies would resolve the name behind the guard.
                    self._client = make_client(self.target, config={"proxies": {}})
                    _guard_connections(self._client, self._rules)
            return self._client

    def key(self, job_id: str, filename: str) -> str:
        """Return a new object's key: `<prefix>/<job id>/<8 hex>.<ext>`."""
        suffix = Path(filename).suffix[1:].lower()
        ending = f".{suffix}" if re.fullmatch(rf"[a-z0-9]{{1,{_LONGEST_SUFFIX}}}", suffix) else ""
        return "/".join([*self._prefix, clean_id(job_id), uuid.uuid4().hex[:8] + ending])

    def signed_url(self, key: str, bucket: str) -> str:
        """Return an address from which anybody can download the object until it expires."""
        url: str = self.open().generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=self._url_expiry_s
        )
        return url

    def check_reachable(self) -> None:
        """Raise `S3ConfigInvalid` if a request's bucket is at a forbidden address. Resolves a name."""
        if self._rules is None:
            return
        try:
            url = httpx2.URL(self.target.endpoint_url)
            refusal = self._rules.refusal(url)
        except httpx2.InvalidURL:
            refusal = "it is no valid address"
        if refusal is None:
            # If a name does not resolve, the upload fails with its own sentence.
            with contextlib.suppress(OSError):
                host = bare_host(url)
                found = socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)
                if not all(self._rules.admits(host, str(info[4][0])) for info in found):
                    refusal = PRIVATE
        if refusal is not None:
            raise S3ConfigInvalid(f"has the endpointUrl {self.target.host}, and {refusal}")

    def explain(self, error: Exception, bucket: str) -> BucketFailed:
        """Return boto3's error as one sentence that says what to check."""
        from botocore import exceptions  # noqa: PLC0415 - see worker.media.s3

        own = self._rules is not None
        host = self.target.host
        if isinstance(error, exceptions.ClientError):
            answer = error.response.get("Error", {})
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code = str(answer.get("Code") or status)
            message = " ".join(str(answer.get("Message") or "").split())
            reason = self._redacted(f"{code}, {message}" if message else code)
            if code in _PASSING or status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return BucketUnreachable(bucket, host, reason, "send the job again, and check the store if this repeats")
            return BucketRefused(bucket, host, reason, _advice(code, own=own))
        reason = self._redacted(" ".join(str(error).split()) or type(error).__name__)
        unanswered = isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError)
        if unanswered or not isinstance(error, exceptions.BotoCoreError):
            return BucketUnreachable(bucket, host, reason, f"check {_config_names(own)['endpoint']}, and send the job again")
        return BucketRefused(bucket, host, reason, f"check {_config_names(own)['bucket']} and {_config_names(own)['endpoint']}")

    def _redacted(self, text: str) -> str:
        for secret in (self.target.secret_access_key, self.target.access_key_id):
            text = text.replace(secret, "***")
        return text


class BucketUploads:
    """The uploads of one job to its bucket. Call `run` in a thread, and `stop` from any other."""

    def __init__(self, bucket: Bucket, job_id: str, files: Sequence[BucketUpload]) -> None:
        self._bucket = bucket
        self._job_id = job_id
        self._files = files
        self._lock = threading.Lock()
        self._stopped = False
        self._under_way: list[Any] = []

    def run(self) -> list[str | BucketFailed]:
        """Return for each file its signed address, or its error after all retries.

        Raises `OutputGone` for a missing file, `S3ConfigInvalid` for a bucket at an address that requests must not reach.
        """
        self._bucket.check_reachable()
        name = self._bucket.name
        try:
            client = self._bucket.open()
        except Exception as exc:  # noqa: BLE001 - boto3's own argument checks raise any exception
            failure = self._bucket.explain(exc, name)
            return [failure] * len(self._files)
        manager = _manager(client)
        try:
            futures = [(file, *self._submit(manager, name, file)) for file in self._files]
            return [self._outcome(future, name, key, file) for file, key, future in futures]
        finally:
            manager.shutdown(cancel=self._stopped)

    def stop(self) -> None:
        """Make `run` return soon. Uploaded parts are aborted."""
        with self._lock:
            self._stopped = True
            for future in self._under_way:
                future.cancel()

    def _submit(self, manager: Any, bucket: str, file: BucketUpload) -> tuple[str, Any]:  # noqa: ANN401 - s3transfer has no types
        key = self._bucket.key(self._job_id, file.filename)
        source = io.BytesIO(file.source) if isinstance(file.source, bytes) else str(file.source)
        with self._lock:
            future = manager.upload(source, bucket, key, extra_args=_object_headers(file))
            self._under_way.append(future)
            if self._stopped:
                future.cancel()
        return key, future

    def _outcome(self, future: Any, bucket: str, key: str, file: BucketUpload) -> str | BucketFailed:  # noqa: ANN401 - as above
        try:
            future.result()
            return self._bucket.signed_url(key, bucket)
        except FileNotFoundError as exc:
            raise OutputGone(file.filename) from exc
        except Exception as exc:  # noqa: BLE001 - botocore's, s3transfer's, urllib3's and the disk's errors have no common root
            return self._bucket.explain(exc, bucket)


def clean_id(job_id: str) -> str:
    """Return a job's id as one part of a bucket's key or of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", job_id).strip(".-")[:_LONGEST_ID] or "job"


def job_target(config: object) -> S3Target | None:
    """Return the bucket in RunPod's field `s3Config` of a job, or None. Raises `S3ConfigInvalid`."""
    if config is None or config == {}:
        return None
    names = ("accessId", "accessSecret", "bucketName", "endpointUrl")
    if not isinstance(config, dict):
        raise S3ConfigInvalid("must be an object")
    values = {name: _config_text(config, name) for name in names}
    if missing := [name for name in names if not values[name]]:
        raise S3ConfigInvalid(f"lacks {' and '.join(missing)}")
    try:
        target = S3Target.at(values["endpointUrl"], values["accessId"], values["accessSecret"], bucket=values["bucketName"])
    except ValueError as exc:
        raise S3ConfigInvalid(f"has an endpointUrl that cannot be used: it {exc}") from exc
    if not target.signs_addresses:
        raise S3ConfigInvalid("has the address of a RunPod volume, which gives no signed addresses for results")
    return target


def _config_text(config: Mapping[str, object], name: str) -> str:
    value = config.get(name)
    return value.strip() if isinstance(value, str) else ""


def _object_headers(file: BucketUpload) -> dict[str, str]:
    """Return an uploaded object's metadata for downloads: its media type and file name."""
    plain = re.sub(r"[^ !#-\[\]-~]", "_", file.filename)
    encoded = quote(file.filename, safe="", errors="replace")
    return {
        "ContentType": file.media_type,
        "ContentDisposition": f"inline; filename=\"{plain}\"; filename*=UTF-8''{encoded}",
    }


def _manager(client: Any) -> Any:  # noqa: ANN401 - s3transfer has no types
    from boto3.s3.transfer import TransferConfig, create_transfer_manager  # noqa: PLC0415 - see worker.media.s3

    config = TransferConfig(
        multipart_threshold=_MULTIPART_FROM_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_PARALLEL,
        preferred_transfer_client="classic",  # the other one, if it is installed, brings its own connections
    )
    return create_transfer_manager(client, config)


def _config_names(own: bool) -> dict[str, str]:  # noqa: FBT001 - a lookup, not a mode
    """Return the field names of the two kinds of bucket configuration."""
    if own:
        return {
            "keys": "accessId and accessSecret of the s3Config",
            "bucket": "the s3Config's bucketName",
            "endpoint": "its endpointUrl",
            "region": "name the bucket's region in the s3Config's endpointUrl",
        }
    return {
        "keys": "BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY",
        "bucket": "BUCKET_NAME",
        "endpoint": "BUCKET_ENDPOINT_URL",
        "region": "set BUCKET_REGION to the bucket's region",
    }


def _advice(code: str, *, own: bool) -> str:
    names = _config_names(own)
    if code in _NO_BUCKET:
        return f"create the bucket, or correct {names['bucket']} or {names['endpoint']}"
    if code in _CREDENTIALS:
        return f"check {names['keys']}"
    if code in _DENIED:
        return f"allow the key to write to the bucket, or check {names['keys']}"
    if code in _REGION:
        return names["region"]
    if code == "RequestTimeTooSkewed":
        return "the machine's clock is wrong; send the job again to another worker"
    return f"check {names['bucket']} and {names['endpoint']}"


def _guard_connections(client: Any, rules: AddressRules) -> None:  # noqa: ANN401 - as above
    """Let the bucket's client connect only to addresses that `rules` admit.

    botocore offers no way to choose connections, so this uses its internals. If they changed, this would fail and no request's
    bucket would be used.
    """
    from botocore.awsrequest import (  # noqa: PLC0415 - see worker.media.s3
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )

    class _Judged:
        """Mixin for a connection: check the peer's address before a byte is sent."""

        def _new_conn(self) -> socket.socket:
            made: socket.socket = super()._new_conn()  # type: ignore[misc]  # of the connection it is mixed into
            if not rules.admits(str(self.host), str(made.getpeername()[0])):  # type: ignore[attr-defined]  # as above
                made.close()
                raise PermissionError(PRIVATE)
            return made

    class _HttpConnection(_Judged, AWSHTTPConnection):  # type: ignore[misc]  # botocore has no types
        pass

    class _HttpsConnection(_Judged, AWSHTTPSConnection):  # type: ignore[misc]  # as above
        pass

    class _HttpPool(AWSHTTPConnectionPool):  # type: ignore[misc]  # as above
        ConnectionCls = _HttpConnection

    class _HttpsPool(AWSHTTPSConnectionPool):  # type: ignore[misc]  # as above
        ConnectionCls = _HttpsConnection

    manager = client._endpoint.http_session._manager  # noqa: SLF001 - see the docstring
    if set(manager.pool_classes_by_scheme) != {"http", "https"}:
        raise RuntimeError("botocore's connections are not as known")
    manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
