"""HTTP's statuses as the worker takes them, and when a server wants to be asked again. Pure."""

from __future__ import annotations

import contextlib
import email.utils
import re
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

OK: Final = 200
PARTIAL: Final = 206
PROXY_LOGIN: Final = 407
UNSATISFIABLE: Final = 416
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
UNAUTHORISED: Final = frozenset({401, 403})
# A server sends Too Early for a replayed TLS request. The others are timeouts, rate limits and broken back ends.
TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


def retry_after_s(headers: Message | Mapping[str, str]) -> float | None:
    """Return what `Retry-After` (seconds or a date) or an exhausted `RateLimit` asks for, or None."""
    text = headers.get("Retry-After")
    if text and text.strip().isdecimal():
        return float(text)
    if text:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    limit = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit") or "")
    return float(limit.group(1)) if limit else None
