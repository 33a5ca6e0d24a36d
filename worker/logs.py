"""How the worker logs: one line a record, to standard error, with secrets blotted out. Touches standard error only."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# A signed URL is a key for as long as it lives: its query is never shown. Tokens are known by how their issuers begin them.
_SIGNED_QUERY = re.compile(
    r"(https?://[^\s?\"']+)\?[^\s\"']*(?i:signature|token|key|[?&;]sig=|auth|secret|passw|credential)[^\s\"']*"
)
_USER = re.compile(r"(https?://)[^\s/@\"']+:[^\s/@\"']*@")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|rpa_[A-Za-z0-9]{8,}|rps_[A-Za-z0-9]{8,}|comfyui-[0-9a-f]{16,})")
_BEARER = re.compile(r"(?i)(authorization:?\s*(?:bearer\s+)?|bearer\s+)[^\s\"']+")
_SHORTEST_SECRET = 6


class RedactingFilter(logging.Filter):
    """Replaces known secrets, things shaped like tokens, and the query of signed URLs in every record that passes."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._secrets = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, with its text made safe."""
        record.msg, record.args = self.redact(record.getMessage()), None
        return True

    def redact(self, text: str) -> str:
        """The same text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = _SIGNED_QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))
        text = _TOKEN.sub("***", text)
        return _BEARER.sub(r"\1***", text)


class _RedactingFormatter(logging.Formatter):
    """Redacts tracebacks too: they are formatted after the filters have run."""

    def __init__(self, redactor: RedactingFilter) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._redactor = redactor

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        """The traceback without secrets."""
        return self._redactor.redact(super().formatException(ei))  # type: ignore[arg-type]  # typeshed's private alias


def configure(level: str, secrets: Iterable[str] = ()) -> None:
    """Send the worker's records at `level` and above to standard error; other libraries' from WARNING on."""
    redactor = RedactingFilter(secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(redactor)
    handler.setFormatter(_RedactingFormatter(redactor))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("worker").setLevel(level)
