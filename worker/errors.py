"""Every error a person can meet, as one tree. Pure.

    WorkerError
    ├── SettingsError            the environment is wrong; the worker does not start
    ├── ConvertUsage             `convert` was given what it cannot read
    ├── StartError               the worker cannot start on this machine
    │   ├── NotOnWindows, EngineNotFound
    │   ├── NoGpu
    │   ├── EngineStartFailed, EngineGaveUp
    │   └── NothingToServe
    ├── RequestError             the client's request is wrong; a retry cannot help
    │   ├── InputMissing, InputNotJson, InputTooDeep, WorkflowMissing, WorkflowInvalid, WorkflowEmpty
    │   ├── WorkflowUiFormat, WorkflowNotFinite, NoWorkflowInFile, WorkflowUnknown
    │   ├── UiWorkflowInvalid, UnknownNodes, OverrideInvalid
    │   ├── ImagesInvalid, FieldInvalid, ImageNotBase64
    │   ├── UnsafePath
    │   │   └── LinkAstray       a link on the volume leads out of it, or nowhere
    │   ├── InputUrlRefused, InputNameInvalid, InputTooLarge
    │   ├── ModelsInvalid, SpecInvalid, HostNotAllowed, SuffixNotAllowed, AmbiguousModel
    │   ├── S3ConfigInvalid
    │   └── WorkflowRejected     ComfyUI refused the graph
    │       └── ModelMissing
    ├── ManifestInvalid          the operator's list of models is wrong
    ├── ModelError               a model cannot be made ready
    │   ├── RepoNotFound, RepoGated, RevisionNotFound, FileNotInRepo, TokenRefused, SourceRefused, NotAFile
    │   ├── TokenMalformed, ProxyUnusable, HubOffline
    │   ├── SourceUnreachable, SourceChanged, ContentMismatch
    │   ├── UnsealedMismatch, FileIncomplete
    │   ├── VolumeMissing, VolumeReadOnly, VolumeFull, VolumeFailed
    │   └── EnsureCancelled
    ├── SeedError                a volume cannot be filled ahead of the workers
    │   ├── SeedUsage, WhatUnknown, ModelUnavailable, DatacenterUnknown, S3KeysMissing
    │   └── S3KeysRefused, S3VolumeNotFound, S3VolumeFull, S3FileDiffers, S3Unreachable, S3Failed
    ├── DeliveryError            the workflow ran, but its result cannot be handed over
    │   └── ResultTooLarge, ResultRefused, BucketRefused, BucketUnreachable
    ├── InputError               an input file cannot be had
    │   └── InputNotServed, InputUnreachable, InputTimedOut, InputNotStored
    └── EngineError              ComfyUI failed while it had the job
        ├── NodeFailed, OutOfMemory, GpuFault, RunInterrupted, RunTimedOut, RunLost, OutputGone, OutputElsewhere
        ├── PromptFatal
        └── EngineDied, EngineUnreachable, EngineHung, EngineStalled, EngineAnswerInvalid

Each class has a stable `code`, says whether sending the same job again can help (`retryable`), keeps what it is about as
fields, and builds one sentence from them: what happened and what to do. Clients of worker-comfyui match on the beginnings of
some of these sentences, so those beginnings are part of the interface.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from worker.base.text import compared_sizes, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


# Clients of worker-comfyui know a job whose files were the trouble by this beginning.
_INPUTS_FAILED = "Failed to upload one or more input images"
_FAILED = "Job processing failed"


def shortened(text: str, most: int) -> str:
    """At most `most` characters of a text, its beginning and its end: sentences quote what clients send, of any length."""
    if len(text) <= most:
        return text
    mark = f" ... ({len(text)} characters) ... "
    end = max(0, (most - len(mark)) // 3)
    return text[: most - len(mark) - end] + mark + text[len(text) - end :]


class WorkerError(Exception):
    """The root: whatever is raised on purpose is one of these."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def details(self) -> list[str]:
        """More than the sentence, one finding a line; empty when the sentence says it all."""
        return []


class _InputFailed:
    """A job's file cannot be used. `details` holds what is the matter, as in worker-comfyui."""

    def details(self) -> list[str]:
        return [str(self).removeprefix(f"{_INPUTS_FAILED}: ")]


# --- the worker does not start ------------------------------------------------------------------


@dataclass(eq=False)
class SettingsError(WorkerError):
    """Everything that is wrong with the environment, reported at once."""

    problems: Sequence[str]
    code = "settings_invalid"

    def __str__(self) -> str:
        return "The worker's settings are wrong: " + "; ".join(self.problems)

    def details(self) -> list[str]:
        return list(self.problems)


@dataclass(eq=False)
class CommandUnknown(WorkerError):
    """`python -m worker` was given a word that is none of its commands."""

    command: str
    commands: Sequence[str]
    code = "command_unknown"

    def __str__(self) -> str:
        return f"There is no command {self.command!r}: write one of {', '.join(self.commands)}, or none to start the worker."


@dataclass(eq=False)
class ConvertUsage(WorkerError):
    """The command was given what it cannot read, or there is no ComfyUI to ask. `reason` says which and what to do."""

    reason: str
    code = "convert_usage"

    def __str__(self) -> str:
        return self.reason


class StartError(WorkerError):
    """The worker cannot start on this machine."""

    code = "start_failed"


@dataclass(eq=False)
class NotOnWindows(StartError):
    """A command that needs what Windows does not have."""

    command: str
    code = "not_on_windows"

    def __str__(self) -> str:
        return f"{self.command} needs Linux, macOS or WSL: run it there; on Windows only plan, seed and settings work."


@dataclass(eq=False)
class EngineNotFound(StartError):
    """There is no ComfyUI, or no Python to run it, where the settings say."""

    path: Path
    setting: str
    code = "engine_not_found"

    def __str__(self) -> str:
        return f"{self.path} does not exist: set {self.setting} to where ComfyUI is installed."


@dataclass(eq=False)
class NoGpu(StartError):
    """No GPU device is visible and ComfyUI was not told to run on the CPU."""

    code = "no_gpu"

    def __str__(self) -> str:
        return "No GPU is visible in this container: start it on a GPU machine, or add --cpu to COMFY_ARGS to run on the CPU."


@dataclass(eq=False)
class EngineStartFailed(StartError):
    """ComfyUI ended, or stayed silent, before it answered its first request."""

    cause: str
    last_lines: Sequence[str] = ()
    code = "engine_start_failed"
    retryable = True

    def __str__(self) -> str:
        last = f" (its last line: {self.last_lines[-1]})" if self.last_lines else ""
        return (
            f"ComfyUI did not start: {self.cause}{last}; its output is in the worker's log: "
            "look at COMFY_ARGS and at custom nodes first."
        )

    def details(self) -> list[str]:
        return list(self.last_lines)


@dataclass(eq=False)
class EngineGaveUp(StartError):
    """ComfyUI died again and again without finishing a job between."""

    deaths: int
    cause: str
    last_lines: Sequence[str] = ()
    code = "engine_gave_up"
    retryable = True

    def __str__(self) -> str:
        return (
            f"ComfyUI ended {self.deaths} times in a row without finishing a job, the last time it {self.cause}; "
            "this worker leaves: send the job again, and look into the log if the next worker ends the same way."
        )

    def details(self) -> list[str]:
        return list(self.last_lines)


@dataclass(eq=False)
class VolumeMissing(StartError):
    """There is no network volume and REQUIRE_VOLUME asks for one."""

    path: Path
    code = "volume_missing"

    def __str__(self) -> str:
        return f"{no_volume(self.path)}: attach one to the endpoint, or unset REQUIRE_VOLUME."


def no_volume(path: Path) -> str:
    """The beginning of every sentence that says so."""
    return f"There is no network volume at {path}"


@dataclass(eq=False)
class NothingToServe(StartError):
    """Outside RunPod, with no local API asked for and no test input."""

    code = "nothing_to_serve"

    def __str__(self) -> str:
        return (
            "There is nothing to serve: outside RunPod, start with --rp_serve_api for a local API, "
            "or put a job in ./test_input.json or --test_input."
        )


# --- the request is wrong -----------------------------------------------------------------------


class RequestError(WorkerError):
    """The client's request is wrong; the same request will fail again."""

    code = "request_invalid"


class InputMissing(RequestError):
    """The job has no input at all."""

    code = "input_missing"

    def __str__(self) -> str:
        return "Please provide input: an object with the key 'workflow'."


@dataclass(eq=False)
class InputNotJson(RequestError):
    """The input is a string that is not the JSON of an object."""

    reason: str
    code = "input_not_json"

    def __str__(self) -> str:
        return f"Invalid JSON format in input: {self.reason}; send an object, or a string that holds the JSON of one."


@dataclass(eq=False)
class InputTooDeep(RequestError):
    """The input, or a workflow that a file carries, has lists and objects nested deeper than ComfyUI survives."""

    most: int
    what: str = "The input"
    code = "input_too_deep"

    def __str__(self) -> str:
        return f"{self.what} has lists or objects nested more than {self.most} deep; send it flatter, no workflow needs that."


class WorkflowMissing(RequestError):
    """The input has no workflow."""

    code = "workflow_missing"

    def __str__(self) -> str:
        return "Missing 'workflow' parameter: send the workflow, as ComfyUI saves it or exports it, as input.workflow."


@dataclass(eq=False)
class WorkflowInvalid(RequestError):
    """The workflow is not a graph in ComfyUI's API format, or bad links and cycles leave none of its outputs."""

    reason: str
    code = "workflow_invalid"

    def __str__(self) -> str:
        return f"Workflow validation failed: {self.reason}."


@dataclass(eq=False)
class NoWorkflowInFile(RequestError):
    """The file that `workflow_from` or `workflow` names carries no workflow. `fault` says what is wrong with a text."""

    name: str
    fault: str = ""
    code = "no_workflow_in_file"

    def __str__(self) -> str:
        if self.fault:
            return f"The file '{self.name}' {self.fault}; save or export the workflow again in ComfyUI."
        return (
            f"The file '{self.name}' carries no workflow: use a PNG, WEBP, MP4 or WEBM that ComfyUI saved with its metadata, "
            "or send the workflow itself."
        )


@dataclass(eq=False)
class WorkflowUnknown(RequestError):
    """The request names a workflow that is not on the volume. `taken`: something that is no file has its name."""

    name: str
    there: Sequence[str] = ()
    taken: bool = False
    code = "workflow_unknown"

    def details(self) -> list[str]:
        return list(self.there)

    def __str__(self) -> str:
        name, shown = shortened(self.name, 100), [shortened(name, 60) for name in self.there[:5]]
        more = f" and {len(self.there) - 5} more" if len(self.there) > 5 else ""  # noqa: PLR2004 - as many as are shown
        known = f"there are {', '.join(shown)}{more}" if shown else "there are none"
        path = f"workflows/{name.removesuffix('.json')}.json"
        todo = f"{path} is no file: put one in its place" if self.taken else f"put it there as {path}"
        return f"The volume holds no workflow '{name}', {known}; {todo}."


class WorkflowEmpty(RequestError):
    """The graph has no nodes, or the workflow has none that run."""

    code = "workflow_empty"

    def __str__(self) -> str:
        return (
            "Workflow validation failed: the workflow has no nodes, or all of them are muted or bypassed; "
            "export it with at least one output node such as SaveImage that runs."
        )


class WorkflowUiFormat(RequestError):
    """The graph is as ComfyUI's editor saves it, and nothing is there that could say what its nodes are."""

    code = "workflow_ui_format"

    def __str__(self) -> str:
        return (
            "Workflow validation failed: what ComfyUI's editor saves can be read only with a running ComfyUI; "
            "use the editor's Export (API), or convert it first: python -m worker convert."
        )


@dataclass(eq=False)
class WorkflowNotFinite(RequestError):
    """A number in the workflow is NaN or infinite, which JSON cannot carry."""

    node_id: str
    input_name: str
    code = "workflow_not_finite"

    def __str__(self) -> str:
        return (
            f"Workflow validation failed: input '{self.input_name}' of node {self.node_id} is NaN or infinite; "
            "send a finite number."
        )


# --- the editor's own format ---------------------------------------------------------------------


@dataclass(eq=False)
class UiWorkflowInvalid(RequestError):
    """A workflow in the editor's format that cannot be turned into exactly the graph that the editor would send."""

    reason: str
    code = "ui_workflow_invalid"

    def __str__(self) -> str:
        return (
            f"The workflow, as the editor saved it, cannot be converted: {self.reason}; "
            "if that cannot be changed, send what the editor's Export (API) writes."
        )


@dataclass(eq=False)
class UnknownNodes(RequestError):
    """The workflow needs node classes that ComfyUI does not have. All of them are named, before anything is fetched.

    `nodes` are those of packs, each with its pack. The others are ComfyUI's own: `newer` ones came after `comfyui`, the version
    of this one, at the latest with `wanted` ("" where nobody knows); `gone` ones are no longer in it; `off` ones did not load.
    """

    nodes: Sequence[str]
    newer: Sequence[str] = ()
    gone: Sequence[str] = ()
    off: Sequence[str] = ()
    wanted: str = ""
    comfyui: str = ""
    code = "unknown_nodes"

    def __str__(self) -> str:
        return " ".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        this = f"ComfyUI {self.comfyui}" if self.comfyui else "a ComfyUI of a version that it does not tell"
        if self.newer:
            wanted = f"{self.wanted} or newer" if self.wanted else "a newer one"
            yield (
                f"This image has {this}, the workflow wants {wanted} for {'; '.join(self.newer)}: "
                "take an image with that ComfyUI, or remove the nodes from the workflow."
            )
        if self.nodes:
            yield (
                f"The workflow needs node classes that this ComfyUI does not have: {'; '.join(self.nodes)}; "
                "install their custom nodes in the image or on the volume, or remove the nodes from the workflow."
            )
        if self.gone:
            yield (
                f"This image has {this}, which no longer has {'; '.join(self.gone)}: "
                "replace the nodes by those that came after them, or remove them from the workflow."
            )
        if self.off:
            yield (
                f"This image has {this}, which runs without some of its own node classes: {'; '.join(self.off)}; look whether "
                "COMFY_ARGS switches them off (--disable-api-nodes), or the log's start says that their import failed."
            )

    def details(self) -> list[str]:
        return [*self.newer, *self.nodes, *self.gone, *self.off]


@dataclass(eq=False)
class OverrideInvalid(RequestError):
    """A key of `set` names no input, or more than one; the sentence says which there are."""

    key: str
    reason: str
    code = "override_invalid"

    def __str__(self) -> str:
        return f"In 'set', '{self.key}' {self.reason}."


class ImagesInvalid(RequestError):
    """`images` is no list of files."""

    code = "images_invalid"

    def __str__(self) -> str:
        return "'images' must be a list of objects with 'name' and 'image' keys, both strings; 'url' may stand for 'image'."


@dataclass(eq=False)
class FieldInvalid(RequestError):
    """A field of the request has the wrong shape. `rule` says what it must be."""

    field: str
    rule: str
    code = "field_invalid"

    def __str__(self) -> str:
        return f"'{self.field}' {self.rule}."


@dataclass(eq=False)
class ImageNotBase64(_InputFailed, RequestError):
    """An input file's data is not base64."""

    name: str
    code = "image_not_base64"

    def __str__(self) -> str:
        return (
            f"{_INPUTS_FAILED}: the data of '{self.name}' is not base64; "
            "send the file's bytes as base64, with or without a data: prefix."
        )


@dataclass(eq=False)
class UnsafePath(RequestError):
    """A name would reach a file outside the folder it belongs to. `nameless`: no file in there can be called so at all."""

    what: str
    value: str
    nameless: bool = field(default=False, kw_only=True)
    code = "unsafe_path"

    def __str__(self) -> str:
        if self.nameless:
            return (
                f"{self.what} is {shortened(self.value, 100)!r}, which no file there can be called; "
                "write a relative name without control characters, with one '/' between folders and none at its end."
            )
        return f"{self.what} is '{self.value}', which leaves its folder; use a relative name without '..'."


@dataclass(eq=False)
class LinkAstray(UnsafePath):
    """A link above a model's place (`value`) leads to `target`: out of the volume, or nowhere."""

    target: str
    exists: bool
    code = "link_astray"

    def __str__(self) -> str:
        leads = "is outside the volume" if self.exists else "does not exist"
        return (
            f"{self.what} {self.value} leads to {self.target}, which {leads}: remove it (rm {shlex.quote(self.value)}) and put "
            "the files themselves there, or link it to a folder of the volume by a relative path."
        )


# --- the files that come with a job --------------------------------------------------------------


@dataclass(eq=False)
class InputUrlRefused(_InputFailed, RequestError):
    """An input file's address is one that requests may not have fetched. `where` is safe to show."""

    name: str
    where: str
    reason: str
    code = "input_url_refused"

    def __str__(self) -> str:
        return f"{_INPUTS_FAILED}: '{self.name}' is not fetched from {self.where}: {self.reason}."


@dataclass(eq=False)
class InputNameInvalid(_InputFailed, RequestError):
    """An input file's name is one that no file can have there."""

    name: str
    reason: str
    code = "input_name_invalid"

    def __str__(self) -> str:
        return f"{_INPUTS_FAILED}: the name '{self.name}' {self.reason}; use another name."


@dataclass(eq=False)
class InputTooLarge(_InputFailed, RequestError):
    """An input file has more bytes than the operator allows, after decoding."""

    name: str
    max_bytes: int
    code = "input_too_large"

    def __str__(self) -> str:
        return (
            f"{_INPUTS_FAILED}: '{self.name}' has more than {self.max_bytes / 1e6:g} MB; "
            "send a smaller file, or have the operator raise INPUT_MAX_MB."
        )


class InputError(WorkerError):
    """An input file cannot be had, through no fault that the request's shape shows."""

    code = "input_failed"


@dataclass(eq=False)
class InputNotServed(_InputFailed, InputError):
    """An input file's address answers, but not with the file, and will not the next time. `where` is safe to show."""

    name: str
    where: str
    reason: str
    code = "input_not_served"

    def __str__(self) -> str:
        return f"{_INPUTS_FAILED}: '{self.name}' cannot be had from {self.where}: {self.reason}; send an address that works."


@dataclass(eq=False)
class InputUnreachable(_InputFailed, InputError):
    """An input file's address failed at every attempt, in a way that may pass. `where` is safe to show."""

    name: str
    where: str
    reason: str
    code = "input_unreachable"
    retryable = True

    def __str__(self) -> str:
        return f"{_INPUTS_FAILED}: '{self.name}' could not be fetched from {self.where} ({self.reason}); send the job again."


@dataclass(eq=False)
class InputTimedOut(_InputFailed, InputError):
    """The files of a job did not all arrive in the time they have."""

    names: Sequence[str]
    timeout_s: float
    code = "input_timed_out"
    retryable = True

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return (
            f"{_INPUTS_FAILED}: '{self.names[0]}'{more} did not arrive within {self.timeout_s:g} s, the time for all of a job; "
            "serve them from a faster place, or have the operator raise INPUT_TIMEOUT_S."
        )


@dataclass(eq=False)
class InputNotStored(_InputFailed, InputError):
    """The container's disk would not take an input file."""

    name: str
    reason: str
    code = "input_not_stored"
    retryable = True

    def __str__(self) -> str:
        return (
            f"{_INPUTS_FAILED}: '{self.name}' could not be written to ComfyUI's input folder ({self.reason}); "
            "send the job again, and give the container a larger disk if it stays so."
        )


# --- ComfyUI refused the graph --------------------------------------------------------------------


@dataclass(eq=False)
class WorkflowRejected(RequestError):
    """ComfyUI refused the graph. `problems` holds one sentence for each finding."""

    problems: Sequence[str]
    code = "workflow_rejected"

    def __str__(self) -> str:
        return "Workflow validation failed: " + "; ".join(self.problems)

    def details(self) -> list[str]:
        return list(self.problems)


@dataclass(eq=False)
class ModelMissing(WorkflowRejected):
    """The graph names model files that are not there; nothing else is wrong with it."""

    code = "model_missing"


# --- which model is meant ------------------------------------------------------------------------


class ModelsInvalid(RequestError):
    """`models` of a request is not a list."""

    code = "models_invalid"

    def __str__(self) -> str:
        return (
            "'models' must be a list of objects such as "
            '{"folder": "loras", "name": "x.safetensors", "source": "hf://org/repo/x.safetensors"}.'
        )


@dataclass(eq=False)
class SpecInvalid(RequestError):
    """A model is described wrong. `model` is what it was called, as far as that is known."""

    field: str
    reason: str
    model: str | None = None
    odd: bool = False
    """Whether it is a name that no file can have, rather than one that may not be had."""
    code = "model_spec_invalid"

    def __str__(self) -> str:
        of = f" of the model '{self.model}'" if self.model else " of a model"
        return f"The {self.field}{of} {self.reason}{'' if self.reason.endswith('...') else '.'}"


@dataclass(eq=False)
class HostNotAllowed(RequestError):
    """A request asks for a download from a host that requests may not use."""

    name: str
    host: str
    allowed_hosts: Sequence[str]
    code = "model_host_not_allowed"

    def __str__(self) -> str:
        allowed = f"only {', '.join(self.allowed_hosts)}" if self.allowed_hosts else "no host at all"
        return (
            f"The model '{self.name}' would come from {self.host}, but a request may name {allowed}; "
            "add the host to MODEL_HOSTS, or put the model into the worker's manifest."
        )


@dataclass(eq=False)
class SuffixNotAllowed(RequestError):
    """A request asks for a file that can run code when it is loaded."""

    name: str
    allowed_suffixes: Sequence[str]
    code = "model_suffix_not_allowed"

    def __str__(self) -> str:
        return (
            f"A request may have {', '.join(self.allowed_suffixes)} files fetched, not '{self.name}', which can hold code; "
            "use another file, or put the model into the worker's manifest."
        )


@dataclass(eq=False)
class AmbiguousModel(RequestError):
    """One list has several different files for a name. `candidates` says each as folder/name and address."""

    name: str
    source: str
    candidates: Sequence[str]
    code = "model_ambiguous"

    def __str__(self) -> str:
        return (
            f"The model '{self.name}' could be any of {len(self.candidates)} in {self.source}: {'; '.join(self.candidates)}; "
            "name the right one with its folder in the request's 'models' or in the manifest."
        )

    def details(self) -> list[str]:
        return list(self.candidates)


@dataclass(eq=False)
class ManifestInvalid(WorkerError):
    """Everything that is wrong with a list of models, at once, each with line or entry and field."""

    where: str
    problems: Sequence[str]
    code = "manifest_invalid"

    def __str__(self) -> str:
        return f"The manifest {self.where} is wrong: " + "; ".join(self.problems)

    def details(self) -> list[str]:
        return list(self.problems)


# --- the engine failed --------------------------------------------------------------------------


class EngineError(WorkerError):
    """ComfyUI failed while it had the job."""

    code = "engine_failed"


@dataclass(eq=False)
class NodeFailed(EngineError):
    """A node raised while the workflow ran. `outputs` is what other nodes had put out by then, as in ComfyUI's history."""

    node_type: str
    node_id: str
    message: str
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    code = "node_failed"

    def __str__(self) -> str:
        return f"{_FAILED}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """The failure as worker-comfyui words it, in `details` and beside what others had saved."""
        text = " ".join(self.message.split())
        return f"Workflow execution error: Node Type: {self.node_type}, Node ID: {self.node_id}, Message: {text}"

    def details(self) -> list[str]:
        return [self.sentence]


@dataclass(eq=False)
class OutOfMemory(NodeFailed):
    """A node asked for more memory than there is; ComfyUI lives, and has unloaded its models."""

    memory: Literal["GPU", "host"] = "GPU"
    code = "out_of_memory"

    @property
    def sentence(self) -> str:
        """As for any node, and what to do."""
        where = "the GPU's memory" if self.memory == "GPU" else "the container's memory"
        return f"{super().sentence} ({where} ran out: use a smaller size or batch, or a machine with more of it)"


@dataclass(eq=False)
class GpuFault(EngineError):
    """The GPU's context is broken: every later job of that process would fail as well, so it is replaced."""

    message: str
    code = "gpu_fault"
    retryable = True

    def __str__(self) -> str:
        return f"{_FAILED}: the GPU failed under ComfyUI ({self.message}); ComfyUI is being restarted, send the job again."

    def details(self) -> list[str]:
        return [str(self).removeprefix(f"{_FAILED}: ")]


@dataclass(eq=False)
class RunInterrupted(EngineError):
    """Somebody interrupted the prompt in ComfyUI."""

    code = "interrupted"
    retryable = True

    def __str__(self) -> str:
        return "The workflow was interrupted in ComfyUI before it finished; send the job again."


@dataclass(eq=False)
class RunTimedOut(EngineError):
    """The job took longer than its limit and was interrupted."""

    timeout_s: float
    code = "job_timeout"

    def __str__(self) -> str:
        return (
            f"The workflow ran longer than {self.timeout_s:g} s and was interrupted; raise the request's timeout_s, "
            "or the worker's JOB_TIMEOUT_S, if it needs more."
        )


@dataclass(eq=False)
class EngineHung(EngineError):
    """ComfyUI runs, but for so long it neither sent an event nor answered a request."""

    silent_s: float
    code = "engine_hung"
    retryable = True

    def __str__(self) -> str:
        return (
            f"ComfyUI hung: for {self.silent_s:.0f} s it sent no event and answered no request; it is being restarted, "
            "send the job again, or raise COMFY_HANG_TIMEOUT_S if a node needs so long."
        )


@dataclass(eq=False)
class RunLost(EngineError):
    """ComfyUI no longer knows the prompt: neither queue nor history has it."""

    prompt_id: str
    code = "run_lost"
    retryable = True

    def __str__(self) -> str:
        return (
            f"ComfyUI lost the prompt {self.prompt_id}: it is neither in its queue nor in its history; ComfyUI is being "
            "restarted, send the job again."
        )


@dataclass(eq=False)
class PromptFatal(EngineError):
    """The workflow ended the thread of ComfyUI that runs workflows; the process lives on, and would run nothing any more."""

    cause: str
    last_lines: Sequence[str] = ()
    code = "prompt_fatal"

    def __str__(self) -> str:
        return (
            f"The workflow ended ComfyUI's thread that runs workflows ({self.cause}); ComfyUI is being restarted. "
            "Send a changed workflow: the same one would do it again."
        )

    def details(self) -> list[str]:
        return list(self.last_lines)


@dataclass(eq=False)
class EngineStalled(EngineError):
    """ComfyUI answers requests and has the prompt in its queue, but runs nothing."""

    stalled_s: float
    code = "engine_stalled"
    retryable = True

    def __str__(self) -> str:
        return (
            f"ComfyUI had the workflow in its queue for {self.stalled_s:.0f} s and ran nothing, although it answers; "
            "it is being restarted, send the job again."
        )


@dataclass(eq=False)
class EngineAnswerInvalid(EngineError):
    """ComfyUI answered a request with a status or a body that no ComfyUI should send."""

    request: str
    status: int
    code = "engine_answer_invalid"
    retryable = True

    def __str__(self) -> str:
        return (
            f"ComfyUI answered {self.request} with status {self.status} and nothing that the worker understands; send the job "
            "again, and look in the worker's log for a custom node that fails or changes ComfyUI's server."
        )


@dataclass(eq=False)
class OutputGone(EngineError):
    """The history names an output file that is not on the disk. `nodes` list it, as far as that is known."""

    filename: str
    nodes: frozenset[str] = frozenset()
    code = "output_gone"
    retryable = True

    def __str__(self) -> str:
        return f"ComfyUI reported the output '{self.filename}', but the file is not there; send the job again."


@dataclass(eq=False)
class OutputElsewhere(OutputGone):
    """Every output that a run names is somewhere else: a node that uploads what it makes, or saves it to a folder of its own.

    `missing` has a sentence for each file.
    """

    missing: Sequence[str] = ()
    code = "output_elsewhere"
    retryable = False

    def details(self) -> list[str]:
        return list(self.missing)

    def __str__(self) -> str:
        return (
            f"The workflow ran, but its output '{shortened(self.filename, 200)}' is not in ComfyUI's output folder, and there "
            "is nothing else to return; add a SaveImage where the node is not meant to keep its files elsewhere."
        )


@dataclass(eq=False)
class EngineDied(EngineError):
    """The ComfyUI process ended while it had the job."""

    cause: str
    last_lines: Sequence[str] = ()
    code = "engine_died"
    retryable = True

    def __str__(self) -> str:
        return f"ComfyUI {self.cause} while it had the job; it is being restarted, send the job again."

    def details(self) -> list[str]:
        return list(self.last_lines)


@dataclass(eq=False)
class EngineUnreachable(EngineError):
    """ComfyUI runs but does not answer."""

    address: str
    reason: str
    code = "engine_unreachable"
    retryable = True

    def __str__(self) -> str:
        return (
            f"ComfyUI server ({self.address}) not reachable after multiple retries: {self.reason}; "
            "send the job again, and look into the worker's log if it stays so."
        )


# --- a model cannot be made ready ----------------------------------------------------------------


class ModelError(WorkerError):
    """A model cannot be made ready; other models are not affected."""

    code = "model_failed"


def _hint_token(*, has_token: bool) -> str:
    return "give the account of HF_TOKEN access to it" if has_token else "set HF_TOKEN to a token that may read it"


@dataclass(eq=False)
class RepoNotFound(ModelError):
    """The hub knows no such repository, or hides it: it does not say which."""

    repo: str
    file: str
    has_token: bool
    code = "repo_not_found"

    def __str__(self) -> str:
        return (
            f"The repository '{self.repo}' (for '{self.file}') does not exist or is private: "
            f"correct its name, or {_hint_token(has_token=self.has_token)}."
        )


@dataclass(eq=False)
class RepoGated(ModelError):
    """The repository's terms have to be accepted first."""

    repo: str
    file: str
    has_token: bool
    code = "repo_gated"

    def __str__(self) -> str:
        token = "HF_TOKEN belongs to" if self.has_token else "a token in HF_TOKEN belongs to"
        return (
            f"The repository '{self.repo}' (for '{self.file}') is gated: "
            f"accept its terms on its page with the account that {token}."
        )


@dataclass(eq=False)
class RevisionNotFound(ModelError):
    """The repository has no such branch, tag or commit."""

    repo: str
    file: str
    revision: str
    code = "revision_not_found"

    def __str__(self) -> str:
        return (
            f"The repository '{self.repo}' has no revision '{self.revision}' (for '{self.file}'): correct the part after '@'."
        )


@dataclass(eq=False)
class FileNotInRepo(ModelError):
    """The repository has no such file at that revision."""

    repo: str
    file: str
    revision: str
    code = "file_not_in_repo"

    def __str__(self) -> str:
        return f"The repository '{self.repo}' has no file '{self.file}' at '{self.revision}': correct the path or the revision."


@dataclass(eq=False)
class TokenRefused(ModelError):
    """A model's source wants a token, or refuses the one it got. `variable` is where it would come from."""

    where: str
    status: int
    variable: str | None
    has_token: bool
    code = "token_refused"

    def __str__(self) -> str:
        if self.variable is None:
            return (
                f"{self.where} asks for a login (status {self.status}), and the worker has tokens for huggingface.co and "
                "civitai.com only: use an address without one, or put the file on the volume by hand."
            )
        refused = f"the token in {self.variable}" if self.has_token else "a request without a token"
        return f"{self.where} refused {refused} (status {self.status}): set {self.variable} to one that may read it."


@dataclass(eq=False)
class TokenMalformed(ModelError):
    """A token cannot be one: it holds what no header can carry."""

    variable: str
    code = "token_malformed"

    def __str__(self) -> str:
        return f"{self.variable} holds characters that no token has: copy it again, without blanks, quotes or line ends."


@dataclass(eq=False)
class ProxyUnusable(ModelError):
    """The environment's proxy cannot be used for models."""

    where: str
    reason: str
    code = "proxy_unusable"

    def __str__(self) -> str:
        return (
            f"The proxy {self.where} {self.reason}: set HTTPS_PROXY and HTTP_PROXY to an HTTP proxy "
            "(http://user:password@host:port), or unset them."
        )


@dataclass(eq=False)
class HubOffline(ModelError):
    """HF_HUB_OFFLINE forbids asking the hub."""

    where: str
    code = "hub_offline"

    def __str__(self) -> str:
        return f"{self.where} is not asked for, because HF_HUB_OFFLINE is set: unset it, or put the file on the volume by hand."


@dataclass(eq=False)
class SourceRefused(ModelError):
    """A model's source refused, and will refuse the next time."""

    where: str
    status: int
    code = "source_refused"

    def __str__(self) -> str:
        return f"{self.where} answered with status {self.status}: correct the model's address."


@dataclass(eq=False)
class NotAFile(ModelError):
    """A model's address leads to something that is no file of a stated length."""

    where: str
    found: str
    code = "not_a_file"

    def __str__(self) -> str:
        return f"{self.where} is {self.found}: give the address that the file itself downloads from."


@dataclass(eq=False)
class SourceUnreachable(ModelError):
    """A model's source sent no byte, or hardly any, for too long; the bytes that did come are kept."""

    where: str
    reason: str
    waited_s: float
    came_bytes: int = 0
    code = "source_unreachable"
    retryable = True

    def __str__(self) -> str:
        sent = f"{self.came_bytes} bytes in" if self.came_bytes else "nothing for"
        return f"{self.where} sent {sent} {self.waited_s:.0f} s ({self.reason}); try again: what came is kept."


@dataclass(eq=False)
class SourceChanged(ModelError):
    """The file behind an address became another one while it was fetched."""

    where: str
    code = "source_changed"
    retryable = True

    def __str__(self) -> str:
        return f"{self.where} changed while it was fetched; try again, and pin a revision or a sha256."


@dataclass(eq=False)
class ContentMismatch(ModelError):
    """A model's source gives another file than was promised. `what` is `sha256` or `size`."""

    where: str
    what: str
    expected: str
    actual: str
    code = "content_mismatch"

    def __str__(self) -> str:
        return (
            f"{self.where} has the {self.what} {self.actual}, not {self.expected} as promised; "
            f"nothing was stored: correct the model's {self.what} or its address."
        )


@dataclass(eq=False)
class UnsealedMismatch(ModelError):
    """A file that somebody put there has another sha256 than the one asked for; it was left as it is."""

    path: Path
    expected: str
    actual: str
    code = "unsealed_mismatch"

    def __str__(self) -> str:
        return (
            f"{self.path} has the sha256 {self.actual}, not {self.expected} as asked for; it was left as it is: "
            "remove it to have the right one fetched, or correct the sha256."
        )


@dataclass(eq=False)
class FileUnusable(ModelError):
    """A model's file is there and cannot be loaded."""

    path: Path


@dataclass(eq=False)
class NotAModel(FileUnusable):
    """A file with a model's name holds something else, as its first bytes say."""

    found: str
    code = "not_a_model"

    def __str__(self) -> str:
        return f"{self.path} is {self.found}, and no model: remove it to have it fetched, or put the model itself in its place."


@dataclass(eq=False)
class FileIncomplete(FileUnusable):
    """A file that somebody put there is shorter or longer than its own header says."""

    size_bytes: int
    whole_bytes: int | None
    code = "file_incomplete"
    retryable = True

    def __str__(self) -> str:
        whole = "its header cannot be read" if self.whole_bytes is None else f"its header says {self.whole_bytes}"
        return (
            f"{self.path} has {self.size_bytes} bytes, but {whole}: wait for the copy to finish, or remove the file "
            "to have it fetched."
        )


@dataclass(eq=False)
class VolumeReadOnly(ModelError):
    """The volume refuses to be written. `container` is the error of this container's disk, which could not take its place."""

    path: Path
    reason: str
    container: VolumeFull | VolumeReadOnly | None = None
    code = "volume_read_only"

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be written ({self.reason}{_nor_container(self.container)}): "
            "mount it writable, or put the model there by hand."
        )


@dataclass(eq=False)
class VolumeFull(ModelError):
    """There is no room for a model. `free_bytes` is what the file system says, which knows nothing of a quota.

    `container` is the error of this container's disk, which could not take the volume's place.
    """

    path: Path
    needed_bytes: int
    free_bytes: int
    container: VolumeFull | VolumeReadOnly | None = None
    code = "volume_full"

    def __str__(self) -> str:
        needed, free = compared_sizes(self.needed_bytes, self.free_bytes)
        return (
            f"{self.path} has no room: {needed} are needed, {free} are free "
            f"(less if there is a quota{_nor_container(self.container)}); enlarge it or remove models."
        )


def _nor_container(error: VolumeFull | VolumeReadOnly | None) -> str:
    match error:
        case VolumeFull():
            needed, free = compared_sizes(error.needed_bytes, error.free_bytes)
            return f"; on this container's disk {needed} are needed, {free} are free"
        case VolumeReadOnly():
            return f"; nor can this container's disk: {error.reason}"
        case None:
            return ""


@dataclass(eq=False)
class VolumeFailed(ModelError):
    """The file system failed in a way that is neither full nor read-only."""

    path: Path
    reason: str
    code = "volume_failed"
    retryable = True

    def __str__(self) -> str:
        return f"{self.path} failed: {self.reason}; try again, and look at the volume if it stays so."


@dataclass(eq=False)
class EnsureCancelled(ModelError):
    """A model is no longer wanted before it was whole: its job was cancelled, or the worker leaves."""

    name: str
    code = "cancelled"
    retryable = True

    def __str__(self) -> str:
        return f"Getting '{self.name}' was stopped; try again: what came is kept."


# --- a volume cannot be filled ahead of the workers ---------------------------------------------


class SeedError(WorkerError):
    """Filling a volume ahead of the workers failed."""

    code = "seed_failed"


@dataclass(eq=False)
class SeedUsage(SeedError):
    """The command line makes no sense as it is."""

    reason: str
    code = "usage"

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class WhatUnknown(SeedError):
    """Something to seed that is no file, no address and no template's name."""

    what: str
    near: Sequence[str] = ()
    saved: Sequence[str] = ()
    code = "what_unknown"

    def __str__(self) -> str:
        near = f"templates like it are {', '.join(self.near)}" if self.near else "--help says what can be named"
        if self.saved:
            near += f", and the volume's workflows are {', '.join(self.saved[:20])}"
        return (
            f"'{self.what}' is no manifest or workflow on this machine or the volume, no hf:// or https:// address, "
            f"and no official template; {near}."
        )


@dataclass(eq=False)
class ModelUnavailable(SeedError):
    """A model that is wanted cannot be had, which was known before anything was sent. `cause` is that error's code."""

    reason: str
    cause: str | None = None
    code = "model_unavailable"

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class DatacenterUnknown(SeedError):
    """RunPod has no S3-compatible API there."""

    name: str
    known: Sequence[str]
    code = "datacenter_unknown"

    def __str__(self) -> str:
        return f"There is no S3 API in the data centre '{self.name}'; it is one of {', '.join(self.known)}."


@dataclass(eq=False)
class S3KeysMissing(SeedError):
    """The keys of RunPod's S3 API are not set."""

    variables: Sequence[str]
    code = "s3_keys_missing"

    def __str__(self) -> str:
        return (
            f"Set {' and '.join(self.variables)} to an S3 API key of RunPod (console: Settings > S3 API Keys; "
            "it begins with user_ and its secret with rps_, and is not the RunPod API key)."
        )


@dataclass(eq=False)
class S3KeysRefused(SeedError):
    """The keys are wrong, or not allowed to use this volume."""

    volume: str
    status: int
    code = "s3_keys_refused"

    def __str__(self) -> str:
        return (
            f"The keys were refused for the volume {self.volume} (status {self.status}): check RUNPOD_S3_ACCESS_KEY_ID, "
            "RUNPOD_S3_SECRET_ACCESS_KEY and that the volume is of the same account."
        )


@dataclass(eq=False)
class S3VolumeNotFound(SeedError):
    """No volume of this id is in this data centre."""

    volume: str
    place: str
    code = "s3_volume_not_found"

    def __str__(self) -> str:
        return f"There is no volume '{self.volume}' in {self.place}: copy its id and data centre from RunPod's console."


@dataclass(eq=False)
class S3VolumeFull(SeedError):
    """The volume has no room (status 507); what was sent of the file was taken back."""

    volume: str
    needed_bytes: int
    code = "s3_volume_full"

    def __str__(self) -> str:
        return (
            f"The volume {self.volume} has no room for {size_text(self.needed_bytes)} more: enlarge it or remove models "
            "(--list, --prune), then run this again."
        )


@dataclass(eq=False)
class S3FileDiffers(SeedError):
    """A file that somebody put on the volume is another one than is wanted; it was left as it is."""

    key: str
    what: str
    expected: str
    actual: str
    code = "s3_file_differs"

    def __str__(self) -> str:
        return (
            f"{self.key} on the volume has the {self.what} {self.actual}, not {self.expected}; it was left as it is: "
            "remove it to have the right one sent."
        )


@dataclass(eq=False)
class S3Unreachable(SeedError):
    """The volume's S3 API gave no good answer for too long."""

    volume: str
    reason: str
    code = "s3_unreachable"
    retryable = True

    def __str__(self) -> str:
        return f"The volume {self.volume} could not be reached ({self.reason}); nothing is lost, run this again to go on."


@dataclass(eq=False)
class S3Failed(SeedError):
    """The volume's S3 API refused something in a way that has no name here."""

    volume: str
    operation: str
    reason: str
    code = "s3_failed"
    retryable = True

    def __str__(self) -> str:
        return f"{self.operation} failed on the volume {self.volume}: {self.reason}; run this again to go on."


# --- the result cannot be handed over -----------------------------------------------------------


@dataclass(eq=False)
class S3ConfigInvalid(RequestError):
    """The job's own `s3Config` cannot be used."""

    reason: str
    code = "s3_config_invalid"

    def __str__(self) -> str:
        return (
            f"The job's s3Config {self.reason}; send accessId, accessSecret, bucketName and endpointUrl, or leave s3Config out "
            "to use the worker's own bucket."
        )


class DeliveryError(WorkerError):
    """The workflow ran, but its result cannot be handed over."""

    code = "delivery_failed"


@dataclass(eq=False)
class ResultTooLarge(DeliveryError):
    """The result is larger as JSON than RunPod carries, and there is nowhere else to put its files.

    `volume` says why the network volume does not take them.
    """

    size_bytes: int
    limit_bytes: int
    volume: str
    files: Sequence[str] = ()
    code = "result_too_large"

    def __str__(self) -> str:
        taken, limit = compared_sizes(self.size_bytes, self.limit_bytes)
        return (
            f"The result takes {taken} as JSON, but only {limit} can be returned (RunPod "
            f"carries 10 MB, through /runsync 20 MB; RESULT_LIMIT_MB overrides it), and {self.volume}: set BUCKET_ENDPOINT_URL "
            "and its keys to have files uploaded, attach a network volume, or limit the nodes in the request's 'outputs'."
        )

    def details(self) -> list[str]:
        return list(self.files)


@dataclass(eq=False)
class ResultRefused(DeliveryError):
    """RunPod did not take the result, whatever was measured before."""

    status: int
    code = "result_refused"

    def __str__(self) -> str:
        return (
            f"RunPod refused the job's result with status {self.status}, as it does with one that is too large: set "
            "BUCKET_ENDPOINT_URL and its keys to have files uploaded, or a smaller RESULT_LIMIT_MB if it is set."
        )


@dataclass(eq=False)
class BucketFailed(DeliveryError):
    """An upload failed, and the result does not fit anywhere else; `advice` is what to check."""

    bucket: str
    host: str
    reason: str
    advice: str
    code = "bucket_failed"

    def __str__(self) -> str:
        return f"Uploading to the bucket '{self.bucket}' at {self.host} failed: {self.reason}; {self.advice}."


class BucketRefused(BucketFailed):
    """The bucket's store refused an upload, and will refuse the next time."""

    code = "bucket_refused"


class BucketUnreachable(BucketFailed):
    """The bucket's store did not answer, or had too much to do."""

    code = "bucket_unreachable"
    retryable = True


class InternalError(WorkerError):
    """A defect of the worker itself; the traceback is in its log, not in the result."""

    code = "internal"

    def __str__(self) -> str:
        return f"{_FAILED}: this is a defect of the worker; please report it, with the traceback from its log."
