"""Run blocking work in a thread. On cancellation return at once and let the thread finish. Touches threads."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Final, TypeVar

from worker.errors import EnsureCancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.base.progress import CancelToken

T = TypeVar("T")

_TICK_S: Final = 0.1


def abandonable(work: Callable[[], T], name: str, cancel: CancelToken, undo: Callable[[T], object] = lambda _: None) -> T:
    """Run a blocking call in its own thread and return what it returns, or raise what it raises. A cancelled caller leaves it.

    Raise `EnsureCancelled` (naming `name`) within a tenth of a second after cancellation. The work then continues alone, and
    `undo` gets what it returns in the end.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - handed over to the waiting thread
            future.set_exception(exc)

    threading.Thread(target=run, name="abandonable", daemon=True).start()
    while not cancel.is_set():
        # Not `result(timeout=...)`: its TimeoutError looks like one that the work raised.
        wait([future], _TICK_S)
        if future.done():
            return future.result()

    def late(done: Future[T]) -> None:
        if done.exception() is None:
            undo(done.result())

    future.add_done_callback(late)
    raise EnsureCancelled(name)
