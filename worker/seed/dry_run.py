"""Report what seeding would do: what is there, what would be sent, what blocks it. Asks volumes and sources."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from worker.base.text import size_text
from worker.errors import WorkerError
from worker.plan.items import State
from worker.seed.outcome import NEWER
from worker.store.inventory import Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.base.progress import CancelToken
    from worker.fetch.hub import Hub
    from worker.plan.items import Item
    from worker.seed.verify import Volume
    from worker.store.inventory import Look

_ASK_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One model in the dry run. `send_bytes` are still to be sent, to all volumes together."""

    model: str
    size_bytes: int | None
    state: str
    source: str | None
    good: bool
    send_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the line for `--json`."""
        return {
            "model": self.model,
            "size_bytes": self.size_bytes,
            "state": self.state,
            "source": self.source,
            "ok": self.good,
            "send_bytes": self.send_bytes,
        }


def look_ahead(items: Sequence[Item], volumes: Sequence[Volume], hub: Hub, cancel: CancelToken) -> list[Line]:
    """Return a line for each model, in order. A model's error is in its line."""
    with ThreadPoolExecutor(_ASK_AT_ONCE, thread_name_prefix="look") as pool:
        return list(pool.map(lambda item: _line(item, volumes, hub, cancel), items))


def _line(item: Item, volumes: Sequence[Volume], hub: Hub, cancel: CancelToken) -> Line:
    spec, source = item.spec, str(item.spec.source) if item.spec else None
    if item.state is not State.FETCH or spec is None:
        return Line(item.title, item.size_bytes, item.message or str(item.state), source, good=item.optional)
    states: list[str] = []
    send_bytes = 0
    good = True
    try:
        for volume in volumes:
            found = volume.look(spec.folder, spec.name)
            if found.standing is Standing.ABSENT:
                # A second look-up costs one small request, and shows which partial upload would be resumed.
                begun = volume.begun_bytes(spec, hub.look_up(spec.source, cancel))
                send_bytes += max(0, (item.size_bytes or 0) - begun)
                states.append(f"to send, {size_text(begun)} are there" if begun else "to send")
            else:
                state, is_good = _there(found, item, volume.expected(spec, item.sha256))
                states.append(state)
                good = good and is_good
    except WorkerError as exc:
        return Line(item.title, item.size_bytes, str(exc), source, good=False)
    if len(set(states)) == 1:
        states = states[:1]
    else:
        states = [f"{state} ({volume.title})" for state, volume in zip(states, volumes, strict=True)]
    return Line(item.title, item.size_bytes, "; ".join(states), source, good=good, send_bytes=send_bytes)


def _there(found: Look, item: Item, expected: str | None) -> tuple[str, bool]:
    """Return what seeding would do with an existing file, and whether that is as wanted. `expected` is its required hash."""
    pinned, sealed = item.spec.sha256 if item.spec else None, found.seal.sha256 if found.seal else None
    if found.standing is Standing.READY:
        if pinned and sealed and pinned != sealed:
            return f"there, but with the sha256 {sealed}: remove it to have the right one sent", False
        return ("there", True) if None in {sealed, item.sha256} or sealed == item.sha256 else (f"there; {NEWER}", True)
    if found.error:
        return str(found.error), False
    state = "there, replaced by hand" if found.standing is Standing.REPLACED else "there, put by hand"
    if expected and item.size_bytes not in {None, found.size_bytes}:
        return f"{state}, with {found.size_bytes} bytes, not {item.size_bytes}: remove it to have the right one sent", False
    return (f"{state}, its sha256 yet to be checked" if expected else state), True
