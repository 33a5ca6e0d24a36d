"""Every error a person can meet, as one tree. Pure.

    WorkerError
    ├── SettingsError            the environment is wrong; the worker does not start
    ├── StartError               the worker cannot start on this machine
    │   ├── EngineNotFound
    │   ├── NoGpu
    │   ├── EngineStartFailed
    │   └── NothingToServe
    ├── RequestError             the client's request is wrong; a retry cannot help
    │   ├── InputMissing, InputNotJson, WorkflowMissing, WorkflowInvalid, WorkflowEmpty
    │   ├── WorkflowUiFormat, WorkflowNotFinite
    │   ├── ImagesInvalid, ImageNotBase64, UnsafePath
    │   ├── ModelsInvalid, SpecInvalid, HostNotAllowed, SuffixNotAllowed, AmbiguousModel
    │   └── WorkflowRejected     ComfyUI refused the graph
    │       └── ModelMissing
    ├── ManifestInvalid          the operator's list of models is wrong
    ├── ModelError               a model cannot be made ready
    │   ├── RepoNotFound, RepoGated, RevisionNotFound, FileNotInRepo, TokenRefused, SourceRefused, NotAFile
    │   ├── SourceUnreachable, SourceChanged, ContentMismatch
    │   ├── UnsealedMismatch, FileIncomplete
    │   ├── VolumeMissing, VolumeReadOnly, VolumeFull, VolumeFailed
    │   └── EnsureCancelled
    └── EngineError              ComfyUI failed while it had the job
        ├── NodeFailed, GpuFault, RunInterrupted, RunTimedOut, RunLost, OutputGone
        └── EngineDied, EngineUnreachable

Each class has a stable `code`, says whether sending the same job again can help (`retryable`), keeps what it is about as
fields, and builds one sentence from them: what happened and what to do. Clients of worker-comfyui match on the beginnings of
some of these sentences, so those beginnings are part of the interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class WorkerError(Exception):
    """The root: whatever is raised on purpose is one of these."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def details(self) -> list[str]:
        """More than the sentence, one finding a line; empty when the sentence says it all."""
        return []


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


class StartError(WorkerError):
    """The worker cannot start on this machine."""

    code = "start_failed"


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

    def __str__(self) -> str:
        last = f", its last words: {self.last_lines[-1]}" if self.last_lines else ""
        return f"ComfyUI did not start: {self.cause}{last}"

    def details(self) -> list[str]:
        return list(self.last_lines)


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
        return f"Invalid JSON format in input: {self.reason}."


class WorkflowMissing(RequestError):
    """The input has no workflow."""

    code = "workflow_missing"

    def __str__(self) -> str:
        return "Missing 'workflow' parameter: send the workflow in ComfyUI's API format as input.workflow."


@dataclass(eq=False)
class WorkflowInvalid(RequestError):
    """The workflow is not a graph in ComfyUI's API format."""

    reason: str
    code = "workflow_invalid"

    def __str__(self) -> str:
        return f"Workflow validation failed: {self.reason}."


class WorkflowEmpty(RequestError):
    """The graph has no nodes."""

    code = "workflow_empty"

    def __str__(self) -> str:
        return (
            "Workflow validation failed: the workflow has no nodes; export it with at least one output node such as SaveImage."
        )


class WorkflowUiFormat(RequestError):
    """The graph is as ComfyUI's editor saves it, not as its API takes it."""

    code = "workflow_ui_format"

    def __str__(self) -> str:
        return (
            "Workflow validation failed: this is the editor's format (it has 'nodes' and 'links'); "
            "in ComfyUI choose Workflow > Export (API) and send that file."
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


class ImagesInvalid(RequestError):
    """`images` does not have the shape that clients agreed on."""

    code = "images_invalid"

    def __str__(self) -> str:
        return "'images' must be a list of objects with 'name' and 'image' keys, both strings."


@dataclass(eq=False)
class ImageNotBase64(RequestError):
    """An input file's data is not base64."""

    name: str
    code = "image_not_base64"

    def __str__(self) -> str:
        return (
            f"Failed to upload one or more input images: the data of '{self.name}' is not base64; "
            "send the file's bytes as base64, with or without a data: prefix."
        )


@dataclass(eq=False)
class UnsafePath(RequestError):
    """A name would reach a file outside the folder it belongs to."""

    what: str
    value: str
    code = "unsafe_path"

    def __str__(self) -> str:
        return f"{self.what} is '{self.value}', which leaves its folder; use a relative name without '..'."


@dataclass(eq=False)
class WorkflowRejected(RequestError):
    """ComfyUI refused the graph; `problems` holds one sentence for each finding."""

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
        return "'models' must be a list of objects with 'folder', 'name' and 'source' keys, such as hf://org/repo/path."


@dataclass(eq=False)
class SpecInvalid(RequestError):
    """A model is described wrong; `model` is what it was called, as far as that is known."""

    field: str
    reason: str
    model: str | None = None
    code = "model_spec_invalid"

    def __str__(self) -> str:
        of = f" of the model '{self.model}'" if self.model else " of a model"
        return f"The {self.field}{of} {self.reason}."


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
    """One source has several different files for a name; `candidates` says each as folder/name and address."""

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
    """A node raised while the workflow ran."""

    node_type: str
    node_id: str
    message: str
    code = "node_failed"

    def __str__(self) -> str:
        text = " ".join(self.message.split())
        return f"Workflow execution error: Node Type: {self.node_type}, Node ID: {self.node_id}, Message: {text}"


@dataclass(eq=False)
class GpuFault(EngineError):
    """The GPU's context is broken: every later job of that process would fail as well, so it is replaced."""

    message: str
    code = "gpu_fault"
    retryable = True

    def __str__(self) -> str:
        return f"The GPU failed under ComfyUI ({self.message}); it is being restarted, send the job again."


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
        return f"The workflow ran longer than {self.timeout_s:g} s and was interrupted; raise JOB_TIMEOUT_S if it needs more."


@dataclass(eq=False)
class RunLost(EngineError):
    """ComfyUI no longer knows the prompt: neither queue nor history has it."""

    prompt_id: str
    code = "run_lost"
    retryable = True

    def __str__(self) -> str:
        return f"ComfyUI lost the prompt {self.prompt_id}: it is neither queued nor in the history; send the job again."


@dataclass(eq=False)
class OutputGone(EngineError):
    """The history names an output file that is not on the disk."""

    filename: str
    code = "output_gone"
    retryable = True

    def __str__(self) -> str:
        return f"ComfyUI reported the output '{self.filename}', but the file is not there; send the job again."


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
        return f"ComfyUI server ({self.address}) not reachable after multiple retries: {self.reason}."


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
        return f"The repository '{self.repo}' has no file '{self.file}' at '{self.revision}': correct its path."


@dataclass(eq=False)
class TokenRefused(ModelError):
    """The source wants a token, or refuses the one it got; `variable` is where it would come from."""

    where: str
    status: int
    variable: str | None
    has_token: bool
    code = "token_refused"

    def __str__(self) -> str:
        if self.variable is None:
            return f"{self.where} asks for a login (status {self.status}), which only huggingface.co and civitai.com are given."
        advice = f"renew {self.variable}" if self.has_token else f"set {self.variable}"
        return f"{self.where} refused access (status {self.status}): {advice}, to a token that may read it."


@dataclass(eq=False)
class SourceRefused(ModelError):
    """The source answered, and will answer the same again."""

    where: str
    status: int
    code = "source_refused"

    def __str__(self) -> str:
        return f"{self.where} answered with status {self.status}: correct the address."


@dataclass(eq=False)
class NotAFile(ModelError):
    """The address leads to something that is no file of a stated length."""

    where: str
    found: str
    code = "not_a_file"

    def __str__(self) -> str:
        return f"{self.where} is {self.found}: give the address that the file itself downloads from."


@dataclass(eq=False)
class SourceUnreachable(ModelError):
    """No byte came for as long as was waited; the bytes that did come are kept."""

    where: str
    reason: str
    waited_s: float
    code = "source_unreachable"
    retryable = True

    def __str__(self) -> str:
        return f"{self.where} sent nothing for {self.waited_s:.0f} s ({self.reason}); the next attempt goes on from here."


@dataclass(eq=False)
class SourceChanged(ModelError):
    """The file behind an address became another one while it was fetched."""

    where: str
    code = "source_changed"
    retryable = True

    def __str__(self) -> str:
        return f"{self.where} changed while it was fetched; send the job again, and pin a revision or a sha256."


@dataclass(eq=False)
class ContentMismatch(ModelError):
    """What a source gives is not what was promised; `what` is `sha256` or `size`."""

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
class FileIncomplete(ModelError):
    """A file that somebody put there is shorter or longer than its own header says."""

    path: Path
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
class VolumeMissing(ModelError):
    """There is no network volume and REQUIRE_VOLUME asks for one."""

    path: Path
    code = "volume_missing"

    def __str__(self) -> str:
        return f"There is no network volume at {self.path}: attach one to the endpoint, or unset REQUIRE_VOLUME."


@dataclass(eq=False)
class VolumeReadOnly(ModelError):
    """The volume refuses to be written."""

    path: Path
    reason: str
    code = "volume_read_only"

    def __str__(self) -> str:
        return f"{self.path} cannot be written ({self.reason}): mount it writable, or put the model there by hand."


@dataclass(eq=False)
class VolumeFull(ModelError):
    """No room; `free_bytes` is what the file system says, which knows nothing of a quota."""

    path: Path
    needed_bytes: int
    free_bytes: int
    code = "volume_full"

    def __str__(self) -> str:
        return (
            f"{self.path} has no room: {self.needed_bytes} bytes are needed, {self.free_bytes} are free "
            "(less if there is a quota); enlarge it or remove models."
        )


@dataclass(eq=False)
class VolumeFailed(ModelError):
    """The file system failed in a way that is neither full nor read-only."""

    path: Path
    reason: str
    code = "volume_failed"
    retryable = True

    def __str__(self) -> str:
        return f"{self.path} failed: {self.reason}; send the job again, and look at the volume if it stays so."


@dataclass(eq=False)
class EnsureCancelled(ModelError):
    """Nobody wants the model any longer; the bytes that came are kept."""

    name: str
    code = "cancelled"
    retryable = True

    def __str__(self) -> str:
        return f"Getting '{self.name}' was cancelled; the next attempt goes on from here."


class InternalError(WorkerError):
    """A defect of the worker itself; the traceback is in its log, not in the result."""

    code = "internal"

    def __str__(self) -> str:
        return "Job processing failed: the worker met an error of its own; its log has the traceback."
