"""Results within what RunPod carries: inline, in a bucket of a real S3 server, on a volume; and nothing is ever lost."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ConnectionClosedError
from hypothesis import given, settings
from hypothesis import strategies as st

from devkit.local_worker import PROJECT
from devkit.s3 import S3Server
from worker.errors import BucketRefused, BucketUnreachable, OutputGone, ResultTooLarge, S3ConfigInvalid
from worker.media.address_guard import AddressRules
from worker.media.bucket import Bucket, BucketUpload, BucketUploads, _guard_connections
from worker.media.delivery import Delivery, result_size_bytes
from worker.media.s3 import S3Target, make_client
from worker.media.volume_copies import VolumeCopies, VolumeCopy
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from worker.job import OutputItem, Result

    RunAsync = Callable[[Coroutine[Any, Any, Any]], Any]

RESERVE = 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(folder=tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def store(server: S3Server) -> S3Server:
    """An empty object store with the bucket `results`."""
    server.reset()
    server.bucket("results")
    return server


def bucket_of(store: S3Server, bucket: str | None = "results", **options: Any) -> Bucket:
    target = S3Target.at(store.endpoint_url, store.access_key_id, store.secret_access_key, bucket=bucket)
    return Bucket(target, **options)


class Folder:
    """A ComfyUI's folders, with the files that a run would have written, and its history."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output, self.temp, self.volume = root / "output", root / "temp", root / "volume"
        for path in (self.output, self.temp):
            path.mkdir()

    def wrote(self, *sizes: int) -> dict[str, dict[str, Any]]:
        """The history of a run whose node 9 saved noise of these sizes."""
        files = []
        for index, size in enumerate(sizes):
            (self.output / f"{index}.png").write_bytes(os.urandom(size))
            files.append({"filename": f"{index}.png", "subfolder": "", "type": "output"})
        return {"9": {"images": files}}

    def delivery(self, **options: Any) -> Delivery:
        return Delivery(self.output, self.temp, **({"volume": self.volume} | options))

    def bytes_of(self, item: OutputItem) -> bytes:
        return (self.output / item.subfolder / item.filename).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def sent(result: Result) -> int:
    """The bytes that the SDK sends for a result."""
    return len(json.dumps(result.to_dict(), ensure_ascii=False).encode())


def got(url: str) -> tuple[bytes, Any]:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read(), response.headers


# --- in the result


def test_a_small_result_is_inline_in_every_list(folder: Folder, run_async: RunAsync) -> None:
    for name in ("a.png", "sub.mp4"):
        (folder.output / name).write_bytes(name.encode())
    outputs: dict[str, dict[str, Any]] = {
        "9": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]},
        "10": {"gifs": [{"filename": "sub.mp4", "subfolder": "", "type": "output"}], "text": ["hello"]},
    }
    result = run_async(folder.delivery().deliver("j", outputs, warnings=["node 6 was dropped"])).to_dict()
    assert set(result) == {"images", "videos", "text", "errors"}
    assert result["images"][0] == {
        "filename": "a.png",
        "type": "base64",
        "data": base64.b64encode(b"a.png").decode(),
        "node_id": "9",
        "subfolder": "",
        "media_type": "image/png",
        "size_bytes": 5,
    }
    text = {"filename": "text_10_0.txt", "type": "text", "data": "hello", "media_type": "text/plain", "size_bytes": 5}
    assert text.items() <= result["text"][0].items()
    assert result["errors"] == ["node 6 was dropped"]


def test_nothing_to_deliver_is_said_so(folder: Folder, run_async: RunAsync) -> None:
    result = run_async(folder.delivery().deliver("j", {"9": {"images": []}}, nodes={"12"}))
    assert result.to_dict() == {
        "images": [],
        "status": "success_no_images",
        "errors": ["Node 12 was asked for in 'outputs', but it produced nothing to return."],
    }


def test_a_large_result_that_may_be_returned_is_encoded_beside_the_loop(folder: Folder, run_async: RunAsync) -> None:
    result = run_async(folder.delivery(result_limit_bytes=100_000_000).deliver("j", folder.wrote(6_000_000, 1)))
    for item in result.images:
        assert base64.b64decode(item.data) == folder.bytes_of(item)


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in {".", ".."} and len(name.encode()) < 200
)


@settings(deadline=None, max_examples=60)
@given(
    files=st.dictionaries(names, st.integers(0, 400), max_size=6),
    texts=st.lists(st.text(st.characters()), max_size=3),
    warnings=st.lists(st.text(st.characters()), max_size=2),
)
def test_the_size_is_known_to_the_byte_before_a_file_is_read(
    files: dict[str, int], texts: list[str], warnings: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Folder(Path(root))
        for name, size in files.items():
            (folder.output / name).write_bytes(b"x" * size)
        saved = [{"filename": name, "subfolder": "", "type": "output"} for name in files]
        outputs: dict[str, dict[str, Any]] = {"1": {"images": saved[:3], "text": texts}, "ü": {"gifs": saved[3:]}}

        def deliver(limit_bytes: int) -> Result:
            delivery = folder.delivery(volume=None, result_limit_bytes=limit_bytes)
            result: Result = asyncio.run(delivery.deliver("j", outputs, warnings=warnings))
            return result

        size_bytes = sent(deliver(1_000_000))
        assert result_size_bytes(deliver(1_000_000)) == size_bytes
        assert sent(deliver(size_bytes + RESERVE)) == size_bytes
        with pytest.raises(ResultTooLarge) as caught:
            deliver(size_bytes + RESERVE - 1)
        assert caught.value.size_bytes == size_bytes


def test_a_file_that_changes_its_size_meanwhile_is_not_delivered_by_halves(folder: Folder, run_async: RunAsync) -> None:
    outputs = folder.wrote(5_000_000)
    delivery = folder.delivery()
    job = delivery.deliver("j", outputs)
    path = folder.output / "0.png"
    opened = Path.open

    def grown(self: Path, *args: Any) -> Any:
        with opened(self, "ab") as stream:
            stream.write(b"more")
        return opened(self, *args)

    with pytest.MonkeyPatch.context() as patch:  # of the disk: a writer between the measuring and the reading
        patch.setattr(Path, "open", grown)
        with pytest.raises(OutputGone, match=path.name):
            run_async(job)


# --- too large


@pytest.mark.parametrize(("job_id", "fits"), [("abc-e1", False), ("sync-abc-e1", True)])
def test_the_limit_is_that_of_the_jobs_kind(job_id: str, *, fits: bool, folder: Folder, run_async: RunAsync) -> None:
    outputs = folder.wrote(7_400_000)
    if fits:
        assert len(run_async(folder.delivery().deliver(job_id, outputs)).images) == 1
        return
    with pytest.raises(ResultTooLarge) as caught:
        run_async(folder.delivery().deliver(job_id, outputs))
    assert caught.value.details() == ["0.png of node 9: 7400000 bytes"]
    for word in ("BUCKET_ENDPOINT_URL", "RESULT_LIMIT_MB", f"there is no network volume at {folder.volume}"):
        assert word in str(caught.value)


def test_the_largest_files_go_to_the_volume_until_the_rest_fits(folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    outputs = folder.wrote(1_000, 50_000, 2_000, 30_000)
    result = run_async(folder.delivery(result_limit_bytes=20_000).deliver("a/b", outputs))
    assert [item.type for item in result.images] == ["base64", "volume_path", "base64", "volume_path"]
    assert result.images[1].data == "outputs/a-b/1.png"
    for item in result.images:
        data = (folder.volume / item.data).read_bytes() if item.type == "volume_path" else base64.b64decode(item.data)
        assert data == folder.bytes_of(item)
    assert sorted(path.name for path in (folder.volume / "outputs/a-b").iterdir()) == ["1.png", "3.png"]
    assert sent(result) <= 20_000


def test_files_of_one_name_have_places_of_their_own_on_the_volume(folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    (folder.temp / "0.png").write_bytes(b"t" * 20_000)
    outputs = folder.wrote(20_000)
    outputs["9"]["images"].append({"filename": "0.png", "subfolder": "", "type": "temp"})
    outputs["10"] = {"images": outputs["9"]["images"][:1]}
    result = run_async(folder.delivery(result_limit_bytes=6_000).deliver("j", outputs, previews=True))
    assert len({item.data for item in result.images}) == 3
    assert {(folder.volume / item.data).read_bytes() for item in result.images} == {
        b"t" * 20_000,
        (folder.output / "0.png").read_bytes(),
    }


def test_a_text_can_be_too_large_as_well(folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    result = run_async(folder.delivery(result_limit_bytes=10_000).deliver("j", {"3": {"text": ["ü" * 9_000, "short"]}}))
    assert [item.type for item in result.text] == ["volume_path", "text"]
    assert (folder.volume / result.text[0].data).read_text("utf-8") == "ü" * 9_000


def test_a_volume_that_takes_no_file_is_said_in_the_error(folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    (folder.volume / "outputs").write_bytes(b"a file where a folder belongs")
    with pytest.raises(ResultTooLarge, match=r"did not take the files \((Not a directory|File exists)\)"):
        run_async(folder.delivery(result_limit_bytes=10_000).deliver("j", folder.wrote(50_000)))


def test_a_link_on_the_volume_does_not_lead_out_of_it(folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    (folder.root / "elsewhere").mkdir()
    (folder.volume / "outputs").symlink_to(folder.root / "elsewhere")
    with pytest.raises(Exception, match="leaves its folder"):
        run_async(folder.delivery(result_limit_bytes=10_000).deliver("j", folder.wrote(50_000)))
    assert list((folder.root / "elsewhere").iterdir()) == []


def test_too_many_files_even_for_the_volume(folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    with pytest.raises(ResultTooLarge, match="even with every file on the volume"):
        run_async(folder.delivery(result_limit_bytes=6_000).deliver("j", folder.wrote(*[1_000] * 30)))


def test_a_stopped_copy_leaves_nothing_behind(tmp_path: Path) -> None:
    source, volume = tmp_path / "source", tmp_path / "volume"
    os.mkfifo(source)
    copies = VolumeCopies(volume, [VolumeCopy("outputs/j/a.mp4", source), VolumeCopy("outputs/j/b.mp4", b"never begun")])
    volume.mkdir()
    copying = threading.Thread(target=copies.run)
    copying.start()
    with source.open("wb") as sink:  # opens once the copy reads
        sink.write(b"a part of it")
        sink.flush()
        copies.stop()
    copying.join(30)
    assert not copying.is_alive()
    assert list((volume / "outputs/j").iterdir()) == []


# --- in a bucket


def test_everything_goes_to_the_bucket_under_addresses_that_work(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    outputs = folder.wrote(*[1_000 + index for index in range(9)])
    (folder.output / "Kätzchen 1.mp4").write_bytes(b"meow")
    outputs["10"] = {"gifs": [{"filename": "Kätzchen 1.mp4", "subfolder": "", "type": "output"}], "text": ["hello"]}
    bucket = bucket_of(store, prefix="a/b", url_expiry_s=600)
    result = run_async(folder.delivery(bucket=bucket).deliver("job-1", outputs))
    assert [item.type for item in (*result.images, *result.videos)] == ["s3_url"] * 10
    assert [item.type for item in result.text] == ["text"]
    for item in (*result.images, *result.videos):
        body, headers = got(item.data)
        assert body == folder.bytes_of(item)
        assert headers["content-type"] == item.media_type
    assert "inline; filename=\"K_tzchen 1.mp4\"; filename*=UTF-8''K%C3%A4tzchen%201.mp4" in headers["content-disposition"]
    keys = [entry["Key"] for entry in store.client.list_objects_v2(Bucket="results")["Contents"]]
    assert len(keys) == 10
    assert all(key.startswith("a/b/job-1/") for key in keys)
    assert "X-Amz-Expires=600" in result.images[0].data
    assert result.warnings == ()


def test_without_a_name_the_bucket_is_the_months(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    month = store.bucket(datetime.now(UTC).strftime("%m-%y"))
    result = run_async(folder.delivery(bucket=bucket_of(store, None)).deliver("j", folder.wrote(10)))
    assert f"/{month}/j/" in result.images[0].data
    assert got(result.images[0].data)[0] == folder.bytes_of(result.images[0])


def test_the_settings_make_the_delivery(store: S3Server, tmp_path: Path, run_async: RunAsync) -> None:
    environ = {
        "COMFYUI_DIR": str(tmp_path),
        "BUCKET_ENDPOINT_URL": f"{store.endpoint_url}/results",
        "BUCKET_ACCESS_KEY_ID": store.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": store.secret_access_key,
        "BUCKET_PREFIX": "mine",
    }
    folder = Folder(tmp_path)
    result = run_async(Delivery.of(Settings.from_env(environ)).deliver("j", folder.wrote(10)))
    assert "/results/mine/j/" in result.images[0].data


def test_a_large_text_is_a_file_in_the_bucket(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    result = run_async(folder.delivery(bucket=bucket_of(store)).deliver("j", {"3": {"text": ["ü" * 60_000]}}))
    assert result.text[0].type == "s3_url"
    assert got(result.text[0].data)[0].decode() == "ü" * 60_000


def test_what_a_bucket_does_not_take_comes_in_the_result(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    result = run_async(folder.delivery(bucket=bucket_of(store, "nowhere")).deliver("j", folder.wrote(10, 20)))
    assert [item.type for item in result.images] == ["base64", "base64"]
    (warning,) = result.warnings
    assert warning.startswith("Uploading to the bucket 'nowhere' at 127.0.0.1")
    assert "NoSuchBucket" in warning
    assert "create the bucket, or correct BUCKET_NAME" in warning


def test_what_a_bucket_does_not_take_comes_on_the_volume(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    folder.volume.mkdir()
    delivery = folder.delivery(bucket=bucket_of(store, "nowhere"), result_limit_bytes=10_000)
    result = run_async(delivery.deliver("j", folder.wrote(50_000, 20)))
    assert [item.type for item in result.images] == ["volume_path", "base64"]
    assert len(result.warnings) == 1


def test_what_fits_nowhere_fails_with_the_buckets_reason(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    delivery = folder.delivery(bucket=bucket_of(store, "nowhere"), result_limit_bytes=10_000)
    with pytest.raises(BucketRefused, match="NoSuchBucket"):
        run_async(delivery.deliver("j", folder.wrote(50_000)))


def test_a_store_that_is_not_there(folder: Folder, run_async: RunAsync) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = S3Target.at(f"http://127.0.0.1:{taken.getsockname()[1]}/results", "id", "secret")
        delivery = folder.delivery(bucket=Bucket(target), result_limit_bytes=10_000)
        with pytest.raises(BucketUnreachable, match="check BUCKET_ENDPOINT_URL") as caught:
            run_async(delivery.deliver("j", folder.wrote(50_000)))
    assert caught.value.retryable


@contextmanager
def answering(status: int, code: str, message: str) -> Iterator[str]:
    """A store that has one answer to everything."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which answers "Expect: 100-continue" at once

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/results"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "SignatureDoesNotMatch", "check BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", "allow the key to write to the bucket"),
        (400, "AuthorizationHeaderMalformed", "set BUCKET_REGION to the bucket's region"),
        (403, "RequestTimeTooSkewed", "the machine's clock is wrong"),
        (400, "Strange", "check BUCKET_NAME and BUCKET_ENDPOINT_URL"),
    ],
)
def test_a_stores_refusal_says_what_to_check_and_shows_no_key(
    status: int, code: str, advice: str, folder: Folder, run_async: RunAsync
) -> None:
    with answering(status, code, "id-0 is wrong, secret-0 too") as url:
        target = S3Target.at(url, "id-0", "secret-0")
        result = run_async(folder.delivery(bucket=Bucket(target)).deliver("j", folder.wrote(10)))
    (warning,) = result.warnings
    assert f"{code}, *** is wrong, *** too; {advice}" in warning


@pytest.mark.parametrize("style", ["virtual", "path"])
def test_both_addressing_styles_reach_the_bucket(
    style: str, store: S3Server, folder: Folder, run_async: RunAsync, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = store.endpoint_url.rpartition(":")[2]
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **more: look_up("127.0.0.1" if str(host).endswith("store.test") else host, *args, **more),
    )
    address = f"http://store.test:{port}" if style == "virtual" else f"http://127.0.0.1:{port}"
    environ = {
        "BUCKET_ENDPOINT_URL": f"{address}/results",
        "BUCKET_ACCESS_KEY_ID": store.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": store.secret_access_key,
        "BUCKET_ADDRESSING": style,
        "COMFYUI_BASE_DIR": str(folder.root),
    }
    result = run_async(Delivery.of(Settings.from_env(environ)).deliver("j", folder.wrote(10)))
    (item,) = result.images
    assert (item.type, result.warnings) == ("s3_url", ())
    assert urlsplit(item.data).netloc == (f"results.store.test:{port}" if style == "virtual" else f"127.0.0.1:{port}")
    assert got(item.data)[0] == folder.bytes_of(item)


def test_a_file_that_goes_while_it_is_uploaded(store: S3Server, tmp_path: Path) -> None:
    uploads = BucketUploads(bucket_of(store), "j", [BucketUpload("a.png", "image/png", tmp_path / "a.png")])
    with pytest.raises(OutputGone):
        uploads.run()


def test_a_cancelled_job_leaves_no_upload_open(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    for name in ("0.png", "1.png"):
        with (folder.output / name).open("wb") as file:
            file.truncate(80 << 20)
    outputs = {"9": {"images": [{"filename": f"{index}.png", "subfolder": "", "type": "output"} for index in (0, 1)]}}
    delivery = folder.delivery(bucket=bucket_of(store))

    async def cancelled() -> None:
        job = asyncio.create_task(delivery.deliver("j", outputs))
        while not store.client.list_multipart_uploads(Bucket="results").get("Uploads"):
            await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    run_async(cancelled())
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket="results")
    assert "Contents" not in store.client.list_objects_v2(Bucket="results")


def test_uploads_that_are_stopped_before_they_begin(store: S3Server) -> None:
    uploads = BucketUploads(
        bucket_of(store), "j", [BucketUpload("a.txt", "text/plain", b"a"), BucketUpload("b.txt", "text/plain", b"b")]
    )
    uploads.stop()
    uploads.run()
    assert "Contents" not in store.client.list_objects_v2(Bucket="results")


# --- the job's own bucket


def config_of(store: S3Server) -> dict[str, str]:
    return {
        "accessId": store.access_key_id,
        "accessSecret": store.secret_access_key,
        "bucketName": "results",
        "endpointUrl": store.endpoint_url,
    }


def test_a_jobs_own_bucket_comes_before_the_settings(store: S3Server, folder: Folder, run_async: RunAsync) -> None:
    store.bucket("operators")
    delivery = folder.delivery(bucket=bucket_of(store, "operators"), allow_private=("127.0.0.1",))
    own = delivery.job_bucket(config_of(store))
    result = run_async(delivery.deliver("j", folder.wrote(10), bucket=own))
    assert "/results/j/" in result.images[0].data
    assert got(result.images[0].data)[0] == folder.bytes_of(result.images[0])


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:{port}",
        "http://localhost:{port}",
        "http://[::1]:{port}",
        "http://169.254.169.254",
        "http://2130706433:{port}",
    ],
)
def test_a_jobs_own_bucket_is_not_in_the_workers_network(
    endpoint: str, store: S3Server, folder: Folder, run_async: RunAsync
) -> None:
    delivery = folder.delivery()
    own = delivery.job_bucket(config_of(store) | {"endpointUrl": endpoint.format(port=store.endpoint_url.rpartition(":")[2])})
    with pytest.raises(S3ConfigInvalid, match="has the endpointUrl") as caught:
        run_async(delivery.deliver("j", folder.wrote(10), bucket=own))
    assert store.secret_access_key not in str(caught.value)
    assert "Contents" not in store.client.list_objects_v2(Bucket="results")


def test_a_name_that_changes_its_mind_gains_nothing(store: S3Server) -> None:
    target = S3Target.at(store.endpoint_url, store.access_key_id, store.secret_access_key)
    allowed, refused = make_client(target, attempts=1), make_client(target, attempts=1)
    _guard_connections(allowed, AddressRules(private=("127.0.0.1",)))
    _guard_connections(refused, AddressRules())  # what is left when the name's first answer was a public address
    allowed.create_bucket(Bucket="first")
    with pytest.raises(ConnectionClosedError):
        refused.create_bucket(Bucket="second")
    assert {bucket["Name"] for bucket in allowed.list_buckets()["Buckets"]} == {"results", "first"}


# --- memory


DELIVER_LARGE = """
import asyncio, json, os, resource, sys
from pathlib import Path
from worker.media.delivery import Delivery
from worker.settings import Settings

way, base, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if way == "volume":
    os.environ["BUCKET_ENDPOINT_URL"] = os.environ["BUCKET_ACCESS_KEY_ID"] = os.environ["BUCKET_SECRET_ACCESS_KEY"] = ""
(base / "output").mkdir()
(base / "volume").mkdir()
settings = Settings.from_env(os.environ | {"COMFYUI_DIR": str(base), "VOLUME_PATH": str(base / "volume")})
delivery = Delivery.of(settings)

def deliver(name, length):
    with (base / "output" / name).open("wb") as file:
        file.truncate(length)
    outputs = {"9": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}}
    return asyncio.run(delivery.deliver("j", outputs))

deliver("small.mp4", 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(item,) = deliver("large.mp4", size).images
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"type": item.type, "grown_bytes": grown * 1024}))
"""


@pytest.mark.parametrize("way", ["bucket", "volume"])
def test_a_large_video_is_streamed(way: str, store: S3Server, tmp_path: Path) -> None:
    environ = os.environ | {
        "BUCKET_ENDPOINT_URL": f"{store.endpoint_url}/results",
        "BUCKET_ACCESS_KEY_ID": store.access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": store.secret_access_key,
        "PYTHONPATH": str(PROJECT),
    }
    done = subprocess.run(
        [sys.executable, "-c", DELIVER_LARGE, way, str(tmp_path), str(256 << 20)],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(done.stdout)
    assert report["type"] == ("s3_url" if way == "bucket" else "volume_path")
    assert report["grown_bytes"] < 80 << 20
