"""A stand-in for the image's public base: the machine's own Debian with Python, from its mirror. Touches disk and network."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from devkit.engine.cache import BuildFailed, cache_root, exclusive, run, step

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = "python3,python3-venv,ca-certificates"
TIMEOUT_S = 900.0
_OS_RELEASE = Path("/etc/os-release")
_SOURCES = Path("/etc/apt")


def ensure_base(cache: Path | None = None, *, log: IO[str] | None = None) -> Path:
    """Return an archive of a minimal Debian with Python, made with debootstrap on the first call.

    Raises:
        BuildFailed: this machine is no Debian, has no mirror configured, or debootstrap failed.
    """
    release = _release()
    archive = (cache or cache_root()) / f"debian-{release}-{platform.machine()}.tar"
    if archive.is_file():
        return archive
    log = log or sys.stderr
    with exclusive(archive.with_suffix(".lock"), TIMEOUT_S, log) as lock:
        if not archive.is_file():
            tree = archive.with_suffix(".tree")
            shutil.rmtree(tree, ignore_errors=True)
            with step(f"making a minimal Debian {release}", log):
                command = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, tree, mirror(release))
                run(command, output=archive.with_suffix(".log"), timeout_s=TIMEOUT_S, lock=lock)
                partial = archive.with_suffix(".partial")
                without = ("--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*")
                subprocess.run(["tar", "--one-file-system", "-C", tree, *without, "-cf", partial, "."], check=True)
                partial.replace(archive)
                shutil.rmtree(tree)
    return archive


def mirror(release: str, sources: Path = _SOURCES) -> str:
    """Return the address of the mirror that this machine's apt has for a release of Debian. Raises `BuildFailed`."""
    for address, suites in _entries(sources):
        if release in suites:
            return address
    raise BuildFailed(f"no mirror for Debian {release} in {sources}: add one to sources.list.d")


def _entries(sources: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each address with its suites, from files of the older and the newer format."""
    for path in [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]:
        text = path.read_text() if path.is_file() else ""
        for line in re.findall(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)", text, re.MULTILINE):
            yield line[0], [line[1]]
        for stanza in text.split("\n\n"):
            fields = dict(re.findall(r"^(\w[\w-]*):\s*(.*)$", stanza, re.MULTILINE))
            for address in fields.get("URIs", "").split():
                yield address, fields.get("Suites", "").split()


def _release(path: Path = _OS_RELEASE) -> str:
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', path.read_text(), re.MULTILINE))
    if fields.get("ID") != "debian" or not fields.get("VERSION_CODENAME"):
        raise BuildFailed("the image's test needs a Debian machine, for debootstrap and its mirror")
    return str(fields["VERSION_CODENAME"])
