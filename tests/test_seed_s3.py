"""A model from the hub into volumes through S3: every fault that RunPod's API is known for, on a real server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from devkit.hub import Hub as StandIn
from devkit.s3 import RunPodProxy, S3Server
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.model_spec import HubFile, ModelSpec, UrlSource
from worker.seed import seed_command
from worker.seed.errors import S3FileDiffers, S3KeysRefused, S3Unreachable, S3VolumeFull, S3VolumeNotFound
from worker.seed.fill import S3Filler
from worker.seed.relay import RelayLoad
from worker.seed.s3_api import S3Api, S3Keys, S3Place, s3_api_at
from worker.seed.s3_volume import S3Volume
from worker.seed.sibling import Sibling
from worker.store.layout import Layout
from worker.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.base.progress import ModelProgress
    from worker.seed.outcome import Outcome

KIB = 1024
PART = 64 * KIB
COUNT = 10
FAST = RelayLoad(
    downloads=3,
    uploads=3,
    part_bytes=PART,
    memory_bytes=5 * PART,
    patience_s=20.0,
    judge_s=0.5,
    poll_s=0.01,
)
KEY = "models/loras/a.safetensors"
SEAL = ".worker/seals/loras/a.safetensors.json"


def weights(size_bytes: int) -> bytes:
    """A whole safetensors file of random bytes."""
    offsets = [0, size_bytes - 108]
    header = json.dumps({"t": {"dtype": "U8", "shape": [size_bytes - 108], "data_offsets": offsets}}).encode().ljust(100)
    return len(header).to_bytes(8, "little") + header + os.urandom(size_bytes - 108)


DATA = weights(COUNT * PART - 17)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as found:
        yield found


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    root = tmp_path_factory.mktemp("hub")
    (root / "org/repo").mkdir(parents=True)
    (root / "org/repo/a.safetensors").write_bytes(DATA)
    (root / "org/repo/cut.safetensors").write_bytes(DATA[:-1])
    with StandIn(root) as hub:
        yield hub


class Seeder:
    """Two volumes behind a proxy, a hub, and what is seeded from one to the other."""

    def __init__(self, server: S3Server, proxy: RunPodProxy, stand_in: StandIn) -> None:
        self.server = server
        self.proxy = proxy
        self.stand_in = stand_in
        self.hub = Hub(stand_in.endpoint, Network(credentials(stand_in.endpoint, None, None), read_timeout_s=10))
        self.moments: list[ModelProgress] = []
        self.cancel = threading.Event()
        self._client: Any = None

    def volume(self, name: str = "vol1") -> S3Volume:
        place = S3Place(name, "", self.proxy.endpoint_url)
        if self._client is None:  # it takes boto3 half a second to make one
            self._client = s3_api_at(place, S3Keys("user_devkit", "rps_devkit"), 12)._client
        return S3Volume(S3Api(place, self._client))

    def seed(self, *volumes: str, spec: ModelSpec | None = None, load: RelayLoad = FAST) -> list[Outcome]:
        filler = S3Filler(self.hub, [self.volume(name) for name in volumes or ("vol1",)], load)
        return filler.ensure(spec or self.spec(), self.moments.append, self.cancel)

    @staticmethod
    def spec(sha256: str | None = None) -> ModelSpec:
        return ModelSpec("loras", "a.safetensors", HubFile("org/repo", "a.safetensors"), sha256)

    def read(self, key: str = KEY, volume: str = "vol1") -> bytes:
        data: bytes = self.server.client.get_object(Bucket=volume, Key=key)["Body"].read()
        return data

    def files(self, volume: str = "vol1") -> list[str]:
        found = self.server.client.list_objects_v2(Bucket=volume).get("Contents", ())
        return [entry["Key"] for entry in found]

    def uploads(self, volume: str = "vol1") -> list[Any]:
        return list(self.server.client.list_multipart_uploads(Bucket=volume).get("Uploads", ()))

    def check_seeded(self, volume: str = "vol1") -> None:
        """The bytes are right, the seal is, and nothing else is left."""
        assert hashlib.sha256(self.read(volume=volume)).hexdigest() == SHA256
        seal = json.loads(self.read(SEAL, volume))
        assert (seal["size"], seal["mtime"], seal["sha256"]) == (len(DATA), None, SHA256)
        assert self.files(volume) == [SEAL, KEY]
        assert self.uploads(volume) == []

    @property
    def parts_sent(self) -> int:
        return self.proxy.count("UploadPart")


@pytest.fixture(scope="module")
def shared(server: S3Server, stand_in: StandIn) -> Iterator[Seeder]:
    with RunPodProxy(server.endpoint_url, keys=["user_devkit"]) as proxy:
        yield Seeder(server, proxy, stand_in)


@pytest.fixture
def seeder(shared: Seeder) -> Seeder:
    shared.server.reset()
    for name in ("vol1", "vol2"):
        shared.server.bucket(name)
    shared.stand_in.reset()
    shared.proxy.reset()
    shared.cancel.clear()
    return shared


def test_a_model_is_seeded_checked_and_sealed(seeder: Seeder) -> None:
    [outcome] = seeder.seed()
    assert (outcome.how, outcome.size_bytes, outcome.moved_bytes) == ("sent", len(DATA), len(DATA))
    seeder.check_seeded()
    assert seeder.parts_sent == COUNT


def test_no_folder_of_models_is_listed_and_nothing_is_asked_that_runpod_lacks(seeder: Seeder) -> None:
    seeder.seed()
    asked = {call.operation for call in seeder.proxy.calls}
    assert not asked & {"ListObjectsV2", "DeleteObjects"}
    assert all(call.status < 400 or call.operation in {"HeadObject", "GetObject"} for call in seeder.proxy.calls)


def test_one_download_feeds_two_volumes(seeder: Seeder) -> None:
    outcomes = seeder.seed("vol1", "vol2")
    assert [outcome.how for outcome in outcomes] == ["sent", "sent"]
    seeder.check_seeded("vol1")
    seeder.check_seeded("vol2")
    assert seeder.stand_in.bytes_sent("*a.safetensors") < 1.1 * len(DATA)


def test_what_is_there_is_not_sent_again(seeder: Seeder) -> None:
    seeder.seed()
    seeder.proxy.reset()
    [first, second] = seeder.seed("vol1", "vol2")
    assert (first.how, first.moved_bytes, second.how) == ("ready", 0, "sent")
    assert seeder.parts_sent == COUNT


def test_a_worker_finds_what_was_seeded_ready_without_network_and_hashing(seeder: Seeder, tmp_path: Path) -> None:
    seeder.seed()
    for key in seeder.files():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(seeder.read(key))
    nowhere = Hub("http://127.0.0.1:9", Network(read_timeout_s=1), patience_s=0.1)
    store = Store(Layout(tmp_path), nowhere, "worker")
    assert store.ready("loras", "a.safetensors") == tmp_path / KEY
    assert json.loads((tmp_path / SEAL).read_text())["mtime"] == int((tmp_path / KEY).stat().st_mtime)
    assert store.ensure(seeder.spec()).how == "ready"


# --- faults of the volume -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["524 done", "NoSuchUpload done", "cut done", "502"])
def test_head_object_judges_a_complete_that_answered_badly(seeder: Seeder, fault: Any) -> None:
    seeder.proxy.fault("CompleteMultipartUpload", fault)
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()
    assert seeder.parts_sent == COUNT


@pytest.mark.parametrize(
    "operation", ["UploadPart", "HeadObject", "CreateMultipartUpload", "PutObject", "ListMultipartUploads"]
)
def test_a_bad_gateway_is_asked_again(seeder: Seeder, operation: str) -> None:
    seeder.proxy.fault(operation, "502", times=2)
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()


@pytest.mark.parametrize("fault", ["cut", "cut done"])
def test_a_cut_part_is_sent_again(seeder: Seeder, fault: Any) -> None:
    seeder.proxy.fault("UploadPart", fault, after=3)
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()


def test_a_slow_head_object_is_waited_for(seeder: Seeder) -> None:
    seeder.proxy.fault("HeadObject", "slow", times=9, seconds=0.3)
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()


def test_an_upload_that_vanished_is_begun_anew(seeder: Seeder) -> None:
    seeder.proxy.fault("UploadPart", "NoSuchUpload", after=4)
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    assert hashlib.sha256(seeder.read()).hexdigest() == SHA256
    assert seeder.uploads() == []


def test_an_upload_that_vanishes_each_time_is_reported(seeder: Seeder) -> None:
    seeder.proxy.fault("UploadPart", "NoSuchUpload", times=1000)
    [outcome] = seeder.seed()
    assert outcome.how == "failed"
    assert "vanished" in str(outcome.error)


def test_a_full_volume_is_reported_and_given_its_space_back(seeder: Seeder) -> None:
    seeder.proxy.fault("UploadPart", "507", times=1000, after=2)
    [outcome] = seeder.seed()
    assert isinstance(outcome.error, S3VolumeFull)
    assert "has no room" in str(outcome.error)
    assert seeder.uploads() == []
    assert seeder.files() == []


def test_one_full_volume_leaves_the_other_alone(seeder: Seeder) -> None:
    seeder.server.client.delete_bucket(Bucket="vol2")
    [good, bad] = seeder.seed("vol1", "vol2")
    assert good.how == "sent"
    assert isinstance(bad.error, S3VolumeNotFound)
    seeder.check_seeded("vol1")


def test_a_damaged_part_is_refused_by_the_server(seeder: Seeder) -> None:
    volume = seeder.volume()
    upload = volume.bucket.begin(KEY)
    wrong = hashlib.md5(b"other", usedforsecurity=False).digest()
    with pytest.raises(Exception, match="UploadPart"):
        volume.bucket.send(KEY, upload, 1, bytearray(b"some"), wrong)


def test_keys_and_volumes_that_are_wrong_are_named(seeder: Seeder) -> None:
    with pytest.raises(S3KeysRefused, match="RUNPOD_S3_ACCESS_KEY_ID"):
        s3_api_at(seeder.volume().bucket.place, S3Keys("user_other", "rps_other"), 1).check()
    with pytest.raises(S3VolumeNotFound, match="no volume 'vol9'"):
        seeder.volume("vol9").bucket.check()


# --- faults of the source -----------------------------------------------------------------------


def test_a_cut_source_goes_on_where_it_was(seeder: Seeder) -> None:
    for after in (100_000, 200_000):
        seeder.stand_in.fault("cut", after_bytes=after, origin="cdn")
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()


def test_a_wrong_byte_is_never_published(seeder: Seeder) -> None:
    seeder.stand_in.fault("flip", at_byte=300_000, origin="cdn", count=None)
    [outcome] = seeder.seed()
    assert outcome.how == "failed"
    assert "sha256" in str(outcome.error)
    assert seeder.files() == []
    assert seeder.uploads() == []


def test_a_wrong_byte_that_was_chance_is_fetched_anew(seeder: Seeder) -> None:
    seeder.stand_in.fault("flip", at_byte=300_000, origin="cdn")
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()


def test_a_header_that_contradicts_the_length_is_refused_where_no_hash_is_told(seeder: Seeder) -> None:
    url = f"{seeder.stand_in.endpoint}/files/org/repo/cut.safetensors"
    [outcome] = seeder.seed(spec=ModelSpec("loras", "a.safetensors", UrlSource(url)))
    assert outcome.how == "failed"
    assert f"{len(DATA)}" in str(outcome.error)
    assert seeder.files() == []


def test_a_repository_that_is_not_there_is_said_without_touching_the_volume(seeder: Seeder) -> None:
    [outcome] = seeder.seed(spec=ModelSpec("loras", "x.safetensors", HubFile("org/none", "x.safetensors")))
    assert outcome.error
    assert outcome.error.code == "repo_not_found"
    assert seeder.proxy.calls == []


# --- going on -----------------------------------------------------------------------------------


def interrupted(seeder: Seeder, parts: int) -> None:
    """A run that is stopped after some parts, with others in flight."""
    seeder.proxy.fault("UploadPart", "hold", times=1000, after=parts)
    run = threading.Thread(target=seeder.seed)
    run.start()
    seeder.proxy.wait_held(FAST.uploads)
    seeder.cancel.set()
    run.join(120)
    assert not run.is_alive()
    seeder.cancel.clear()
    seeder.proxy.reset()


def test_a_stopped_run_is_gone_on_with(seeder: Seeder) -> None:
    interrupted(seeder, 4)
    [outcome] = seeder.seed()
    assert outcome.how == "sent"
    assert outcome.moved_bytes < len(DATA)
    seeder.check_seeded()
    assert seeder.parts_sent <= COUNT - 4


def test_parts_of_another_content_are_sent_again(seeder: Seeder, stand_in: StandIn) -> None:
    volume = seeder.volume()
    upload = volume.bucket.begin(KEY)
    for number in (1, 2):
        old = bytearray(os.urandom(PART))
        volume.bucket.send(KEY, upload, number, old, hashlib.md5(old, usedforsecurity=False).digest())
    seeder.proxy.wait_for("UploadPart", 2)  # a call is recorded once it was answered
    seeder.proxy.reset()
    assert stand_in.endpoint
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    seeder.check_seeded()
    assert seeder.parts_sent == COUNT


def test_uploads_that_were_cut_otherwise_are_cleared_away_at_the_end(seeder: Seeder) -> None:
    volume = seeder.volume()
    other = bytearray(DATA[: PART // 2])
    upload = volume.bucket.begin(KEY)
    for number in (1, 2):
        volume.bucket.send(KEY, upload, number, other, hashlib.md5(other, usedforsecurity=False).digest())
    volume.bucket.begin(KEY)
    volume.bucket.begin("models/loras/a.safetensors.other")
    assert [outcome.how for outcome in seeder.seed()] == ["sent"]
    assert [found["Key"] for found in seeder.uploads()] == ["models/loras/a.safetensors.other"]


def test_a_run_that_died_before_the_seal_is_finished_without_reading_or_sending(seeder: Seeder) -> None:
    seeder.seed()
    seal = seeder.read(SEAL)
    seeder.server.client.delete_object(Bucket="vol1", Key=SEAL)
    seeder.server.client.put_object(Bucket="vol1", Key=f"{SEAL}.pending", Body=seal)
    seeder.proxy.reset()
    assert [outcome.how for outcome in seeder.seed()] == ["adopted"]
    assert seeder.parts_sent == 0
    assert not [call for call in seeder.proxy.calls if call.operation == "GetObject" and call.key == KEY]
    seeder.check_seeded()


def test_a_source_that_moved_on_is_mentioned_where_nothing_is_pinned(seeder: Seeder, stand_in: StandIn) -> None:
    seeder.seed("vol1", "vol2")
    seeder.server.client.delete_object(Bucket="vol2", Key=KEY)
    stand_in.fault("sha256", value="ab" * 32, count=None)
    stand_in.fault("size", value=12345, count=None)
    [there] = seeder.seed("vol1")
    assert (there.how, there.size_bytes) == ("ready", len(DATA))
    assert there.note
    assert "newer" in there.note
    assert [outcome.how for outcome in seeder.seed("vol1", spec=seeder.spec(SHA256))] == ["failed"]
    stand_in.clear_faults()
    assert [outcome.how for outcome in seeder.seed("vol1", "vol2")] == ["ready", "sent"]
    assert seeder.seed("vol1")[0].note is None


def test_another_pin_than_what_is_there_decides(seeder: Seeder, stand_in: StandIn) -> None:
    seeder.seed()
    stand_in.fault("sha256", value="ab" * 32, count=None)
    [outcome] = seeder.seed(spec=seeder.spec("ab" * 32))
    assert isinstance(outcome.error, S3FileDiffers)
    assert seeder.read() == DATA


# --- what people put there ----------------------------------------------------------------------


def test_a_file_that_somebody_put_there_is_hashed_and_sealed(seeder: Seeder) -> None:
    seeder.server.client.put_object(Bucket="vol1", Key=KEY, Body=DATA)
    assert [outcome.how for outcome in seeder.seed()] == ["adopted"]
    seeder.check_seeded()
    assert seeder.parts_sent == 0


@pytest.mark.parametrize("data", [DATA[:-1], DATA[:-1] + bytes([DATA[-1] ^ 1])])
def test_another_file_that_somebody_put_there_is_left_alone(seeder: Seeder, data: bytes) -> None:
    seeder.server.client.put_object(Bucket="vol1", Key=KEY, Body=data)
    [outcome] = seeder.seed()
    assert isinstance(outcome.error, S3FileDiffers)
    assert seeder.read() == data
    assert seeder.files() == [KEY]


def test_a_file_that_appears_meanwhile_is_not_overwritten(seeder: Seeder) -> None:
    seeder.proxy.fault("UploadPart", "hold", after=COUNT - 1)
    run = threading.Thread(target=seeder.seed)
    run.start()
    seeder.proxy.wait_held()
    seeder.server.client.put_object(Bucket="vol1", Key=KEY, Body=DATA)
    seeder.proxy.release()
    run.join(120)
    seeder.check_seeded()
    assert seeder.proxy.count("CompleteMultipartUpload") == 0


def test_memory_is_bounded_by_the_window(seeder: Seeder) -> None:
    seeder.proxy.fault("UploadPart", "hold", times=1000)
    run = threading.Thread(target=seeder.seed)
    run.start()
    seeder.proxy.wait_held(FAST.uploads)
    seeder.stand_in.wait_idle()
    fetched = seeder.stand_in.bytes_sent("*a.safetensors")
    seeder.proxy.release()
    run.join(120)
    assert fetched <= FAST.memory_bytes + PART
    seeder.check_seeded()


def test_a_bucket_names_the_call_that_failed() -> None:
    bucket = S3Api(S3Place("v", "", "http://127.0.0.1:9"), S3Server().make_client("http://127.0.0.1:9"))
    with pytest.raises(S3Unreachable, match="run this again"):
        bucket.check()


# --- from a sibling volume ------------------------------------------------------------------------


def synced(seeder: Seeder, *volumes: str) -> tuple[list[Outcome], list[str]]:
    sibling = Sibling(seeder.volume("vol1"))
    specs, left = sibling.models()
    filler = S3Filler(seeder.hub, [seeder.volume(name) for name in volumes or ("vol2",)], FAST, sibling=sibling)
    return [found for spec in specs for found in filler.ensure(spec, seeder.moments.append, seeder.cancel)], left


def test_a_volume_is_filled_from_its_sibling_and_the_hub_is_not_asked(seeder: Seeder) -> None:
    seeder.seed()
    seeder.stand_in.reset()
    assert [outcome.how for outcome in synced(seeder)[0]] == ["sent"]
    seeder.check_seeded("vol2")
    assert seeder.stand_in.requests == []
    first, second = (json.loads(seeder.read(SEAL, volume)) for volume in ("vol1", "vol2"))
    assert {key: first[key] for key in ("sha256", "repo", "file", "commit")} == {
        key: second[key] for key in ("sha256", "repo", "file", "commit")
    }
    assert [outcome.how for outcome in synced(seeder)[0]] == ["ready"]


def test_bytes_that_are_not_those_of_the_siblings_seal_go_nowhere(seeder: Seeder) -> None:
    seeder.seed()
    seal = json.loads(seeder.read(SEAL)) | {"sha256": "ab" * 32}
    seeder.server.client.put_object(Bucket="vol1", Key=SEAL, Body=json.dumps(seal).encode())
    (outcome,), _ = synced(seeder)
    assert outcome.error
    assert outcome.error.code == "content_mismatch"
    assert seeder.files("vol2") == []
    assert seeder.uploads("vol2") == []


def test_what_is_not_as_it_was_sealed_is_left_out_by_name(seeder: Seeder) -> None:
    seeder.seed()
    seeder.server.client.put_object(Bucket="vol1", Key=KEY, Body=b"mine")
    outcomes, left = synced(seeder)
    assert outcomes == []
    assert left == ["loras/a.safetensors is left out: it is not the file that was sealed"]


def test_the_command_fills_volumes_from_their_sibling(seeder: Seeder) -> None:
    seeder.seed()
    environ = {"RUNPOD_S3_ACCESS_KEY_ID": "user_devkit", "RUNPOD_S3_SECRET_ACCESS_KEY": "rps_devkit"}
    stream = io.StringIO()
    argv = ["--sync", "vol1", "--to", "vol2", "--endpoint", seeder.proxy.endpoint_url]
    assert seed_command.run(argv, environ, stream) == 0, stream.getvalue()
    seeder.check_seeded("vol2")
    assert seed_command.run([*argv[:2], *argv[4:]], environ, stream) == 2
    assert seed_command.run([*argv, "models.toml"], environ, stream) == 2
