"""Custom nodes that live on the volume: linked into ComfyUI, their packages installed once. Touches the disk and processes.

    VOLUME/custom_nodes/<name>                  the nodes, as somebody put them there
    VOLUME/.worker/nodes/<layer>/               what their requirements.txt ask for, beside what ComfyUI has
    VOLUME/.worker/nodes/<layer>.installing     who installs that, for those who wait for it
    VOLUME/.worker/nodes/failed.json            nodes that could not be imported at the last start that saw them

Everything here happens before ComfyUI is spawned, because it imports its nodes first thing. So it must cost next to nothing: a
look into a folder, a link for each node, a small read for each requirements.txt; packages are installed by one worker of the
fleet, once for each state of (Python, torch, ComfyUI's packages, the nodes' requirements), whose digest is the layer's name.

A layer only adds. What ComfyUI's environment has is pinned while it is installed, torch above all, so nothing in a layer can
stand before something of ComfyUI's, and pip leaves out what is there. It is a folder on PYTHONPATH and no venv,
because a venv holds its own path and its interpreter's, and another image has another one.
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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from worker.settings import Settings

log = logging.getLogger(__name__)

INSTALL_TIMEOUT_S = 900.0
_SAY_AFTER_S = 1.0
_SAY_EVERY_S = 10.0
_COMPLETE = "layer.json"
_WHAT = ("-r", "--requirement", "-e", "--editable")  # also with the value joined on
_PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--no-warn-script-location")
_NETWORK = ("Retrying (Retry(", "Temporary failure in name resolution", "ReadTimeoutError", "No space left")
# At these levels ComfyUI prints no warnings, and a node that cannot be imported is one.
_SILENT = ("ERROR", "CRITICAL")
_CANNOT_IMPORT = re.compile(r"Cannot import (.+) module for custom nodes: (.*)")


@dataclass(frozen=True, slots=True)
class NodeFolders:
    """Where the volume's nodes are, where ComfyUI looks for nodes, where layers are kept, and which Python runs ComfyUI."""

    source: Path
    target: Path
    layers: Path
    python: str

    @classmethod
    def below(cls, volume: Path, base_dir: Path, python: str) -> NodeFolders:
        """The folders of a volume and of ComfyUI's base directory."""
        return cls(volume / "custom_nodes", base_dir / "custom_nodes", volume / ".worker" / "nodes", python)


def node_packages(
    folders: NodeFolders, once: Callable[[str, Callable[[], bool]], AbstractContextManager[object]], environ: Mapping[str, str]
) -> dict[str, str]:
    """Link the volume's nodes and have their packages there; returns the environment ComfyUI is to be spawned with.

    `once(key, done)` is a lock in the fleet: its body runs when the lock is held, or when `done()` is true, or when it makes no
    sense to wait any longer. No node's failure raises: what cannot be had is said in the log, and ComfyUI starts.
    """
    try:
        names = link(folders)
        wanted = requirements(folders, names)
        site = _site(folders, wanted, once, environ) if wanted else None
    except OSError as exc:
        log.warning("custom nodes of the volume are left out: %s cannot be used (%s)", exc.filename, exc.strerror)
        return dict(environ)
    if site is None:
        return dict(environ)
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(site), environ.get("PYTHONPATH"))))}


def link(folders: NodeFolders) -> tuple[str, ...]:
    """Make ComfyUI see the volume's nodes; returns the names of those that it sees. A node of the image's wins.

    Links of nodes that left the volume are removed; nothing else is ever touched.
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
    """What ComfyUI would load from there (nodes.py, init_external_custom_nodes)."""
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
    """Node name to its requirements.txt, of the nodes that have one with a line in it."""
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
    """What ComfyUI's own environment has, read from the names of its metadata folders: one look, no process."""

    python: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, python: str) -> EnginePackages:
        """The packages of the venv that this interpreter belongs to, and of what its .pth files add."""
        lib = Path(shutil.which(python) or python).parent.parent / "lib"
        own = sorted(lib.glob("python3*/site-packages"))
        linked = [Path(line) for site in own for pth in site.glob("*.pth") for line in pth.read_text().splitlines()]
        # The nearer one counts, as it does when it is imported.
        versions: dict[str, str] = {}
        for site in [*own, *(folder for folder in linked if folder.is_absolute() and folder.is_dir())]:
            for name, version in _installed(site).items():
                versions.setdefault(name, version)
        return cls(own[0].parent.name if own else "python", versions)

    def layer_name(self, wanted: Mapping[str, str]) -> str:
        """The layer for these nodes' requirements; says the two things that people ask about, and changes with everything."""
        digest = hashlib.sha256(json.dumps([dict(self.versions), dict(wanted)], sort_keys=True).encode()).hexdigest()
        return f"{self.python}-torch{self.versions.get('torch', '-none')}-{digest[:12]}"


def _installed(site: Path) -> dict[str, str]:
    names = (path.name.removesuffix(".dist-info").split("-") for path in site.glob("*.dist-info"))
    return {parts[0].lower().replace("_", "-"): parts[1] for parts in names if len(parts) == 2}  # noqa: PLR2004 - name, version


def _site(
    folders: NodeFolders,
    wanted: Mapping[str, str],
    once: Callable[[str, Callable[[], bool]], AbstractContextManager[object]],
    environ: Mapping[str, str],
) -> Path:
    """The folder of packages for these nodes, installed now if no worker has done it yet."""
    engine = EnginePackages.of(folders.python)
    layer = folders.layers / engine.layer_name(wanted)

    if _failed_in(layer) is None:
        with once(f"nodes-{layer.name}", _Wait(layer).over):
            if _failed_in(layer) is None:
                with _announced(layer, environ):
                    return _install(folders, wanted, engine, layer, environ)
    for name, reasons in (_failed_in(layer) or {}).items():
        _say_failed(name, reasons)
    return layer / "packages"


class _Wait:
    """Another worker's installation, as the log of a worker that waits for it shows it."""

    def __init__(self, layer: Path) -> None:
        self._layer = layer
        self._next_s = time.monotonic() + _SAY_AFTER_S

    def over(self) -> bool:
        """Whether the layer is whole; asked again and again. Every ten seconds the log says who is at it."""
        if _failed_in(self._layer) is not None:
            return True
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _SAY_EVERY_S
            log.info("waiting for the custom nodes' packages, which %s", _who_installs(self._layer))
        return False


@contextlib.contextmanager
def _announced(layer: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Let those who wait know who installs; never a reason to fail."""
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
    """The rest of a sentence. Hosts' clocks differ by a little, so it is a time of day and no duration."""
    try:
        note = json.loads(layer.with_name(f"{layer.name}.installing").read_text("utf-8"))
        return f"worker {note['by']} installs since {time.strftime('%H:%M:%S', time.localtime(note['since']))}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another worker installs"


def _failed_in(layer: Path) -> dict[str, list[str]] | None:
    """What a layer lacks: node name to sentences. None where no whole layer is: a host's crash can leave an empty record."""
    try:
        record = json.loads((layer / _COMPLETE).read_text("utf-8"))["failed"]
        return {str(name): [str(reason) for reason in reasons] for name, reasons in record.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _install(
    folders: NodeFolders, wanted: Mapping[str, str], engine: EnginePackages, layer: Path, environ: Mapping[str, str]
) -> Path:
    """Install into this container, where small files are quick, then hand it to the fleet by one rename."""
    began_s = time.monotonic()
    log.info("installing the packages of %d custom nodes, once for the fleet: %s", len(wanted), ", ".join(wanted))
    home = Path(tempfile.mkdtemp(prefix="nodes-"))
    installer = _Installer(folders, engine, home, environ)
    failed = installer.install(wanted)
    for name, reasons in failed.items():
        _say_failed(name, reasons)
    log.info(
        "installed in %.1f s: %s", time.monotonic() - began_s, ", ".join(_installed(installer.site)) or "nothing was missing"
    )
    if installer.interrupted:
        log.warning("not every package could be fetched, so the next worker tries again")
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
        if layer.exists() and _failed_in(layer) is None:
            layer.rename(layer.with_name(f"{partial.name}.broken"))
        partial.rename(layer)
    except OSError:
        # Another worker's, who was first without the lock, is as good: the same content.
        if _failed_in(layer) is None:
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(site.parent, ignore_errors=True)
    return layer / "packages"


class _Installer:
    """pip, told what ComfyUI has; first for all nodes together, then, where they do not agree, for as much as can be had."""

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
        """Returns what failed: node name to sentences."""
        files = [self._folders.source / name / "requirements.txt" for name in wanted]
        if self._pip(*(option for file in files for option in ("-r", str(file)))) is None:
            return {}
        failed: dict[str, list[str]] = {}
        for name, text in wanted.items():
            if reasons := self._as_much_as_can_be_had(self._folders.source / name, text):
                failed[name] = reasons
        return failed

    def _as_much_as_can_be_had(self, node: Path, text: str) -> list[str]:
        """One node's requirements, alone, then line by line; returns a sentence for each that cannot be had."""
        if self._pip("-r", "requirements.txt", cwd=node) is None:
            return []
        lines = [words for line in text.splitlines() if (words := _words(line))]
        # An index, a folder of wheels or a file of constraints is meant for all lines.
        options = [word for words in lines if _is_option(words) for word in words]
        single = [words for words in lines if not _is_option(words)]
        problems = [(" ".join(words), self._one(words, options, node)) for words in single]
        return [f"{line}: {reason}" for line, reason in problems if reason is not None]

    def _one(self, words: Sequence[str], options: Sequence[str], node: Path) -> str | None:
        """Install what one line asks for; as `_pip`."""
        if words[0].startswith("-"):
            return self._pip(*options, *words, cwd=node)
        # In a file of its own a line may have what pip takes in files alone, such as --hash.
        line = self._prefix.with_name("line.txt")
        line.write_text(" ".join(words))
        return self._pip(*options, "-r", str(line), cwd=node)

    def _pip(self, *arguments: str, cwd: Path | None = None) -> str | None:
        """Install this, paths being relative to `cwd`; None when it went well, else pip's reason."""
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
        """Move what pip put below its prefix into the one folder."""
        for packages in self._prefix.glob("lib*/python3*/site-packages"):
            shutil.copytree(packages, self.site, dirs_exist_ok=True)
        shutil.rmtree(self._prefix, ignore_errors=True)


def _words(line: str) -> list[str]:
    """A line of a requirements file, an option as arguments of pip; none for a comment."""
    text = re.sub(r"(^|\s)#.*", "", line).strip()
    return text.split() if text.startswith("-") else [text] if text else []


def _is_option(words: Sequence[str]) -> bool:
    """Whether a line says how to install, not what."""
    return words[0].startswith("-") and not words[0].startswith(_WHAT)


def _say_failed(name: str, reasons: Sequence[str]) -> None:
    log.warning(
        "custom node '%s' asks for packages that cannot be installed beside ComfyUI's (%s): build an image with it by "
        "comfy-node-install, or change its requirements.txt",
        name,
        "; ".join(reasons),
    )


# --- nodes that fail to import -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailedNode:
    """A node that ComfyUI could not import, and what Python said."""

    name: str
    reason: str


def failed_import(line: str) -> FailedNode | None:
    """The node that a line of ComfyUI's output says could not be imported."""
    found = _CANNOT_IMPORT.search(line)
    return FailedNode(Path(found[1]).name, found[2]) if found else None


def report_failures(settings: Settings, lines: Sequence[str]) -> None:
    """As `record_failures`; nothing is said or recorded where ComfyUI was told to be silent about it."""
    if settings.comfy_log_level not in _SILENT:
        record_failures(NodeFolders.below(settings.volume_path, settings.base_dir, settings.comfyui_python), lines)


def record_failures(folders: NodeFolders, lines: Sequence[str]) -> None:
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
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"failed.json.{os.urandom(4).hex()}")
        partial.write_text(record)
        partial.replace(path)


def read_failures(volume: Path) -> list[FailedNode]:
    """The volume's nodes that could not be imported when a worker started last; those that are gone since are left out."""
    try:
        record = json.loads((volume / ".worker" / "nodes" / "failed.json").read_text())["failed"]
        failures = [FailedNode(str(name), str(reason)) for name, reason in record.items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return [failure for failure in failures if (volume / "custom_nodes" / failure.name).exists()]
