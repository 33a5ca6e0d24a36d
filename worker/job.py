"""The request and the result. Pure: values in, values out.

The shapes are those of runpod-workers/worker-comfyui, so that its clients work unchanged. Additions are optional.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.base.text import count
from worker.errors import (
    FieldInvalid,
    ImagesInvalid,
    InputMissing,
    InputNotJson,
    InputTooDeep,
    WorkflowInvalid,
    WorkflowMissing,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

# The largest seed of ComfyUI's samplers. It refuses a larger one, but only after the job's models are loaded.
_LARGEST_SEED = (1 << 64) - 1
_QUALITY, _BEST_QUALITY = 90, 100
# Base64 contains no colon. A prefix such as `data:image/png;base64,` begins otherwise.
_ADDRESS = re.compile(r"\s*https?://", re.IGNORECASE)
# Real workflows with nested subgraphs are some 20 levels deep.
_DEEPEST = 100
# Each file costs some system calls on a disk that may be remote.
_MOST_FILES = 2_000


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that the client of a job sends, of any kind: base64 with or without a `data:` prefix, or an address.

    Exactly one of `data` and `url` is set. `name` may contain folders; `subfolder` is put in front of it.
    """

    name: str
    data: str | None = None
    url: str | None = None
    subfolder: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One job's input. `workflow` is checked for presence here; other modules check its structure."""

    workflow: object
    """A graph in API format, a workflow in the editor's format, or the name of one on the volume.

    None only if `workflow_from` is set.
    """
    files: tuple[InputFile, ...] = ()
    """`images` first, then `files`: they differ only in the name of the key that holds the data."""
    comfy_org_api_key: str | None = None
    models: object = None
    """Sources of models for this job. `models.sources` checks its structure."""
    extra_pnginfo: dict[str, Any] | None = None
    """What ComfyUI's editor sends too, mainly its own form of the workflow: embedded in pictures, and read for models."""
    timeout_s: float | None = None
    """How long the workflow may run, at most the operator's JOB_TIMEOUT_S."""
    outputs: frozenset[str] | None = None
    """The nodes whose outputs are returned; None for all."""
    workflow_from: str | None = None
    """The name of one of the job's files, which contains the workflow."""
    set: dict[str, Any] | None = None
    """Values to put into the graph, by `NODE.INPUT`."""
    seed: str | int | None = None
    """`random`, `next` or a number. None leaves the seeds as saved."""
    previews: bool = False
    """Also return the outputs of preview nodes."""
    return_timings: bool = False
    output_format: str | None = None
    """`webp` or `jpeg`, for pictures that nodes saved as PNG. None returns them unchanged."""
    quality: int = _QUALITY
    """The quality of that format, from 1 to 100."""

    @classmethod
    def parse(cls, value: object) -> Request:
        """Parse `job["input"]`: an object, or a string that is the JSON of one. Ignore unknown keys.

        Raises a `RequestError` that says what to send instead.
        """
        fields = _object_field(value)
        check_depth(fields)
        carrier = fields.get("workflow_from")
        if carrier is not None and (not isinstance(carrier, str) or not carrier or fields.get("workflow") is not None):
            raise FieldInvalid("workflow_from", "must be the name of a file, in place of 'workflow'")
        if fields.get("workflow") is None and carrier is None:
            raise WorkflowMissing
        return cls(
            workflow=_workflow_field(fields.get("workflow")),
            files=_images_field(fields.get("images")) + _files(fields.get("files")),
            comfy_org_api_key=_key_field(fields.get("comfy_org_api_key")),
            models=fields.get("models"),
            extra_pnginfo=_pnginfo(fields.get("extra_pnginfo")),
            timeout_s=_timeout_field(fields.get("timeout_s")),
            outputs=_outputs_field(fields.get("outputs")),
            workflow_from=carrier,
            set=_overrides(fields.get("set")),
            seed=_seed(fields.get("seed")),
            previews=_flag_field("previews", fields.get("previews")),
            return_timings=_flag_field("return_timings", fields.get("return_timings")),
            output_format=_picture_format(fields.get("output_format")),
            quality=_quality(fields.get("quality")),
        )


def check_depth(value: object, what: str = "The input") -> None:
    """Refuse a request that is nested too deeply. Raises `InputTooDeep`.

    ComfyUI copies a graph and its extra data by recursion: a value of some 500 levels ends its prompt thread.
    """
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise InputTooDeep(_DEEPEST, what)


def _object_field(value: object) -> dict[str, Any]:
    if value is None:
        raise InputMissing
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise InputNotJson(str(exc).partition(";")[0]) from exc
    if not isinstance(value, dict):
        raise InputNotJson("it is no object")
    return value


def _workflow_field(value: object) -> object:
    """Return the request's workflow. A string may contain its JSON; another string is the name of one."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        workflow = json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise WorkflowInvalid(
            f"the workflow is a string that is no JSON ({str(exc).partition(';')[0]}); send the object itself"
        ) from exc
    check_depth(workflow)
    return workflow


def _images_field(value: object) -> tuple[InputFile, ...]:
    """Parse the request's `images: [{name, image}]` as every client sends it, or `{name, url}`."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ImagesInvalid
    _check_count("images", value)
    files = tuple(_input_file(item, data_key="image") for item in value)
    if None in files:
        raise ImagesInvalid
    return tuple(file for file in files if file)


def _check_count(field: str, value: list[Any]) -> None:
    if len(value) > _MOST_FILES:
        raise FieldInvalid(field, f"holds {len(value)} files; {_MOST_FILES} are the most that a job may bring")


def _files(value: object) -> tuple[InputFile, ...]:
    rule = "must be a list of objects with 'name' and either 'data' (base64) or 'url', all strings; 'subfolder' is optional"
    if value is None:
        return ()
    if not isinstance(value, list):
        raise FieldInvalid("files", rule)
    _check_count("files", value)
    files = tuple(_input_file(item, data_key="data") for item in value)
    if None in files:
        raise FieldInvalid("files", rule)
    return tuple(file for file in files if file)


def _input_file(item: object, data_key: str) -> InputFile | None:
    """Return the file that an entry of the request describes, or None."""
    if not isinstance(item, dict):
        return None
    name, subfolder, data, url = (item.get(key) for key in ("name", "subfolder", data_key, "url"))
    if not isinstance(name, str) or not name or not isinstance(subfolder, str | None):
        return None
    if isinstance(data, str) and _ADDRESS.match(data):
        return InputFile(name, url=data.strip(), subfolder=subfolder or "")
    if isinstance(data, str):  # base64 wins over 'url', for clients that predate URLs
        return InputFile(name, data=data, subfolder=subfolder or "")
    if isinstance(url, str) and url and data is None:
        return InputFile(name, url=url, subfolder=subfolder or "")
    return None


def _key_field(value: object) -> str | None:
    """Return the request's key; an empty one is None. Refuse other types: the job would be charged to the worker's own key."""
    if value is not None and not isinstance(value, str):
        raise FieldInvalid("comfy_org_api_key", "must be a string")
    return value or None


def _pnginfo(value: object) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise FieldInvalid("extra_pnginfo", 'must be an object, such as {"workflow": {...}}')
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise FieldInvalid("extra_pnginfo", "holds a number that is NaN or infinite; send a finite one, or null") from None
    return value


def _timeout_field(value: object) -> float | None:
    """Return the request's time limit. None, also for 0, means that only the operator's limit applies."""
    if value is None:
        return None
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # JSON has whole numbers of any length
            seconds = float(value)
    if seconds == 0:
        return None
    if not (math.isfinite(seconds) and seconds > 0):
        raise FieldInvalid("timeout_s", "must be a number of seconds, 0 or more; 0 sets no limit of its own")
    return seconds


def _whole_number(value: object) -> int | None:
    """Return a request's whole number that JSON wrote as 9 or as 9.0, which mean the same there. None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _outputs_field(value: object) -> frozenset[str] | None:
    """Return the nodes that the request names. None means all, also for an empty list: nobody runs a GPU for no output."""
    if value is None or value == []:
        return None
    ids = [item if isinstance(item, str) else _whole_number(item) for item in value] if isinstance(value, list) else []
    if not ids or None in ids:
        raise FieldInvalid("outputs", 'must be a list of node ids, such as ["9"], or be left out to have all outputs')
    return frozenset(str(node_id) for node_id in ids)


def _overrides(value: object) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise FieldInvalid("set", 'must be an object from NODE.INPUT to a value, such as {"6.text": "a fox"}')
    return value


def _seed(value: object) -> str | int | None:
    if value is None or value in ("random", "next"):
        return value
    if value == -1:  # many front ends mean it so
        return "random"
    number = _whole_number(value)
    if number is None or not 0 <= number <= _LARGEST_SEED:
        raise FieldInvalid("seed", f"must be 'random' or -1, 'next', or a whole number from 0 to {_LARGEST_SEED}")
    return number


def _picture_format(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in {"webp", "jpeg"}):
        raise FieldInvalid("output_format", "must be 'webp' or 'jpeg', or be left out to have pictures as they were saved")
    return value


def _quality(value: object) -> int:
    number = _QUALITY if value is None else _whole_number(value)
    if number is None or not 1 <= number <= _BEST_QUALITY:
        raise FieldInvalid("quality", f"must be a whole number from 1 to {_BEST_QUALITY}")
    return number


def _flag_field(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise FieldInvalid(name, "must be true or false")
    return bool(value)


@dataclass(frozen=True, slots=True)
class OutputItem:
    """One file or text in a job's result, as the client gets it.

    `type` says what `data` is. `base64`: the file's bytes, without a prefix. `s3_url`: a signed address. `volume_path`: its
    path below the network volume's root, which is its key in the volume's S3 API as well. `text`: the text itself.
    """

    filename: str
    type: str
    data: str
    node_id: str
    subfolder: str
    media_type: str
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the item as it appears in the result."""
        return {
            "filename": self.filename,
            "type": self.type,
            "data": self.data,
            "node_id": self.node_id,
            "subfolder": self.subfolder,
            "media_type": self.media_type,
            "size_bytes": self.size_bytes,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """A job's success: the client's `output`. `warnings` name what is missing in it."""

    images: tuple[OutputItem, ...] = ()
    warnings: tuple[str, ...] = ()
    videos: tuple[OutputItem, ...] = ()
    audio: tuple[OutputItem, ...] = ()
    text: tuple[OutputItem, ...] = ()
    files: tuple[OutputItem, ...] = ()
    timings: Mapping[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether nothing at all is delivered."""
        return not (self.images or self.videos or self.audio or self.text or self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the result's JSON: `images` always, the other lists if they are not empty.

        `status` is present only if nothing at all is delivered, as worker-comfyui's clients expect.
        """
        result: dict[str, Any] = {"images": [item.to_dict() for item in self.images]}
        more = {"videos": self.videos, "audio": self.audio, "text": self.text, "files": self.files}
        result.update({name: [item.to_dict() for item in items] for name, items in more.items() if items})
        if self.is_empty:
            result["status"] = "success_no_images"
        if self.warnings:
            result["errors"] = list(self.warnings)
        if self.timings is not None:
            result["timings"] = dict(self.timings)
        return result


def result_contents(result: Mapping[str, Any]) -> str:
    """Return what a job's result holds, for the log: `2 images, 1 text`."""
    kinds = {"images": "image", "videos": "video", "audio": "audio file", "text": "text", "files": "file"}
    return ", ".join(count(result[key], kind) for key, kind in kinds.items() if result.get(key)) or "no outputs"
