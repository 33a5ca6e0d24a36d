"""No secret reaches the log."""

from __future__ import annotations

import logging
import time

import pytest

from worker import logs

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"key is {SECRET}!", "key is ***!"),
        ("using hf_abcdefghijklmnop now", "using *** now"),
        ("GET https://cdn.example/f.bin?Expires=1&Signature=abc~def x", "GET https://cdn.example/f.bin?*** x"),
        ("https://example.com/a?X-Amz-Signature=00ff", "https://example.com/a?***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("https://example.com/a?download=true", "https://example.com/a?download=true"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_what_is_secret_is_blotted_out(text: str, expected: str) -> None:
    assert logs.RedactingFilter([SECRET]).redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://a" * 30_000,
        "http://" + "a:" * 100_000,
        "authorization " * 20_000 + " " * 100_000,
        "bearer" * 40_000 + " " * 100_000,
        "hf_" * 100_000,
        "https://a?" + "&sig" * 60_000,
    ],
)
def test_a_text_is_read_once_whatever_it_holds(text: str) -> None:
    redact = logs.RedactingFilter([SECRET]).redact
    began_s = time.thread_time()
    redact(text)
    assert time.thread_time() - began_s < 1


def test_what_a_job_names_neither_begins_a_record_nor_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_logs("INFO")
    logging.getLogger("worker").info("job %s: started", "a\n12:00:00 ERROR forged\r\x1b[2J\x1b[31mred\u2028")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"job a\n12:00:00 ERROR forged\r\x1b[2Jred\u2028: started")


def test_a_short_value_is_no_secret_to_search_for() -> None:
    assert logs.RedactingFilter(["a", ""]).redact("a banana") == "a banana"


def test_records_and_tracebacks_are_redacted_and_only_ours_are_shown_below_warning(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        logs.configure_logs("INFO", [SECRET])
        logging.getLogger("worker.x").info("with %s", SECRET)
        logging.getLogger("elsewhere").info("silent")
        try:
            int(SECRET)
        except ValueError:
            logging.getLogger("worker.x").exception("failed")
    finally:
        root.handlers[:], root.level = before
        logging.getLogger("worker").setLevel(logging.NOTSET)
    printed = capsys.readouterr().err
    assert "with ***" in printed
    assert "ValueError: invalid literal for int() with base 10: '***'" in printed
    assert "silent" not in printed
    assert SECRET not in printed
