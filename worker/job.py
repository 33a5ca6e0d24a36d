"""What a request and a result are. Pure: values in, values out.

The shapes are those of runpod-workers/worker-comfyui, so that its clients work unchanged; what is added is additive.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from worker.errors import ImagesInvalid, InputMissing, InputNotJson, WorkflowMissing


@dataclass(frozen=True, slots=True)
class InputImage:
    """A file the client sends along: `data` is base64, with or without a data: prefix; any kind of file."""

    name: str
    data: str


@dataclass(frozen=True, slots=True)
class Request:
    """One job's input. `workflow` is checked for presence here, for shape where graphs are understood."""

    workflow: object
    images: tuple[InputImage, ...] = ()
    comfy_org_api_key: str | None = None
    models: object = None
    """Where models come from, for this job; its shape is checked where models are understood."""
    extra_pnginfo: dict[str, Any] | None = None
    """What ComfyUI's editor sends along, above all its own form of the workflow: embedded in pictures, and read for models."""

    @classmethod
    def parse(cls, value: object) -> Request:
        """Read `job["input"]`: an object, or a string that is the JSON of one. Keys nobody knows are ignored.

        Raises a `RequestError` that says what to send instead.
        """
        fields = _object(value)
        if fields.get("workflow") is None:
            raise WorkflowMissing
        key, pnginfo = fields.get("comfy_org_api_key"), fields.get("extra_pnginfo")
        return cls(
            workflow=fields["workflow"],
            images=_images(fields.get("images")),
            comfy_org_api_key=key if isinstance(key, str) and key else None,
            models=fields.get("models"),
            extra_pnginfo=pnginfo if isinstance(pnginfo, dict) else None,
        )


def _object(value: object) -> dict[str, Any]:
    if value is None:
        raise InputMissing
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as exc:
            raise InputNotJson(f"{exc}") from exc
    if not isinstance(value, dict):
        raise InputNotJson("it must be an object with the key 'workflow'")
    return value


def _images(value: object) -> tuple[InputImage, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ImagesInvalid
    return tuple(_image(item) for item in value)


def _image(item: object) -> InputImage:
    if not isinstance(item, dict):
        raise ImagesInvalid
    name, data = item.get("name"), item.get("image")
    if not isinstance(name, str) or not isinstance(data, str) or not name:
        raise ImagesInvalid
    return InputImage(name, data)


@dataclass(frozen=True, slots=True)
class OutputItem:
    """One file of the result. `data` is base64 without a prefix when `type` is `base64`."""

    filename: str
    type: str
    data: str
    node_id: str
    subfolder: str
    media_type: str
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the result."""
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
    """A job's success: what the client gets as `output`. `warnings` name outputs that ComfyUI dropped."""

    images: tuple[OutputItem, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result's JSON; `status` is there only when there is no image, as worker-comfyui's clients expect."""
        result: dict[str, Any] = {"images": [item.to_dict() for item in self.images]}
        if not self.images:
            result["status"] = "success_no_images"
        if self.warnings:
            result["errors"] = list(self.warnings)
        return result
