"""What a hub serves, who may have it, what goes wrong, and what was asked: all that the routes share. Threads, disk.

It listens nowhere, so that the routes know it and not the servers that give them their requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devkit.hub.access import Access, Signer
from devkit.hub.faults import Book, Fault, FaultKind
from devkit.hub.log import Ledger, Origin, Reading, Request
from devkit.hub.xet_store import Xet

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from devkit.hub.shelf import Shelf


class State(Reading):
    """What the routes answer from. `ports` are filled in by whoever listens."""

    def __init__(
        self,
        shelf: Shelf,
        access: Access,
        *,
        civitai: Mapping[str, str],
        civitai_token: str | None,
        url_life_s: float,
        page_size: int,
        xet: Sequence[str],
    ) -> None:
        self.shelf = shelf
        self.access = access
        self.signer = Signer(url_life_s)
        self.book = Book()
        self.ledger = Ledger()
        self.civitai = dict(civitai)
        self.civitai_token = civitai_token
        self.xet = Xet(xet)
        self.page_size = page_size
        self.ports: dict[Origin, int] = {}
        self._url_life_s = url_life_s

    @property
    def endpoint(self) -> str:
        """Return the value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.ports['hub']}"

    @property
    def cdn_endpoint(self) -> str:
        """Return the other origin, with another host name."""
        return f"http://localhost:{self.ports['cdn']}"

    @property
    def requests(self) -> list[Request]:
        """Return every request since the log was last cleared, oldest first, including running ones."""
        return self.ledger.requests()

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Return the requested faults: their fields, and how many requests each has `seen` and `fired` at."""
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
        """Remove all faults, and continue what is stalled."""
        self.book.clear()
        self.release()

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
        """Stop listening; for whoever listens to do."""
        raise NotImplementedError

    def listen(self, origin: Origin) -> None:
        """Undo `refuse`."""
        raise NotImplementedError

    def reset(self) -> None:
        """Restore the initial state: no faults, no log, both origins listening, addresses valid as long as at the start."""
        for origin in self.ports:
            self.listen(origin)
        self.clear_faults()
        self.clear_log()
        self.signer.life_s = self._url_life_s
