"""When models are fetched: a job's own first, the rest behind, nothing that nobody wants. Ordered by events, never by sleep."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from worker.base.progress import CancelToken, Listener, ModelProgress
from worker.errors import EnsureCancelled, ModelError, VolumeReadOnly
from worker.model_spec import HubFile, ModelSpec
from worker.models.download_queue import DownloadQueue, JobWait
from worker.store.download import ReadyModel

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 10.0


def spec(name: str) -> ModelSpec:
    """The model of this name; after an @, its revision: another source for the same file."""
    name, _, revision = name.partition("@")
    return ModelSpec("loras", f"{name}.safetensors", HubFile("org/repo", f"{name}.safetensors", revision or "main"))


def name_of(spec: ModelSpec) -> str:
    assert isinstance(spec.source, HubFile)
    name, revision = spec.name.removesuffix(".safetensors"), spec.source.revision
    return name if revision == "main" else f"{name}@{revision}"


class Gate:
    """One model's download in the test's hands: it has begun, it may finish, it was told to stop."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.finish = threading.Event()
        self.stopped = threading.Semaphore(0)
        self.may_stop = threading.Event()
        self.may_stop.set()
        self.error: ModelError | None = None

    def await_begun(self) -> None:
        assert self.begun.acquire(timeout=DEADLINE_S)

    def await_stopped(self) -> None:
        assert self.stopped.acquire(timeout=DEADLINE_S)


class GatedStore:
    """A store whose downloads begin, go on and end when the test says so."""

    def __init__(self) -> None:
        self.gates: dict[str, Gate] = {}
        self.order: list[str] = []
        self.most_at_once = 0
        self._going: list[str] = []
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Gate:
        return self.gates.setdefault(name, Gate())

    def ensure(self, spec: ModelSpec, progress: Listener, cancel: CancelToken | None) -> ReadyModel:
        name = name_of(spec)
        with self._lock:
            self.order.append(name)
            self._going.append(name)
            self.most_at_once = max(self.most_at_once, len(self._going))
        try:
            return self._ensure(self[name], spec, progress, cancel)
        finally:
            with self._lock:
                self._going.remove(name)

    def _ensure(self, gate: Gate, spec: ModelSpec, progress: Listener, cancel: CancelToken | None) -> ReadyModel:
        progress(ModelProgress("downloading", 5, 10, 1.0))
        gate.begun.release()
        assert cancel is not None
        while not gate.finish.is_set():
            if cancel.wait(0.01):
                gate.stopped.release()
                assert gate.may_stop.wait(DEADLINE_S)
                raise EnsureCancelled(spec.name)
        if gate.error:
            raise gate.error
        return ReadyModel(Path("/x") / spec.name, "downloaded", 10, 1.0)


class Job:
    """A job that waits in a thread of its own."""

    def __init__(self, provisioner: DownloadQueue, *names: str) -> None:
        self.cancel = threading.Event()
        self.told: list[JobWait] = []
        self.heard = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(provisioner, names))
        self._thread.start()

    def _run(self, provisioner: DownloadQueue, names: tuple[str, ...]) -> None:
        try:
            provisioner.wait([spec(name) for name in names], self.cancel, self._hear)
        except BaseException as exc:  # noqa: BLE001 - handed to the test
            self.error = exc

    def _hear(self, waiting: JobWait) -> None:
        self.told.append(waiting)
        self.heard.set()

    def await_end(self) -> BaseException | None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


@pytest.fixture
def ready() -> list[str]:
    return []


@pytest.fixture
def provisioner(store: GatedStore, ready: list[str]) -> Iterator[DownloadQueue]:
    provisioner = DownloadQueue(store, lambda spec, _: ready.append(spec.name), files_at_once=2)
    yield provisioner
    provisioner.stop()
    for gate in store.gates.values():
        gate.finish.set()


def test_a_job_goes_on_when_all_its_models_are_there(provisioner: DownloadQueue, store: GatedStore, ready: list[str]) -> None:
    job = Job(provisioner, "a", "b", "c")
    for name in "abc":
        store[name].await_begun()
        store[name].finish.set()
    assert job.await_end() is None
    assert sorted(ready) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_a_job_and_an_eager_start_take_a_few_files_at_a_time_too(provisioner: DownloadQueue, store: GatedStore) -> None:
    names = "abcdefgh"
    job = Job(provisioner, *names)
    for first, second in zip(names[::2], names[1::2], strict=True):
        store[first].await_begun()
        store[second].await_begun()
        assert sorted(store.order[-2:]) == [first, second]
        store[first].finish.set()
        store[second].finish.set()
    assert job.await_end() is None
    for name in names:
        store[f"eager-{name}"].finish.set()
    provisioner.settle([spec(f"eager-{name}") for name in names])
    assert sorted(store.order) == sorted([*names, *(f"eager-{name}" for name in names)])
    assert store.most_at_once == 2


def test_a_job_does_not_wait_until_what_stands_back_is_gone_and_the_background_does(
    provisioner: DownloadQueue, store: GatedStore
) -> None:
    provisioner.want(spec(name) for name in "abcd")
    for name in "ab":
        store[name].await_begun()
        store[name].may_stop.clear()
    job = Job(provisioner, "mine")
    for name in "ab":
        store[name].await_stopped()
    store["mine"].await_begun()
    store["mine"].finish.set()
    assert job.await_end() is None
    for name in "ab":
        store[name].may_stop.set()
        store[name].await_begun()
    assert sorted(store.order) == ["a", "a", "b", "b", "mine"]


def test_the_background_takes_a_few_files_at_a_time_in_order(provisioner: DownloadQueue, store: GatedStore) -> None:
    provisioner.want(spec(name) for name in "abc")
    store["a"].await_begun()
    store["b"].await_begun()
    assert sorted(store.order) == ["a", "b"]
    store["b"].finish.set()
    store["c"].await_begun()


def test_a_job_goes_before_the_background_which_stands_back_and_goes_on_later(
    provisioner: DownloadQueue, store: GatedStore
) -> None:
    provisioner.want([spec("big"), spec("other")])
    store["big"].await_begun()
    store["other"].await_begun()
    job = Job(provisioner, "mine")
    store["big"].await_stopped()
    store["other"].await_stopped()
    store["mine"].await_begun()
    store["mine"].finish.set()
    assert job.await_end() is None
    store["big"].await_begun()
    store["other"].await_begun()


def test_a_job_that_wants_what_the_background_already_fetches_shares_it(provisioner: DownloadQueue, store: GatedStore) -> None:
    provisioner.want([spec("a")])
    store["a"].await_begun()
    job = Job(provisioner, "a")
    assert job.heard.wait(DEADLINE_S)
    store["a"].finish.set()
    assert job.await_end() is None
    assert store.order == ["a"]


def test_two_jobs_share_one_download(provisioner: DownloadQueue, store: GatedStore) -> None:
    first = Job(provisioner, "a")
    store["a"].await_begun()
    second = Job(provisioner, "a")
    assert second.heard.wait(DEADLINE_S)
    store["a"].finish.set()
    assert (first.await_end(), second.await_end()) == (None, None)
    assert store.order == ["a"]


def test_a_cancelled_job_stops_the_download_that_nobody_else_wants(provisioner: DownloadQueue, store: GatedStore) -> None:
    job = Job(provisioner, "a")
    store["a"].await_begun()
    job.cancel.set()
    assert isinstance(job.await_end(), EnsureCancelled)
    store["a"].await_stopped()


def test_a_cancelled_job_leaves_the_download_that_a_manifest_names(provisioner: DownloadQueue, store: GatedStore) -> None:
    provisioner.want([spec("a")])
    job = Job(provisioner, "a")
    store["a"].await_begun()
    job.cancel.set()
    assert isinstance(job.await_end(), EnsureCancelled)
    store["a"].finish.set()
    assert Job(provisioner, "a").await_end() is None
    assert not store["a"].stopped.acquire(blocking=False)


def test_another_source_for_a_queued_file_does_not_take_it_from_the_manifest(
    provisioner: DownloadQueue, store: GatedStore
) -> None:
    provisioner.want(spec(name) for name in ("one", "two", "a@pin"))
    store["one"].await_begun()
    store["two"].await_begun()
    job = Job(provisioner, "a")
    store["a"].await_begun()
    job.cancel.set()
    assert isinstance(job.await_end(), EnsureCancelled)
    store["a"].await_stopped()
    for name in ("one", "two"):
        store[name].finish.set()
    store["a@pin"].await_begun()


def test_another_source_for_a_running_file_goes_first_and_the_manifests_goes_on_later(
    provisioner: DownloadQueue, store: GatedStore
) -> None:
    provisioner.want([spec("a@pin")])
    store["a@pin"].await_begun()
    job = Job(provisioner, "a")
    store["a@pin"].await_stopped()
    store["a"].await_begun()
    store["a"].finish.set()
    assert job.await_end() is None
    store["a@pin"].await_begun()


def test_two_jobs_sources_for_one_file_are_fetched_one_after_the_other(provisioner: DownloadQueue, store: GatedStore) -> None:
    first = Job(provisioner, "a")
    store["a"].await_begun()
    second = Job(provisioner, "a@pin", "b")
    store["b"].await_begun()
    assert "a@pin" not in store.order
    store["a"].finish.set()
    assert first.await_end() is None
    store["a@pin"].await_begun()
    for name in ("a@pin", "b"):
        store[name].finish.set()
    assert second.await_end() is None


def test_stopping_ends_every_download_and_every_wait(provisioner: DownloadQueue, store: GatedStore) -> None:
    provisioner.want([spec("a@pin")])
    store["a@pin"].await_begun()
    store["a@pin"].may_stop.clear()
    job = Job(provisioner, "a", "b", "c")
    store["a"].await_begun()
    store["b"].await_begun()
    provisioner.stop()
    assert isinstance(job.await_end(), EnsureCancelled)
    for name in ("a@pin", "a", "b"):
        store[name].await_stopped()
    store["a@pin"].may_stop.set()
    assert isinstance(Job(provisioner, "d").await_end(), EnsureCancelled)
    with pytest.raises(EnsureCancelled):
        provisioner.settle([spec("e")])
    assert sorted(store.order) == ["a", "a@pin", "b"]


def test_a_failure_reaches_its_job_and_leaves_the_others_alone(provisioner: DownloadQueue, store: GatedStore) -> None:
    store["bad"].error = VolumeReadOnly(Path("/v"), "why")
    store["bad"].finish.set()
    good = Job(provisioner, "good")
    store["good"].await_begun()
    assert isinstance(Job(provisioner, "bad").await_end(), VolumeReadOnly)
    store["good"].finish.set()
    assert good.await_end() is None


def test_what_failed_once_is_tried_again_by_the_next_job(provisioner: DownloadQueue, store: GatedStore) -> None:
    store["a"].error = VolumeReadOnly(Path("/v"), "why")
    store["a"].finish.set()
    assert isinstance(Job(provisioner, "a").await_end(), VolumeReadOnly)
    store["a"].error = None
    assert Job(provisioner, "a").await_end() is None


def test_waiting_says_which_files_and_how_far(provisioner: DownloadQueue, store: GatedStore) -> None:
    job = Job(provisioner, "a", "b")
    store["a"].await_begun()
    store["b"].await_begun()
    while not (job.told and job.told[-1].total_bytes == 20):
        assert job.heard.wait(DEADLINE_S)
        job.heard.clear()
    waiting = job.told[-1]
    assert (waiting.done_bytes, waiting.total_bytes) == (10, 20)
    assert [name for name, _ in waiting.models] == ["loras/a.safetensors", "loras/b.safetensors"]
    assert "loras/a.safetensors: 5 of 10 B" in str(waiting)
    for name in "ab":
        store[name].finish.set()
    assert job.await_end() is None


def test_settling_returns_when_the_whole_manifest_is_there_or_raises(provisioner: DownloadQueue, store: GatedStore) -> None:
    store["a"].finish.set()
    provisioner.settle([spec("a")])
    store["b"].error = VolumeReadOnly(Path("/v"), "why")
    store["b"].finish.set()
    with pytest.raises(VolumeReadOnly):
        provisioner.settle([spec("a"), spec("b")])
