"""Which kept answers about node classes a worker uses while ComfyUI boots: the volume's, the image's, or none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from worker.engine.definitions import StoredDefinitions
from worker.engine.process import EngineCommand

if TYPE_CHECKING:
    from pathlib import Path

VERSION = '__version__ = "0.33.0"\n'


def everything(*classes: str, **more: object) -> dict[str, Any]:
    versions = {"comfyui": "0.33.0", "frontend": None}
    return {"versions": versions, "classes": {name: {} for name in classes}, "replacements": {}, **more}


class Scene:
    """ComfyUI's folder with what the image recorded of it, and a volume."""

    def __init__(self, folder: Path) -> None:
        self.comfyui = folder / "comfyui"
        self.nodes = self.comfyui / "custom_nodes"
        (self.nodes / "__pycache__").mkdir(parents=True)
        (self.nodes / "own.py").touch()
        (self.comfyui / "comfyui_version.py").write_text(VERSION)
        recorded = everything("Image", of={"version": VERSION, "packs": ["own.py"]})
        (self.comfyui / "definitions.json").write_text(json.dumps(recorded))
        command = EngineCommand(("python", "main.py"), self.comfyui, {})
        self.kept = StoredDefinitions(folder / "volume", command, [self.nodes, folder / "base/custom_nodes"])

    def has(self) -> set[str]:
        """Return which of two classes the kept answers know."""
        kept = self.kept.read()
        return set(kept._classes) if kept else set()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_the_volume_s_come_before_the_image_s(scene: Scene) -> None:
    assert scene.has() == {"Image"}
    assert scene.kept.wanted(), "the image's were given without this machine's GPU"
    scene.kept.write(everything("Volume"), lambda _: False)
    assert scene.has() == {"Volume"}
    assert not scene.kept.wanted()


def test_another_version_or_another_pack_is_not_what_the_image_recorded(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "base/custom_nodes/pack").mkdir(parents=True)
    assert scene.has() == set()
    (tmp_path / "base/custom_nodes/pack").rmdir()
    assert scene.has() == {"Image"}
    (scene.nodes / "own.py").unlink()
    assert scene.has() == set()
    (scene.nodes / "own.py").touch()
    (scene.comfyui / "comfyui_version.py").write_text(VERSION.replace("33", "34"))
    assert scene.has() == set()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"of": {}}', "\x00"])
def test_a_record_that_cannot_be_read_is_none(scene: Scene, text: str) -> None:
    (scene.comfyui / "definitions.json").write_text(text)
    assert scene.has() == set()


def test_a_volume_s_record_that_cannot_be_read_leaves_the_image_s(scene: Scene, tmp_path: Path) -> None:
    scene.kept.write(everything("Volume"), lambda _: False)
    next((tmp_path / "volume").iterdir()).write_text("{")
    assert scene.has() == {"Image"}
