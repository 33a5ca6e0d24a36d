"""What the worker knows of ComfyUI: generated from recorded releases, whose recordings a running ComfyUI confirms."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from bench.bare import BareEngine
from devkit.engine.cache import cache_root
from devkit.local_worker import PROJECT
from scripts.make_catalog import fetch_wheel, templates
from scripts.make_comfyui import Refused, cut, known_text, newer_classes, read_hand, read_recordings, record
from worker.comfyui_data import KNOWN, is_older, known

if TYPE_CHECKING:
    from pathlib import Path

    from devkit.engine.build import Engine


@pytest.fixture
def hand() -> dict[str, Any]:
    """The hand-kept tables."""
    return read_hand()


@pytest.fixture
def recordings() -> list[dict[str, Any]]:
    """What was recorded of each release."""
    return read_recordings()


def test_the_file_is_what_its_sources_give(hand: dict[str, Any], recordings: list[dict[str, Any]]) -> None:
    workflows = dict(templates(fetch_wheel(cache_root() / "wheels")))
    assert KNOWN.read_text(encoding="utf-8") == known_text(recordings, hand, workflows), "run python -m scripts.make_comfyui"


def test_a_running_comfyui_answers_what_was_recorded(engine: Engine, tmp_path: Path, hand: dict[str, Any]) -> None:
    """The kit's engine has neither paid nodes nor those that want kornia; every class that it has is as it was recorded."""
    (tmp_path / "models").mkdir()
    with BareEngine(engine, tmp_path) as bare:
        found = record(bare.address, tmp_path / "models", hand)
    recorded = {each["version"]: each for each in read_recordings()}
    if found["version"] not in recorded:
        pytest.skip(f"ComfyUI {found['version']} is not recorded")
    expected = recorded[found["version"]]
    assert len(found["classes"]) > 350
    assert {name: expected["classes"].get(name) for name in found["classes"]} == found["classes"]
    assert {key: value for key, value in found.items() if key != "classes"} == {
        key: value for key, value in expected.items() if key != "classes"
    }
    assert not list((tmp_path / "models").rglob("in-*")), "the marks are gone again"


def test_the_release_that_the_image_has_is_recorded() -> None:
    found = re.search(r"^ARG COMFYUI_REF=v(\S+)$", (PROJECT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert found[1] in known().releases, "run python -m scripts.make_comfyui --record, see CONTRIBUTING.md"


def test_of_a_class_is_kept_what_is_read() -> None:
    mixed = {
        "input": {
            "required": {
                "model": ["MODEL"],
                "unet_name": [["in-unet.safetensors", "in-diffusion_models.safetensors"]],
                "weight_dtype": [["default", "fp8"], {"default": "default"}],
            },
            "optional": {"vae_name": ["COMBO", {"options": ["pixel_space", "in-vae.safetensors"]}], "strength": ["FLOAT", {}]},
        },
        "input_order": {"required": ["unet_name", "weight_dtype", "model"], "optional": ["vae_name", "strength"]},
        "output_node": True,
    }
    assert cut(mixed) == {
        "output": True,
        "inputs": {
            "unet_name": ["diffusion_models", "unet"],
            "weight_dtype": "COMBO",
            "model": "MODEL",
            "vae_name": ["vae"],
            "strength": "FLOAT",
        },
    }
    assert cut({"input": {"required": {"text": ["STRING"]}}, "output_node": False}) == {}


def test_a_table_without_a_reason_is_refused(hand: dict[str, Any], recordings: list[dict[str, Any]]) -> None:
    del hand["class_folders"]["impact"]["reason"]
    with pytest.raises(Refused, match=r"\[class_folders.impact\] has no reason"):
        known_text(recordings, hand, {})


def test_what_was_written_by_hand_and_comfyui_tells_itself_is_refused(
    hand: dict[str, Any], recordings: list[dict[str, Any]]
) -> None:
    hand["class_folders"]["impact"]["UNETLoader"] = "unet"
    with pytest.raises(Refused, match="ComfyUI itself tells the folder of UNETLoader"):
        known_text(recordings, hand, {})


def test_folders_that_comfyui_newly_reads_as_one_are_refused(hand: dict[str, Any], recordings: list[dict[str, Any]]) -> None:
    newer = copy.deepcopy(recordings[-1]) | {"version": "99.0.0"}
    newer["classes"]["VAELoader"]["inputs"]["vae_name"] = ["audio_vae", "vae"]
    with pytest.raises(Refused, match=r"VAELoader of ComfyUI 99.0.0 reads .* as one"):
        known_text([*recordings, newer], hand, {})


def test_a_newer_release_adds_what_is_new_and_says_what_is_gone(hand: dict[str, Any], recordings: list[dict[str, Any]]) -> None:
    newer = copy.deepcopy(recordings[-1]) | {"version": "99.0.0"}
    newer["classes"] |= {"NewLoader": {"inputs": {"strength": "FLOAT", "file": ["loras"]}}, "NewSaver": {"output": True}}
    del newer["classes"]["UNETLoader"]
    document = json.loads(known_text([newer, *recordings], hand, {}))
    assert document["version"] == "99.0.0"
    assert document["classes"]["99.0.0"] == ["NewLoader", "NewSaver"]
    assert "UNETLoader" in document["gone"]["99.0.0"]
    assert document["class_folders"]["NewLoader"] == {"file": "loras"}
    assert document["first_widgets"]["NewLoader"] == ["strength", "file"]
    assert "NewSaver" in document["outputs"]


def test_official_templates_tell_of_classes_that_no_recorded_release_has() -> None:
    def of(kind: str, **properties: str) -> dict[str, Any]:
        return {"type": kind, "properties": properties}

    workflow = {
        "nodes": [of("A", cnr_id="comfy-core", ver="0.40.1"), of("B"), of("Packed", cnr_id="pack"), of("sub"), of("Note")],
        "definitions": {"subgraphs": [{"id": "sub", "nodes": [of("A", cnr_id="comfy-core", ver="0.4.0")]}]},
    }
    assert newer_classes([workflow], {"Note"}) == {"A": "0.4.0", "B": ""}


def test_what_the_worker_reads_of_it() -> None:
    facts = known()
    assert facts.folder_of("UNETLoader", "unet_name") == "diffusion_models"
    assert facts.folder_of("UNETLoader", "weight_dtype") is None
    assert facts.folder_of("SAMLoader", "whatever") == "sams"
    assert facts.one_folder["diffusion_models"] == ("diffusion_models", "unet")
    assert ("unet", "diffusion_models") in facts.same_folders
    assert facts.is_no_output("KSampler")
    assert not facts.is_no_output("SaveImage")
    assert not facts.is_no_output("SomebodysNode")
    assert all(facts.has(name, facts.newest) for name in facts.warmup_kept)
    assert facts.has("IdeogramV1", "0.3.75")
    assert not facts.has("IdeogramV1", "0.33.0"), "it is gone"
    assert not facts.has("LTXVAudioVAELoader", "0.3.75"), "it came later"
    assert facts.is_own("QwenImage21Cache")
    assert not facts.is_own("SomebodysNode")
    assert is_older("0.3.75", "v0.33.0")
    assert not is_older("0.33.0", "0.33")
    assert known() is facts


def test_a_template_whose_models_would_be_sent_for_nothing_is_known(
    hand: dict[str, Any], recordings: list[dict[str, Any]]
) -> None:
    models = [{"name": "a.safetensors", "directory": "vae", "url": "https://huggingface.co/org/a/resolve/main/a.safetensors"}]
    loader = {"id": 1, "type": "VAELoader", "mode": 0, "properties": {"models": models}, "widgets_values": ["a.safetensors"]}
    workflow = {"nodes": [loader, {"id": 2, "type": "New", "mode": 0}, {"id": 3, "type": "Muted", "mode": 2}], "links": []}
    api = {"nodes": [{"id": 2, "type": "NewApi", "mode": 0}], "links": []}
    document = json.loads(known_text(recordings, hand, {"new.json": workflow, "api.json": api}))
    assert document["newer"] == {"Muted": "", "New": "", "NewApi": ""}
    assert document["lacking_templates"] == {"new": {"New": "2"}}
