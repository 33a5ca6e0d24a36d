"""Arrows run downwards only: what ARCHITECTURE.md draws is what the imports say."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from devkit.local_worker import PROJECT

WORKER = PROJECT / "worker"
PAGE = PROJECT / "ARCHITECTURE.md"
PURE = [
    *("job", "settings", "errors", "error_reply", "model_spec", "base/text", "base/progress"),
    *("media/address_guard", "store/layout", "doctor/findings"),
    *("engine/events", "graph/graph", "graph/paths", "graph/model_names", "graph/overrides", "graph/rejection"),
    *(f"editor/{path.stem}" for path in (WORKER / "editor").glob("*.py") if path.name != "__init__.py"),
]
IMPURE_IMPORTS = {
    "os",
    "subprocess",
    "socket",
    "threading",
    "asyncio",
    "httpcore2",
    "httpx2",
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
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("worker."):
            found.add(node.value)  # for importlib
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (WORKER.parent / Path(*(node.module or "").split(".")) / f"{alias.name}.py").is_file()
            )
    return found


def wing(module: str) -> str:
    """The folder of a module, or the module itself where it lies beside the folders."""
    return module.split("/", maxsplit=1)[0]


def arrows() -> dict[str, set[str]]:
    """Which wings each wing imports."""
    found: dict[str, set[str]] = {}
    for module in modules():
        targets = {
            name.removeprefix("worker.").replace(".", "/") for name in imports(module) if name.startswith("worker.")
        } - set(wings())
        found.setdefault(wing(module), set()).update(wing(target) for target in targets)
    return {name: targets - {name, "__init__"} for name, targets in found.items()}


def wings() -> list[str]:
    return sorted({module.split("/", maxsplit=1)[0] for module in modules() if "/" in module})


def drawn_arrows() -> dict[str, set[str]]:
    """The arrows on the page, one wing a line: `name -> name, name`. A line names only wings of lines above it."""
    block = PAGE.read_text("utf-8").partition("<!-- arrows -->\n```\n")[2].partition("```")[0]
    found: dict[str, set[str]] = {}
    for line in block.splitlines():
        name, _, targets = line.partition("->")
        found[name.strip()] = {target.strip() for target in targets.split(",") if target.strip()}
    return found


def test_the_page_draws_the_arrows_that_the_imports_make() -> None:
    assert drawn_arrows() == arrows()


def test_arrows_run_in_one_direction_only() -> None:
    """Each line names only wings of lines above it, so that there is no circle."""
    above: set[str] = set()
    for name, targets in drawn_arrows().items():
        assert targets <= above, f"{name} imports upwards: {targets - above}"
        above.add(name)


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


def test_the_architecture_document_names_every_module() -> None:
    text = (PROJECT / "ARCHITECTURE.md").read_text("utf-8")
    assert [module for module in modules() if f"{module.split('/')[-1]}.py" not in text] == []


@pytest.mark.parametrize("package", ["client", "devkit"])
def test_no_circle_is_in_the_packages_beside_it(package: str) -> None:
    """What only a type checker imports counts: one file of a circle cannot be read without the others."""
    files = [path for path in (PROJECT / package).rglob("*.py") if path.name != "__init__.py" and "stubs" not in path.parts]
    names = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in files}
    graph = {name: imported(path) & set(names) for name, path in names.items()}
    graphlib.TopologicalSorter(graph).prepare()


def imported(path: Path) -> set[str]:
    """Every module that a file imports, with what it imports from each."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    sources = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return plain | {str(node.module) for node in sources} | {f"{node.module}.{a.name}" for node in sources for a in node.names}
