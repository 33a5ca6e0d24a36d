"""A pod's processes: whatever runs with its HOME. Touches processes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_GONE_TIMEOUT_S: Final = 10.0


def kill_all(home: Path) -> int:
    """Send SIGKILL to every process with this HOME, as a machine's death does, and wait for their end. Return how many.

    Killing only a worker leaves the SDK's heartbeat process, which still pings, and ComfyUI. Raises TimeoutError.
    """
    killed = 0
    while found := _kill_once(os.fsencode(home)):  # until none is left that was forked while we looked
        killed += found
    return killed


def freeze_all(home: Path) -> int:
    """Stop every process whose HOME this is where it stands, as FlashBoot does with an idle pod; returns how many."""
    frozen = 0
    while (found := _signal_all(os.fsencode(home), signal.SIGSTOP)) > frozen:  # one may have forked while we looked
        frozen = found
    return frozen


def thaw_all(home: Path) -> int:
    """Let every process go on whose HOME this is; returns how many."""
    return _signal_all(os.fsencode(home), signal.SIGCONT)


def _signal_all(home: bytes, number: signal.Signals) -> int:
    with _living(home) as living:
        for fd in living:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
        return len(living)


def _kill_once(home: bytes) -> int:
    with _living(home) as living:
        for fd in living:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        _wait(living)
        return len(living)


@contextlib.contextmanager
def _living(home: bytes) -> Iterator[list[int]]:
    """Yield a descriptor for each process of this HOME."""
    with contextlib.ExitStack() as stack:
        living = []
        for pid in _pids():
            fd = _open(pid)  # before the look at what it is: from here on no other process can be mistaken for it
            if fd is not None:
                stack.callback(os.close, fd)
                if _home_of(pid) == home:
                    living.append(fd)
        yield living


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def _home_of(pid: int) -> bytes | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is somebody else's
        return None
    return next((variable[5:] for variable in variables if variable.startswith(b"HOME=")), None)


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # it has ended
        return None


def _wait(pidfds: list[int]) -> None:
    deadline, waiting = time.monotonic() + _GONE_TIMEOUT_S, set(pidfds)
    while waiting:
        ended, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
        if not ended:
            raise TimeoutError(f"{len(waiting)} processes outlived SIGKILL by {_GONE_TIMEOUT_S:g} s")
        waiting.difference_update(ended)
