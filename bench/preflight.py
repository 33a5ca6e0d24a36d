"""What is refused before anything is fetched for it, held against the real ComfyUI as the judge; and how long that takes.

The graphs are ComfyUI's official templates, converted, and the project's workflows with some of their inputs spoilt. Each is
judged by ComfyUI's definitions of its node classes alone, as a worker does before it fetches a graph's files. Then ComfyUI is
asked, with all files that the graph names in their places. ComfyUI runs none of them: a node that sleeps holds its queue.

Templates that the engine lacks a node class for are refused earlier, by that, and only counted here. ENGINE_SOURCE and
ENGINE_REF choose the engine (devkit/engine/README.md).
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from bench.bare import BareEngine
from bench.report import Figure, parse_args, report
from devkit.engine.build import engine_args, ensure_engine
from devkit.engine.cache import cache_root
from devkit.engine.models import make_volume
from devkit.local_worker import PROJECT
from scripts.make_catalog import fetch_wheel, specs_in, templates
from worker.editor.convert import convert
from worker.errors import WorkerError
from worker.graph.graph import parse_graph
from worker.graph.model_names import named_models
from worker.graph.paths import check_paths
from worker.graph.preflight import runnable_outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from devkit.engine.build import Engine
    from worker.graph.graph import Graph

SEED: Final = 20
MUTATIONS, SHORT_MUTATIONS, SHORT_TEMPLATES = 200, 20, 20
WRONG_BOUND, FETCHED_BOUND, BOUND_MS = 0, 0, 20.0
ANSWER_TIMEOUT_S: Final = 120.0
WORKFLOWS: Final = sorted(path.stem for path in (PROJECT / "devkit/workflows").glob("*.json"))
BY_CODE: Final = frozenset({"custom_validation_failed", "exception_during_validation", "exception_during_inner_validation"})
"""What ComfyUI finds by a node's own code, which no definition shows."""
_UPLOADS: Final = ("image_upload", "video_upload", "audio_upload", "file_upload", "upload")
_SLEEP: Final = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1}},
    "2": {"class_type": "FaultSleep", "inputs": {"image": ["1", 0], "seconds": 86_400.0, "seed": 1}},
    "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
}


class Judge:
    """A ComfyUI that says which graphs it takes, and runs none of them. A context manager."""

    def __init__(self, engine: Engine, base_dir: Path) -> None:
        self._base_dir = base_dir
        nodes = base_dir / "custom_nodes"
        nodes.mkdir(parents=True)
        make_volume(engine, base_dir)
        shutil.copy(PROJECT / "devkit/nodes/fault_nodes.py", nodes)
        args = [arg for arg in engine_args(engine) if arg not in {"--disable-api-nodes", "--disable-all-custom-nodes"}]
        self._bare = BareEngine(engine, base_dir, args)
        self._root = f"http://{self._bare.address}"
        self.definitions: dict[str, Any] = {}
        self.version = ""

    def __enter__(self) -> Self:
        self._bare.__enter__()
        self.definitions = self._ask("/object_info")[1]
        self.version = str(self._ask("/system_stats")[1]["system"]["comfyui_version"])
        status, body = self._ask("/prompt", {"prompt": _SLEEP})
        if status != 200:  # noqa: PLR2004 - an HTTP status
            raise RuntimeError(f"ComfyUI does not sleep: {body}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._bare.__exit__()

    def place(self, prompt: Graph, folders: Iterable[tuple[str, str]] = ()) -> None:
        """Put a file under each name that the graph gives, and under those of `folders` besides."""
        named = [(folder, model.name) for model in named_models(prompt) for folder in model.folders]
        for folder, name in (*named, *folders):
            self._touch(self._base_dir / "models" / folder / name)
        for node in prompt.values():
            groups = self.definitions.get(node["class_type"], {}).get("input") or {}
            for name, config in ((name, config) for group in groups.values() for name, config in dict(group).items()):
                options = config[1] if len(config) > 1 and isinstance(config[1], dict) else {}
                value = node["inputs"].get(name)
                if isinstance(value, str) and value and any(options.get(flag) for flag in _UPLOADS):
                    self._touch(self._base_dir / "input" / value)

    def _touch(self, path: Path) -> None:
        if path.is_relative_to(self._base_dir) and ".." not in path.parts and len(path.name) < 200:  # noqa: PLR2004 - a name's
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def refusals(self, prompt: Graph) -> set[str] | None:
        """Return the kinds of what is wrong, apart from models and files; None for a graph that ComfyUI takes."""
        status, body = self._ask("/prompt", {"prompt": prompt})
        if status == 200:  # noqa: PLR2004 - an HTTP status
            self._ask("/queue", {"clear": True})
            return None
        models = {(model.node_id, model.input_name) for model in named_models(prompt)}
        kinds = {
            "value_not_in_list, a model" if self._is_model(error, node_id, models) else error["type"]
            for node_id, node in (body.get("node_errors") or {}).items()
            for error in node["errors"]
        }
        return kinds or {str((body.get("error") or {}).get("type"))}

    @staticmethod
    def _is_model(error: dict[str, Any], node_id: str, models: set[tuple[str, str]]) -> bool:
        name = (error.get("extra_info") or {}).get("input_name")
        return error["type"] == "value_not_in_list" and (node_id, name) in models

    def _ask(self, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWER_TIMEOUT_S) as answer:
                content = answer.read()
                return answer.status, json.loads(content) if content else None
        except urllib.error.HTTPError as exc:
            return exc.code, json.loads(exc.read() or b"null")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What definitions alone say of a graph, and what ComfyUI says. `kinds` is None for what ComfyUI takes."""

    name: str
    is_refused: bool
    kinds: set[str] | None
    took_ms: float

    @property
    def is_held_back(self) -> bool:
        """Return whether a graph was refused that ComfyUI takes, or refuses for nothing but files."""
        return self.is_refused and not (self.kinds and self.kinds - FILES)

    @property
    def is_fetched_for(self) -> bool:
        """Return whether files would be fetched for a graph that ComfyUI refuses for what its definitions show."""
        return not self.is_refused and bool(self.kinds and self.kinds - FILES - BY_CODE)


FILES: Final = frozenset({"value_not_in_list, a model"})


def verdict(judge: Judge, name: str, prompt: Graph, folders: Iterable[tuple[str, str]] = ()) -> Verdict:
    """Return both judgements of one graph."""
    began = time.perf_counter()
    is_refused = not runnable_outputs(prompt, judge.definitions, judge.version)
    took_ms = (time.perf_counter() - began) * 1000
    judge.place(prompt, folders)
    return Verdict(name, is_refused, judge.refusals(prompt), took_ms)


def of_templates(judge: Judge, most: int | None = None) -> Iterator[Verdict | None]:
    """Yield the verdict on each template, or on `most` of them; None for one that the engine lacks a class for."""
    every = list(templates(fetch_wheel(cache_root() / "wheels")))
    chosen = every if most is None else random.Random(SEED).sample(every, min(most, len(every)))
    for name, template in chosen:
        try:
            prompt = parse_graph(convert(template, judge.definitions).graph)
            check_paths(prompt)
        except WorkerError:
            prompt = {}
        if not prompt or any(node["class_type"] not in judge.definitions for node in prompt.values()):
            yield None
            continue
        yield verdict(judge, name, prompt, {(spec.folder, spec.name) for spec in specs_in(template)})


def of_mutations(judge: Judge, count: int) -> Iterator[Verdict]:
    """Yield the verdict on each spoilt workflow that is a graph at all."""
    for number in range(count):
        try:
            prompt = parse_graph(mutated(number, judge.definitions))
            check_paths(prompt)
        except WorkerError:
            continue
        yield verdict(judge, f"mutation {number}", prompt)


def mutated(number: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return one of the project's workflows with one to three of its inputs spoilt."""
    chance = random.Random(f"{SEED}-{number}")
    prompt: dict[str, Any] = json.loads((PROJECT / f"devkit/workflows/{WORKFLOWS[number % len(WORKFLOWS)]}.json").read_text())
    for _ in range(chance.randint(1, 3)):
        node = prompt[chance.choice(list(prompt))]
        if not node["inputs"]:
            continue
        name = chance.choice(list(node["inputs"]))
        other = chance.choice(list(prompt))
        outputs = len(definitions.get(prompt[other]["class_type"], {}).get("output") or ())
        values = ["no-such-choice", "nothing.safetensors", "12", 12, -7, 10**9, 0.5, True, None, [], ["1", 0, 0], [other, 0]]
        values += [[other, outputs + 3], {"__value__": [1, 2]}, {"a": 1}, "", list(prompt), "euler"]
        if chance.randrange(4) == 0:
            del node["inputs"][name]
        else:
            node["inputs"][name] = chance.choice(values)
    return prompt


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=1)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Judge(ensure_engine(), Path(folder) / "judge") as judge:
        print(f"ComfyUI {judge.version}: {len(judge.definitions)} node classes", file=sys.stderr)
        found = list(of_templates(judge, SHORT_TEMPLATES if options.short else None))
        official = [each for each in found if each]
        spoilt = list(of_mutations(judge, SHORT_MUTATIONS if options.short else MUTATIONS))
    for each in (*official, *spoilt):
        if each.is_held_back or each.is_fetched_for:
            print(f"{'held back' if each.is_held_back else 'fetched for'}: {each}", file=sys.stderr)
    for name, verdicts in (("templates", official), ("mutations", spoilt)):
        kinds = Counter(kind for each in verdicts for kind in each.kinds or ())
        print(f"{name} refused by ComfyUI: {dict(kinds)}", file=sys.stderr)
    figures = [Figure("preflight_templates_lack_classes", found.count(None), f"of {len(found)}")]
    for name, verdicts in (("templates", official), ("mutations", spoilt)):
        figures += _figures(name, verdicts)
    return report(figures, options)


def _figures(name: str, verdicts: list[Verdict]) -> Iterator[Figure]:
    yield Figure(f"preflight_{name}_taken", sum(each.kinds is None for each in verdicts), f"of {len(verdicts)}")
    yield Figure(f"preflight_{name}_refused", sum(each.is_refused for each in verdicts), f"of {len(verdicts)}")
    yield Figure(f"preflight_{name}_held_back", sum(each.is_held_back for each in verdicts), "", WRONG_BOUND)
    yield Figure(f"preflight_{name}_fetched_for", sum(each.is_fetched_for for each in verdicts), "", FETCHED_BOUND)
    took_ms = [each.took_ms for each in verdicts]
    yield Figure.of(f"preflight_{name}_each", took_ms, "ms")
    yield Figure(f"preflight_{name}_slowest", max(took_ms), "ms", BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())
