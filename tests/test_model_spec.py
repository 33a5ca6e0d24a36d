"""What a model is, and the many ways to write where it comes from."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import HostNotAllowed, SpecInvalid, SuffixNotAllowed
from worker.model_spec import (
    HubFile,
    ModelSpec,
    Source,
    UrlSource,
    at_endpoint,
    check_from_request,
    check_spec,
    modelscope_listing,
    parse_source,
    parse_spec,
)

HOSTS = ("huggingface.co", "civitai.com")
FILE = HubFile("org/repo", "a.safetensors")


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf://org/repo/a.safetensors", FILE),
        ("  hf://org/repo/a.safetensors\n", FILE),
        ("HF://org/repo/a.safetensors", FILE),
        ("hf://models/org/repo/a.safetensors", FILE),
        ("hf://org/repo/a.safetensors@main", FILE),
        ("hf://org/repo/sub/dir/a.safetensors", HubFile("org/repo", "sub/dir/a.safetensors")),
        ("hf://org/repo/a.safetensors@v1.0", HubFile("org/repo", "a.safetensors", "v1.0")),
        ("hf://org/repo@v1.0/a.safetensors", HubFile("org/repo", "a.safetensors", "v1.0")),
        ("hf://org/repo/a.safetensors@refs/pr/3", HubFile("org/repo", "a.safetensors", "refs/pr/3")),
        ("hf://org/repo@refs%2Fpr%2F3/a.safetensors", HubFile("org/repo", "a.safetensors", "refs/pr/3")),
        ("hf://org/repo/sprite@2x.safetensors", HubFile("org/repo", "sprite@2x.safetensors")),
        ("hf://org/repo/sprite@2x.safetensors@v2", HubFile("org/repo", "sprite@2x.safetensors", "v2")),
        ("hf://org/repo/my%20file.safetensors", HubFile("org/repo", "my file.safetensors")),
        ("hf://datasets/org/repo/a.safetensors", HubFile("org/repo", "a.safetensors", repo_type="dataset")),
        ("hf://spaces/org/repo/a.bin", HubFile("org/repo", "a.bin", repo_type="space")),
        ("hf://Org_1/re-po.v2/a.safetensors", HubFile("Org_1/re-po.v2", "a.safetensors")),
        ("https://huggingface.co/org/repo/resolve/main/a.safetensors", FILE),
        ("https://huggingface.co/org/repo/blob/main/a.safetensors", FILE),
        ("https://huggingface.co/org/repo/raw/main/a.safetensors", FILE),
        ("https://huggingface.co/org/repo/resolve/main/a.safetensors?download=true", FILE),
        ("https://huggingface.co/org/repo/blob/main/a.safetensors?download=true#frag", FILE),
        ("http://www.huggingface.co/org/repo/resolve/main/a.safetensors", FILE),
        ("https://hf.co/org/repo/resolve/main/a.safetensors", FILE),
        ("https://HuggingFace.co/org/repo/resolve/main/a.safetensors", FILE),
        ("https://huggingface.co/org/repo/resolve/abc123/x/a.safetensors", HubFile("org/repo", "x/a.safetensors", "abc123")),
        ("https://huggingface.co/org/repo/resolve/refs%2Fpr%2F1/a.gguf", HubFile("org/repo", "a.gguf", "refs/pr/1")),
        ("https://huggingface.co/org/repo/resolve/refs/pr/1/a.gguf", HubFile("org/repo", "a.gguf", "refs/pr/1")),
        ("https://huggingface.co/org/repo/resolve/main/a%2Bb.gguf", HubFile("org/repo", "a+b.gguf")),
        ("https://huggingface.co/datasets/org/repo/resolve/main/a.pth", HubFile("org/repo", "a.pth", repo_type="dataset")),
        (
            "https://civitai.com/api/download/models/123?type=Model&format=SafeTensor",
            UrlSource("https://civitai.com/api/download/models/123?type=Model&format=SafeTensor"),
        ),
        ("https://www.civitai.com/api/download/models/123", UrlSource("https://civitai.com/api/download/models/123")),
        ("https://civitai.com/models/7/a-name?modelVersionId=123", UrlSource("https://civitai.com/api/download/models/123")),
        ("https://example.com/x/a.safetensors?v=2#part", UrlSource("https://example.com/x/a.safetensors?v=2")),
        ("http://10.0.0.1:8000/a.safetensors", UrlSource("http://10.0.0.1:8000/a.safetensors")),
        ("https://example.com/download?id=1", UrlSource("https://example.com/download?id=1")),
    ],
)
def test_the_ways_to_write_an_address(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "source", [FILE, HubFile("o/r", "a/b.gguf", "v1", "dataset"), HubFile("o/r", "a@2x.gguf", "refs/pr/1")]
)
def test_the_text_form_of_a_hub_file_means_the_same_file(source: HubFile) -> None:
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is missing; write hf://org/repo/path or https://"),
        ("", "is missing"),
        (7, "is missing"),
        ("org/repo/a.safetensors", "is no address"),
        ("/runpod-volume/a.safetensors", "is no address"),
        ("ftp://example.com/a.safetensors", "is no address"),
        ("file:///etc/passwd", "is no address"),
        ("s3://bucket/a.safetensors", "is no address"),
        ("hf:org/repo/a.safetensors", "is no address"),
        ("hf://org/repo", "names no file of a repository; write hf://org/repo/path"),
        ("hf://org/repo/", "names no file"),
        ("hf://org/repo/dir/", "names no file"),
        ("hf://org", "names no file"),
        ("hf://", "names no file"),
        ("hf:///repo/a.safetensors", "names no repository"),
        ("hf://org/../a.safetensors", "names no repository"),
        ("hf://org/re--po/a.safetensors", "names no repository"),
        ("hf://org/-repo/a.safetensors", "names no repository"),
        ("hf://org/repo/../a.safetensors", "names no file of a repository: '../a.safetensors'"),
        ("hf://org/repo/%2e%2e/a.safetensors", "names no file"),
        ("hf://org/repo/a//b.safetensors", "names no file"),
        ("hf://org/repo/a.safetensors@", "ends with '@' and no revision"),
        ("hf://org/repo/a.safetensors@../x", "impossible revision"),
        ("hf://org/repo/a%00.safetensors", "names no file"),
        ("hf://org/repo/my file.safetensors", "write a space as %20"),
        ("https://huggingface.co/org/repo", "is a page of Hugging Face and no file"),
        ("https://huggingface.co/org/repo/tree/main", "is a page of Hugging Face"),
        ("https://huggingface.co/org/repo/tree/main/sub/dir", "is a page of Hugging Face"),
        ("https://huggingface.co/", "is a page of Hugging Face"),
        ("https://huggingface.co/org/repo/resolve/main/../../x", "names no file"),
        ("https://civitai.com/models/123", "is a page of Civitai"),
        ("https://civitai.com/models/123/a-name", "is a page of Civitai"),
        ("https://", "names no host"),
        ("https:///x", "names no host"),
        ("https://[::1/x", "is no address that can be read"),
        ("https://example.com:99999/x", "is no address that can be read"),
        ("https://good.com\\@evil.com/x", "holds white space, backslashes"),
        ("https://example.com/a\nb", "holds white space"),
    ],
)
def test_what_is_no_address_says_what_to_write(text: object, says: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        parse_source(text)
    assert caught.value.field == "source"
    assert says in str(caught.value)
    assert str(caught.value).startswith("The source of a model ")


def test_a_secret_in_an_address_is_kept_and_not_shown() -> None:
    source = parse_source("https://user:pw@example.com/a.gguf?token=s3cret&id=4&X-Amz-Signature=abc")
    assert isinstance(source, UrlSource)
    assert "s3cret" in source.url
    assert str(source) == "https://example.com/a.gguf?token=...&id=4&X-Amz-Signature=..."
    for text in (repr(source), repr(ModelSpec("vae", "a.gguf", source)), str(ModelSpec("vae", "a.gguf", source))):
        assert not any(secret in text for secret in ("s3cret", "pw", "abc"))


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["name", "folder"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "is empty"),
        (None, "is missing"),
        (7, "must be a text"),
        ("/etc/passwd", "is absolute"),
        ("~/x", "is absolute"),
        ("C:/x", "is absolute"),
        ("..", "'..'"),
        ("../x", "'..'"),
        ("a/../../x", "'..'"),
        ("a/..", "'..'"),
        ("a\\b", "backslash"),
        ("..\\x", "backslash"),
        (".", "empty part or a '.'"),
        ("a//b", "empty part"),
        ("a/", "empty part"),
        ("a/ /b", "empty part"),
        (".hidden", "begins with a dot"),
        ("a/.worker/b", "begins with a dot"),
        ("a\0b", "cannot be printed"),
        ("a\nb", "cannot be printed"),
        ("a\ud800", "cannot be printed"),
        ("x" * 256, "has a part of 256 bytes"),
        ("é" * 128, "has a part of 256 bytes"),
        ("/".join(["x" * 200] * 6), "is longer than 1024 bytes"),
    ],
)
def test_a_name_that_does_not_stay_in_its_folder_or_fit_a_disk(field: str, value: object, says: str) -> None:
    values: dict[str, object] = {"folder": "vae", "name": "m.safetensors"} | {field: value}
    with pytest.raises(SpecInvalid) as caught:
        ModelSpec(source=FILE, **values)  # type: ignore[arg-type]  # wrong types are what is tested
    assert caught.value.field == field
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "a.safetensors",
        "sub/dir/a.gguf",
        "a b (1).pt",
        "日本.ckpt",
        "a..b.bin",
        "x" * 255,
    ],
)
def test_names_that_are_fine(name: str) -> None:
    assert ModelSpec("checkpoints/sub", name, FILE).name == name


@pytest.mark.parametrize(
    "name",
    [
        "全角\u3000空白.ckpt",
        "a\xa0b.pt",
        "👩\u200d🎨.gguf",
    ],
)
def test_blanks_of_any_width_and_joined_emoji_are_letters(name: str) -> None:
    assert ModelSpec("checkpoints/sub", name, HubFile("o/r", name)).name == name
    assert parse_spec("vae", f"hf://o/r/{quote(name)}").name == name


@given(st.text(alphabet="./\\~aC: \0", max_size=12))
def test_no_name_that_is_accepted_can_leave_its_folder(name: str) -> None:
    try:
        spec = ModelSpec("vae", name, FILE)
    except SpecInvalid:
        return
    parts = spec.name.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert "\\" not in name


# --- a whole model ------------------------------------------------------------------------------


def test_a_model_without_a_name_is_called_as_at_its_source() -> None:
    assert parse_spec("vae", "hf://o/r/sub/a.safetensors").name == "a.safetensors"
    assert parse_spec("vae", "https://example.com/x/a%20b.gguf?x=1").name == "a b.gguf"
    assert parse_spec("vae", "hf://o/r/sub/a.safetensors", name="mine/b.safetensors").name == "mine/b.safetensors"


def test_an_address_that_tells_no_name_needs_one() -> None:
    with pytest.raises(
        SpecInvalid, match=r"The name of a model is missing, and the address https://civitai.com/.* give a name"
    ):
        parse_spec("loras", "https://civitai.com/api/download/models/1")
    assert parse_spec("loras", "https://civitai.com/api/download/models/1", name="x.safetensors").source.host == "civitai.com"


@pytest.mark.parametrize("text", ["AB" * 32, "sha256:" + "ab" * 32, " " + "aB" * 32 + "\n"])
def test_a_sha256_is_lower_case(text: str) -> None:
    assert parse_spec("vae", "hf://o/r/a.gguf", sha256=text).sha256 == "ab" * 32
    assert ModelSpec("vae", "a", FILE, text).sha256 == "ab" * 32


@pytest.mark.parametrize("value", ["", "ab", "zz" * 32, "ab" * 33, 5])
def test_what_is_no_sha256(value: object) -> None:
    with pytest.raises(SpecInvalid, match="The sha256 of the model 'm' must be 64 hexadecimal digits"):
        parse_spec("vae", "hf://o/r/a.gguf", name="m", sha256=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "7", True])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(SpecInvalid, match="must be a whole number above 0"):
        parse_spec("vae", "hf://o/r/a.gguf", size_bytes=value)


def test_every_wrong_field_is_told_at_once() -> None:
    spec, problems = check_spec("../x", "nowhere", name="", sha256="x", size_bytes=0)
    assert spec is None
    assert [problem.field for problem in problems] == ["source", "name", "folder", "sha256", "size_bytes"]


def test_models_are_values() -> None:
    one, same = (parse_spec("vae", address) for address in ("hf://o/r/a.gguf", "https://hf.co/o/r/blob/main/a.gguf"))
    assert one == same
    assert len({one, same}) == 1
    assert str(one) == "vae/a.gguf from hf://o/r/a.gguf"


# --- from a request -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "sft", "gguf", "SafeTensors"])
@pytest.mark.parametrize("source", ["hf://o/r/x.bin", "https://civitai.com/api/download/models/1"])
def test_a_request_may_fetch_tensors_from_the_known_hosts(suffix: str, source: str) -> None:
    check_from_request(parse_spec("vae", source, name=f"m.{suffix}"), HOSTS)


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.pth", "m.bin", "m.pkl", "m.onnx", "m.py", "m", "m.safetensors.pt"])
def test_a_request_may_not_fetch_what_can_hold_code(name: str) -> None:
    with pytest.raises(
        SuffixNotAllowed, match=r"may name only \.safetensors, \.sft, \.gguf files for download, not 'm"
    ) as caught:
        check_from_request(parse_spec("vae", "hf://o/r/x.safetensors", name=name), HOSTS)
    assert "manifest" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("https://example.com/m.gguf", "example.com"),
        ("https://huggingface.co.evil.com/m.gguf", "huggingface.co.evil.com"),
        ("https://evil-huggingface.co/m.gguf", "evil-huggingface.co"),
        ("https://huggingface.co@evil.com/m.gguf", "evil.com"),
        ("https://cdn.civitai.com/m.gguf", "cdn.civitai.com"),
        ("https://169.254.169.254/m.gguf", "169.254.169.254"),
        ("http://localhost:8188/m.gguf", "localhost"),
        ("https://[::1]/m.gguf", "::1"),
    ],
)
def test_a_request_may_not_use_another_host(address: str, host: str) -> None:
    with pytest.raises(HostNotAllowed, match="MODEL_HOSTS") as caught:
        check_from_request(parse_spec("vae", address), HOSTS)
    assert caught.value.host == host
    assert "only huggingface.co, civitai.com" in str(caught.value)


def test_the_hosts_are_the_operators_choice() -> None:
    check_from_request(parse_spec("vae", "https://models.example.com/m.gguf"), ["Models.Example.com "])
    with pytest.raises(HostNotAllowed, match="may name no host at all"):
        check_from_request(parse_spec("vae", "hf://o/r/m.gguf"), [])
    with pytest.raises(HostNotAllowed, match=r"come from huggingface\.co"):
        check_from_request(parse_spec("vae", "hf://o/r/m.gguf"), ["civitai.com"])


@pytest.mark.parametrize(
    "address",
    ["http://civitai.com/api/download/models/1", "https://civitai.com:8080/x", "https://me:pw@civitai.com/x"],
)
def test_a_request_gives_plain_https_addresses(address: str) -> None:
    with pytest.raises(SpecInvalid, match="must be a plain https address"):
        check_from_request(parse_spec("vae", address, name="m.gguf"), HOSTS)


MODELSCOPE = "https://modelscope.cn/models/org/name/resolve/master/deep/x.safetensors"


@pytest.mark.parametrize(
    "text",
    [
        MODELSCOPE,
        MODELSCOPE.replace("modelscope", "www.modelscope"),
        "https://www.modelscope.cn/models/org/name/file/view/master/deep/x.safetensors?status=2",
    ],
)
def test_a_file_on_modelscope_has_one_address(text: str) -> None:
    source = parse_source(text)
    assert source == UrlSource(MODELSCOPE)
    assert (source.host, source.file_name) == ("modelscope.cn", "x.safetensors")
    assert modelscope_listing(source) == (
        "https://modelscope.cn/api/v1/models/org/name/repo/files?Revision=master&Root=deep",
        "deep/x.safetensors",
    )
    assert modelscope_listing(UrlSource("https://example.com/models/org/name/resolve/master/x.safetensors")) is None


def test_a_page_of_modelscope_is_no_file() -> None:
    with pytest.raises(SpecInvalid, match="page of ModelScope"):
        parse_source("https://modelscope.cn/models/org/name/files")


def test_addresses_of_the_mirror_are_the_hubs() -> None:
    mirror = "https://nexus.example.com/repository/hf"
    found = at_endpoint(UrlSource(f"{mirror}/org/repo/resolve/main/deep/x.safetensors?download=true"), mirror)
    assert found == HubFile("org/repo", "deep/x.safetensors")
    for other in (f"{mirror}/org/repo", "https://nexus.example.com/repository/hf2/org/repo/resolve/main/x.safetensors"):
        assert at_endpoint(UrlSource(other), mirror) == UrlSource(other)
