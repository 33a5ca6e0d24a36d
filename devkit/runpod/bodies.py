"""The bodies that REST API v2 takes, as JSON schemas, after RunPod's OpenAPI of August 2026. Pure."""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_NAME: Final[Schema] = {"type": "string", "minLength": 1}
_TEXTS: Final[Schema] = {"type": "array", "items": _TEXT}
_CUDA: Final[Schema] = {"type": "string", "pattern": r"^\d+\.\d+$"}


def _object(required: list[str], **fields: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


_CONTAINER: Final[dict[str, Schema]] = {
    "args": _TEXT,
    "disk": {"type": "integer", "minimum": 1},
    "env": {"type": "object", "additionalProperties": _TEXT},
    "image": _TEXT,
    "ports": _TEXTS,
    "registry": {"type": ["string", "null"]},
}
_GPU: Final[dict[str, Schema]] = {
    "pools": {"type": "array", "minItems": 1, "items": _TEXT},
    "excludedTypes": {"type": "array", "uniqueItems": True, "items": {"type": "string", "pattern": r"^\s*[^-\s]"}},
    "count": {"type": "integer", "minimum": 1},
    "allowedCudaVersions": {"type": "array", "items": _CUDA},
    "minCudaVersion": _CUDA,
}
_CPU: Final[Schema] = _object(["id", "vcpuCount"], id=_NAME, vcpuCount={"type": "integer", "minimum": 2})
_ENDPOINT: Final[dict[str, Schema]] = {
    **_CONTAINER,
    "dataCenterIds": _TEXTS,
    "flashboot": {"enum": ["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"]},
    "name": _NAME,
    "networkVolumes": _TEXTS,
    "scaling": {
        "oneOf": [
            _object(["type", "queueDelay"], type={"const": "QUEUE_DELAY"}, queueDelay={"type": "number", "minimum": 0.5}),
            _object(["type", "requestCount"], type={"const": "REQUEST_COUNT"}, requestCount={"type": "integer", "minimum": 1}),
        ]
    },
    "templateId": _TEXT,
    "timeout": {"type": "integer"},
    "workers": _object(
        [],
        min={"type": "integer", "minimum": 0},
        max={"type": "integer", "minimum": 0},
        idleTimeout={"type": "integer", "minimum": 1, "maximum": 3600},
    ),
}
_SIZE: Final[Schema] = {"type": "integer", "minimum": 10, "maximum": 4096}
_MOUNT: Final[Schema] = _object(["volumeId", "path"], volumeId=_TEXT, path=_TEXT)

CREATE: Final[dict[str, Schema]] = {
    "network-volumes": _object(
        ["name", "size", "dataCenter"],
        name=_NAME,
        size=_SIZE,
        dataCenter=_NAME,
        type={"enum": ["STANDARD", "HIGH_PERFORMANCE"]},
    ),
    "serverless": {
        **_object(
            ["name", "type", "scaling"],
            **_ENDPOINT,
            type={"enum": ["QUEUE", "LOAD_BALANCER"]},
            gpu=_object(["pools"], **_GPU),
            cpu={"type": "array", "minItems": 1, "items": _CPU},
        ),
        "anyOf": [{"required": ["image"]}, {"required": ["templateId"]}],
    },
    "pods": {
        **_object(
            ["name"],
            **_CONTAINER,
            name=_NAME,
            cloud={"enum": ["SECURE", "COMMUNITY"]},
            cpu=_CPU,
            gpu=_object(["id"], id=_TEXT, count={"type": "integer", "minimum": 1}),
            dataCenterIds=_TEXTS,
            mounts=_object([], network={"type": "array", "maxItems": 1, "items": _MOUNT}),
            startJupyter={"type": "boolean"},
            startSsh={"type": "boolean"},
            templateId=_NAME,
        ),
        "anyOf": [{"required": ["image"]}, {"required": ["templateId"]}],
    },
}
"""What POST takes, by the last part of its path."""

UPDATE: Final[dict[str, Schema]] = {
    "network-volumes": {**_object([], name=_NAME, size=_SIZE), "minProperties": 1},
    "serverless": _object([], **_ENDPOINT, gpu={**_object([], **_GPU), "dependentRequired": {"excludedTypes": ["pools"]}}),
    "pods": _object([], **_CONTAINER, name=_NAME),
}
"""What PATCH takes."""
