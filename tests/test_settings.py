"""The environment, read once; every mistake reported together."""

from __future__ import annotations

from pathlib import Path

import pytest

from devkit.local_worker import PROJECT
from worker.errors import SettingsError
from worker.settings import Settings, markdown_table, remarks


def test_an_empty_environment_is_a_valid_one() -> None:
    settings = Settings.from_env({})
    assert settings.volume_path == Path("/runpod-volume")
    assert settings.base_dir == settings.comfyui_dir == Path("/comfyui")
    assert settings.comfy_args == ()
    assert settings.comfy_org_api_key is None


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert Settings.from_env({"COMFYUI_PORT": " ", "VOLUME_PATH": ""}) == Settings.from_env({})


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"RUNPOD_POD_ID": "p"}, "/workspace"),
        ({"RUNPOD_POD_ID": "p", "RUNPOD_ENDPOINT_ID": "e"}, "/runpod-volume"),
        ({"RUNPOD_POD_ID": "p", "VOLUME_PATH": "/mnt"}, "/mnt"),
    ],
)
def test_the_volume_is_where_each_kind_of_machine_mounts_it(environ: dict[str, str], path: str) -> None:
    assert Settings.from_env(environ).volume_path == Path(path)


def test_all_mistakes_are_reported_at_once_each_with_its_variable_and_what_would_be_right() -> None:
    environ = {
        "COMFYUI_PORT": "eighty",
        "VOLUME_PATH": "volume",
        "REFRESH_WORKER": "perhaps",
        "COMFY_LOG_LEVEL": "LOUD",
        "JOB_TIMEOUT_S": "nan",
        "COMFY_ARGS": "--x 'y",
    }
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    assert len(caught.value.problems) == len(environ)
    for name in environ:
        assert sum(problem.startswith(f"{name} must be") for problem in caught.value.problems) == 1
    assert "COMFYUI_PORT must be a whole number from 1 to 65535, not 'eighty'" in str(caught.value)


def test_values_are_read_as_people_write_them() -> None:
    settings = Settings.from_env(
        {"REFRESH_WORKER": "True", "COMFY_LOG_LEVEL": "debug", "COMFY_ARGS": "--lowvram --x 'a b'", "COMFYUI_BASE_DIR": "/data"}
    )
    assert settings.refresh_worker
    assert settings.comfy_log_level == "DEBUG"
    assert settings.comfy_args == ("--lowvram", "--x", "a b")
    assert settings.base_dir == Path("/data")


def test_a_secret_is_never_in_a_repr_nor_in_an_error() -> None:
    settings = Settings.from_env({"COMFY_ORG_API_KEY": "comfyui-very-secret"})
    assert settings.comfy_org_api_key == "comfyui-very-secret"
    assert settings.secrets() == ("comfyui-very-secret",)
    assert "secret" not in repr(settings)


def test_the_page_of_settings_shows_those_that_exist() -> None:
    assert markdown_table() in (PROJECT / "docs/settings.md").read_text("utf-8")


def test_a_volumes_own_s3_api_is_no_bucket_for_results() -> None:
    keys = {"BUCKET_ACCESS_KEY_ID": "user_1", "BUCKET_SECRET_ACCESS_KEY": "rps_1", "BUCKET_NAME": "volume"}
    with pytest.raises(SettingsError, match="BUCKET_ENDPOINT_URL must be a store that signs addresses"):
        Settings.from_env({"BUCKET_ENDPOINT_URL": "https://s3api-eu-ro-1.runpod.io/", **keys})


@pytest.mark.parametrize(
    ("environ", "hosts"),
    [
        ({}, ("huggingface.co", "civitai.com")),
        ({"HF_ENDPOINT": "https://hf-mirror.com/x"}, ("huggingface.co", "civitai.com", "hf-mirror.com")),
        ({"HF_ENDPOINT": "https://hf-mirror.com", "MODEL_HOSTS": "none"}, ()),
        ({"HF_ENDPOINT": "https://hf-mirror.com", "MODEL_HOSTS": "civitai.com"}, ("civitai.com",)),
    ],
)
def test_what_a_request_may_name_of_the_hub_it_may_name_of_its_mirror(environ: dict[str, str], hosts: tuple[str, ...]) -> None:
    assert Settings.from_env(environ).request_hosts == hosts


def test_what_worker_comfyui_takes_without_harm_is_remarked_and_does_not_stop_the_worker() -> None:
    environ = {"BUCKET_ACCESS_KEY_ID": "a", "BUCKET_SECRET_ACCESS_KEY": "b", "WEBSOCKET_RECONNECT_DELAY_S": "90"}
    settings = Settings.from_env(environ)
    assert (settings.bucket_endpoint_url, settings.bucket_access_key_id) == (None, None)
    assert settings.websocket_reconnect_delay_s == 60
    delay, keys = remarks(environ)
    assert delay == "WEBSOCKET_RECONNECT_DELAY_S is 90; 60 is used, the largest that makes sense"
    assert keys.startswith("BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY without BUCKET_ENDPOINT_URL: nothing is uploaded")
    assert remarks({}) == []
    with pytest.raises(SettingsError):
        Settings.from_env({"WEBSOCKET_RECONNECT_DELAY_S": "-1"})
