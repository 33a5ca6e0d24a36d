"""Arrows run downwards only: what ARCHITECTURE.md draws is what the imports say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from devkit.local_worker import PROJECT
from worker.comfy import workflow
from worker.models import spec

WORKER = PROJECT / "worker"
# From the top down; a module imports only from levels below its own. Modules of one level do not know each other.
HALL = [
    ["__main__"],
    ["seed"],
    ["serve", "boot", "plan", "doctor", "convert"],
    ["handler", "intake", "warmth"],
    ["graphs"],
    ["saved"],
    ["loop", "logs", "progress", "laps"],
    ["job", "settings", "failure", "volume"],
    ["errors", "clock", "known", "text"],
]
WINGS = ["models", "comfy", "media"]
EDITOR = [
    f"comfy/{name}"
    for name in (
        *("convert", "ui_graph", "ui_values", "ui_text", "widgets", "sheets", "parts", "promoted", "primitives", "resolve"),
        *("overrides", "embedded"),
    )
]
PURE = [
    "job",
    "settings",
    "errors",
    "failure",
    "media/guard",
    "comfy/events",
    "comfy/workflow",
    "comfy/rejection",
    "models/spec",
    "models/layout",
    "doctor/findings",
    "doctor/screen",
    *EDITOR,
]
IMPURE_IMPORTS = {
    "os",
    "subprocess",
    "socket",
    "threading",
    "asyncio",
    "httpx",
    "websockets",
    "requests",
    "urllib.request",
    "shutil",
}


def modules() -> list[str]:
    return sorted(str(path.relative_to(WORKER).with_suffix("")) for path in WORKER.rglob("*.py") if path.name != "__init__.py")


def imports(module: str) -> set[str]:
    """Every module it imports, wherever in the file, but for what only a type checker sees."""
    tree = ast.parse((WORKER / f"{module}.py").read_text("utf-8"))
    checked = {
        node
        for top in ast.walk(tree)
        if isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING"
        for node in ast.walk(top)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in checked:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (WORKER.parent / Path(*(node.module or "").split(".")) / f"{alias.name}.py").is_file()
            )
    return found


def level(module: str) -> int:
    """The module's height: wings lie between the handler and the values."""
    name = module.split("/", maxsplit=1)[0]
    if name in WINGS:
        return 6
    return next(index for index, names in enumerate(HALL) if name in names)


@pytest.mark.parametrize("module", modules())
def test_arrows_run_downwards_only(module: str) -> None:
    package = module.split("/", maxsplit=1)[0] if "/" in module else None
    for imported in imports(module):
        if not imported.startswith("worker."):
            continue
        target = imported.removeprefix("worker.").replace(".", "/")
        if package and target.split("/")[0] == package:
            continue
        assert not (package in WINGS and target.split("/")[0] in WINGS), f"{module} imports another wing: {imported}"
        assert level(target) > level(module), f"{module} imports upwards: {imported}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_that_does_work_outside(module: str) -> None:
    assert not imports(module) & IMPURE_IMPORTS


@pytest.mark.parametrize("module", modules())
def test_the_environment_is_read_in_one_place(module: str) -> None:
    text = (WORKER / f"{module}.py").read_text("utf-8")
    assert module == "__main__" or not ("os.environ" in text or "os.getenv" in text)


@pytest.mark.parametrize("module", modules())
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse((WORKER / f"{module}.py").read_text("utf-8")))


def test_what_two_wings_say_each_for_itself_is_the_same() -> None:
    """A wing cannot import another, so each has this table."""
    assert set(workflow.WEIGHT_SUFFIXES) == set(spec.WEIGHT_SUFFIXES)


def test_the_architecture_document_names_every_module() -> None:
    text = (PROJECT / "ARCHITECTURE.md").read_text("utf-8")
    assert [module for module in modules() if f"{module.split('/')[-1]}.py" not in text] == []
