"""Custom nodes on the volume: link them into ComfyUI, and install their packages once. Touches the disk and processes.

    VOLUME/custom_nodes/<name>                  the nodes, as people put them there
    VOLUME/.worker/nodes/<layer>/               the packages of their requirements.txt that ComfyUI lacks
    VOLUME/.worker/nodes/<layer>.installing     who installs that, for waiting workers
    VOLUME/.worker/nodes/failed.json            nodes that could not be imported at the last start

All of this happens before ComfyUI starts, because ComfyUI imports its nodes first. So it must cost next to nothing: a look into
a folder, a link for each node, a small read for each requirements.txt. One worker installs the packages, once for each state of
(Python, torch, ComfyUI's packages, the nodes' requirements), whose digest is the layer's name.

A layer only adds. ComfyUI's own packages, above all torch, are pinned during the installation, so nothing in a layer can shadow
them, and pip skips what exists. It is a folder on PYTHONPATH and no venv, because a venv contains its own path and its
interpreter's, which differ in another image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.base.files import write_atomically
from worker.base.text import count
from worker.store.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from worker.engine.process import EngineCommand
    from worker.settings import Settings

log = logging.getLogger(__name__)

INSTALL_TIMEOUT_S = 900.0
_SAY_AFTER_S = 1.0
_SAY_EVERY_S = 10.0
_COMPLETE = "layer.json"
_WHAT = ("-r", "--requirement", "-e", "--editable")  # also with the value joined on
_PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--no-warn-script-location")
_NETWORK = ("Retrying (Retry(", "Temporary failure in name resolution", "ReadTimeoutError", "No space left")
# At these levels ComfyUI prints no warnings, and a failed import of a node is a warning.
_SILENT = ("ERROR", "CRITICAL")
_CANNOT_IMPORT = re.compile(r"Cannot import (.+) module for custom nodes: (.*)")


@dataclass(frozen=True, slots=True)
class NodeFolders:
    """The folders of the volume's nodes, of ComfyUI's nodes and of the layers, and the Python that runs ComfyUI."""

    source: Path
    target: Path
    layers: Path
    python: str

    @classmethod
    def below(cls, volume: Path, base_dir: Path, python: str) -> NodeFolders:
        """Return the folders of a volume and of ComfyUI's base directory."""
        return cls(volume / "custom_nodes", base_dir / "custom_nodes", volume / ".worker" / "nodes", python)


def with_custom_nodes(settings: Settings, command: EngineCommand) -> EngineCommand:
    """Link the volume's custom nodes and install their packages, before ComfyUI imports them. A node never raises."""

    def once(key: str, done: Callable[[], bool]) -> AbstractContextManager[object]:
        from worker.store.locks import Locks, LockTiming  # noqa: PLC0415 - 60 ms, only for the worker that installs packages

        worker = settings.runpod_pod_id or socket.gethostname()
        locks = Locks(Layout(settings.volume_path), worker, LockTiming(patience_s=INSTALL_TIMEOUT_S))
        return locks.hold(key, published=done, cancel=threading.Event(), name="the custom nodes' packages")

    folders = NodeFolders.below(settings.volume_path, settings.base_dir, settings.comfyui_python)
    return replace(command, environ=node_environment(folders, once, command.environ))


def node_environment(
    folders: NodeFolders, once: Callable[[str, Callable[[], bool]], AbstractContextManager[object]], environ: Mapping[str, str]
) -> dict[str, str]:
    """Link the volume's custom nodes and install their packages. Return the environment for ComfyUI.

    `once(key, done)` is a lock across workers: its body runs when the lock is held, or when `done()` is true, or when waiting
    makes no sense any more. A node's failure never raises: it is logged, and ComfyUI starts.
    """
    try:
        names = link_custom_nodes(folders)
        wanted = requirements(folders, names)
        site = _packages_folder(folders, wanted, once, environ) if wanted else None
    except OSError as exc:
        log.warning("custom nodes of the volume are left out: %s cannot be used (%s)", exc.filename, exc.strerror)
        return dict(environ)
    if site is None:
        return dict(environ)
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(site), environ.get("PYTHONPATH"))))}


def link_custom_nodes(folders: NodeFolders) -> tuple[str, ...]:
    """Make ComfyUI see the volume's nodes. Return the names that it sees. A node of the image takes precedence.

    Links of nodes that left the volume are removed. Nothing else is ever touched.
    """
    folders.target.mkdir(parents=True, exist_ok=True)
    _unlink_gone(folders)
    names = []
    for name in _node_names(folders.source):
        place, source = folders.target / name, folders.source / name
        if place.is_symlink() and place.readlink() == source:
            names.append(name)
        elif os.path.lexists(place):
            log.warning("custom node '%s' of the volume is left out: the image has one of that name", name)
        else:
            place.symlink_to(source)
            names.append(name)
    log.info("custom nodes of the volume: %s", ", ".join(names) or "none")
    return tuple(names)


def _node_names(folder: Path) -> list[str]:
    """Return the names of custom nodes that ComfyUI would load from there (nodes.py, init_external_custom_nodes)."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith((".", "__"))
            and not entry.name.endswith(".disabled")
            and (entry.name.endswith(".py") or entry.is_dir())
        )


def _unlink_gone(folders: NodeFolders) -> None:
    for place in folders.target.iterdir():
        if place.is_symlink() and place.readlink().parent == folders.source and not place.exists():
            place.unlink()


def requirements(folders: NodeFolders, names: Sequence[str]) -> dict[str, str]:
    """Map custom nodes' names to their requirements.txt, for nodes whose file is not empty."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            text = (folders.source / name / "requirements.txt").read_text("utf-8", "replace")
            if any(line.strip() and not line.strip().startswith("#") for line in text.splitlines()):
                found[name] = text
    return found


# --- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnginePackages:
    """The packages that custom nodes find in ComfyUI's own environment, read from its metadata folders without a process."""

    python: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, python: str) -> EnginePackages:
        """Return the packages of the venv of this interpreter, and of what its .pth files add."""
        lib = Path(shutil.which(python) or python).parent.parent / "lib"
        own = sorted(lib.glob("python3*/site-packages"))
        linked = [Path(line) for site in own for pth in site.glob("*.pth") for line in pth.read_text().splitlines()]
        # The nearer one counts, as it does for an import.
        versions: dict[str, str] = {}
        for site in [*own, *(folder for folder in linked if folder.is_absolute() and folder.is_dir())]:
            for name, version in _installed(site).items():
                versions.setdefault(name, version)
        return cls(own[0].parent.name if own else "python", versions)

    def layer_name(self, wanted: Mapping[str, str]) -> str:
        """Return the layer's name: Python's and torch's version, and a digest that changes with everything."""
        digest = hashlib.sha256(json.dumps([dict(self.versions), dict(wanted)], sort_keys=True).encode()).hexdigest()
        return f"{self.python}-torch{self.versions.get('torch', '-none')}-{digest[:12]}"


def _installed(site: Path) -> dict[str, str]:
    names = (path.name.removesuffix(".dist-info").split("-") for path in site.glob("*.dist-info"))
    return {parts[0].lower().replace("_", "-"): parts[1] for parts in names if len(parts) == 2}  # noqa: PLR2004 - name, version


def _packages_folder(
    folders: NodeFolders,
    wanted: Mapping[str, str],
    once: Callable[[str, Callable[[], bool]], AbstractContextManager[object]],
    environ: Mapping[str, str],
) -> Path:
    """Return the folder of packages for these custom nodes. Install it if no worker has done so."""
    engine = EnginePackages.of(folders.python)
    layer = folders.layers / engine.layer_name(wanted)

    if _failures_in_layer(layer) is None:
        with once(f"nodes-{layer.name}", _InstallWait(layer).over):
            if _failures_in_layer(layer) is None:
                with _announce_install(layer, environ):
                    return _install_packages(folders, wanted, engine, layer, environ)
    for name, reasons in (_failures_in_layer(layer) or {}).items():
        _say_failed(name, reasons)
    return layer / "packages"


class _InstallWait:
    """The wait for another worker's installation of custom nodes' packages, logged."""

    def __init__(self, layer: Path) -> None:
        self._layer = layer
        self._next_s = time.monotonic() + _SAY_AFTER_S

    def over(self) -> bool:
        """Return whether the layer is complete; called repeatedly. Every ten seconds it logs who installs."""
        if _failures_in_layer(self._layer) is not None:
            return True
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _SAY_EVERY_S
            log.info("waiting for the custom nodes' packages, which %s", _who_installs(self._layer))
        return False


@contextlib.contextmanager
def _announce_install(layer: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Record who installs the custom nodes' packages, for waiting workers. It never raises."""
    note = layer.with_name(f"{layer.name}.installing")
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"by": environ.get("RUNPOD_POD_ID") or socket.gethostname(), "since": time.time()}))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def _who_installs(layer: Path) -> str:
    """Return who installs the packages, as the rest of a sentence, with a time of day: hosts' clocks differ a little."""
    try:
        note = json.loads(layer.with_name(f"{layer.name}.installing").read_text("utf-8"))
        return f"worker {note['by']} installs since {time.strftime('%H:%M:%S', time.localtime(note['since']))}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another worker installs"


def _failures_in_layer(layer: Path) -> dict[str, list[str]] | None:
    """Return which custom nodes a layer of packages lacks, with sentences. None without a complete layer."""
    try:
        record = json.loads((layer / _COMPLETE).read_text("utf-8"))["failed"]
        return {str(name): [str(reason) for reason in reasons] for name, reasons in record.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _install_packages(
    folders: NodeFolders, wanted: Mapping[str, str], engine: EnginePackages, layer: Path, environ: Mapping[str, str]
) -> Path:
    """Install nodes' packages in this container, where small files are fast, then publish the layer by one rename."""
    began_s = time.monotonic()
    log.info("installing the packages of %s for all workers: %s", count(wanted, "custom node"), ", ".join(wanted))
    home = Path(tempfile.mkdtemp(prefix="nodes-"))
    installer = _PipInstaller(folders, engine, home, environ)
    failed = installer.install(wanted)
    for name, reasons in failed.items():
        _say_failed(name, reasons)
    log.info(
        "installed in %.1f s: %s", time.monotonic() - began_s, ", ".join(_installed(installer.site)) or "nothing was missing"
    )
    if installer.interrupted:
        log.warning("some packages could not be downloaded; the next worker tries again")
        return installer.site
    try:
        return _publish(installer.site, layer, failed)
    except OSError as exc:
        log.warning("the packages stay in this container: %s cannot be written (%s)", folders.layers, exc.strerror)
        return installer.site


def _publish(site: Path, layer: Path, failed: Mapping[str, Sequence[str]]) -> Path:
    partial = layer.with_name(f"{layer.name}.{os.urandom(4).hex()}.partial")
    try:
        shutil.copytree(site, partial / "packages")
        (partial / _COMPLETE).write_text(json.dumps({"v": 1, "failed": dict(failed)}))
        if layer.exists() and _failures_in_layer(layer) is None:
            layer.rename(layer.with_name(f"{partial.name}.broken"))
        partial.rename(layer)
    except OSError:
        # Another worker that was first without the lock has the same content.
        if _failures_in_layer(layer) is None:
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(site.parent, ignore_errors=True)
    return layer / "packages"


class _PipInstaller:
    """pip for custom nodes, with ComfyUI's packages as constraints: all nodes together, then as many as possible."""

    def __init__(self, folders: NodeFolders, engine: EnginePackages, home: Path, environ: Mapping[str, str]) -> None:
        self.site = home / "packages"
        self.site.mkdir()
        self.interrupted = False
        self._folders = folders
        self._prefix = home / "prefix"
        self._engine = engine
        self._until_s = time.monotonic() + INSTALL_TIMEOUT_S
        self._environ = environ

    def install(self, wanted: Mapping[str, str]) -> dict[str, list[str]]:
        """Install. Return what failed, node name to sentences."""
        files = [self._folders.source / name / "requirements.txt" for name in wanted]
        if self._pip(*(option for file in files for option in ("-r", str(file)))) is None:
            return {}
        failed: dict[str, list[str]] = {}
        for name, text in wanted.items():
            if reasons := self._as_much_as_can_be_had(self._folders.source / name, text):
                failed[name] = reasons
        return failed

    def _as_much_as_can_be_had(self, node: Path, text: str) -> list[str]:
        """Install one node's requirements together, then line by line. Return a sentence for each failure."""
        if self._pip("-r", "requirements.txt", cwd=node) is None:
            return []
        lines = [words for line in text.splitlines() if (words := _requirement_words(line))]
        # An index, a folder of wheels or a constraints file applies to all lines.
        options = [word for words in lines if _is_option(words) for word in words]
        single = [words for words in lines if not _is_option(words)]
        problems = [(" ".join(words), self._one(words, options, node)) for words in single]
        return [f"{line}: {reason}" for line, reason in problems if reason is not None]

    def _one(self, words: Sequence[str], options: Sequence[str], node: Path) -> str | None:
        """Install one line; otherwise like `_pip`."""
        if words[0].startswith("-"):
            return self._pip(*options, *words, cwd=node)
        # In its own file a line may contain what pip accepts only in files, such as --hash.
        line = self._prefix.with_name("line.txt")
        line.write_text(" ".join(words))
        return self._pip(*options, "-r", str(line), cwd=node)

    def _pip(self, *arguments: str, cwd: Path | None = None) -> str | None:
        """Install, with paths relative to `cwd`. Return None on success, otherwise pip's reason."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            self.interrupted = True
            return "there was no time left"
        constraints = self._prefix.with_name("constraints.txt")
        pinned = {**_installed(self.site), **self._engine.versions}
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(pinned.items())))
        command = [self._folders.python, "-m", "pip", "install", *_PIP_OPTIONS]
        command += ["--prefix", str(self._prefix), "--constraint", str(constraints), *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - the operator's own nodes
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=left_s,
                check=False,
                cwd=cwd,
                env={**self._environ, "PYTHONPATH": str(self.site)},
            )
        except (subprocess.TimeoutExpired, OSError) as exc:
            self.interrupted = True
            return str(exc)
        self._gather()
        if done.returncode == 0:
            return None
        self.interrupted = self.interrupted or any(sign in done.stdout for sign in _NETWORK)
        errors = [line.partition("ERROR: ")[2] for line in done.stdout.splitlines() if "ERROR: " in line]
        return errors[0] if errors else f"pip ended with status {done.returncode}"

    def _gather(self) -> None:
        """Move what pip installed below its prefix into the one folder."""
        for packages in self._prefix.glob("lib*/python3*/site-packages"):
            shutil.copytree(packages, self.site, dirs_exist_ok=True)
        shutil.rmtree(self._prefix, ignore_errors=True)


def _requirement_words(line: str) -> list[str]:
    """Split a line of a custom node's requirements file, with options as pip's arguments. Empty for a comment."""
    text = re.sub(r"(^|\s)#.*", "", line).strip()
    return text.split() if text.startswith("-") else [text] if text else []


def _is_option(words: Sequence[str]) -> bool:
    """Return whether a line of a node's requirements says how to install, not what."""
    return words[0].startswith("-") and not words[0].startswith(_WHAT)


def _say_failed(name: str, reasons: Sequence[str]) -> None:
    log.warning(
        "custom node '%s' requires packages that conflict with ComfyUI's (%s): build an image with it by "
        "comfy-node-install, or change its requirements.txt",
        name,
        "; ".join(reasons),
    )


# --- nodes that fail to import -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailedNode:
    """A custom node that ComfyUI could not import, and Python's message."""

    name: str
    reason: str


def failed_import(line: str) -> FailedNode | None:
    """Return the custom node whose failed import a line of ComfyUI's output reports."""
    found = _CANNOT_IMPORT.search(line)
    return FailedNode(Path(found[1]).name, found[2]) if found else None


def report_failed_nodes(settings: Settings, lines: Sequence[str]) -> None:
    """Write down the nodes of the volume that ComfyUI could not import, for `doctor`."""
    if settings.comfy_log_level not in _SILENT:
        record_failed_nodes(NodeFolders.below(settings.volume_path, settings.base_dir, settings.comfyui_python), lines)


def record_failed_nodes(folders: NodeFolders, lines: Sequence[str]) -> None:
    """Say in the log which nodes failed by these lines of ComfyUI's output, and on the volume for `doctor`; the others run.

    The volume is written to only where it has a folder of nodes.
    """
    failures = [failure for line in lines if (failure := failed_import(line))]
    for failure in failures:
        log.warning(
            "custom node '%s' could not be imported (%s); its nodes are unknown to this worker", failure.name, failure.reason
        )
    if not folders.source.is_dir():
        return
    path = folders.layers / "failed.json"
    record = json.dumps({"v": 1, "failed": {failure.name: failure.reason for failure in failures}})
    with contextlib.suppress(OSError):
        if not failures and not path.exists():
            return
        if path.exists() and path.read_text() == record:
            return
        write_atomically(path, record.encode(), durable=False)


def read_failed_nodes(volume: Path) -> list[FailedNode]:
    """Return the volume's nodes that failed to import at the last start, without those that are gone."""
    try:
        record = json.loads((volume / ".worker" / "nodes" / "failed.json").read_text())["failed"]
        failures = [FailedNode(str(name), str(reason)) for name, reason in record.items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return [failure for failure in failures if (volume / "custom_nodes" / failure.name).exists()]
