"""What a plan is made of: one model and how it stands with it, and the whole. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from worker.errors import WorkerError
    from worker.graph.model_names import NamedModel
    from worker.spec import ModelSpec


class State(StrEnum):
    """How it stands with a model, in the order in which people see it: what they have to act upon comes last."""

    VOLUME = "volume"
    BY_HAND = "by hand"  # on the volume, put there by somebody: used as it is
    CONTAINER = "container"  # on the container's disk, because the volume could not take it
    IMAGE = "image"
    HOST_CACHE = "host cache"
    FETCH = "fetch"
    NO_ANSWER = "no answer"  # to be fetched as well; its source could not be asked just now
    INCOMPLETE = "incomplete"
    GATED = "gated"
    NO_ACCESS = "no access"
    NOT_FOUND = "not found"
    REFUSED = "refused"
    AMBIGUOUS = "ambiguous"
    UNKNOWN = "unknown"


THERE: Final = frozenset({State.VOLUME, State.BY_HAND, State.CONTAINER, State.IMAGE, State.HOST_CACHE})
"""A job finds these."""

FETCHED: Final = frozenset({State.FETCH, State.NO_ANSWER})
"""A job has these fetched."""


@dataclass(frozen=True, slots=True)
class Item:
    """One model that the workflow names. `folder` is where it is or would go, None while nobody knows.

    `begun_bytes` of a file to fetch are on the volume already. `message` says what is the matter and what to do.
    """

    name: str
    folder: str | None
    state: State
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
        """The model as people write it."""
        return f"{self.folder or '?'}/{self.name}"

    @property
    def optional(self) -> bool:
        """ComfyUI runs without it when nobody knows it."""
        return bool(self.nodes) and all(node.optional for node in self.nodes)

    @property
    def blocking(self) -> bool:
        """A job with this workflow fails because of it."""
        return not (self.state in THERE or self.state in FETCHED or (self.state is State.UNKNOWN and self.optional))

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
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
    """What a workflow needs. `problems` are about the whole; those of one model are in its item.

    `target` is where fetched models go and `free_bytes` what the file system says is free there.
    """

    items: tuple[Item, ...] = ()
    problems: tuple[WorkerError, ...] = ()
    notes: tuple[str, ...] = ()
    target: Path | None = None
    free_bytes: int | None = None

    @property
    def to_fetch(self) -> tuple[Item, ...]:
        """What a job would have fetched, each file once however many inputs name it."""
        found = {(item.folder, item.spec.name): item for item in self.items if item.state in FETCHED and item.spec}
        return tuple(found.values())

    @property
    def fetch_bytes(self) -> int:
        """How many bytes are still to come, of the files whose size is known."""
        return sum((item.size_bytes or 0) - item.begun_bytes for item in self.to_fetch)

    @property
    def unknown_sizes(self) -> int:
        """How many files to fetch have a size that nobody could tell."""
        return sum(item.size_bytes is None for item in self.to_fetch)

    @property
    def can_run(self) -> bool:
        """Nothing that is known stands in the way."""
        return not self.problems and not any(item.blocking for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "can_run": self.can_run,
            "problems": [{"code": problem.code, "message": str(problem)} for problem in self.problems],
            "notes": list(self.notes),
            "models": [item.to_dict() for item in self.items],
            "fetch": {"files": len(self.to_fetch), "bytes": self.fetch_bytes, "unknown_sizes": self.unknown_sizes},
            "target": {"path": str(self.target) if self.target else None, "free_bytes": self.free_bytes},
        }
