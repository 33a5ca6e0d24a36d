"""What the pages say is so: links lead somewhere, commands run or at least exist, settings and errors are the code's.

The rules for fenced blocks: `sh` is run here as it stands, from a copy of the repository, with a stand-in hub in place of the
network; its `make` lines only have to be there. `sh no-run` is for what needs an account, a GPU, or minutes, and is checked as
far as that goes. `json`, `toml`, `yaml` and `python` parse; a `json` block may hold several values.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest
import yaml  # type: ignore[import-untyped]  # it ships no types

from client import errors as client_errors
from devkit.hub import Hub as StandIn
from devkit.local_worker import PROJECT
from worker import __version__, errors
from worker.__main__ import COMMANDS, main
from worker.seed import errors as seed_errors
from worker.settings import Settings
from worker.up import errors as up_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = sorted(
    str(path.relative_to(PROJECT))
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md", "*/README.md")
    for path in PROJECT.glob(pattern)
)
COMMAND_TIMEOUT_S = 60.0


# --- a page, read -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: `kind` is all that stands behind the fence."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


_FENCE = re.compile(r"^( *)(```+|~~~+)(.*)$")


def split(text: str, page: str = "") -> tuple[list[Block], list[str]]:
    """The fenced blocks of a page, and its other lines, with empty ones in place of the blocks."""
    blocks: list[Block] = []
    prose: list[str] = []
    opened: tuple[int, str, str, int] | None = None
    held: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, held = (len(fence[1]), fence[2], fence[3].strip(), number), []
        elif opened is not None and fence and fence[2].startswith(opened[1]) and not fence[3].strip():
            blocks.append(Block(page, opened[3], opened[2], "\n".join(held) + "\n"))
            opened = None
        elif opened is not None:
            held.append(line[opened[0] :] if not line[: opened[0]].strip() else line)
        prose.append("" if opened is not None or fence else line)
    assert opened is None, f"{page}:{opened and opened[3]} a block is never closed"
    return blocks, prose


def read(page: str) -> tuple[list[Block], list[str]]:
    return split((PROJECT / page).read_text(encoding="utf-8"), page)


BLOCKS = [block for page in PAGES for block in read(page)[0]]
_CODE = re.compile(r"(`+)(.+?)\1")


def inline_code(page: str) -> Iterator[tuple[int, str]]:
    """What stands in backticks outside of blocks, with its line."""
    for number, line in enumerate(read(page)[1], 1):
        yield from ((number, match[2].strip()) for match in _CODE.finditer(line))


# --- links --------------------------------------------------------------------------------------

_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HTML = re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=\"([^\"]+)\"", re.IGNORECASE)
_REFERENCE = re.compile(r"^\s*\[[^\]]+\]:\s*(\S+)")


def links(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Every target of a link or picture in a page's prose, with its line."""
    for number, line in enumerate(lines, 1):
        plain = _CODE.sub("", line)
        for pattern in (_LINK, _HTML, _REFERENCE):
            yield from ((number, match[1]) for match in pattern.finditer(plain))


def anchors(lines: list[str]) -> set[str]:
    """The places in a page that a link can lead to, by the rules of GitHub."""
    found: dict[str, int] = {}
    for line in lines:
        if match := re.match(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*$", line):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            slug = "".join(char for char in text.lower() if char in "-_ " or unicodedata.category(char)[0] in "LNM").replace(
                " ", "-"
            )
            count = found[slug] = found.get(slug, -1) + 1
            if count:
                found[f"{slug}-{count}"] = 0
    return found.keys() | {match[1] for line in lines for match in re.finditer(r"<a (?:id|name)=\"([^\"]+)\"", line)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    lost = []
    for number, target in links(read(page)[1]):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (PROJECT / page).parent / unquote(path) if path else PROJECT / page
        if not file.resolve().is_relative_to(PROJECT) or not file.exists():
            lost.append(f"{page}:{number}: {target}: no such file")
        elif (
            anchor
            and file.suffix == ".md"
            and unquote(anchor) not in anchors(read(str(file.resolve().relative_to(PROJECT)))[1])
        ):
            lost.append(f"{page}:{number}: {target}: no such heading")
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("picture", sorted(PROJECT.glob("docs/*.svg")), ids=lambda path: path.name)
def test_a_picture_refers_to_nothing_that_it_lacks(picture: Path) -> None:
    text = picture.read_text("utf-8")
    names = {element.get("id") for element in ET.fromstring(text).iter()}
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | {"title", "desc"} <= names
    assert not re.search(r"url\((?!#)|(?:href|src)=", text), "a page shows it without what it would fetch"


# --- blocks that are data -----------------------------------------------------------------------


def parsed(block: Block) -> list[object]:
    """The values that a block holds. Raises for what does not parse."""
    match block.kind.split()[0]:
        case "json":
            values: list[object] = []
            rest = block.text.strip()
            while rest:
                value, end = json.JSONDecoder().raw_decode(rest)
                values.append(value)
                rest = rest[end:].strip()
            return values
        case "toml":
            return [tomllib.loads(block.text)]
        case "yaml" | "yml":
            return [yaml.safe_load(block.text)]
        case "python":
            return [compile(block.text, str(block), "exec")]
    return []


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind.split()[:1] not in ([], ["sh"])], ids=str)
def test_every_block_of_a_known_language_parses(block: Block) -> None:
    language, *more = block.kind.split()
    assert language not in {"bash", "shell", "console", "zsh", "JSON"}, f"{block}: write sh, or sh no-run, or json"
    assert not more, f"{block}: {block.kind}: only sh has a word behind it"
    parsed(block)


# --- commands -----------------------------------------------------------------------------------

RUN = [block for block in BLOCKS if block.kind == "sh"]
NO_RUN = [block for block in BLOCKS if block.kind.split()[:1] == ["sh"] and block.kind != "sh"]
# What a block that is run must not hold: it would act on this machine, or wait for a network.
_NOT_HERE = re.compile(r"(?<![\w./-])(sudo|rm|pip3? install|docker|aws|ssh|git|rpa_\S+|https://\S+)(?!\w)")
_MAKE = re.compile(r"\s*make\s")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (PROJECT / "Makefile").read_text(), re.MULTILINE))


def unknown_targets(text: str) -> list[str]:
    """The words of `make ...` lines that are no target."""
    words = [word for line in text.splitlines() if _MAKE.match(line) for word in shlex.split(line, comments=True)[1:]]
    return [word for word in words if "=" not in word and not word.startswith("-") and word not in targets()]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with the running Python's environment as its `.venv`."""
    copy = tmp_path_factory.mktemp("docs") / "checkout"
    names = shutil.ignore_patterns(".*", "__pycache__", "outputs", "*.egg-info")
    shutil.copytree(PROJECT, copy, ignore=names, symlinks=True)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A hub with a small file for each model of the examples."""
    root = tmp_path_factory.mktemp("hub")
    for manifest in PROJECT.glob("examples/*/models.toml"):
        for model in tomllib.loads(manifest.read_text())["model"]:
            path = root / model["source"].removeprefix("hf://")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with StandIn(root) as stand_in:
        yield stand_in


@pytest.mark.parametrize("block", RUN, ids=str)
def test_every_command_runs_as_it_stands(block: Block, checkout: Path, hub: StandIn, tmp_path: Path) -> None:
    assert not unknown_targets(block.text)
    script = "\n".join(line for line in block.text.splitlines() if not _MAKE.match(line))
    if not any(line.strip() and not line.lstrip().startswith("#") for line in script.splitlines()):
        return
    assert not (found := _NOT_HERE.search(script)), f"{block}: {found[0]!r} cannot be run here: make it a 'sh no-run' block"
    nowhere = "http://127.0.0.1:9"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RUNPOD_", "HF_", "BUCKET_"))} | {
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "VOLUME_PATH": str(tmp_path / "volume"),
        "HF_ENDPOINT": hub.endpoint,
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), nowhere),
        "NO_PROXY": "127.0.0.1",
    }
    (tmp_path / "volume").mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{block}: exit status {done.returncode}\n{script}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("block", NO_RUN, ids=str)
def test_every_command_that_cannot_run_here_could(block: Block) -> None:
    assert block.kind == "sh no-run"
    done = subprocess.run(
        ["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"
    wrong = [f"make {target}" for target in unknown_targets(block.text)]
    for line in block.text.replace("\\\n", " ").splitlines():
        wrong += wrong_words(line)
    assert not wrong, f"{block}: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_text_has_its_options(page: str) -> None:
    wrong = []
    for number, code in inline_code(page):
        problems = wrong_words(code) if _PROGRAM.search(code) else []
        problems += [f"make {target}" for target in unknown_targets(code)]
        wrong += [f"{page}:{number}: `{code}`: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)


_PROGRAM = re.compile(
    r"(?:^|[\s;&|(])(?:\S*python3?\s+(?:-m\s+)?)?"
    r"(?:(?:scripts/)?(?P<script>(?:seed_volume|run_workflow|make_catalog))\.py|worker\s+(?P<command>plan|doctor|convert|settings|seed|up))(?P<rest>(?=\s|$).*)"
)


def wrong_words(line: str) -> list[str]:
    """Options that our programs do not have, and paths in the repository that are not there, in one line of a shell."""
    text = re.sub(r"(^|\s)#.*$", "", line)
    wrong = []
    if match := _PROGRAM.search(text):
        rest = re.split(r"\s(?:\||&&|;|>)\s", match["rest"])[0]
        options = re.findall(r"(?<=\s)--[a-z][\w-]*", rest)
        known = help_of(match["script"], match["command"]) if options else ""
        wrong += [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known)]
    for word in re.findall(r"(?<![\w/.:$-])(?:\w[\w.*-]*/)+[\w.*-]*", text):
        top = word.partition("/")[0]
        if (PROJECT / top).is_dir() and not list(PROJECT.glob(word.rstrip("/"))):
            wrong.append(f"there is no {word}")
    return wrong


@functools.cache
def help_of(script: str | None, command: str | None) -> str:
    """What a program of ours prints with `--help`."""
    if command == "settings":
        return ""
    call = [sys.executable, f"scripts/{script}.py"] if script else [sys.executable, "-m", "worker", str(command)]
    if script == "make_catalog":
        call = [sys.executable, "-m", "scripts.make_catalog"]
    done = subprocess.run([*call, "--help"], cwd=PROJECT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    return done.stdout


# --- names of the code --------------------------------------------------------------------------

# Named on the pages, and not the worker's own: of RunPod, of other programs, or in place of somebody's own value.
FOREIGN = {
    "COMFY_API_AVAILABLE_INTERVAL_MS",
    "COMFY_API_AVAILABLE_MAX_RETRIES",
    "WEBSOCKET_TRACE",
    *("RUNPOD_API_KEY", "RUNPOD_S3_ACCESS_KEY_ID", "RUNPOD_S3_SECRET_ACCESS_KEY", "PUBLIC_KEY"),
    *("RUNPOD_INIT_TIMEOUT", "RUNPOD_LOG_LEVEL", "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"),
    *("ALL_PROXY", "HF_HUB_OFFLINE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "DEVKIT_CACHE", "ENGINE_SOURCE", "ENGINE_REF", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("IN_QUEUE", "IN_PROGRESS", "TIMED_OUT"),
    *("ENDPOINT_ID", "VOLUME_ID", "JOB_ID"),
}
_GPU_POOL = re.compile(r"(ADA|AMPERE|BLACKWELL|HOPPER)_\d+(_PRO)?")
_VARIABLE = re.compile(r"\$?\{?([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\}?(?:=.*)?")


def settings() -> set[str]:
    return {field.name.upper() for field in fields(Settings)}


def build_arguments() -> set[str]:
    """What the image's build and its files take from outside."""
    text = "\n".join(path.read_text() for path in (PROJECT / "Dockerfile", PROJECT / "docker-bake.hcl", PROJECT / "Makefile"))
    return set(re.findall(r"^(?:ARG|ENV|variable)\s+\"?([A-Z][A-Z0-9_]+)", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_on_a_page_exists(page: str) -> None:
    known = settings() | FOREIGN | build_arguments()
    wrong = [
        f"{page}:{number}: {match[1]}"
        for number, code in inline_code(page)
        if (match := _VARIABLE.fullmatch(code)) and match[1] not in known and not _GPU_POOL.fullmatch(match[1])
    ]
    assert not wrong, "\n".join(wrong)


def codes() -> set[str]:
    """The `code` of every error of the worker, of its commands and of the client."""
    modules = (errors, seed_errors, up_errors, client_errors)
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return {str(code) for kind in kinds if issubclass(kind, Exception) and (code := getattr(kind, "code", None))}


_TABLE = re.compile(r"^\s*\|(.*)\|\s*$")


def quoted_codes(page: str) -> Iterator[tuple[int, str]]:
    """Error codes on a page: `[code]`, `"code": "..."`, the first column of tables of errors, and what follows "fails with"."""
    blocks, lines = read(page)
    in_table = False
    for number, line in enumerate(lines, 1):
        row = _TABLE.match(line)
        first = row[1].split("|")[0].strip() if row else ""
        in_table = bool(row) and (in_table or first.lower() in {"code", "error", "`code`", "错误", "代码"})
        if in_table:
            yield from ((number, code) for code in re.findall(r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)+)`", first))
        yield from ((number, code) for code in re.findall(r"\[([a-z][a-z0-9]*(?:_[a-z0-9]+)+)\](?![(\[:])", line))
        yield from ((number, code) for code in re.findall(r"fails? with `([a-z][a-z0-9]*(?:_[a-z0-9]+)+)`", line))
    for block in blocks:
        yield from ((block.line, code) for code in re.findall(r"\"code\":\s*\"(\w+)\"", block.text))


@pytest.mark.parametrize("page", PAGES)
def test_every_error_code_on_a_page_exists(page: str) -> None:
    wrong = [f"{page}:{number}: {code}" for number, code in quoted_codes(page) if code not in codes()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_names_every_command_also_where_a_worker_would_start(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word], {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:1"}) == 0
    named = re.findall(r"^  (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(named) == sorted([*COMMANDS, "help"])


def test_the_version_is_the_same_everywhere() -> None:
    """In the package, and in the images that the pages name."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    named = {
        tag for page in PAGES for tag in re.findall(r"comfyui-volume-worker:(\d[\w.]*)", (PROJECT / page).read_text("utf-8"))
    }
    assert {project["version"], *named} == {__version__}


# --- these tests can fail -----------------------------------------------------------------------


def test_what_is_wrong_on_a_page_is_found() -> None:
    lines = ["# A `b` c, d!", "# A b c d", '[x](#a-b-c-d) ![p](no.svg) `[n](code.md)` <img src="q.png">']
    assert anchors(lines) == {"a-b-c-d", "a-b-c-d-1"}
    assert [target for _, target in links(lines)] == ["#a-b-c-d", "no.svg", "q.png"]
    assert anchors(["## 十分钟\N{FULLWIDTH COLON}端点 (v2)"]) == {"十分钟端点-v2"}
    assert wrong_words("python scripts/seed_volume.py a.toml --dry-run --s4 X  # --none") == ["--s4"]
    assert wrong_words("VOLUME_PATH=/x .venv/bin/python -m worker plan examples/none/workflow.json --jsonl") == [
        "--jsonl",
        "there is no examples/none/workflow.json",
    ]
    assert wrong_words("python3 scripts/run_workflow.py x --set 6.text=a | tee --append log") == []
    assert unknown_targets("make demo  # x\nmake -j2 nothing BENCH=links") == ["nothing"]
    blocks, prose = split("a\n```sh no-run\nls\n```\n- b\n  ```json\n  {} []\n  ```\n")
    assert [(block.kind, block.text, block.line) for block in blocks] == [("sh no-run", "ls\n", 2), ("json", "{} []\n", 6)]
    assert prose == ["a", "", "", "", "- b", "", "", ""]
    assert parsed(blocks[1]) == [{}, []]
    with pytest.raises(json.JSONDecodeError):
        parsed(Block("", 1, "json", '{"a": ...}'))
