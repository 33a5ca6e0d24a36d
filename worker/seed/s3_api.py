"""RunPod's S3-compatible API of a volume: one method a call, errors for people. Touches the network.

According to RunPod's documentation and its users, the API refuses batch deletes and presigned addresses. Listing a folder of
many files that were not written through it stalls, because each is hashed for its ETag. 502s occur. Complete of a large file
may answer 524 or NoSuchUpload although it succeeded. So nothing here lists a folder of models, and HeadObject decides whether a
file exists.
"""

from __future__ import annotations

import base64
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from botocore.exceptions import BotoCoreError, ClientError

from worker.media.s3 import S3Target, make_client
from worker.seed.errors import (
    DatacenterUnknown,
    S3Failed,
    S3KeysRefused,
    S3Unreachable,
    S3VolumeFull,
    S3VolumeNotFound,
    SeedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DATACENTERS: Final = (
    *(
        "EU-CZ-1",
        "EU-RO-1",
        "EUR-IS-1",
        "EUR-NO-1",
        "US-CA-2",
        "US-GA-2",
        "US-IL-1",
        "US-KS-2",
        "US-MD-1",
        "US-MO-1",
        "US-MO-2",
    ),
    *("US-NC-1", "US-NC-2", "US-NE-1", "US-WA-1"),
)
"""The data centres where RunPod's volumes have an S3 API."""

_ATTEMPTS: Final = 10
_CONNECT_S: Final = 15.0
# Shorter than RunPod's two hours: HeadObject says whether a Complete without an answer succeeded, and a part is sent again.
_READ_S: Final = 300.0
_NOT_FOUND: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_NO_BUCKET: Final = "NoSuchBucket"
_NO_UPLOAD: Final = "NoSuchUpload"
_REFUSED: Final = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "401"})
_FULL_STATUS: Final = 507
_FULL: Final = frozenset({"InsufficientStorage", "QuotaExceeded", "507"})
_SERVER_ERROR: Final = 500
_FORBIDDEN: Final = frozenset({401, 403})


class UploadGone(Exception):  # noqa: N818 - it may mean success: another process completed it
    """A multipart upload that the S3 API no longer knows."""


@dataclass(frozen=True, slots=True)
class S3Keys:
    """A key of RunPod's S3 API."""

    access_key_id: str
    secret_access_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class S3Place:
    """The address of a volume in RunPod's S3 API: its id, and the endpoint and region of its data centre."""

    volume: str
    datacenter: str
    endpoint_url: str

    @classmethod
    def of(cls, volume: str, datacenter: str, endpoint_url: str | None = None) -> S3Place:
        """Return the volume's place. Raises `DatacenterUnknown`. The regions of another endpoint are not checked."""
        name = datacenter.strip().upper()
        if endpoint_url is None and name not in DATACENTERS:
            raise DatacenterUnknown(datacenter, DATACENTERS)
        return cls(volume, name, endpoint_url or f"https://s3api-{name.lower()}.runpod.io/")

    @property
    def title(self) -> str:
        """Return the volume's name for people."""
        return f"{self.volume} ({self.datacenter})" if self.datacenter else self.volume


@dataclass(frozen=True, slots=True)
class S3Head:
    """The S3 API's description of a file. It differs for another file, or after a write."""

    size_bytes: int
    modified_s: int
    etag: str


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part of a multipart upload that the S3 API has."""

    etag: str
    size_bytes: int


def s3_api_at(place: S3Place, keys: S3Keys, connections: int) -> S3Api:
    """Return a volume's S3 API, with the client settings that RunPod requires. No connection is made yet."""
    target = S3Target.at(
        place.endpoint_url, keys.access_key_id, keys.secret_access_key, bucket=place.volume, region=place.datacenter or None
    )
    client = make_client(
        target, attempts=_ATTEMPTS, connect_timeout_s=_CONNECT_S, read_timeout_s=_READ_S, connections=connections
    )
    return S3Api(place, client)


class S3Api:
    """The S3 API of one volume. Safe to use from many threads.

    Every method raises `S3KeysRefused`, `S3VolumeNotFound`, `S3VolumeFull`, `S3Unreachable` or `S3Failed`.
    """

    def __init__(self, place: S3Place, client: Any) -> None:  # noqa: ANN401 - boto3 makes its classes at run time
        self.place = place
        self._client = client

    def check(self) -> None:
        """Return if the volume exists and the keys work."""
        with self._saying("HeadBucket"):
            try:
                self._client.head_bucket(Bucket=self.place.volume)
            except ClientError as exc:
                if _code(exc) in {*_NOT_FOUND, _NO_BUCKET}:
                    raise S3VolumeNotFound(self.place.volume, self.place.datacenter or self.place.endpoint_url) from exc
                raise

    # --- files

    def head(self, key: str) -> S3Head | None:
        """Return the server's description of a file, or None."""
        with self._saying("HeadObject", key):
            try:
                said = self._client.head_object(Bucket=self.place.volume, Key=key)
            except ClientError as exc:
                if _code(exc) in _NOT_FOUND:
                    return None
                raise
        return S3Head(int(said["ContentLength"]), int(said["LastModified"].timestamp()), str(said.get("ETag", "")))

    def read(self, key: str, start: int = 0, length: int = 1 << 16) -> bytes | None:
        """Return some bytes of a file, fewer at its end, or None if there is no file."""
        with self._saying("GetObject", key):
            try:
                answer = self._client.get_object(Bucket=self.place.volume, Key=key, Range=f"bytes={start}-{start + length - 1}")
                data: bytes = answer["Body"].read()
            except ClientError as exc:
                if _code(exc) in _NOT_FOUND:
                    return None
                if _code(exc) == "InvalidRange":
                    return b""
                raise
            return data

    def write(self, key: str, data: bytes) -> None:
        """Write a small file."""
        with self._saying("PutObject", key, len(data)):
            self._client.put_object(Bucket=self.place.volume, Key=key, Body=data)

    def remove(self, key: str) -> None:
        """Remove a file, if it exists."""
        with self._saying("DeleteObject", key):
            self._client.delete_object(Bucket=self.place.volume, Key=key)

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the files below a folder. Only for folders of small files."""
        with self._saying("ListObjectsV2", prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.place.volume, Prefix=prefix):
                yield from (entry["Key"] for entry in page.get("Contents", ()))

    # --- multipart uploads

    def uploads(self, key: str) -> list[str]:
        """Return the unfinished uploads of this key."""
        with self._saying("ListMultipartUploads", key):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.place.volume, Prefix=key)
            return [found["UploadId"] for page in pages for found in page.get("Uploads", ()) if found["Key"] == key]

    def parts(self, key: str, upload_id: str) -> dict[int, SentPart]:
        """Return the parts of an upload by number. Raises `UploadGone`."""
        with self._saying("ListParts", key):
            pages = self._client.get_paginator("list_parts").paginate(Bucket=self.place.volume, Key=key, UploadId=upload_id)
            return {
                int(part["PartNumber"]): SentPart(part["ETag"].strip('"'), int(part["Size"]))
                for page in pages
                for part in page.get("Parts", ())
            }

    def begin(self, key: str) -> str:
        """Begin an upload and return its id."""
        with self._saying("CreateMultipartUpload", key):
            return str(self._client.create_multipart_upload(Bucket=self.place.volume, Key=key)["UploadId"])

    def send(self, key: str, upload_id: str, number: int, body: bytearray, md5: bytes) -> None:
        """Send a part. The server checks it against the MD5, and this checks the server's answer.

        Also raises `UploadGone`.
        """
        with self._saying("UploadPart", key, len(body)):
            answer = self._client.upload_part(
                Bucket=self.place.volume,
                Key=key,
                UploadId=upload_id,
                PartNumber=number,
                Body=body,
                ContentMD5=base64.b64encode(md5).decode(),
            )
        etag = str(answer["ETag"]).strip('"')
        if etag != md5.hex():
            raise S3Failed(self.place.title, f"UploadPart {number} of {key}", f"the server has the MD5 {etag}, not {md5.hex()}")

    def complete(self, key: str, upload_id: str, etags: Sequence[str]) -> None:
        """Ask the server to assemble the file. `head` says whether it did. Also raises `UploadGone`."""
        parts = [{"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in enumerate(etags, 1)]
        with self._saying("CompleteMultipartUpload", key):
            self._client.complete_multipart_upload(
                Bucket=self.place.volume, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )

    def abort(self, key: str, upload_id: str) -> None:
        """Abort an upload and drop its parts. A missing upload is no error."""
        with contextlib.suppress(UploadGone), self._saying("AbortMultipartUpload", key):
            self._client.abort_multipart_upload(Bucket=self.place.volume, Key=key, UploadId=upload_id)

    @contextlib.contextmanager
    def _saying(self, operation: str, key: str = "", needed_bytes: int = 0) -> Iterator[None]:
        try:
            yield
        except ClientError as exc:
            self._said_no(exc, f"{operation} of {key}" if key else operation, needed_bytes)
        except (BotoCoreError, OSError) as exc:
            raise S3Unreachable(self.place.title, _first_line(exc)) from exc

    def _said_no(self, exc: ClientError, operation: str, needed_bytes: int) -> NoReturn:
        code, status = _code(exc), int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error: SeedError | UploadGone
        if code == _NO_UPLOAD:
            error = UploadGone(operation)
        elif code == _NO_BUCKET:
            error = S3VolumeNotFound(self.place.volume, self.place.datacenter or self.place.endpoint_url)
        elif status == _FULL_STATUS or code in _FULL:
            error = S3VolumeFull(self.place.title, needed_bytes)
        elif status in _FORBIDDEN or code in _REFUSED:
            error = S3KeysRefused(self.place.title, status)
        elif status >= _SERVER_ERROR:
            error = S3Unreachable(self.place.title, f"{operation}: status {status}")
        else:
            error = S3Failed(
                self.place.title, operation, f"{code}: {exc.response.get('Error', {}).get('Message', '')}".strip(": ")
            )
        raise error from exc


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
