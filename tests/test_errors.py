"""docs/errors.md is what the code says, and every error is one that a person can act on."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

import pytest

from client import errors as client
from client.command import parser, run
from devkit.local_worker import PROJECT
from scripts import make_errors
from worker import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

SOURCES = [*(PROJECT / "worker").rglob("*.py"), *(PROJECT / "client").rglob("*.py")]
TREES: list[make_errors.ErrorClass] = [errors.WorkerError, client.ClientError]

# What sentences tell people to do.
VERB = re.compile(
    r"(?<!')\b(accept|add|allow|attach|check|convert|copy|correct|create|enlarge|export|give|install|limit|look|make|must be"
    r"|name|pin|provide|put|raise|remove|replace|report|run|say|send|serve|set|start|try|unset|use|wait|write)\b(?!')",
    re.IGNORECASE,
)
NO_ADVICE = {
    "convert_usage": "the disk's own words",
    "node_failed": "the node's own words, in the shape that clients know",
    "datacenter_unknown": "the list of those that there are is the advice",
    "what_unknown": "what is like it is the advice",
    "workflow_invalid": "its reason is the advice where there is any",
    "override_invalid": "what there is instead is the advice",
    "workflow_rejected": "ComfyUI's own findings",
    "file_unreadable": "the disk's own words",
    "output_not_saved": "the disk's or the network's own words",
}
SECRET = re.compile(r"token|secret|passw|credential|key|signature|authori[sz]ation", re.IGNORECASE)
# A secret in no way: whether there is one, what the variable for it is called, an object's key, a key of 'set'.
NO_SECRET = {"has_token", "OverrideInvalid.key", "S3FileDiffers.key"}


def whole_tree(kind: make_errors.ErrorClass) -> Iterator[make_errors.ErrorClass]:
    yield kind
    for below in kind.__subclasses__():
        yield from whole_tree(below)


ALL = [kind for root in TREES for kind in whole_tree(root)]
RAISED = make_errors.classes()


@pytest.fixture(scope="module")
def page() -> str:
    return make_errors.PAGE.read_text("utf-8")


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_what_the_code_says(page: str) -> None:
    assert page == make_errors.page(), "run python -m scripts.make_errors"


def test_the_check_says_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_errors.main(["--check"]) == 0
    monkeypatch.setattr(make_errors, "PAGE", tmp_path / "errors.md")
    assert make_errors.main(["--check"]) == 1
    assert "+# Errors" in capsys.readouterr().out
    assert make_errors.main([]) == 0
    assert make_errors.main(["--check"]) == 0
    assert make_errors.PAGE.read_text("utf-8") == make_errors.page()


def test_every_error_of_the_tree_is_on_it(page: str) -> None:
    assert set(ALL) == set(RAISED) | make_errors.NEVER_RAISED
    for kind in RAISED:
        assert f"### `{kind.code}`\n" in page
        assert make_errors.when(kind) in page


def test_every_error_is_defined_where_the_page_looks() -> None:
    """Nothing derives from one of them anywhere else in the code."""
    names = {kind.__name__ for kind in ALL}
    found = {
        part.name
        for path in SOURCES
        for part in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(part, ast.ClassDef) and {ast.unparse(base).rpartition(".")[2] for base in part.bases} & names
    }
    assert found <= names


def test_what_is_only_a_kind_of_error_is_never_raised() -> None:
    called = {
        ast.unparse(part.func).rpartition(".")[2]
        for path in SOURCES
        for part in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(part, ast.Call)
    }
    raised = {
        ast.unparse(part.exc).rpartition(".")[2]
        for path in SOURCES
        for part in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(part, ast.Raise) and part.exc and not isinstance(part.exc, ast.Call)
    }
    assert not {kind.__name__ for kind in make_errors.NEVER_RAISED} & (called | raised)


def test_an_error_that_the_script_knows_nothing_of_is_named() -> None:
    class NeverSeen(errors.WorkerError):
        never_seen: str

    for step, text in (
        (make_errors.example, "NeverSeen has the field 'never_seen'"),
        (make_errors.when, "NeverSeen has no docstring"),
        (make_errors.section_of, "NeverSeen has no section"),
    ):
        with pytest.raises(make_errors.Incomplete, match=text):
            step(NeverSeen)


def test_every_example_is_of_use() -> None:
    wanted = [(f"{kind.__name__}.{name}", name) for kind in RAISED for name in make_errors.fields_of(kind)]
    assert {next(key for key in keys if key in make_errors.EXAMPLES) for keys in wanted} == set(make_errors.EXAMPLES)


# --- the trees ------------------------------------------------------------------------------------


def drawn(module: ModuleType) -> dict[str, str | None]:
    """Each class in the tree of a module's docstring, with the class that it stands below."""
    below: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    tree = (module.__doc__ or "").partition("Error\n")
    for line in [re.split(r"\s", tree[0])[-1] + "Error", *tree[2].partition("\n\n")[0].splitlines()]:
        column = len(line) - len(line.lstrip(" │├└─"))
        path = [(at, name) for at, name in path if at < column]
        names = line[column:].partition("  ")[0].split(", ")
        below.update(dict.fromkeys(names, path[-1][1] if path else None))
        path.append((column, names[-1]))
    return below


@pytest.mark.parametrize("module", make_errors.MODULES)
def test_a_module_draws_its_whole_tree(module: ModuleType) -> None:
    kinds = {kind.__name__: kind for kind in ALL if kind.__module__ == module.__name__}
    tree = drawn(module)
    assert set(tree) - set(kinds) <= {"WorkerError"}, "it draws classes that are not there"
    assert {name: kind.__bases__[0].__name__ for name, kind in kinds.items() if kind not in TREES} == {
        name: base for name, base in tree.items() if base
    }


def test_fields_are_taken_as_a_dataclass_takes_them() -> None:
    class Fault(errors.WorkerError):
        path: str
        reasons: list[str]
        times: int = 1
        template = "{path} failed {times} times: {reasons}; {reasons: and }"

    fault = Fault("x", reasons=["a", "b"])
    assert (fault.path, fault.times, str(fault)) == ("x", 1, "x failed 1 times: a; b; a and b")
    again = fault.copy(times=2)
    assert again is not fault
    assert str(again) == "x failed 2 times: a; b; a and b"
    kind: Any = Fault
    for values, named in (("x",), {}), (("x", [], 1, 2), {}), (("x", []), {"path": "y"}), (("x", []), {"nothing": 1}):
        with pytest.raises(TypeError, match="Fault takes path, reasons, times"):
            kind(*values, **named)


# --- the errors themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("root", TREES)
def test_codes_are_unique_and_written_alike(root: make_errors.ErrorClass) -> None:
    codes = [kind.code for kind in RAISED if issubclass(kind, root)]
    assert sorted(codes) == sorted(set(codes))
    assert [code for code in codes if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", code)] == []


def test_a_code_means_the_same_in_the_worker_and_in_the_client() -> None:
    codes = [{kind.code for kind in RAISED if issubclass(kind, root)} for root in TREES]
    assert codes[0] & codes[1] == {"usage"}  # of two command lines


@pytest.mark.parametrize("kind", RAISED)
def test_its_sentence_is_one_that_can_be_acted_on(kind: make_errors.ErrorClass) -> None:
    sentence = str(make_errors.example(kind))
    assert 20 <= len(sentence) <= 420
    assert sentence == " ".join(sentence.split())
    assert "Traceback" not in sentence
    assert not re.search(r"\b(None|True|False|PosixPath)\b|[{]\w+[}]", sentence)
    assert not re.search(r"(?<![.'])\.\.(?![.'])|\.{4}|[:;,]\.|; ;", sentence)
    assert (kind.code in NO_ADVICE) != bool(VERB.search(sentence)), "it does not say what to do, or needs no excuse"


@pytest.mark.parametrize("kind", RAISED)
def test_it_shows_no_secret(kind: make_errors.ErrorClass) -> None:
    for name in make_errors.fields_of(kind):
        assert {name, f"{kind.__name__}.{name}"} & NO_SECRET or not SECRET.search(name)


@pytest.mark.parametrize("kind", RAISED)
def test_its_sentence_is_built_from_its_fields(kind: make_errors.ErrorClass) -> None:
    """Each text is in it: what is not shown helps nobody."""
    error: Any = make_errors.example(kind)
    beside = {"ModelUnavailable.cause", "JobFailed.worker_code"}  # for programs
    for name in make_errors.fields_of(kind):
        value = getattr(error, name)
        if isinstance(value, str) and f"{kind.__name__}.{name}" not in beside:
            assert value in str(error)


# --- exit statuses --------------------------------------------------------------------------------


def test_the_clients_help_has_the_same_statuses() -> None:
    text = parser().format_help()
    listed = {int(status) for status in re.findall(r"(\d+) ", text.partition("exit status:")[2].partition("examples:")[0])}
    assert listed == {status for program, status, _ in make_errors.exits() if "run_workflow" in program}


def test_the_seeders_help_has_the_same_statuses() -> None:
    from worker.seed.options import seed_parser as seeder  # noqa: PLC0415 - beside the other parser of that name

    text = seeder().format_help().partition("Exit codes:")[2].partition(".")[0]
    listed = {int(status) for status in re.findall(r"\d+", text)}
    assert listed == {status for program, status, _ in make_errors.exits() if "seed_volume" in program}


def test_every_error_of_the_client_ends_with_a_status_that_is_listed() -> None:
    listed = {status for program, status, _ in make_errors.exits() if "run_workflow" in program}
    assert {kind.exit_status for kind in RAISED if issubclass(kind, client.ClientError)} <= listed
    assert run(["flux.json"], {}) == client.USAGE
