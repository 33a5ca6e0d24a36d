# ruff: noqa: INP001 - run as a module from the root; scripts is a folder of programs, no package
"""Write image/engine.lock: the packages that a ComfyUI asks for, at today's versions. Touches that file, network, processes.

    python -m scripts.make_image_lock TREE      # TREE is ComfyUI's source, of the release that the Dockerfile names; needs uv

torch and what comes with it is not in the lock: each flavour of the image has its own. Where the worker has a package too, the
lock takes the worker's version, so that the image has it once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROJECT: Final = Path(__file__).resolve().parents[1]
LOCK: Final = PROJECT / "image" / "engine.lock"
WORKER_LOCK: Final = PROJECT / "requirements.lock"

# Nothing of ComfyUI's, and there all the same: what handlers written for worker-comfyui import.
BESIDE: Final = ("websocket-client",)
# Each flavour's index has them, and the Dockerfile installs them first.
TORCH: Final = ("torch", "torchvision", "torchaudio")
COMES_WITH_TORCH: Final = {"filelock", "fsspec", "jinja2", "markupsafe", "numpy", "pillow", "setuptools", "typing-extensions"}
# Pages and pictures for the front end, hundreds of megabytes, which no headless start reads.
LEFT_OUT: Final = re.compile(r"comfyui-(embedded-docs|workflow-templates-(json|media-.*))")

_UV: Final = (
    *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--fork-strategy", "fewest"),
    *("--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links"),
)


def lock(tree: Path) -> str:
    """Return the lock's text. Raises `subprocess.CalledProcessError` when uv finds no versions that go together."""
    version = re.search(r'"([\d.]+)"', (tree / "comfyui_version.py").read_text("utf-8"))
    asked = asked_for((tree / "requirements.txt").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        wanted, without, worker = (Path(folder, name) for name in ("requirements.in", "without.txt", "worker.txt"))
        wanted.write_text("\n".join([*asked, *BESIDE]))
        without.write_text("".join(f'{name} ; python_version < "0"\n' for name in TORCH))
        worker.write_text("\n".join(re.findall(r"^[a-z0-9-]+==[^\s;]+", WORKER_LOCK.read_text("utf-8"), re.MULTILINE)))
        command: list[str | Path] = [*_UV, "--constraint", worker, "--override", without, wanted]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    release = version[1] if version else "?"
    head = f"""# What ComfyUI {release} asks for, less what comes with torch and what no headless start reads.
# Made by scripts/make_image_lock.py; the lines of requirements.txt that it answers:
"""
    return "".join([head, *(f"#   {line}\n" for line in asked), *kept(said)])


def asked_for(requirements: str) -> list[str]:
    """Return the lines of a requirements.txt that ask for something."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return [line for line in lines if line]


def kept(compiled: str) -> Iterator[str]:
    """Yield the compiled packages, each with its hashes, that the lock pins."""
    for entry in re.findall(r"^[a-z0-9].*\n(?:    .*\n)*", compiled, re.MULTILINE):
        name = entry.partition("==")[0]
        if name not in COMES_WITH_TORCH and not LEFT_OUT.fullmatch(name):
            yield entry


def main(arguments: Sequence[str]) -> int:
    """Write the lock; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.make_image_lock", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tree", type=Path, help="a folder with ComfyUI's source")
    try:
        LOCK.write_text(lock(parser.parse_args(arguments).tree), "utf-8")
    except (OSError, subprocess.CalledProcessError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
