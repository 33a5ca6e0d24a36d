"""The hub in this process: what it serves, who may have it, what goes wrong. Threads, loopback network."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self, get_args

from devkit.hub.access import Access, Signer
from devkit.hub.faults import MIB, Book, Fault, FaultKind
from devkit.hub.log import Ledger, Origin, Reading, Request
from devkit.hub.server import Server
from devkit.hub.shelf import Shelf
from devkit.hub.xet import Xet

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType


class Hub(Reading):
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
        self.shelf = Shelf(root, lfs_above_bytes)
        self.access = Access(private, gated, tokens or {})
        self.signer = Signer(url_life_s)
        self.book = Book()
        self.ledger = Ledger()
        self.civitai = dict(civitai or {})
        self.civitai_token = civitai_token
        self.xet = Xet(xet)
        self.page_size = page_size
        self._url_life_s = url_life_s
        for repo in self.shelf.repos():
            self.shelf.snapshot(repo, "main")
        self._servers: dict[Origin, Server] = {"hub": Server(self, "hub", port), "cdn": Server(self, "cdn", cdn_port)}
        self._ports: dict[Origin, int] = {origin: server.port for origin, server in self._servers.items()}
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

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT shall be."""
        return f"http://127.0.0.1:{self._ports['hub']}"

    @property
    def cdn_endpoint(self) -> str:
        """The other origin, by another host name."""
        return f"http://localhost:{self._ports['cdn']}"

    @property
    def requests(self) -> list[Request]:
        """Every request since the log was last cleared, oldest first, those under way included."""
        return self.ledger.requests()

    @property
    def faults(self) -> list[dict[str, Any]]:
        """The faults asked for: their fields, and how many requests each has `seen` and `fired` at."""
        return self.book.state()

    def fault(self, kind: FaultKind, **options: Any) -> int:  # noqa: ANN401 (fields of Fault)
        """Let something go wrong; the options are Fault's fields. Returns the fault's id. TypeError, ValueError."""
        return self.book.add(Fault(kind, **options))

    def commit(self, repo: str, files: Mapping[str, bytes | Path], revision: str = "main") -> str:
        """Move `revision` to a new commit that has these files too; ids given out before stay valid. Returns the id.

        From then on the revision no longer follows its folder.
        """
        return self.shelf.commit(repo, files, revision)

    def clear_log(self) -> None:
        """Forget all requests, those under way included."""
        self.ledger.clear()

    def clear_faults(self) -> None:
        """From now on nothing goes wrong; what is stalled goes on."""
        self.book.clear()
        self.release()

    def reset(self) -> None:
        """As new: no faults, no log, both origins listening, addresses living as long as at the start."""
        for origin in get_args(Origin):
            self.listen(origin)
        self.clear_faults()
        self.clear_log()
        self.signer.life_s = self._url_life_s

    def release(self) -> None:
        """Let every request that hangs or stalls now go on."""
        self.ledger.release()

    def wait_stalled(self, count: int = 1, timeout_s: float = 60) -> None:
        """Return once `count` requests hang or stall; TimeoutError."""
        self.wait_until(lambda: self.ledger.stalled >= count, timeout_s)

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Return once no request is under way, so that each one's `outcome` is final; TimeoutError."""
        self.wait_until(lambda: all(r.outcome != "open" for r in self.requests), timeout_s)

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 60) -> None:
        """Return once `happened()`, which is asked again at every request, answer and MiB sent; TimeoutError."""
        with self.ledger.changed:
            if not self.ledger.changed.wait_for(happened, timeout_s):
                raise TimeoutError(f"it did not happen within {timeout_s} s")

    def expire_urls(self, life_s: float | None = None) -> None:
        """Refuse every CDN address and every token for Xet given out so far; `life_s`: how long addresses live from now on."""
        self.signer.expire()
        self.xet.expire()
        self.signer.life_s = self.signer.life_s if life_s is None else life_s

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
        self._servers[origin] = Server(self, origin, self._ports[origin])
