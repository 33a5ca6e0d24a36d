"""What the tests share: the real ComfyUI, a volume with tiny weights, and a worker in front of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from devkit.engine.build import Engine, ensure_engine
from devkit.engine.cache import BuildFailed, cache_root
from devkit.engine.models import make_volume
from devkit.engine.source import chosen_tree
from devkit.local_worker import PROJECT, LocalWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

pytest_plugins = ["devkit.pytest_moosefs"]

SLOW = frozenset(
    f"test_{name}.py"
    for name in (
        *("booting", "delivery", "devkit_engine", "devkit_hub", "docs", "doctor", "download_queue", "editor_workflows", "fuzz"),
        *("hub", "image_files", "links", "locks", "moosefs", "plan_editor", "progress_posts", "proxies"),
        *(
            "requirements",
            "run_workflow",
            "seed",
            "seed_s3",
            "store",
            "store_crash",
            "store_full",
            "url_inputs",
            "up",
            "up_api",
            "windows",
            "xet",
        ),
    )
)
"""Files whose tests start servers and processes, or wait for them."""


def pytest_configure() -> None:
    """Refuse a wrong ENGINE_SOURCE or ENGINE_REF before the first test, in a sentence."""
    try:
        chosen_tree(os.environ, cache_root(), sys.stderr)
    except BuildFailed as exc:
        raise pytest.UsageError(str(exc)) from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the real ComfyUI or a mounted network volume, so that `make test-fast` can leave it out."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "engine" in fixtures:
            item.add_marker("engine")
        if "moosefs" in fixtures:
            item.add_marker("volume")
        if item.path.name in SLOW:
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = longest_first(items)


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Order the files for several processes: those with a ComfyUI, other slow ones, and then the many short ones to fill in."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}
    return sorted(items, key=lambda item: (item.path not in engines, item.path.name not in SLOW))


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The real ComfyUI for the CPU, built once and cached."""
    return ensure_engine()


@pytest.fixture(scope="session")
def worker(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorker]:
    """A worker serving RunPod's local API, with the tiny weights on its volume; shared, so tests leave it able to serve."""
    folder = tmp_path_factory.mktemp("worker")
    make_volume(engine, folder / "volume")
    with LocalWorker(engine, folder, folder / "volume") as local:
        local.wait_ready()
        yield local


@pytest.fixture
def volume(worker: LocalWorker) -> Path:
    """The shared worker's volume."""
    return worker.folder / "volume"


@pytest.fixture
def workflow() -> Callable[[str], dict[str, Any]]:
    """A fresh copy of one of the project's workflows, by name."""

    def load(name: str) -> dict[str, Any]:
        graph: dict[str, Any] = json.loads((PROJECT / f"devkit/workflows/{name}.json").read_text())
        return graph

    return load


@pytest.fixture
def run_async() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run one coroutine to its end, with a deadline."""

    def run(coro: Coroutine[Any, Any, Any]) -> Any:
        async def with_deadline() -> Any:
            async with asyncio.timeout(300):
                return await coro

        return asyncio.run(with_deadline())

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of the cases in tests/cases were held."""
    held = sum("::test_a_case[" in report.nodeid for report in terminalreporter.getreports("passed"))
    if held:
        terminalreporter.write_line(f"{held} cases of real requests held")
