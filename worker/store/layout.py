"""Where files lie on the volume: path arithmetic, as volume_layout.md describes it. Pure.

The same class serves the store on the container's own disk: the root is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.base.text import is_legible
from worker.errors import UnsafePath

if TYPE_CHECKING:
    from pathlib import Path

_SEALED_BYTES = 228  # the longest name whose seal, with its temporary prefix and suffix, fits in 255 bytes
_HEAD_BYTES = 128
_REPO_KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path below one root. Each method raises `UnsafePath` for a name that would leave its folder.

    `moved` is where `models` ("") and folders in it really are, if links lead there that only `pod_links` can follow.
    """

    root: Path
    moved: tuple[tuple[str, Path], ...] = ()

    @property
    def models(self) -> Path:
        """Return the folder of the weights, with folders named as ComfyUI names them."""
        return dict(self.moved).get("") or self.root / "models"

    @property
    def manifest(self) -> Path:
        """Return the operator's optional list of models."""
        return self.root / "models.toml"

    @property
    def workflows(self) -> Path:
        """Return the folder of the operator's workflows, which requests ask for by name."""
        return self.root / "workflows"

    def workflow(self, name: str) -> Path:
        """Return the file of a workflow. The name may include `.json`, and backslashes as Windows writes them."""
        *above, last = safe_parts("The workflow's name", name.replace("\\", "/"))
        return self.workflows.joinpath(*above, f"{last.removesuffix('.json')}.json")

    @property
    def state(self) -> Path:
        """Return the worker's own folder. Deleting it while no worker runs costs hashing and resuming, never a model."""
        return self.root / ".worker"

    @property
    def partials(self) -> Path:
        """Return the folder of downloads under way, one folder for each content."""
        return self.state / "partial"

    @property
    def definitions(self) -> Path:
        """Return the folder of what ComfyUI said of its node classes, a file for each version with its custom nodes."""
        return self.state / "definitions"

    @property
    def seals(self) -> Path:
        """Return the folder of the records that say which files are whole."""
        return self.state / "seals"

    @property
    def locks(self) -> Path:
        """Return the folder of lock state. Nobody removes files here by hand."""
        return self.state / "locks"

    @property
    def recent(self) -> Path:
        """Return the folder of the records of recent models, one for each endpoint."""
        return self.state / "used"

    def used(self, endpoint: str) -> Path:
        """Return the record of the models that the endpoint's jobs used last."""
        return self.recent.joinpath(*safe_parts("The endpoint's id", f"{endpoint}.json"))

    @property
    def leases(self) -> Path:
        """Return the folder of the leases, one file for each worker."""
        return self.state / "leases"

    def lease(self, worker: str) -> Path:
        """Return one worker's lease: the models that its jobs use."""
        return self.leases.joinpath(*safe_parts("The worker's name", f"{worker}.json"))

    @property
    def leases_clock(self) -> Path:
        """Return an empty file that is touched to read the volume's time."""
        return self.leases / "clock"

    @property
    def leases_began(self) -> Path:
        """Return the mark that a worker on this volume may remove models, as old as the first one's start."""
        return self.leases / "began"

    def removal_mark(self, worker: str) -> Path:
        """Return an empty file that exists while this worker removes models."""
        return self.leases.joinpath(*safe_parts("The worker's name", f"{worker}.removing"))

    @property
    def last_used(self) -> Path:
        """Return the file with the content of leases of workers that are gone."""
        return self.state / "last_used.json"

    @property
    def removing(self) -> Path:
        """Return the folder of models that are being removed."""
        return self.state / "removing"

    @property
    def tombstones(self) -> Path:
        """Return the folder of records of models that were removed to make room."""
        return self.state / "removed"

    def tombstone(self, folder: str, name: str) -> Path:
        """Return the record that a model was removed to make room."""
        return self.tombstones / self.seal(folder, name).relative_to(self.seals)

    @property
    def host_cache(self) -> Path:
        """Return RunPod's read-only cache of Hugging Face files on the machine, if the endpoint has it."""
        return self.root / "huggingface-cache" / "hub"

    def model(self, folder: str, name: str) -> Path:
        """Return the final path of a model."""
        return self._placed(*safe_parts("The folder", folder), *safe_parts("The model's name", name))

    def listed(self, path: str) -> Path:
        """Like `model`, for `folder/name` from a listing, without its checks."""
        return self._placed(*path.split("/"))

    def _placed(self, top: str, *below: str) -> Path:
        return (dict(self.moved).get(top) or self.models / top).joinpath(*below)

    def seal(self, folder: str, name: str) -> Path:
        """Return the record that the model's file is whole."""
        return self.seal_of("/".join((*safe_parts("The folder", folder), *safe_parts("The model's name", name))))

    def seal_of(self, path: str) -> Path:
        r"""Like `seal`, for `folder/name` from a listing, without its checks.

        A long name is split in two: its first part becomes a folder with a `\` at its end, which no name has.
        """
        *above, last = path.split("/")
        head = _first_part(last) if len(_encoded(last)) > _SEALED_BYTES else ""
        return self.seals.joinpath(*above, *([f"{head}\\"] if head else []), f"{last[len(head) :]}.json")

    def pending(self, inode: int) -> Path:
        """Return the same record while its file is published.

        The file's inode names it, so that two publishers have one each.
        """
        return self.state / "pending" / f"{inode}.json"

    def pending_seal(self, folder: str, name: str) -> Path:
        """Return the same record while its file is uploaded through S3, which has no inodes."""
        seal = self.seal(folder, name)
        return seal.with_name(f"{seal.name}.pending")

    def partial(self, key: str) -> Path:
        """Return the folder of the unfinished copies of one content."""
        return self.partials.joinpath(*safe_parts("The content's key", key))

    def lock(self, key: str) -> Path:
        """Return the lock of one content."""
        return self.locks.joinpath(*safe_parts("The content's key", key))

    def lock_progress(self, key: str) -> Path:
        """Return the file that says who downloads one content, and the progress."""
        lock = self.lock(key)
        return lock.with_name(f"{lock.name}.json")

    def lookup(self, digest: str) -> Path:
        """Return the file with which a worker tells the others its answer for one address."""
        return self.state / "lookups" / f"{digest}.json"

    def lookup_mark(self, digest: str) -> Path:
        """Return the marker of a look-up of the address that is under way."""
        return self.state / "lookups" / f"{digest}.asking"

    def host_cache_repo(self, repo: str, repo_type: str = "model") -> Path:
        """Return a repository's folder in the host cache.

        `refs/<name>` contains a commit, `snapshots/<commit>/<path>` the files.
        """
        parts = safe_parts("The repository", repo)
        return self.host_cache / "--".join((_REPO_KINDS.get(repo_type, "models"), *parts))


def split_title(title: str) -> tuple[str, str]:
    """Return the folder and the name of `folder/name`, a model's place in the layout."""
    folder, _, name = title.partition("/")
    return folder, name


def title_of_seal(path: str) -> str:
    """Return the `folder/name` whose seal lies at this path in the layout: the inverse of `Layout.seal`."""
    return path.replace("\\/", "").removesuffix(".json")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # as the disk has it


def _first_part(name: str) -> str:
    """Return the first part of a long file name. The second part must not begin with a dot, as hidden files do."""
    head = name
    while len(_encoded(head)) > _HEAD_BYTES or name[len(head) :].startswith("."):
        head = head[:-1]
    return head


def safe_parts(what: str, value: str) -> tuple[str, ...]:
    """Return the parts of a relative name in the layout. Raises `UnsafePath` for a name that could leave its folder.

    A backslash is refused as well: people mean a separator, but for the disk it is an ordinary character.
    """
    parts = tuple(value.split("/"))
    if "\\" in value or any(part in {"", ".", ".."} or not is_legible(part) for part in parts):
        leaves = value.startswith("/") or "\\" in value or ".." in parts
        raise UnsafePath(what, value, nameless=not leaves)
    return parts
