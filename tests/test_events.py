"""The websocket protocol decoded, and a run's end for every order of news."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.engine import events
from worker.engine.events import (
    Cached,
    Event,
    Executing,
    Failed,
    Interrupted,
    NodeOutput,
    NodeProgress,
    Outcome,
    RunFinished,
    RunTracker,
    SentPicture,
    Succeeded,
    decode_event,
    outcome_of,
    sent_png,
)
from worker.errors import EngineDied, NodeFailed, RunInterrupted, RunLost

RUN = "run-1"
OTHER = "run-2"
IMAGE = {"images": [{"filename": "a_00001_.png", "subfolder": "", "type": "output"}]}


PNG = b"\x89PNG\r\n\x1a\n and more"


def message(kind: str, **data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


@pytest.mark.parametrize(
    ("text", "event"),
    [
        (message("executing", node="3", display_node="3", prompt_id=RUN), Executing(RUN, "3")),
        (message("executing", node=None, prompt_id=RUN), Executing(RUN, None)),
        (message("executed", node="9", display_node="9", output=IMAGE, prompt_id=RUN), NodeOutput(RUN, "9", IMAGE)),
        (message("executed", node="9", output=None, prompt_id=RUN), NodeOutput(RUN, "9", {})),
        (message("progress", value=2, max=20, prompt_id=RUN, node="7"), NodeProgress(RUN, "7", 2.0, 20.0)),
        (message("execution_cached", nodes=["1", "9"], prompt_id=RUN), Cached(RUN, frozenset({"1", "9"}))),
        (message("execution_success", prompt_id=RUN, timestamp=1), Succeeded(RUN)),
        (message("execution_interrupted", prompt_id=RUN, node_id="7"), Interrupted(RUN)),
        (
            message("execution_error", prompt_id=RUN, node_id="7", node_type="KSampler", exception_message="no\n"),
            Failed(RUN, "7", "KSampler", "no"),
        ),
        (
            message(
                "execution_error", prompt_id=RUN, node_id="7", node_type="X", exception_message="", exception_type="KeyError"
            ),
            Failed(RUN, "7", "X", "KeyError", "KeyError"),
        ),
    ],
)
def test_messages_as_the_engine_sends_them(text: str, event: Event) -> None:
    assert decode_event(text) == event


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\x00\x00\x01\xff\xd8",
        "",
        "not json",
        "[]",
        "null",
        '{"type": "executing"}',
        '{"type": "executing", "data": {}}',
        '{"type": "executing", "data": null}',
        '{"type": ["x"], "data": {}}',
        message("status", status={"exec_info": {"queue_remaining": 0}}),
        message("progress_state", prompt_id=RUN, nodes={}),
        message("progress", value="?", max=None, prompt_id=RUN, node="1"),
        message("a kind of next year", prompt_id=RUN),
        message("executing", prompt_id=["x"], node="1"),
        message("executed", prompt_id=RUN, node={"a": 1}, output={}),
        message("executed", prompt_id=RUN, node="1", output=["x"]),
        message("progress", value=float("nan"), max=1, prompt_id=RUN, node="1"),
        message("progress", value=10**400, max=1, prompt_id=RUN, node="1"),
        "[" * 100_000,
    ],
)
def test_what_nobody_needs_or_understands_is_no_event(text: str | bytes) -> None:
    assert decode_event(text) is None


@given(st.one_of(st.text(), st.binary(), st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps)))
def test_no_message_makes_the_decoder_raise(text: str | bytes) -> None:
    decode_event(text)


def test_a_run_without_gap_ends_with_the_outputs_of_its_events() -> None:
    tracker = RunTracker(RUN)
    tracker.feed(NodeOutput(RUN, "9", IMAGE))
    tracker.feed(NodeOutput(OTHER, "8", IMAGE))
    assert tracker.outcome is None
    tracker.feed(Succeeded(RUN))
    assert tracker.outcome == RunFinished({"9": IMAGE})


def test_success_without_outputs_is_looked_up_in_the_history() -> None:
    """An `executed` that is late or missing: the picture is there all the same."""
    tracker = RunTracker(RUN)
    tracker.feed(Succeeded(RUN))
    assert tracker.outcome is None
    assert tracker.wants_history
    tracker.reconcile(None, queued=True)  # the success is told before the history is written
    tracker.feed(Executing(RUN, None))
    assert tracker.wants_history
    tracker.reconcile({"outputs": {"9": IMAGE}, "status": {"status_str": "success"}}, queued=False)
    assert tracker.outcome == RunFinished({"9": IMAGE})


def test_success_without_outputs_is_no_lost_run_when_the_history_is_gone() -> None:
    tracker = RunTracker(RUN)
    tracker.feed(Succeeded(RUN))
    tracker.reconcile(None, queued=False)
    assert tracker.outcome == RunFinished({})


def test_after_a_gap_only_the_history_can_say_that_a_run_succeeded() -> None:
    tracker = RunTracker(RUN)
    tracker.gap()
    tracker.feed(Succeeded(RUN))
    assert tracker.outcome is None
    assert tracker.wants_history
    tracker.reconcile({"outputs": {"9": IMAGE}, "status": {"status_str": "success"}}, queued=False)
    assert tracker.outcome == RunFinished({"9": IMAGE})


def test_leaving_the_queue_without_a_verdict_asks_the_history() -> None:
    tracker = RunTracker(RUN)
    tracker.feed(Executing(RUN, None))
    assert tracker.outcome is None
    assert tracker.wants_history


def test_a_prompt_that_is_still_queued_goes_on() -> None:
    tracker = RunTracker(RUN)
    tracker.gap()
    tracker.reconcile(None, queued=True)
    assert tracker.outcome is None
    assert not tracker.wants_history


def test_a_prompt_that_nobody_knows_is_lost() -> None:
    tracker = RunTracker(RUN)
    tracker.reconcile(None, queued=False)
    assert isinstance(tracker.outcome, RunLost)


def test_a_failure_brings_what_other_nodes_had_put_out() -> None:
    tracker = RunTracker(RUN)
    tracker.feed(NodeOutput(RUN, "9", IMAGE))
    tracker.feed(Failed(RUN, "7", "KSampler", "boom"))
    assert isinstance(tracker.outcome, NodeFailed)
    assert tracker.outcome.outputs == {"9": IMAGE}


def test_a_failure_after_a_gap_is_looked_up_for_what_was_put_out_meanwhile() -> None:
    tracker = RunTracker(RUN)
    tracker.gap()
    tracker.feed(Failed(RUN, "7", "KSampler", "boom"))
    assert tracker.outcome is None
    tracker.reconcile({"outputs": {"9": IMAGE}, "status": {"status_str": "error", "messages": [ERROR]}}, queued=False)
    assert isinstance(tracker.outcome, NodeFailed)
    assert tracker.outcome.outputs == {"9": IMAGE}


def test_a_failure_that_the_history_lost_is_still_one() -> None:
    tracker = RunTracker(RUN)
    tracker.gap()
    tracker.feed(Failed(RUN, "7", "KSampler", "boom"))
    tracker.reconcile(None, queued=False)
    assert isinstance(tracker.outcome, NodeFailed)


ERROR = ["execution_error", {"node_id": "7", "node_type": "KSampler", "exception_message": "boom"}]


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"outputs": {}, "status": {"status_str": "success"}}, RunFinished),
        ({"outputs": {}, "status": None}, RunFinished),
        ({"outputs": {}, "status": {"status_str": "error", "messages": [["execution_start", {}], ERROR]}}, NodeFailed),
        ({"status": {"status_str": "error", "messages": [["execution_interrupted", {}]]}}, RunInterrupted),
        ({"status": {"status_str": "error", "messages": []}}, NodeFailed),
    ],
)
def test_histories(entry: dict[str, Any], kind: type) -> None:
    assert isinstance(outcome_of(entry), kind)


PNG_HEADER = b"\x00\x00\x00\x01\x00\x00\x00\x02"


@pytest.mark.parametrize(
    ("message", "png"),
    [
        (PNG_HEADER + PNG, PNG),
        (PNG_HEADER, None),
        (PNG_HEADER + b"no picture", None),
        (b"\x00\x00\x00\x01\x00\x00\x00\x01\xff\xd8\xff", None),  # a preview of sampling, as JPEG
        (b"\x00\x00\x00\x04\x00\x00\x00\x02" + PNG, None),  # a preview with metadata, which has to be asked for
        (b"", None),
    ],
)
def test_only_a_png_that_comes_through_the_websocket_is_a_picture_to_keep(message: bytes, png: bytes | None) -> None:
    assert sent_png(message) == png


def sent(node_id: str, *pngs: bytes) -> list[dict[str, Any]]:
    return [{"filename": f"websocket_{node_id}_{at}.png", "type": "websocket", "data": png} for at, png in enumerate(pngs)]


def test_pictures_that_a_node_sends_are_its_output_however_the_run_ends() -> None:
    tracker = RunTracker(RUN)
    for event in (
        SentPicture(RUN, "5", b"one"),
        SentPicture(RUN, "5", b"two"),
        SentPicture(RUN, "9", b"three"),
        NodeOutput(RUN, "9", IMAGE),
    ):
        tracker.feed(event)
    tracker.feed(Cached(RUN, frozenset({"1"})))
    tracker.feed(Succeeded(RUN))
    outputs = {"9": {"images": [*IMAGE["images"], *sent("9", b"three")]}, "5": {"images": sent("5", b"one", b"two")}}
    assert tracker.outcome == RunFinished(outputs, frozenset({"1"}))

    tracker = RunTracker(RUN)
    tracker.feed(SentPicture(RUN, "5:1", b"one"))
    tracker.feed(Failed(RUN, "7", "KSampler", "boom"))
    assert isinstance(tracker.outcome, NodeFailed)
    assert tracker.outcome.outputs == {"5:1": {"images": sent("5-1", b"one")}}

    tracker = RunTracker(RUN)
    tracker.feed(SentPicture(RUN, "5", b"one"))
    tracker.gap()
    messages = [["execution_start", {}], ["execution_cached", {"nodes": ["1"]}], ["execution_success", {}]]
    tracker.reconcile(
        {"outputs": {"9": IMAGE}, "status": {"status_str": "success", "messages": messages}},
        queued=False,
    )
    assert tracker.outcome == RunFinished({"9": IMAGE, "5": {"images": sent("5", b"one")}}, frozenset({"1"}))


def test_pictures_beyond_what_is_kept_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_SENT_LIMIT_BYTES", 5)
    tracker = RunTracker(RUN)
    for png in (b"abc", b"def", b"gh"):
        tracker.feed(SentPicture(RUN, "5", png))
    tracker.feed(Succeeded(RUN))
    assert tracker.outcome == RunFinished({"5": {"images": sent("5", b"abc", b"gh")}})
    assert tracker.lost_pictures == 1


NODES = st.sampled_from(["1", "2", "3"])
RUNS = st.sampled_from([RUN, OTHER])


class AnyOrder(RuleBasedStateMachine):
    """Every kind of news, in every order: a run ends at most once, keeps its end, and can always still end."""

    @initialize()
    def start(self) -> None:
        self.tracker = RunTracker(RUN)
        self.first: Outcome | None = None
        self.gapped = False
        self.put_out = False

    @rule(run=RUNS, node=st.none() | NODES)
    def executing(self, run: str, node: str | None) -> None:
        self.tracker.feed(Executing(run, node))

    @rule(run=RUNS, node=NODES)
    def output(self, run: str, node: str) -> None:
        self.tracker.feed(NodeOutput(run, node, IMAGE))
        self.put_out = self.put_out or run == RUN

    @rule(run=RUNS)
    def progress(self, run: str) -> None:
        self.tracker.feed(NodeProgress(run, "1", 1, 2))

    @rule(run=RUNS)
    def succeeded(self, run: str) -> None:
        self.tracker.feed(Succeeded(run))
        if run == RUN and not self.gapped and self.put_out:
            assert self.tracker.outcome is not None
        assert run == OTHER or self.tracker.outcome is not None or self.tracker.wants_history

    @rule(run=RUNS)
    def failed(self, run: str) -> None:
        self.tracker.feed(Failed(run, "1", "KSampler", "boom"))
        if run == RUN:
            assert self.tracker.outcome is not None or (self.gapped and self.tracker.wants_history)

    @rule(run=RUNS)
    def interrupted(self, run: str) -> None:
        self.tracker.feed(Interrupted(run))
        assert run == OTHER or self.tracker.outcome is not None

    @rule()
    def gap(self) -> None:
        self.tracker.gap()
        self.gapped = True

    @rule(queued=st.booleans(), known=st.booleans())
    def reconcile(self, *, queued: bool, known: bool) -> None:
        entry = {"outputs": {"9": IMAGE}, "status": {"status_str": "success"}} if known else None
        self.tracker.reconcile(entry, queued=queued)
        assert not self.tracker.wants_history or self.first is not None
        assert (queued and not known) or self.tracker.outcome is not None

    @rule()
    def died(self) -> None:
        self.tracker.end(EngineDied("exited with code 1"))
        assert self.tracker.outcome is not None

    @invariant()
    def ends_once(self) -> None:
        if self.first is not None:
            assert self.tracker.outcome is self.first
        self.first = self.tracker.outcome


TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize(
    ("kind", "text", "memory"),
    [
        ("torch.OutOfMemoryError", "Allocation on device 0 would exceed allowed memory. (out of memory)", "GPU"),
        ("torch.cuda.OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 GiB.", "GPU"),
        ("torch.AcceleratorError", "CUDA error: out of memory", "GPU"),
        ("MemoryError", "", "host"),
        ("RuntimeError", "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory", "host"),
        ("ValueError", "mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_memory_that_ran_out_is_told_from_other_failures(kind: str, text: str, memory: str | None) -> None:
    event = decode_event(
        message("execution_error", prompt_id=RUN, node_id="7", node_type="X", exception_message=text, exception_type=kind)
    )
    assert isinstance(event, Failed)
    error = event.error({})
    assert getattr(error, "memory", None) == memory
    assert error.code == ("out_of_memory" if memory else "node_failed")
