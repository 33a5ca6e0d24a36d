"""Addresses of object stores as people write them down, and what the client makes of them."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from worker.errors import S3ConfigInvalid, SettingsError
from worker.media.bucket import Bucket, clean_id, job_target
from worker.media.s3 import S3Target, make_client
from worker.settings import Settings, remarks

R2 = "0123456789abcdef0123456789abcdef"
KEYS = {"BUCKET_ACCESS_KEY_ID": "key-id-0", "BUCKET_SECRET_ACCESS_KEY": "key-secret-0"}
CONFIG = {
    "accessId": "key-id-1",
    "accessSecret": "key-secret-1",
    "bucketName": "results",
    "endpointUrl": "https://s3.example.com",
}


def target(url: str, bucket: str | None = None, region: str | None = None) -> S3Target:
    return S3Target.at(url, "key-id-0", "key-secret-0", bucket=bucket, region=region)


@pytest.mark.parametrize(
    ("url", "bucket", "expected"),
    [
        ("https://s3.example.com", None, ("https://s3.example.com", None, "us-east-1", "path")),
        ("https://s3.example.com/results/", None, ("https://s3.example.com", "results", "us-east-1", "path")),
        ("https://s3.example.com/results", "results", ("https://s3.example.com", "results", "us-east-1", "path")),
        ("http://10.0.0.5:9000/results", None, ("http://10.0.0.5:9000", "results", "us-east-1", "path")),
        ("http://[fd00::1]:9000", "results", ("http://[fd00::1]:9000", "results", "us-east-1", "path")),
        ("https://x.supabase.co/storage/v1/s3", "b", ("https://x.supabase.co/storage/v1/s3", "b", "us-east-1", "path")),
        (f"https://{R2}.r2.cloudflarestorage.com/b", None, (f"https://{R2}.r2.cloudflarestorage.com", "b", "auto", "path")),
        (f"https://b.{R2}.r2.cloudflarestorage.com", None, (f"https://{R2}.r2.cloudflarestorage.com", "b", "auto", "path")),
        (f"https://{R2}.eu.r2.cloudflarestorage.com", "b", (f"https://{R2}.eu.r2.cloudflarestorage.com", "b", "auto", "path")),
        ("https://storage.googleapis.com/b", None, ("https://storage.googleapis.com", "b", "auto", "path")),
        (
            "https://b.s3.eu-central-1.amazonaws.com",
            None,
            ("https://s3.eu-central-1.amazonaws.com", "b", "eu-central-1", "virtual"),
        ),
        ("https://b.s3-us-west-2.amazonaws.com", None, ("https://s3-us-west-2.amazonaws.com", "b", "us-west-2", "virtual")),
        (
            "https://s3.us-gov-west-1.amazonaws.com",
            "b",
            ("https://s3.us-gov-west-1.amazonaws.com", "b", "us-gov-west-1", "virtual"),
        ),
        ("https://a.b.s3.amazonaws.com", None, ("https://s3.amazonaws.com", "a.b", "us-east-1", "path")),
        ("https://s3-accelerate.amazonaws.com", "b", ("https://s3-accelerate.amazonaws.com", "b", "us-east-1", "virtual")),
        ("https://b.fra1.digitaloceanspaces.com", None, ("https://fra1.digitaloceanspaces.com", "b", "fra1", "path")),
        (
            "https://b.s3.us-west-004.backblazeb2.com",
            None,
            ("https://s3.us-west-004.backblazeb2.com", "b", "us-west-004", "path"),
        ),
        ("https://s3api-eu-ro-1.runpod.io/", "vol", ("https://s3api-eu-ro-1.runpod.io", "vol", "EU-RO-1", "path")),
        ("https://oss-cn-hangzhou.aliyuncs.com", "b", ("https://oss-cn-hangzhou.aliyuncs.com", "b", "cn-hangzhou", "virtual")),
        (
            "https://s3.oss-cn-hangzhou.aliyuncs.com",
            "b",
            ("https://s3.oss-cn-hangzhou.aliyuncs.com", "b", "cn-hangzhou", "virtual"),
        ),
        (
            "https://a.b.s3.oss-cn-beijing-internal.aliyuncs.com",
            None,
            ("https://s3.oss-cn-beijing-internal.aliyuncs.com", "a.b", "cn-beijing", "virtual"),
        ),
        (
            "https://s3.oss-us-east-1.aliyuncs.com",
            None,
            ("https://s3.oss-us-east-1.aliyuncs.com", None, "us-east-1", "virtual"),
        ),
        (
            "https://b.tos-s3-cn-beijing.volces.com",
            None,
            ("https://tos-s3-cn-beijing.volces.com", "b", "cn-beijing", "virtual"),
        ),
        (
            "https://tos-cn-shanghai.ivolces.com/b",
            None,
            ("https://tos-s3-cn-shanghai.ivolces.com", "b", "cn-shanghai", "virtual"),
        ),
        (
            "https://b.tos-ap-southeast-1.bytepluses.com",
            None,
            ("https://tos-s3-ap-southeast-1.bytepluses.com", "b", "ap-southeast-1", "virtual"),
        ),
        (
            "https://b.obs.cn-north-4.myhuaweicloud.com",
            None,
            ("https://obs.cn-north-4.myhuaweicloud.com", "b", "cn-north-4", "virtual"),
        ),
        (
            "https://obs.eu-west-101.myhuaweicloud.eu",
            "b",
            ("https://obs.eu-west-101.myhuaweicloud.eu", "b", "eu-west-101", "virtual"),
        ),
        (
            "https://b-125.cos.ap-shanghai.myqcloud.com",
            None,
            ("https://cos.ap-shanghai.myqcloud.com", "b-125", "ap-shanghai", "virtual"),
        ),
    ],
)
def test_an_address_is_read_as_its_provider_means_it(
    url: str, bucket: str | None, expected: tuple[str, str | None, str, str]
) -> None:
    made = target(url, bucket)
    assert (made.endpoint_url, made.bucket, made.region, made.addressing_style) == expected


@pytest.mark.parametrize(
    ("addressing", "url", "style"),
    [
        ("virtual", "https://s3.example.com/b", "virtual"),
        ("path", "https://s3.example.com/b", "path"),
        ("auto", "https://s3.example.com/b", "path"),
        ("path", "https://s3.eu-central-1.amazonaws.com/b", "path"),
    ],
)
def test_a_style_that_is_given_comes_first(addressing: str, url: str, style: str) -> None:
    assert S3Target.at(url, "id", "secret", addressing=addressing).addressing_style == style


def test_a_region_that_is_given_comes_first() -> None:
    assert target("https://s3.eu-central-1.amazonaws.com/b", region="eu-west-3").region == "eu-west-3"


@pytest.mark.parametrize(
    "url",
    [
        "s3.example.com",
        "ftp://s3.example.com",
        "https://",
        "",
        "https://u:p@s3.example.com",
        "https://s3.example.com?a=b",
        "http://[",
    ],
)
def test_what_is_no_address_is_said_so(url: str) -> None:
    with pytest.raises(ValueError, match="must be an address"):
        target(url)


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://results.s3.eu-central-1.amazonaws.com", "results.s3.eu-central-1.amazonaws.com", "/j/a.png"),
        (f"https://{R2}.r2.cloudflarestorage.com/results", f"{R2}.r2.cloudflarestorage.com", "/results/j/a.png"),
        ("http://10.0.0.5:9000/results", "10.0.0.5:9000", "/results/j/a.png"),
    ],
)
def test_addresses_are_signed_as_the_store_wants_them(url: str, host: str, path: str) -> None:
    signed = urlsplit(Bucket(target(url), url_expiry_s=3600).signed_url("j/a.png", "results"))
    query = parse_qs(signed.query)
    assert (signed.netloc, signed.path) == (host, path)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Expires"] == ["3600"]


def test_the_client_has_the_manners_that_other_stores_than_amazons_need() -> None:
    config = make_client(target("https://storage.googleapis.com/b"), attempts=7).meta.config
    assert config.retries == {"total_max_attempts": 7, "mode": "standard"}
    assert config.signature_version == "s3v4"
    assert (config.request_checksum_calculation, config.response_checksum_validation) == ("when_required", "when_required")


def test_keys_stand_below_the_prefix_and_the_job() -> None:
    bucket = Bucket(target("https://s3.example.com/b"), prefix="/a/b/")
    *above, name = bucket.key("sync-1/../x y", "Clip.MP4").split("/")
    assert above == ["a", "b", "sync-1-..-x-y"]
    assert len(name) == len("01234567.mp4")
    assert int(name.removesuffix(".mp4"), 16) >= 0
    assert "." not in bucket.key("j", "name.not an ending")


@pytest.mark.parametrize(
    ("job_id", "cleaned"), [("a-b_1", "a-b_1"), ("../..", "job"), ("", "job"), ("a/b", "a-b"), (".hidden", "hidden")]
)
def test_a_jobs_id_is_one_part_of_a_path(job_id: str, cleaned: str) -> None:
    assert clean_id(job_id) == cleaned


@pytest.mark.parametrize("config", [None, {}])
def test_a_job_without_a_bucket_of_its_own(config: object) -> None:
    assert job_target(config) is None


def test_a_jobs_own_bucket_is_read_and_its_key_shown_nowhere() -> None:
    made = job_target(CONFIG)
    assert made is not None
    assert (made.bucket, made.endpoint_url) == ("results", "https://s3.example.com")
    assert (made.access_key_id, made.secret_access_key) == ("key-id-1", "key-secret-1")
    assert "key-" not in repr(made)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"accessSecret": ""}, "s3Config lacks accessSecret;"),
        ({"accessSecret": None, "bucketName": " "}, "s3Config lacks accessSecret and bucketName;"),
        ({"endpointUrl": "https://user:name@s3.example.com"}, "without a user"),
        ({"endpointUrl": "https://s3.example.com:port"}, "with a valid host and port"),
        ({"endpointUrl": "s3.example.com"}, "must be an address that begins with"),
        ({"endpointUrl": "https://s3api-eu-ro-1.runpod.io/"}, "a RunPod volume, which gives no signed addresses"),
    ],
)
def test_half_a_bucket_is_one_sentence_without_the_key(change: dict[str, object], text: str) -> None:
    with pytest.raises(S3ConfigInvalid) as caught:
        job_target(CONFIG | change)
    assert text in str(caught.value)
    assert "key-" not in str(caught.value)


def test_an_s3_config_that_is_no_object() -> None:
    with pytest.raises(S3ConfigInvalid, match="must be an object"):
        job_target("https://s3.example.com")


@pytest.mark.parametrize(
    ("environ", "problems"),
    [
        ({"BUCKET_ENDPOINT_URL": "https://s3.example.com"}, ["BUCKET_ACCESS_KEY_ID must", "BUCKET_SECRET_ACCESS_KEY must"]),
        (KEYS | {"BUCKET_ENDPOINT_URL": "https://"}, ["BUCKET_ENDPOINT_URL must be an address with a valid host"]),
        (
            KEYS | {"BUCKET_ENDPOINT_URL": "https://s3.example.com:port"},
            ["BUCKET_ENDPOINT_URL must be an address with a valid"],
        ),
        (KEYS | {"BUCKET_ENDPOINT_URL": "https://u:p@s3.example.com"}, ["BUCKET_ENDPOINT_URL must be an address with a valid"]),
        (KEYS | {"BUCKET_ENDPOINT_URL": "s3.example.com"}, ["BUCKET_ENDPOINT_URL must be an address"]),
        (
            KEYS | {"BUCKET_ENDPOINT_URL": "https://s3.example.com/a", "BUCKET_NAME": "b"},
            ["BUCKET_NAME must be the bucket that"],
        ),
        (KEYS | {"BUCKET_ENDPOINT_URL": "https://s3.example.com/a/b"}, ["BUCKET_NAME must be set, because"]),
        (
            {"BUCKET_SECRET_ACCESS_KEY": "key-secret-0", "BUCKET_URL_EXPIRY_S": "604801", "RESULT_LIMIT_MB": "0"},
            [
                "BUCKET_URL_EXPIRY_S must be a whole number from 1 to 604800",
                "RESULT_LIMIT_MB must be a number from 0.01",
            ],
        ),
    ],
)
def test_half_a_bucket_in_the_settings_stops_the_start(environ: dict[str, str], problems: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    for problem, expected in zip(caught.value.problems, problems, strict=True):
        assert problem.startswith(expected)
    assert "key-" not in str(caught.value)


@pytest.mark.parametrize("environ", [KEYS, {"BUCKET_PREFIX": "a"}, {"BUCKET_SECRET_ACCESS_KEY": "key-secret-0"}])
def test_what_stands_without_an_address_is_no_bucket_and_is_remarked(environ: dict[str, str]) -> None:
    assert Settings.from_env(environ).bucket_endpoint_url is None
    (remark,) = remarks(environ)
    assert remark.startswith(", ".join(environ))
    assert remark.endswith("without BUCKET_ENDPOINT_URL: nothing is uploaded; set it, or remove them")
    assert "key-" not in remark


def test_a_whole_bucket_in_the_settings() -> None:
    settings = Settings.from_env(KEYS | {"BUCKET_ENDPOINT_URL": "https://s3.example.com/results/", "RESULT_LIMIT_MB": "4.5"})
    assert settings.bucket_endpoint_url == "https://s3.example.com/results"
    assert set(settings.secrets()) == {"key-id-0", "key-secret-0"}
    assert settings.result_limit_mb == 4.5
    assert settings.bucket_url_expiry_s == 604_800
    assert "key-" not in repr(settings)
