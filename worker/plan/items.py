"""The values of a plan: one model and its state, and the whole. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from worker.errors import WorkerError
    from worker.graph.model_names import NamedModel
    from worker.model_spec import ModelSpec


class ItemState(StrEnum):
    """The state of an item of a plan, in the order of display: those that need action come last."""

    VOLUME = "volume"
    BY_HAND = "by hand"  # put on the volume by hand: used as it is
    CONTAINER = "container"  # on the container's disk, because the volume could not be used
    IMAGE = "image"
    HOST_CACHE = "host cache"
    FETCH = "fetch"
    NO_ANSWER = "no answer"  # to be downloaded as well; its source did not answer just now
    INCOMPLETE = "incomplete"
    GATED = "gated"
    NO_ACCESS = "no access"
    NOT_FOUND = "not found"
    REFUSED = "refused"
    AMBIGUOUS = "ambiguous"
    UNKNOWN = "unknown"


THERE: Final = frozenset({ItemState.VOLUME, ItemState.BY_HAND, ItemState.CONTAINER, ItemState.IMAGE, ItemState.HOST_CACHE})
"""A job finds these."""

FETCHED: Final = frozenset({ItemState.FETCH, ItemState.NO_ANSWER})
"""A job downloads these."""


@dataclass(frozen=True, slots=True)
class PlanItem:
    """An item of a plan: one model that the workflow names. `folder` is its place, or None while unknown.

    `begun_bytes` of a file to download are on the volume already. `message` says what is wrong and what to do.
    """

    name: str
    folder: str | None
    state: ItemState
    size_bytes: int | None = None
    begun_bytes: int = 0
    path: Path | None = None
    spec: ModelSpec | None = None
    known_by: str | None = None
    sha256: str | None = None
    message: str | None = None
    code: str | None = None
    near: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    nodes: tuple[NamedModel, ...] = ()

    @property
    def title(self) -> str:
        """Return the model as people write it."""
        return f"{self.folder or '?'}/{self.name}"

    @property
    def optional(self) -> bool:
        """Return whether ComfyUI runs without it if its source is unknown."""
        return bool(self.nodes) and all(node.optional for node in self.nodes)

    @property
    def blocking(self) -> bool:
        """Return whether a job with this workflow fails because of it."""
        return not (self.state in THERE or self.state in FETCHED or (self.state is ItemState.UNKNOWN and self.optional))

    def to_dict(self) -> dict[str, Any]:
        """Return the item for `--json`."""
        return {
            "name": self.name,
            "folder": self.folder,
            "state": self.state,
            "blocking": self.blocking,
            "optional": self.optional,
            "size_bytes": self.size_bytes,
            "begun_bytes": self.begun_bytes,
            "path": str(self.path) if self.path else None,
            "source": str(self.spec.source) if self.spec else None,
            "known_by": self.known_by,
            "sha256": self.sha256,
            "message": self.message,
            "code": self.code,
            "near": list(self.near),
            "candidates": list(self.candidates),
            "nodes": [{"id": node.node_id, "class_type": node.class_type, "input": node.input_name} for node in self.nodes],
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a workflow needs: its items. `problems` concern the whole; a model's problem is in its item.

    `target` is the destination of downloads, and `free_bytes` its free space by the file system.
    """

    items: tuple[PlanItem, ...] = ()
    problems: tuple[WorkerError, ...] = ()
    notes: tuple[str, ...] = ()
    target: Path | None = None
    free_bytes: int | None = None

    @property
    def to_fetch(self) -> tuple[PlanItem, ...]:
        """Return what a job would download, each file once."""
        found = {(item.folder, item.spec.name): item for item in self.items if item.state in FETCHED and item.spec}
        return tuple(found.values())

    @property
    def fetch_bytes(self) -> int:
        """Return how many bytes are missing, of the files whose size is known."""
        return sum((item.size_bytes or 0) - item.begun_bytes for item in self.to_fetch)

    @property
    def unknown_sizes(self) -> int:
        """Return how many files to download have an unknown size."""
        return sum(item.size_bytes is None for item in self.to_fetch)

    @property
    def can_run(self) -> bool:
        """Return whether no known problem prevents the run."""
        return not self.problems and not any(item.blocking for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        return {
            "can_run": self.can_run,
            "problems": [{"code": problem.code, "message": str(problem)} for problem in self.problems],
            "notes": list(self.notes),
            "models": [item.to_dict() for item in self.items],
            "fetch": {"files": len(self.to_fetch), "bytes": self.fetch_bytes, "unknown_sizes": self.unknown_sizes},
            "target": {"path": str(self.target) if self.target else None, "free_bytes": self.free_bytes},
        }
