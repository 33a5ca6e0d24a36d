"""Work that nobody can interrupt: its result or its error comes through, whenever it ends, and a cancelled caller leaves."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Any
from unittest import mock

import pytest

from worker.errors import EnsureCancelled
from worker.fetch.blocking_call import abandonable

NEVER = threading.Event()


def test_the_work_s_result_and_its_error_come_through() -> None:
    assert abandonable(lambda: 5, "it", NEVER) == 5
    with pytest.raises(TimeoutError, match="the work's own"):
        abandonable(mock.Mock(side_effect=TimeoutError("the work's own")), "it", NEVER)


def test_work_that_ends_as_its_caller_looks_has_succeeded() -> None:
    """The wait for it has timed out, and it ends before the next thing that the caller does."""
    go_on = threading.Event()
    real = Future.done

    def done(future: Future[Any]) -> bool:
        go_on.set()
        wait([future])
        return real(future)

    def work() -> str:
        assert go_on.wait(30)
        return "done"

    with mock.patch.object(Future, "done", done):
        assert abandonable(work, "it", NEVER) == "done"


def test_a_cancelled_caller_leaves_and_the_work_goes_on() -> None:
    cancel, working, go_on, ended = (threading.Event() for _ in range(4))

    def work() -> str:
        working.set()
        assert go_on.wait(30)
        return "late"

    undone: list[str] = []

    def undo(result: str) -> None:
        undone.append(result)
        ended.set()

    def cancel_when_working() -> None:
        assert working.wait(30)
        cancel.set()

    canceller = threading.Thread(target=cancel_when_working)
    canceller.start()
    with pytest.raises(EnsureCancelled) as caught:
        abandonable(work, "the name", cancel, undo)
    assert "the name" in str(caught.value)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(30)
    assert undone == ["late"]
    canceller.join()
