"""A hub in another process, by the same methods. Starts a process; loopback network."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from devkit.hub.log import TICK_S, Reading, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from devkit.hub.faults import FaultKind
    from devkit.hub.log import Origin

_CALL_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 10.0


class RemoteHub(Reading):
    """Hub's methods over `/_control/`, by whichever origin listens; ConnectionError when neither does."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._roads = [endpoint]
        self.cdn_endpoint: str = self._call("about")["cdn_endpoint"]
        self._roads.append(self.cdn_endpoint)

    @property
    def requests(self) -> list[Request]:
        """Return every request since the log was last cleared, oldest first, including running ones."""
        return [Request(**{**request, "faults": tuple(request["faults"])}) for request in self._call("log")]

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Return the requested faults: their fields, and how many requests each has `seen` and `fired` at."""
        found: list[dict[str, Any]] = self._call("faults")
        return found

    def fault(self, kind: FaultKind, **options: Any) -> int:  # noqa: ANN401 (fields of Fault)
        """Let something go wrong; the options are Fault's fields. Returns the fault's id. ValueError."""
        return int(self._call("faults", {"kind": kind, **options})[0])

    def commit(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Move `revision` to a new commit that has these files too; ids given out before stay valid. Returns the id."""
        content = {path: base64.b64encode(data).decode() for path, data in files.items()}
        return str(self._call("commit", {"repo": repo, "files": content, "revision": revision})["commit"])

    def clear_log(self) -> None:
        """Forget all requests, those under way included."""
        self._call("clear-log", {})

    def clear_faults(self) -> None:
        """Remove all faults, and continue what is stalled."""
        self._call("clear-faults", {})

    def reset(self) -> None:
        """Restore the initial state: no faults, no log, both origins listening, addresses valid as long as at the start."""
        self._call("reset", {})

    def release(self) -> None:
        """Let every request that hangs or stalls now go on."""
        self._call("release", {})

    def wait_stalled(self, count: int = 1, timeout_s: float = 60) -> None:
        """Return once `count` requests hang or stall; TimeoutError."""
        self._call(f"wait?stalled={count}&timeout_s={timeout_s}", timeout_s=timeout_s + _CALL_TIMEOUT_S)

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Return once no request is under way, so that each one's `outcome` is final; TimeoutError."""
        self._call(f"wait?idle=1&timeout_s={timeout_s}", timeout_s=timeout_s + _CALL_TIMEOUT_S)

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 60) -> None:
        """Return once `happened()`, which is asked again every 50 ms; TimeoutError."""
        end_s = time.monotonic() + timeout_s
        while not happened():
            if time.monotonic() > end_s:
                raise TimeoutError(f"it did not happen within {timeout_s} s")
            time.sleep(TICK_S)

    def expire_urls(self, life_s: float | None = None) -> None:
        """Refuse every CDN address and every token for Xet given out so far; `life_s`: how long addresses live from now on."""
        self._call("expire", {"life_s": life_s})

    def refuse(self, origin: Origin, for_s: float | None = None) -> None:
        """Stop listening (connections are refused) and end the live ones; listen again after `for_s` when given."""
        self._call("refuse", {"origin": origin, "for_s": for_s})

    def listen(self, origin: Origin) -> None:
        """Undo `refuse`; possible while the other origin listens."""
        self._call("listen", {"origin": origin})

    def _call(self, command: str, value: object = None, timeout_s: float = _CALL_TIMEOUT_S) -> Any:  # noqa: ANN401 (JSON)
        for road in self._roads:
            with contextlib.suppress(ConnectionRefusedError):
                return self._ask(road, command, value, timeout_s)
        raise ConnectionError(f"the hub at {self.endpoint} does not answer")

    def _ask(self, road: str, command: str, value: object, timeout_s: float) -> Any:  # noqa: ANN401 (JSON)
        link = http.client.HTTPConnection(urlsplit(road).netloc, timeout=timeout_s)
        with contextlib.closing(link):
            link.request("GET" if value is None else "POST", f"/_control/{command}", json.dumps(value or {}))
            answer = link.getresponse()
            said = json.load(answer)
        match answer.status:
            case 408:
                raise TimeoutError(said["error"])
            case 400:
                raise ValueError(said["error"])
        return said


@contextlib.contextmanager
def hub_process(root: Path, *options: str) -> Iterator[RemoteHub]:
    """A hub in a process of its own, with the command line's `options`; it ends with the block, or with this process.

    ConnectionError when it does not start; it says why on stderr.
    """
    command = [sys.executable, "-m", "devkit.hub", "--root", str(root.resolve()), "--until-stdin-closes", *options]
    project = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=project, text=True) as child:
        try:
            endpoint = child.stdout.readline().strip() if child.stdout else ""
            if not endpoint:
                raise ConnectionError(f"the hub ended with exit code {child.wait(_STOP_TIMEOUT_S)} before it listened")
            yield RemoteHub(endpoint)
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_TIMEOUT_S)
            child.kill()
