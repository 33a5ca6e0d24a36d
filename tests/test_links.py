"""The volume's models as ComfyUI sees them: every file, nothing of anybody else's touched, and cheap to keep so."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devkit.listing import ComfyListing, ListingError
from worker.links import scan, sync
from worker.links.model_links import LinkProblem, LinkReport, ModelLinks, ProblemKind
from worker.store import pod_links

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devkit.engine.build import Engine
    from devkit.moosefs import MooseFS

LARGE = 4
PROJECT = Path(__file__).resolve().parents[1]


class Rig:
    """A volume, ComfyUI's models folder, and the links from one to the other."""

    def __init__(self, folder: Path, volume: Path | None = None) -> None:
        self.folder = folder
        self.volume = volume or folder / "volume"
        self.root = self.volume / "models"
        self.models = folder / "comfyui" / "models"
        self.root.mkdir(parents=True)
        self.models.mkdir(parents=True)
        self.links = self.fresh()

    def fresh(self, **options: Any) -> ModelLinks:
        """As another worker process would see what is there."""
        return ModelLinks(self.models, [self.root], **({"large_folder": LARGE} | options))

    def put(self, *paths: str) -> None:
        for path in paths:
            write(self.root / path, f"volume {path}")

    def bake(self, *paths: str) -> None:
        for path in paths:
            write(self.models / path, f"image {path}")

    def many(self, folder: str, count: int = LARGE) -> set[str]:
        paths = [f"{folder}/m{number}.safetensors" for number in range(count)]
        self.put(*paths)
        return set(paths)

    def seen(self) -> dict[str, str]:
        return seen_by_comfyui(self.models)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def seen_by_comfyui(models: Path) -> dict[str, str]:
    """Each file by its name, with its content: a walk through links, as ComfyUI does; fails on a dangling link."""
    found = {}
    for folder, _, files in os.walk(models, followlinks=True):
        for name in files:
            path = Path(folder) / name
            found[str(path.relative_to(models))] = path.read_text()
    return found


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kinds(report: LinkReport) -> list[tuple[ProblemKind, str]]:
    return [(problem.kind, Path(problem.path).name) for problem in report.problems]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def rig_on_moosefs(tmp_path: Path, moosefs: MooseFS, request: pytest.FixtureRequest) -> Rig:
    return Rig(tmp_path, moosefs.mounts[0] / request.node.name)


# --- every file appears ---------------------------------------------------------------------------


def test_every_file_of_every_folder_appears(rig: Rig) -> None:
    paths = ["checkpoints/a.safetensors", "never_heard_of/b.bin", "loras/style/old/c.pt", "lying_about.ckpt", "loras/d.pt"]
    rig.put(*paths)
    report = rig.links.refresh()
    assert rig.seen() == {path: f"volume {path}" for path in paths}
    assert (report.files, report.folders, report.made, report.removed, report.problems) == (5, 0, 5, 0, ())


def test_files_that_come_and_go_later_follow_at_the_next_refresh(rig: Rig) -> None:
    rig.put("loras/a.safetensors", "loras/sub/b.safetensors")
    rig.links.refresh()
    shutil.rmtree(rig.root / "loras/sub")
    rig.put("vae/c.safetensors")
    report = rig.links.refresh()
    assert set(rig.seen()) == {"loras/a.safetensors", "vae/c.safetensors"}
    assert (report.made, report.removed) == (1, 1)
    assert (rig.models / "loras/sub").is_dir(), "a folder that ComfyUI has listed must not go"


def test_hidden_and_unfinished_files_are_left_out_until_they_are_whole(rig: Rig) -> None:
    rig.put(
        "loras/.hidden.safetensors", "loras/.git/x.safetensors", "loras/a.safetensors.part", "loras/b.safetensors.incomplete"
    )
    rig.put("loras/c.tmp", "loras/aria.safetensors", "loras/aria.safetensors.aria2", "loras/whole.safetensors")
    rig.links.refresh()
    assert set(rig.seen()) == {"loras/whole.safetensors"}
    (rig.root / "loras/a.safetensors.part").rename(rig.root / "loras/a.safetensors")
    (rig.root / "loras/aria.safetensors.aria2").unlink()
    rig.links.refresh()
    assert set(rig.seen()) == {"loras/whole.safetensors", "loras/a.safetensors", "loras/aria.safetensors"}


def test_without_a_volume_there_is_nothing_to_link_and_no_problem(tmp_path: Path) -> None:
    links = ModelLinks(tmp_path / "comfyui/models", [tmp_path / "volume/models"])
    report = links.refresh()
    assert (report.files, report.made, report.problems) == (0, 0, ())
    write(tmp_path / "volume/models/loras/a.safetensors", "late")
    links.refresh()
    assert seen_by_comfyui(tmp_path / "comfyui/models") == {"loras/a.safetensors": "late"}


# --- one link for a large folder ------------------------------------------------------------------


@pytest.mark.parametrize(
    "there", ["nothing", "an empty folder", "our own file links", "our own folder link", "an empty subfolder"]
)
def test_a_large_folder_is_one_link_where_nothing_else_is(rig: Rig, there: str) -> None:
    if there == "our own file links":
        rig.many("loras/sub", LARGE - 1)
        rig.links.refresh()
    elif there == "our own folder link":
        (rig.models / "loras").symlink_to(rig.root / "loras")
    elif there != "nothing":
        (rig.models / "loras" / ("" if there == "an empty folder" else "sub")).mkdir(parents=True)
    expected = rig.many("loras") | rig.many("loras/sub")
    report = rig.links.refresh()
    target = os.readlink(rig.models / "loras")  # noqa: PTH115 - a Path would drop the slash
    assert target == f"{rig.root}/loras/"
    assert set(rig.seen()) == expected
    assert (report.files, report.folders, report.problems) == (2 * LARGE, 1, ())
    assert entries(rig.models) == ["loras"]


def test_a_small_folder_has_a_link_for_each_file(rig: Rig) -> None:
    rig.many("loras", LARGE - 1)
    report = rig.links.refresh()
    assert not (rig.models / "loras").is_symlink()
    assert report.folders == 0


def test_a_file_of_the_image_keeps_its_folder_real_but_not_the_folders_below(rig: Rig) -> None:
    rig.bake("loras/put_loras_here")
    expected = rig.many("loras") | rig.many("loras/flux")
    report = rig.links.refresh()
    assert set(rig.seen()) == expected | {"loras/put_loras_here"}
    assert not (rig.models / "loras").is_symlink()
    assert (rig.models / "loras/flux").is_symlink()
    assert (report.files, report.folders, report.problems) == (2 * LARGE, 1, ())


def test_a_large_folder_stays_one_link_when_it_shrinks(rig: Rig) -> None:
    rig.many("loras")
    rig.links.refresh()
    for file in list((rig.root / "loras").iterdir()):
        file.unlink()
    for links in (rig.links, rig.fresh()):
        report = links.refresh()
        assert (report.files, report.folders, report.made, report.removed) == (0, 1, 0, 0)
    assert (rig.models / "loras").is_symlink()


@pytest.mark.parametrize("process", ["same", "new"])
def test_a_linked_folder_that_disappears_becomes_an_empty_one_and_comes_back(rig: Rig, process: str) -> None:
    rig.many("loras/flux")
    rig.bake("loras/put_loras_here")
    rig.links.refresh()
    shutil.rmtree(rig.root / "loras/flux")
    links = rig.links if process == "same" else rig.fresh()
    report = links.refresh()
    flux = rig.models / "loras/flux"
    assert (flux.is_dir(), flux.is_symlink(), entries(flux)) == (True, False, [])
    assert (report.folders, report.removed, report.problems) == (0, 1, ())
    rig.many("loras/flux")
    links.refresh()
    assert flux.is_symlink()


def test_a_file_may_come_where_a_linked_folder_was(rig: Rig) -> None:
    rig.many("loras/flux")
    rig.links.refresh()
    shutil.rmtree(rig.root / "loras/flux")
    rig.links.refresh()
    rig.put("loras/flux")
    assert rig.links.refresh().problems == ()
    assert rig.seen() == {"loras/flux": "volume loras/flux"}


def test_a_folder_that_can_no_longer_be_shown_whole_gets_file_links(rig: Rig) -> None:
    expected = rig.many("loras") | rig.many("loras/sub")
    rig.links.refresh()
    (rig.root / "loras/broken.safetensors").symlink_to("nowhere")
    report = rig.links.refresh()
    assert not (rig.models / "loras").is_symlink()
    assert (rig.models / "loras/sub").is_symlink(), "what is whole below stays one link"
    assert set(rig.seen()) == expected
    assert kinds(report) == [(ProblemKind.BROKEN, "broken.safetensors")]
    assert entries(rig.models) == ["loras"]


def test_a_folder_link_is_exchanged_for_a_folder_that_is_already_full(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.many("loras")
    rig.many("loras/sub")
    rig.links.refresh()
    (rig.root / "loras/broken.safetensors").symlink_to("nowhere")
    moved = []
    real = os.rename

    def rename(source: str, target: str) -> None:
        moved.append((sorted(seen_by_comfyui(Path(source))), target))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    rig.links.refresh()
    scan = [f"m{number}.safetensors" for number in range(LARGE)]
    assert moved == [([*scan, *(f"sub/{name}" for name in scan)], str(rig.models / "loras"))]


def test_an_image_layer_that_cannot_rename_folders_keeps_file_links(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.many("loras", LARGE - 1)
    rig.links.refresh()
    expected = rig.many("loras")
    monkeypatch.setattr(os, "rename", fails(errno.EXDEV))  # overlayfs, for a folder of a lower layer
    assert rig.links.refresh().folders == 0
    assert set(rig.seen()) == expected


# --- nothing of anybody else's is touched ---------------------------------------------------------


def test_the_images_own_file_hides_the_volumes_and_is_reported(rig: Rig) -> None:
    rig.bake("loras/a.safetensors", "vae/only_image.safetensors")
    rig.put("loras/a.safetensors", "loras/b.safetensors")
    report = rig.links.refresh()
    assert rig.seen()["loras/a.safetensors"] == "image loras/a.safetensors"
    assert rig.seen()["loras/b.safetensors"] == "volume loras/b.safetensors"
    (problem,) = report.problems
    assert problem == LinkProblem(
        ProblemKind.HIDDEN,
        str(rig.root / "loras/a.safetensors"),
        str(rig.models / "loras/a.safetensors"),
    )
    (rig.models / "loras/a.safetensors").unlink()
    assert rig.links.refresh().problems == ()
    assert rig.seen()["loras/a.safetensors"] == "volume loras/a.safetensors"


def test_links_that_are_not_ours_are_never_touched(rig: Rig) -> None:
    write(rig.folder / "opt/x.safetensors", "elsewhere")
    rig.put("special/mine.safetensors", "loras/taken.safetensors", "vae/v.safetensors")
    rig.bake("loras/put_loras_here")
    hand_made = {
        "loras/renamed.safetensors": rig.root / "special/mine.safetensors",
        "loras/taken.safetensors": rig.folder / "opt/x.safetensors",
        "loras/alias.safetensors": rig.root / "loras/taken.safetensors",
        "loras/dangling.safetensors": rig.folder / "opt/gone",
        "vae": rig.folder / "opt",
    }
    for name, target in hand_made.items():
        (rig.models / name).symlink_to(target)
    for links in (rig.links, rig.fresh(), rig.links):
        report = links.refresh()
        assert {name: (rig.models / name).readlink() for name in hand_made} == hand_made
        assert kinds(report) == [(ProblemKind.HIDDEN, "taken.safetensors"), (ProblemKind.FOLDER_TAKEN, "vae")]
    assert list((rig.folder / "opt").iterdir()) == [rig.folder / "opt/x.safetensors"]


def test_a_hand_made_link_to_the_very_same_file_or_folder_is_no_problem(rig: Rig) -> None:
    rig.put("loras/a.safetensors", "vae/b.safetensors")
    rig.bake("loras/put_loras_here")
    (rig.models / "loras/a.safetensors").symlink_to("../../../volume/models/loras/a.safetensors")
    (rig.models / "vae").symlink_to("../../volume/models/vae")
    assert rig.links.refresh().problems == ()


def test_a_file_and_a_folder_of_one_name_are_reported(rig: Rig) -> None:
    rig.bake("loras/one", "loras/two/real.safetensors")
    rig.put("loras/one/x.safetensors", "loras/two")
    report = rig.links.refresh()
    assert kinds(report) == [(ProblemKind.SHAPE, "one"), (ProblemKind.SHAPE, "two")]
    assert rig.seen() == {"loras/one": "image loras/one", "loras/two/real.safetensors": "image loras/two/real.safetensors"}


def test_a_models_folder_that_cannot_be_written_is_reported_once_for_each_folder(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.many("loras", 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", fails(errno.ENOSPC))
        report = rig.links.refresh()
    assert kinds(report) == [(ProblemKind.NOT_LINKED, "loras")]
    assert "No space left" in str(report.problems[0])
    assert rig.links.refresh().made == 3


def test_a_models_folder_that_is_no_folder_is_reported(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.put("loras/a.safetensors")
    rig.models.rmdir()
    rig.models.write_text("")
    assert kinds(rig.links.refresh()) == [(ProblemKind.NOT_LINKED, "models")]


# --- names that exist twice -----------------------------------------------------------------------


def test_the_first_root_wins_and_the_second_steps_in(rig: Rig) -> None:
    cache = rig.folder / "host-cache"
    write(cache / "loras/both.safetensors", "cache")
    write(cache / "loras/cache.safetensors", "cache")
    rig.put("loras/both.safetensors")
    links = ModelLinks(rig.models, [rig.root, cache], large_folder=LARGE)
    report = links.refresh()
    assert rig.seen() == {"loras/both.safetensors": "volume loras/both.safetensors", "loras/cache.safetensors": "cache"}
    assert kinds(report) == [(ProblemKind.TWICE, "both.safetensors")]
    assert report.problems[0].other == str(rig.root / "loras/both.safetensors")
    (rig.root / "loras/both.safetensors").unlink()
    assert links.refresh().problems == ()
    assert rig.seen()["loras/both.safetensors"] == "cache"


def test_one_file_under_one_name_in_two_roots_is_no_problem(rig: Rig) -> None:
    rig.put("loras/a.safetensors")
    cache = rig.folder / "host-cache"
    cache.mkdir()
    (cache / "loras").symlink_to(rig.root / "loras")
    report = ModelLinks(rig.models, [rig.root, cache], within=[rig.volume]).refresh()
    assert report.problems == ()
    assert set(rig.seen()) == {"loras/a.safetensors"}


def test_a_folder_link_gives_way_when_a_second_root_has_the_folder_too(rig: Rig) -> None:
    expected = rig.many("loras")
    cache = rig.folder / "host-cache"
    links = ModelLinks(rig.models, [rig.root, cache], large_folder=LARGE)
    (cache / "loras").mkdir(parents=True)
    assert links.refresh().folders == 1, "the other's is empty"
    write(cache / "loras/new.safetensors", "cache")
    report = links.refresh()
    assert (report.folders, report.files) == (0, LARGE + 1)
    assert set(rig.seen()) == expected | {"loras/new.safetensors"}
    assert entries(rig.models) == ["loras"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("unet", "diffusion_models"), ("text_encoders", "clip"), ("controlnet", "t2i_adapter")],
)
def test_a_name_in_both_of_two_aliased_folders_is_reported(rig: Rig, first: str, second: str) -> None:
    rig.put(f"{first}/a.safetensors", f"{second}/a.safetensors", f"{first}/x/b.safetensors", f"{second}/c.safetensors")
    rig.many(f"{second}/x")
    rig.put(f"{second}/x/b.safetensors")
    report = rig.links.refresh()
    assert kinds(report) == [(ProblemKind.ALIAS, "a.safetensors"), (ProblemKind.ALIAS, "b.safetensors")]
    assert report.problems[0].other == str(rig.models / first / "a.safetensors")


def test_an_aliased_folder_that_is_a_link_to_the_other_is_no_problem(rig: Rig) -> None:
    rig.put("diffusion_models/a.safetensors")
    (rig.root / "unet").symlink_to("diffusion_models")
    assert rig.links.refresh().problems == ()
    assert set(rig.seen()) == {"diffusion_models/a.safetensors", "unet/a.safetensors"}


# --- links on the volume --------------------------------------------------------------------------


def test_links_within_the_volume_are_followed_and_others_reported(rig: Rig) -> None:
    write(rig.volume / "shared/s.safetensors", "shared")
    write(rig.folder / "outside/o.safetensors", "outside")
    rig.put("loras/a.safetensors")
    (rig.root / "loras/alias.safetensors").symlink_to("a.safetensors")
    (rig.root / "loras/shared").symlink_to(rig.volume / "shared")
    (rig.root / "loras/leaves.safetensors").symlink_to(rig.folder / "outside/o.safetensors")
    (rig.root / "vae").symlink_to(rig.folder / "outside")
    (rig.root / "loras/broken.safetensors").symlink_to("gone.safetensors")
    report = rig.fresh(within=[rig.volume]).refresh()
    assert set(rig.seen()) == {"loras/a.safetensors", "loras/alias.safetensors", "loras/shared/s.safetensors"}
    assert kinds(report) == [
        (ProblemKind.BROKEN, "broken.safetensors"),
        (ProblemKind.LEAVES_VOLUME, "leaves.safetensors"),
        (ProblemKind.LEAVES_VOLUME, "vae"),
    ]
    assert kinds(rig.links.refresh()).count((ProblemKind.LEAVES_VOLUME, "shared")) == 1, "the roots alone, when none is given"


def test_loops_end_and_are_reported(rig: Rig) -> None:
    expected = rig.many("loras")
    (rig.root / "loras/up").symlink_to("..")
    (rig.root / "loras/self").symlink_to("self")
    write(rig.root / "a/x.safetensors", "x")
    (rig.root / "a/to_b").symlink_to("../b")
    (rig.root / "b").mkdir()
    (rig.root / "b/to_a").symlink_to("../a")
    report = rig.links.refresh()
    assert kinds(report) == [
        (ProblemKind.LOOP, "to_a"),
        (ProblemKind.LOOP, "to_b"),
        (ProblemKind.BROKEN, "self"),
        (ProblemKind.LOOP, "up"),
    ]
    assert set(rig.seen()) == expected | {"a/x.safetensors", "b/to_a/x.safetensors"}


def test_comfyui_on_the_volume_is_left_alone(tmp_path: Path) -> None:
    volume = tmp_path / "workspace"
    write(volume / "models/loras/a.safetensors", "a")
    write(volume / "models/ComfyUI/models/vae/b.safetensors", "b")
    inside = volume / "models/ComfyUI/models"
    for _ in range(2):
        ModelLinks(inside, [volume / "models"]).refresh()
        assert set(seen_by_comfyui(inside)) == {"loras/a.safetensors", "vae/b.safetensors"}
    (tmp_path / "models").symlink_to(volume / "models")
    before = sorted(volume.rglob("*"))
    for models in (volume / "models", tmp_path / "models"):
        links = ModelLinks(models, [volume / "models"])
        assert (links.refresh().made, links.has(["loras"], "a.safetensors")) == (0, True)
    assert sorted(volume.rglob("*")) == before


# --- what goes wrong meanwhile --------------------------------------------------------------------


def fails(code: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@contextmanager
def scandir_fails(folder: Path, code: int, times: int) -> Iterator[list[int]]:
    """As a network volume may: opening one folder fails for a while. Yields how often it did."""
    real, failed = os.scandir, [0]

    def scandir(path: Any) -> Any:
        if str(path) == str(folder) and failed[0] < times:
            failed[0] += 1
            raise OSError(code, os.strerror(code))
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        patch.setattr(time, "sleep", lambda _: None)
        yield failed


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_folder_that_another_host_has_just_made_is_tried_again(rig: Rig, code: int) -> None:
    rig.put("loras/a.safetensors")
    with scandir_fails(rig.root / "loras", code, times=3) as failed:
        report = rig.links.refresh()
    assert (failed[0], report.files, report.problems) == (3, 1, ())


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOTCONN, errno.ESTALE])
def test_what_cannot_be_read_keeps_its_links(rig: Rig, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_LAG_S", 0.05)
    expected = rig.many("loras", 2) | rig.many("vae") | rig.many("loras/large")
    rig.links.refresh()
    for unreadable in ("loras", "vae", "loras/large", ""):
        for links in (rig.links, rig.fresh()):
            with scandir_fails(rig.root / unreadable, code, times=10**9):
                report = links.refresh()
            assert kinds(report) == [(ProblemKind.UNREADABLE, Path(unreadable).name or "models")]
            assert report.removed == 0
            assert set(rig.seen()) == expected
    assert (rig.links.refresh().made, rig.links.refresh().problems) == (0, ())


def test_a_folder_that_goes_while_it_is_read_is_gone_without_waiting(rig: Rig) -> None:
    rig.put("loras/a.safetensors", "vae/b.safetensors")
    rig.links.refresh()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path) == f"{rig.root}/loras":
            shutil.rmtree(path, ignore_errors=True)
        return real(path)

    def sleep(_: float) -> None:
        pytest.fail("it waits for a folder that is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        patch.setattr(time, "sleep", sleep)
        report = rig.links.refresh()
    assert (report.files, report.removed, report.problems) == (1, 1, ())


CHURN = """
import os, sys
folder, stop, count = sys.argv[1], sys.argv[2], 0
print("started", flush=True)
while not os.path.exists(stop):
    count += 1
    sub = f"{folder}/sub{count % 3}"
    os.makedirs(sub, exist_ok=True)
    for name in range(6):
        open(f"{sub}/{name}.tmp", "w").close()
        os.replace(f"{sub}/{name}.tmp", f"{sub}/{name}.safetensors")
    os.symlink("0.safetensors", f"{sub}/link.safetensors")
    for name in os.listdir(sub):
        os.unlink(f"{sub}/{name}")
    os.rmdir(sub)
"""


def test_a_volume_that_changes_all_the_while_ends_up_right(rig: Rig) -> None:
    rig.put("loras/steady.safetensors")
    stop = rig.folder / "stop"
    command = [sys.executable, "-c", CHURN, str(rig.root / "loras"), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as churn:
        assert churn.stdout is not None
        assert churn.stdout.readline() == "started\n"
        for _ in range(150):
            rig.links.refresh()
            assert (rig.models / "loras/steady.safetensors").read_text() == "volume loras/steady.safetensors"
        stop.touch()
    assert churn.returncode == 0
    rig.links.refresh()
    assert set(rig.seen()) == {"loras/steady.safetensors"}
    assert rig.links.refresh().problems == ()


def test_refreshes_take_turns(rig: Rig) -> None:
    rig.many("loras", 200)
    rig.bake("loras/put_loras_here")
    inside, most = [0], [0]
    real = sync.SyncPass.folder

    def folder(self: Any, relative: str, sources: Any) -> None:
        inside[0] += relative == ""
        most[0] = max(most[0], inside[0])
        real(self, relative, sources)
        inside[0] -= relative == ""

    reports: list[LinkReport] = []
    threads = [threading.Thread(target=lambda: reports.append(rig.links.refresh())) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync.SyncPass, "folder", folder)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert most == [1]
    assert sorted(report.made for report in reports) == [0, 0, 0, 200]


class Killed(BaseException):
    """The worker's end, in the middle of a refresh."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """No change to the disk after this many."""
    left = [step]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("symlink", "unlink", "rename", "replace", "mkdir", "rmdir", "makedirs"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def test_a_worker_killed_at_any_step_leaves_what_the_next_one_completes(tmp_path: Path) -> None:
    step, killed = 0, True
    while killed:
        rig, cache = Rig(tmp_path / str(step)), tmp_path / str(step) / "cache"
        roots = [rig.root, cache]
        rig.bake("checkpoints/put_checkpoints_here", "vae/image.safetensors")
        rig.put("vae/moves.safetensors", "checkpoints/goes.safetensors")
        rig.many("vanishes")
        rig.many("grows", LARGE - 1)
        rig.many("splits")
        ModelLinks(rig.models, roots, large_folder=LARGE).refresh()
        shutil.rmtree(rig.root / "vanishes")
        shutil.move(rig.root / "vae", cache / "vae")
        (rig.root / "checkpoints/goes.safetensors").unlink()
        rig.many("grows")
        rig.many("new/deep")
        write(cache / "splits/extra.safetensors", "cache")
        try:
            with killed_at(step):
                ModelLinks(rig.models, roots, large_folder=LARGE).refresh()
        except Killed:
            pass
        else:
            killed = False
        report = ModelLinks(rig.models, roots, large_folder=LARGE).refresh()
        expected = {f"{folder}/m{number}.safetensors" for folder in ("grows", "new/deep", "splits") for number in range(LARGE)}
        baked = {"checkpoints/put_checkpoints_here", "vae/image.safetensors"}
        assert set(rig.seen()) == expected | baked | {"vae/moves.safetensors", "splits/extra.safetensors"}, step
        assert report.problems == (), step
        # Between taking the dead link away and putting the folder there, only the dying process knows of it.
        assert {*entries(rig.models)} | {"vanishes"} == {"checkpoints", "grows", "new", "splits", "vae", "vanishes"}, step
        step += 1
    assert step > 15


# --- cheap to keep so -----------------------------------------------------------------------------


@contextmanager
def system_calls() -> Iterator[list[str]]:
    """What is asked about single paths, and what is changed."""
    calls: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(f"{name} {args[0]}")
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "lstat", "readlink", "symlink", "unlink", "mkdir", "utime", "rename", "replace"):
            patch.setattr(os, name, noted(name, getattr(os, name)))
        yield calls


def settle(folder: Path) -> None:
    """As if the folders below had last changed an hour ago."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            os.utime(path, ns=(0, time.time_ns() - 3_600_000_000_123))


def test_an_unchanged_volume_costs_listings_and_no_look_at_any_file(rig: Rig) -> None:
    rig.bake("loras/put_loras_here")
    rig.many("loras", 300)
    rig.many("large", 300)
    rig.links.refresh()
    settle(rig.models)
    rig.links.refresh()
    with system_calls() as calls:
        report = rig.links.refresh()
    assert (report.files, report.made, report.removed) == (600, 0, 0)
    assert not [call for call in calls if "m1.safetensors" in call]
    assert len(calls) < 40


def test_a_new_process_over_existing_links_changes_nothing(rig: Rig) -> None:
    rig.bake("loras/put_loras_here")
    rig.many("loras", 30)
    rig.many("large", 30)
    rig.links.refresh()
    with system_calls() as calls:
        report = rig.fresh().refresh()
    assert (report.files, report.folders, report.made, report.removed) == (60, 1, 0, 0)
    assert not [call for call in calls if call.split()[0] in {"symlink", "unlink", "mkdir", "rename", "replace", "utime"}]


@pytest.mark.parametrize("clock", ["exact", "whole seconds"])
def test_a_link_that_somebody_removes_is_made_again_even_within_one_tick(rig: Rig, clock: str) -> None:
    rig.put("loras/a.safetensors")
    rig.bake("loras/put_loras_here")
    rig.links.refresh()
    now_ns = time.time_ns() if clock == "exact" else time.time_ns() // 10**9 * 10**9
    os.utime(rig.models / "loras", ns=(now_ns, now_ns))
    rig.links.refresh()
    (rig.models / "loras/a.safetensors").unlink()
    os.utime(rig.models / "loras", ns=(now_ns, now_ns))
    rig.links.refresh()
    assert "loras/a.safetensors" in rig.seen()


# --- questions ------------------------------------------------------------------------------------


def test_has_says_what_comfyui_would_find(rig: Rig) -> None:
    rig.put("loras/a.safetensors", "loras/sub/b.safetensors", "clip/enc.safetensors", "diffusers/sdxl/model_index.json")
    rig.bake("vae/image.safetensors")
    rig.many("large")
    rig.links.refresh()
    has = rig.links.has
    assert has(["loras"], "a.safetensors")
    assert has(["vae", "loras"], "sub/b.safetensors")
    assert has(["vae"], "image.safetensors")
    assert has(["large"], "m0.safetensors")
    assert has([], "m0.safetensors")
    assert has(["text_encoders"], "enc.safetensors"), "ComfyUI looks into clip as well"
    assert has(["diffusers"], "sdxl")
    assert not has(["vae"], "a.safetensors")
    assert not has(["nowhere"], "a.safetensors")
    assert not has([], "nothing.safetensors")


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../vae/image.safetensors", "sub/../a.safetensors", "./a.safetensors", "a\0b"]
)
def test_has_takes_plain_names_only(rig: Rig, name: str) -> None:
    rig.put("loras/a.safetensors", "loras/sub/b.safetensors")
    rig.bake("vae/image.safetensors")
    rig.links.refresh()
    assert not rig.links.has(["loras"], name)


def test_has_wants_a_file_that_is_alive(rig: Rig) -> None:
    rig.put("loras/a.safetensors")
    rig.links.refresh()
    (rig.root / "loras/a.safetensors").unlink()
    assert not rig.links.has(["loras"], "a.safetensors")


def test_a_file_that_came_later_wants_a_refresh(rig: Rig) -> None:
    rig.put("small/a.safetensors")
    rig.many("large")
    rig.links.refresh()
    rig.put("small/late.safetensors", "large/late.safetensors", "large/sub/late.safetensors", "large/unfinished.part")
    late = [("small", "late.safetensors"), ("large", "late.safetensors"), ("large", "sub/late.safetensors")]
    assert not any(rig.links.has([folder], name) for folder, name in late)
    rig.links.refresh()
    assert all(rig.links.has([folder], name) for folder, name in late)
    assert not rig.links.has(["large"], "unfinished.part")


def test_has_looks_through_links_that_the_image_brings(rig: Rig) -> None:
    write(rig.folder / "opt/x.safetensors", "elsewhere")
    (rig.models / "vae").symlink_to(rig.folder / "opt")
    rig.links.refresh()
    assert rig.links.has(["vae"], "x.safetensors")
    assert rig.links.has([], "x.safetensors")


# --- links that name the volume by its mount --------------------------------------------------------


@pytest.fixture(params=pod_links.NAMES)
def mount(request: pytest.FixtureRequest) -> str:
    """What the volume is called where the links were made; here it is called otherwise."""
    name: str = request.param
    if Path(name).exists():
        pytest.skip(f"this machine has a {name}")
    return name


def test_links_made_under_the_volumes_other_name_are_read_as_below_it(rig: Rig, mount: str) -> None:
    rig.put("loras/a.safetensors", *(f"../store/vae/v{number}.safetensors" for number in range(LARGE)))
    write(rig.volume / "blobs/b1", "a blob")
    (rig.root / "vae").symlink_to(f"{mount}/store/vae")
    (rig.root / "loras/sub").symlink_to(f"{mount}/store/vae")
    (rig.root / "loras/linked.safetensors").symlink_to(f"{mount}/blobs/b1")
    links = rig.fresh(within=[rig.volume])
    for _ in range(2):
        report = links.refresh()
        assert report.problems == ()
        assert links.has(["vae"], "v0.safetensors")
        assert links.has(["loras"], "sub/v0.safetensors")
        assert (rig.models / "loras/linked.safetensors").read_text() == "a blob"
        assert (rig.models / "vae/v1.safetensors").read_text() == "volume ../store/vae/v1.safetensors"
    assert (report.made, report.removed) == (0, 0)
    (rig.volume / "store/vae/v0.safetensors").unlink()
    (rig.root / "loras/linked.safetensors").unlink()
    links.refresh()
    assert not (rig.models / "vae/v0.safetensors").exists()
    assert not (rig.models / "loras/sub/v0.safetensors").exists()


def test_a_models_folder_that_is_such_a_link_is_read_too(rig: Rig, mount: str) -> None:
    rig.root.rmdir()
    write(rig.volume / "ComfyUI/models/loras/a.safetensors", "a")
    rig.root.symlink_to(f"{mount}/ComfyUI/models")
    layout = pod_links.layout_at(rig.volume)
    assert layout.models == rig.volume / "ComfyUI/models"
    links = ModelLinks(rig.models, [layout.models], within=[rig.volume])
    assert links.refresh().problems == ()
    assert links.has(["loras"], "a.safetensors")


def test_one_that_leads_nowhere_even_so_is_told_with_what_mends_it(rig: Rig, mount: str) -> None:
    (rig.root / "vae").symlink_to(f"{mount}/gone")
    (problem,) = rig.fresh(within=[rig.volume]).refresh().problems
    assert problem.kind is ProblemKind.BROKEN
    assert f"rm {rig.root}/vae" in str(problem)
    rig.root.joinpath("vae").unlink()
    rig.root.rmdir()
    rig.root.symlink_to(f"{mount}/gone")
    (problem,) = rig.fresh(within=[rig.volume]).refresh().problems
    assert f"rm {rig.root}" in str(problem)


# --- what people read -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ProblemKind)
def test_a_problem_is_one_printable_sentence(kind: ProblemKind) -> None:
    text = str(LinkProblem(kind, os.fsdecode(b"/v/models/loras/bad\xff\nname {x}"), "/image/é"))
    assert text.isprintable()
    assert r"bad\udcff\nname {x}" in text
    assert text.endswith(".")


def test_the_log_says_what_changed_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.put(*(f"loras/{number}.safetensors" for number in range(8)))
    rig.bake(*(f"loras/{number}.safetensors" for number in range(7)))
    rig.links.refresh()
    made, problems = caplog.messages
    assert made.startswith("models: 1 file linked")
    assert problems.startswith("models: 7 names need attention: ")
    assert problems.count("is not used") == 5
    caplog.clear()
    rig.links.refresh()
    assert caplog.messages == []


# --- any history ----------------------------------------------------------------------------------

FOLDERS = ["a", "a/b", "a/b/c", "d"]
FILES = ["1.safetensors", "2.safetensors", "3.safetensors"]
CHANGES = st.tuples(
    st.sampled_from(["put", "put", "put into the second root", "remove", "remove folder", "bake", "new process"]),
    st.sampled_from(FOLDERS),
    st.sampled_from(FILES),
)


class History(Rig):
    """What may happen to a volume, a second root and the image's own files, and what ComfyUI should then see."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.second = folder / "second"
        self.baked: dict[str, str] = {}
        self.new_process()

    def new_process(self) -> None:
        self.links = ModelLinks(self.models, [self.root, self.second], large_folder=3)

    def change(self, what: str, folder: str, file: str) -> None:
        path = f"{folder}/{file}"
        if what == "put":
            self.put(path)
        elif what == "put into the second root":
            write(self.second / path, f"second {path}")
        elif what == "remove":
            (self.root / path).unlink(missing_ok=True)
        elif what == "remove folder":
            shutil.rmtree(self.root / folder, ignore_errors=True)
        elif what == "bake":
            self.bake_unless_linked(path)
        else:
            self.new_process()

    def bake_unless_linked(self, path: str) -> None:
        there = self.models / path
        if not any(above.is_symlink() for above in (there, *there.parents)):
            self.bake(path)
            self.baked[path] = f"image {path}"

    def expected(self) -> dict[str, str]:
        return seen_by_comfyui(self.second) | seen_by_comfyui(self.root) | self.baked


@given(history=st.lists(st.lists(CHANGES, max_size=8), min_size=1, max_size=5))
@settings(max_examples=120, deadline=None)
def test_after_any_history_comfyui_sees_what_it_should(
    history: list[list[tuple[str, str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rig = History(tmp_path_factory.mktemp("history"))
    for changes in history:
        for change in changes:
            rig.change(*change)
        rig.links.refresh()
        assert rig.seen() == rig.expected()
        for _ in range(2):
            report = rig.links.refresh()
            assert (report.made, report.removed) == (0, 0)
            rig.new_process()


# --- with ComfyUI's own listing -------------------------------------------------------------------


@pytest.fixture
def comfyui(rig: Rig, engine: Engine) -> Iterator[ComfyListing]:
    with ComfyListing(engine.comfyui_dir, rig.models.parent) as listing:
        yield listing


def test_comfyui_lists_what_is_linked_without_a_restart(rig: Rig, comfyui: ComfyListing) -> None:
    rig.put("loras/a.safetensors", "never_heard_of/b.bin", "clip/c.safetensors")
    rig.links.refresh()
    assert comfyui.names("loras") == ["a.safetensors"]
    assert comfyui.names("never_heard_of") == ["b.bin"]
    assert comfyui.names("text_encoders") == ["c.safetensors"]
    rig.put("loras/sub/new.safetensors")
    rig.many("vae")
    rig.links.refresh()
    assert comfyui.names("loras") == ["a.safetensors", "sub/new.safetensors"]
    assert comfyui.names("vae") == [f"m{number}.safetensors" for number in range(LARGE)]


def test_comfyui_survives_a_linked_folder_that_disappears(rig: Rig, comfyui: ComfyListing) -> None:
    rig.many("loras")
    rig.links.refresh()
    assert len(comfyui.names("loras")) == LARGE
    shutil.rmtree(rig.root / "loras")
    with pytest.raises(ListingError, match="FileNotFoundError"):
        comfyui.names("loras")
    rig.links.refresh()
    assert comfyui.names("loras") == []


def test_comfyui_sees_a_file_that_came_within_the_second_of_its_last_look(rig: Rig, comfyui: ComfyListing) -> None:
    sees_a_file_of_the_same_second(rig, comfyui)


def sees_a_file_of_the_same_second(rig: Rig, comfyui: ComfyListing) -> None:
    second_ns = time.time_ns() // 10**9 * 10**9
    rig.many("loras")
    rig.links.refresh()
    os.utime(rig.root / "loras", ns=(second_ns, second_ns))
    assert len(comfyui.names("loras")) == LARGE
    rig.put("loras/late.safetensors")
    os.utime(rig.root / "loras", ns=(second_ns, second_ns))
    assert "late.safetensors" not in comfyui.names("loras"), "this is the trap"
    assert not rig.links.has(["loras"], "late.safetensors"), "so it wants a refresh"
    rig.links.refresh()
    assert rig.links.has(["loras"], "late.safetensors")
    assert "late.safetensors" in comfyui.names("loras")


# --- on a network volume --------------------------------------------------------------------------


def test_on_a_network_volume_files_from_another_host_appear(rig_on_moosefs: Rig, moosefs: MooseFS) -> None:
    rig = rig_on_moosefs
    there = moosefs.mounts[1] / rig.volume.name / "models"
    rig.many("loras")
    rig.put("vae/a.safetensors")
    report = rig.links.refresh()
    assert (report.files, report.folders, report.problems) == (LARGE + 1, 1, ())
    write(there / "vae/b.safetensors", "from there")
    write(there / "loras/new/c.safetensors", "from there")
    (there / "vae/a.safetensors").unlink()
    report = rig.links.refresh()
    assert (report.files, report.problems) == (LARGE + 2, ())
    assert rig.links.has(["vae"], "b.safetensors")
    assert rig.links.has(["loras"], "new/c.safetensors")
    assert not rig.links.has(["vae"], "a.safetensors")
    assert (rig.links.refresh().made, rig.fresh().refresh().made) == (0, 0)


def test_on_a_network_volume_comfyui_sees_a_file_of_the_same_second(rig_on_moosefs: Rig, engine: Engine) -> None:
    with ComfyListing(engine.comfyui_dir, rig_on_moosefs.models.parent) as comfyui:
        sees_a_file_of_the_same_second(rig_on_moosefs, comfyui)


def test_a_volume_whose_mount_has_died_keeps_its_links(
    tmp_path: Path, moosefs: MooseFS, request: pytest.FixtureRequest
) -> None:
    mount = moosefs.mount()
    rig = Rig(tmp_path, mount / request.node.name)
    rig.many("loras")
    rig.put("vae/a.safetensors")
    rig.links.refresh()
    moosefs.kill_mount(moosefs.mounts.index(mount))
    for links in (rig.links, rig.fresh()):
        report = links.refresh()
        assert kinds(report) == [(ProblemKind.UNREADABLE, "models")]
        assert report.removed == 0
        assert not links.has(["vae"], "a.safetensors")
    assert (rig.models / "loras").is_symlink()
    assert (rig.models / "vae/a.safetensors").is_symlink()
