"""What counts as a network volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from worker.base.files import is_volume

if TYPE_CHECKING:
    from pathlib import Path

    from devkit.moosefs import MooseFS


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        pytest.param([], True, id="an empty one"),
        pytest.param(["models"], True, id="models"),
        pytest.param(["huggingface-cache"], False, id="only the host's cache"),
        pytest.param(["huggingface-cache", "models"], True, id="both"),
        pytest.param(["a", "b", "huggingface-cache"], True, id="many"),
    ],
)
def test_a_folder_that_only_holds_the_hosts_cache_is_none(inside: list[str], *, expected: bool, tmp_path: Path) -> None:
    for name in inside:
        (tmp_path / name).mkdir()
    assert is_volume(tmp_path) is expected


def test_nothing_is_none_and_neither_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_volume(tmp_path / "absent")
    assert not is_volume(tmp_path / "file")


def test_a_mount_is_one_whatever_it_holds(moosefs: MooseFS) -> None:
    assert is_volume(moosefs.mounts[0])
