"""What everything in the cache shares: its place, one builder at a time, reported steps, checksum lists.

Touches disk and processes. Standard library only: it runs with the system's python3, before there is any venv.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

HERE = Path(__file__).parent
LOCK_POLL_S = 0.2
LAST_LINES = 15


class BuildFailed(Exception):  # noqa: N818 - as in worker/errors.py: an error's name says what happened
    """A part of the cache could not be built; the text says which step, why, and where the whole log is."""


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that holds every build: `DEVKIT_CACHE`, or one of our own where the user keeps caches."""
    if chosen := environ.get("DEVKIT_CACHE"):
        return Path(chosen).absolute()
    user_caches = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_caches).absolute() / "comfyui-volume-worker"


def digest_of(names: Iterable[str], files: Iterable[Path]) -> str:
    """Return 12 hex digits that change with any of the names, and with any name or content of these files of this folder."""
    digest = hashlib.sha256("\n".join(names).encode())
    for path in files:
        digest.update(f"\n{path.relative_to(HERE)} {sha256_of(path)}".encode())
    return digest.hexdigest()[:12]


@contextmanager
def exclusive(path: Path, timeout_s: float, log: IO[str]) -> Iterator[int]:
    """Hold the lock file at `path`; yields its descriptor, for the children to inherit.

    A child that has the descriptor keeps the lock after its parent was killed. That is wanted: a pip that outlives its
    builder still writes into the folder, and the next builder must not clear the folder under it.

    Raises:
        BuildFailed: somebody else still holds the lock after `timeout_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, path, timeout_s, log)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, timeout_s: float, log: IO[str]) -> None:
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BuildFailed(
                    f"{path} is still locked after {timeout_s:.0f} s; is process {path.read_text()}, or a child of it, stuck?"
                ) from None
            if not told:
                print(f"waiting for the same build, begun by process {path.read_text()}", file=log, flush=True)
                told = True
            time.sleep(LOCK_POLL_S)
        else:
            return


@contextmanager
def step(text: str, log: IO[str]) -> Iterator[None]:
    """Report a step when it begins and, on the same line, how long it took."""
    print(f"{text} ... ", end="", file=log, flush=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", file=log, flush=True)
        raise
    print(f"{time.monotonic() - began:.1f} s", file=log, flush=True)


def run(
    command: Sequence[str | Path],
    *,
    output: Path,
    timeout_s: float,
    lock: int,
    cwd: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Run a command to its end and return what it said, which is also added to the file `output`.

    The user's PYTHON* variables are kept from it: they lead to other modules, or to no bytecode.

    Raises:
        BuildFailed: the command failed or took longer than `timeout_s`; the text has its last lines.
    """
    with output.open("a+") as said:
        began_at = said.seek(0, os.SEEK_END)
        try:
            subprocess.run(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={name: value for name, value in environ.items() if not name.startswith("PYTHON")},
                pass_fds=(lock,),
                timeout=timeout_s,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
            said.seek(began_at)
            last = "\n".join(f"    {line}" for line in said.read().splitlines()[-LAST_LINES:])
            raise BuildFailed(f"{exc}\n{last}\nThe whole log: {output}") from exc
        said.seek(began_at)
        return said.read()


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_below(folder: Path) -> dict[str, str]:
    """Return relative name -> sha256 of every file below `folder`, bytecode aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}


def write_sums(path: Path, sums: Mapping[str, str]) -> None:
    """Write a list as `sha256sum` does; it appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    partial.replace(path)


def read_sums(path: Path) -> dict[str, str]:
    """Read a list that `sha256sum` or `write_sums` wrote."""
    pairs = (line.split("  ", 1) for line in path.read_text().splitlines())
    return {name: digest for digest, name in pairs}


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return one line for each name that is missing, changed or not expected; empty when both are the same."""
    kinds = {
        "missing": expected.keys() - found.keys(),
        "changed": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
        "not expected": found.keys() - expected.keys(),
    }
    return [f"{kind}: {name}" for kind, names in kinds.items() for name in sorted(names)]


def print_error(error: Exception) -> None:
    """Tell a person why there is no build."""
    print(f"\n{error}", file=sys.stderr)
