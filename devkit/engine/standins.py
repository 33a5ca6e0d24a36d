"""Pack the stand-ins for torchvision and torchaudio as wheels. Touches disk.

On a CPU there are no real ones beside exactly their own torch. Standard library only, as build.py.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from devkit.engine.cache import digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping

STUBS: Final = Path(__file__).parent / "stubs"
# What they need: the real ones' packages, so that pip brings them along, and for torchaudio's the other's code.
NEEDS: Final = {"torchvision": ("torch", "numpy", "pillow"), "torchaudio": ("torch", "torchvision")}
# As the real ones that go with the engine's torch.
LIKE: Final = {"torchvision": "0.28.0+stub", "torchaudio": "2.11.0+stub"}
# No real version, for an image, so that pip takes these whatever else it finds. It changes with them: a cached layer knows its
# arguments, not the wheels that were handed in.
ABOVE_ALL: Final = dict.fromkeys(LIKE, f"999.{int(digest_of((), sorted(STUBS.rglob('*.py'))), 16)}")


def write_wheels(folder: Path, versions: Mapping[str, str] = LIKE) -> list[Path]:
    """Write a wheel for each of them into the folder; returns their paths."""
    return [_write_wheel(folder, name, version) for name, version in versions.items()]


def _write_wheel(folder: Path, name: str, version: str) -> Path:
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in NEEDS[name])
    files = {path.relative_to(STUBS).as_posix(): path.read_text() for path in sorted((STUBS / name).rglob("*.py"))}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: devkit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return target
