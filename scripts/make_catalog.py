# ruff: noqa: INP001 - run as a module from the root; scripts is a folder of programs, no package
"""Generate worker/data/catalog.json from ComfyUI's official templates. Touches disk and, without --wheel, the network.

    python -m scripts.make_catalog                  # downloads the pinned wheel with pip
    python -m scripts.make_catalog --wheel FILE     # takes it from there
    python -m scripts.make_catalog --check          # writes nothing, fails when the file differs

Every template lists the models of its nodes. The same file often has several addresses, in repositories that carry a copy.
One is kept for each (folder, name), always the same one: first those where the file has that name at its source too (the others
were pasted wrong), then the one that most nodes give, then the first by alphabet. Its sha256 is kept if a template has it.
`by_template` says which of them, by number from 0, the active nodes of a template use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.editor.embedded_models import embedded_models
from worker.model_spec import ModelSpec, parse_spec
from worker.models.catalog import CATALOG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PACKAGE = "comfyui-workflow-templates-json"
VERSION = "0.1.123"
SHA256 = "fc321960cfc4f52dddc3ee111f33489b167eb7958028eb5b6a7f3fa8865a385e"
LICENCE = "MIT"
WHEEL = f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
DOWNLOAD_TIMEOUT_S = 300


def fetch_wheel(folder: Path) -> Path:
    """Return the pinned wheel in `folder`. Download it with pip if it is missing, and check its content in either case."""
    wheel = folder / WHEEL
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            command += ["--dest", scratch, f"{PACKAGE}=={VERSION}"]
            subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
            check_wheel(Path(scratch) / WHEEL).replace(wheel)
    return check_wheel(wheel)


def check_wheel(wheel: Path) -> Path:
    """Return the same path if its content is the pinned one. Raises `SystemExit` otherwise."""
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != SHA256:
        sys.exit(f"{wheel} has the sha256 {actual}, not {SHA256}: it is another version or was damaged")
    return wheel


def templates(wheel: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return every workflow in the wheel by its file name, sorted."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if member.endswith(".json"):
                document = json.loads(archive.read(member))
                if isinstance(document, dict) and isinstance(document.get("nodes"), list):
                    yield member.rpartition("/")[2], document


def graphs_in(template: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the template itself and each subgraph that it defines."""
    yield template
    yield from (template.get("definitions") or {}).get("subgraphs") or ()


def specs_in(template: dict[str, Any]) -> Iterator[ModelSpec]:
    """Yield every model for which a node of the template has an address, active or not."""
    for graph in graphs_in(template):
        for node in graph.get("nodes", ()):
            for entry in (node.get("properties") or {}).get("models") or ():
                sha256 = entry.get("hash") if entry.get("hash_type") == "SHA256" else None
                yield parse_spec(entry["directory"], entry["url"], name=entry["name"], sha256=sha256)


def chosen(specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Return one model for each (folder, name), sorted."""
    by_place: dict[tuple[str, str], list[ModelSpec]] = defaultdict(list)
    for spec in specs:
        by_place[spec.folder, spec.name].append(spec)
    return [_choose(by_place[place]) for place in sorted(by_place)]


def _choose(mirrors: Sequence[ModelSpec]) -> ModelSpec:
    name = mirrors[0].name.rpartition("/")[2]
    uses = Counter(spec.source for spec in mirrors)
    source = min(uses, key=lambda source: (source.file_name != name, -uses[source], str(source)))
    hashes = {spec.sha256 for spec in mirrors if spec.source == source and spec.sha256}
    return ModelSpec(mirrors[0].folder, mirrors[0].name, source, hashes.pop() if len(hashes) == 1 else None)


def catalog_text(workflows: Mapping[str, dict[str, Any]]) -> str:
    """The catalogue's file, from templates by name: a head, one model a line, then one template a line."""
    models = chosen(spec for workflow in workflows.values() for spec in specs_in(workflow))
    numbers = {(spec.folder, spec.name): number for number, spec in enumerate(models)}
    head = {"source": PACKAGE, "version": VERSION, "licence": LICENCE, "templates": len(workflows), "count": len(models)}
    fields = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines = ",\n".join("  " + json.dumps(_entry(model), ensure_ascii=False) for model in models)
    used = {name.removesuffix(".json"): _used(workflow, numbers) for name, workflow in sorted(workflows.items())}
    named = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in used.items() if found)
    return "{\n" + ",\n".join([*fields, f' "models": [\n{lines}\n ]', f' "by_template": {{\n{named}\n }}']) + "\n}\n"


def _used(workflow: dict[str, Any], numbers: Mapping[tuple[str, str], int]) -> list[int]:
    """Return the models of its active nodes."""
    return sorted({numbers[entry["directory"], entry["name"]] for entry in embedded_models(workflow)})


def _entry(spec: ModelSpec) -> dict[str, str]:
    entry = {"folder": spec.folder, "name": spec.name, "source": str(spec.source)}
    return entry | ({"sha256": spec.sha256} if spec.sha256 else {})


def save(text: str, output: Path, *, check: bool) -> int:
    """Write the file, or with `check` only compare it; 1 when it differs."""
    if check:
        same = output.is_file() and output.read_text(encoding="utf-8") == text
        print(f"{output} is {'up to date' if same else 'NOT what its source gives: run this without --check'}")
        return 0 if same else 1
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"{output}: {json.loads(text)['count']} models of {PACKAGE} {VERSION}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the script; 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, if you have it")
    parser.add_argument("--output", type=Path, default=CATALOG)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = check_wheel(options.wheel) if options.wheel else fetch_wheel(Path(scratch))
        text = catalog_text(dict(templates(wheel)))
    return save(text, options.output, check=options.check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
