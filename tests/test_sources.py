"""One lookup over every list of models: the order, what each format says, and what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.editor.embedded_models import embedded_models
from worker.errors import (
    AmbiguousModel,
    HostNotAllowed,
    ManifestInvalid,
    ModelsInvalid,
    RequestError,
    SpecInvalid,
    SuffixNotAllowed,
)
from worker.model_spec import HubFile, ModelSpec, UrlSource, parse_spec
from worker.models.sources import Sources

HOSTS = ("huggingface.co", "civitai.com")
SHA = "ab" * 32
UNET = ("diffusion_models", "unet")


def toml(*models: dict[str, object]) -> str:
    blocks = ("[[model]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in model.items()) for model in models)
    return "\n".join(blocks)


def model(folder: str, name: str, repo: str = "o/r", **more: object) -> dict[str, object]:
    return {"folder": folder, "name": name, "source": f"hf://{repo}/{name}"} | more


def repo_of(spec: ModelSpec | None) -> str | None:
    if spec is None:
        return None
    assert isinstance(spec.source, HubFile)
    return spec.source.repo


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """A small catalogue."""
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps({"version": "1", "models": [model("vae", "a.safetensors", "catalog/a"), *TWICE]}))
    return path


TWICE = [model("checkpoints", "twice.safetensors", "catalog/c"), model("diffusion_models", "twice.safetensors", "catalog/d")]


def read(catalog: Path, **lists: Any) -> Sources:
    return Sources.read(catalog=catalog, **lists)


def ui(*entries: dict[str, object], values: list[object] | None = None, mode: int = 0) -> dict[str, Any]:
    shown = [entry["name"] for entry in entries] if values is None else values
    return {"nodes": [{"id": 1, "type": "L", "mode": mode, "widgets_values": shown, "properties": {"models": list(entries)}}]}


def embedded(folder: str, name: str, repo: str = "o/r", **more: object) -> dict[str, object]:
    return {"directory": folder, "name": name, "url": f"https://huggingface.co/{repo}/resolve/main/{name}"} | more


# --- the order ----------------------------------------------------------------------------------


def test_the_first_list_that_knows_a_model_decides(catalog: Path, tmp_path: Path) -> None:
    name, folders = "a.safetensors", ("vae",)
    (tmp_path / "image.toml").write_text(toml(model("vae", name, "image/a")))
    (tmp_path / "models.toml").write_text(toml(model("vae", name, "volume/a")))
    found = []
    sources = read(catalog)
    found.append(sources)
    found.append(read(catalog, models=f"vae=hf://short/a/{name}"))
    found.append(read(catalog, manifest=str(tmp_path / "image.toml"), models=f"vae=hf://short/a/{name}"))
    found.append(
        read(
            catalog,
            volume_manifest=tmp_path / "models.toml",
            manifest=str(tmp_path / "image.toml"),
            models=f"vae=hf://short/a/{name}",
        )
    )
    found.append(found[-1].with_workflow(ui(embedded("vae", name, "drawn/a")), HOSTS))
    found.append(found[-1].with_request([model("vae", name, "request/a")], HOSTS))
    assert [repo_of(each.find(name, folders)) for each in found] == [
        "catalog/a",
        "short/a",
        "image/a",
        "volume/a",
        "drawn/a",
        "request/a",
    ]


def test_request_and_metadata_may_come_in_either_order(catalog: Path) -> None:
    request, drawn = [model("vae", "x.gguf", "request/x")], ui(embedded("vae", "x.gguf", "drawn/x"))
    for sources in (
        read(catalog).with_request(request, HOSTS).with_workflow(drawn, HOSTS),
        read(catalog).with_workflow(drawn, HOSTS).with_request(request, HOSTS),
    ):
        assert repo_of(sources.find("x.gguf", ("vae",))) == "request/x"


def test_a_job_leaves_the_workers_sources_as_they_were(catalog: Path) -> None:
    sources = read(catalog)
    sources.with_request([model("vae", "x.gguf")], HOSTS)
    assert sources.find("x.gguf", ("vae",)) is None
    assert sources.with_request(None, HOSTS) is sources


def test_the_folder_counts(catalog: Path) -> None:
    sources = read(catalog, models="vae=hf://o/r/x.gguf")
    assert sources.find("x.gguf", ("vae",))
    assert sources.find("x.gguf", ("loras", "vae"))
    assert sources.find("x.gguf", ())
    assert sources.find("x.gguf", ("loras",)) is None
    assert sources.find("X.gguf", ("vae",)) is None
    assert sources.find("sub/x.gguf", ("vae",)) is None


def test_a_list_that_knows_the_name_in_another_folder_only_is_passed(catalog: Path) -> None:
    sources = read(catalog, models="loras=hf://other/r/a.safetensors")
    assert repo_of(sources.find("a.safetensors", ("vae",))) == "catalog/a"


def test_a_folder_of_folders_and_a_name_with_folders_are_one_path(catalog: Path) -> None:
    sources = read(catalog, manifest=toml(model("loras/flux", "x.gguf", "one/x"), model("loras", "sdxl/y.gguf", "two/y")))
    assert repo_of(sources.find("flux/x.gguf", ("loras",))) == "one/x"
    assert repo_of(sources.find("sdxl/y.gguf", ("loras",))) == "two/y"
    assert repo_of(sources.find("sdxl/y.gguf", ())) == "two/y"
    assert sources.find("y.gguf", ("loras",)) is None


def test_nobody_knows_it(catalog: Path) -> None:
    sources = read(catalog, models="vae=hf://o/r/my_model_v2.safetensors")
    assert sources.find("my_model_v1.safetensors", ("vae",)) is None
    assert sources.near("my_model_v1.safetensors") == ("vae/my_model_v2.safetensors",)
    assert sources.near("zzz") == ()


# --- two meanings -------------------------------------------------------------------------------


def test_one_name_in_two_folders_is_settled_by_the_loader(catalog: Path) -> None:
    sources = read(catalog)
    assert repo_of(sources.find("twice.safetensors", ("checkpoints",))) == "catalog/c"
    assert repo_of(sources.find("twice.safetensors", UNET)) == "catalog/d"


def test_and_fails_naming_both_when_the_loader_is_unknown(catalog: Path) -> None:
    with pytest.raises(AmbiguousModel) as caught:
        read(catalog).find("twice.safetensors")
    assert caught.value.details() == [
        "checkpoints/twice.safetensors from hf://catalog/c/twice.safetensors",
        "diffusion_models/twice.safetensors from hf://catalog/d/twice.safetensors",
    ]
    assert "could be any of 2 in the official catalogue: checkpoints/twice" in str(caught.value)
    assert "name the right one" in str(caught.value)


def test_an_earlier_list_settles_what_a_later_one_leaves_open(catalog: Path) -> None:
    sources = read(catalog, models="checkpoints=hf://mine/x/twice.safetensors")
    assert repo_of(sources.find("twice.safetensors")) == "mine/x"


def test_a_deliberate_list_with_two_meanings_is_an_error_whatever_later_lists_say(catalog: Path) -> None:
    sources = read(catalog).with_request(
        [model("vae", "a.safetensors", "one/a"), model("vae", "a.safetensors", "two/a")], HOSTS
    )
    with pytest.raises(AmbiguousModel, match=r"in the request's 'models': .*one/a.*; .*two/a"):
        sources.find("a.safetensors", ("vae",))


def test_metadata_with_two_meanings_is_settled_by_a_later_list_or_is_an_error(catalog: Path) -> None:
    pasted = ui(embedded("vae", "a.safetensors", "one/a"), embedded("vae", "a.safetensors", "two/a"))
    assert repo_of(read(catalog).with_workflow(pasted, HOSTS).find("a.safetensors", ("vae",))) == "catalog/a"
    unknown = ui(embedded("vae", "b.safetensors", "one/b"), embedded("vae", "b.safetensors", "two/b"))
    with pytest.raises(AmbiguousModel, match="in the workflow's metadata"):
        read(catalog).with_workflow(unknown, HOSTS).find("b.safetensors", ("vae",))


def test_mirrors_with_one_sha256_are_one_file_and_the_first_is_taken(catalog: Path) -> None:
    mirrors = [model("vae", "m.gguf", "one/m", sha256=SHA), model("vae", "m.gguf", "two/m", sha256=SHA.upper())]
    for order, first in ((mirrors, "one/m"), (mirrors[::-1], "two/m")):
        assert repo_of(read(catalog).with_request(order, HOSTS).find("m.gguf", ("vae",))) == first
        assert repo_of(read(catalog, manifest=toml(*order)).find("m.gguf", ("vae",))) == first


def test_the_same_source_in_two_folders_or_twice_is_one_file(catalog: Path) -> None:
    twice = [model("text_encoders", "t.gguf"), model("clip", "t.gguf"), model("clip", "t.gguf")]
    found = read(catalog, manifest=toml(*twice)).find("t.gguf", ("text_encoders", "clip"))
    assert found
    assert found.folder == "text_encoders"


def test_one_source_with_two_hashes_is_two_files(catalog: Path) -> None:
    entries = [model("vae", "m.gguf", sha256=SHA), model("vae", "m.gguf", sha256="cd" * 32)]
    with pytest.raises(AmbiguousModel):
        read(catalog).with_request(entries, HOSTS).find("m.gguf", ("vae",))


def test_where_the_folder_is_a_guess_one_folder_of_a_deliberate_list_counts(catalog: Path, tmp_path: Path) -> None:
    volume = tmp_path / "models.toml"
    volume.write_text(toml(model("ipadapter-flux", "ip.bin", "volume/ip")))
    sources = read(catalog, volume_manifest=volume)
    assert sources.find("ip.bin", ("ipadapter",)) is None
    assert repo_of(sources.find("ip.bin", ("ipadapter",), guessed=True)) == "volume/ip"
    sources = read(catalog, volume_manifest=volume, manifest=toml(model("ipadapter", "ip.bin", "image/ip")))
    assert repo_of(sources.find("ip.bin", ("ipadapter",), guessed=True)) == "image/ip", "a list knows it in the guessed folder"
    two = toml(model("ipadapter-flux", "ip.bin", "one/ip"), model("ipadapter-sdxl", "ip.bin", "two/ip"))
    with pytest.raises(AmbiguousModel, match=r"ipadapter-flux/ip\.bin .*; ipadapter-sdxl/ip\.bin"):
        read(catalog, manifest=two).find("ip.bin", ("ipadapter",), guessed=True)


def test_the_requests_models_count_in_any_folder(catalog: Path) -> None:
    sources = read(catalog).with_request([model("elsewhere", "a.safetensors", "mine/a")], HOSTS)
    assert repo_of(sources.find("a.safetensors", ("vae",))) == "catalog/a", "the loader is known to read vae"
    assert repo_of(sources.find("a.safetensors", ("vae",), guessed=True)) == "mine/a"
    assert repo_of(sources.find("a.safetensors", ("loras",))) == "mine/a"
    two = [model("one", "b.safetensors", "one/b"), model("two", "b.safetensors", "two/b")]
    assert read(catalog).with_request(two, HOSTS).find("b.safetensors", ("loras",)) is None
    with pytest.raises(AmbiguousModel, match="in the request's 'models'"):
        read(catalog).with_request(two, HOSTS).find("b.safetensors", ("loras",), guessed=True)


# --- models.toml --------------------------------------------------------------------------------


def test_everything_that_an_entry_can_say(catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        "# my models\n"
        + toml(
            {"source": "hf://o/r/x.ckpt@v1", "folder": "checkpoints"},
            {
                "source": "https://example.com/y?id=1",
                "folder": "loras",
                "name": "sub/y.pt",
                "sha256": SHA,
                "size_bytes": 7,
            },
            {"url": "https://huggingface.co/o/r/blob/main/z.gguf", "directory": "unet"},
        )
    )
    assert read(catalog, volume_manifest=tmp_path / "models.toml").manifest() == (
        ModelSpec("checkpoints", "x.ckpt", HubFile("o/r", "x.ckpt", "v1")),
        ModelSpec("loras", "sub/y.pt", UrlSource("https://example.com/y?id=1"), SHA, 7),
        ModelSpec("unet", "z.gguf", HubFile("o/r", "z.gguf")),
    )


BROKEN = """# the models of the shop
[[model]]
source = "hf://o/r/fine.safetensors"
folder = "vae"

[[model]]
folder = "../vae"
source = "nowhere"
name = "/etc/passwd"

[[model]]   # no source
foldr = "vae"
sha256 = "abc"

[[model]]
source = "hf://o/other/fine.safetensors"
folder = "vae"
size_bytes = -1
"""


def test_every_mistake_is_told_at_once_with_line_and_field(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(BROKEN)
    with pytest.raises(ManifestInvalid) as caught:
        read(catalog, volume_manifest=path)
    problems = caught.value.details()
    assert [problem.partition(": ")[::2][0] + ": " + problem.partition(": ")[2].split()[0] for problem in problems] == [
        "line 8: source",
        "line 9: name",
        "line 7: folder",
        "line 11: source",
        "line 11: folder",
        "line 13: sha256",
        "line 12: foldr",
        "line 18: size_bytes",
    ]
    assert "line 12: foldr is no field of a model; write folder" in problems
    assert "line 9: name is absolute; it must be relative to its folder" in problems
    assert str(caught.value).startswith(f"The manifest {path} is wrong: line 8: source is no address")


@pytest.mark.parametrize("name", ["a\x07b.gguf", "x" * 260 + ".gguf"])
def test_a_name_that_no_file_can_have_leaves_out_its_entry_alone(catalog: Path, tmp_path: Path, name: str) -> None:
    text = toml(model("vae", "fine.gguf"), {"folder": "vae", "source": "hf://o/r/x.gguf", "name": name})
    (tmp_path / "models.toml").write_text(text)
    lines = f"vae=hf://o/r/other.gguf\nvae/{'y' * 260}.gguf=hf://o/r/y.gguf"
    sources = Sources.read(volume_manifest=tmp_path / "models.toml", models=lines, catalog=catalog)
    assert [spec.name for spec in sources.manifest()] == ["fine.gguf", "other.gguf"]
    assert sources.errors == ()
    volume, short = sources.odd
    assert ("line 9: name " in str(volume), "name has a part of 265 bytes" in str(short)) == (True, True)


def test_two_meanings_in_one_manifest(catalog: Path) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(catalog, manifest=toml(model("vae", "x.gguf", "one/x"), model("loras", "x.gguf"), model("vae", "x.gguf", "two/x")))
    assert caught.value.details() == ["line 14: vae/x.gguf has another source than at line 3; keep one of the two"]


DIGITS = "1" * 5000  # more than Python reads a number of


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[model]]\nsource = \nfolder = 'vae'", "line 2: it is no TOML"),
        ('[[model]]\nsource = "x', "line 2: it is no TOML"),
        ('models = "x"\n', "'models' must be a list of models"),
        ("[settings]\na = 1\n", "'settings' is not known; each model is a [[model]]"),
        ("model = [1]\n", "entry 1 of 'model' is no object"),
        ('model = [{source = "x", folder = "vae"}]\n', "entry 1 ('x'): source is no address"),
        ('{"models": [\n  {"folder": "vae",}]}', "line 2: it is no JSON"),
        ('{"models": 7}', "'models' must be a list of models"),
        ('{"models": {"before_start": {}}}', "'models.before_start' must be a list"),
        ('[{"folder": "vae", "source": "x", "name": "y"}]', "entry 1 ('y'): source is no address"),
        ("models:\n  - url: [\n", "it is no YAML"),
        ("models:\n  - 7\n", "entry 1 of 'models' is no object"),
        (f'{{"models": {DIGITS}}}', "it cannot be read: Exceeds the limit (4300 digits)"),
        (f"models: {DIGITS}", "it cannot be read: Exceeds the limit (4300 digits)"),
        (f"models = {DIGITS}", "it cannot be read: Exceeds the limit (4300 digits)"),
        ('{"models": ' + "[" * 100_000, "it cannot be read: maximum recursion depth exceeded"),
    ],
)
def test_a_text_that_is_no_manifest_says_where(catalog: Path, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "manifest"
    path.write_text(text)
    with pytest.raises(ManifestInvalid) as caught:
        read(catalog, manifest=str(path))
    assert any(says in problem for problem in caught.value.details())
    assert f"The manifest {path} (MODELS_MANIFEST) is wrong: " in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n# nothing yet\n", "models = []\n", "{}", '{"models": []}', "[]", "models:\n"])
def test_an_empty_manifest_is_fine(catalog: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_text(text)
    assert read(catalog, volume_manifest=tmp_path / "m").manifest() == ()


def test_a_manifest_as_windows_saves_it(catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"\xef\xbb\xbf" + toml(model("vae", "x.gguf")).replace("\n", "\r\n").encode())
    assert len(read(catalog, volume_manifest=tmp_path / "m").manifest()) == 1


def test_a_manifest_that_cannot_be_read(catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="cannot be read: No such file"):
        read(catalog, manifest=str(tmp_path / "absent.toml"))
    with pytest.raises(ManifestInvalid, match="cannot be read: Is a directory"):
        read(catalog, volume_manifest=tmp_path)
    (tmp_path / "m").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestInvalid, match="no UTF-8 text"):
        read(catalog, manifest=str(tmp_path / "m"))


def test_the_volumes_manifest_need_not_exist_and_is_seen_when_it_does(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    before = read(catalog, volume_manifest=path, models="vae=hf://o/r/x.gguf")
    assert before.refreshed() is before
    path.write_text(toml(model("vae", "new.gguf")))
    after = before.refreshed()
    assert after.find("new.gguf", ("vae",))
    assert after.find("x.gguf", ("vae",))
    assert before.find("new.gguf", ("vae",)) is None
    assert after.refreshed() is after
    path.unlink()
    assert after.refreshed().find("new.gguf", ("vae",)) is None


def test_an_edit_is_seen_and_a_broken_one_changes_nothing(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(toml(model("vae", "x.gguf", "one/x")))
    sources = read(catalog, volume_manifest=path).with_request([model("vae", "r.gguf")], HOSTS)
    path.write_text(toml(model("vae", "x.gguf", "two/x")))
    os.utime(path, ns=(1, 1))
    sources = sources.refreshed()
    assert repo_of(sources.find("x.gguf", ("vae",))) == "two/x"
    assert sources.find("r.gguf", ("vae",))
    path.write_text("[[model]]\nfolder = 1\n")
    broken = sources.refreshed()
    assert broken.refreshed() is broken
    assert [error.problems[0] for error in broken.errors] == [
        "line 1: source is missing; write hf://org/repo/path or https://..."
    ]
    assert repo_of(broken.find("x.gguf", ("vae",))) == "two/x"
    assert [spec.name for spec in broken.manifest()] == ["x.gguf"]
    path.write_text(toml(model("vae", "x.gguf", "three/x")))
    mended = broken.refreshed()
    assert mended.errors == ()
    assert repo_of(mended.find("x.gguf", ("vae",))) == "three/x"


def test_a_mistake_matters_only_for_a_model_that_no_other_list_knows(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("[[model]]\nfolder = 1\n")
    metadata = ui(embedded("vae", "m.gguf"), embedded("vae", "refused.ckpt"))
    sources = Sources.gather(catalog=catalog, volume_manifest=path, models="vae=hf://o/r/e.gguf")
    sources = sources.with_request([model("vae", "r.gguf")], HOSTS).with_workflow(metadata, HOSTS)
    for name in ("r.gguf", "m.gguf", "e.gguf", "a.safetensors"):
        assert sources.find(name, ("vae",)), name
    for name in ("nobody.gguf", "refused.ckpt"):
        with pytest.raises(ManifestInvalid, match=r"models\.toml is wrong: line 1: source is missing"):
            sources.find(name, ("vae",))
    with pytest.raises(ManifestInvalid):
        sources.find("twice.safetensors")
    twice = sources.with_request([model("vae", "t.gguf"), model("loras", "t.gguf", "other/repo")], HOSTS)
    with pytest.raises(AmbiguousModel):
        twice.find("t.gguf")


@pytest.mark.parametrize("lists", [{"models": "nowhere"}, {"manifest": "/absent/models.toml"}])
def test_a_mistake_in_the_environment_is_kept_beside_what_is_right(
    catalog: Path, tmp_path: Path, lists: dict[str, str]
) -> None:
    path = tmp_path / "models.toml"
    path.write_text(toml(model("vae", "x.gguf")))
    sources = Sources.gather(catalog=catalog, volume_manifest=path, **lists)
    assert len(sources.errors) == 1
    assert [spec.name for spec in sources.manifest()] == ["x.gguf"]
    assert sources.find("a.safetensors", ("vae",))
    with pytest.raises(ManifestInvalid):
        sources.find("nobody.gguf")


def test_a_manifest_that_could_not_be_read_is_tried_again_without_another_error(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(toml(model("vae", "x.gguf", "one/x")))
    sources = read(catalog, volume_manifest=path)
    path.write_text(toml(model("vae", "x.gguf", "two/x-longer")))
    with mock.patch.object(Path, "read_bytes", side_effect=OSError(errno.EIO, "Input/output error")):
        failed = sources.refreshed()
        assert failed.refreshed() is failed
    assert [error.problems for error in failed.errors] == [["it cannot be read: Input/output error"]]
    assert repo_of(failed.find("x.gguf", ("vae",))) == "one/x"
    again = failed.refreshed()
    assert again.errors == ()
    assert repo_of(again.find("x.gguf", ("vae",))) == "two/x-longer"
    path.write_text("nonsense")
    path.unlink()
    assert again.refreshed().refreshed().manifest() == ()


# --- the environment ----------------------------------------------------------------------------


def test_models_manifest_may_be_the_manifest_itself(catalog: Path) -> None:
    for text in (
        toml(model("vae", "x.gguf")),
        'model = [{folder = "vae", source = "hf://o/r/x.gguf"}]',
        json.dumps({"models": [model("vae", "x.gguf")]}),
        json.dumps([model("vae", "x.gguf")], indent=1),
        "models:\n- folder: vae\n  source: hf://o/r/x.gguf\n",
    ):
        assert read(catalog, manifest=text).manifest() == (ModelSpec("vae", "x.gguf", HubFile("o/r", "x.gguf")),)
    with pytest.raises(ManifestInvalid, match="The manifest MODELS_MANIFEST is wrong: line 1: source is missing"):
        read(catalog, manifest="[[model]]\nfolder = 'vae'")


@pytest.mark.parametrize("between", ["\n", " ", ",", ", ", ";", " \n\t ", ",\n"])
def test_short_lines(catalog: Path, between: str) -> None:
    lines = [
        "checkpoints=hf://org/repo/a.safetensors@v1",
        "loras/style/b.safetensors=https://example.com/get?id=1,2&x=3",
        f"ultralytics/bbox=hf://org/repo/c.pt#sha256={SHA}",
    ]
    assert read(catalog, models=between.join(lines)).manifest() == (
        ModelSpec("checkpoints", "a.safetensors", HubFile("org/repo", "a.safetensors", "v1")),
        ModelSpec("loras", "style/b.safetensors", UrlSource("https://example.com/get?id=1,2&x=3")),
        ModelSpec("ultralytics/bbox", "c.pt", HubFile("org/repo", "c.pt"), SHA),
    )


def test_short_lines_with_comments_and_nothing(catalog: Path) -> None:
    text = "\n# the base\nvae=hf://o/r/a.gguf\n  # vae=hf://o/r/b.gguf\n\n,"
    assert [spec.name for spec in read(catalog, models=text).manifest()] == ["a.gguf"]
    assert read(catalog, models="  \n").manifest() == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf://o/r/a.gguf", "entry 1 ('hf://o/r/a.gguf'): write folder=hf://org/repo/file@revision"),
        ("vae=hf://o/r/a.gguf loras", "entry 2 ('loras'): write folder="),
        ("vae=", "entry 1: source is missing"),
        ("=hf://o/r/a.gguf", "entry 1 ('=hf://o/r/a.gguf'): write folder="),
        ("vae=hf://o/r/a.gguf#sha256=xyz", "sha256 must be 64 hexadecimal digits"),
        ("loras=https://civitai.com/api/download/models/1", "name is missing"),
        ("../x=hf://o/r/a.gguf", "folder holds '..'"),
    ],
)
def test_a_wrong_short_line(catalog: Path, text: str, says: str) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(catalog, models=text)
    assert str(caught.value).startswith("The manifest MODELS is wrong: ")
    assert any(says in problem for problem in caught.value.details()), caught.value.details()


def test_no_mistake_shows_a_secret(catalog: Path) -> None:
    for text in ("https://me:pw@x.com/a?token=s3cret", "loras=https://me:pw@x.com/a?token=s3cret"):
        with pytest.raises(ManifestInvalid) as caught:
            read(catalog, models=text)
        assert "x.com/a" in str(caught.value)
        assert not any(secret in str(caught.value) for secret in ("pw", "s3cret"))


def test_what_the_operator_wants_on_the_volume(catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(toml(model("vae", "x.gguf", "volume/x"), model("vae", "y.gguf")))
    sources = read(
        catalog,
        volume_manifest=tmp_path / "models.toml",
        manifest=toml(model("vae", "x.gguf", "image/x"), model("vae", "z.gguf")),
        models="vae=hf://o/r/w.gguf vae=hf://o/r/y.gguf",
    ).with_request([model("vae", "r.gguf")], HOSTS)
    assert [(spec.name, repo_of(spec)) for spec in sources.manifest()] == [
        ("x.gguf", "volume/x"),
        ("y.gguf", "o/r"),
        ("z.gguf", "o/r"),
        ("w.gguf", "o/r"),
    ]
    assert [spec.name for spec in sources.requested()] == ["r.gguf"]


# --- other people's formats ---------------------------------------------------------------------

MANAGER = {
    "models": [
        {"name": "4x", "type": "upscale", "base": "upscale", "save_path": "default", "description": "", "reference": "",
         "filename": "4x.pth", "url": "https://huggingface.co/datasets/o/r/resolve/abc/4x.pth", "size": "67MB"},
        {"name": "T2I", "type": "T2I-Adapter", "base": "SD1.5", "save_path": "default", "filename": "t2i.pth",
         "url": "https://huggingface.co/o/r/resolve/main/models/t2i.pth"},
        {"name": "SVD", "type": "checkpoints", "base": "SVD", "save_path": "checkpoints/SVD", "filename": "svd.safetensors",
         "url": "https://huggingface.co/o/r/resolve/main/svd.safetensors"},
        {"name": "Face", "type": "Ultralytics", "base": "x", "save_path": "ultralytics/bbox", "filename": "face.pt",
         "url": "https://huggingface.co/o/r/resolve/main/face.pt"},
        {"name": "EasyNegative", "type": "embeddings", "save_path": "default", "filename": "easynegative.safetensors",
         "url": "https://civitai.com/api/download/models/9208"},
        {"name": "a whole repo", "type": "diffusers", "save_path": "diffusers/x", "filename": "<huggingface>", "url": "o/r"},
        {"name": "of a node", "type": "x", "save_path": "custom_nodes/x/models", "filename": "n.pth", "url": "https://x.com/n.pth"},
        {"name": "no type", "type": "zzz", "save_path": "default", "filename": "q.pth", "url": "https://x.com/q.pth"},
        {"name": "bad url", "type": "vae", "save_path": "default", "filename": "bad.pth", "url": "ttps://x.com/q.pth"},
        {"name": "leaves", "type": "vae", "save_path": "vae/../..", "filename": "l.pth", "url": "https://x.com/l.pth"},
        {"name": "one", "type": "vae", "save_path": "default", "filename": "two.pth", "url": "https://x.com/1/two.pth"},
        {"name": "other", "type": "vae", "save_path": "default", "filename": "two.pth", "url": "https://x.com/2/two.pth"},
    ]
}  # fmt: skip


def test_comfyui_managers_list_is_asked_and_never_fetched_as_a_whole(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "model-list.json"
    path.write_text(json.dumps(MANAGER, indent=2))
    sources = read(catalog, manifest=str(path))
    assert sources.manifest() == ()
    found = [
        sources.find("4x.pth", ("upscale_models",)),
        sources.find("t2i.pth", ("controlnet", "t2i_adapter")),
        sources.find("SVD/svd.safetensors", ("checkpoints",)),
        sources.find("bbox/face.pt", ("ultralytics",)),
        sources.find("easynegative.safetensors", ("embeddings",)),
    ]
    assert found == [
        ModelSpec("upscale_models", "4x.pth", HubFile("o/r", "4x.pth", "abc", "dataset")),
        ModelSpec("controlnet", "t2i.pth", HubFile("o/r", "models/t2i.pth")),
        ModelSpec("checkpoints", "SVD/svd.safetensors", HubFile("o/r", "svd.safetensors")),
        ModelSpec("ultralytics", "bbox/face.pt", HubFile("o/r", "face.pt")),
        ModelSpec("embeddings", "easynegative.safetensors", UrlSource("https://civitai.com/api/download/models/9208")),
    ]
    assert [sources.find(name) for name in ("<huggingface>", "n.pth", "q.pth", "bad.pth", "l.pth")] == [None] * 5
    with pytest.raises(AmbiguousModel, match=r"model-list\.json \(MODELS_MANIFEST\): .*1/two.*2/two"):
        sources.find("two.pth", ("vae",))


COMFY_LOCK = f"""basics:
  name: shop
models:
- model: base
  url: https://huggingface.co/o/r/resolve/main/base.safetensors?download=true
  paths:
  - path: models/checkpoints/base.safetensors
  - path: /workspace/ComfyUI/models/diffusion_models/sub/base.safetensors
  hashes:
  - hash: deadbeef
    type: AutoV2
  - hash: {SHA.upper()}
    type: SHA256
  type: checkpoint
- model: style
  url: https://huggingface.co/o/r/resolve/main/style.safetensors
  type: lora
custom_nodes: []
"""


def test_comfy_clis_lock_file(catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "comfy-lock.yaml").write_text(COMFY_LOCK)
    source = HubFile("o/r", "base.safetensors")
    assert read(catalog, manifest=str(tmp_path / "comfy-lock.yaml")).manifest() == (
        ModelSpec("checkpoints", "base.safetensors", source, SHA),
        ModelSpec("diffusion_models", "sub/base.safetensors", source, SHA),
        ModelSpec("loras", "style.safetensors", HubFile("o/r", "style.safetensors")),
    )


def test_a_lock_file_with_mistakes(catalog: Path) -> None:
    text = "models:\n- model: a\n  url: https://x.com/a.pt\n  type: zzz\n- model: b\n  paths:\n  - path: /root/b.pt\n"
    with pytest.raises(ManifestInvalid) as caught:
        read(catalog, manifest=text)
    assert caught.value.details() == [
        "entry 1 ('https://x.com/a.pt'): folder is missing",
        "entry 2: source is missing; write hf://org/repo/path or https://...",
        "entry 2: folder is missing",
    ]


COMFYUI_API = {
    "apt": ["git"],
    "custom_nodes": ["x"],
    "models": {
        "before_start": [
            {"url": "https://civitai.com/api/download/models/1?type=Model", "local_path": "models/checkpoints/d.safetensors"},
            {"url": "https://huggingface.co/o/r/blob/main/x.pt", "local_path": "/opt/ComfyUI/models/ultralytics/bbox/x.pt"},
        ],
        "after_start": [{"url": "https://huggingface.co/o/r/resolve/main/e.gguf", "local_path": "unet/e.gguf"}],
    },
}


def test_comfyui_apis_manifest_as_json_and_yaml(catalog: Path) -> None:
    as_yaml = (
        "# apt:\n#   - git\ncustom_nodes:\n  - x\nmodels:\n  before_start:\n"
        "    - url: https://civitai.com/api/download/models/1?type=Model\n"
        "      local_path: models/checkpoints/d.safetensors\n"
        "    - url: https://huggingface.co/o/r/blob/main/x.pt\n"
        "      local_path: /opt/ComfyUI/models/ultralytics/bbox/x.pt\n"
        "  after_start:\n"
        "    - {url: 'https://huggingface.co/o/r/resolve/main/e.gguf', local_path: unet/e.gguf}\n"
    )
    for text in (json.dumps(COMFYUI_API), as_yaml):
        assert read(catalog, manifest=text).manifest() == (
            ModelSpec("checkpoints", "d.safetensors", UrlSource("https://civitai.com/api/download/models/1?type=Model")),
            ModelSpec("ultralytics", "bbox/x.pt", HubFile("o/r", "x.pt")),
            ModelSpec("unet", "e.gguf", HubFile("o/r", "e.gguf")),
        )


def test_a_path_that_leads_to_no_models_folder(catalog: Path) -> None:
    bad = [{"url": "hf://o/r/x.pt", "local_path": path} for path in ("/opt/x.pt", "x.pt", "", "models/vae/../../x.pt")]
    with pytest.raises(ManifestInvalid) as caught:
        read(catalog, manifest=json.dumps({"models": {"before_start": bad}}))
    assert [problem.partition(": ")[2] for problem in caught.value.details()] == [
        "folder is missing",
        "folder is missing",
        "folder is missing",
        "name holds '..' and would leave its folder",
    ]


# --- the request --------------------------------------------------------------------------------


def test_a_request_writes_entries_in_our_words_in_comfyuis_or_short(catalog: Path) -> None:
    entries = [
        {"folder": "vae", "source": "hf://o/r/a.gguf", "size_bytes": 7, "description": "a note"},
        embedded("vae", "b.gguf", hash=SHA, hash_type="SHA256"),
        embedded("vae", "c.gguf", hash="1234", hash_type="AutoV2"),
        "vae=hf://o/r/d.gguf",
    ]
    assert read(catalog).with_request(entries, HOSTS).requested() == (
        parse_spec("vae", "hf://o/r/a.gguf", size_bytes=7),
        parse_spec("vae", "hf://o/r/b.gguf", sha256=SHA),
        parse_spec("vae", "hf://o/r/c.gguf"),
        parse_spec("vae", "hf://o/r/d.gguf"),
    )


@pytest.mark.parametrize("models", [7, "vae=hf://o/r/a.gguf", {"vae": "x"}, [7], [None], [[]]])
def test_a_requests_models_are_a_list(catalog: Path, models: object) -> None:
    with pytest.raises(ModelsInvalid, match="'models' must be a list of objects"):
        read(catalog).with_request(models, HOSTS)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({}, SpecInvalid),
        ("nonsense", SpecInvalid),
        (model("vae", "../a.gguf"), SpecInvalid),
        (model("..", "a.gguf"), SpecInvalid),
        (model("vae", "a.pt"), SuffixNotAllowed),
        ({"folder": "vae", "source": "https://example.com/a.gguf"}, HostNotAllowed),
    ],
)
def test_what_a_request_may_not_ask_for(catalog: Path, entry: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        read(catalog).with_request([entry], HOSTS)


def test_a_slip_in_a_fields_name_is_noticed(catalog: Path) -> None:
    entry = model("vae", "a.gguf")
    with pytest.raises(SpecInvalid, match=r"The field 'sha265' of the model 'a.gguf' is unknown; write sha256\."):
        read(catalog).with_request([entry | {"sha265": SHA}], HOSTS)
    with pytest.raises(SpecInvalid, match=r"The field 'licence' of the model 'a.gguf' is unknown\."):
        read(catalog).with_request([entry | {"licence": "MIT"}], HOSTS)


# --- the workflow's own metadata ----------------------------------------------------------------


def test_metadata_is_found_in_the_shapes_that_carry_it(catalog: Path) -> None:
    graph = ui(embedded("vae", "x.gguf"))
    for value in (
        graph,
        {"workflow": graph},
        {"extra_pnginfo": {"workflow": graph}},
        {"extra_data": {"extra_pnginfo": {"workflow": graph}}},
    ):
        assert read(catalog).with_workflow(value, HOSTS).find("x.gguf", ("vae",))


def test_links_that_people_paste_are_made_downloads(catalog: Path) -> None:
    entry = embedded("vae", "x.gguf", url="https://huggingface.co/o/r/blob/main/x.gguf?download=true")
    found = read(catalog).with_workflow(ui(entry), HOSTS).find("x.gguf", ("vae",))
    assert found == ModelSpec("vae", "x.gguf", HubFile("o/r", "x.gguf"))


def node(node_id: int, kind: str = "L", **more: Any) -> dict[str, Any]:
    return {"id": node_id, "type": kind, "mode": 0} | more


def loader(node_id: int, name: str, **more: Any) -> dict[str, Any]:
    return node(node_id, widgets_values=[name, "default"], properties={"models": [embedded("vae", name)]}, **more)


def names_in(workflow: object) -> list[object]:
    return [entry["name"] for entry in embedded_models(workflow)]


def test_subgraphs_are_walked_when_an_active_node_uses_them() -> None:
    subgraphs = [
        {"id": "outer", "nodes": [loader(1, "outer.gguf"), node(2, "inner")]},
        {"id": "inner", "nodes": [loader(1, "inner.gguf"), loader(2, "muted.gguf", mode=2), node(3, "inner")]},
        {"id": "unused", "nodes": [loader(1, "unused.gguf")]},
        {"id": "bypassed", "nodes": [loader(1, "bypassed.gguf")]},
    ]
    graph = {
        "nodes": [loader(1, "root.gguf"), loader(2, "off.gguf", mode=4), node(3, "outer"), node(4, "bypassed", mode=4)],
        "definitions": {"subgraphs": subgraphs},
    }
    assert sorted(map(str, names_in(graph))) == ["inner.gguf", "outer.gguf", "root.gguf"]


def test_entries_that_editing_left_behind_are_not_meant() -> None:
    assert names_in(ui(embedded("vae", "old.gguf"), embedded("vae", "new.gguf"), values=["new.gguf"])) == ["new.gguf"]
    assert names_in(ui(embedded("vae", "sub/x.gguf"), values=["sub\\x.gguf"])) == ["sub/x.gguf"]
    assert names_in(ui(embedded("vae", "x.gguf"), mode=2)) == []
    as_dict = {"nodes": [node(1, widgets_values={"vae_name": "x.gguf"}, properties={"models": [embedded("vae", "x.gguf")]})]}
    assert names_in(as_dict) == ["x.gguf"]


def test_a_value_promoted_to_a_subgraphs_instance_counts() -> None:
    inner = node(1, widgets_values=["other.gguf"], properties={"models": [embedded("vae", "promoted.gguf")]})
    graph = {
        "nodes": [node(1, "sub", widgets_values=["promoted.gguf"])],
        "definitions": {"subgraphs": [{"id": "sub", "nodes": [inner]}]},
    }
    assert names_in(graph) == ["promoted.gguf"]


def test_a_list_at_the_top_counts_as_well() -> None:
    graph = {"nodes": [node(1, widgets_values=["x.gguf"])], "models": [embedded("vae", "x.gguf"), embedded("vae", "y.gguf")]}
    assert names_in(graph) == ["x.gguf"]


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (embedded("vae", "x.ckpt"), SuffixNotAllowed),
        ({"directory": "vae", "name": "x.gguf", "url": "https://example.com/x.gguf"}, HostNotAllowed),
        ({"directory": "vae", "name": "x.gguf", "url": "nonsense"}, SpecInvalid),
        ({"directory": "vae", "name": "x.gguf"}, SpecInvalid),
    ],
)
def test_an_entry_that_is_refused_matters_only_when_nobody_else_knows_the_model(
    catalog: Path, entry: dict[str, object], error: type[RequestError]
) -> None:
    name = str(entry["name"])
    sources = read(catalog).with_workflow(ui(entry), HOSTS)
    assert sources.find("a.safetensors", ("vae",))
    assert sources.find(name, ("loras",)) is None
    with pytest.raises(error):
        sources.find(name, ("vae",))
    with pytest.raises(error):
        sources.find(name)
    mine = read(catalog, models=f"vae=hf://mine/x/{name}").with_workflow(ui(entry), HOSTS)
    assert repo_of(mine.find(name, ("vae",))) == "mine/x"


ODD = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["x.gguf", "sub"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "nodes",
                    "models",
                    "properties",
                    "definitions",
                    "subgraphs",
                    "id",
                    "type",
                    "mode",
                    "name",
                    "url",
                    "widgets_values",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@given(ODD)
def test_no_metadata_however_odd_stops_a_job(workflow: object) -> None:
    sources = Sources.read().with_workflow({"nodes": [workflow], "definitions": workflow, "models": workflow}, HOSTS)
    assert sources.find("ae.safetensors", ("vae",))
