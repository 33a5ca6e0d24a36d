"""Workflows of the editor, converted: how many become what ComfyUI's own frontend makes of them, and how long it takes.

The workflows are ComfyUI's official templates; tests/ui has the hash of each graph that the frontend made, and README.md there
says how. What is different is different on purpose: a link that the frontend loses, and 3D scenes that only a browser draws.

How many of them the engine can run is counted too: those that convert and whose classes it all has, paid API nodes included.
`local` are the templates that name model files. ENGINE_SOURCE and ENGINE_REF choose the engine (devkit/engine/README.md).
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bare import BareEngine
from bench.report import Figure, parse_args, report
from devkit.editor import INFO, large, node, subgraph, ui
from devkit.engine.build import engine_args, ensure_engine
from devkit.engine.cache import cache_root
from scripts.make_catalog import fetch_wheel, templates
from worker.editor.convert import convert
from worker.editor.embedded_models import embedded_models
from worker.errors import UiWorkflowInvalid, UnknownNodes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from devkit.engine.build import Engine

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "ui"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIFFERENT_BOUND = {"classic": 0, "modern": 4}
ANSWER_TIMEOUT_S = 60.0
LARGE, LARGE_BOUND_MS, HOSTILE_BOUND_MS = 300, 50.0, 1000.0


def main() -> int:
    """Measure, and report."""
    options = parse_args(__doc__, samples=9)
    official = {name.removesuffix(".json"): template for name, template in templates(fetch_wheel(cache_root() / "wheels"))}
    figures = [*_templates(official), *_runnable(official), _large(options.samples), *_hostile()]
    return report(figures, options)


def _runnable(official: Mapping[str, dict[str, Any]]) -> Iterator[Figure]:
    version, info = _classes(ensure_engine())
    print(f"ComfyUI {version}: {len(info)} node classes", file=sys.stderr)
    run = {name for name, template in official.items() if _runs(template, info)}
    local = {name for name, template in official.items() if any(True for _ in embedded_models(template))}
    yield Figure("convert_templates_run", len(run), f"of {len(official)}")
    yield Figure("convert_templates_run_local", len(run & local), f"of {len(local)}")


def _classes(engine: Engine) -> tuple[str, dict[str, Any]]:
    """Return the engine's version, and what it says of all its node classes."""
    args = [arg for arg in engine_args(engine) if arg != "--disable-api-nodes"]
    with tempfile.TemporaryDirectory(prefix="bench-") as base, BareEngine(engine, Path(base), args) as bare:
        stats, info = (_get(f"http://{bare.address}{path}") for path in ("/system_stats", "/object_info"))
    return stats["system"]["comfyui_version"], info


def _get(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address, timeout=ANSWER_TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def _runs(template: dict[str, Any], info: dict[str, Any]) -> bool:
    try:
        graph = convert(template, info, now=NOW).graph
    except (UiWorkflowInvalid, UnknownNodes):
        return False
    return all(node["class_type"] in info for node in graph.values())


def _templates(official: Mapping[str, dict[str, Any]]) -> Iterator[Figure]:
    document = json.loads((FIXTURES / "templates.json").read_text(encoding="utf-8"))
    for generation, graphs in document["graphs"].items():
        info = json.loads((FIXTURES / f"object_info_{generation}.json").read_text(encoding="utf-8"))
        took, equal = [], 0
        for name, digest in graphs.items():
            began = time.perf_counter()
            found = _digest(official[name], info, document["frontends"][generation])
            took.append((time.perf_counter() - began) * 1000)
            equal += found == digest
        name = f"convert_templates_{generation}"
        yield Figure(f"{name}_equal", equal, f"of {len(graphs)}")
        yield Figure(f"{name}_different", len(graphs) - equal, "", DIFFERENT_BOUND[generation])
        yield Figure.of(f"{name}_each", took, "ms")


def _digest(workflow: object, info: dict[str, Any], frontend: str) -> str | None:
    try:
        graph = convert(workflow, info, frontend=frontend, now=NOW, random=lambda: 0.0).graph
    except UiWorkflowInvalid:
        return None
    return hashlib.sha256(json.dumps(graph, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _large(samples: int) -> Figure:
    workflow = large(LARGE)
    return Figure.of(
        f"convert_{LARGE}_nodes", [_ms(lambda: convert(workflow, INFO)) for _ in range(samples)], "ms", LARGE_BOUND_MS
    )


def _hostile() -> Iterator[Figure]:
    """Return workflows that grow when they are expanded or followed. The bound is for refusing them."""
    chain = [node(at, "Reroute", inputs={"": at}) for at in range(1, 4000)]
    ends = [node(5000 + at, "Sampler", inputs={"model": 5000 + at}) for at in range(900)]
    links = [(at, at + 1, 0, at, 0) for at in range(1, 3999)] + [(5000 + at, 1, 0, 5000 + at, 0) for at in range(900)]
    doubling = [subgraph(f"s{at}", node(1, f"s{at + 1}"), node(2, f"s{at + 1}"), links=()) for at in range(40)]
    wide = subgraph("w", links=(), inputs=[(f"i{at}", "X", []) for at in range(20_000)])
    cases = {
        "doubling_subgraphs": ui(node(1, "s0"), definitions={"subgraphs": doubling}),
        "reroutes_followed_again_and_again": ui(*chain, *ends, links=links),
        "wide_subgraphs": ui(*(node(at, "w") for at in range(4000)), definitions={"subgraphs": [wide]}),
        "ten_million_characters": ui(node(1, "Text", ["{a|b}" * 2_000_000])),
        "five_million_values": ui(node(3, "Sampler", [[0] * 5_000_000])),
    }
    for name, workflow in cases.items():
        yield Figure(f"convert_refuses_{name}", _ms(partial(_refused, workflow)), "ms", HOSTILE_BOUND_MS)


def _refused(workflow: object) -> None:
    try:
        convert(workflow, INFO)
    except UiWorkflowInvalid:
        return
    raise AssertionError


def _ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    sys.exit(main())
