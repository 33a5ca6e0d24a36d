"""Where everything lies on the volume: path arithmetic, the code twin of volume_layout.md. Pure.

The same class serves the store on the container's own disk: it takes the root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.base.text import is_legible
from worker.errors import UnsafePath

if TYPE_CHECKING:
    from pathlib import Path

_SEALED_BYTES = 228  # the longest name whose seal, with all that is put around it while it is written, fits in 255 bytes
_HEAD_BYTES = 128
_REPO_KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path below one root. Each method refuses a name that would leave its folder with `UnsafePath`.

    `moved` is where `models` ("") and folders in it really are, where links lead there that only `mounts` can follow.
    """

    root: Path
    moved: tuple[tuple[str, Path], ...] = ()

    @property
    def models(self) -> Path:
        """The weights, by folder, as ComfyUI names its folders."""
        return dict(self.moved).get("") or self.root / "models"

    @property
    def manifest(self) -> Path:
        """The operator's list of models, optional."""
        return self.root / "models.toml"

    @property
    def workflows(self) -> Path:
        """The operator's workflows, which requests ask for by name."""
        return self.root / "workflows"

    def workflow(self, name: str) -> Path:
        """The file of a workflow. Its `.json` may be written, and folders as Windows spells them."""
        *above, last = safe_parts("The workflow's name", name.replace("\\", "/"))
        return self.workflows.joinpath(*above, f"{last.removesuffix('.json')}.json")

    @property
    def state(self) -> Path:
        """What the worker keeps for itself; deleting it while no worker runs costs hashing and resuming, never a model."""
        return self.root / ".worker"

    @property
    def partials(self) -> Path:
        """Downloads under way, one folder for each content."""
        return self.state / "partial"

    @property
    def seals(self) -> Path:
        """The records that say which files are whole."""
        return self.state / "seals"

    @property
    def locks(self) -> Path:
        """Lock state; nothing in here is ever unlinked by hand."""
        return self.state / "locks"

    def used(self, endpoint: str) -> Path:
        """The record of which models the endpoint's jobs used last."""
        return self.state.joinpath("used", *safe_parts("The endpoint's id", f"{endpoint}.json"))

    @property
    def host_cache(self) -> Path:
        """RunPod's read-only cache of Hugging Face files on the machine, where an endpoint has it."""
        return self.root / "huggingface-cache" / "hub"

    def model(self, folder: str, name: str) -> Path:
        """The final path of a model."""
        return self._placed(*safe_parts("The folder", folder), *safe_parts("The model's name", name))

    def listed(self, path: str) -> Path:
        """As `model`, of `folder/name` as a listing has it, without its checks."""
        return self._placed(*path.split("/"))

    def _placed(self, top: str, *below: str) -> Path:
        return (dict(self.moved).get(top) or self.models / top).joinpath(*below)

    def seal(self, folder: str, name: str) -> Path:
        """The record that the model's file is whole."""
        return self.seal_of("/".join((*safe_parts("The folder", folder), *safe_parts("The model's name", name))))

    def seal_of(self, path: str) -> Path:
        r"""As `seal`, of `folder/name` as a listing has it, without its checks.

        A long name is cut in two: its first part is a folder, with a `\` at its end that no name has.
        """
        *above, last = path.split("/")
        head = _head(last) if len(_encoded(last)) > _SEALED_BYTES else ""
        return self.seals.joinpath(*above, *([f"{head}\\"] if head else []), f"{last[len(head) :]}.json")

    def pending(self, inode: int) -> Path:
        """The same record while its file is being published: by the file's inode, so that two publishers have one each."""
        return self.state / "pending" / f"{inode}.json"

    def pending_seal(self, folder: str, name: str) -> Path:
        """The same record while its file is being uploaded through S3, which tells no inode."""
        seal = self.seal(folder, name)
        return seal.with_name(f"{seal.name}.pending")

    def partial(self, key: str) -> Path:
        """The folder that holds the unfinished copies of one content."""
        return self.partials.joinpath(*safe_parts("The content's key", key))

    def lock(self, key: str) -> Path:
        """What the lock of one content is called."""
        return self.locks.joinpath(*safe_parts("The content's key", key))

    def lock_progress(self, key: str) -> Path:
        """Who downloads one content, and how far they are."""
        lock = self.lock(key)
        return lock.with_name(f"{lock.name}.json")

    def lookup(self, digest: str) -> Path:
        """What a worker tells the others of its look-up of one address."""
        return self.state / "lookups" / f"{digest}.json"

    def lookup_mark(self, digest: str) -> Path:
        """The sign that a worker looks the address up just now."""
        return self.state / "lookups" / f"{digest}.asking"

    def host_cache_repo(self, repo: str, repo_type: str = "model") -> Path:
        """A repository's folder in the host cache: `refs/<name>` holds a commit, `snapshots/<commit>/<path>` the files."""
        parts = safe_parts("The repository", repo)
        return self.host_cache / "--".join((_REPO_KINDS.get(repo_type, "models"), *parts))


def sealed_by(path: str) -> str:
    """The `folder/name` that a seal at this path below the seals' folder is about: the way back from `Layout.seal`."""
    return path.replace("\\/", "").removesuffix(".json")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # as the disk has it


def _head(name: str) -> str:
    """The first part of a long name. The second does not begin with a dot, as hidden files do."""
    head = name
    while len(_encoded(head)) > _HEAD_BYTES or name[len(head) :].startswith("."):
        head = head[:-1]
    return head


def safe_parts(what: str, value: str) -> tuple[str, ...]:
    """The segments of a relative name with `/` between them; raises `UnsafePath` for anything that could leave its folder.

    A backslash is refused as well: it is a separator to the people who write it and an ordinary character to the disk.
    """
    parts = tuple(value.split("/"))
    if "\\" in value or any(part in {"", ".", ".."} or not is_legible(part) for part in parts):
        leaves = value.startswith("/") or "\\" in value or ".." in parts
        raise UnsafePath(what, value, nameless=not leaves)
    return parts
