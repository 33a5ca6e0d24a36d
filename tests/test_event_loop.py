"""Jobs cross from the SDK's loop to the engine's, with their results, errors and cancellations."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from worker.engine.event_loop import LoopAside, LoopThread, is_large_json

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop")
    yield thread
    thread.stop()


def test_a_result_comes_back_from_the_other_thread(loop: LoopThread) -> None:
    async def there() -> str:
        return threading.current_thread().name

    assert asyncio.run(loop.run(there())) == "test-loop"
    assert loop.submit(there()).result(5) == "test-loop"


def test_an_error_comes_back_as_it_is(loop: LoopThread) -> None:
    async def there() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(loop.run(there()))


def test_a_cancellation_reaches_the_coroutine_and_waits_until_it_has_cleaned_up(loop: LoopThread) -> None:
    started, cleaned = threading.Event(), threading.Event()

    async def there() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    async def here() -> None:
        task = asyncio.create_task(loop.run(there()))
        await asyncio.to_thread(started.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned.is_set()

    asyncio.run(here())


def test_a_cancellation_before_the_coroutine_began_is_kept(loop: LoopThread) -> None:
    async def there() -> None:
        await asyncio.sleep(60)

    async def here() -> None:
        task = asyncio.create_task(loop.run(there()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(here())


def test_stopping_cancels_what_still_runs() -> None:
    thread, cancelled = LoopThread("test-loop"), threading.Event()

    async def there() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    future = thread.submit(there())
    thread.stop()
    assert cancelled.is_set()
    assert future.cancelled()


@pytest.mark.parametrize(
    ("value", "large"),
    [
        (None, False),
        ({"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "a"}}}, False),
        ({str(number): {"class_type": "X", "inputs": {}} for number in range(500)}, False),
        ({str(number): {} for number in range(6000)}, True),
        ([[0] * 100 for _ in range(60)], True),
        ("a" * 1_000, False),
        ("a" * 100_000, True),
        ({"a" * 100_000: 1}, True),
        ([[[["a" * 100_000]]]], True),
    ],
)
def test_what_is_large_is_looked_at_in_a_thread_and_nothing_else(value: object, *, large: bool) -> None:
    assert is_large_json(value) == large
    here = threading.get_ident()
    assert (asyncio.run(LoopAside(value)(threading.get_ident)) != here) == large
