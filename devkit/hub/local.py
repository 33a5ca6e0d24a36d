"""The hub in this process: its state, and the two origins that answer from it. Threads, loopback network."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self, get_args

from devkit.hub.access import Access
from devkit.hub.faults import MIB
from devkit.hub.log import Origin
from devkit.hub.server import Server
from devkit.hub.shelf import Shelf
from devkit.hub.state import State

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType


class Hub(State):
    """Listens from construction (which hashes the repos' files) until `close`.

    `private`, `gated`: globs over `org/repo`. `tokens`: for each token, globs over the repos it opens; a token that is not here
    is refused everywhere. `civitai`: model version id to a path under the root. Files with a weight's suffix, and those above
    `lfs_above_bytes`, are served by the CDN from addresses valid for `url_life_s`. `page_size`: entries of a tree per answer.
    `xet`: globs over the repos whose weights are on Xet as well.
    For throughput use `hub_process`: here the server shares this interpreter's lock with the client.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        cdn_port: int = 0,
        private: Sequence[str] = (),
        gated: Sequence[str] = (),
        tokens: Mapping[str, Sequence[str]] | None = None,
        civitai: Mapping[str, str] | None = None,
        civitai_token: str | None = None,
        lfs_above_bytes: int = 10 * MIB,
        url_life_s: float = 3600,
        page_size: int = 1000,
        xet: Sequence[str] = (),
    ) -> None:
        super().__init__(
            Shelf(root, lfs_above_bytes),
            Access(private, gated, tokens or {}),
            civitai=civitai or {},
            civitai_token=civitai_token,
            url_life_s=url_life_s,
            page_size=page_size,
            xet=xet,
        )
        for repo in self.shelf.repos():
            self.shelf.snapshot(repo, "main")
        self._servers: dict[Origin, Server] = {"hub": Server(self, "hub", port), "cdn": Server(self, "cdn", cdn_port)}
        self.ports = {origin: server.port for origin, server in self._servers.items()}
        self._refusing: dict[Origin, threading.Timer | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; end every connection, stalled ones included."""
        self.ledger.closing.set()
        self.release()
        for timer in list(self._refusing.values()):
            if timer:
                timer.cancel()
        for origin in get_args(Origin):
            self.refuse(origin)
        self.shelf.close()
        self.xet.close()

    def refuse(self, origin: Origin, for_s: float | None = None, *, keep: socket.socket | None = None) -> None:
        """Stop listening (connections are refused) and end the live ones; listen again after `for_s` when given."""
        if origin in self._refusing:
            return
        self._servers[origin].stop(keep)
        self._refusing[origin] = None
        if for_s is not None:
            self._refusing[origin] = timer = threading.Timer(for_s, self.listen, (origin,))
            timer.daemon = True
            timer.start()

    def listen(self, origin: Origin) -> None:
        """Undo `refuse`."""
        if origin not in self._refusing or self.ledger.closing.is_set():
            return
        if timer := self._refusing.pop(origin):
            timer.cancel()
        self._servers[origin] = Server(self, origin, self.ports[origin])
