"""Show a job's progress: one changing line on a terminal, a line now and then elsewhere. Standard error."""

from __future__ import annotations

import shutil
import time
from typing import IO, TYPE_CHECKING, Final

from client.plain import one_line, printable
from client.progress import bar_line, plain_line, subject

if TYPE_CHECKING:
    from collections.abc import Mapping

    from client.service import News

_SAME_EVERY_S: Final = 10.0
_CLEAR: Final = "\r\x1b[K"


class Screen:
    """Shows a job's progress. `end` leaves the cursor on a new line."""

    def __init__(self, stream: IO[str], names: Mapping[str, str]) -> None:
        self._stream = stream
        self._names = names
        self._live = stream.isatty()
        self._subject: tuple[object, ...] = ()
        self._said_at = 0.0
        self._job_id: str | None = None

    def show(self, news: News) -> None:
        """Show the job's state. May be called at any rate."""
        if news.job_id != self._job_id:
            self._job_id = news.job_id
            self.say(f"job {news.job_id}")
        if self._live:
            width = shutil.get_terminal_size((80, 24)).columns - 1
            self._write(_CLEAR + one_line(bar_line(news, self._names, width)))
            return
        now = time.monotonic()
        if subject(news) == self._subject and (news.progress is None or now - self._said_at < _SAME_EVERY_S):
            return
        self._subject, self._said_at = subject(news), now
        self._write(one_line(plain_line(news, self._names)) + "\n")

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self.end()
        self._write(printable(text) + "\n")

    def end(self) -> None:
        """Clear the changing line."""
        if self._live:
            self._write(_CLEAR)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
