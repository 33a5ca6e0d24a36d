"""The worker's log: one line a record, to standard error, with secrets redacted. Touches standard error only."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING

from worker.base.text import shortened

if TYPE_CHECKING:
    from collections.abc import Iterable

# A signed URL is a key while it is valid, so its query is never shown. Tokens are recognised by their issuers' prefixes. Each
# pattern reads a text once, because the sender of a job writes some of what is logged.
_URL = re.compile(r"https?://[^\s\"']+")
_KEY = re.compile(r"(?i:signature|token|key|[?&;]sig=|auth|secret|passw|credential)")
_USER = re.compile(r"(https?://)[^\s/@\"']+@")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|rpa_[A-Za-z0-9]{8,}|rps_[A-Za-z0-9]{8,}|comfyui-[0-9a-f]{16,})")
_BEARER = re.compile(r"(?i)(authorization:?\s*(?:bearer\s+)?|bearer\s+)[^\s\"']+")
_SHORTEST_SECRET = 6
_LONGEST = 20_000  # characters of a record
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def log_line(text: str) -> str:
    r"""Return the text as one log line: without colours, and with other control characters as `\n` and the like.

    A name in a job may contain line breaks that would begin another record, or sequences that a terminal obeys.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), _COLOUR.sub("", text))


class RedactingFilter(logging.Filter):
    """Replaces known secrets, token-like strings, and the query of signed URLs in every log record."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._secrets = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, with its text redacted."""
        record.msg, record.args = log_line(self.redact(shortened(record.getMessage(), _LONGEST))), None
        return True

    def redact(self, text: str) -> str:
        """Return the text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = _URL.sub(_without_key, _USER.sub(_without_password, text))
        text = _TOKEN.sub("***", text)
        return _BEARER.sub(r"\1***", text)


def _without_password(found: re.Match[str]) -> str:
    return f"{found[1]}***@" if ":" in found[0][len(found[1]) :] else found[0]


def _without_key(found: re.Match[str]) -> str:
    address, mark, query = found[0].partition("?")
    return f"{address}?***" if mark and _KEY.search(mark + query) else found[0]


class _RedactingFormatter(logging.Formatter):
    """Also redacts tracebacks in the log, which are formatted after the filters have run."""

    def __init__(self, redactor: RedactingFilter) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._redactor = redactor

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        """Return the traceback without secrets."""
        return self._redactor.redact(super().formatException(ei))  # type: ignore[arg-type]  # typeshed's private alias


def configure_logs(level: str, secrets: Iterable[str] = ()) -> None:
    """Send the worker's log records at `level` and above to standard error, and other libraries' from WARNING on."""
    redactor = RedactingFilter(secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(redactor)
    handler.setFormatter(_RedactingFormatter(redactor))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("worker").setLevel(level)
