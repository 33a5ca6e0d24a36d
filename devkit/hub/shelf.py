"""Which repos and files there are, by revision. Reads disk; writes only a temporary folder of its own."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_WEIGHTS: Final = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of a repo: where its bytes are and what the hub says about them. `oid` is git's."""

    source: Path
    mtime_ns: int
    size: int
    sha256: str
    oid: str
    lfs: bool

    def is_current(self) -> bool:
        """Return whether the bytes are still the hashed ones."""
        try:
            stat = self.source.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repo: every path in it."""

    repo: str
    commit: str
    files: Mapping[str, Blob]


def git_oid(content: bytes) -> str:
    """Return git's id of a blob with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """Return the text that git stores in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


class Shelf:
    """The repos under a folder, read as they are at each request. Hashes a file once for each size and mtime.

    NotADirectoryError when there is no such folder.
    """

    def __init__(self, root: Path, lfs_above_bytes: int) -> None:
        if not root.is_dir():
            raise NotADirectoryError(root)
        self.root = root
        self._lfs_above_bytes = lfs_above_bytes
        self._lock = threading.RLock()
        self._blobs: dict[tuple[str, int, int], Blob] = {}
        self._commits: dict[tuple[str, str], Snapshot] = {}
        self._refs: dict[tuple[str, str], Snapshot] = {}
        self._written = tempfile.TemporaryDirectory(prefix="hub-")

    def close(self) -> None:
        """Remove what `commit` wrote."""
        self._written.cleanup()

    def repos(self) -> list[str]:
        """Return every `org/repo` that has a folder."""
        found = {f"{d.parent.name}/{d.name.partition('@')[0]}" for d in self.root.glob("[!.]*/[!.]*/") if d.is_dir()}
        return sorted(found)

    def exists(self, repo: str) -> bool:
        """Return whether any revision of the repo exists."""
        return repo in self.repos() or any(repo == known for known, _ in self._refs)

    def snapshot(self, repo: str, revision: str) -> Snapshot | None:
        """Return the commit of a branch, tag or commit id. Ids seen once stay valid for files that did not change."""
        with self._lock:
            if found := self._refs.get((repo, revision)) or self._scan(repo, revision):
                return found
            if (repo, revision) not in self._commits:
                for name in self._revisions(repo):
                    self._scan(repo, name)
            return self._commits.get((repo, revision))

    def commit(self, repo: str, files: Mapping[str, bytes | Path], revision: str) -> str:
        """Make `revision` a commit with these files over those it (else main) had, and return its id.

        From then on the revision no longer follows its folder.
        """
        with self._lock:
            before = self.snapshot(repo, revision) or self.snapshot(repo, "main")
            content = dict(before.files) if before else {}
            content |= {path: self._keep(data) for path, data in files.items()}
            made = self._remember(repo, content)
            self._refs[repo, revision] = made
            return made.commit

    def plain(self, path: str) -> Path | None:
        """Return a file under the root, or None."""
        found = (self.root / path).resolve()
        return found if found.is_file() and found.is_relative_to(self.root.resolve()) else None

    def blob(self, source: Path) -> Blob:
        """Return the hub's description of a file, hashed on the first call."""
        with self._lock:
            stat = source.stat()
            key = (str(source), stat.st_size, stat.st_mtime_ns)
            if key not in self._blobs:
                self._blobs[key] = self._describe(source, stat)
            return self._blobs[key]

    def _describe(self, source: Path, stat: os.stat_result) -> Blob:
        with source.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        lfs = stat.st_size > self._lfs_above_bytes or source.suffix in _WEIGHTS
        oid = git_oid(lfs_pointer(sha256, stat.st_size) if lfs else source.read_bytes())
        return Blob(source, stat.st_mtime_ns, stat.st_size, sha256, oid, lfs)

    def _keep(self, data: bytes | Path) -> Blob:
        if isinstance(data, Path):
            return self.blob(data)
        kept = Path(self._written.name, hashlib.sha256(data).hexdigest())
        kept.write_bytes(data)
        return self.blob(kept)

    def _revisions(self, repo: str) -> list[str]:
        org, _, name = repo.partition("/")
        return ["main", *(d.name.partition("@")[2] for d in (self.root / org).glob(f"{name}@*/"))]

    def _scan(self, repo: str, revision: str) -> Snapshot | None:
        folder = self.root / (repo if revision == "main" else f"{repo}@{revision.replace('/', '%2F')}")
        if not folder.is_dir() or not folder.resolve().is_relative_to(self.root.resolve()):
            return None
        found = (Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names)
        return self._remember(repo, {p.relative_to(folder).as_posix(): self.blob(p) for p in found})

    def _remember(self, repo: str, files: Mapping[str, Blob]) -> Snapshot:
        # A blob written by `commit` has no suffix of its own: whether it is a weight follows from the name it was given.
        named = {path: self._named(path, blob) for path, blob in sorted(files.items())}
        text = "".join([f"{repo}\n", *(f"{blob.oid} {path}\n" for path, blob in named.items())])
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        known = self._commits.get((repo, commit))
        if known is None or not all(blob.is_current() for blob in known.files.values()):
            known = self._commits[repo, commit] = Snapshot(repo, commit, named)
        return known

    def _named(self, path: str, blob: Blob) -> Blob:
        if blob.lfs or not path.endswith(_WEIGHTS):
            return blob
        return replace(blob, lfs=True, oid=git_oid(lfs_pointer(blob.sha256, blob.size)))
