"""Install ComfyUI's packages beside torch, which stays as it is. Touches the network, the disk and processes.

    /opt/venv/bin/python install_engine.py REQUIREMENTS LOCK

Run once, while an image is built. The lock says which lines of a requirements.txt it answers. A ComfyUI that asks for the same
gets exactly the lock's files, by their hashes; another one gets what it asks for, and the lock's versions of all else.
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

# The front end's templates and help pages are hundreds of MB; ComfyUI only wants to import the templates' package.
PAGES: Final = re.compile(r"comfyui-(workflow-templates|embedded-docs)")
# As the base's flavour of torch has them. setuptools: the newest are without pkg_resources, which custom nodes import.
KEPT: Final = re.compile(r"(torch|torchvision|torchaudio|triton|setuptools|nvidia-.*)==")


def asked_for(requirements: str) -> list[str]:
    """Return the lines of a requirements.txt that ask for something."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return [line for line in lines if line]


def unanswered(requirements: str, lock: str) -> list[str]:
    """Return the lines that the lock was not made for."""
    return [line for line in asked_for(requirements) if line not in _answered(lock)]


def held(requirements: str, lock: str) -> str:
    """Return the lock without the packages that these requirements ask for differently, or not at all."""
    others = {_name(line) for line in unanswered(requirements, lock)}
    others |= {_name(line) for line in _answered(lock)} - {_name(line) for line in asked_for(requirements)}
    entries = re.findall(r"^[a-z0-9].*\n(?: .*\n)*", lock, re.MULTILINE)
    return "".join(entry for entry in entries if _name(entry) not in others)


def _answered(lock: str) -> list[str]:
    return [line.removeprefix("#").strip() for line in lock.splitlines() if line.startswith("#   ")]


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def main(requirements: Path, lock: Path) -> None:
    """Install them. Raises `subprocess.CalledProcessError` when pip fails."""
    packages = Path(sysconfig.get_path("purelib"))
    # What both venvs want (aiohttp, pydantic, ...) is there once: ComfyUI finds the worker's after its own, and pip
    # sees it as installed. Never the other way round: the worker must not find torch.
    (worker,) = Path("/opt/worker/lib").glob("python3*/site-packages")
    (packages / "shared.pth").write_text(f"{worker}\n")
    asked, locked = requirements.read_text("utf-8"), lock.read_text("utf-8")
    _pip("--no-deps", "--require-hashes", lines=held(asked, locked))
    if unanswered(asked, locked):
        _install_others(asked)
    leave_one_template(packages)


def leave_one_template(packages: Path) -> None:
    """List one empty template in place of those whose files are not here: ComfyUI logs an error when it finds no file."""
    listed = packages / "comfyui_workflow_templates_core" / "manifest.json"
    files = packages / "comfyui_workflow_templates_json"
    if listed.is_file():
        template = {"id": "empty", "bundle": "media-other", "assets": [{"filename": "empty.json", "sha256": ""}]}
        listed.write_text(json.dumps({"manifest_version": 1, "bundles": {}, "templates": [template]}), "utf-8")
        (files / "templates").mkdir(parents=True)
        (files / "__init__.py").touch()
        (files / "templates" / "empty.json").write_text("{}")


def _install_others(asked: str) -> None:
    """Install what the lock left open. Pip keeps what is there, unless something asks for another version of it."""
    command = [sys.executable, "-m", "pip", "freeze", "--all"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - pip
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.write("\n".join(line for line in said.splitlines() if KEPT.match(line)))
        kept.flush()
        wanted = asked_for(asked)
        _pip("--constraint", kept.name, lines="\n".join(line for line in wanted if not PAGES.match(_name(line))))
    templates = [line for line in wanted if _name(line) == "comfyui-workflow-templates"]
    if templates:
        _pip("--no-deps", lines=templates[0])
        needs = importlib.metadata.requires("comfyui-workflow-templates") or []
        _pip("--no-deps", lines="\n".join(need for need in needs if _name(need).endswith("-core")))


def _pip(*arguments: str, lines: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(lines)
        requirements.flush()
        options = ["--no-cache-dir", "--no-compile", *arguments, "--requirement", requirements.name]
        subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)  # noqa: S603 - pip, for the image's files


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
