"""What a run produced, sorted into the lists that clients know."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.media.outputs import CollectedOutputs, OutputFiles, media_type, missing_output_sentences, node_order

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random


def file(filename: str, subfolder: str = "", kind: str = "output", **more: Any) -> dict[str, Any]:
    return {"filename": filename, "subfolder": subfolder, "type": kind} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ComfyUI's base folder with one file for each name that these tests use."""
    for name in ("a.png", "sub/b.webp", "c.mp4", "d.flac", "e.latent", "3d/f.glb", "g.gif"):
        path = tmp_path / "output" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "temp").mkdir()
    (tmp_path / "temp/preview.png").write_bytes(b"preview")
    return tmp_path


@pytest.fixture
def files(folder: Path) -> OutputFiles:
    return OutputFiles(folder / "output", folder / "temp")


def test_every_kind_of_output_goes_to_its_list(files: OutputFiles) -> None:
    outputs: dict[str, dict[str, Any]] = {
        "10": {"images": [file("c.mp4"), file("a.png")], "animated": [True]},
        "9": {"images": [file("b.webp", "sub"), file("preview.png", kind="temp")]},
        "57:8": {"gifs": [file("g.gif", format="image/gif", frame_rate=8.0)]},
        "57:11": {"videos": [file("c.mp4")]},
        "58": {"audio": [file("d.flac")]},
        "59": {"text": ["hello", "you"]},
        "60": {"latents": [file("e.latent")]},
        "61": {"3d": [file("f.glb", "3d")]},
        "62": {"result": ["3d/f.glb", {"position": 1}, None]},
        "63": {"images": None, "bbox": [{"x": 1}], "animated": [True, False]},
    }
    items = files.collect(outputs).outputs
    found = [(item.kind, item.node_id, item.filename, item.subfolder, item.media_type) for item in items]
    assert found == [
        ("images", "9", "b.webp", "sub", "image/webp"),
        ("images", "10", "c.mp4", "", "video/mp4"),
        ("images", "10", "a.png", "", "image/png"),
        ("videos", "57:8", "g.gif", "", "image/gif"),
        ("videos", "57:11", "c.mp4", "", "video/mp4"),
        ("audio", "58", "d.flac", "", "audio/flac"),
        ("text", "59", "text_59_0.txt", "", "text/plain"),
        ("text", "59", "text_59_1.txt", "", "text/plain"),
        ("files", "60", "e.latent", "", "application/octet-stream"),
        ("files", "61", "f.glb", "3d", "model/gltf-binary"),
        ("files", "62", "f.glb", "3d", "model/gltf-binary"),
    ]


def test_sizes_are_those_of_the_files_and_texts(files: OutputFiles) -> None:
    found = files.collect({"1": {"images": [file("b.webp", "sub")], "text": ["häh"]}}).outputs
    assert [item.size_bytes for item in found] == [len("sub/b.webp"), len("häh".encode())]


def test_a_name_may_hold_its_folder(files: OutputFiles) -> None:
    (found,) = files.collect({"1": {"images": [file("sub/b.webp")]}}).outputs
    assert found.filename == "b.webp"


def test_previews_come_only_when_asked_for(files: OutputFiles) -> None:
    outputs = {"1": {"images": [file("preview.png", kind="temp")]}}
    assert files.collect(outputs) == CollectedOutputs()
    assert [item.filename for item in files.collect(outputs, previews=True).outputs] == ["preview.png"]


def test_what_is_an_input_is_no_output(files: OutputFiles) -> None:
    assert files.collect({"1": {"images": [file("a.png", kind="input")]}}, previews=True) == CollectedOutputs()


def test_only_the_nodes_that_are_asked_for_and_a_word_for_those_that_gave_nothing(files: OutputFiles) -> None:
    outputs = {"1": {"images": [file("a.png")]}, "2": {"images": [file("c.mp4")]}}
    nodes = {"2", "10", "9"}
    found = files.collect(outputs, nodes=nodes)
    assert [item.node_id for item in found.outputs] == ["2"]
    assert [text.split()[1] for text in missing_output_sentences(nodes, found, {})] == ["9", "10"]
    assert missing_output_sentences(None, CollectedOutputs(), {}) == []


def test_a_file_that_a_node_lists_twice_comes_once(files: OutputFiles) -> None:
    outputs = {"1": {"gifs": [file("c.mp4")], "images": [file("c.mp4")]}, "2": {"images": [file("c.mp4")]}}
    assert [(item.node_id, item.kind) for item in files.collect(outputs).outputs] == [("1", "videos"), ("2", "images")]


def test_texts_of_two_keys_have_names_of_their_own_and_other_values_are_written_as_json(files: OutputFiles) -> None:
    found = files.collect({"1": {"text": ["a", {"b": float("nan")}], "string": "c", "images": []}}).outputs
    assert [(item.filename, item.source) for item in found] == [
        ("text_1_0.txt", "a"),
        ("text_1_1.txt", '{"b": NaN}'),
        ("text_1_2.txt", "c"),
    ]


def test_half_a_character_is_replaced_because_no_utf_8_carries_it(files: OutputFiles) -> None:
    (found,) = files.collect({"1": {"text": ["a\ud83d"]}}).outputs
    assert found.source == "a?"


@pytest.mark.parametrize("name", ["gone.png", "sub", "pipe.png", "x" * 300, "half\ud83d.png"])
def test_a_file_that_is_not_there_has_a_sentence_beside_what_is(name: str, files: OutputFiles, folder: Path) -> None:
    os.mkfifo(folder / "output/pipe.png")
    found = files.collect({"9": {"images": [file(name), file("a.png")]}})
    assert [item.filename for item in found.outputs] == ["a.png"]
    assert [item.outside for item in found.missing] == [False]
    (said,) = missing_output_sentences(None, found, {})
    assert said.startswith(f"Node 9 lists the file '{name[:4]}")
    assert said.endswith("which is not in ComfyUI's output folder: it is not returned.")
    assert len(said) < 400


@pytest.mark.parametrize(
    ("filename", "subfolder"), [("../secret", ""), ("secret", ".."), ("/etc/hostname", ""), ("x.png", "/tmp"), ("a\0b", "")]
)
def test_a_node_cannot_have_files_from_elsewhere_delivered(filename: str, subfolder: str, files: OutputFiles) -> None:
    found = files.collect({"9": {"images": [file(filename, subfolder)]}})
    assert found.outputs == ()
    assert [item.outside for item in found.missing] == [True]
    (said,) = missing_output_sentences(None, found, {})
    assert said.endswith("which is outside of ComfyUI's output folder: it is not returned.")


def test_a_place_that_is_none_of_comfyuis_is_elsewhere(files: OutputFiles) -> None:
    found = files.collect({"9": {"images": [file("a.png", kind="s3")]}})
    assert found.outputs == ()
    assert missing_output_sentences(None, found, {}) == [
        "Node 9 lists the file 'a.png', which is outside of ComfyUI's s3 folder: it is not returned."
    ]


def test_a_link_out_of_the_folder_is_no_way_out(files: OutputFiles, folder: Path) -> None:
    (folder / "secret.png").write_bytes(b"secret")
    (folder / "output/link.png").symlink_to(folder / "secret.png")
    found = files.collect({"9": {"images": [file("link.png")]}})
    assert (found.outputs, [item.outside for item in found.missing]) == ((), [True])
    assert files.collect({"9": {"result": ["link.png", "../secret.png", "/etc/hostname", "no.glb", "a\0.glb"]}}).outputs == ()
    outside = str(folder / "secret.png")
    (found_text,) = files.collect({"9": {"files": [outside]}}).outputs
    assert (found_text.kind, found_text.source) == ("text", outside)


def test_an_output_folder_may_itself_be_a_link(files: OutputFiles, folder: Path) -> None:
    (folder / "linked").symlink_to(folder / "output")
    assert files.collect({"9": {"images": [file("a.png")]}}).outputs
    linked = OutputFiles(folder / "linked")
    outputs: dict[str, dict[str, Any]]
    outputs = {"9": {"images": [file("a.png")], "files": [str(folder / "linked/a.png"), str(folder / "output/a.png")]}}
    (found,) = linked.collect(outputs).outputs
    assert found.size_bytes == len("a.png")


def test_strings_and_numbers_under_any_key_are_texts(files: OutputFiles) -> None:
    outputs: dict[str, dict[str, Any]] = {
        "1": {"tags": ["1girl, solo, 国风", None, ""], "value": [42], "score": 0.5, "animated": [True]},
        "2": {"string": ["a", "a"], "caption": "a", "rows": [["b", "c"], "c"]},
        "3": {"files": ["/no/such/file.png", "a.png"]},
    }
    found = files.collect(outputs)
    assert [(item.kind, item.filename, item.source) for item in found.outputs] == [
        ("text", "text_1_0.txt", "1girl, solo, 国风"),
        ("text", "text_1_1.txt", "42"),
        ("text", "text_1_2.txt", "0.5"),
        ("text", "text_2_0.txt", "a"),
        ("text", "text_2_1.txt", "a"),
        ("text", "text_2_2.txt", "b"),
        ("text", "text_2_3.txt", "c"),
        ("text", "text_3_0.txt", "/no/such/file.png"),
        ("text", "text_3_1.txt", "a.png"),
    ]
    assert missing_output_sentences(None, found, {}) == []


def test_a_path_in_the_output_folder_is_its_file_and_comes_once(files: OutputFiles, folder: Path) -> None:
    path, other = str(folder / "output/a.png"), str(folder / "output/sub/b.webp")
    found = files.collect({"5": {"images": [file("a.png")], "files": [path]}, "6": {"files": [other]}}).outputs
    assert [(item.kind, item.node_id, item.filename, item.subfolder) for item in found] == [
        ("images", "5", "a.png", ""),
        ("files", "6", "b.webp", "sub"),
    ]


def test_a_picture_that_came_through_the_websocket_is_one(files: OutputFiles) -> None:
    entry = {"filename": "websocket_5_0.png", "type": "websocket", "data": b"png"}
    (found,) = files.collect({"5": {"images": [entry]}}).outputs
    assert (found.kind, found.media_type, found.size_bytes, found.source) == ("images", "image/png", 3, b"png")


def test_a_node_that_gives_nothing_is_told_of_where_that_is_a_loss(files: OutputFiles) -> None:
    outputs: dict[str, dict[str, Any]] = {
        "2": {"images": []},
        "3": {"bbox": [{"x": 1}], "masks": {"a": 1}, "flags": [True]},
        "4": {"images": [file("preview.png", kind="temp")], "bbox": [{"x": 1}]},
        "5": {"a": []},
    }
    silent = {"6": "SaveImageWebsocket", "7": "PlaySound"}
    alone = missing_output_sentences(None, files.collect(outputs), silent)
    assert alone == [
        "Node 2 ran and lists no file; what it saved, if anything, is not returned.",
        "Node 3 put out only what is neither a file nor a text (bbox, masks): it is not returned.",
        "Node 5 ran and told ComfyUI of no file and no text: nothing of it is returned.",
        "Node 6 (SaveImageWebsocket) ran and told ComfyUI of no file and no text: nothing of it is returned.",
        "Node 7 (PlaySound) ran and told ComfyUI of no file and no text: nothing of it is returned.",
    ]
    beside = missing_output_sentences(None, files.collect({**outputs, "1": {"images": [file("a.png")]}}), silent)
    assert beside == [alone[0], alone[1], alone[3]]
    assert missing_output_sentences({"1"}, files.collect({"1": {"images": [file("a.png")]}}, nodes={"1"}), silent) == []


@given(st.sets(st.text(min_size=1)), st.randoms(use_true_random=False))
def test_the_order_of_nodes_does_not_depend_on_how_they_come(ids: set[str], random: Random) -> None:
    shuffled = sorted(ids)
    random.shuffle(shuffled)
    assert sorted(shuffled, key=node_order) == sorted(ids, key=node_order)


def test_node_ids_are_ordered_as_people_count() -> None:
    assert sorted(["10", "9", "57:10", "57:9", "57", "a", "007"], key=node_order) == [
        "007",
        "9",
        "10",
        "57",
        "57:9",
        "57:10",
        "a",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.PNG", "image/png"),
        ("a.webm", "video/webm"),
        ("a.opus", "audio/ogg"),
        ("a.latent", "application/octet-stream"),
        ("a", "application/octet-stream"),
    ],
)
def test_media_types(name: str, expected: str) -> None:
    assert media_type(name) == expected
