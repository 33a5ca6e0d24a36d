"""A child process that can be left behind, whatever it hangs on. Starts processes."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_RUN: Final = (
    "import importlib, sys; sys.path.insert(0, sys.argv[1]); getattr(importlib.import_module(sys.argv[2]), sys.argv[3])()"
)
ARGUMENTS_AT: Final = 4
"""Where a child finds its own arguments in `sys.argv`: after those that `_RUN` reads."""


class Child:
    """A process that runs a function of a module. Its lines are read with a deadline, and nothing waits for its end."""

    def __init__(self, function: Callable[[], None], *arguments: str) -> None:
        home = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, on this package
            [sys.executable, "-c", _RUN, home, function.__module__, function.__name__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # a reader of this command's output must not wait for a child that cannot end
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def tell(self, text: str = "") -> None:
        """Send a text, then the end of its input."""
        stream = self._process.stdin
        if stream and not stream.closed:
            with contextlib.suppress(BrokenPipeError):
                stream.write(text)
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def line(self, until_s: float) -> str:
        """Return its next line. Raises `TimeoutError`, and `EOFError` when it has ended."""
        try:
            line = self._lines.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise EOFError
        return line

    def leave(self) -> None:
        """End it, or continue without it."""
        self.tell()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
