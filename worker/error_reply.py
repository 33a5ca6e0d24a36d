"""Turn an error into a client's answer: short enough to arrive, without secrets. Pure.

RunPod refuses a result above 10 or 20 MB, an error's as well, and the client then sees a job that completed without output. A
sentence may quote what the client sent (a picture in base64 where its name belongs), and ComfyUI's own lines may contain what
its custom nodes print.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.base.text import encodable, shortened
from worker.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.errors import WorkerError

SENTENCE_CHARACTERS: Final = 4_000
DETAIL_CHARACTERS: Final = 2_000
DETAILS: Final = 50
_READ_CHARACTERS: Final = 200_000


def reply_sentence(text: str, redact: Callable[[str], str], most: int = SENTENCE_CHARACTERS) -> str:
    """Return a text as a client may see it: without secrets, of limited length, and encodable in UTF-8.

    Unpaired surrogates come from a request that quotes one, or from a file's name.
    """
    # Redact before shortening: half of a secret is not recognised. Megabytes are cut first, far from the part that is kept.
    return shortened(redact(encodable(shortened(text, _READ_CHARACTERS))), most)


def reply_sentences(texts: Sequence[str], redact: Callable[[str], str]) -> list[str]:
    """Like `reply_sentence`, for the first of many. The last one then says how many there are."""
    shown = [reply_sentence(text, redact, DETAIL_CHARACTERS) for text in texts[:DETAILS]]
    return [*shown, f"... and {len(texts) - DETAILS} more"] if len(texts) > DETAILS else shown


def error_reply(error: WorkerError, redact: Callable[[str], str]) -> dict[str, Any]:
    """Return a client's answer for an error. RunPod shows `error` beside status FAILED, the rest as the job's output.

    A worker whose engine does not come back asks to be replaced instead of failing every job in the queue.
    """
    result: dict[str, Any] = {"error": reply_sentence(str(error), redact), "code": error.code, "retryable": error.retryable}
    if details := reply_sentences(error.details(), redact):
        result["details"] = details
    if isinstance(error, StartError):
        result["refresh_worker"] = True
    return result
