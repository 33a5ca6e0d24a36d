"""What seeding would do, without doing it: what is there, what is to be sent, what is in the way. Asks volumes and sources."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from worker.errors import WorkerError
from worker.models.progress import size_text
from worker.plan.items import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.models.hub import Hub
    from worker.models.progress import CancelToken
    from worker.plan.items import Item
    from worker.seed.upkeep import Volume

_ASK_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One model, as the dry run sees it. `send_bytes` are still to be sent, to all volumes together."""

    model: str
    size_bytes: int | None
    state: str
    source: str | None
    good: bool
    send_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.model,
            "size_bytes": self.size_bytes,
            "state": self.state,
            "source": self.source,
            "ok": self.good,
            "send_bytes": self.send_bytes,
        }


def look_ahead(items: Sequence[Item], volumes: Sequence[Volume], hub: Hub, cancel: CancelToken) -> list[Line]:
    """A line for each model, in order; raises nothing for what is the matter with one."""
    with ThreadPoolExecutor(_ASK_AT_ONCE, thread_name_prefix="look") as pool:
        return list(pool.map(lambda item: _line(item, volumes, hub, cancel), items))


def _line(item: Item, volumes: Sequence[Volume], hub: Hub, cancel: CancelToken) -> Line:
    spec, source = item.spec, str(item.spec.source) if item.spec else None
    if item.state is not State.FETCH or spec is None:
        return Line(item.title, item.size_bytes, item.message or str(item.state), source, good=item.optional)
    states: list[str] = []
    send_bytes = 0
    try:
        for volume in volumes:
            how = volume.look(spec, item.sha256, item.size_bytes)
            state = {"ready": "there", "by_hand": "there, put by hand"}.get(how or "", "")
            if not state:
                # A second look-up costs one small request, and tells which partial would be gone on with.
                begun = volume.begun_bytes(spec, hub.look_up(spec.source, cancel))
                send_bytes += max(0, (item.size_bytes or 0) - begun)
                state = f"to send, {size_text(begun)} are there" if begun else "to send"
            states.append(state)
    except WorkerError as exc:
        return Line(item.title, item.size_bytes, str(exc), source, good=False)
    if len(set(states)) == 1:
        states = states[:1]
    else:
        states = [f"{state} ({volume.title})" for state, volume in zip(states, volumes, strict=True)]
    return Line(item.title, item.size_bytes, "; ".join(states), source, good=True, send_bytes=send_bytes)
