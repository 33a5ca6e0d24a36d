"""The lock files: whole, alike, and installed without a resolver."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from devkit.local_worker import PROJECT

if TYPE_CHECKING:
    from pathlib import Path

LOCKS = sorted(str(path.relative_to(PROJECT)) for path in (*PROJECT.glob("*.lock"), *(PROJECT / "devkit").rglob("*.lock")))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")


def entries(lock: str) -> dict[str, list[str]]:
    """Each requirement of a lock, with the hashes that stand below it."""
    found: dict[str, list[str]] = {}
    pin = ""
    for line in (PROJECT / lock).read_text("utf-8").splitlines():
        if line and line[0] not in " #":
            pin = line.rstrip("\\ ")
            found[pin] = []
        elif "--hash=" in line:
            found[pin].append(line.strip())
    return found


def test_there_are_locks() -> None:
    assert {"requirements.lock", "requirements-dev.lock", "devkit/engine/requirements.lock"} <= set(LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_each_package_with_hashes_and_names_no_index(lock: str) -> None:
    pins = entries(lock)
    assert pins
    assert [pin for pin, hashes in pins.items() if not PIN.match(pin) or not hashes] == []
    assert "://" not in (PROJECT / lock).read_text("utf-8")


def test_the_tests_run_with_the_workers_own_versions() -> None:
    ours, theirs = set(entries("requirements.lock")), set(entries("requirements-dev.lock"))
    assert ours <= theirs


def test_what_is_installed_is_all_that_it_needs() -> None:
    """What the resolver would have said: the locks are installed with --no-deps."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def places() -> list[Path]:
    pages = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]
    return [*pages, PROJECT / "Makefile", PROJECT / "Dockerfile", PROJECT / ".ci/run"]


@pytest.mark.parametrize("path", places(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_lock_is_installed_without_a_resolver(path: Path) -> None:
    """The resolver of pip 23 asks for the newest `pydantic[email]`, and fails as soon as there is one newer than the lock's."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    installs = [line for line in text.splitlines() if re.search(r"pip.* install .*-r \S*\.lock", line)]
    assert [line for line in installs if "--no-deps" not in line] == []
