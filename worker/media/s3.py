"""Object stores: parse the addresses that people write, and create the client. Makes no connection itself.

Only `make_client` imports boto3, which takes a third of a second: a worker without a bucket never spends it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from urllib.parse import SplitResult

# Hosts that contain the bucket before the service's own name, as the consoles of these providers show them.
_BUCKET_IN_HOST: Final = re.compile(
    r"(?P<bucket>[a-z0-9][a-z0-9.-]*?)\.(?P<service>"
    r"s3(?:[.-][a-z0-9-]+)*\.amazonaws\.com(?:\.cn)?"
    r"|s3\.[a-z0-9-]+\.(?:backblazeb2|wasabisys)\.com"
    r"|s3\.[a-z0-9-]+\.scw\.cloud"
    r"|storage\.googleapis\.com"
    r"|[a-z0-9]+\.digitaloceanspaces\.com"
    r"|[0-9a-f]{32}(?:\.[a-z]+)?\.r2\.cloudflarestorage\.com"
    r"|(?:s3\.)?oss-[a-z0-9-]+\.aliyuncs\.com"
    r"|cos\.[a-z0-9-]+\.myqcloud\.com"
    r"|obs\.[a-z0-9-]+\.myhuaweicloud\.(?:com|eu)"
    r"|tos-[a-z0-9-]+\.i?(?:volces|bytepluses)\.com"
    r")"
)
_NO_BUCKET_IN_HOST: Final = re.compile(r"s3\.oss-[a-z0-9-]+\.aliyuncs\.com")
# TOS speaks S3 at separate hosts, beside those that its console shows.
_TOS_OWN: Final = re.compile(r"tos-(?!s3-)(?P<rest>[a-z0-9-]+\.i?(?:volces|bytepluses)\.com)")
_REGION_IN_HOST: Final = (
    re.compile(r"s3[.-](?:dualstack\.|fips\.)?(?P<region>[a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com(?:\.cn)?"),
    re.compile(r"s3\.(?P<region>[a-z0-9-]+)\.(?:backblazeb2\.com|wasabisys\.com|scw\.cloud)"),
    re.compile(r"(?P<region>[a-z0-9]+)\.digitaloceanspaces\.com"),
    re.compile(r"(?:s3\.)?oss-(?P<region>[a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com"),
    re.compile(r"cos\.(?P<region>[a-z0-9-]+)\.myqcloud\.com"),
    re.compile(r"obs\.(?P<region>[a-z0-9-]+)\.myhuaweicloud\.(?:com|eu)"),
    re.compile(r"tos-s3-(?P<region>[a-z0-9-]+)\.i?(?:volces|bytepluses)\.com"),
)
_RUNPOD: Final = re.compile(r"s3api-(?P<data_center>[a-z0-9-]+)\.runpod\.io")
# These accept any region; "auto" is what their documents say.
_REGION_AUTO: Final = (".r2.cloudflarestorage.com", "storage.googleapis.com")
# These serve a bucket only under its own host name.
_VIRTUAL_ONLY: Final = (
    *(".aliyuncs.com", ".myqcloud.com", ".myhuaweicloud.com", ".myhuaweicloud.eu"),
    *(".volces.com", ".ivolces.com", ".bytepluses.com", ".ibytepluses.com"),
)


@dataclass(frozen=True, slots=True)
class S3Target:
    """An S3-compatible object store, a key for it, and perhaps a bucket in it. The repr does not show the key."""

    endpoint_url: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    bucket: str | None
    region: str
    addressing_style: str
    """`virtual` (the bucket is part of the host name) or `path`."""

    @classmethod
    def at(
        cls,
        endpoint_url: str,
        access_key_id: str,
        secret_access_key: str,
        *,
        bucket: str | None = None,
        region: str | None = None,
        addressing: str = "auto",
    ) -> S3Target:
        """Return the target of an address as people copy it: with the bucket in its path, in its host, or without it.

        A given `bucket` takes precedence; the address then is the service's, with or without that bucket in it. The region is
        read from the host if the provider writes it there. `addressing` is `virtual` or `path` for a store whose host does not
        reveal its style. Raises ValueError for other addresses.
        """
        parts = _service(endpoint_url.strip())
        path, bucket = _split_path(parts.path.strip("/"), bucket)
        host, bucket = _split_host(parts.hostname or "", bucket)
        netloc = _bracketed(host) if parts.port is None else f"{_bracketed(host)}:{parts.port}"
        service = urlunsplit((parts.scheme, netloc, path, "", "")).rstrip("/")
        style = _addressing(parts, host, bucket) if addressing == "auto" else addressing
        return cls(service, access_key_id, secret_access_key, bucket, region or _region(host), style)

    @property
    def signs_addresses(self) -> bool:
        """Return whether signed addresses work. RunPod's volumes do not support them (facts of their S3 API)."""
        return _RUNPOD.fullmatch(urlsplit(self.endpoint_url).hostname or "") is None

    @property
    def host(self) -> str:
        """Return the service's host and port, for people."""
        return urlsplit(self.endpoint_url).netloc


def _service(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.scheme not in {"http", "https"}:
        raise ValueError("must be an address that begins with https:// or http://, with a valid host and port")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must be an address without a user and without a query")
    return parts


def _split_path(path: str, bucket: str | None) -> tuple[str, str | None]:
    """Return the path in an object store's address, and the bucket: a path of one part, or the last one of several."""
    parts = [part for part in path.split("/") if part]
    if bucket is None and len(parts) == 1:
        return "", parts[0]
    if bucket is not None and parts and parts[-1] == bucket:
        parts = parts[:-1]
    return "/".join(parts), bucket


def _split_host(host: str, bucket: str | None) -> tuple[str, str | None]:
    match = None if _NO_BUCKET_IN_HOST.fullmatch(host) else _BUCKET_IN_HOST.fullmatch(host)
    if match and bucket in {None, match["bucket"]}:
        host, bucket = match["service"], match["bucket"]
    own = _TOS_OWN.fullmatch(host)
    return (f"tos-s3-{own['rest']}" if own else host), bucket


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _region(host: str) -> str:
    if match := _RUNPOD.fullmatch(host):
        return match["data_center"].upper()
    if host.endswith(_REGION_AUTO):
        return "auto"
    for pattern in _REGION_IN_HOST:
        if match := pattern.fullmatch(host):
            return match["region"]
    return "us-east-1"


def _addressing(parts: SplitResult, host: str, bucket: str | None) -> str:
    if host.endswith(_VIRTUAL_ONLY):
        return "virtual"
    # With a dot in the bucket's name, the host has one label more than Amazon's certificate covers.
    aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return "virtual" if aws and not (parts.scheme == "https" and bucket and "." in bucket) else "path"


def make_client(
    target: S3Target,
    *,
    attempts: int = 4,
    connect_timeout_s: float = 10,
    read_timeout_s: float = 60,
    connections: int = 16,
    config: dict[str, Any] | None = None,
) -> Any:  # noqa: ANN401 - boto3 makes its classes at run time
    """Return a boto3 client whose uploads and signed addresses Amazon S3, R2, GCS, MinIO and RunPod's volumes all accept.

    It uses signature version 4, retries in standard mode (`attempts` in all), and checksums only where the protocol requires
    them: other stores refuse those that boto3 adds by default since 1.36. `config` is passed on to `botocore.config.Config`.
    """
    import boto3.session  # noqa: PLC0415 - see the module's docstring
    from botocore.config import Config  # noqa: PLC0415 - as above

    # Use a separate session: boto3's default one is shared by every thread and must not be created by two at once.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=target.endpoint_url,
        region_name=target.region,
        aws_access_key_id=target.access_key_id,
        aws_secret_access_key=target.secret_access_key,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": target.addressing_style},
            retries={"total_max_attempts": attempts, "mode": "standard"},
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            max_pool_connections=connections,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            tcp_keepalive=True,
            **(config or {}),
        ),
    )
