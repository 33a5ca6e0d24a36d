"""Who may have a file: tokens, private and gated repos, signed addresses. Pure."""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlencode

from devkit.hub.answers import RefusedError, expired

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Access:
    """Which repos need a token, and which repos each token opens; all are globs over `org/repo`."""

    private: Sequence[str] = ()
    gated: Sequence[str] = ()
    tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def is_private(self, repo: str) -> bool:
        """Return whether strangers are told that there is no such repo."""
        return any(fnmatchcase(repo, pattern) for pattern in self.private)

    def is_gated(self, repo: str) -> bool:
        """Return whether strangers see the metadata but not the files."""
        return any(fnmatchcase(repo, pattern) for pattern in self.gated)

    def check_token(self, token: str | None) -> None:
        """Refuse a token that the hub does not know, even for public repos."""
        if token is not None and token not in self.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")

    def check_repo(self, repo: str, token: str | None, *, exists: bool) -> None:
        """Refuse without saying whether a repo is missing or private: 401 to strangers, 404 to a token without access."""
        if exists and not (self.is_private(repo) and not self._opens(token, repo)):
            return
        if token is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise RefusedError(404, "Repository not found", "RepoNotFound")

    def check_gate(self, repo: str, token: str | None) -> None:
        """Show a gated repo's metadata to everyone, and its files to those who were let in."""
        if not self.is_gated(repo) or self._opens(token, repo):
            return
        restricted = f"Access to model {repo} is restricted"
        if token is None:
            raise RefusedError(
                401, f"{restricted}. You must have access to it and be authenticated to access it. Please log in.", "GatedRepo"
            )
        raise RefusedError(
            403, f"{restricted} and you are not in the authorized list. Visit it to ask for access.", "GatedRepo"
        )

    def _opens(self, token: str | None, repo: str) -> bool:
        return token is not None and any(fnmatchcase(repo, pattern) for pattern in self.tokens.get(token, ()))


class Signer:
    """Signs the CDN's addresses; every one given out can be made to expire at once."""

    def __init__(self, life_s: float) -> None:
        self.life_s = life_s
        self._secret = secrets.token_bytes(16)
        self._generation = 0

    def sign(self, path: str, disposition: str) -> str:
        """Return the quoted path with a query that opens it until it expires."""
        query = {
            "response-content-disposition": disposition,
            "Expires": f"{time.time() + self.life_s:.3f}",
            "Generation": str(self._generation),
        }
        return f"{path}?{urlencode({**query, 'Signature': self._signature(path, query)})}"

    def check(self, path: str, query: Mapping[str, str]) -> str:
        """Return the Content-Disposition that was signed. Raises RefusedError 403 in S3's words."""
        signed = {name: query.get(name, "") for name in ("response-content-disposition", "Expires", "Generation")}
        if not hmac.compare_digest(self._signature(path, signed), query.get("Signature", "")):
            raise RefusedError(403, "<Error><Code>SignatureDoesNotMatch</Code></Error>")
        if float(signed["Expires"]) <= time.time() or int(signed["Generation"]) != self._generation:
            raise expired()
        return signed["response-content-disposition"]

    def expire(self) -> None:
        """Refuse every address given out so far."""
        self._generation += 1

    def _signature(self, path: str, query: Mapping[str, str]) -> str:
        return hmac.new(self._secret, f"{unquote(path)}?{urlencode(query)}".encode(), "sha256").hexdigest()
