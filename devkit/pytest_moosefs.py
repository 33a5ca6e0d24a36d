"""A pytest plugin: the fixture `moosefs`, one real network volume for the whole test session."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from devkit.moosefs import MooseFS, available

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def moosefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooseFS]:
    """Yield a volume with two mounts, shared by the session: use your own folder. In CI its absence is a failure."""
    reason = available()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with MooseFS(tmp_path_factory.mktemp("moosefs") / "volume") as volume:
        yield volume
