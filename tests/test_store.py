"""A model that is wanted becomes a file that can be used, or one sentence that says why not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import socket
import threading
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from devkit.hub import Hub as StandIn
from worker.errors import (
    ContentMismatch,
    EnsureCancelled,
    FileIncomplete,
    LinkAstray,
    NotAFile,
    NotAModel,
    RepoNotFound,
    SourceChanged,
    SourceRefused,
    SourceUnreachable,
    UnsafePath,
    UnsealedMismatch,
    VolumeFailed,
    VolumeFull,
    VolumeMissing,
    VolumeReadOnly,
)
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.model_spec import HubFile, ModelSpec, UrlSource
from worker.store import pod_links
from worker.store.inventory import Standing, look_up_file, not_ready
from worker.store.layout import Layout
from worker.store.seals import Seal, read_seal, whole_mtime, write_seal
from worker.store.store import DownloadHooks, LockTiming, RangeTuning, ReadyModel, Store, Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.moosefs import MooseFS
    from worker.base.progress import ModelProgress

MIB = 1024 * 1024
SMALL = RangeTuning(
    connections=2, request_bytes=MIB // 2, smallest_bytes=MIB // 4, buffer_bytes=64 * 1024, unsaved_bytes=MIB, patience_s=5
)
QUICK = LockTiming(heartbeat_s=0.3, stale_s=2, quiet_s=0.5, look_s=0.1, poll_s=0.05, attempt_s=0.1, lone_patience_s=0.2)


def safetensors(tensor_bytes: int, seed: int = 1) -> bytes:
    header = json.dumps({"t": {"dtype": "U8", "shape": [tensor_bytes], "data_offsets": [0, tensor_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(tensor_bytes)


WEIGHTS = safetensors(2 * MIB)
OTHER = safetensors(2 * MIB, 2)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
OTHER_SHA256 = hashlib.sha256(OTHER).hexdigest()
SOURCE = HubFile("org/repo", "model.safetensors")
SPEC = ModelSpec("checkpoints", "sub/model.safetensors", SOURCE)
PINNED = ModelSpec("checkpoints", "sub/model.safetensors", SOURCE, SHA256)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "hub/org/repo"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "notes.txt").write_bytes(b"hello\n")
    return tmp_path / "hub"


@pytest.fixture
def stand_in(root: Path) -> Iterator[StandIn]:
    with StandIn(root) as made:
        yield made


class Setup:
    """A volume, and stores on it that talk to the stand-in."""

    def __init__(self, endpoint: str, volume: Path) -> None:
        self.endpoint = endpoint
        self.volume = volume
        self.layout = Layout(volume)
        self.final = volume / "models/checkpoints/sub/model.safetensors"

    def store(self, **options: Any) -> Store:
        hub = Hub(self.endpoint, Network(credentials(self.endpoint, None, None), read_timeout_s=2), patience_s=2)
        return Store(options.pop("layout", self.layout), hub, "pod-1", **{"tuning": SMALL, "timing": QUICK, **options})

    def put(self, content: bytes = WEIGHTS) -> None:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.final.write_bytes(content)

    def seal(self) -> Seal | None:
        return read_seal(self.layout.seal(SPEC.folder, SPEC.name))

    def litter(self) -> list[Path]:
        """What is left of downloads and half-written records."""
        partials = self.layout.partials.rglob("*") if self.layout.partials.exists() else ()
        pending = (self.layout.state / "pending").glob("*")
        return [path for path in partials if path.is_file()] + [
            *self.volume.rglob("*.tmp"),
            *self.volume.rglob("*.pending"),
            *pending,
        ]


@pytest.fixture(params=["ext4", "moosefs"])
def setup_everywhere(request: pytest.FixtureRequest, stand_in: StandIn, tmp_path: Path) -> Setup:
    if request.param == "ext4":
        return Setup(stand_in.endpoint, tmp_path / "volume")
    volume: MooseFS = request.getfixturevalue("moosefs")
    return Setup(stand_in.endpoint, volume.mounts[0] / request.node.name.replace("[", "-").strip("]"))


@pytest.fixture
def setup(stand_in: StandIn, tmp_path: Path) -> Setup:
    return Setup(stand_in.endpoint, tmp_path / "volume")


# --- fetched ------------------------------------------------------------------------------------


def test_a_missing_model_is_fetched_checked_published_and_sealed(setup_everywhere: Setup, stand_in: StandIn) -> None:
    setup = setup_everywhere
    seen: list[ModelProgress] = []
    found = setup.store().ensure(SPEC, seen.append)
    assert (found.path, found.how, found.bytes_fetched) == (setup.final, "downloaded", len(WEIGHTS))
    assert setup.final.read_bytes() == WEIGHTS
    seal = setup.seal()
    assert seal is not None
    assert seal.fits(setup.final.stat())
    assert (seal.sha256, seal.etag, seal.repo, seal.file, seal.by) == (SHA256, SHA256, "org/repo", "model.safetensors", "pod-1")
    assert seal.commit in {request.path.split("/")[5] for request in stand_in.requests if request.route == "cdn"}
    assert setup.litter() == []
    assert {progress.total_bytes for progress in seen} == {len(WEIGHTS)}
    assert all(progress.done_bytes <= len(WEIGHTS) for progress in seen)


def test_a_sealed_model_is_ready_without_network_or_lock(setup_everywhere: Setup, stand_in: StandIn) -> None:
    setup = setup_everywhere
    setup.store().ensure(SPEC)
    locks_before = sorted(setup.layout.locks.rglob("*"))
    stand_in.clear_log()
    with mock.patch.object(socket, "create_connection", side_effect=AssertionError("network")):
        store = setup.store()
        assert store.ready(SPEC.folder, SPEC.name) == setup.final
        assert store.ensure(SPEC).how == "ready"
        assert store.ensure(PINNED).how == "ready"
    assert stand_in.requests == []
    assert sorted(setup.layout.locks.rglob("*")) == locks_before


def test_another_host_finds_it_ready_at_once(stand_in: StandIn, moosefs: MooseFS) -> None:
    here, there = (Setup(stand_in.endpoint, mount / "two-hosts") for mount in moosefs.mounts[:2])
    here.store().ensure(SPEC)
    assert there.store().ensure(SPEC).how == "ready"
    assert there.final.read_bytes() == WEIGHTS


def test_small_files_without_a_hash_are_fetched_too(setup: Setup) -> None:
    found = setup.store().ensure(ModelSpec("configs", "notes.txt", HubFile("org/repo", "notes.txt")))
    assert found.path.read_bytes() == b"hello\n"
    seal = read_seal(setup.layout.seal("configs", "notes.txt"))
    assert seal is not None
    assert seal.sha256 == hashlib.sha256(b"hello\n").hexdigest()


def test_a_small_file_is_checked_against_what_git_calls_it(setup: Setup, stand_in: StandIn) -> None:
    stand_in.fault("flip", at_byte=2, count=1)
    found = setup.store().ensure(ModelSpec("configs", "notes.txt", HubFile("org/repo", "notes.txt")))
    assert found.path.read_bytes() == b"hello\n"
    assert found.bytes_fetched == 12
    stand_in.fault("flip", at_byte=3, count=None)
    with pytest.raises(ContentMismatch, match="git blob"):
        setup.store().ensure(ModelSpec("configs", "other.txt", HubFile("org/repo", "notes.txt")))
    assert not setup.layout.model("configs", "other.txt").exists()
    assert setup.litter() == []


FOREIGN = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n", "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html>Log in</html>", "web page"),
    "json": (b'{"error": "not found"}', "JSON"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 99, "gzip"),
    "empty": (b"", "empty"),
    "text": (b"Not found\n", "text"),
}


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "bin", "gguf", "onnx", "GGUF", "Pth"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_model_is_never_published(setup: Setup, stand_in: StandIn, root: Path, suffix: str, kind: str) -> None:
    content, said = FOREIGN[kind]
    (root / "org/repo/sent").write_bytes(content)
    said = "GGUF" if suffix.lower() == "gguf" and said == "text" else said
    spec = ModelSpec("checkpoints", f"model.{suffix}", UrlSource(f"{stand_in.endpoint}/files/org/repo/sent"))
    with pytest.raises(NotAFile, match=said):
        setup.store().ensure(spec)
    assert not setup.layout.model("checkpoints", spec.name).exists()
    assert setup.litter() == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.pth", b"PK\x03\x04" + b"\0" * 99),
        ("model.pt", b"\x80\x02" + b"\0" * 99),
        ("model.gguf", b"GGUF\x03\0\0\0" + b"\0" * 99),
        ("model.onnx", b"\x08\x07\x12\x07pytorch" + b"\0" * 99),
        ("model.bin", bytes(range(256))),
        ("vocab.json", b'{"a": 1}'),
        ("merges.txt", b""),
    ],
)
def test_what_may_be_a_model_is(setup: Setup, stand_in: StandIn, root: Path, name: str, content: bytes) -> None:
    (root / "org/repo/sent").write_bytes(content)
    spec = ModelSpec("checkpoints", name, UrlSource(f"{stand_in.endpoint}/files/org/repo/sent"))
    assert setup.store().ensure(spec).how == "downloaded"


@pytest.mark.parametrize("sealed", [False, True])
def test_a_file_that_is_no_model_is_named_whoever_put_it_there(setup: Setup, *, sealed: bool) -> None:
    path = setup.layout.model("checkpoints", "model.PTH")
    path.parent.mkdir(parents=True)
    path.write_bytes(FOREIGN["page"][0])
    if sealed:
        seal = Seal(size=path.stat().st_size, mtime=whole_mtime(path.stat()), sha256=None)
        write_seal(setup.layout.seal("checkpoints", "model.PTH"), seal)
    found = look_up_file(setup.layout, "checkpoints", "model.PTH")
    assert found.standing is (Standing.READY if sealed else Standing.INCOMPLETE)
    assert isinstance(found.error, NotAModel)
    assert "web page" in str(found.error)


def test_without_a_version_nobody_goes_on_with_what_another_worker_left(setup: Setup, stand_in: StandIn) -> None:
    for name in ("ETag", "Last-Modified"):
        stand_in.fault("without", value=name, count=None)
    spec = ModelSpec("checkpoints", SPEC.name, UrlSource(f"{stand_in.endpoint}/files/org/repo/model.safetensors"))
    stand_in.fault("stall", after_bytes=MIB, count=1)
    cancel = threading.Event()

    def stop() -> None:
        stand_in.wait_stalled(1)
        cancel.set()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(EnsureCancelled):
        setup.store().ensure(spec, cancel=cancel)
    stopping.join()
    assert setup.litter()
    found = setup.store().ensure(spec)
    assert found.bytes_fetched == len(WEIGHTS)
    assert setup.litter() == []


def test_a_version_that_went_leaves_no_partial(setup: Setup, stand_in: StandIn, root: Path) -> None:
    spec = ModelSpec("checkpoints", SPEC.name, UrlSource(f"{stand_in.endpoint}/files/org/repo/model.safetensors"))
    stand_in.fault("stall", after_bytes=1000, skip=2, count=None)

    def change() -> None:
        stand_in.wait_stalled(2)
        new = root / "org/repo/new"
        new.write_bytes(OTHER)
        new.replace(root / "org/repo/model.safetensors")
        stand_in.clear_faults()

    changing = threading.Thread(target=change)
    changing.start()
    with pytest.raises(SourceChanged):
        setup.store().ensure(spec)
    changing.join()
    assert setup.litter() == []
    assert setup.store().ensure(spec).how == "downloaded"
    assert setup.final.read_bytes() == OTHER


def test_a_plain_address_with_a_known_hash_is_checked_against_it(setup: Setup, stand_in: StandIn) -> None:
    source = UrlSource(f"{stand_in.endpoint}/files/org/repo/model.safetensors")
    with pytest.raises(ContentMismatch, match=OTHER_SHA256):
        setup.store().ensure(ModelSpec("checkpoints", SPEC.name, source, OTHER_SHA256))
    assert not setup.final.exists()
    assert setup.litter() == []
    assert setup.store().ensure(ModelSpec("checkpoints", SPEC.name, source, SHA256)).how == "downloaded"


def test_a_plain_safetensors_file_that_is_none_is_refused(setup: Setup, stand_in: StandIn) -> None:
    with pytest.raises(ContentMismatch, match="header"):
        setup.store().ensure(ModelSpec("checkpoints", SPEC.name, UrlSource(f"{stand_in.endpoint}/files/org/repo/notes.txt")))
    assert not setup.final.exists()
    assert setup.litter() == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_flipped_byte_is_found_and_fetched_anew(setup_everywhere: Setup, stand_in: StandIn, count: int) -> None:
    setup = setup_everywhere
    stand_in.fault("flip", at_byte=len(WEIGHTS) // 2, count=1)
    if count == 2:
        stand_in.fault("flip", at_byte=77, skip=1, count=1)
    found = setup.store().ensure(SPEC)
    assert setup.final.read_bytes() == WEIGHTS
    assert found.bytes_fetched == (count + 1) * len(WEIGHTS)
    assert setup.litter() == []


@pytest.mark.parametrize("lie", ["hash", "bytes"])
def test_a_source_that_lies_is_refused_and_nothing_is_published(setup: Setup, stand_in: StandIn, lie: str) -> None:
    if lie == "hash":
        stand_in.fault("sha256", value=OTHER_SHA256, count=None)
    else:
        stand_in.fault("flip", at_byte=1000, count=None)
    with pytest.raises(ContentMismatch, match="nothing was stored"):
        setup.store().ensure(SPEC)
    assert not setup.final.exists()
    assert setup.litter() == []


def test_a_pin_that_the_source_denies_costs_no_byte(setup: Setup, stand_in: StandIn) -> None:
    with pytest.raises(ContentMismatch, match=OTHER_SHA256):
        setup.store().ensure(ModelSpec("checkpoints", SPEC.name, SOURCE, OTHER_SHA256))
    with pytest.raises(ContentMismatch, match="size"):
        setup.store().ensure(ModelSpec("checkpoints", SPEC.name, SOURCE, None, 5))
    assert not any(request.route == "cdn" for request in stand_in.requests)


def test_what_is_permanent_leaves_nothing_behind(setup: Setup) -> None:
    with pytest.raises(RepoNotFound):
        setup.store().ensure(ModelSpec("checkpoints", "x.safetensors", HubFile("org/nothing", "x.safetensors")))
    assert not setup.layout.models.exists()
    assert setup.litter() == []


def test_what_was_cut_off_is_continued(setup: Setup, stand_in: StandIn) -> None:
    # One connection sends a part and then nothing; the other gets nothing at all.
    stand_in.fault("stall", after_bytes=200_000, count=None, route="cdn")
    impatient = RangeTuning(connections=1, request_bytes=4 * MIB, smallest_bytes=4 * MIB, buffer_bytes=50_000, patience_s=0.1)
    with pytest.raises(SourceUnreachable, match="the received bytes are kept"):
        setup.store(tuning=impatient).ensure(SPEC)
    stand_in.reset()
    found = setup.store().ensure(SPEC)
    assert found.bytes_fetched == len(WEIGHTS) - 200_000
    assert setup.final.read_bytes() == WEIGHTS


def test_cancelling_leaves_what_the_next_one_goes_on_with(setup: Setup, stand_in: StandIn) -> None:
    stand_in.fault("stall", after_bytes=300_000, count=2, route="cdn")
    cancel = threading.Event()

    def cancel_when_stalled() -> None:
        stand_in.wait_stalled(2)
        cancel.set()

    canceller = threading.Thread(target=cancel_when_stalled)
    canceller.start()
    with pytest.raises(EnsureCancelled):
        setup.store().ensure(SPEC, cancel=cancel)
    canceller.join()
    stand_in.release()
    assert 0 < setup.store().ensure(SPEC).bytes_fetched < len(WEIGHTS)


def test_where_plain_http_is_refused_and_there_is_no_xet_it_is_said(setup: Setup, stand_in: StandIn) -> None:
    """Where there is: tests/test_xet.py."""
    stand_in.fault("expired", route="cdn", count=None)
    with pytest.raises(SourceRefused):
        setup.store().ensure(SPEC)


def test_threads_that_want_one_model_fetch_it_once(setup: Setup, stand_in: StandIn) -> None:
    store = setup.store()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(store.ensure(SPEC).how)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["downloaded", "ready", "ready", "ready"]
    assert stand_in.bytes_sent() == len(WEIGHTS)


# --- one content, two names ---------------------------------------------------------------------

TWIN = ModelSpec("text_encoders", "twin.safetensors", SOURCE)


@pytest.mark.parametrize("at", ["look-up", "body"])
def test_whatever_a_worker_waits_for_it_sees_that_another_published_the_model(setup: Setup, stand_in: StandIn, at: str) -> None:
    """A hub that puts everybody off for an hour, and one whose bytes drip: the file is there all the same."""
    if at == "look-up":
        stand_in.fault("status", status=429, retry_after_s=3600, route="resolve", count=None)
    else:
        stand_in.fault("slow", bytes_per_s=9000, shared=False, route="cdn", count=None)
    found: list[ReadyModel] = []
    waiting = threading.Thread(target=lambda: found.append(setup.store().ensure(SPEC)))
    waiting.start()
    stand_in.wait_until(lambda: any(r.route == ("resolve" if at == "look-up" else "cdn") for r in stand_in.requests))
    setup.put()
    write_seal(
        setup.layout.seal(SPEC.folder, SPEC.name),
        Seal(size=len(WEIGHTS), mtime=whole_mtime(setup.final.stat()), sha256=SHA256),
    )
    waiting.join(120)
    assert [ready.how for ready in found] == ["ready"]
    assert setup.litter() == []


def test_an_error_that_came_after_another_worker_published_is_none(setup: Setup, stand_in: StandIn) -> None:
    class Publish(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "locked":
                stand_in.fault("expired", route="cdn", count=None)
                setup.put()
                write_seal(
                    setup.layout.seal(SPEC.folder, SPEC.name),
                    Seal(size=len(WEIGHTS), mtime=whole_mtime(setup.final.stat()), sha256=SHA256),
                )
                raise SourceRefused("somewhere", 403)

    assert setup.store(hooks=Publish()).ensure(SPEC).how == "ready"


def test_one_content_under_two_names_is_fetched_once(setup_everywhere: Setup, stand_in: StandIn) -> None:
    setup = setup_everywhere
    found: list[ReadyModel] = []
    threads = [
        threading.Thread(target=lambda spec=spec: found.append(setup.store().ensure(spec))) for spec in (SPEC, TWIN, PINNED)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stand_in.bytes_sent() == len(WEIGHTS)
    assert sum(ready.bytes_fetched for ready in found) == len(WEIGHTS)
    for spec in (SPEC, TWIN):
        path, seal = setup.layout.model(spec.folder, spec.name), read_seal(setup.layout.seal(spec.folder, spec.name))
        assert path.read_bytes() == WEIGHTS
        assert seal is not None
        assert seal.fits(path.stat())
        assert (seal.sha256, seal.repo) == (SHA256, "org/repo")
        assert setup.store().ensure(spec).how == "ready"
    assert setup.litter() == []


def refuse_links(_setup: Setup) -> Any:
    return mock.patch.object(Path, "hardlink_to", side_effect=OSError(errno.EPERM, "Operation not permitted"))


def remove(setup: Setup) -> Any:
    setup.final.unlink()
    return contextlib.nullcontext()


def exchange(setup: Setup) -> Any:
    setup.put(OTHER)
    os.utime(setup.final, (1, 1))
    return contextlib.nullcontext()


def exchange_just_now(setup: Setup) -> Any:
    real = Path.hardlink_to

    def link(path: Path, target: Path) -> None:
        exchange(setup)
        real(path, target)

    return mock.patch.object(Path, "hardlink_to", link)


def name_badly(setup: Setup) -> Any:
    path = setup.layout.lock_progress(SHA256)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "../../etc/passwd"}))
    return contextlib.nullcontext()


@pytest.mark.parametrize("spoil", [refuse_links, remove, exchange, exchange_just_now, name_badly])
def test_a_content_that_has_no_other_name_any_more_is_fetched(setup: Setup, spoil: Callable[[Setup], Any]) -> None:
    setup.store().ensure(SPEC)
    with spoil(setup):
        found = setup.store().ensure(TWIN)
    assert (found.how, found.bytes_fetched) == ("downloaded", len(WEIGHTS))
    assert found.path.read_bytes() == WEIGHTS
    assert setup.litter() == []


def test_a_link_whose_worker_died_before_the_seal_is_adopted(setup: Setup, stand_in: StandIn) -> None:
    setup.store().ensure(SPEC)
    with mock.patch("worker.store.store.seal_download", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        setup.store().ensure(TWIN)
    stand_in.clear_log()
    assert setup.store().ensure(ModelSpec(TWIN.folder, TWIN.name, SOURCE, SHA256)).how == "adopted"
    assert stand_in.requests == []
    assert setup.litter() == []


# --- there already ------------------------------------------------------------------------------


def test_a_file_put_there_by_hand_is_used_as_it_is(setup: Setup, stand_in: StandIn) -> None:
    setup.put(OTHER)
    assert setup.store().ensure(SPEC).how == "by_hand"
    assert setup.final.read_bytes() == OTHER
    assert setup.seal() is None
    assert stand_in.requests == []


def test_a_file_put_there_by_hand_is_adopted_when_it_is_the_pinned_one(setup: Setup, stand_in: StandIn) -> None:
    setup.put()
    assert setup.store().ensure(PINNED).how == "adopted"
    assert setup.store().ensure(PINNED).how == "ready"
    assert stand_in.requests == []


def test_a_file_that_is_not_the_pinned_one_is_reported_and_left(setup: Setup) -> None:
    setup.put(OTHER)
    store = setup.store()
    with pytest.raises(UnsealedMismatch) as caught:
        store.ensure(PINNED)
    assert SHA256 in str(caught.value)
    assert OTHER_SHA256 in str(caught.value)
    assert setup.final.read_bytes() == OTHER
    with (
        mock.patch("worker.store.store.sha256_of", side_effect=AssertionError("hashed again")),
        pytest.raises(UnsealedMismatch),
    ):
        store.ensure(PINNED)


def test_a_sealed_file_is_not_the_one_that_a_new_pin_asks_for(setup: Setup) -> None:
    setup.store().ensure(SPEC)
    with pytest.raises(UnsealedMismatch, match=OTHER_SHA256):
        setup.store().ensure(ModelSpec("checkpoints", SPEC.name, SOURCE, OTHER_SHA256))


@pytest.mark.parametrize("spec", [SPEC, PINNED])
def test_a_copy_that_is_not_finished_is_not_used(setup: Setup, spec: ModelSpec) -> None:
    setup.put(WEIGHTS[:-1])
    with pytest.raises(FileIncomplete, match="wait for the copy to finish"):
        setup.store().ensure(spec)
    assert setup.final.read_bytes() == WEIGHTS[:-1]


def test_a_sealed_file_that_was_touched_is_hashed_and_sealed_again(setup: Setup, stand_in: StandIn) -> None:
    setup.store().ensure(SPEC)
    os.utime(setup.final, (1, 1))
    stand_in.clear_log()
    assert setup.store().ensure(SPEC).how == "adopted"
    assert setup.store().ensure(SPEC).how == "ready"
    assert stand_in.requests == []


def test_a_sealed_file_that_was_replaced_by_hand_is_theirs(setup: Setup) -> None:
    setup.store().ensure(SPEC)
    setup.put(OTHER)
    os.utime(setup.final, (1, 1))
    assert setup.store().ensure(SPEC).how == "by_hand"
    assert setup.seal() is None, "a record that is wrong would have it hashed at every start"
    assert setup.final.read_bytes() == OTHER


def test_a_publication_cut_short_before_its_seal_is_adopted(setup: Setup, stand_in: StandIn) -> None:
    setup.put()
    pending = setup.layout.pending_seal(SPEC.folder, SPEC.name)
    write_seal(pending, Seal(size=len(WEIGHTS), mtime=whole_mtime(setup.final.stat()), sha256=SHA256, commit="c" * 40))
    assert setup.store().ensure(SPEC).how == "adopted"
    seal = setup.seal()
    assert seal is not None
    assert (seal.sha256, seal.commit) == (SHA256, "c" * 40)
    assert stand_in.requests == []
    assert setup.litter() == []


def test_what_another_worker_is_publishing_is_not_taken_for_put_there_by_hand(setup: Setup) -> None:
    """Between its name and its seal, with a second publisher that comes too late and clears up after itself."""
    nowhere = Layout(setup.volume)
    nowhere.state.mkdir(parents=True)
    nowhere.locks.write_bytes(b"in the way")
    late, published, sealed = (threading.Event() for _ in range(3))
    seen: list[ReadyModel] = []

    class Late(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "hashed":
                late.set()
                assert published.wait(60)

    class Early(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "hashed":
                assert late.wait(60)
            if step == "replaced":
                published.set()
                assert sealed.wait(60)

    threads = [
        threading.Thread(target=lambda hooks=hooks: seen.append(setup.store(hooks=hooks).ensure(SPEC)))
        for hooks in (Late(), Early())
    ]
    for thread in threads:
        thread.start()
    assert published.wait(60)
    # The late one looks now, and adopts what it finds; so does whoever else comes.
    threads[0].join(60)
    assert [ready.how for ready in seen] == ["adopted"]
    sealed.set()
    threads[1].join(60)
    assert [ready.how for ready in seen] == ["adopted", "downloaded"]
    assert setup.litter() == []


def test_a_stale_record_of_another_file_is_not_believed(setup: Setup) -> None:
    """Of equal size and time, under the same inode: its bytes decide, once."""
    setup.put(OTHER)
    found = setup.final.stat()
    for place in (setup.layout.pending(found.st_ino), setup.layout.pending_seal(SPEC.folder, SPEC.name)):
        write_seal(place, Seal(size=len(WEIGHTS), mtime=whole_mtime(found), sha256=SHA256))
    assert setup.store().ensure(SPEC).how == "by_hand"
    assert setup.litter() == []
    with mock.patch("worker.store.store.sha256_of", side_effect=AssertionError("hashed again")):
        assert setup.store().ensure(SPEC).how == "by_hand"


def test_a_seal_without_mtime_over_another_file_of_its_length_is_not_believed(
    setup: Setup, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.store.inventory._UPLOADED_S", 0.0)
    seal = setup.layout.seal(SPEC.folder, SPEC.name)
    setup.put(WEIGHTS)
    write_seal(seal, Seal(size=len(WEIGHTS), mtime=None, sha256=SHA256))
    later(setup.final, seal, OTHER)
    assert setup.store().ready(SPEC.folder, SPEC.name) is None
    assert setup.store().ensure(SPEC).how == "by_hand"
    write_seal(seal, Seal(size=len(WEIGHTS), mtime=None, sha256=SHA256))
    later(setup.final, seal, WEIGHTS)
    assert setup.store().ensure(SPEC).how == "adopted"
    assert stand_in.requests == []


def later(path: Path, than: Path, content: bytes) -> None:
    """Put another content there after the seal, by the clock of a file system that may tick slowly."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        path.write_bytes(content)
        os.utime(path, (1, 1))
        if path.stat().st_ctime_ns > than.stat().st_ctime_ns:
            return


@pytest.mark.parametrize("field", ["at", "by", "sha256", "etag", "file", "commit", "repo"])
def test_a_seal_with_a_number_where_a_text_belongs_is_none(tmp_path: Path, field: str) -> None:
    path = tmp_path / "seal.json"
    path.write_text(json.dumps({"size": 1, "mtime": 1, "sha256": None, field: 5}))
    assert read_seal(path) is None


def test_an_uploaded_file_with_a_seal_without_mtime_is_accepted_and_its_seal_filled_in(setup: Setup) -> None:
    setup.put()
    write_seal(setup.layout.seal(SPEC.folder, SPEC.name), Seal(size=len(WEIGHTS), mtime=None, sha256=SHA256))
    assert setup.store().ready(SPEC.folder, SPEC.name) == setup.final
    seal = setup.seal()
    assert seal is not None
    assert seal.fits(setup.final.stat())


def test_an_uploaded_file_that_is_cut_off_is_not(setup: Setup) -> None:
    broken = WEIGHTS[:100] + b"\0" * (len(WEIGHTS) - 100 + 5)
    setup.put(broken)
    write_seal(setup.layout.seal(SPEC.folder, SPEC.name), Seal(size=len(broken), mtime=None, sha256=SHA256))
    assert setup.store().ready(SPEC.folder, SPEC.name) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"x"',
        '{"size": 1}',
        '{"size": "1", "mtime": 1, "sha256": null}',
        '{"size": 1, "mtime": 1, "sha256": "", "v": 0}',
    ],
)
def test_a_seal_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "seal.json"
    path.write_text(text)
    assert read_seal(path) is None


def test_a_newer_seal_with_more_fields_is_read(tmp_path: Path) -> None:
    path = tmp_path / "seal.json"
    path.write_text('{"v": 2, "size": 1, "mtime": 2, "sha256": "a", "colour": "blue"}')
    assert read_seal(path) == Seal(size=1, mtime=2, sha256="a", v=2)


def test_a_file_that_appears_while_the_download_runs_is_never_overwritten(setup: Setup) -> None:
    class Meddler(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "hashed":
                setup.put(OTHER)

    found = setup.store(hooks=Meddler()).ensure(SPEC)
    assert found.how == "by_hand"
    assert setup.final.read_bytes() == OTHER
    assert setup.litter() == []


@pytest.mark.parametrize("size", [228, 229, 242, 255])
def test_a_name_as_long_as_a_disk_takes_is_fetched_and_sealed(setup: Setup, size: int) -> None:
    spec = ModelSpec("checkpoints", "n" * (size - 12) + ".safetensors", SOURCE)
    assert setup.store().ensure(spec).how == "downloaded"
    assert setup.store().ensure(spec).how == "ready"
    assert setup.litter() == []


@pytest.mark.parametrize("name", ["全角\u3000空白.safetensors", "a\xa0b.safetensors", "👩\u200d🎨.safetensors"])
def test_blanks_of_any_width_and_joined_emoji_are_letters(setup: Setup, name: str) -> None:
    spec = ModelSpec("checkpoints", name, SOURCE)
    assert setup.store().ensure(spec).path.name == name
    assert setup.store().ready("checkpoints", name)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_by_hand_whose_accents_are_written_otherwise_is_not_fetched_again(
    setup: Setup, stand_in: StandIn, forms: tuple[Any, Any]
) -> None:
    asked, there = (unicodedata.normalize(form, "é が.safetensors") for form in forms)
    path = setup.layout.model("checkpoints", there)
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    spec = ModelSpec("checkpoints", asked, SOURCE)
    assert not_ready([setup.layout], [spec]) == []
    assert (found := setup.store().ensure(spec)).how == "by_hand"
    assert found.path == path
    assert setup.store().ensure(replace(spec, sha256=SHA256)).how == "adopted"
    assert stand_in.requests == []


def test_nor_one_that_appears_at_the_very_last_moment(setup: Setup) -> None:
    class Meddler(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "replacing":
                setup.put(OTHER)

    assert setup.store(hooks=Meddler()).ensure(SPEC).how == "by_hand"
    assert setup.final.read_bytes() == OTHER
    assert setup.litter() == []


def test_nothing_is_left_where_another_worker_published_and_swept_up_at_the_very_last_moment(setup: Setup) -> None:
    class Faster(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "replacing" and not setup.final.exists():
                setup.put(WEIGHTS)
                for partial in (setup.layout.state / "partial").rglob("*"):
                    if partial.is_file():
                        partial.unlink()

    assert setup.store(hooks=Faster()).ensure(replace(SPEC, sha256=SHA256)).how == "adopted"
    assert setup.litter() == []


def test_a_broken_link_in_its_place_is_replaced_by_the_file(setup: Setup) -> None:
    setup.final.parent.mkdir(parents=True)
    setup.final.symlink_to(setup.volume / "gone")
    assert setup.store().ensure(SPEC).how == "downloaded"
    assert not setup.final.is_symlink()


def test_a_folder_in_its_place_is_named(setup: Setup) -> None:
    setup.final.mkdir(parents=True)
    with pytest.raises(VolumeFailed, match="a folder where a file belongs"):
        setup.store().ensure(SPEC)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_link_out_of_the_volume_is_not_followed(setup: Setup, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").write_bytes(WEIGHTS)
    link = setup.final if where == "file" else setup.final.parent
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "model.safetensors" if where == "file" else outside)
    with pytest.raises(UnsafePath) as caught:
        setup.store().ensure(SPEC)
    assert isinstance(caught.value, LinkAstray)
    assert f"rm {link}" in str(caught.value)
    assert "'..'" not in str(caught.value)


def test_a_folder_that_is_a_link_to_nowhere_is_named(setup: Setup) -> None:
    setup.layout.models.mkdir(parents=True)
    for target in ("gone", "/workspace/gone"):
        (setup.layout.models / "checkpoints").unlink(missing_ok=True)
        (setup.layout.models / "checkpoints").symlink_to(target)
        with pytest.raises(LinkAstray, match=f"leads to {target}, which does not exist: remove it"):
            setup.store().ensure(SPEC)


@pytest.mark.parametrize("name", pod_links.NAMES)
def test_links_made_under_the_volumes_other_name_lead_to_its_folders(setup: Setup, name: str) -> None:
    if Path(name).exists():
        pytest.skip(f"this machine has a {name}")
    (setup.volume / "ComfyUI/models").mkdir(parents=True)
    (setup.volume / "large").mkdir()
    (setup.volume / "models").symlink_to(f"{name}/ComfyUI/models")
    (setup.volume / "ComfyUI/models/checkpoints").symlink_to(f"{name}/large")
    layout = pod_links.layout_at(setup.volume)
    found = setup.store(layout=layout).ensure(SPEC)
    assert found.path == setup.volume / "large/sub/model.safetensors"
    assert setup.store(layout=layout).ready(SPEC.folder, SPEC.name) == found.path


def test_nothing_is_left_to_do_for_what_is_sealed_or_put_there_by_hand(setup: Setup, tmp_path: Path) -> None:
    setup.store().ensure(SPEC)
    loose, cut, linked = (ModelSpec("loras", f"{name}.safetensors", SOURCE) for name in ("loose", "cut", "linked"))
    for spec, content in ((loose, WEIGHTS), (cut, WEIGHTS[:-1])):
        path = setup.layout.model(spec.folder, spec.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "outside.safetensors").write_bytes(WEIGHTS)
    setup.layout.model(linked.folder, linked.name).symlink_to(tmp_path / "outside.safetensors")
    left = [
        ModelSpec(SPEC.folder, SPEC.name, SOURCE, OTHER_SHA256),
        ModelSpec(SPEC.folder, "missing.safetensors", SOURCE),
        ModelSpec("loras", SPEC.name, SOURCE),
        ModelSpec(loose.folder, loose.name, SOURCE, SHA256),
        cut,
        linked,
    ]
    assert not_ready([setup.layout], [SPEC, PINNED, loose, *left]) == left
    os.utime(setup.final, (1, 1))
    assert not_ready([setup.layout], [SPEC]) == [SPEC], "a record of ours says what it should hash to"


def test_what_lies_on_the_containers_disk_is_there_too(setup: Setup, tmp_path: Path) -> None:
    local = Layout(tmp_path / "container")
    setup.store(layout=local).ensure(SPEC)
    assert not_ready([setup.layout], [SPEC]) == [SPEC]
    assert not_ready([setup.layout, local], [SPEC]) == []


def test_many_models_are_looked_at_in_their_order_also_where_a_look_is_slow(setup: Setup) -> None:
    specs = [ModelSpec("loras", f"{number}.safetensors", SOURCE) for number in range(100)]
    for spec in specs[::2]:
        path = setup.layout.model(spec.folder, spec.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WEIGHTS)
    assert not_ready([setup.layout], specs) == specs[1::2]
    with mock.patch("worker.store.inventory._SLOW_LOOK_S", 0.0):
        assert not_ready([setup.layout], specs) == specs[1::2]


# --- RunPod's host cache ------------------------------------------------------------------------


def cache(layout: Layout, content: bytes = WEIGHTS, blob: str = SHA256) -> Path:
    repo = layout.host_cache_repo("org/repo")
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / blob).write_bytes(content)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("c" * 40)
    path = repo / "snapshots" / ("c" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(repo / "blobs" / blob)
    return path


@pytest.mark.parametrize("revision", ["main", "c" * 40])
@pytest.mark.parametrize("sha256", [None, SHA256])
def test_the_machines_cache_is_used_before_any_download(
    setup: Setup, stand_in: StandIn, revision: str, sha256: str | None
) -> None:
    path = cache(setup.layout)
    spec = ModelSpec("checkpoints", SPEC.name, HubFile("org/repo", "model.safetensors", revision), sha256)
    found = setup.store().ensure(spec)
    assert (found.path, found.how) == (path, "host_cache")
    assert stand_in.requests == []
    assert not setup.final.exists()


def test_the_cache_may_lie_elsewhere_than_the_store(setup: Setup, tmp_path: Path) -> None:
    path = cache(Layout(tmp_path / "elsewhere"))
    assert setup.store(host_cache=Layout(tmp_path / "elsewhere")).ensure(SPEC).path == path


def test_a_cached_file_without_a_name_that_tells_is_hashed_for_a_pin(setup: Setup) -> None:
    cache(setup.layout, OTHER, blob="blob1")
    assert setup.store().ensure(PINNED).how == "downloaded"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.resolve().write_bytes(WEIGHTS[:-1]),
        lambda path: (path.parents[2] / "refs/main").write_bytes(b"\xff"),
        lambda path: (path.parents[2] / "refs/main").write_text("d" * 40),
    ],
)
def test_a_cache_that_is_not_whole_is_passed_over(setup: Setup, spoil: Callable[[Path], object]) -> None:
    spoil(cache(setup.layout))
    assert setup.store().ensure(SPEC).how == "downloaded"


# --- volumes that cannot ------------------------------------------------------------------------


@pytest.fixture
def local(setup: Setup, tmp_path: Path) -> Store:
    return setup.store(layout=Layout(tmp_path / "container"))


def test_no_room_is_said_before_the_download(setup: Setup, stand_in: StandIn) -> None:
    with mock.patch("worker.store.download.free_bytes", return_value=1000), pytest.raises(VolumeFull) as caught:
        setup.store().ensure(SPEC)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (len(WEIGHTS), 1000)
    assert not any(request.route == "cdn" for request in stand_in.requests)
    assert setup.litter() == []


def test_a_quota_reached_in_the_middle_leaves_no_partial_in_the_way(
    stand_in: StandIn, moosefs: MooseFS, tmp_path: Path
) -> None:
    setup = Setup(stand_in.endpoint, moosefs.mounts[0] / "quota")
    setup.volume.mkdir()
    moosefs.set_quota(setup.volume, MIB)
    with pytest.raises(VolumeFull) as caught:
        setup.store().ensure(SPEC)
    assert caught.value.needed_bytes == len(WEIGHTS)
    assert setup.litter() == []
    local = setup.store(layout=Layout(tmp_path / "container"))
    found = Stores(setup.volume, setup.store(), local).ensure(SPEC)
    assert (found.how, found.path.is_relative_to(tmp_path)) == ("downloaded", True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["os.pwrite", "os.fdatasync", "os.ftruncate"])
def test_a_full_disk_is_said_with_the_bytes_needed(setup: Setup, number: int, call: str) -> None:
    real = getattr(os, call.removeprefix("os."))

    def fail(fd: int, *args: Any) -> Any:
        if Path(f"/proc/self/fd/{fd}").readlink().suffix == ".part":
            raise OSError(number, os.strerror(number))
        return real(fd, *args)

    with mock.patch(call, fail), pytest.raises(VolumeFull) as caught:
        setup.store().ensure(SPEC)
    assert caught.value.needed_bytes == len(WEIGHTS)
    assert not setup.final.exists()
    assert not list(setup.volume.rglob("*.part"))


def read_only(volume: Path) -> Callable[..., Any]:
    """A volume mounted read-only, as every call that would change it sees it."""
    real = os.open

    def opens(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(volume)):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *args, **options)

    return opens


def test_a_read_only_volume_serves_what_it_has(setup: Setup, local: Store, caplog: pytest.LogCaptureFixture) -> None:
    setup.put()
    with mock.patch("os.open", read_only(setup.volume)):
        assert setup.store().ensure(SPEC).how == "by_hand"
        assert setup.store().ensure(PINNED).how == "adopted"
        assert "could not seal" in caplog.text
        missing = ModelSpec("loras", "x.safetensors", SOURCE)
        with pytest.raises(VolumeReadOnly):
            setup.store().ensure(missing)
        stores = Stores(setup.volume, setup.store(), local)
        assert stores.ensure(missing).path.is_relative_to(local.layout.root)
        assert stores.ensure(missing).how == "ready"


def test_a_worker_without_a_volume_uses_its_own_disk_and_says_so_once(
    setup: Setup, local: Store, caplog: pytest.LogCaptureFixture
) -> None:
    stores = Stores(setup.volume, None, local)
    with caplog.at_level(logging.WARNING, "worker.store.store"):
        assert stores.ensure(SPEC).how == "downloaded"
        assert stores.ensure(SPEC).how == "ready"
    assert caplog.text.count("no network volume") == 1


def test_a_required_volume_is_required(setup: Setup, local: Store) -> None:
    with pytest.raises(VolumeMissing, match="REQUIRE_VOLUME"):
        Stores(setup.volume, None, local, require_volume=True).ensure(SPEC)
    with mock.patch("worker.store.download.free_bytes", return_value=1000), pytest.raises(VolumeFull):
        Stores(setup.volume, setup.store(), local, require_volume=True).ensure(SPEC)


def test_both_full_is_a_sentence_about_the_volume_with_the_containers_figures(setup: Setup, local: Store) -> None:
    free = {setup.volume: 1000, local.layout.root: 2_000_000}

    def free_bytes(path: Path) -> int:
        return next(size for root, size in free.items() if path.is_relative_to(root))

    with mock.patch("worker.store.download.free_bytes", free_bytes), pytest.raises(VolumeFull) as caught:
        Stores(setup.volume, setup.store(), local).ensure(SPEC)
    needed = f"{len(WEIGHTS) / 1e6:.2f} MB are needed"
    assert str(caught.value) == (
        f"{setup.volume} has no room: {needed}, 0.00 MB are free (less if there is a quota; "
        f"on this container's disk {needed}, 2.00 MB are free); enlarge it or remove models."
    )


@pytest.mark.parametrize(
    "trouble", [VolumeFull(Path("/disk"), 10**9, 10**6), VolumeReadOnly(Path("/disk"), "Permission denied")]
)
def test_a_container_that_cannot_step_in_for_a_read_only_volume_is_said_beside_it(
    setup: Setup, local: Store, trouble: VolumeFull | VolumeReadOnly
) -> None:
    with (
        mock.patch("os.open", read_only(setup.volume)),
        mock.patch.object(local, "ensure", side_effect=trouble),
        pytest.raises(VolumeReadOnly) as caught,
    ):
        Stores(setup.volume, setup.store(), local).ensure(SPEC)
    assert str(caught.value).startswith(f"{setup.volume} cannot be written (Read-only file system; ")
    assert ("1.00 GB are needed" in str(caught.value)) or ("Permission denied" in str(caught.value))


def test_the_volume_comes_first(setup: Setup, local: Store) -> None:
    stores = Stores(setup.volume, setup.store(), local)
    assert stores.ensure(SPEC).path == setup.final
    local.ensure(SPEC)
    assert stores.ensure(SPEC).path == setup.final
