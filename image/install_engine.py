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
BESIDE: Final = "websocket-client"  # handlers written for worker-comfyui import it


def asked_for(requirements: str) -> list[str]:
    """Return the lines of a requirements.txt that ask for something."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return [line for line in lines if line]


def unanswered(requirements: str, lock: str) -> list[str]:
    """Return the lines that the lock was not made for."""
    answered = {line.removeprefix("#").strip() for line in lock.splitlines() if line.startswith("#")}
    return [line for line in asked_for(requirements) if line not in answered]


def pins(requirements: str, lock: str) -> list[str]:
    """Return the lock's pins that hold for these requirements too: all but those of packages that are asked for differently."""
    others = {_name(line) for line in unanswered(requirements, lock)}
    return [pin for pin in re.findall(r"^[a-z0-9-]+==[^\s;]+", lock, re.MULTILINE) if _name(pin) not in others]


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
    if unanswered(asked, locked):
        _install_another(asked, locked)
    else:
        _pip("--no-deps", "--require-hashes", "--requirement", str(lock))
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


def _install_another(asked: str, locked: str) -> None:
    command = [sys.executable, "-m", "pip", "freeze", "--all"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - pip
    kept = [line for line in said.splitlines() if KEPT.match(line)]
    lines = asked_for(asked)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join([*kept, *pins(asked, locked)]))
        constraints.flush()
        _pip("--constraint", constraints.name, *(line for line in lines if not PAGES.match(_name(line))), BESIDE)
        templates = [line for line in lines if _name(line) == "comfyui-workflow-templates"]
        if templates:
            _pip("--no-deps", *templates)
            needs = importlib.metadata.requires("comfyui-workflow-templates") or []
            _pip("--no-deps", "--constraint", constraints.name, *(need for need in needs if _name(need).endswith("-core")))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-compile", *arguments]
    subprocess.run(command, check=True)  # noqa: S603 - pip, with what the image's own files say


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
