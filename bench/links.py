"""What it costs to show a volume's models to ComfyUI, and what it then costs ComfyUI to list them.

Three things, on the local disk and on a real MooseFS volume:
  - ModelLinks.refresh(): the first time, again with nothing changed (same process, new process), and with one file added; as
    shipped, where a large folder is one link, and with one link for each file, as where ComfyUI's own folder holds a file (the
    image deletes ComfyUI's `put_loras_here`; a custom image may not). The references are a bare os.scandir of the same folder
    and a bare loop of os.symlink, in the same run, after ours.
  - ComfyUI's walk, by its own folder_paths.py: through file links and through a folder link, against the bare volume. This is
    where LARGE_FOLDER comes from.
  - what one file link adds to that walk: the difference, for each file.

On MooseFS the first time is on a mount that has seen nothing of the volume, as on a host that has run no worker before. As
shipped, all is judged by what a person would notice. Making 10,000 file links takes as long as the file system takes to make
10,000 names, so their first time informs, and is judged against the bare loop.
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

from bench.report import Figure, Options, leave_out, parse_args, report
from devkit.engine.build import ensure_engine
from devkit.listing import ComfyListing
from devkit.moosefs import MooseFS, available
from worker.links.model_links import LARGE_FOLDER, ModelLinks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

SIZES = (10, 1_000, 10_000)
WALKS = (64, 256, 1_000, 10_000)
SHAPES = {"as_shipped": LARGE_FOLDER, "file_links": 10**9}
"""From how many files on a folder is one link."""
FIRST_BOUND_MS, UNCHANGED_BOUND_MS, NEW_PROCESS_BOUND_MS = 400.0, 60.0, 150.0
OVER_SYMLINKS_BOUND, WALK_BOUND = 1.5, 1.25
SETTLE_S = 0.1  # until the local disk's clock has ticked: a folder changed just now is read once more


@dataclass(frozen=True, slots=True)
class Place:
    """A file system to measure, as one host or as several see it."""

    name: str
    folder: Path
    fresh: Sequence[Path]
    """The same folder, one for each shape and sample: on a network volume, through a mount that has seen nothing of it."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A volume with `count` models in one folder."""

    place: Place
    root: Path
    count: int

    @classmethod
    def make(cls, place: Place, count: int) -> Tree:
        """Empty files: links and listings look at names only."""
        root = place.folder / f"volume{count}" / "models"
        (root / "loras").mkdir(parents=True)
        for number in range(count):
            (root / f"loras/a_model_with_a_usual_name_{number:05}.safetensors").touch()
        return cls(place, root, count)


def main() -> int:
    """Measure, and report."""
    options = parse_args(__doc__, add=_arguments)
    wanted = len(SHAPES) * options.samples
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-links-", dir=options.extra.data)))
        places = [Place("disk", data, [data] * wanted)]
        if reason := available():
            leave_out(reason, "MooseFS")
        else:
            volume = stack.enter_context(MooseFS(data / "volume", mounts=1))
            places.append(Place("moosefs", volume.mounts[0], [volume.mount() for _ in range(wanted)]))
        comfyui = options.extra.comfyui or ensure_engine().comfyui_dir
        figures = []
        sizes, walked = (SIZES[-1:], WALKS[:-1]) if options.short else (SIZES, WALKS)
        for place in places:
            trees = {count: Tree.make(place, count) for count in sorted({*sizes, *walked})}
            figures += [figure for count in sizes for figure in refreshes(trees[count], data, options)]
            figures += [figure for count in walked for figure in walks(trees[count], data, comfyui, options)]
        return report(figures, options, data=data)


def refreshes(tree: Tree, data: Path, options: Options) -> Iterator[Figure]:
    """Yield the cost of a refresh, for both forms of links. The largest folder is judged."""
    for number, shape in enumerate(SHAPES):
        mounts = tree.place.fresh[number * options.samples : (number + 1) * options.samples]
        samples = [_refresh_sample(tree, mount, data, SHAPES[shape]) for mount in mounts]
        bounds = _bounds(shape) if tree.count == max(SIZES) else {}
        for what in samples[0]:
            if what == "first_over_symlinks" and shape == "as_shipped":
                continue  # one link over ten thousand says nothing
            name = f"links_{tree.place.name}_{tree.count}_{shape}_{what}"
            yield Figure.of(name, [sample[what] for sample in samples], "x" if "over" in what else "ms", bounds.get(what))


def _bounds(shape: str) -> dict[str, float]:
    first = {"first_over_symlinks": OVER_SYMLINKS_BOUND} if shape == "file_links" else {"first": FIRST_BOUND_MS}
    return {**first, "unchanged": UNCHANGED_BOUND_MS, "new_process": NEW_PROCESS_BOUND_MS}


def _refresh_sample(tree: Tree, mount: Path, data: Path, large_folder: int) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(dir=data))
    models = folder / "models"
    root = mount / tree.root.relative_to(tree.place.folder)
    links = ModelLinks(models, [root], large_folder=large_folder)
    took: dict[str, float] = {}
    os.sync()  # what an earlier sample wrote is not this one's cost
    took["first"] = _ms(links.refresh)
    os.sync()
    took["first_over_symlinks"] = took["first"] / _ms(lambda: _symlinks(root / "loras", folder / "bare"))
    took["new_process"] = _ms(ModelLinks(models, [root], large_folder=large_folder).refresh)
    time.sleep(SETTLE_S)
    links.refresh()
    bare_list = _ms(lambda: _list(root / "loras"))
    took["unchanged"] = _ms(links.refresh)
    took["unchanged_over_scandir"] = took["unchanged"] / bare_list
    late = root / "loras/late.safetensors"
    late.touch()
    took["one_added"] = _ms(links.refresh)
    late.unlink()
    return took


def walks(tree: Tree, data: Path, comfyui: Path, options: Options) -> Iterator[Figure]:
    """Yield the cost of ComfyUI's own listing through both forms of links, and on the bare volume."""
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
    name = f"comfyui_walk_{tree.place.name}_{tree.count}"
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
