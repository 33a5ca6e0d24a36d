# ruff: noqa: INP001 - run as a module from the root; scripts is a folder of programs, no package
"""Generate worker/data/comfyui.json, what the worker knows of ComfyUI. Touches disk and, with --record, a running ComfyUI.

    python -m scripts.make_comfyui --record 127.0.0.1:8188 --models DIR    # records that ComfyUI, then generates
    python -m scripts.make_comfyui                                         # generates from what is recorded
    python -m scripts.make_comfyui --check                                 # writes nothing, fails when the file differs

A recording (tests/comfyui/VERSION.json) is what a ComfyUI answers, cut down to what is read here. DIR is the folder of its
models: an empty file is put into each folder while it is asked, so that its answers tell which loader lists which folder.
All paid API nodes should be on and all custom nodes off. What no ComfyUI answers is in scripts/comfyui.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

PROJECT: Final = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))  # in a checkout the packages lie beside this folder

from devkit.engine.cache import cache_root  # noqa: E402 - found through the path above
from scripts.make_catalog import fetch_wheel, graphs_in, templates  # noqa: E402 - as above
from worker.comfyui_data import KNOWN  # noqa: E402 - as above
from worker.editor.embedded_models import embedded_models  # noqa: E402 - as above

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

HAND: Final = PROJECT / "scripts" / "comfyui.toml"
RECORDINGS: Final = PROJECT / "tests" / "comfyui"
_MARK, _SUFFIX = "in-", ".safetensors"
_PATIENCE_S: Final = 60.0


class Refused(Exception):  # noqa: N818 - the script says it, and ends
    """Why the file cannot be made, as a sentence."""


# --- recording ------------------------------------------------------------------------------------


def record(address: str, models: Path, hand: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the ComfyUI at this address answers, cut down to what is read here."""
    system = _get(address, "/system_stats")["system"]
    folders = _get(address, "/models")
    with _marked(models, {*folders, *_same_folders(hand)}):
        info = _get(address, "/object_info")
    try:
        replacements = _get(address, "/node_replacements")
    except urllib.error.HTTPError:
        replacements = {}  # older ones have none
    return {
        "version": system["comfyui_version"],
        "frontend": system["required_frontend_version"],
        "folders": sorted(folders),
        "replacements": {old: entries[0]["new_node_id"] for old, entries in sorted(replacements.items())},
        "classes": {name: cut(info[name]) for name in sorted(info)},
    }


def _get(address: str, path: str) -> Any:  # noqa: ANN401 - ComfyUI's JSON
    with urllib.request.urlopen(f"http://{address}{path}", timeout=_PATIENCE_S) as answer:
        return json.load(answer)


@contextlib.contextmanager
def _marked(models: Path, folders: Iterable[str]) -> Iterator[None]:
    marks = [models / folder / f"{_MARK}{folder}{_SUFFIX}" for folder in folders]
    try:
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        yield
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def cut(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a class what is read here: whether it is an output, and of a loader its inputs with their types and marks."""
    kept: dict[str, Any] = {"output": True} if definition.get("output_node") else {}
    inputs = {name: _cut_input(raw) for _, name, raw in _inputs(definition)}
    return kept | ({"inputs": inputs} if any(isinstance(each, list) for each in inputs.values()) else {})


def _inputs(definition: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    order = definition.get("input_order") or {}
    for section in ("required", "optional"):
        specs = (definition.get("input") or {}).get(section) or {}
        for name in order.get(section) or specs:
            yield section, name, specs[name]


def _cut_input(raw: Sequence[Any]) -> str | list[str]:
    """Return an input's type, or for a combo that lists marks the folders that they are in."""
    kind, options = raw[0], raw[1] if len(raw) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    found = [choice[len(_MARK) : -len(_SUFFIX)] for choice in choices or () if _is_mark(choice)]
    return sorted(found) or ("COMBO" if isinstance(kind, list) else str(kind))


def _is_mark(choice: object) -> bool:
    return isinstance(choice, str) and choice.startswith(_MARK) and choice.endswith(_SUFFIX)


# --- generating -----------------------------------------------------------------------------------


Workflows: TypeAlias = "Mapping[str, Mapping[str, Any]]"


def known_text(recordings: Iterable[Mapping[str, Any]], hand: Mapping[str, Any], workflows: Workflows) -> str:
    """Return the file's text, from recordings of releases, the hand-kept tables and the official templates by name.

    Raises `Refused` for a table without a reason, and where the recordings contradict what was written by hand.
    """
    releases = sorted(recordings, key=lambda each: _number(each["version"]))
    newest = releases[-1]
    tables = _without_reasons(hand)
    tables["class_folders"] = _class_folders(releases, tables)
    folders = {folder for each in releases for folder in each["folders"]} | set(_same_folders(tables))
    first, gone = _first_and_gone(releases)
    others = {*tables["editor"]["virtual"], *tables["editor"]["foreign_virtual"], *tables.pop("not_comfyui")}
    newer = {name: since for name, since in sorted(newer_classes(workflows.values(), others).items()) if name not in first}
    generated = {
        "version": newest["version"],
        "frontends": {each["version"]: each["frontend"] for each in releases},
        "classes": {each["version"]: [name for name in each["classes"] if first[name] is each] for each in releases},
        "gone": {each["version"]: gone[each["version"]] for each in releases if gone[each["version"]]},
        "newer": newer,
        "lacking_templates": _lacking_templates(workflows, newer.keys() | set(gone[newest["version"]])),
        "outputs": sorted({name for each in releases for name, cls in each["classes"].items() if cls.get("output")}),
        "first_widgets": _first_widgets(releases),
        "folders": sorted(folders - set(tables.pop("no_model_folders"))),
    }
    lines = [f" {json.dumps(key)}: {_laid_out(value)}" for key, value in (generated | tables).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _without_reasons(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the tables without their reasons; one of names or of groups is the names or the groups themselves."""
    held = {key: value for key, value in table.items() if key != "reason"}
    if "reason" not in table:
        if not all(isinstance(value, dict) for value in held.values()):
            raise Refused(f"scripts/comfyui.toml: [{path}] has no reason")
        return {key: _without_reasons(value, f"{path}.{key}".lstrip(".")) for key, value in held.items()}
    return next(iter(held.values())) if held.keys() <= {"names", "patterns"} else held


def _same_folders(tables: Mapping[str, Any]) -> list[str]:
    return [folder for group in tables["same_folders"].values() if isinstance(group, list) for folder in group]


def _class_folders(releases: Sequence[Mapping[str, Any]], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return by class the folder of its files, or the folders by input where they differ; ComfyUI's own classes first."""
    group_of = {frozenset(group): folder for folder, group in tables["same_folders"].items()}
    found: dict[str, Any] = {}
    for each in releases:
        for name, cls in each["classes"].items():
            inputs = {key: value for key, value in cls.get("inputs", {}).items() if isinstance(value, list)}
            folders = {key: value[0] if len(value) == 1 else group_of.get(frozenset(value)) for key, value in inputs.items()}
            if None in folders.values():
                raise Refused(f"{name} of ComfyUI {each['version']} reads {inputs} as one: [same_folders] does not say so")
            if folders:
                found[name] = folders
    by_hand = {name: folder for group in tables["class_folders"].values() for name, folder in group.items()}
    if twice := found.keys() & by_hand:
        raise Refused(f"scripts/comfyui.toml: ComfyUI itself tells the folder of {', '.join(sorted(twice))}")
    return {name: found[name] for name in sorted(found)} | {name: by_hand[name] for name in sorted(by_hand)}


def _first_and_gone(releases: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Mapping[str, Any]], dict[str, list[str]]]:
    """Return by class the release that first has it, and by release the classes that it has no longer."""
    first: dict[str, Mapping[str, Any]] = {}
    gone: dict[str, list[str]] = {}
    for each in releases:
        for name in each["classes"]:
            first.setdefault(name, each)
        gone[each["version"]] = sorted(first.keys() - each["classes"].keys())
    return first, gone


def _first_widgets(releases: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return by loader its widgets up to the last one that holds a file."""
    found: dict[str, list[str]] = {}
    for each in releases:
        for name, cls in each["classes"].items():
            inputs = cls.get("inputs", {})
            widgets = [key for key, kind in inputs.items() if isinstance(kind, list) or kind in _WIDGETS]
            files = [at for at, key in enumerate(widgets) if isinstance(inputs[key], list)]
            if files:
                found[name] = widgets[: files[-1] + 1]
    return {name: found[name] for name in sorted(found)}


_WIDGETS: Final = {"BOOLEAN", "COMBO", "FLOAT", "INT", "STRING"}


def newer_classes(workflows: Iterable[Mapping[str, Any]], others: Collection[str]) -> dict[str, str]:
    """Return by class of ComfyUI the oldest release that saved a node of it in an official template, "" where none says.

    The nodes of official templates are ComfyUI's own unless they name a pack.
    """
    found: dict[str, set[str]] = {}
    for workflow in workflows:
        graphs = list(graphs_in(dict(workflow)))
        subgraphs = {graph.get("id") for graph in graphs}
        for node in (node for graph in graphs for node in graph.get("nodes", ())):
            properties = node.get("properties") or {}
            of_a_pack = properties.get("aux_id") or properties.get("cnr_id", "comfy-core") != "comfy-core"
            if node["type"] not in subgraphs and node["type"] not in others and not of_a_pack:
                found.setdefault(node["type"], set()).add(properties.get("ver") or "")
    return {name: min(filter(None, versions), key=_number, default="") for name, versions in found.items()}


_IDLE: Final = (2, 4)  # muted, bypassed


def _lacking_templates(workflows: Workflows, lacking: Collection[str]) -> dict[str, dict[str, str]]:
    """Return by template with models the classes of its active nodes that the newest release lacks, each with a node's id."""
    found: dict[str, dict[str, str]] = {}
    for name, workflow in sorted(workflows.items()):
        nodes = (node for graph in graphs_in(dict(workflow)) for node in graph.get("nodes", ()))
        classes = {node["type"]: str(node["id"]) for node in nodes if node["type"] in lacking and node.get("mode") not in _IDLE}
        if classes and embedded_models(dict(workflow)):
            found[name.removesuffix(".json")] = dict(sorted(classes.items()))
    return found


_WIDTH: Final = 120


def _laid_out(value: object, indent: str = " ") -> str:
    """Return JSON with an entry a line where it is longer than a line, so that a change is a line."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _WIDTH or not isinstance(value, (dict, list)):
        return text
    below = indent + " "
    if isinstance(value, dict):
        lines = [f"{below}{json.dumps(key)}: {_laid_out(inner, below)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(below + _laid_out(inner, below) for inner in value) + f"\n{indent}]"


def read_hand() -> dict[str, Any]:
    """Return the hand-kept tables, with their reasons."""
    return tomllib.loads(HAND.read_text(encoding="utf-8"))


def read_recordings() -> list[dict[str, Any]]:
    """Return what was recorded of each release."""
    return [json.loads(path.read_bytes()) for path in sorted(RECORDINGS.glob("*.json"))]


def save_recording(recorded: Mapping[str, Any]) -> Path:
    """Write a recording, a class a line, and return its path."""
    path = RECORDINGS / f"{recorded['version']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {_laid_out(v)}" for k, v in recorded.items()) + "\n}\n", "utf-8")
    return path


def main(arguments: Sequence[str]) -> int:
    """Run the script; 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", metavar="HOST:PORT", help="a running ComfyUI to record first")
    parser.add_argument("--models", type=Path, help="with --record: the folder of its models")
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    options = parser.parse_args(arguments)
    if (options.record is None) != (options.models is None):
        parser.error("--record and --models go together")
    hand = read_hand()
    if options.record:
        print(save_recording(record(options.record, options.models, hand)))
    text = known_text(read_recordings(), hand, dict(templates(fetch_wheel(cache_root() / "wheels"))))
    if options.check:
        same = KNOWN.is_file() and KNOWN.read_text(encoding="utf-8") == text
        print(f"{KNOWN} is {'up to date' if same else 'NOT what its sources give: run this without --check'}")
        return 0 if same else 1
    KNOWN.write_text(text, encoding="utf-8")
    print(f"{KNOWN}: ComfyUI {json.loads(text)['version']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Refused as exc:
        sys.exit(f"scripts/make_comfyui.py: {exc}")
