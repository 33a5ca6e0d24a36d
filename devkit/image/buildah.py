"""buildah in a storage of its own: build, look at layers, run containers and stop them. Touches disk and processes.

Root without a container engine: chroot isolation, the host's network, and no process namespace of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_STOP_S = 30.0
_POLL_S = 0.05
_SHOWN_LINES = 40


class BuildahFailed(RuntimeError):  # noqa: N818 - an error's name says what happened
    """A command of buildah's failed; the text has its last lines."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image, unpacked, with the instruction that made it."""

    digest: str
    size_bytes: int
    made_by: str


class Buildah:
    """One storage of images and containers. Use `of` to find what the machine's kernel allows."""

    def __init__(self, root: Path, driver: str) -> None:
        self.root = root
        self._driver = driver

    @classmethod
    def of(cls, root: Path) -> Buildah:
        """Return a storage at `root`, with overlay mounts if the kernel has them here, otherwise with slow copies."""
        root.mkdir(parents=True, exist_ok=True)
        for driver in ("overlay", "vfs"):
            buildah = cls(root / driver, driver)
            with contextlib.suppress(BuildahFailed):
                name = buildah("from", "scratch")
                buildah("mount", name)
                buildah("rm", name)
                return buildah
        raise BuildahFailed("buildah can neither use overlay nor plain copies here; it needs root")

    def __call__(self, *arguments: str | Path, timeout_s: float = 60.0) -> str:
        """Run a command; returns what it printed. Raises `BuildahFailed`."""
        done = subprocess.run(
            self.command(*arguments), env=_environ(), text=True, capture_output=True, check=False, timeout=timeout_s
        )
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).splitlines()[-_SHOWN_LINES:])
            raise BuildahFailed(f"buildah {arguments[0]} failed:\n{last}")
        return done.stdout.strip()

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the command line of one of buildah's commands on this storage."""
        storage = ("--root", str(self.root / "storage"), "--runroot", str(self.root / "run"), "--storage-driver", self._driver)
        return ["buildah", *storage, *map(str, arguments)]

    def build(
        self,
        context: Path,
        tag: str,
        *,
        target: str | None = None,
        args: Mapping[str, str] | None = None,
        contexts: Mapping[str, Path] | None = None,
        volumes: Sequence[tuple[Path, str]] = (),
        timeout_s: float = 1200.0,
    ) -> str:
        """Build a Dockerfile, layers cached; returns the log. Volumes are read-only, and in no layer."""
        # The stages do not wait for each other: while one fetches packages another compiles.
        options = ["--layers", "--jobs", str(os.cpu_count() or 1), "--tag", tag]
        options += ["--target", target] if target else []
        options += [option for name, value in (args or {}).items() for option in ("--build-arg", f"{name}={value}")]
        options += [option for name, path in (contexts or {}).items() for option in ("--build-context", f"{name}={path}")]
        options += [option for path, inside in volumes for option in ("--volume", f"{path}:{inside}:ro")]
        return self("build", *options, context, timeout_s=timeout_s)

    def inspect(self, image: str) -> Any:  # noqa: ANN401 - JSON
        """Return the image's metadata: `OCIv1.config` and the rest."""
        return json.loads(self("inspect", "--type", "image", image))

    def layers(self, image: str) -> list[Layer]:
        """Return the image's layers, from the base up."""
        about = self.inspect(image)["OCIv1"]
        commands = [item.get("created_by", "") for item in about["history"] if not item.get("empty_layer")]
        known = json.loads((self.root / "storage" / f"{self._driver}-layers" / "layers.json").read_text())
        sizes = {layer["diff-digest"]: layer["diff-size"] for layer in known if "diff-digest" in layer}
        digests = about["rootfs"]["diff_ids"]
        return [Layer(digest, sizes[digest], made_by) for digest, made_by in zip(digests, commands, strict=True)]

    def close(self) -> None:
        """Take the storage's own mount away, which buildah leaves; images stay for the next build."""
        if self._driver == "overlay":
            subprocess.run(["umount", self.root / "storage" / "overlay"], check=False, stderr=subprocess.DEVNULL)

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[str]:
        """Run a container of the image, and remove it afterwards."""
        name = self("from", "--pull-never", image)
        try:
            yield name
        finally:
            self("rm", name)


class Running:
    """A command in a container, with its output in a file; a context manager that ends it with SIGTERM to its first process."""

    def __init__(
        self,
        buildah: Buildah,
        container: str,
        command: Sequence[str],
        log_path: Path,
        *,
        environ: Mapping[str, str] | None = None,
        volumes: Sequence[tuple[Path, str]] = (),
    ) -> None:
        options = [option for name, value in (environ or {}).items() for option in ("--env", f"{name}={value}")]
        options += [option for path, inside in volumes for option in ("--volume", f"{path}:{inside}")]
        self._command = buildah.command("run", *options, container, "--", *command)
        self.log_path = log_path
        self.exit_status: int | None = None

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as output:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environ()
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def log(self) -> str:
        """Return its output so far."""
        return self.log_path.read_text("utf-8", "replace")

    def processes(self) -> dict[int, str]:
        """Process id to name of everything that runs in it, the container's first process first; buildah's own are left out."""
        found = dict(_descendants(self.process.pid))
        return {pid: name for pid, name in found.items() if not name.startswith(("buildah", "memfd:buildah", "3"))}

    def stop(self) -> int:
        """Send SIGTERM to the first process, then SIGKILL to all that is left. Return the status."""
        inside = self.processes()
        if inside and self.process.poll() is None:
            os.kill(next(iter(inside)), signal.SIGTERM)
        try:
            self.exit_status = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            for pid in [*self.processes(), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.exit_status = self.process.wait(_STOP_S)
        return self.exit_status


def gone(pids: Sequence[int], timeout_s: float = 10.0) -> bool:
    """Return whether all of these processes end within a while."""
    deadline = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _descendants(parent: int) -> Iterator[tuple[int, str]]:
    """Process id and name, depth first. A process that ends meanwhile is left out."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    yield int(child), Path(f"/proc/{child}/comm").read_text().strip()
                yield from _descendants(int(child))


def _environ() -> dict[str, str]:
    return {**os.environ, "BUILDAH_ISOLATION": "chroot"}
