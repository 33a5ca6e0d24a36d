"""No secret reaches the log."""

from __future__ import annotations

import logging

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


def test_a_short_value_is_no_secret_to_search_for() -> None:
    assert logs.RedactingFilter(["a", ""]).redact("a banana") == "a banana"


def test_records_and_tracebacks_are_redacted_and_only_ours_are_shown_below_warning(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        logs.configure("INFO", [SECRET])
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
