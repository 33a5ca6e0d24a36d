"""What plain HTTP refuses comes by Xet, through the real hf_xet, and is continued, checked and given up like all else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from devkit.hub import Hub as StandIn
from worker.errors import ContentMismatch, EnsureCancelled, SourceRefused, SourceUnreachable, TokenRefused
from worker.fetch import xet
from worker.fetch.http import Network
from worker.fetch.hub import Hub, RemoteFile, credentials
from worker.fetch.ranges import RangeTuning
from worker.fetch.xet import XetFetch
from worker.model_spec import HubFile, ModelSpec
from worker.store.layout import Layout
from worker.store.locks import Locks
from worker.store.partial import Partial, PartialTaken
from worker.store.store import LockTiming, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.base.progress import ModelProgress

MIB = 1024 * 1024
WEIGHTS = random.Random(1).randbytes(10 * MIB + 77_777)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILE = HubFile("org/repo", "model.safetensors")
SPEC = ModelSpec("checkpoints", "model.safetensors", FILE)
SMALL = RangeTuning(
    connections=2, request_bytes=MIB, smallest_bytes=MIB, buffer_bytes=256 * 1024, unsaved_bytes=MIB, patience_s=20
)
QUICK = LockTiming(
    heartbeat_s=0.3, stale_s=2, quiet_s=0.5, look_s=0.1, poll_s=0.05, attempt_s=0.1, lone_patience_s=0.2, report_every_s=0
)
NEVER = threading.Event()


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """hf_xet's own attempts take a minute before it says anything."""
    with mock.patch.dict(xet.SETTINGS, {"client.retry_base_delay": "20ms", "client.retry_max_attempts": 1}):
        yield


@pytest.fixture
def in_order() -> Iterator[None]:
    """One piece after the other is asked for, and none far ahead: which one a fault befalls is known."""
    sizes = {
        "download_buffer_size": "2mb",
        "download_buffer_limit": "2mb",
        "min_reconstruction_fetch_size": "1mb",
        "max_reconstruction_fetch_size": "1mb",
        "min_prefetch_buffer": "1mb",
    }
    settings = {
        "client.ac_initial_download_concurrency": 1,
        "client.ac_max_download_concurrency": 1,
        **{f"reconstruction.{name}": size for name, size in sizes.items()},
    }
    with mock.patch.dict(xet.SETTINGS, settings):
        yield


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Every pump has ended when its test has."""
    yield
    assert pumps() == []


def pumps() -> list[int]:
    """The processes of this one that speak Xet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent, said = stat.read_text().rpartition(")")[2].split()[1], (stat.parent / "cmdline").read_bytes()
            found += [int(stat.parent.name)] if int(parent) == os.getpid() and b"xet_process" in said else []
    return found


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    for repo in ("repo", "gated"):
        (tmp_path / "hub/org" / repo).mkdir(parents=True)
        (tmp_path / "hub/org" / repo / "model.safetensors").write_bytes(WEIGHTS)
    with StandIn(tmp_path / "hub", xet=["org/*"], gated=["org/gated"], tokens={"hf_good": ["*"], "hf_weak": []}) as made:
        yield made


def hub_of(stand_in: StandIn, token: str | None = None, patience_s: float = 5) -> Hub:
    return Hub(stand_in.endpoint, Network(credentials(stand_in.endpoint, token, None), read_timeout_s=5), patience_s)


def store_of(stand_in: StandIn, volume: Path, **tuning: Any) -> Store:
    """One whose plain downloads the hub refuses."""
    stand_in.fault("expired", route="cdn", count=None)
    tuned = RangeTuning(**{**{name: getattr(SMALL, name) for name in RangeTuning.__dataclass_fields__}, **tuning})
    return Store(Layout(volume), hub_of(stand_in), "pod-1", tuning=tuned, timing=QUICK)


def fetch(stand_in: StandIn, folder: Path, token: str | None = None, file: HubFile = FILE, **tuning: Any) -> bytes:
    """By Xet from the beginning."""
    hub = hub_of(stand_in, token)
    remote = hub.look_up(file, NEVER)
    partial = Partial.claim(folder, remote.size_bytes)
    try:
        XetFetch(hub, remote, partial, RangeTuning(buffer_bytes=256 * 1024, **{"patience_s": 20, **tuning}), NEVER).run()
    finally:
        partial.close()
    return partial.path.read_bytes()


# --- how it goes well ---------------------------------------------------------------------------


def test_where_plain_http_is_refused_the_file_comes_by_xet(stand_in: StandIn, tmp_path: Path) -> None:
    found = store_of(stand_in, tmp_path / "volume").ensure(SPEC)
    assert (found.how, found.bytes_fetched) == ("downloaded", len(WEIGHTS))
    assert found.path.read_bytes() == WEIGHTS
    assert not stand_in.leaks
    assert not [path for path in (tmp_path / "volume/.worker/partial").rglob("*") if path.is_file()]


def test_what_came_over_plain_http_before_is_kept(stand_in: StandIn, tmp_path: Path) -> None:
    store = store_of(stand_in, tmp_path / "volume")
    stand_in.clear_faults()
    stand_in.fault("expired", route="cdn", skip=6, count=None)
    found = store.ensure(SPEC)
    assert found.path.read_bytes() == WEIGHTS
    assert found.bytes_fetched == len(WEIGHTS)
    by_xet = sum(request.bytes_sent for request in stand_in.requests if request.route == "xet/piece")
    assert 0 < by_xet < len(WEIGHTS) - 4 * MIB


@pytest.mark.usefixtures("in_order")
def test_its_progress_is_seen_by_the_job_and_by_the_fleet(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.fault("slow", route="xet/piece", bytes_per_s=MIB, count=None)
    store, told = store_of(stand_in, tmp_path / "volume", patience_s=120), set[tuple[int, int]]()
    locks = Locks(Layout(tmp_path / "volume"), "other")

    def listen(progress: ModelProgress) -> None:
        holder = locks.holder(SHA256)
        told.add((progress.done_bytes, holder.done_bytes if holder else -1))

    store.ensure(SPEC, listen)
    # The fleet is told after the job: it hears of these bytes before there are more.
    assert len([job for job, fleet in told if 0 < job < len(WEIGHTS) and job == fleet]) > 1, sorted(told)


def test_a_token_opens_a_gated_repo_and_reaches_the_hub_alone(stand_in: StandIn, tmp_path: Path) -> None:
    assert fetch(stand_in, tmp_path / "partial", "hf_good", HubFile("org/gated", "model.safetensors")) == WEIGHTS
    assert not stand_in.leaks
    storage = [request for request in stand_in.requests if request.route == "xet/reconstruction"]
    assert storage
    assert all(request.status == 200 for request in storage), "it takes no token but its own"


def test_the_process_is_told_secrets_by_nothing_that_others_can_read(stand_in: StandIn, tmp_path: Path) -> None:
    real, seen = subprocess.Popen, []

    def start(command: list[str], **options: Any) -> Any:
        seen.append((command, options.get("env")))
        return real(command, **options)

    with mock.patch("subprocess.Popen", start):
        fetch(stand_in, tmp_path / "partial", "hf_good")
    ((command, environ),) = seen
    assert not any("hf_good" in word or "xet_" in word.replace("xet_process", "") for word in command)
    assert environ is None


# --- cancelled, killed --------------------------------------------------------------------------


@pytest.mark.usefixtures("in_order")
def test_a_cancelled_one_ends_at_once_and_is_continued(stand_in: StandIn, tmp_path: Path) -> None:
    store = store_of(stand_in, tmp_path / "volume", patience_s=120)
    stand_in.fault("slow", route="xet/piece", bytes_per_s=MIB, count=None)
    cancel = threading.Event()

    def cancel_in_the_middle(progress: ModelProgress) -> None:
        if progress.done_bytes > 3 * MIB:
            assert len(pumps()) == 1
            cancel.set()

    with pytest.raises(EnsureCancelled):
        store.ensure(SPEC, cancel_in_the_middle, cancel)
    assert pumps() == []
    stand_in.clear_faults()
    stand_in.clear_log()
    found = store_of(stand_in, tmp_path / "volume").ensure(SPEC)
    assert found.path.read_bytes() == WEIGHTS
    assert found.bytes_fetched < len(WEIGHTS) - 3 * MIB
    assert stand_in.bytes_sent() < len(WEIGHTS)


def test_the_process_ends_with_the_one_that_started_it(stand_in: StandIn) -> None:
    """A killed worker cannot end it: its input does."""
    stand_in.fault("stall", route="xet/piece", count=None)
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    access = hub.xet_access(remote, NEVER)
    wanted = {
        "hash": remote.xet.file_hash,
        "size_bytes": remote.size_bytes,
        "spans": [[0, remote.size_bytes]],
        "settings": xet.SETTINGS,
        "endpoint": access.endpoint,
        "token": access.token,
        "expires_s": access.expires_s,
        "refresh_url": access.refresh_url,
        "refresh_headers": access.refresh_headers,
    }
    with subprocess.Popen([sys.executable, "-P", str(xet._PUMP)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pump:
        assert pump.stdin
        pump.stdin.write(json.dumps(wanted).encode() + b"\n")
        pump.stdin.flush()
        stand_in.wait_stalled(1, 30)
        assert pump.poll() is None
        pump.stdin.close()
        assert pump.wait(30) == 2


def test_a_partial_that_another_worker_took_ends_it(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    partial = Partial.claim(tmp_path / "partial", remote.size_bytes)
    partial.path.rename(tmp_path / "heir.part")
    with pytest.raises(PartialTaken):
        XetFetch(hub, remote, partial, SMALL, NEVER).run()


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503, "route": "xet/token", "count": 2},
        {"kind": "status", "status": 429, "retry_after_s": 1, "route": "xet/token", "count": 1},
        {"kind": "drop", "route": "xet/token", "count": 1},
        {"kind": "status", "status": 503, "route": "xet/reconstruction", "count": 4},
        {"kind": "status", "status": 401, "route": "xet/reconstruction", "count": 1},
        {"kind": "drop", "route": "xet/reconstruction", "count": 4},
        {"kind": "status", "status": 503, "route": "xet/piece", "count": 8},
        {"kind": "expired", "route": "xet/piece", "count": 2},
        {"kind": "cut", "after_bytes": 100_000, "route": "xet/piece", "count": 6},
        {"kind": "short", "missing_bytes": 10, "route": "xet/piece", "count": 3},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
def test_what_passes_is_waited_out(stand_in: StandIn, tmp_path: Path, fault: dict[str, Any]) -> None:
    stand_in.fault(**fault)
    assert fetch(stand_in, tmp_path / "partial") == WEIGHTS
    assert any(request.faults for request in stand_in.requests), "the fault never struck"
    assert not stand_in.leaks


@pytest.mark.usefixtures("in_order")
def test_after_a_break_it_goes_on_from_what_came(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.fault("status", status=503, route="xet/piece", skip=8, count=5)
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    partial = Partial.claim(tmp_path / "partial", remote.size_bytes)
    work = XetFetch(hub, remote, partial, SMALL, NEVER)
    work.run()
    partial.close()
    assert partial.path.read_bytes() == WEIGHTS
    assert work.fetched_bytes == len(WEIGHTS), "bytes that came once came again"
    assert len([request for request in stand_in.requests if request.route == "xet/token"]) > 1, "it never broke off"


@pytest.mark.parametrize("route", ["xet/reconstruction", "xet/piece"])
def test_what_is_not_there_is_said(stand_in: StandIn, tmp_path: Path, route: str) -> None:
    stand_in.fault("status", status=404, route=route, count=None)
    with pytest.raises(SourceRefused, match="status 404"):
        fetch(stand_in, tmp_path / "partial")


@pytest.mark.parametrize(
    ("token", "status", "said"), [(None, 401, "without a token"), ("hf_weak", 403, "the token in HF_TOKEN")]
)
def test_who_may_not_have_it_is_told_which_token_to_set(
    stand_in: StandIn, tmp_path: Path, token: str | None, status: int, said: str
) -> None:
    remote = hub_of(stand_in, "hf_good").look_up(HubFile("org/gated", "model.safetensors"), NEVER)
    partial = Partial.claim(tmp_path / "partial", remote.size_bytes)
    with pytest.raises(TokenRefused, match=f"{said}.*status {status}.*set HF_TOKEN"):
        XetFetch(hub_of(stand_in, token), remote, partial, SMALL, NEVER).run()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "status", "status": 503, "route": "xet/token"}, "status 503"),
        ({"kind": "status", "status": 503, "route": "xet/reconstruction"}, "Xet"),
        ({"kind": "status", "status": 503, "route": "xet/piece"}, "Xet"),
        ({"kind": "stall", "route": "xet/piece"}, "Xet"),
        ({"kind": "hang", "route": "xet/reconstruction"}, "Xet"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_what_stays_away_is_given_up_and_a_later_try_can_help(
    stand_in: StandIn, tmp_path: Path, fault: dict[str, Any], said: str
) -> None:
    remote = hub_of(stand_in).look_up(FILE, NEVER)
    stand_in.fault(**fault, count=None)
    partial = Partial.claim(tmp_path / "partial", remote.size_bytes)
    with pytest.raises(SourceUnreachable, match=said) as caught:
        XetFetch(hub_of(stand_in, patience_s=0.5), remote, partial, RangeTuning(patience_s=1.5), NEVER).run()
    assert caught.value.retryable
    assert "Signature" not in str(caught.value)


def test_a_storage_that_refuses_connections_is_given_up(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    stand_in.refuse("cdn")
    partial = Partial.claim(tmp_path / "partial", remote.size_bytes)
    with pytest.raises(SourceUnreachable, match="Xet"):
        XetFetch(hub, remote, partial, RangeTuning(patience_s=1.5), NEVER).run()


@pytest.mark.parametrize("said", [b"hello", b"[]", b'{"casUrl": 1}', b'{"casUrl": "x", "accessToken": "y", "exp": "soon"}'])
def test_an_access_that_cannot_be_read_is_asked_for_again(stand_in: StandIn, said: bytes) -> None:
    hub = hub_of(stand_in, patience_s=0.2)
    remote = hub.look_up(FILE, NEVER)
    with (
        mock.patch("devkit.hub.repos.answer_access", lambda wire: wire.send(200, {}, said)),
        pytest.raises(SourceUnreachable, match="no access to Xet was given"),
    ):
        hub.xet_access(remote, NEVER)
    assert hub.xet_access(remote, NEVER).endpoint.startswith(stand_in.cdn_endpoint)


def test_a_wrong_byte_is_found(stand_in: StandIn, tmp_path: Path) -> None:
    store = store_of(stand_in, tmp_path / "volume")
    stand_in.fault("flip", at_byte=500_000, route="xet/piece", count=None)
    with pytest.raises(ContentMismatch, match="nothing was stored"):
        store.ensure(SPEC)


def test_a_sink_that_is_full_is_waited_for(stand_in: StandIn) -> None:
    """As a window that passes a file's bytes on in order is."""
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    sink = Window(remote)
    XetFetch(hub, remote, sink, SMALL, NEVER).run()
    assert bytes(sink.content) == WEIGHTS
    assert sink.full > 0


class Window:
    """Takes so many bytes at a time, and no more until somebody has looked."""

    is_rewritable = False

    def __init__(self, remote: RemoteFile) -> None:
        self.size_bytes = remote.size_bytes
        self.content = bytearray()
        self.full = 0
        self._reach = 100_000

    @property
    def done_bytes(self) -> int:
        return len(self.content)

    def gaps(self) -> list[tuple[int, int]]:
        return [(0, self.size_bytes)]

    def reach(self) -> int:
        if len(self.content) == self._reach:
            self.full += 1
            if self.full % 2 == 0:
                self._reach = min(self.size_bytes, self._reach + 2 * MIB)
        return self._reach

    def write(self, offset: int, view: memoryview) -> None:
        assert offset == len(self.content)
        assert offset + len(view) <= self._reach
        self.content += view

    def check(self) -> None:
        """Nothing is ever wrong here."""


@pytest.mark.usefixtures("in_order")
def test_the_wait_for_a_silent_storage_ends_with_the_patience_and_keeps_what_came(stand_in: StandIn, tmp_path: Path) -> None:
    hub = hub_of(stand_in)
    remote = hub.look_up(FILE, NEVER)
    stand_in.fault("stall", route="xet/piece", skip=6, count=None)
    partial = Partial.claim(tmp_path / "partial", remote.size_bytes)
    began = time.monotonic()
    with pytest.raises(SourceUnreachable, match="the received bytes are kept"):
        XetFetch(hub, remote, partial, RangeTuning(buffer_bytes=256 * 1024, patience_s=5.0), NEVER).run()
    assert time.monotonic() - began >= 5.0
    came = partial.done_bytes
    assert came > 0
    partial.settle()
    partial.close()
    assert Partial.claim(tmp_path / "partial", remote.size_bytes).done_bytes == came
