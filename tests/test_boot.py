"""The cold start's account of itself."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from unittest import mock

import pytest

from devkit.demo import chart
from devkit.local_worker import PROJECT
from worker.base.clock import process_start
from worker.boot import BootTimeline
from worker.errors import NothingToServe
from worker.sdk.arguments import prepare_environ, sdk_arguments
from worker.sdk.imports import _processor_name, import_sdk
from worker.settings import Settings


def test_the_summary_names_every_step_and_which_one_was_critical() -> None:
    timeline = BootTimeline(time.monotonic())
    with timeline.step("engine"), timeline.step("links") as links:
        links.note = "31 files"
    summary = timeline.summary()
    assert re.fullmatch(
        r"cold start \d+\.\d\d s: engine \d+ ms, critical \[[\d.]+-[\d.]+\]; links \d+ ms \(31 files\) \[[\d.]+-[\d.]+\]",
        summary,
    )


def test_a_step_that_others_wait_for_is_critical_not_the_one_that_began_first() -> None:
    timeline = BootTimeline(time.monotonic())
    with timeline.step("models"):
        with timeline.step("engine", time.monotonic() - 1):
            pass
        time.sleep(0.001)
    assert re.search(r": engine [\d.]+ s \[.*; models \d+ ms, critical", timeline.summary())


def test_the_demo_draws_that_summary() -> None:
    lines = list(chart("12:00:00 INFO cold start 4.00 s: engine 3.50 s, critical [0.50-4.00]; sdk 1.00 s [0.50-1.50]\n"))
    assert len(lines) == 3
    assert lines[1].count("█") == 42
    assert lines[2].count("█") == 12
    assert list(chart("no such line")) == []


def test_the_process_began_before_now_and_not_long_ago() -> None:
    assert 0 < time.monotonic() - process_start() < 3600


def test_without_anything_to_serve_the_worker_does_not_even_start() -> None:
    with pytest.raises(NothingToServe, match="--rp_serve_api"):
        sdk_arguments(Settings.from_env({}), [], {}, PROJECT / "devkit")


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--rp_serve_api"], {}),
        (["--test_input", "{}"], {}),
        (["--test_input={}"], {}),
        ([], {"RUNPOD_WEBHOOK_GET_JOB": "http://x"}),
    ],
)
def test_arguments_reach_the_sdk_untouched(argv: list[str], environ: dict[str, str]) -> None:
    assert sdk_arguments(Settings.from_env({}), argv, environ, PROJECT / "devkit") == argv


def test_a_test_input_beside_the_worker_is_something_to_serve(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cwd")
    (folder / "test_input.json").touch()
    assert sdk_arguments(Settings.from_env({}), [], {}, folder) == []


def test_serving_locally_listens_on_all_interfaces() -> None:
    settings = Settings.from_env({"SERVE_API_LOCALLY": "true"})
    assert sdk_arguments(settings, [], {}, PROJECT) == ["--rp_serve_api", "--rp_api_host", "0.0.0.0"]


def test_the_sdk_prints_no_results_and_checks_no_machine_unless_asked() -> None:
    skips = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}
    environ = {"A": "b"}
    prepare_environ(environ)
    assert environ == {"A": "b", "RUNPOD_LOG_LEVEL": "INFO", **skips}
    asked = {"RUNPOD_LOG_LEVEL": "DEBUG", **dict.fromkeys(skips, "false")}
    prepare_environ(asked)
    assert asked == {"RUNPOD_LOG_LEVEL": "DEBUG", **dict.fromkeys(skips, "false")}


def test_the_processor_has_a_name() -> None:
    assert _processor_name()
    assert _processor_name(PROJECT / "absent") == "unknown"


def test_a_worker_imports_the_sdk_without_its_client_for_ssh() -> None:
    code = """
import sys
from worker.sdk.imports import import_sdk
import_sdk([], {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/job/$RUNPOD_POD_ID"})
print(sorted({"paramiko", "cryptography", "runpod", "worker.sdk.job_loop"} & set(sys.modules)))
import paramiko
print(paramiko.SSHClient.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=PROJECT)
    assert done.stdout.splitlines() == ["['runpod', 'worker.sdk.job_loop']", "SSHClient"]


@pytest.mark.parametrize("error", [AttributeError, ImportError])
def test_an_sdk_that_needs_its_client_for_ssh_is_imported_with_it(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "paramiko", raising=False)
    tries: list[bool] = []

    def import_module(_: str) -> None:
        tries.append("paramiko" in sys.modules)
        if len(tries) == 1:
            raise error

    with mock.patch("importlib.import_module", import_module):
        import_sdk([], {})
    assert tries == [True, False]
