"""One worker of a fleet asks a source and tells the others; with rubbish, killed askers or no record all get there as well."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from devkit.fleet import FAST, MIB, SMALL, Fleet, Worker
from devkit.hub import Hub as StandIn
from tests.test_locks import operations
from worker.errors import EnsureCancelled, FileNotInRepo, RepoGated
from worker.fetch.http import Network
from worker.fetch.hub import Hub, RemoteFile, credentials
from worker.fetch.ranges import RangeTuning
from worker.model_spec import HubFile, ModelSpec, UrlSource
from worker.store.layout import Layout
from worker.store.seals import read_seal
from worker.store.shared_lookups import SharedLookups
from worker.store.store import DownloadHooks, LockTiming, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devkit.moosefs import MooseFS

SIZE = 2 * MIB
_HEADER = json.dumps({"t": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
FILES = {
    f"m{number}.safetensors": len(_HEADER).to_bytes(8, "little") + _HEADER + random.Random(number).randbytes(SIZE)
    for number in range(4)
}
NAME, WEIGHTS = next(iter(FILES.items()))
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
SPEC = ModelSpec("checkpoints", NAME, HubFile("org/repo", NAME))
# Nobody asks a second time because a busy machine makes the asker slow.
CALM = {**FAST, "quiet_s": 20.0, "answer_s": 60.0}
QUICK = LockTiming(**{**FAST, "answer_s": 1.0})


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for repo in ("org/repo", "org/gated"):
        (root / repo).mkdir(parents=True)
        for name, content in FILES.items():
            (root / repo / name).write_bytes(content)
    return root


@pytest.fixture
def stand_in(hub_root: Path) -> Iterator[StandIn]:
    with StandIn(hub_root, tokens={"hf_good": ["*"], "hf_weak": []}, gated=["org/gated"]) as made:
        yield made


def worker(name: str, root: Path, hub: StandIn, file: str = NAME, **options: Any) -> Worker:
    return Worker(name, str(root), hub.endpoint, f"org/repo/{file}", **{"model": file, **options})


def store(root: Path, hub: StandIn, token: str | None = None, **options: Any) -> Store:
    asker = Hub(hub.endpoint, Network(credentials(hub.endpoint, token, None), read_timeout_s=5), patience_s=2)
    return Store(Layout(root), asker, "pod-1", tuning=RangeTuning(**SMALL), timing=QUICK, **options)  # type: ignore[arg-type]  # JSON's


def look_ups(hub: StandIn) -> list[Any]:
    return [request for request in hub.requests if request.route == "resolve"]


def records(root: Path) -> list[Path]:
    return sorted((Layout(root).state / "lookups").glob("*.json"))


def marks(root: Path) -> list[Path]:
    return sorted((Layout(root).state / "lookups").glob("*.asking"))


def check_ready(root: Path, file: str = NAME) -> None:
    path = Layout(root).model("checkpoints", file)
    seal = read_seal(Layout(root).seal("checkpoints", file))
    assert path.read_bytes() == FILES[file]
    assert seal
    assert seal.sha256 == hashlib.sha256(FILES[file]).hexdigest()


# --- a fleet ------------------------------------------------------------------------------------


def test_sixteen_workers_ask_once_for_each_of_four_models(moosefs: MooseFS, stand_in: StandIn) -> None:
    """One look-up for each model: whoever asked has the content's lock before the others hear of it."""
    roots = [mount / "four_models" for mount in moosefs.mounts[:2]]
    fleet_of = [worker(f"w{n}-{file}", roots[n % 2], stand_in, file, timing=CALM) for n in range(16) for file in FILES]
    with Fleet(*fleet_of) as fleet:
        ends = fleet.wait_ended(240)
    assert [end.get("how", end) for end in ends if end["event"] != "done"] == []
    assert sorted(end["how"] for end in ends) == ["downloaded"] * 4 + ["ready"] * 60
    assert len(look_ups(stand_in)) == 4
    assert marks(roots[0]) == []
    for file in FILES:
        check_ready(roots[0], file)


def test_a_killed_asker_is_succeeded_within_seconds(tmp_path: Path, stand_in: StandIn) -> None:
    """With the default timings; the others ask once for all of them."""
    timing = {"look_s": 1.0}
    stand_in.fault("hang", route="resolve")
    with Fleet(worker("doomed", tmp_path, stand_in, timing=timing)) as doomed:
        asker = doomed.wait_step("asking")
        stand_in.wait_until(lambda: bool(look_ups(stand_in)))
        with Fleet(*(worker(f"w{n}", tmp_path, stand_in, timing=timing) for n in range(8))) as fleet:
            doomed.kill(asker["pid"])
            killed_s = time.monotonic()
            ends = fleet.wait_ended()
    assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 7
    # Six seconds at most until one asks; more is what a busy machine may take.
    assert fleet.wait_step("asking")["at_s"] - killed_s < 15
    assert len(look_ups(stand_in)) <= 3
    check_ready(tmp_path)


def test_where_nobody_gets_an_answer_they_ask_one_after_the_other(tmp_path: Path, stand_in: StandIn) -> None:
    with Fleet(*(worker(f"w{n}", tmp_path, stand_in, "none.safetensors", timing=CALM) for n in range(8))) as fleet:
        ends = fleet.wait_ended()
    assert {end["code"] for end in ends} == {FileNotInRepo.code}
    asked = sorted(look_ups(stand_in), key=lambda request: request.started_s)
    assert len(asked) == 8
    assert all(before.ended_s <= after.started_s for before, after in itertools.pairwise(asked))
    assert marks(tmp_path) == records(tmp_path) == []


@pytest.mark.parametrize("obstacle", ["file", "link"])
def test_a_volume_that_takes_no_record_costs_look_ups_and_nothing_else(
    tmp_path: Path, stand_in: StandIn, obstacle: str
) -> None:
    place = Layout(tmp_path).state / "lookups"
    place.parent.mkdir()
    if obstacle == "file":
        place.write_bytes(b"")
    else:
        place.symlink_to(tmp_path / "nowhere/at/all")
    with Fleet(*(worker(f"w{n}", tmp_path, stand_in, timing={**FAST, "answer_s": 1.0}) for n in range(4))) as fleet:
        ends = fleet.wait_ended()
    assert sorted(end["how"] for end in ends) == ["downloaded"] + ["ready"] * 3
    assert 1 <= len(look_ups(stand_in)) <= 8
    check_ready(tmp_path)


def test_a_look_up_and_a_wait_for_one_cost_a_volume_little(moosefs: MooseFS) -> None:
    """By the counters of the mount; the default timings."""
    layout, cancel = Layout(moosefs.mounts[1] / "lookups"), threading.Event()
    remote = RemoteFile(SPEC.source, len(WEIGHTS), SHA256, None, None, "")
    lookups, heard = SharedLookups(layout, "pod-1", LockTiming(quiet_s=120, answer_s=120)), threading.Semaphore(0)

    def ask(address: str) -> None:
        with lookups.turn(address, lambda _: True, cancel, lambda _: heard.release()) as turn:
            assert turn.answer is None
            turn.tell(remote)

    def wait() -> None:
        with contextlib.suppress(EnsureCancelled):
            ask("busy")

    ask("first")
    before = operations(moosefs.mounts[1])
    for number in range(20):
        ask(f"{number}")
    assert (operations(moosefs.mounts[1]) - before) / 20 <= 30  # every stat, open and close is one
    with lookups.turn("busy", lambda _: True, cancel, lambda _: None):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert heard.acquire(timeout=60)
        before, began_s = operations(moosefs.mounts[1]), time.monotonic()
        for _ in range(10):
            assert heard.acquire(timeout=60)
        rate = (operations(moosefs.mounts[1]) - before) / (time.monotonic() - began_s)
        cancel.set()
        waiting.join()
    assert rate <= 5


# --- what is in the record ----------------------------------------------------------------------


def rewritten(root: Path, hub: StandIn) -> Path:
    """Leave the record of a look-up, and take away the model that was fetched then."""
    assert store(root, hub).ensure(SPEC).how == "downloaded"
    layout = Layout(root)
    layout.model("checkpoints", NAME).unlink()
    layout.seal("checkpoints", NAME).unlink()
    hub.clear_log()
    (record,) = records(root)
    return record


WRONG = {"key": "0" * 64, "size_bytes": 5, "by": "pod-2"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 60_000,
        b"null",
        b"\xff\xfe\x00",
        *(
            json.dumps({**WRONG, **change}).encode()
            for change in (
                {},
                {"key": "../../models"},
                {"key": 7},
                {"key": f"url-{'0' * 64}"},
                {"size_bytes": "x"},
                {"more": 1},
            )
        ),
    ],
)
def test_a_record_that_is_rubbish_or_of_another_content_costs_nothing(
    tmp_path: Path, stand_in: StandIn, content: bytes
) -> None:
    rewritten(tmp_path, stand_in).write_bytes(content)
    assert store(tmp_path, stand_in).ensure(SPEC).how == "downloaded"
    assert len(look_ups(stand_in)) == 1
    check_ready(tmp_path)
    assert marks(tmp_path) == []


@pytest.mark.parametrize("by_s", [-7200, -90, 90, 7200])
def test_a_record_that_is_not_of_now_is_not_believed(tmp_path: Path, stand_in: StandIn, by_s: int) -> None:
    record = rewritten(tmp_path, stand_in)
    record.write_bytes(json.dumps(WRONG).encode())
    os.utime(record, (time.time() + by_s,) * 2)
    assert store(tmp_path, stand_in).ensure(SPEC).how == "downloaded"
    assert len(look_ups(stand_in)) == 1
    assert json.loads(record.read_bytes()) == {"key": SHA256, "size_bytes": len(WEIGHTS), "by": "pod-1"}


def test_a_mark_that_a_killed_worker_left_is_succeeded(tmp_path: Path, stand_in: StandIn) -> None:
    mark = rewritten(tmp_path, stand_in).with_suffix(".asking")
    for record in records(tmp_path):
        record.unlink()
    mark.touch()
    os.utime(mark, (0, 0))
    assert store(tmp_path, stand_in).ensure(SPEC).how == "downloaded"
    assert marks(tmp_path) == []


def test_a_version_that_came_after_the_answer_is_the_one_that_is_fetched(tmp_path: Path) -> None:
    """The answer names the old content, which another name on the volume still has: that one is not linked."""
    place = tmp_path / "hub/org/repo"
    place.mkdir(parents=True)
    (place / NAME).write_bytes(WEIGHTS)
    with StandIn(tmp_path / "hub") as hub:
        twin = ModelSpec("vae", "old.safetensors", SPEC.source)
        assert store(tmp_path / "v", hub).ensure(twin).how == "downloaded"
        new = FILES["m1.safetensors"]
        (place / "new").write_bytes(new)
        (place / "new").replace(place / NAME)
        assert store(tmp_path / "v", hub).ensure(SPEC).how == "downloaded"
        assert Layout(tmp_path / "v").model("checkpoints", NAME).read_bytes() == new


def test_a_worker_without_the_token_hears_nothing_of_what_the_token_opened(tmp_path: Path, stand_in: StandIn) -> None:
    gated = ModelSpec("checkpoints", NAME, HubFile("org/gated", NAME))
    refused: list[BaseException] = []

    class Meanwhile(DownloadHooks):
        def at(self, step: str) -> None:
            if step == "claimed":  # the one with the token fetches, and has told
                with pytest.raises(RepoGated) as caught:
                    store(tmp_path, stand_in).ensure(gated)
                refused.append(caught.value)

    assert store(tmp_path, stand_in, "hf_good", hooks=Meanwhile()).ensure(gated).how == "downloaded"
    assert len(refused) == 1
    (record,) = records(tmp_path)
    assert json.loads(record.read_bytes()) == {"key": SHA256, "size_bytes": len(WEIGHTS), "by": "pod-1"}


def test_no_secret_of_an_address_is_on_the_volume(tmp_path: Path, stand_in: StandIn) -> None:
    url = UrlSource(f"{stand_in.endpoint}/files/org/repo/{NAME}?token=s3cret")
    assert store(tmp_path, stand_in).ensure(ModelSpec("checkpoints", NAME, url)).how == "downloaded"
    (record,) = records(tmp_path)
    assert "s3cret" not in record.name
    assert set(json.loads(record.read_bytes())) == {"key", "size_bytes", "by"}
    assert b"s3cret" not in record.read_bytes()
