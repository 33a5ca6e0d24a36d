"""Paths on the volume: every name stays below its root, and no two things share a place."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.base.files import write_atomically
from worker.errors import UnsafePath
from worker.model_spec import content_key
from worker.store.layout import Layout, safe_parts, title_of_seal

LAYOUT = Layout(Path("/volume"))
SHA256 = "ab" * 32


@pytest.mark.parametrize("size", [228, 229, 242, 243, 255])
@pytest.mark.parametrize("stem", ["x", "é", "漢", "x."])
def test_the_seal_of_a_name_of_any_length_fits_a_disk_and_leads_back_to_it(tmp_path: Path, size: int, stem: str) -> None:
    name = (stem * size).encode()[: size - len(".ckpt")].decode(errors="ignore") + ".ckpt"
    layout = Layout(tmp_path)
    for path in (layout.seal("loras", f"sub/{name}"), layout.pending_seal("loras", f"sub/{name}")):
        write_atomically(path, b"a seal")
        assert path.read_bytes() == b"a seal"
    found = layout.seal("loras", f"sub/{name}").relative_to(layout.seals)
    assert title_of_seal(found.as_posix()) == f"loras/sub/{name}"
    assert not found.name.startswith(".")
    assert len(set(found.parts) & {"loras", "sub"}) == 2


def test_a_model_lies_where_people_look_for_it() -> None:
    assert LAYOUT.model("loras", "style/ink.safetensors") == Path("/volume/models/loras/style/ink.safetensors")


def test_a_seal_lies_beside_nothing_that_comfyui_reads() -> None:
    assert LAYOUT.seal("loras", "style/ink.safetensors") == Path("/volume/.worker/seals/loras/style/ink.safetensors.json")
    assert LAYOUT.pending_seal("loras", "ink.pt").parent == LAYOUT.seal("loras", "ink.pt").parent
    assert LAYOUT.pending_seal("loras", "ink.pt") != LAYOUT.seal("loras", "ink.pt")


def test_partials_and_locks_are_called_by_content() -> None:
    assert LAYOUT.partial(SHA256) == Path("/volume/.worker/partial") / SHA256
    assert LAYOUT.lock(SHA256) == Path("/volume/.worker/locks") / SHA256
    assert LAYOUT.lock_progress(SHA256) == Path("/volume/.worker/locks") / f"{SHA256}.json"


def test_the_host_cache_is_as_huggingface_names_it() -> None:
    assert LAYOUT.host_cache_repo("org/name") == Path("/volume/huggingface-cache/hub/models--org--name")
    assert LAYOUT.host_cache_repo("org/name", "dataset").name == "datasets--org--name"


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\..\\b", "a\nb", "a\0b", "a/"]
)
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    for build in (LAYOUT.model, LAYOUT.seal, LAYOUT.pending_seal):
        with pytest.raises(UnsafePath):
            build("loras", name)
        with pytest.raises(UnsafePath):
            build(name, "ink.safetensors")


@given(st.text())
def test_whatever_the_name_its_path_stays_below(name: str) -> None:
    try:
        path = LAYOUT.model("loras", name)
    except UnsafePath:
        return
    assert PurePosixPath(path).is_relative_to("/volume/models/loras")
    assert ".." not in path.parts
    assert path.relative_to("/volume/models/loras").as_posix() == name == "/".join(safe_parts("name", name))


@given(
    st.tuples(st.text(), st.text(), st.text() | st.none(), st.integers(0)),
    st.tuples(st.text(), st.text(), st.none(), st.integers(0)),
)
def test_two_contents_without_a_hash_never_share_a_key(one: tuple[str, str, str, int], two: tuple[str, str, None, int]) -> None:
    first, second = content_key(None, one[0], one[2], one[3]), content_key(None, two[0], two[2], two[3])
    assert (first == second) == ((one[0], one[2] or "", one[3]) == (two[0], two[2] or "", two[3]))
    assert safe_parts("key", first) == (first,)


def test_a_content_with_a_hash_is_called_by_it() -> None:
    assert content_key(SHA256.upper(), "anything", "etag", 1) == SHA256
