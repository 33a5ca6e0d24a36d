"""RunPod's REST API v2: list, create once and remove an account's resources. Touches the network."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import httpx2

from worker.base.retry import pause_s, retry_after_s
from worker.up.errors import (
    ApiKeyLacksRights,
    ApiKeyMissing,
    ApiKeyRefused,
    NoBalance,
    RunPodBusy,
    RunPodFailed,
    RunPodRefused,
    RunPodUnreachable,
    UpUsage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from worker.up.errors import UpError

Kind = Literal["network-volumes", "serverless", "pods"]
Thing = dict[str, Any]
"""A volume, an endpoint or a Pod as RunPod describes it."""

BASE_URL: Final = "https://api.runpod.io"

_LISTS: Final[Mapping[str, str]] = {
    "network-volumes": "networkVolumes",
    "serverless": "endpoints",
    "pods": "pods",
    "catalog/gpus": "gpus",
    "catalog/cpus": "cpus",
    "catalog/datacenters": "dataCenters",
}
_TIMEOUT: Final = httpx2.Timeout(60.0, connect=15.0)
_LOG_TIMEOUT: Final = httpx2.Timeout(60.0, connect=15.0, read=20.0)
_REASON_CHARS: Final = 200
_LOCAL: Final = frozenset({"127.0.0.1", "localhost", "::1"})
# FlashBoot was once turned on by this suffix of an endpoint's name, and RunPod may still add it.
_FLASHBOOT_ENDING: Final = " -fb"
_LOOKS: Final = 3
_KEY: Final = re.compile(r"[!-~]+")


class RequestUnsure(Exception):  # noqa: N818 - it never leaves this module
    """The client of RunPod's API does not know whether a request was carried out. `error` is for the person, if it stays so."""

    def __init__(self, error: UpError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class ApiRetries:
    """How long to retry requests to RunPod's API, and the pauses, as `base.retry` has them."""

    patience_s: float = 90.0
    first_s: float = 1.0
    longest_s: float = 15.0
    sleep: Callable[[float], object] = time.sleep
    now: Callable[[], float] = field(default=time.monotonic)

    def pause(self, failures: int, least_s: float = 0.0) -> None:
        """Wait before the next attempt."""
        self.sleep(max(least_s, pause_s(failures, self.first_s, self.longest_s)))


class RunPodApi:
    """RunPod's REST API for one account. Every method raises an `UpError` that says what is wrong.

    GET, PATCH and DELETE are retried after a failure of the server or the network. POST creates something that is billed, so it
    is retried only after a look at what exists (`ensure`).
    """

    def __init__(self, key: str, base_url: str | None = None, retries: ApiRetries | None = None) -> None:
        if not key:
            raise ApiKeyMissing
        if not _KEY.fullmatch(key):
            raise UpUsage("RUNPOD_API_KEY has a blank or another character in it that no key has: copy it again.")
        base = (base_url or BASE_URL).rstrip("/")
        url = httpx2.URL(base)
        if url.scheme != "https" and url.host not in _LOCAL:
            raise UpUsage(f"RUNPOD_API_BASE_URL must be an https:// address, not {base}: the key would be sent in the clear.")
        self._key = key
        self._retries = retries or ApiRetries()
        # Use a proxy of the environment, but not for the stand-in on this machine.
        self._client = httpx2.Client(
            base_url=f"{base}/v2/",
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            timeout=_TIMEOUT,
            trust_env=url.host not in _LOCAL,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # --- what there is

    def all(self, kind: str, **query: str) -> list[Thing]:
        """Return everything of a kind, or a part of the catalog."""
        found = self._there(self._again, "GET", kind, params=query).get(_LISTS[kind])
        return [thing for thing in found if isinstance(thing, dict)] if isinstance(found, list) else []

    def get(self, kind: Kind, thing_id: str) -> Thing | None:
        """Return one of a kind by its id, or None."""
        try:
            return self._again("GET", f"{kind}/{thing_id}")
        except _ResourceMissing:
            return None

    def named(self, kind: Kind, name: str) -> list[Thing]:
        """Return all of a kind that have this name."""
        names = {name, name + _FLASHBOOT_ENDING}
        return [thing for thing in self.all(kind) if thing.get("name") in names and thing.get("status") != "TERMINATED"]

    def workers(self, endpoint_id: str) -> Thing:
        """Return an endpoint's workers and their summary. Empty if there is no such endpoint."""
        try:
            return self._again("GET", f"serverless/{endpoint_id}/workers")
        except _ResourceMissing:
            return {}

    # --- what is changed

    def ensure(self, kind: Kind, body: Mapping[str, Any], *, begun: bool = False) -> tuple[Thing, bool]:
        """Return what has the body's name, and whether it was created now. Never leaves two, whatever happens to an answer.

        `begun`: an earlier run may have sent this, and was killed before it heard the answer.
        """
        name, retries = str(body["name"]), self._retries
        end_s = retries.now() + retries.patience_s
        if found := self.named(kind, name) or (self.appearing(kind, name) if begun else []):
            return found[0], False
        unsure = False
        while True:
            try:
                made = self._there(self._once, "POST", kind, json=dict(body))
            except RequestUnsure as exc:
                if found := self.appearing(kind, name):
                    return found[0], True
                if retries.now() >= end_s:
                    raise exc.error from None
                unsure = True
            else:
                break
        if unsure:
            self._remove_others(kind, name, str(made["id"]))
        return made, True

    def _remove_others(self, kind: Kind, name: str, kept_id: str) -> None:
        """Remove what else has this name: nothing had it before, so a request without an answer created it just now."""
        for found in self._looks(kind, name):
            for other in found:
                if other["id"] != kept_id:
                    self.delete(kind, str(other["id"]))

    def appearing(self, kind: Kind, name: str) -> list[Thing]:
        """Return what has this name, giving RunPod's lists some time to show what was just created."""
        return next(filter(None, self._looks(kind, name)), [])

    def _looks(self, kind: Kind, name: str) -> Iterator[list[Thing]]:
        for number in range(_LOOKS):
            self._retries.sleep(min(self._retries.first_s * 2**number, self._retries.longest_s))
            yield self.named(kind, name)

    def update(self, kind: Kind, thing_id: str, body: Mapping[str, Any]) -> Thing:
        """Change the fields in the body, and return the whole."""
        return self._there(self._again, "PATCH", f"{kind}/{thing_id}", json=dict(body))

    def delete(self, kind: Kind, thing_id: str) -> None:
        """Remove it. A missing one is no error."""
        with contextlib.suppress(_ResourceMissing):
            self._again("DELETE", f"{kind}/{thing_id}")

    # --- a Pod's log

    def log(self, pod_id: str, since: str | None) -> Iterator[tuple[str, str]]:
        """Yield `(position, line)` of a Pod's output after the position `since`, until the connection ends or is silent.

        A Pod that is gone has no log: then nothing is yielded.
        """
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": since} if since else {})
        query = {"source": "container"} | ({} if since else {"tail": "5000"})
        try:
            with self._client.stream(
                "GET", f"pods/{pod_id}/logs", params=query, headers=headers, timeout=_LOG_TIMEOUT
            ) as answer:
                if answer.status_code != httpx2.codes.OK:
                    return
                for event in httpx2.EventSource(answer):
                    with contextlib.suppress(ValueError):
                        said = event.json()
                        if isinstance(said, dict):
                            yield event.id, str(said.get("line", ""))
        except httpx2.HTTPError:  # silence ends it too: the caller checks the Pod and calls again
            return

    # --- requests

    @staticmethod
    def _there(send: Callable[..., Thing], method: str, path: str, **options: Any) -> Thing:  # noqa: ANN401 - as below
        """Send a request whose 404 is an ordinary refusal."""
        try:
            return send(method, path, **options)
        except _ResourceMissing as exc:
            raise exc.error from None

    def _again(self, method: str, path: str, **options: Any) -> Thing:  # noqa: ANN401 - what httpx2 takes
        """Send a request that may be carried out twice, until it is answered. Raises `_ResourceMissing` for 404."""
        retries = self._retries
        end_s, failures = retries.now() + retries.patience_s, 0
        while True:
            try:
                return self._once(method, path, **options)
            except RequestUnsure as exc:
                if retries.now() >= end_s:
                    raise exc.error from None
                failures += 1
                retries.pause(failures)

    def _once(self, method: str, path: str, **options: Any) -> Thing:  # noqa: ANN401 - what httpx2 takes
        """Send a request once. Retry only after 429 or without a connection, because it was then not carried out.

        Raises `_ResourceMissing` for 404, and `RequestUnsure` if it may have been carried out.
        """
        operation, retries = f"{method} {path}", self._retries
        began_s, failures = retries.now(), 0
        while True:
            waited_s, failures = retries.now() - began_s, failures + 1
            try:
                answer = self._client.request(method, path, **options)
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError) as exc:
                if waited_s >= retries.patience_s:
                    raise RunPodUnreachable(operation, _failure_reason(exc)) from None
                retries.pause(failures)
            except httpx2.HTTPError as exc:
                raise RequestUnsure(RunPodUnreachable(operation, _failure_reason(exc))) from None
            else:
                if answer.status_code != httpx2.codes.TOO_MANY_REQUESTS:
                    return self._read(operation, answer)
                if waited_s >= retries.patience_s:
                    raise RunPodBusy(waited_s)
                retries.pause(failures, min(retry_after_s(answer.headers) or 0.0, retries.patience_s))

    def _read(self, operation: str, answer: httpx2.Response) -> Thing:
        status = answer.status_code
        if answer.is_server_error:
            raise RequestUnsure(RunPodFailed(operation, status))
        if status == httpx2.codes.NOT_FOUND:
            raise _ResourceMissing(RunPodRefused(operation, status, self._words(answer)))
        if answer.is_client_error:
            raise self._refusal(operation, answer)
        if not answer.content:
            return {}
        try:
            found = answer.json()
        except ValueError:
            raise RequestUnsure(RunPodFailed(operation, status)) from None
        return found if isinstance(found, dict) else {}

    def _refusal(self, operation: str, answer: httpx2.Response) -> UpError:
        match answer.status_code:
            case 401:
                return ApiKeyRefused()
            case 402:
                return NoBalance(operation)
            case 403:
                return ApiKeyLacksRights(operation)
        return RunPodRefused(operation, answer.status_code, self._words(answer))

    def _words(self, answer: httpx2.Response) -> str:
        """Return an error's text on one line, without the key."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        if isinstance(body, dict):
            errors = body.get("errors")
            more = "; ".join(map(str, errors)) if isinstance(errors, list) else ""
            text = f"{body.get('detail') or body.get('title') or 'it does not say why'}{f' ({more})' if more else ''}"
        else:
            text = answer.text or "it does not say why"
        return " ".join(text.replace(self._key, "...").split())[:_REASON_CHARS].rstrip(".")


class _ResourceMissing(Exception):  # noqa: N818 - it never leaves this module
    """RunPod's API knows no resource of this id. `error` is for the person if something should have been there."""

    def __init__(self, error: UpError) -> None:
        super().__init__(str(error))
        self.error = error


def _failure_reason(exc: httpx2.HTTPError) -> str:
    if isinstance(exc, httpx2.TimeoutException):
        return "no answer in time"
    return " ".join(str(exc).split())[:_REASON_CHARS] or type(exc).__name__
