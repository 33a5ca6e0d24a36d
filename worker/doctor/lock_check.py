"""Check that locks exclude on the volume: two processes request one. Touches the disk, starts processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.doctor.child import ARGUMENTS_AT, Child
from worker.doctor.findings import note, ok, problem
from worker.store.layout import Layout
from worker.store.locks import Locks, LockTiming

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.doctor.findings import Finding

LOCK: Final = "doctor"
"""The name of the test's lock, and of its holder."""

_CONTEST_S: Final = 20.0
# Short times: if this command is killed, the next one need not wait for its lock.
_TIMING: Final = LockTiming(heartbeat_s=1.0, stale_s=5.0, poll_s=0.05, attempt_s=0.2, patience_s=60.0, lone_patience_s=0.0)


def check_locks(layout: Layout) -> Iterator[Finding]:
    """Let two processes request one lock, as two workers would that miss the same model."""
    if not os.access(layout.root, os.W_OK):
        yield note("Locks need a writable volume; without them two workers may download the same model.")
        return
    yield _contest(str(layout.root))


def _contest(root: str) -> Finding:
    until_s = time.monotonic() + _CONTEST_S
    first, second = _Contender(root), None
    try:
        if (state := first.state(until_s)) != "held":
            return _no_locks(f"the file system does not support the needed kind; {first.said or state}")
        second = _Contender(root)
        if second.next(until_s) != "waiting":
            return _no_locks("two processes got the same lock at once")
        first.tell()
        began_s = time.monotonic()
        if (state := second.state(until_s)) != "held":
            return _no_locks(second.said or state)
        took_ms = (time.monotonic() - began_s) * 1000
    except TimeoutError:
        return _no_locks(f"no process got a lock within {_CONTEST_S:g} s")
    except EOFError:
        return _no_locks(f"a process that wanted one ended: {first.said}{second.said if second else ''}"[:500])
    finally:
        first.leave()
        if second:
            second.leave()
    return ok(f"a process waited for the lock's holder, and got the lock {took_ms:.0f} ms after its release")


def _no_locks(reason: str) -> Finding:
    return problem(f"Locks do not work here ({reason}): models stay correct, but two workers may download the same one.")


class _Contender(Child):
    """One of two processes that check the volume's locks: they request the same one. Its other output is in `said`."""

    def __init__(self, root: str) -> None:
        super().__init__(contend_in_child, root)
        self.said = ""

    def next(self, until_s: float) -> str:
        """Return `waiting`, `held` or `unlocked`."""
        while (line := self.line(until_s)) not in {"waiting", "held", "unlocked"}:
            self.said = f"{self.said} {line}".strip()
        return line

    def state(self, until_s: float) -> str:
        """Return how its wait ended."""
        while (line := self.next(until_s)) == "waiting":
            pass
        return line


def contend_in_child() -> None:
    """Request the checked lock in a child, as a worker would, report the result, and hold it until the input ends."""
    said: set[str] = set()

    def say(word: str) -> None:
        if word not in said:
            said.add(word)
            print(word, flush=True)  # noqa: T201 - the line to the parent

    own = Locks(Layout(Path(sys.argv[ARGUMENTS_AT])), LOCK, _TIMING)
    with own.hold(LOCK, published=lambda: False, cancel=threading.Event(), on_wait=lambda _: say("waiting")) as hold:
        say(hold.state)
        sys.stdin.read()
