"""The official catalogue: generated from its source, and enough for every official template."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.cache import cache_root
from scripts.make_catalog import VERSION, WHEEL, catalog_text, check_wheel, chosen, fetch_wheel, save, templates
from worker.graph.graph import parse_graph
from worker.graph.model_names import named_models
from worker.graph.paths import check_paths
from worker.model_spec import WEIGHT_SUFFIXES, HubFile, ModelSpec
from worker.models.catalog import CATALOG, Catalog
from worker.models.sources import Sources

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

HOSTS = ("huggingface.co", "civitai.com")


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The package with the templates, downloaded once and kept."""
    return fetch_wheel(cache_root() / "wheels")


@pytest.fixture(scope="session")
def official(wheel: Path) -> dict[str, dict[str, Any]]:
    """Every official template by name."""
    return dict(templates(wheel))


def test_the_catalogue_is_what_its_source_gives(official: dict[str, dict[str, Any]]) -> None:
    assert CATALOG.read_text(encoding="utf-8") == catalog_text(official), "run python -m scripts.make_catalog"


def test_the_catalogue_says_where_it_is_from() -> None:
    document = json.loads(CATALOG.read_text())
    assert document["version"] == VERSION
    assert document["licence"] == "MIT"
    assert document["count"] == len(document["models"]) == len(set(Catalog().paths)) > 300
    lines = [line for line in CATALOG.read_text().splitlines() if line.startswith("  {")]
    assert len(lines) == document["count"]  # a line for each, for readable diffs
    assert [(model["folder"], model["name"]) for model in document["models"]] == sorted(
        (model["folder"], model["name"]) for model in document["models"]
    )


def test_every_entry_of_the_catalogue_is_sound() -> None:
    catalog = Catalog()
    for path in catalog.paths:
        folder, _, name = path.partition("/")
        [spec] = catalog.find(name, (folder,))
        assert (spec.folder, spec.name) == (folder, name)
        assert isinstance(spec.source, HubFile)
        assert spec.source.file_name
        assert spec.source.file_name.endswith((".safetensors", ".sft"))


def test_a_damaged_package_is_refused(tmp_path: Path, wheel: Path) -> None:
    damaged = tmp_path / WHEEL
    damaged.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="has the sha256"):
        check_wheel(damaged)
    with pytest.raises(SystemExit, match="has the sha256"):
        fetch_wheel(tmp_path)


def test_the_script_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data" / "catalog.json"
    entry = {
        "name": "m.safetensors",
        "directory": "vae",
        "url": "https://huggingface.co/o/r/blob/main/m.safetensors?download=true",
    }
    node = {"id": 1, "type": "VAELoader", "properties": {"models": [entry]}}
    text = catalog_text(
        {"a.json": {"nodes": []}, "b.json": {"nodes": [], "definitions": {"subgraphs": [{"id": "x", "nodes": [node]}]}}}
    )
    assert save(text, output, check=True) == 1
    assert save(text, output, check=False) == 0
    assert save(text, output, check=True) == 0
    assert Catalog(output).find("m.safetensors", ("vae",)) == [mirror("o/r")]
    output.write_text(output.read_text().replace("vae", "VAE", 1))
    assert save(text, output, check=True) == 1
    said = capsys.readouterr().out
    assert said.count("NOT what its source gives") == 2
    assert "1 models of" in said


def mirror(repo: str, file: str = "m.safetensors", sha256: str | None = None) -> ModelSpec:
    return ModelSpec("vae", "m.safetensors", HubFile(repo, file), sha256)


@pytest.mark.parametrize(("mirrors", "repo"), [(["b/b", "a/a", "b/b"], "b/b"), (["b/b", "a/a"], "a/a")])
def test_of_mirrors_the_most_used_is_chosen_then_the_first_by_alphabet(mirrors: list[str], repo: str) -> None:
    for order in (mirrors, mirrors[::-1]):
        assert chosen(map(mirror, order)) == [mirror(repo)]


def test_an_address_of_another_file_is_not_chosen_however_often_it_is_given() -> None:
    wrong = mirror("a/a", "other.safetensors")
    assert chosen([wrong, wrong, mirror("z/z")]) == [mirror("z/z")]


def test_a_hash_is_kept_for_its_own_source_and_only_if_there_is_one() -> None:
    a, b = "a" * 64, "b" * 64
    assert chosen([mirror("x/x"), mirror("x/x", sha256=a)]) == [mirror("x/x", sha256=a)]
    assert chosen([mirror("x/x"), mirror("x/x"), mirror("y/y", sha256=a)]) == [mirror("x/x")]
    assert chosen([mirror("x/x", sha256=a), mirror("x/x", sha256=b)]) == [mirror("x/x")]


# --- every official template --------------------------------------------------------------------

# The widgets of each loader that hold a model, in their order: what the editor's list of values becomes in the API's format.
LOADER_INPUTS = {
    "AudioEncoderLoader": ["audio_encoder_name"],
    "CLIPLoader": ["clip_name"],
    "CLIPVisionLoader": ["clip_name"],
    "CheckpointLoaderSimple": ["ckpt_name"],
    "ConditioningLoader": ["conditioning_name"],
    "ControlNetLoader": ["control_net_name"],
    "DualCLIPLoader": ["clip_name1", "clip_name2"],
    "FrameInterpolationModelLoader": ["model_name"],
    "ImageOnlyCheckpointLoader": ["ckpt_name"],
    "LTXAVTextEncoderLoader": ["text_encoder", "ckpt_name"],
    "LTXVAudioVAELoader": ["ckpt_name"],
    "LatentUpscaleModelLoader": ["model_name"],
    "LoadBackgroundRemovalModel": ["bg_removal_name"],
    "LoadDA3Model": ["model_name"],
    "LoadMoGeModel": ["model_name"],
    "LoraLoader": ["lora_name"],
    "LoraLoaderModelOnly": ["lora_name"],
    "ModelPatchLoader": ["name"],
    "OpticalFlowLoader": ["model_name"],
    "QuadrupleCLIPLoader": ["clip_name1", "clip_name2", "clip_name3", "clip_name4"],
    "SAM3DBody_Loader": ["model_file"],
    "StyleModelLoader": ["style_model_name"],
    "UNETLoader": ["unet_name"],
    "UpscaleModelLoader": ["model_name"],
    "VAELoader": ["vae_name"],
}
INACTIVE = (2, 4)  # muted, bypassed


class ApiNames:
    """The part of a template's API graph that names models, as the editor's export makes it."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        self.subgraphs = {inner["id"]: inner for inner in (template.get("definitions") or {}).get("subgraphs") or ()}
        self.graph: dict[str, dict[str, Any]] = {}
        self.add(template, "")

    def add(self, container: Mapping[str, Any], prefix: str) -> None:
        for node in container["nodes"]:
            if node.get("mode") in INACTIVE or "Note" in node["type"]:
                continue
            node_id = f"{prefix}{node['id']}"
            values = node.get("widgets_values") or []
            values = list(values.values()) if isinstance(values, dict) else values
            if inner := self.subgraphs.get(node["type"]):
                self.add(inner, f"{node_id}:")
                for (target, name), value in zip(self.promoted(inner, f"{node_id}:"), values, strict=False):
                    if target in self.graph and isinstance(value, str):
                        self.graph[target]["inputs"][name] = value
                continue
            names = LOADER_INPUTS.get(node["type"], [f"widget_{number}" for number in range(len(values))])
            inputs = {name: value for name, value in zip(names, values, strict=False) if isinstance(value, str)}
            self.graph[node_id] = {"class_type": node["type"], "inputs": inputs}

    def promoted(self, inner: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        """(node, input) of each input of a subgraph that stands for a widget inside it, in order."""
        links = {link["id"]: link for link in inner["links"]}
        nodes = {node["id"]: node for node in inner["nodes"]}
        for slot in inner["inputs"]:
            targets = (self.target(links[link], nodes, prefix) for link in slot.get("linkIds") or () if link in links)
            if found := next(filter(None, targets), None):
                yield found

    def target(self, link: Mapping[str, Any], nodes: Mapping[Any, Any], prefix: str) -> tuple[str, str] | None:
        node = nodes.get(link["target_id"])
        slot = node["inputs"][link["target_slot"]] if node else {}
        if not node or "widget" not in slot:
            return None
        if inner := self.subgraphs.get(node["type"]):
            at = next(number for number, each in enumerate(inner["inputs"]) if each["name"] == slot["name"])
            below = {**inner, "inputs": inner["inputs"][at : at + 1]}
            return next(self.promoted(below, f"{prefix}{node['id']}:"), None)
        return f"{prefix}{node['id']}", slot["widget"]["name"]


def test_every_model_of_every_official_template_is_resolved_by_name_alone(
    official: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = Sources.read()
    resolved, asked = Counter[str](), Counter[str]()
    lost = []
    for title, template in official.items():
        graph = ApiNames(template).graph
        values = [value for node in graph.values() for value in node["inputs"].values()]
        models = named_models(parse_graph(graph)) if graph else ()
        assert len(models) == sum(value.lower().endswith(WEIGHT_SUFFIXES) for value in values), title
        for model in models:
            asked[title] += 1
            spec = sources.find(model.name, model.folders)
            if spec and spec.folder in model.folders and spec.name == model.name:
                resolved[title] += 1
            else:
                lost.append(f"{title}: {model}")
    with capsys.disabled():
        sys.stdout.write(f"\nofficial templates: {resolved.total()} of {asked.total()} models, in {len(asked)} templates\n")
    assert not lost
    assert resolved.total() == asked.total() > 1000


def test_every_model_of_every_official_template_is_resolved_by_its_own_metadata_too(
    official: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    empty = tmp_path / "catalog.json"
    empty.write_text('{"models": []}')
    bare = Sources.read(catalog=empty)
    by_metadata = found = 0
    for template in official.values():
        sources = bare.with_workflow({"extra_pnginfo": {"workflow": template}}, HOSTS)
        assert not sources.refused
        for model in named_models(ApiNames(template).graph):
            by_metadata += 1
            found += sources.find(model.name, model.folders) is not None
    assert found / by_metadata > 0.9  # some templates have nodes without metadata: those are what the catalogue is for


def test_no_official_template_is_taken_for_unsafe(official: dict[str, dict[str, Any]]) -> None:
    for template in official.values():
        check_paths(ApiNames(template).graph)


def test_asking_the_catalogue_first_reads_its_file_and_not_before(tmp_path: Path) -> None:
    sources = Sources.read(catalog=tmp_path / "catalog.json")  # not there yet
    (tmp_path / "catalog.json").write_text(CATALOG.read_text())
    assert sources.find("ae.safetensors", ("vae",)) == Sources.read().find("ae.safetensors", ("vae",))
