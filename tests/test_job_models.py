"""A job's models and a manifest's: what is there costs a look, what is not is fetched and shown to ComfyUI."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from devkit.local_worker import PROJECT
from worker.errors import EnsureCancelled, FileIncomplete, ManifestInvalid, ModelError, VolumeFailed
from worker.links.model_links import LARGE_FOLDER, LinkReport, ModelLinks
from worker.model_spec import HubFile, ModelSpec
from worker.models.job_models import JobModels
from worker.models.sources import Sources
from worker.store.download import ReadyModel
from worker.store.layout import Layout
from worker.store.seals import Seal, write_seal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.base.progress import CancelToken, Listener
    from worker.models.job_models import Name
    from worker.store.download import How

DEADLINE_S = 10.0
WHOLE = b"\2\0\0\0\0\0\0\0{}"


def spec(name: str, folder: str = "loras") -> ModelSpec:
    return ModelSpec(folder, name, HubFile("org/repo", name))


class CountedLinks(ModelLinks):
    """Links that know how often the volume was looked at."""

    refreshes = 0

    def refresh(self) -> LinkReport:
        self.refreshes += 1
        return super().refresh()


class Shop:
    """A store that puts a file on the volume, or says where one is."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.asked: list[str] = []
        self.how: How = "downloaded"
        self.cache: Path | None = None

    def ensure(self, spec: ModelSpec, _progress: Listener, _cancel: CancelToken | None) -> ReadyModel:
        self.asked.append(spec.name)
        if self.cache:
            return ReadyModel(self.cache, "host_cache")
        path = self.layout.model(spec.folder, spec.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WHOLE)
        return ReadyModel(path, self.how)


class Machine:
    """A supply over a volume, ComfyUI's models folder and the container's own root for what is nearer."""

    def __init__(self, folder: Path) -> None:
        self.volume = Layout(folder / "volume")
        self.models = folder / "comfyui/models"
        self.host_cache = folder / "comfyui/near"
        self.volume.models.mkdir(parents=True)
        self.links = CountedLinks(self.models, [self.volume.models], within=[self.volume.root], host_cache=self.host_cache)
        self.shop = Shop(self.volume)
        self.built = 0
        self.job_models = JobModels(
            self.links,
            [self.volume, Layout(folder / "container")],
            self.host_cache,
            lambda: Sources.gather(volume_manifest=self.volume.manifest),
            self._build,
            hosts=("huggingface.co",),
        )

    def _build(self) -> Shop:
        self.built += 1
        return self.shop

    def put(self, name: str, content: bytes = WHOLE, folder: str = "loras") -> Path:
        path = self.volume.model(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def put_sealed(self, name: str) -> None:
        path = self.put(name)
        write_seal(self.volume.seal("loras", name), Seal(size=len(WHOLE), mtime=int(path.stat().st_mtime), sha256=None))

    def fetch(self, *specs: ModelSpec) -> None:
        self.job_models.fetch(specs, threading.Event(), lambda _: None)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    machine.links.refresh()
    machine.links.refreshes = 0
    yield machine
    machine.job_models.stop()


# --- all of it is there -------------------------------------------------------------------------


def test_a_manifest_of_which_everything_is_there_builds_nothing_and_refreshes_no_links(machine: Machine) -> None:
    names = [f"{number}.safetensors" for number in range(50)]
    for name in names:
        machine.put_sealed(name)
    machine.job_models.fetch_behind(map(spec, names))
    machine.job_models.fetch_first(map(spec, names))
    assert (machine.built, machine.links.refreshes) == (0, 0)


def test_only_what_is_left_is_fetched(machine: Machine) -> None:
    machine.put_sealed("there.safetensors")
    machine.job_models.fetch_first([spec("there.safetensors"), spec("left.safetensors")])
    assert machine.shop.asked == ["left.safetensors"]


def test_deciding_that_nothing_is_left_imports_nothing_that_fetches(machine: Machine, tmp_path: Path) -> None:
    machine.put_sealed("a.safetensors")
    machine.volume.manifest.write_text('[[model]]\nsource = "hf://org/repo/a.safetensors"\nfolder = "loras"\n')
    code = """
import sys
from pathlib import Path
from worker.boot import load_stores, read_sources
from worker.store.layout import Layout
from worker.links.model_links import ModelLinks
from worker.models.job_models import JobModels
from worker.settings import Settings
settings = Settings.from_env({"COMFYUI_BASE_DIR": sys.argv[1], "VOLUME_PATH": sys.argv[2]})
base, volume = Path(sys.argv[1]), Layout(Path(sys.argv[2]))
links = ModelLinks(base / "models", [volume.models])
job_models = JobModels(links, [volume], base, lambda: read_sources(settings), lambda: load_stores(settings))
wanted = job_models.manifest()
job_models.fetch_behind(wanted)
job_models.fetch_first(wanted)
print(len(wanted), [name for name in ("huggingface_hub", "worker.store.store", "worker.fetch.http") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base"), str(machine.volume.root)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1 []\n"


def test_a_worker_that_leaves_before_it_fetched_anything_begins_nothing(machine: Machine) -> None:
    machine.job_models.stop()
    with pytest.raises(EnsureCancelled):
        machine.job_models.fetch_first([spec("a.safetensors")])
    assert machine.built == 0


# --- what a job names ---------------------------------------------------------------------------


def test_a_name_that_is_there_costs_one_look_and_its_header_is_read_once(machine: Machine) -> None:
    machine.put("a.safetensors")
    machine.put("b.safetensors")
    names = [(("loras",), ("a.safetensors",)), (("loras",), ("b.safetensors",))]
    machine.links.refresh()
    assert machine.job_models.missing(names) == []
    with (
        mock.patch.object(os, "stat", side_effect=os.stat) as stat,
        mock.patch("worker.store.inventory.check_whole", side_effect=AssertionError("read again")),
    ):
        assert machine.job_models.missing(names) == []
    assert stat.call_count == 2


def test_a_name_that_came_since_is_found_by_a_fresh_look_and_one_that_did_not_is_missing(machine: Machine) -> None:
    late, absent = (("loras",), ("late.safetensors",)), (("loras",), ("absent.safetensors",))
    machine.put("late.safetensors")
    assert machine.job_models.missing([late, absent]) == [absent]
    assert machine.links.refreshes == 1
    assert machine.job_models.located([late, absent]) == [machine.models / "loras/late.safetensors"]


def test_a_copy_that_is_cut_off_is_named_until_it_is_whole(machine: Machine) -> None:
    name = (("loras",), ("a.safetensors",))
    machine.put("a.safetensors", WHOLE[:-1])
    for _ in range(2):
        with pytest.raises(FileIncomplete):
            machine.job_models.missing([name])
    machine.put("a.safetensors")
    assert machine.job_models.missing([name]) == []


# --- what the names mean ------------------------------------------------------------------------


def name(file: str, folder: str = "loras") -> Name:
    return (folder,), (file,)


RIGHT = '[[model]]\nsource = "hf://org/repo/{}"\nfolder = "loras"\n'


def test_a_typo_in_the_manifest_costs_only_jobs_that_need_what_nobody_else_knows(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.volume.manifest.write_text("[[model]]\nfolder = 1\n")
    given = [{"folder": "loras", "name": "mine.safetensors", "source": "hf://org/repo/mine.safetensors"}]
    machine.job_models.check_request(given)
    known = [name("mine.safetensors"), name("ae.safetensors", "vae")]
    assert None not in machine.job_models.specs(known, given, None).values()
    for _ in range(2):
        with pytest.raises(ManifestInvalid):
            machine.job_models.specs([name("nobody.safetensors")], given, None)
    assert machine.job_models.specs([name("nobody.safetensors")], given, None, optional=[name("nobody.safetensors")]) == {
        name("nobody.safetensors"): None
    }
    spellings = (("vae",), ("ae", "ae.safetensors"))
    assert machine.job_models.specs([spellings], None, None)[spellings], "a later spelling is asked for as well"
    with pytest.raises(ManifestInvalid):
        machine.job_models.check_manifests()
    assert caplog.text.count("is wrong") == 1


def test_the_last_manifest_that_was_right_holds_and_each_mistake_is_logged_once(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.volume.manifest.write_text(RIGHT.format("a.safetensors"))
    assert [spec.name for spec in machine.job_models.manifest()] == ["a.safetensors"]
    for text in ("folder = 1", "folder = 12", RIGHT.format("a.safetensors"), "folder = 1"):
        machine.volume.manifest.write_text(text)
        for _ in range(2):
            assert [spec.name for spec in machine.job_models.manifest()] == ["a.safetensors"]
    assert caplog.text.count("is wrong") == 3
    machine.volume.manifest.unlink()
    assert machine.job_models.manifest() == ()
    machine.job_models.check_manifests()


# --- shown to ComfyUI ---------------------------------------------------------------------------


def test_a_download_is_shown_at_once(machine: Machine) -> None:
    machine.job_models.fetch_first([spec("a.safetensors")])
    assert (machine.models / "loras/a.safetensors").read_bytes() == WHOLE


@pytest.mark.parametrize("how", ["ready", "by_hand", "adopted"])
def test_what_comfyui_sees_already_is_no_reason_to_look_at_all_folders(machine: Machine, how: How) -> None:
    machine.shop.how = how
    pinned = ModelSpec("loras", "a.safetensors", HubFile("org/repo", "a.safetensors"), "ab" * 32)
    machine.put("a.safetensors")
    machine.links.refresh()
    machine.links.refreshes = 0
    machine.job_models.fetch_first([pinned])
    assert (machine.shop.asked, machine.links.refreshes) == (["a.safetensors"], 0)
    unseen = ModelSpec("loras", "b.safetensors", HubFile("org/repo", "b.safetensors"))
    machine.job_models.fetch_first([unseen])
    assert (machine.models / "loras/b.safetensors").read_bytes() == WHOLE


@pytest.mark.parametrize("others", [1, LARGE_FOLDER])
def test_a_file_of_the_host_cache_is_linked_in_the_container_and_never_on_the_volume(machine: Machine, others: int) -> None:
    for number in range(others):
        machine.put(f"{number}.safetensors")
    machine.links.refresh()
    assert (machine.models / "loras").is_symlink() == (others >= LARGE_FOLDER)
    blob = machine.volume.host_cache_repo("org/repo") / "snapshots/c0ffee/a.safetensors"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(WHOLE)
    machine.shop.cache = blob
    for _ in range(2):  # a second worker process of this container finds the link there
        machine.fetch(spec("a.safetensors"))
    assert (machine.models / "loras/a.safetensors").resolve() == blob
    assert (machine.models / "loras/0.safetensors").read_bytes() == WHOLE
    assert not os.path.lexists(machine.volume.model("loras", "a.safetensors"))


def test_a_link_that_cannot_be_made_is_a_sentence(machine: Machine) -> None:
    machine.host_cache.write_text("in the way")
    machine.shop.cache = machine.put("elsewhere.safetensors")
    with pytest.raises(VolumeFailed, match="Not a directory") as caught:
        machine.fetch(spec("a.safetensors"))
    assert isinstance(caught.value, ModelError)
    assert str(machine.host_cache) in str(caught.value)
