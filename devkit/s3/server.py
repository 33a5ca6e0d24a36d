"""moto's server as a process of its own, and a boto3 client of it. Starts one process, uses the loopback network."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

import boto3
from botocore.config import Config

_START_S: Final = 60.0
_END_S: Final = 10.0
_PROJECT: Final = Path(__file__).resolve().parents[2]


class S3Server:
    """An object store that forgets everything at its end; a context manager. Any credentials are right.

    Its parts have no least size, as on RunPod's volumes; `spooled_bytes` is what it keeps of an object in memory, the rest is
    in unnamed files below `folder`.
    """

    region: Final = "us-east-1"
    access_key_id: Final = "user_devkit"
    secret_access_key: Final = "rps_devkit"  # noqa: S105 - of a server that takes any

    def __init__(self, *, folder: Path | None = None, spooled_bytes: int = 1 << 20) -> None:
        self._folder = folder
        self._spooled_bytes = spooled_bytes
        self._process: subprocess.Popen[str] | None = None
        self.endpoint_url = ""
        self.client: Any = None

    def __enter__(self) -> Self:
        environ = os.environ | {"S3_UPLOAD_PART_MIN_SIZE": "1", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(self._spooled_bytes)}
        if self._folder:
            environ["TMPDIR"] = str(self._folder)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "devkit.s3"], cwd=_PROJECT, env=environ, stdout=subprocess.PIPE, text=True
        )
        try:
            self.endpoint_url = self._first_line()
        except BaseException:
            self._end()
            raise
        self.client = self.make_client()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Return the server's process id."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    def make_client(self, endpoint_url: str | None = None) -> Any:  # noqa: ANN401 - boto3 makes its classes at run time
        """Return a boto3 client of this server, or of the proxy before it at `endpoint_url`."""
        return boto3.client(
            "s3",
            endpoint_url=endpoint_url or self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def bucket(self, name: str) -> str:
        """Make a bucket; its name."""
        self.client.create_bucket(Bucket=name)
        return name

    def reset(self) -> None:
        """Forget every bucket, object and upload."""
        request = urllib.request.Request(f"{self.endpoint_url}/moto-api/reset", method="POST")
        with urllib.request.urlopen(request, timeout=_END_S):
            pass

    def _first_line(self) -> str:
        out = self._process.stdout if self._process else None
        if out is None or not select.select([out], [], [], _START_S)[0] or not (line := out.readline().strip()):
            raise RuntimeError("moto's server did not start: is 'moto[s3,server]' installed?")
        return line

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate(timeout=_END_S)
            self._process = None
