"""The worker's image from this working tree, with the CPU engine's ComfyUI and torch handed in. Touches disk and processes.

python -m devkit.image.build     builds it and prints its layers; the storage stays in the cache, so the next build is quick
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from devkit.engine.build import TORCH, ensure_engine
from devkit.engine.cache import cache_root, step
from devkit.engine.standins import ABOVE_ALL, write_wheels
from devkit.image.base import ensure_base
from devkit.image.buildah import Buildah, Layer

PROJECT = Path(__file__).resolve().parent.parent.parent
BASE = "localhost/debian-python"
IMAGE = "localhost/comfyui-volume-worker"
CONTEXT = ("Dockerfile", ".dockerignore", "requirements.lock", "handler.py", "image", "worker")

# Pip's options for how it gets at packages. What else a machine tells it, such as which versions it likes, is not the image's.
_REACHES = {
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host"),
    *("cert", "client-cert", "proxy", "default-timeout", "timeout", "retries"),
}


class ImageBuilder:
    """Builds images of copies of the project, in one storage."""

    def __init__(self, buildah: Buildah, folder: Path) -> None:
        self.buildah = buildah
        self.context = folder / "context"
        self._comfyui = folder / "comfyui"
        self._wheels = folder / "wheels"
        self._pip_conf = folder / "pip.conf"
        self._local: list[Path] = []

    def prepare(self) -> None:
        """Make the base image and everything that is handed in."""
        engine = ensure_engine()
        archive = ensure_base()
        shutil.copytree(engine.comfyui_dir, self._comfyui, ignore=shutil.ignore_patterns("__pycache__"))
        self._wheels.mkdir()
        write_wheels(self._wheels, ABOVE_ALL)
        self._local = _write_pip_conf(self._pip_conf)
        base = self.context.parent / "base"
        base.mkdir()
        (base / "base.tar").hardlink_to(archive) if _same_device(base, archive) else shutil.copy(archive, base / "base.tar")
        (base / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self.buildah.build(base, BASE)
        for name in CONTEXT:
            source = PROJECT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            self.context.mkdir(exist_ok=True)
            copy(source, self.context / name)

    def build(self, tag: str, target: str = "cpu") -> str:
        """Build the context as it is now; returns the log."""
        args = {
            "BASE_IMAGE": BASE,
            "TORCH_VERSION": TORCH.partition("==")[2],
            **{f"{name.upper()}_VERSION": version for name, version in ABOVE_ALL.items()},
            "TORCH_INDEX_URL": os.environ.get("ENGINE_TORCH_INDEX_URL", ""),  # the same torch as the engine's
        }
        return self.buildah.build(
            self.context, tag, target=target, args=args, contexts={"comfyui": self._comfyui}, volumes=self.volumes()
        )

    def build_child(self, folder: Path, tag: str) -> str:
        """Build an image that builds on another one; returns the log."""
        return self.buildah.build(folder, tag, volumes=self.volumes())

    def volumes(self) -> list[tuple[Path, str]]:
        """Return how the build's commands reach the package index: settings, certificates and local wheels."""
        certificates = Path("/etc/ssl/certs")
        return [
            (self._pip_conf, "/etc/pip.conf"),
            (self._wheels, "/wheels"),
            *([(certificates, str(certificates))] if certificates.is_dir() else []),
            *((path, str(path)) for path in self._local),
        ]


def report(layers: list[Layer]) -> list[str]:
    """Yield the layers as lines for people, with the largest parts summed up."""
    lines = [f"{layer.size_bytes / 1e6:9.1f} MB  {shown(layer)}" for layer in layers]
    return [*lines, f"{own_bytes(layers) / 1e6:9.1f} MB  everything but the base and torch"]


def shown(layer: Layer) -> str:
    """Return the instruction of a layer, shortened to one line."""
    text = re.sub(r"^(\|\d+ .*?)?/bin/(ba)?sh -c (#\(nop\) )?", "", layer.made_by)
    return " ".join(text.split())[:100]


def own_bytes(layers: list[Layer]) -> int:
    """Return what the project adds: all layers but the base (the first) and torch's."""
    return sum(layer.size_bytes for layer in layers[1:] if "torch==" not in layer.made_by)


def _write_pip_conf(path: Path) -> list[Path]:
    """Write how pip gets at packages on this machine, whether files or variables say so; returns the local folders it names."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    options = {"find-links": "/wheels"}
    for line in said.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].replace("_", "-")
        if name not in _REACHES:
            continue
        text = value.strip("'\"").replace("\\n", " ")
        options[name] = f"/wheels {text}" if name == "find-links" else text
    path.write_text("[global]\n" + "".join(f"{name} = {text}\n" for name, text in options.items()))
    words = " ".join(options.values()).split()
    local = {Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))}
    # A local index keeps its files beside the folder with its pages.
    return sorted({folder.parent if folder.name == "simple" else folder for folder in local if folder.is_dir()})


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def main() -> int:
    """Build the image into the cache's storage and print its layers."""
    folder = cache_root() / "image-build"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    builder = ImageBuilder(Buildah.of(cache_root() / "image"), folder)
    try:
        with step("preparing", sys.stderr):
            builder.prepare()
        with step("building the image", sys.stderr):
            builder.build(IMAGE)
    finally:
        shutil.rmtree(folder)
    print("\n".join(report(builder.buildah.layers(IMAGE))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
