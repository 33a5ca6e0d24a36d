"""Make tiny weights for the engine, once, into the cache; lay out a volume that holds them. Touches disk and processes.

Standard library only. `python3 -m devkit.engine.models PATH` writes PATH/models/<folder>/<name>, as a network volume has it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, get_args

from devkit.engine.build import Engine, ensure_engine
from devkit.engine.cache import (
    BuildFailed,
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
    from collections.abc import Sequence

HERE = Path(__file__).parent
GENERATOR = HERE / "make_models.py"
PINNED = HERE / "models.sha256"
TIMEOUT_S = 600.0

ModelSet = Literal["tiny", "large"]


def pinned_sums(which: ModelSet) -> dict[str, str]:
    """Return relative name -> sha256 of the files of one set, as this version of the project makes them."""
    prefix = f"{which}/"
    return {name.removeprefix(prefix): digest for name, digest in read_sums(PINNED).items() if name.startswith(prefix)}


def ensure_models(engine: Engine, which: ModelSet = "tiny", *, log: IO[str] | None = None) -> Path:
    """Return the folder in the engine's cache that holds one set of weights, making it on the first call.

    `tiny` (57 MB) is what the workflows need; `large` (124 MB) adds the one file that text_to_image_clip_fp8.json names.
    The folder is shared: copy from it, as `make_volume` does, never write to it.

    Raises:
        BuildFailed: the weights could not be made, or are not the ones that models.sha256 pins.
    """
    folder = engine.root.parent / f"models-{which}-{digest_of((engine.root.name,), (GENERATOR, PINNED))}"
    if folder.is_dir():
        return folder
    log = log or sys.stderr
    with exclusive(folder.with_suffix(".lock"), TIMEOUT_S, log) as lock:
        if not folder.is_dir():
            made = _generate(engine, which, folder.with_suffix(".partial"), lock, log)
            if findings := differences(pinned_sums(which), sums_below(made)):
                raise BuildFailed("the weights are not those of models.sha256:\n    " + "\n    ".join(findings))
            made.rename(folder)
    return folder


def make_volume(engine: Engine, path: Path, sets: Sequence[ModelSet] = ("tiny",)) -> Path:
    """Put weights below `path`/models and return `path`. A file that is there with its right size is left alone.

    The files are copies, not links: a volume is there to be written to, and the cache must not change with it.
    """
    for which in sets:
        source = ensure_models(engine, which)
        for file in sorted(entry for entry in source.rglob("*") if entry.is_file()):
            target = path / "models" / file.relative_to(source)
            if not target.is_file() or target.stat().st_size != file.stat().st_size:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.partial")
                shutil.copyfile(file, partial)
                partial.replace(target)
    return path


def pin(engine: Engine, log: IO[str]) -> None:
    """Make every set anew and write models.sha256 from it: for a change of make_models.py that is meant."""
    sums: dict[str, str] = {}
    with exclusive(engine.root.parent / "models-pin.lock", TIMEOUT_S, log) as lock:
        for which in get_args(ModelSet):
            made = _generate(engine, which, engine.root.parent / f"models-{which}-pin", lock, log)
            sums |= {f"{which}/{name}": digest for name, digest in sums_below(made).items()}
            shutil.rmtree(made)
    write_sums(PINNED, sums)


def _generate(engine: Engine, which: ModelSet, folder: Path, lock: int, log: IO[str]) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    output = folder.with_suffix(".log")
    with step(f"making the {which} weights", log):
        output.unlink(missing_ok=True)
        # -P: the modules beside the generator have names that a package may mean as its own.
        command = (engine.python, "-P", GENERATOR, engine.comfyui_dir, which, folder)
        run(command, output=output, timeout_s=TIMEOUT_S, lock=lock)
    return folder


def main(arguments: Sequence[str]) -> int:
    """Lay out a volume, or pin the weights; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m devkit.engine.models", description="Tiny weights, laid out as a volume.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("path", nargs="?", type=Path, help="the volume's folder; weights go to its models/")
    what.add_argument("--pin", action="store_true", help="make them anew and write models.sha256")
    parser.add_argument("--large", action="store_true", help="add the 124 MB text encoder that one workflow needs")
    chosen = parser.parse_args(arguments)
    try:
        engine = ensure_engine()
        if chosen.pin:
            pin(engine, sys.stderr)
        else:
            print(make_volume(engine, chosen.path, ("tiny", "large") if chosen.large else ("tiny",)))
    except (BuildFailed, OSError) as exc:
        print_error(exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
