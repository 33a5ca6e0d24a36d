"""The examples are what their page says: sound graphs, whose models are all known, and which the real ComfyUI takes."""

from __future__ import annotations

import base64
import json
import re
import tomllib
import urllib.request
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from client.request import Wishes, build
from devkit.engine.cache import cache_root
from devkit.hub import Hub as StandIn
from devkit.local_worker import PROJECT
from scripts.make_catalog import fetch_wheel
from worker import plan
from worker.base.text import size_text
from worker.fetch.http import Network
from worker.fetch.hub import Hub
from worker.graph.graph import is_link, parse_graph
from worker.graph.model_names import named_models
from worker.graph.overrides import apply_overrides
from worker.graph.paths import check_paths
from worker.job import Request
from worker.model_spec import HubFile
from worker.models.catalog import Catalog
from worker.models.sources import Sources
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from devkit.local_worker import LocalWorker

EXAMPLES = PROJECT / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/workflow.json"))
REQUESTS = sorted(path.parent.name for path in EXAMPLES.glob("*/request.json"))
# Which official template is about the same files.
TEMPLATES = {
    "flux-schnell": "flux_schnell",
    "z-image-turbo": "image_z_image_turbo",
    "wan2.2-5b": "video_wan2_2_5B_ti2v",
    "upscale": "utility-gan_upscaler",
}
GB = 1_000_000_000


def workflow(name: str) -> dict[str, Any]:
    graph: dict[str, Any] = json.loads((EXAMPLES / name / "workflow.json").read_text())
    return graph


def manifest(name: str) -> dict[tuple[str, str], Any]:
    """The models of an example's list, by folder and name."""
    volume = Sources.read(volume_manifest=EXAMPLES / name / "models.toml").volume
    assert volume is not None
    return {(spec.folder, spec.name): spec for spec in volume.models.specs}


def test_there_is_one_of_each_kind() -> None:
    assert set(NAMES) == TEMPLATES.keys()
    folders = {name: {folder for folder, _ in manifest(name)} for name in NAMES}
    assert folders["flux-schnell"] == {"checkpoints"}
    assert folders["z-image-turbo"] == folders["wan2.2-5b"] == {"diffusion_models", "text_encoders", "vae"}
    assert folders["upscale"] == {"upscale_models"}


# --- the models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A stand-in that holds a small file of the right name for each model of the examples."""
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        for spec in manifest(name).values():
            path = root / spec.source.repo / spec.source.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\2\0\0\0\0\0\0\0{}" + str(spec).encode())
    with StandIn(root) as stand_in:
        yield stand_in


def planned(name: str, environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Any:
    """What `python -m worker plan` says of an example's workflow, and its exit status."""
    settings = Settings.from_env(environ)
    hub = Hub(settings.hf_endpoint, Network(), patience_s=0.2)
    status = plan.run([str(EXAMPLES / name / "workflow.json"), "--json"], settings, hub)
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_plan_finds_every_model_in_the_catalogue_and_the_list_names_the_same(
    name: str, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"VOLUME_PATH": str(tmp_path), "COMFYUI_DIR": str(tmp_path / "none"), "HF_ENDPOINT": hub.endpoint}
    status, said = planned(name, environ, capsys)
    specs = manifest(name)
    unpromised = [item for item in said["models"] if not specs[item["folder"], item["name"]].sha256]
    assert {(item["folder"], item["name"]): item["source"] for item in said["models"]} == {
        place: str(spec.source) for place, spec in specs.items()
    }
    assert {item["known_by"] for item in said["models"]} == {Catalog.title}
    assert {item["state"] for item in unpromised} == {"fetch"}
    # The stand-in's file has not the content that the catalogue promises: that this is seen is right.
    assert {item["state"] for item in said["models"] if item not in unpromised} <= {"refused"}
    assert status == (0 if len(unpromised) == len(specs) else 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_can_run_as_far_as_can_be_told_without_a_network(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"VOLUME_PATH": str(tmp_path), "COMFYUI_DIR": str(tmp_path / "none"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    status, said = planned(name, environ, capsys)
    assert (status, said["can_run"], said["problems"]) == (0, True, [])
    assert {item["state"] for item in said["models"]} == {"no answer"}
    for place, spec in manifest(name).items():
        target = tmp_path / "models" / "/".join(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"\2\0\0\0\0\0\0\0{}")
        assert str(spec.source).startswith("hf://")
    status, said = planned(name, environ, capsys)
    assert (status, {item["state"] for item in said["models"]}) == (0, {"by hand"})


@pytest.mark.parametrize("name", NAMES)
def test_the_lists_say_what_the_catalogue_says_and_nothing_else(name: str) -> None:
    text = (EXAMPLES / name / "models.toml").read_text()
    assert [set(entry) - {"sha256"} for entry in tomllib.loads(text)["model"]] == [{"source", "folder"}] * len(manifest(name))
    for (folder, model), spec in manifest(name).items():
        [known] = Catalog().find(model, (folder,))
        assert spec == known
        assert isinstance(spec.source, HubFile)


# --- the graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_workflow_is_sound_and_every_title_names_one_node(name: str) -> None:
    request = Request.parse({"workflow": workflow(name)})
    graph = parse_graph(request.workflow)
    check_paths(graph)
    assert {model.name for model in named_models(graph)} == {model for _, model in manifest(name)}
    titles = [node["_meta"]["title"] for node in graph.values()]
    assert len(set(titles)) == len(titles)
    for node in graph.values():
        for key, value in node["inputs"].items():
            if not is_link(graph, value):
                changed = apply_overrides(graph, {f"{node['_meta']['title']}.{key}": value})
                assert changed == graph, f"--set {node['_meta']['title']}.{key} means that input"


@pytest.mark.parametrize("name", REQUESTS)
def test_each_request_is_the_workflow_and_more(name: str) -> None:
    value = json.loads((EXAMPLES / name / "request.json").read_text())
    request = Request.parse(value["input"])
    assert request.workflow == workflow(name)
    assert value["input"].keys() - {"workflow"}, "without more it would say nothing that the workflow does not"
    changed = apply_overrides(parse_graph(request.workflow), request.set or {})
    assert (changed != request.workflow) == bool(request.set)
    for file in value["input"].get("images", ()):
        assert base64.b64decode(file["image"].partition(",")[2]).startswith(b"\x89PNG")
        assert file["name"] in json.dumps(request.workflow)


_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def complaints(graph: Mapping[str, Any], info: Mapping[str, Any], *, choices: bool) -> Iterator[str]:
    """What ComfyUI would not take in a graph, by its own definitions of the classes."""
    files = {model.name for model in named_models(parse_graph(dict(graph)))} | {"in.png"}
    for node_id, node in graph.items():
        if node["class_type"] not in info:
            yield f"{node_id}: no class {node['class_type']}"
            continue
        declared = info[node["class_type"]]["input"]
        known = dict(_dependent(declared)) | declared.get("required", {}) | declared.get("optional", {})
        yield from (f"{node_id}: lacks {key}" for key in declared.get("required", {}).keys() - node["inputs"].keys())
        for key, value in node["inputs"].items():
            if key not in known:
                yield f"{node_id}: has no input {key}"
            elif isinstance(value, list):
                given = info[graph[value[0]]["class_type"]]["output"][value[1]]
                if given != known[key][0]:
                    yield f"{node_id}: {key} takes {known[key][0]}, gets {given}"
            elif value not in files and (wrong := _wrong(value, known[key], choices=choices)):
                yield f"{node_id}: {key} is {value!r}, {wrong}"


def _dependent(declared: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Inputs that depend on a choice. Releases before those that have such choices had them beside it, under the same names."""
    for group in ("required", "optional"):
        for spec in declared.get(group, {}).values():
            for option in spec[1].get("options", ()) if spec[0] == _DYNAMIC else ():
                yield from _dependent(option["inputs"])
                for inner in option["inputs"].values():
                    yield from inner.items()


def _wrong(value: object, declared: list[Any], *, choices: bool) -> str | None:
    kind, options = declared[0], declared[1] if len(declared) > 1 else {}
    offered = kind if isinstance(kind, list) else options.get("options")
    if kind == _DYNAMIC:
        offered = [option["key"] for option in options["options"]]
    if offered is not None:
        return f"not one of {offered}" if choices and value not in offered else None
    types: dict[str, tuple[type, ...]] = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,)}
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return f"no {kind}"
    if isinstance(value, (int, float)):
        low, high = options.get("min", value), options.get("max", value)
        if not low <= value <= high or (kind == "INT" and (value - low) % options.get("step", 1)):
            return f"not from {low} to {high} in steps of {options.get('step', 1)}"
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine_of", ["classic", "modern"])
def test_every_class_and_input_is_one_that_comfyui_has(name: str, engine_of: str) -> None:
    info = json.loads((PROJECT / f"tests/ui/object_info_{engine_of}.json").read_text())
    assert list(complaints(workflow(name), info, choices=False)) == []


def test_a_wrong_graph_has_complaints() -> None:
    info = json.loads((PROJECT / "tests/ui/object_info_modern.json").read_text())
    graph = workflow("wan2.2-5b")
    graph["7"]["inputs"] |= {"width": 1281, "vae": ["1", 0], "colour": "red"}
    del graph["8"]["inputs"]["steps"]
    graph["10"]["class_type"] = "MakeVideo"
    said = list(complaints(graph | {"11": {**graph["11"], "inputs": {}}}, info, choices=True))
    for words in ("7: width is 1281", "takes VAE, gets MODEL", "no input colour", "8: lacks steps", "no class MakeVideo"):
        assert any(words in line for line in said), words


# --- on the real ComfyUI ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_one_that_the_engine_offers(name: str, worker: LocalWorker) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{worker.comfyui_port}/object_info", timeout=60) as response:
        info = json.load(response)
    assert list(complaints(workflow(name), info, choices=True)) == []


# The tests' own tiny weights in place of the real ones, and sizes to match; through the client's --set, by title.
SMALL = {
    "flux-schnell": ["Checkpoint.ckpt_name=tiny_sd3_full.ckpt", "Size.width=64", "Size.height=64", "Sampler.steps=2"],
    "z-image-turbo": [
        "Diffusion model.unet_name=tiny_sd3.safetensors",
        "Text encoder.clip_name=tiny_clip_l.pt",
        "Text encoder.type=sd3",
        "VAE.vae_name=tiny_taesd3_vae.safetensors",
        "Sampler.steps=2",
        "Size.width=64",
        "Size.height=64",
    ],
    "wan2.2-5b": [
        "Diffusion model.unet_name=tiny_hunyuanvideo.safetensors",
        "Text encoder.clip_name=tiny_clip_l.pt",
        "Text encoder.type=stable_diffusion",
        "VAE.vae_name=tiny_wan_vae.safetensors",
        "Size.width=64",
        "Size.height=64",
        "Size.length=9",
        "Sampler.steps=2",
    ],
    "upscale": ["Upscaler.model_name=tiny_esrgan_x4.safetensors"],
}


@pytest.mark.parametrize(
    ("name", "file"), [(name, "workflow.json") for name in SMALL] + [(name, "request.json") for name in REQUESTS]
)
def test_the_real_comfyui_runs_them_on_tiny_weights(name: str, file: str, worker: LocalWorker) -> None:
    images = [] if file == "request.json" or name != "upscale" else [f"in.png={PROJECT / 'devkit/workflows/in.png'}"]
    job = build(Wishes(str(EXAMPLES / name / file), SMALL[name], images))
    answer = worker.runsync(job["input"])
    assert answer["status"] == "COMPLETED", answer
    [made] = answer["output"]["images"]
    data = base64.b64decode(made["data"])
    assert data[4:8] == b"ftyp" if name == "wan2.2-5b" else data.startswith(b"\x89PNG")
    if file == "workflow.json":
        assert made["filename"].startswith({"upscale": "upscaled"}.get(name, name))


# --- the page -----------------------------------------------------------------------------------


def rows() -> dict[str, list[str]]:
    """The table of the page: the cells of each example."""
    lines = (EXAMPLES / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| [")]
    return {row[0][1:].partition("]")[0]: row for row in cells}


def sizes(template: str, names: list[str]) -> int:
    """How many bytes ComfyUI's own template says that these files have: file by file in its note, else in the index."""
    with zipfile.ZipFile(fetch_wheel(cache_root() / "wheels")) as wheel:
        folder = "comfyui_workflow_templates_json/templates"
        text = wheel.read(f"{folder}/{template}.json").decode()
        index = json.loads(wheel.read(f"{folder}/index.json"))
    found = {
        name: float(match[1]) * {"GB": 1024**3, "MB": 1024**2}[match[2]]
        for name in names
        if (match := re.search(re.escape(name) + r"\]\([^)]*\) \(([\d.]+) (GB|MB)\)", text))
    }
    if len(found) == len(names):
        return round(sum(found.values()))
    [size] = [entry["size"] for group in index for entry in group["templates"] if entry["name"] == template]
    return int(size)


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_figures_are_those_of_the_catalogues_source(name: str) -> None:
    _, _, fetch, gpu, licence = rows()[name]
    names = [model for _, model in manifest(name)]
    size_bytes = sizes(TEMPLATES[name], names)
    assert fetch == f"{_rounded(size_bytes)} in {len(names)} file{'s' if len(names) > 1 else ''}"
    assert gpu == f"{next(gb for gb in (16, 24, 48, 80) if gb * GB >= size_bytes + 2 * GB)} GB"
    assert re.fullmatch(r"\[(Apache-2\.0|BSD-3-Clause)\]\(https://github\.com/[\w./-]+\)", licence)


def _rounded(size_bytes: int) -> str:
    """As plan writes it; without the tenth of a megabyte."""
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes < GB else size_text(size_bytes)


def test_the_page_names_every_example_and_each_of_its_files() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert rows().keys() == set(NAMES)
    assert all(f"({name}/request.json)" in text for name in REQUESTS)
    for example, pair in re.findall(r"examples/([\w.-]+)/workflow\.json.*?--set ([\w]+\.[\w]+)=", text):
        title, _, key = pair.partition(".")
        assert any(node["_meta"]["title"] == title and key in node["inputs"] for node in workflow(example).values()), pair
