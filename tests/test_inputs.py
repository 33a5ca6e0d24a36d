"""Files that come with a job: there while it runs, gone afterwards, never outside their folder."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

from worker.errors import ImageNotBase64, UnsafePath
from worker.job import InputImage
from worker.media.inputs import InputFiles, clear_leftovers, decode_base64

if TYPE_CHECKING:
    from pathlib import Path

A, B = base64.b64encode(b"first").decode(), base64.b64encode(b"second").decode()


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_there_for_the_job_and_gone_after_it(tmp_path: Path) -> None:
    with InputFiles(tmp_path / "input").placed([InputImage("a.png", A), InputImage("deep/er/b.bin", B)]):
        assert listing(tmp_path / "input") == {"a.png": b"first", "deep/er/b.bin": b"second"}
    assert list((tmp_path / "input").iterdir()) == []


def test_a_file_of_the_image_is_put_aside_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "example.png").write_bytes(b"baked")
    with InputFiles(tmp_path).placed([InputImage("example.png", A), InputImage("example.png", B)]):
        assert (tmp_path / "example.png").read_bytes() == b"second"
    assert listing(tmp_path) == {"example.png": b"baked"}


def test_a_failing_job_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ZeroDivisionError), InputFiles(tmp_path).placed([InputImage("sub/a", A), InputImage("new/b", B)]):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]


def test_one_bad_file_and_none_appears(tmp_path: Path) -> None:
    with (
        pytest.raises(ImageNotBase64, match=r"'b\.png'"),
        InputFiles(tmp_path).placed([InputImage("a", A), InputImage("b.png", "?")]),
    ):
        pytest.fail("the job must not run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "..", "", ".", "a\\..\\b", "a\0b"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    with pytest.raises(UnsafePath), InputFiles(folder).placed([InputImage(name, A)]):
        pytest.fail("the job must not run")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("text", [A, f"data:image/png;base64,{A}", f"{A[:4]}\n{A[4:]}\r\n"])
def test_base64_as_clients_send_it(text: str) -> None:
    assert decode_base64("a", text) == b"first"


@pytest.mark.parametrize("text", ["", "data:image/png;base64,", "not base64!", "QQ", "data:image/png", "ä"])
def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(ImageNotBase64, match="Failed to upload one or more input images"):
        decode_base64("a", text)


def test_what_a_killed_worker_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".job-x").mkdir()
    (tmp_path / ".job-x" / "0").touch()
    (tmp_path / "keep.png").touch()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.png"]
    clear_leftovers(tmp_path / "absent")
