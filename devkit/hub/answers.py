"""How a request ends other than well. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class RefusedError(Exception):
    """The answer is an error; `code` goes into X-Error-Code, which is what the client's exception classes follow."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


class CutError(Exception):
    """A fault ends this connection here."""


def not_found() -> RefusedError:
    """Return the answer for an unknown address."""
    return RefusedError(404, "Not found")


def expired() -> RefusedError:
    """Return the answer for an expired signed address, in the words of S3 and CloudFront."""
    return RefusedError(403, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
