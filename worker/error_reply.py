"""Turn an error into a client's answer: short enough to arrive, without secrets. Pure.

RunPod refuses a result above 10 or 20 MB, an error's as well, and the client then sees a job that completed without output. A
sentence may quote what the client sent (a picture in base64 where its name belongs), and ComfyUI's own lines may contain what
its custom nodes print.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.base.text import shortened
from worker.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.errors import WorkerError

SENTENCE_CHARACTERS: Final = 4_000
DETAIL_CHARACTERS: Final = 2_000
DETAILS: Final = 50
_READ_CHARACTERS: Final = 200_000


def carried(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return the same JSON without characters that UTF-8 cannot encode. The SDK loses a result with an unpaired surrogate."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {carried(key): carried(inner) for key, inner in value.items()}
    return [carried(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def sentence(text: str, redact: Callable[[str], str], most: int = SENTENCE_CHARACTERS) -> str:
    """Return a text as a client may see it: without secrets, of limited length, and encodable in UTF-8.

    Unpaired surrogates come from a request that quotes one, or from a file's name.
    """
    # Redact before shortening: half of a secret is not recognised. Megabytes are cut first, far from the part that is kept.
    return shortened(redact(carried(shortened(text, _READ_CHARACTERS))), most)


def sentences(texts: Sequence[str], redact: Callable[[str], str]) -> list[str]:
    """Like `sentence`, for the first of many. The last one then says how many there are."""
    shown = [sentence(text, redact, DETAIL_CHARACTERS) for text in texts[:DETAILS]]
    return [*shown, f"... and {len(texts) - DETAILS} more"] if len(texts) > DETAILS else shown


def failure(error: WorkerError, redact: Callable[[str], str]) -> dict[str, Any]:
    """Return a client's answer for an error. RunPod shows `error` beside status FAILED, the rest as the job's output.

    A worker whose engine does not come back asks to be replaced instead of failing every job in the queue.
    """
    result: dict[str, Any] = {"error": sentence(str(error), redact), "code": error.code, "retryable": error.retryable}
    if details := sentences(error.details(), redact):
        result["details"] = details
    if isinstance(error, StartError):
        result["refresh_worker"] = True
    return result
