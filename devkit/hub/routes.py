"""What an address asks for. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

_REPO: Final = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: Final = tuple(
    (route, re.compile(pattern))
    for route, pattern in (
        ("control", r"/_control/(?P<path>[^/]+)"),
        ("whoami", r"/api/whoami-v2"),
        ("civitai", r"/api/download/models/(?P<path>\d+)"),
        ("civitai-info", r"/api/v1/model-versions/(?P<path>\d+)"),
        ("api/info", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?"),
        ("api/tree", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
        ("api/paths-info", rf"/api/models/{_REPO}/paths-info/(?P<revision>[^/]+)"),
        ("xet/token", rf"/api/models/{_REPO}/xet-read-token/(?P<revision>[^/]+)"),
        ("xet/reconstruction", r"/xet/v2/reconstructions/(?P<path>[0-9a-f]{64})"),
        ("xet/piece", r"/xet/piece/(?P<path>[0-9a-f]{64}/\d+)"),
        ("files", r"/files/(?P<path>.+)"),
        ("redirect", r"/redirect/(?P<path>.+)"),
        ("cdn", r"/cdn/file/(?P<path>.+)"),
        ("cdn", rf"/cdn/repo/{_REPO}/(?P<revision>[^/]+)/(?P<path>.+)"),
        ("resolve", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    )
)


@dataclass(frozen=True, slots=True)
class Target:
    """A route, and what it is about."""

    route: str
    repo: str = ""
    revision: str = "main"
    path: str = ""

    @property
    def file(self) -> str:
        """Return `org/repo/path`, `org/repo`, or the path under the root."""
        return f"{self.repo}/{self.path}".strip("/")


def target_of(path: str) -> Target:
    """Return what a path asks for. Match it quoted, because a revision may contain a quoted slash."""
    for route, pattern in _ROUTES:
        if found := pattern.fullmatch(path):
            return Target(route, **{name: unquote(value) for name, value in found.groupdict().items() if value})
    return Target("unknown", path=unquote(path))
