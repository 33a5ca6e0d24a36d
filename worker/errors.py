"""The worker's errors as one tree. Those of commands that only people call stand beside these commands (seed/errors.py). Pure.

    WorkerError
    ├── SettingsError            the environment is wrong; the worker does not start
    ├── CommandUnknown           `python -m worker` has no such command
    ├── ConvertUsage             `convert` was given what it cannot read
    ├── StartError               the worker cannot start on this machine
    │   └── NotOnWindows, EngineNotFound, NoGpu, EngineStartFailed, EngineGaveUp, VolumeMissing, SdkUnknown, NothingToServe
    ├── RequestError             the client's request is wrong; a retry cannot help
    │   ├── InputMissing, InputNotJson, InputTooDeep, ImagesInvalid, FieldInvalid, S3ConfigInvalid
    │   ├── UnsafePath
    │   │   └── LinkAstray       a link on the volume leads out of it, or nowhere
    │   ├── WorkflowMissing, WorkflowInvalid, WorkflowEmpty, WorkflowNotFinite, WorkflowUiFormat, NoWorkflowInFile
    │   ├── WorkflowUnknown, UiWorkflowInvalid, UnknownNodes, OverrideInvalid
    │   ├── WorkflowRejected     ComfyUI refused the graph
    │   │   └── ModelMissing
    │   ├── ModelsInvalid, SpecInvalid, HostNotAllowed, SuffixNotAllowed, AmbiguousModel
    │   └── ImageNotBase64, InputUrlRefused, InputNameInvalid, InputTooLarge
    ├── ManifestInvalid          the operator's list of models is wrong
    ├── InputError               an input file cannot be had
    │   └── InputNotServed, InputUnreachable, InputTimedOut, InputNotStored
    ├── ModelError               a model is unavailable
    │   ├── RepoNotFound, RepoGated, RevisionNotFound, FileNotInRepo, TokenRefused, TokenMalformed, ProxyUnusable
    │   ├── HubOffline, SourceRefused, NotAFile, SourceUnreachable, SourceChanged, ContentMismatch, UnsealedMismatch
    │   ├── FileUnusable         the file is there and cannot be loaded
    │   │   └── NotAModel, FileIncomplete
    │   └── VolumeReadOnly, VolumeFull, VolumeFailed, EnsureCancelled
    ├── EngineError              ComfyUI failed while it had the job
    │   ├── NodeFailed
    │   │   └── OutOfMemory
    │   ├── GpuFault, PromptFatal, RunInterrupted, RunTimedOut, RunLost
    │   ├── OutputGone
    │   │   └── OutputElsewhere
    │   └── EngineDied, EngineHung, EngineStalled, EngineUnreachable, EngineAnswerInvalid
    ├── DeliveryError            the workflow ran, but its result cannot be delivered
    │   ├── ResultTooLarge, ResultRefused
    │   └── BucketFailed
    │       └── BucketRefused, BucketUnreachable
    └── InternalError            a defect of the worker itself

An error is data: a stable `code`, whether sending the same job again can help (`retryable`), fields, and a `template` that
makes one sentence of them: what happened and what to do. Clients of worker-comfyui match on the beginnings of some sentences,
so those beginnings are part of the interface.
"""

from __future__ import annotations

import shlex
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, dataclass_transform

from worker.base.files import FULL, READ_ONLY, free_bytes
from worker.base.text import compared_sizes, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


# Clients of worker-comfyui recognise a failed job by these beginnings.
_INPUTS_FAILED = "Failed to upload one or more input images: "
_FAILED = "Job processing failed: "


@dataclass_transform(eq_default=False)
class WorkerError(Exception):
    """The root: every error that is raised on purpose is one of these.

    A subclass declares fields as a dataclass does (`path: Path`, `reason: str = ""`) and accepts them by position or by name.
    It is no dataclass: those are made with `exec`, and ninety of them cost 20 ms of every cold start.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    opening: ClassVar[str] = ""
    """The beginning that clients know, if the `details` are the rest of the sentence."""
    template: ClassVar[str] = ""
    """The sentence, with fields and properties in braces. A list is joined by "; ", or by what follows its colon."""
    details_field: ClassVar[str] = ""
    """The field whose entries are the `details`."""
    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fields = (*cls.fields, *cls.__annotations__)

    if not TYPE_CHECKING:  # type checkers know the fields of each class

        def __init__(self, *values: Any, **named: Any) -> None:  # noqa: ANN401 - of whatever type the field has
            super().__init__(*values)
            given = {**dict(zip(self.fields, values, strict=False)), **named}
            lacking = [name for name in self.fields if name not in given and not hasattr(type(self), name)]
            if lacking or len(given) != len(values) + len(named) or not given.keys() <= set(self.fields):
                raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields) or 'no field'}, not {values} and {named}")
            vars(self).update(given)

    def __str__(self) -> str:
        return self.opening + self.sentence

    @property
    def sentence(self) -> str:
        """Return the sentence without the beginning that clients know."""
        return self.template.format_map(_Shown(self))

    def details(self) -> list[str]:
        """Return more than the sentence, one finding a line. Empty if the sentence says it all."""
        if self.details_field:
            return list(getattr(self, self.details_field))
        return [self.sentence] if self.opening else []

    def copy(self, **changed: object) -> Self:
        """Return another error with the same fields, for a second raiser: a traceback belongs to one."""
        return type(self)(**{name: getattr(self, name) for name in self.fields} | changed)


class _Shown(dict[str, Any]):
    """The values of the names in an error's template: its attributes, with lists joined."""

    def __init__(self, error: WorkerError) -> None:
        super().__init__()
        self._error = error

    def __missing__(self, name: str) -> Any:  # noqa: ANN401 - as above
        value = getattr(self._error, name)
        return _Joined(value) if isinstance(value, (list, tuple)) else value


class _Joined(tuple[str, ...]):
    """A list in an error's sentence."""

    __slots__ = ()

    def __format__(self, separator: str) -> str:
        return (separator or "; ").join(self)


# --- settings and commands --------------------------------------------------------------------------


class SettingsError(WorkerError):
    """The environment has wrong settings. All are reported at once."""

    problems: Sequence[str]
    code = "settings_invalid"
    details_field = "problems"
    template = "The worker's settings are wrong: {problems}"


class CommandUnknown(WorkerError):
    """`python -m worker` was given a word that is none of its commands."""

    command: str
    commands: Sequence[str]
    code = "command_unknown"
    template = "There is no command {command!r}: write one of {commands:, }, or none to start the worker."


class ConvertUsage(WorkerError):
    """The command got unreadable input, or there is no ComfyUI to ask. `reason` says which and what to do."""

    reason: str
    code = "convert_usage"
    template = "{reason}"


# --- the worker does not start ----------------------------------------------------------------------


class StartError(WorkerError):
    """The worker cannot start on this machine."""

    code = "start_failed"


class NotOnWindows(StartError):
    """The command needs something that Windows does not have."""

    command: str
    code = "not_on_windows"
    template = "{command} needs Linux, macOS or WSL: run it there; on Windows only plan, seed, up and settings work."


class EngineNotFound(StartError):
    """ComfyUI, or the Python to run it, is not where the settings say."""

    path: Path
    setting: str
    code = "engine_not_found"
    template = "{path} does not exist: set {setting} to where ComfyUI is installed."


class NoGpu(StartError):
    """No GPU device is visible, and ComfyUI was not told to run on the CPU."""

    code = "no_gpu"
    template = "No GPU is visible in this container: start it on a GPU machine, or add --cpu to COMFY_ARGS to run on the CPU."


class EngineStartFailed(StartError):
    """ComfyUI ended, or was silent, before it answered its first request."""

    cause: str
    last_lines: Sequence[str] = ()
    code = "engine_start_failed"
    retryable = True
    details_field = "last_lines"
    template = (
        "ComfyUI did not start: {cause}{last}; its output is in the worker's log: check COMFY_ARGS and custom nodes first."
    )

    @property
    def last(self) -> str:
        return f" (its last line: {self.last_lines[-1]})" if self.last_lines else ""


class EngineGaveUp(StartError):
    """ComfyUI died repeatedly without finishing a job in between."""

    deaths: int
    cause: str
    last_lines: Sequence[str] = ()
    code = "engine_gave_up"
    retryable = True
    details_field = "last_lines"
    template = (
        "ComfyUI ended {deaths} times in a row without finishing a job, the last time it {cause}; "
        "this worker exits. Send the job again, and read the log if the next worker ends in the same way."
    )


class VolumeMissing(StartError):
    """There is no network volume, and REQUIRE_VOLUME requires one."""

    path: Path
    code = "volume_missing"
    template = "There is no network volume at {path}: attach one to the endpoint, or unset REQUIRE_VOLUME."


def no_volume(path: Path) -> str:
    """Return the beginning of every error about a missing volume."""
    return f"There is no network volume at {path}"


class SdkUnknown(StartError):
    """The worker's job loop was not written for this RunPod SDK."""

    version: str
    parts: Sequence[str]
    code = "sdk_unknown"
    template = 'The RunPod SDK {version} lacks or changed parts that this worker needs ({parts:, }): install "runpod~=1.12.0".'


class NothingToServe(StartError):
    """The worker runs outside RunPod, without a local API and without a test input."""

    code = "nothing_to_serve"
    template = (
        "There is nothing to serve: outside RunPod, start with --rp_serve_api for a local API, "
        "or put a job in ./test_input.json or --test_input."
    )


# --- the request is wrong ---------------------------------------------------------------------------


class RequestError(WorkerError):
    """The client's request is wrong; the same request will fail again."""

    code = "request_invalid"


class InputMissing(RequestError):
    """The job has no input at all."""

    code = "input_missing"
    template = "Please provide input: an object with the key 'workflow'."


class InputNotJson(RequestError):
    """The input is a string that is not the JSON of an object."""

    reason: str
    code = "input_not_json"
    template = "Invalid JSON format in input: {reason}; send an object, or a string that contains one as JSON."


class InputTooDeep(RequestError):
    """The input, or a workflow in a file, has lists and objects nested more deeply than ComfyUI survives."""

    most: int
    what: str = "The input"
    code = "input_too_deep"
    template = (
        "{what} has lists or objects nested more than {most} levels deep; no workflow needs that, so send it with less nesting."
    )


class ImagesInvalid(RequestError):
    """`images` is no list of files."""

    code = "images_invalid"
    template = "'images' must be a list of objects with 'name' and 'image' keys, both strings; 'url' may replace 'image'."


class FieldInvalid(RequestError):
    """A field of the request has the wrong type or value. `rule` says what it must be."""

    field: str
    rule: str
    code = "field_invalid"
    template = "'{field}' {rule}."


class UnsafePath(RequestError):
    """A name is refused because it leads to a file outside its folder. `nameless`: no file there can have such a name."""

    what: str
    value: str
    nameless: bool = False
    code = "unsafe_path"
    template = "{what} is {fault}."

    @property
    def fault(self) -> str:
        if self.nameless:
            return (
                f"{shortened(self.value, 100)!r}, which cannot be a file name there; "
                "write a relative name without control characters, with one '/' between folders and none at its end"
            )
        return f"'{self.value}', which leaves its folder; use a relative name without '..'"


class LinkAstray(UnsafePath):
    """A model is refused because a link above its path (`value`) leads to `target`, outside the volume or missing."""

    target: str = ""
    exists: bool = False
    code = "link_astray"
    template = (
        "{what} {value} leads to {target}, which {leads}: remove it (rm {quoted}) and put the files themselves there, "
        "or link it to a folder of the volume by a relative path."
    )

    @property
    def leads(self) -> str:
        return "is outside the volume" if self.exists else "does not exist"

    @property
    def quoted(self) -> str:
        return shlex.quote(self.value)


class S3ConfigInvalid(RequestError):
    """The job's own `s3Config` cannot be used."""

    reason: str
    code = "s3_config_invalid"
    template = (
        "The job's s3Config {reason}; send accessId, accessSecret, bucketName and endpointUrl, or leave s3Config out "
        "to use the worker's own bucket."
    )


# --- the request's workflow is wrong ----------------------------------------------------------------


class WorkflowMissing(RequestError):
    """The input has no workflow."""

    code = "workflow_missing"
    template = "Missing 'workflow' parameter: send the workflow, as ComfyUI saves it or exports it, as input.workflow."


class WorkflowInvalid(RequestError):
    """The workflow is not a graph in ComfyUI's API format, or none of its outputs is left without bad links and cycles."""

    reason: str
    code = "workflow_invalid"
    template = "Workflow validation failed: {reason}."


class WorkflowEmpty(RequestError):
    """The graph has no nodes, or none of the workflow's nodes runs."""

    code = "workflow_empty"
    template = (
        "Workflow validation failed: the workflow has no nodes, or all of them are muted or bypassed; "
        "export it with at least one output node such as SaveImage that runs."
    )


class WorkflowNotFinite(RequestError):
    """A number in the workflow is NaN or infinite, which JSON cannot represent."""

    node_id: str
    input_name: str
    code = "workflow_not_finite"
    template = "Workflow validation failed: input '{input_name}' of node {node_id} is NaN or infinite; send a finite number."


class WorkflowUiFormat(RequestError):
    """The workflow is in the editor's format, and there is no ComfyUI to ask for the definitions of its nodes."""

    code = "workflow_ui_format"
    template = (
        "Workflow validation failed: a workflow in the editor's format can be read only with a running ComfyUI; "
        "use the editor's Export (API), or convert it first: python -m worker convert."
    )


class NoWorkflowInFile(RequestError):
    """The file that `workflow_from` or `workflow` names contains no workflow. `fault` says what is wrong with a text."""

    name: str
    fault: str = ""
    code = "no_workflow_in_file"
    template = "The file '{name}' {what_to_do}"

    @property
    def what_to_do(self) -> str:
        if self.fault:
            return f"{self.fault}; save or export the workflow again in ComfyUI."
        return (
            "contains no workflow: use a PNG, WEBP, MP4 or WEBM that ComfyUI saved with its metadata, "
            "or send the workflow itself."
        )


class WorkflowUnknown(RequestError):
    """The request names a workflow that is not on the volume. `taken`: something other than a file has its name."""

    name: str
    there: Sequence[str] = ()
    taken: bool = False
    code = "workflow_unknown"
    details_field = "there"
    template = "The volume has no workflow '{short_name}' ({known}); {what_to_do}."

    @property
    def short_name(self) -> str:
        return shortened(self.name, 100)

    @property
    def known(self) -> str:
        if not self.there:
            return "there are none"
        more = f" and {len(self.there) - 5} more" if len(self.there) > 5 else ""  # noqa: PLR2004 - as many as are shown
        return f"there are {', '.join(shortened(name, 60) for name in self.there[:5])}{more}"

    @property
    def what_to_do(self) -> str:
        path = f"workflows/{self.short_name.removesuffix('.json')}.json"
        return f"{path} is no file: put one in its place" if self.taken else f"put it there as {path}"


class UiWorkflowInvalid(RequestError):
    """A workflow in the editor's format cannot be converted to exactly the graph that the editor would send."""

    reason: str
    code = "ui_workflow_invalid"
    template = (
        "The workflow in the editor's format cannot be converted: {reason}; "
        "if you cannot change that, send the workflow from the editor's Export (API)."
    )


class UnknownNodes(RequestError):
    """The workflow needs node classes that ComfyUI does not have. All of them are named, before any download.

    `nodes` are those of packs, each with its pack. The others are ComfyUI's own: `newer` ones came after `comfyui`, the version
    of this one, at the latest with `wanted` ("" if unknown); `gone` ones are no longer in it; `off` ones did not load.
    """

    nodes: Sequence[str]
    newer: Sequence[str] = ()
    gone: Sequence[str] = ()
    off: Sequence[str] = ()
    wanted: str = ""
    comfyui: str = ""
    code = "unknown_nodes"

    template = "{sentences: }"

    @property
    def sentences(self) -> list[str]:
        found: list[str] = []
        this = f"ComfyUI {self.comfyui}" if self.comfyui else "a ComfyUI of unknown version"
        if self.newer:
            wanted = f"{self.wanted} or newer" if self.wanted else "a newer one"
            found.append(
                f"This image has {this}, but the workflow needs {wanted} for {'; '.join(self.newer)}: "
                "use an image with that ComfyUI, or remove the nodes from the workflow."
            )
        if self.nodes:
            found.append(
                f"The workflow needs node classes that this ComfyUI does not have: {'; '.join(self.nodes)}; "
                "install their custom nodes in the image or on the volume, or remove the nodes from the workflow."
            )
        if self.gone:
            found.append(
                f"This image has {this}, which no longer has {'; '.join(self.gone)}: "
                "replace the nodes with their successors, or remove them from the workflow."
            )
        if self.off:
            found.append(
                f"This image has {this}, which runs without some of its own node classes: {'; '.join(self.off)}; check whether "
                "COMFY_ARGS turns them off (--disable-api-nodes), or the start of the log says that their import failed."
            )
        return found

    def details(self) -> list[str]:
        return [*self.newer, *self.nodes, *self.gone, *self.off]


class OverrideInvalid(RequestError):
    """A key of `set` names no input, or several; the sentence says which there are."""

    key: str
    reason: str
    code = "override_invalid"
    template = "In 'set', '{key}' {reason}."


class WorkflowRejected(RequestError):
    """ComfyUI refused the graph. `problems` has one sentence for each finding."""

    problems: Sequence[str]
    code = "workflow_rejected"
    details_field = "problems"
    template = "Workflow validation failed: {problems}"


class ModelMissing(WorkflowRejected):
    """The graph names missing model files; nothing else is wrong with it."""

    code = "model_missing"


# --- the request's models are wrong -----------------------------------------------------------------


class ModelsInvalid(RequestError):
    """`models` of a request is not a list."""

    code = "models_invalid"
    template = (
        "'models' must be a list of objects such as "
        '{{"folder": "loras", "name": "x.safetensors", "source": "hf://org/repo/x.safetensors"}}.'
    )


class SpecInvalid(RequestError):
    """The description of a model is wrong. `model` is its name, as far as known."""

    field: str
    reason: str
    model: str | None = None
    odd: bool = False
    code = "model_spec_invalid"
    """Whether it is a name that no file can have, rather than one that may not be had."""
    template = "The {field} of {which} {rest}"

    @property
    def which(self) -> str:
        return f"the model '{self.model}'" if self.model else "a model"

    @property
    def rest(self) -> str:
        return self.reason if self.reason.endswith("...") else f"{self.reason}."


class HostNotAllowed(RequestError):
    """A request asks for a download from a host that requests may not use."""

    name: str
    host: str
    allowed_hosts: Sequence[str]
    code = "model_host_not_allowed"
    template = (
        "The model '{name}' would come from {host}, but a request may name {allowed}; "
        "add the host to MODEL_HOSTS, or put the model into the worker's manifest."
    )

    @property
    def allowed(self) -> str:
        return f"only {', '.join(self.allowed_hosts)}" if self.allowed_hosts else "no host at all"


class SuffixNotAllowed(RequestError):
    """A request asks for a file type that can run code when it is loaded."""

    name: str
    allowed_suffixes: Sequence[str]
    code = "model_suffix_not_allowed"
    template = (
        "A request may name only {allowed_suffixes:, } files for download, not '{name}', which can contain code; "
        "use another file, or put the model into the worker's manifest."
    )


class AmbiguousModel(RequestError):
    """A model's name is unclear: one list has several different files of it. `candidates`: each folder/name and address."""

    name: str
    source: str
    candidates: Sequence[str]
    code = "model_ambiguous"
    details_field = "candidates"
    template = (
        "The model '{name}' could be any of {many} in {source}: {candidates}; "
        "name the right one with its folder in the request's 'models' or in the manifest."
    )

    @property
    def many(self) -> int:
        return len(self.candidates)


# --- a list of models is wrong ----------------------------------------------------------------------


class ManifestInvalid(WorkerError):
    """A list of models has mistakes. All are reported at once, each with line or entry and field."""

    where: str
    problems: Sequence[str]
    code = "manifest_invalid"
    details_field = "problems"
    template = "The manifest {where} is wrong: {problems}"


# --- the request's files cannot be used -------------------------------------------------------------


class ImageNotBase64(RequestError):
    """An input file's data is not base64."""

    name: str
    code = "image_not_base64"
    opening = _INPUTS_FAILED
    template = "the data of '{name}' is not base64; send the file's bytes as base64, with or without a data: prefix."


class InputUrlRefused(RequestError):
    """An input file's address is one that requests may not use. `where` is safe to show."""

    name: str
    where: str
    reason: str
    code = "input_url_refused"
    opening = _INPUTS_FAILED
    template = "'{name}' is not downloaded from {where}: {reason}."


class InputNameInvalid(RequestError):
    """An input file's name is impossible there."""

    name: str
    reason: str
    code = "input_name_invalid"
    opening = _INPUTS_FAILED
    template = "the name '{name}' {reason}; use another name."


class InputTooLarge(RequestError):
    """An input file has more bytes than the operator allows, after decoding."""

    name: str
    max_bytes: int
    code = "input_too_large"
    opening = _INPUTS_FAILED
    template = "'{name}' has more than {max_mb:g} MB; send a smaller file, or have the operator raise INPUT_MAX_MB."

    @property
    def max_mb(self) -> float:
        return self.max_bytes / 1e6


class InputError(WorkerError):
    """An input file is unavailable, although the request has the right form."""

    code = "input_failed"


class InputNotServed(InputError):
    """An input file's address answers, but not with the file, and a retry will not help. `where` is safe to show."""

    name: str
    where: str
    reason: str
    code = "input_not_served"
    opening = _INPUTS_FAILED
    template = "'{name}' cannot be downloaded from {where}: {reason}; send an address that works."


class InputUnreachable(InputError):
    """An input file's address failed at every attempt, but a retry may help. `where` is safe to show."""

    name: str
    where: str
    reason: str
    code = "input_unreachable"
    retryable = True
    opening = _INPUTS_FAILED
    template = "'{name}' could not be downloaded from {where} ({reason}); send the job again."


class InputTimedOut(InputError):
    """The files of a job did not all arrive in time."""

    names: Sequence[str]
    timeout_s: float
    code = "input_timed_out"
    retryable = True
    opening = _INPUTS_FAILED
    template = (
        "{first} did not arrive within {timeout_s:g} s, the limit for all files of a job; "
        "use a faster server, or have the operator raise INPUT_TIMEOUT_S."
    )

    @property
    def first(self) -> str:
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"'{self.names[0]}'{more}"


class InputNotStored(InputError):
    """An input file could not be written to the container's disk."""

    name: str
    reason: str
    code = "input_not_stored"
    retryable = True
    opening = _INPUTS_FAILED
    template = (
        "'{name}' could not be written to ComfyUI's input folder ({reason}); "
        "send the job again; if this repeats, give the container a larger disk."
    )


# --- a model is unavailable --------------------------------------------------------------------------


class ModelError(WorkerError):
    """A model cannot be made available. Other models are not affected."""

    code = "model_failed"


class RepoNotFound(ModelError):
    """The hub knows no such repository, or the repository is private: the hub does not say which."""

    repo: str
    file: str
    has_token: bool
    code = "repo_not_found"
    template = "The repository '{repo}' (for '{file}') does not exist or is private: correct its name, or {token}."

    @property
    def token(self) -> str:
        return "give the account of HF_TOKEN access to it" if self.has_token else "set HF_TOKEN to a token that may read it"


class RepoGated(ModelError):
    """The repository's terms must be accepted first."""

    repo: str
    file: str
    has_token: bool
    code = "repo_gated"
    template = (
        "The repository '{repo}' (for '{file}') is gated: accept its terms on its page with the account that {token} "
        "belongs to."
    )

    @property
    def token(self) -> str:
        return "HF_TOKEN" if self.has_token else "a token in HF_TOKEN"


class RevisionNotFound(ModelError):
    """The repository has no such branch, tag or commit."""

    repo: str
    file: str
    revision: str
    code = "revision_not_found"
    template = "The repository '{repo}' has no revision '{revision}' (for '{file}'): correct the part after '@'."


class FileNotInRepo(ModelError):
    """The repository has no such file at that revision."""

    repo: str
    file: str
    revision: str
    code = "file_not_in_repo"
    template = "The repository '{repo}' has no file '{file}' at '{revision}': correct the path or the revision."


class TokenRefused(ModelError):
    """A model's source requires a token, or refuses the given one. `variable` sets the token."""

    where: str
    status: int
    variable: str | None
    has_token: bool
    code = "token_refused"
    template = "{where} {what_to_do}"

    @property
    def what_to_do(self) -> str:
        if self.variable is None:
            return (
                f"requires a login (status {self.status}), but the worker has tokens for huggingface.co and "
                "civitai.com only: use an address without one, or put the file on the volume by hand."
            )
        refused = f"the token in {self.variable}" if self.has_token else "a request without a token"
        return f"refused {refused} (status {self.status}): set {self.variable} to one that may read it."


class TokenMalformed(ModelError):
    """The token contains characters that an HTTP header cannot contain."""

    variable: str
    code = "token_malformed"
    template = "{variable} contains characters that no token has: copy it again, without spaces, quotes or line breaks."


class ProxyUnusable(ModelError):
    """The environment's proxy cannot be used for models."""

    where: str
    reason: str
    code = "proxy_unusable"
    template = (
        "The proxy {where} {reason}: set HTTPS_PROXY and HTTP_PROXY to an HTTP proxy "
        "(http://user:password@host:port) or a SOCKS5 one (socks5://user:password@host:port), or unset them."
    )


class HubOffline(ModelError):
    """A file cannot be looked up, because HF_HUB_OFFLINE forbids requests to the hub."""

    where: str
    code = "hub_offline"
    template = "{where} is not requested, because HF_HUB_OFFLINE is set: unset it, or put the file on the volume by hand."


class SourceRefused(ModelError):
    """A model's source refused the request, and a retry will not help."""

    where: str
    status: int
    code = "source_refused"
    template = "{where} answered with status {status}: correct the model's address."


class NotAFile(ModelError):
    """A model's address is wrong: it leads to something other than a file of known length."""

    where: str
    found: str
    code = "not_a_file"
    template = "{where} is {found}: give the address that the file itself downloads from."


class SourceUnreachable(ModelError):
    """A model's source sent nothing, or nearly nothing, for too long. The received bytes are kept."""

    where: str
    reason: str
    waited_s: float
    came_bytes: int = 0
    code = "source_unreachable"
    retryable = True
    template = "{where} sent {sent} {waited_s:.0f} s ({reason}); try again: the received bytes are kept."

    @property
    def sent(self) -> str:
        return f"{self.came_bytes} bytes in" if self.came_bytes else "nothing for"


class SourceChanged(ModelError):
    """The file behind an address changed during the download."""

    where: str
    code = "source_changed"
    retryable = True
    template = "{where} changed during the download; try again, and pin a revision or a sha256."


class ContentMismatch(ModelError):
    """A model's file is refused: its source has another one than expected. `what` is `sha256` or `size`."""

    where: str
    what: str
    expected: str
    actual: str
    code = "content_mismatch"
    template = (
        "{where} has the {what} {actual}, but {expected} was expected; "
        "nothing was stored: correct the model's {what} or its address."
    )


class UnsealedMismatch(ModelError):
    """A file that was put there by hand is wrong: its sha256 is not the requested one. It was left unchanged."""

    path: Path
    expected: str
    actual: str
    code = "unsealed_mismatch"
    template = (
        "{path} has the sha256 {actual}, but {expected} was requested; the file was left unchanged: "
        "remove it to download the right one, or correct the sha256."
    )


class FileUnusable(ModelError):
    """A model's file exists but cannot be loaded."""

    path: Path


class NotAModel(FileUnusable):
    """A model's file is unusable: it contains something else, as its first bytes show."""

    found: str
    code = "not_a_model"
    template = (
        "{path} is {found}, not a model: remove it so that the model is downloaded, or put the model itself in its place."
    )


class FileIncomplete(FileUnusable):
    """A model's file is unusable: it was put there by hand, and is shorter or longer than its own header says."""

    size_bytes: int
    whole_bytes: int | None
    code = "file_incomplete"
    retryable = True
    template = (
        "{path} has {size_bytes} bytes, but {whole}: wait for the copy to finish, or remove the file so that it is downloaded."
    )

    @property
    def whole(self) -> str:
        return "its header cannot be read" if self.whole_bytes is None else f"its header says {self.whole_bytes}"


class VolumeReadOnly(ModelError):
    """The volume cannot be written to. `container` is the error of the container's disk, the fallback."""

    path: Path
    reason: str
    container: VolumeFull | VolumeReadOnly | None = None
    code = "volume_read_only"
    template = "{path} cannot be written ({reason}{nor_container}): mount it writable, or put the model there by hand."

    @property
    def nor_container(self) -> str:
        return _nor_container(self.container)


class VolumeFull(ModelError):
    """There is no room for a model. `free_bytes` is the free space by the file system, without quotas.

    `container` is the error of the container's disk, the fallback.
    """

    path: Path
    needed_bytes: int
    free_bytes: int
    container: VolumeFull | VolumeReadOnly | None = None
    code = "volume_full"
    template = "{path} has no room: {room} (less if there is a quota{nor_container}); enlarge it or remove models."

    @property
    def room(self) -> str:
        return "{} are needed, {} are free".format(*compared_sizes(self.needed_bytes, self.free_bytes))

    @property
    def nor_container(self) -> str:
        return _nor_container(self.container)


def _nor_container(error: VolumeFull | VolumeReadOnly | None) -> str:
    match error:
        case VolumeFull():
            return f"; on this container's disk {error.room}"
        case VolumeReadOnly():
            return f"; nor can this container's disk: {error.reason}"
        case None:
            return ""


class VolumeFailed(ModelError):
    """The file system failed for another reason than a full or read-only disk."""

    path: Path
    reason: str
    code = "volume_failed"
    retryable = True
    template = "{path} failed: {reason}; try again, and check the volume if this repeats."


def volume_error(path: Path, exc: OSError, needed_bytes: int = 0) -> ModelError:
    """Return the model's error that stands for one of the file system under `path`. Reads the free space."""
    if exc.errno in FULL:
        return VolumeFull(path, needed_bytes, free_bytes(path) or 0)
    if exc.errno in READ_ONLY:
        return VolumeReadOnly(path, exc.strerror or str(exc))
    return VolumeFailed(path, exc.strerror or str(exc))


class EnsureCancelled(ModelError):
    """A model's download was stopped: its job was cancelled, or the worker is leaving."""

    name: str
    code = "cancelled"
    retryable = True
    template = "Waiting for '{name}' was stopped; try again: the received bytes are kept."


# --- ComfyUI failed while it had the job ------------------------------------------------------------


class EngineError(WorkerError):
    """ComfyUI failed while it had the job."""

    code = "engine_failed"


class NodeFailed(EngineError):
    """A node raised an exception. `outputs` are those of other nodes until then, as in ComfyUI's history."""

    node_type: str
    node_id: str
    message: str
    outputs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    code = "node_failed"
    opening = _FAILED
    template = "Workflow execution error: Node Type: {node_type}, Node ID: {node_id}, Message: {line}"

    @property
    def line(self) -> str:
        return " ".join(self.message.split())


class OutOfMemory(NodeFailed):
    """A node needed more memory than there is. ComfyUI keeps running, and has unloaded its models."""

    memory: Literal["GPU", "host"] = "GPU"
    code = "out_of_memory"
    template = NodeFailed.template + " ({where} ran out: use a smaller size or batch, or a machine with more of it)"

    @property
    def where(self) -> str:
        return "the GPU's memory" if self.memory == "GPU" else "the container's memory"


class GpuFault(EngineError):
    """The GPU's context is broken. Every later job of that process would fail too, so ComfyUI is replaced."""

    message: str
    code = "gpu_fault"
    retryable = True
    opening = _FAILED
    template = "the GPU failed under ComfyUI ({message}); ComfyUI is being restarted, send the job again."


class PromptFatal(EngineError):
    """The workflow ended ComfyUI's prompt thread. The process still runs, but would never run another workflow."""

    cause: str
    last_lines: Sequence[str] = ()
    code = "prompt_fatal"
    details_field = "last_lines"
    template = (
        "The workflow ended ComfyUI's thread that runs workflows ({cause}); ComfyUI is being restarted. "
        "Send a changed workflow: the same one would do it again."
    )


class RunInterrupted(EngineError):
    """The prompt was interrupted in ComfyUI."""

    code = "interrupted"
    retryable = True
    template = "The workflow was interrupted in ComfyUI before it finished; send the job again."


class RunTimedOut(EngineError):
    """The job took longer than its limit and was interrupted."""

    timeout_s: float
    code = "job_timeout"
    template = (
        "The workflow ran longer than {timeout_s:g} s and was interrupted; raise the request's timeout_s, "
        "or the worker's JOB_TIMEOUT_S, if it needs more."
    )


class RunLost(EngineError):
    """ComfyUI no longer knows the prompt: neither queue nor history has it."""

    prompt_id: str
    code = "run_lost"
    retryable = True
    template = (
        "ComfyUI lost the prompt {prompt_id}: it is neither in its queue nor in its history; ComfyUI is being "
        "restarted, send the job again."
    )


class OutputGone(EngineError):
    """The history names an output file that is not on the disk. `nodes` list it, as far as known."""

    filename: str
    nodes: frozenset[str] = frozenset()
    code = "output_gone"
    retryable = True
    template = "ComfyUI reported the output '{filename}', but the file is not there; send the job again."


class OutputElsewhere(OutputGone):
    """No output can be returned: a node uploads its files, or saves them to its own folder.

    `missing` has a sentence for each file.
    """

    missing: Sequence[str] = ()
    code = "output_elsewhere"
    retryable = False
    details_field = "missing"
    template = (
        "The workflow ran, but its output '{short_name}' is not in ComfyUI's output folder, and there "
        "is nothing else to return; if the node should not store its files elsewhere, add a SaveImage node."
    )

    @property
    def short_name(self) -> str:
        return shortened(self.filename, 200)


class EngineDied(EngineError):
    """The ComfyUI process ended while it had the job."""

    cause: str
    last_lines: Sequence[str] = ()
    code = "engine_died"
    retryable = True
    details_field = "last_lines"
    template = "ComfyUI {cause} while it had the job; it is being restarted, send the job again."


class EngineHung(EngineError):
    """ComfyUI runs, but sent no event and answered no request for too long."""

    silent_s: float
    code = "engine_hung"
    retryable = True
    template = (
        "ComfyUI hung: for {silent_s:.0f} s it sent no event and answered no request; it is being restarted, "
        "send the job again, or raise COMFY_HANG_TIMEOUT_S if a node needs that long."
    )


class EngineStalled(EngineError):
    """ComfyUI answers requests and has the prompt in its queue, but runs nothing."""

    stalled_s: float
    code = "engine_stalled"
    retryable = True
    template = (
        "ComfyUI had the workflow in its queue for {stalled_s:.0f} s and ran nothing, although it answers; "
        "it is being restarted, send the job again."
    )


class EngineUnreachable(EngineError):
    """ComfyUI runs but does not answer."""

    address: str
    reason: str
    code = "engine_unreachable"
    retryable = True
    template = (
        "ComfyUI server ({address}) not reachable after multiple retries: {reason}; "
        "send the job again, and read the worker's log if this repeats."
    )


class EngineAnswerInvalid(EngineError):
    """ComfyUI answered a request with an unexpected status or body."""

    request: str
    status: int
    code = "engine_answer_invalid"
    retryable = True
    template = (
        "ComfyUI answered {request} with status {status} and a body that the worker cannot use; send the job "
        "again, and look in the worker's log for a custom node that fails or changes ComfyUI's server."
    )


# --- the result cannot be delivered -------------------------------------------------------------------


class DeliveryError(WorkerError):
    """The workflow ran, but its result cannot be delivered."""

    code = "delivery_failed"


class ResultTooLarge(DeliveryError):
    """The result as JSON is larger than RunPod accepts, and its files fit nowhere else.

    `volume` says why the network volume cannot be used.
    """

    size_bytes: int
    limit_bytes: int
    volume: str
    files: Sequence[str] = ()
    code = "result_too_large"
    details_field = "files"
    template = (
        "The result takes {taken} as JSON, but only {limit} can be returned (RunPod "
        "accepts 10 MB, or 20 MB through /runsync; RESULT_LIMIT_MB overrides it), and {volume}: set BUCKET_ENDPOINT_URL "
        "and its keys to upload files, attach a network volume, or limit the nodes in the request's 'outputs'."
    )

    @property
    def taken(self) -> str:
        return compared_sizes(self.size_bytes, self.limit_bytes)[0]

    @property
    def limit(self) -> str:
        return compared_sizes(self.size_bytes, self.limit_bytes)[1]


class ResultRefused(DeliveryError):
    """RunPod refused the result, although its measured size was allowed."""

    status: int
    code = "result_refused"
    template = (
        "RunPod refused the job's result with status {status}, probably because it is too large: set "
        "BUCKET_ENDPOINT_URL and its keys to upload files, or lower RESULT_LIMIT_MB if it is set."
    )


class BucketFailed(DeliveryError):
    """An upload failed, and the result fits nowhere else. `advice` is what to check."""

    bucket: str
    host: str
    reason: str
    advice: str
    code = "bucket_failed"
    template = "Uploading to the bucket '{bucket}' at {host} failed: {reason}; {advice}."


class BucketRefused(BucketFailed):
    """The bucket's store refused an upload, and a retry will not help."""

    code = "bucket_refused"


class BucketUnreachable(BucketFailed):
    """The bucket's store did not answer, or was overloaded."""

    code = "bucket_unreachable"
    retryable = True


# --- a defect of the worker -------------------------------------------------------------------------


class InternalError(WorkerError):
    """A defect of the worker itself. The traceback is in its log, not in the result."""

    code = "internal"
    template = _FAILED + "this is a defect of the worker; please report it, with the traceback from its log."
