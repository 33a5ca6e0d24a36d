"""Blocking work that cannot be interrupted, and a caller who does not wait for it for ever. Touches threads."""

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


def abandonable(work: Callable[[], T], name: str, cancel: CancelToken) -> T:
    """What `work` returns or raises, from a thread of its own that is left to end by itself when nobody waits any longer.

    Raises `EnsureCancelled` (naming `name`) within a tenth of a second. Work that is left alone
    goes on: it must harm nobody when it finishes.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - handed over to the waiting thread
            future.set_exception(exc)

    threading.Thread(target=run, name="abandonable", daemon=True).start()
    while not cancel.is_set():
        # Not `result(timeout=...)`: its TimeoutError cannot be told from one of the work's own.
        wait([future], _TICK_S)
        if future.done():
            return future.result()
    raise EnsureCancelled(name)
