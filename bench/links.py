"""What it costs to show a volume's models to ComfyUI, and what it then costs ComfyUI to list them.

Three things, on the local disk and on a real MooseFS volume:
  - ModelLinks.refresh(): the first time, again with nothing changed (same process, new process), and with one file added; with
    one link for each file (as where ComfyUI's folder holds a file of the image's) and with one for the folder (as where it
    does not). The references are a bare os.scandir of the same folder and a bare loop of os.symlink, in the same run.
  - ComfyUI's walk, by its own folder_paths.py: through file links and through a folder link, against the bare volume. This is
    where LARGE_FOLDER comes from.
  - what one file link adds to that walk: the difference, for each file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import Figure, Options, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.listing import ComfyListing
from devkit.moosefs import MooseFS, available
from worker.models.links import ModelLinks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

SIZES = (10, 1_000, 10_000)
WALKS = (64, 256, 1_000, 10_000)
FIRST_BOUND_MS, UNCHANGED_BOUND_MS, NEW_PROCESS_BOUND_MS = 400.0, 60.0, 150.0
OVER_SYMLINKS_BOUND, WALK_BOUND = 1.5, 1.25
SETTLE_S = 0.1  # until the local disk's clock has ticked: a folder changed just now is read once more


@dataclass(frozen=True, slots=True)
class Tree:
    """A volume with `count` models in one folder, on the file system called `where`."""

    where: str
    root: Path
    count: int

    @classmethod
    def make(cls, where: str, folder: Path, count: int) -> Tree:
        """Empty files: links and listings look at names only."""
        root = folder / f"volume{count}" / "models"
        (root / "loras").mkdir(parents=True)
        for number in range(count):
            (root / f"loras/a_model_with_a_usual_name_{number:05}.safetensors").touch()
        return cls(where, root, count)


def main() -> int:
    """Measure, and report."""
    options = parse_args(__doc__, add=_arguments)
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-links-", dir=options.extra.data)))
        places = {"disk": data}
        if reason := available():
            print(f"only the local disk is measured: {reason}", file=sys.stderr)
        else:
            places["moosefs"] = stack.enter_context(MooseFS(data / "volume", mounts=1)).mounts[0]
        comfyui = options.extra.comfyui or ensure_engine().comfyui_dir
        figures = []
        sizes, walked = (SIZES[-1:], WALKS[:-1]) if options.short else (SIZES, WALKS)
        for where, folder in places.items():
            trees = {count: Tree.make(where, folder, count) for count in sorted({*sizes, *walked})}
            figures += [figure for count in sizes for figure in refreshes(trees[count], data, options)]
            figures += [figure for count in walked for figure in walks(trees[count], data, comfyui, options)]
        return report(figures, options, data=data)


def refreshes(tree: Tree, data: Path, options: Options) -> Iterator[Figure]:
    """What a refresh costs, in both shapes that the links of a folder can have."""
    judged = tree.count == max(SIZES)
    yield from _refreshes(tree, data, options, "file_links", 10**9, judged=judged)
    yield from _refreshes(tree, data, options, "folder_link", 1, judged=judged)


def _refreshes(tree: Tree, data: Path, options: Options, shape: str, large_folder: int, *, judged: bool) -> Iterator[Figure]:
    samples = [_refresh_sample(tree, data, large_folder) for _ in range(options.samples)]
    bounds = {"unchanged": UNCHANGED_BOUND_MS, "new_process": NEW_PROCESS_BOUND_MS}
    # Making 10,000 names takes as long as the file system takes: that is judged by a bare loop in the same run.
    bounds |= {"first_over_symlinks": OVER_SYMLINKS_BOUND} if shape == "file_links" else {"first": FIRST_BOUND_MS}
    for what in samples[0]:
        if what == "first_over_symlinks" and shape != "file_links":
            continue
        unit = "x" if "over" in what else "ms"
        bound = bounds.get(what) if judged else None
        yield Figure.of(f"links_{tree.where}_{tree.count}_{shape}_{what}", [sample[what] for sample in samples], unit, bound)


def _refresh_sample(tree: Tree, data: Path, large_folder: int) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(dir=data))
    models = folder / "models"
    links = ModelLinks(models, [tree.root], large_folder=large_folder)
    took: dict[str, float] = {}
    os.sync()  # what an earlier sample wrote is not this one's cost
    bare_links = _ms(lambda: _symlinks(tree.root / "loras", folder / "bare"))
    os.sync()
    took["first"] = _ms(links.refresh)
    took["first_over_symlinks"] = took["first"] / bare_links
    took["new_process"] = _ms(ModelLinks(models, [tree.root], large_folder=large_folder).refresh)
    time.sleep(SETTLE_S)
    links.refresh()
    bare_list = _ms(lambda: _list(tree.root / "loras"))
    took["unchanged"] = _ms(links.refresh)
    took["unchanged_over_scandir"] = took["unchanged"] / bare_list
    late = tree.root / "loras/late.safetensors"
    late.touch()
    took["one_added"] = _ms(links.refresh)
    late.unlink()
    return took


def walks(tree: Tree, data: Path, comfyui: Path, options: Options) -> Iterator[Figure]:
    """What ComfyUI's own listing costs through links of both shapes, and on the bare volume."""
    bases = {shape: Path(tempfile.mkdtemp(dir=data)) for shape in ("bare", "file_links", "folder_link")}
    (bases["bare"] / "models").symlink_to(tree.root)
    ModelLinks(bases["file_links"] / "models", [tree.root], large_folder=10**9).refresh()
    ModelLinks(bases["folder_link"] / "models", [tree.root], large_folder=1).refresh()
    took: dict[str, list[float]] = {shape: [] for shape in bases}
    for _ in range(options.samples):
        for shape, base in bases.items():
            # A process and a base folder of its own: the kernel has seen no link of this sample's before.
            with ComfyListing(comfyui, base) as listing:
                took[shape].append(listing.walk_seconds("loras") * 1000)
    name = f"comfyui_walk_{tree.where}_{tree.count}"
    for shape, samples in took.items():
        yield Figure.of(f"{name}_{shape}", samples, "ms")
    each = [(file - folder) / tree.count * 1000 for file, folder in zip(took["file_links"], took["folder_link"], strict=True)]
    yield Figure.of(f"{name}_each_file_link_adds", each, "us")
    over = [folder / bare for folder, bare in zip(took["folder_link"], took["bare"], strict=True)]
    yield Figure.of(f"{name}_folder_link_over_bare", over, "x", WALK_BOUND if tree.count >= 1_000 else None)  # noqa: PLR2004 - below, it is all noise


def _list(folder: Path) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            _ = entry.name, entry.is_file(follow_symlinks=False)


def _symlinks(targets: Path, folder: Path) -> None:
    folder.mkdir()
    with os.scandir(targets) as entries:
        for entry in entries:
            os.symlink(entry.path, f"{folder}/{entry.name}")  # noqa: PTH211 - the bare system call is the reference


def _ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--comfyui", type=Path, help="a folder with ComfyUI's source (default: the development engine, built once)"
    )
    parser.add_argument("--data", type=Path, help="where the local disk is measured (default: the temporary folder)")


if __name__ == "__main__":
    sys.exit(main())
