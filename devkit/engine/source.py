"""Choose the ComfyUI that the engine is made of: the pinned one, a folder's, or GitHub's. Touches disk and network.

    ENGINE_SOURCE=DIR        a ComfyUI tree, such as a checkout
    ENGINE_REF=v0.46.0       a tag or a whole commit hash, downloaded once

Neither is set: the one that comfyui.lock pins. Standard library only, as build.py.
"""

from __future__ import annotations

import http.client
import os
import re
import runpy
import shutil
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final
from urllib.parse import quote

from devkit.engine.cache import BuildFailed, differences, exclusive, sha256_of, step, sums_below

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHIVES: Final = "https://github.com/Comfy-Org/ComfyUI/archive"
FETCH_SOURCE: Final = Path(__file__).resolve().parents[2] / "image" / "fetch_source.py"
DOWNLOAD_TIMEOUT_S: Final = 600.0

# A branch moves: what is cached under its name would be another ComfyUI tomorrow.
_FIXED: Final = re.compile(r"v?\d+(\.\w+)+|[0-9a-f]{40}")
# What a tree holds besides the program: what only ComfyUI's developers need, and what running it left there.
_ASIDE: Final = re.compile(
    r"\.|(.+/)?__pycache__/|(venv[^/]*|temp|user|tests|tests-unit)/|extra_model_paths\.yaml$|[^/]*\.log$"
)
# Its user's folders, and what a checkout has in them from the start.
_DATA: Final = re.compile(r"(models|input|output|custom_nodes)/")
_STOCK: Final = re.compile(
    r"models/(.+/)?put_\w+_here|models/configs/[^/]+\.yaml|output/_output_\w+_here|input/example\.png"
    r"|custom_nodes/(example_node\.py\.example|websocket_image_save\.py)"
)


def chosen_tree(environ: Mapping[str, str], cache: Path, log: IO[str], archives: str = ARCHIVES) -> Path | None:
    """Return the folder of the ComfyUI that the environment names; None for the pinned one.

    Raises:
        BuildFailed: it names two, a folder without ComfyUI, or a release that cannot be downloaded.
    """
    folder, ref = environ.get("ENGINE_SOURCE"), environ.get("ENGINE_REF")
    if folder and ref:
        raise BuildFailed("ENGINE_SOURCE and ENGINE_REF are both set; unset one of them")
    if folder:
        tree = Path(folder).absolute()
        if absent := [name for name in ("main.py", "requirements.txt") if not (tree / name).is_file()]:
            raise BuildFailed(f"ENGINE_SOURCE={folder} is no ComfyUI: it has no {absent[0]}; name the folder of a checkout")
        return tree
    return _downloaded(ref, cache, log, archives) if ref else None


def _downloaded(ref: str, cache: Path, log: IO[str], archives: str) -> Path:
    if not _FIXED.fullmatch(ref):
        raise BuildFailed(
            f"ENGINE_REF={ref} is neither a tag such as v0.46.0 nor a whole commit hash; for a branch, give its commit"
        )
    tree = cache / f"comfyui-{ref}"
    with exclusive(cache / f"{tree.name}.lock", DOWNLOAD_TIMEOUT_S, log):
        if not tree.is_dir():
            partial = cache / f"{tree.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with step(f"downloading ComfyUI {ref}", log):
                _download(f"{archives}/{quote(ref)}.tar.gz", partial, ref)
            partial.rename(tree)
    return tree


def _download(address: str, target: Path, ref: str) -> None:
    image = runpy.run_path(str(FETCH_SOURCE))
    try:
        image["unpack"](image["fetch"](address), str(target))
    except (OSError, http.client.HTTPException, tarfile.TarError) as exc:
        raise BuildFailed(
            f"ENGINE_REF={ref} cannot be downloaded from {address}: {exc}; check the name, or set ENGINE_SOURCE to a folder"
        ) from None


def tree_sums(tree: Path) -> dict[str, str]:
    """Return relative name -> sha256 of the program's files in a ComfyUI tree: no weights, no outputs, no venv, no git."""
    sums: dict[str, str] = {}
    for folder, folders, files in os.walk(tree):
        relative = Path(folder).relative_to(tree)
        folders[:] = [name for name in folders if not _ASIDE.match(f"{(relative / name).as_posix()}/")]
        for path in ((relative / name).as_posix() for name in files):
            if not _ASIDE.match(path) and (not _DATA.match(path) or _STOCK.fullmatch(path)) and (tree / path).is_file():
                sums[path] = sha256_of(tree / path)
    return dict(sorted(sums.items()))


def copy_tree(tree: Path, sums: Mapping[str, str], target: Path) -> None:
    """Copy the files that `tree_sums` named.

    Raises:
        BuildFailed: one of them changed since.
    """
    for name in sums:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / name, target / name)
    if changed := differences(sums, sums_below(target)):
        raise BuildFailed(f"{tree} changed while it was copied ({changed[0]}); run this again")
