# ruff: noqa: INP001 - run as a module from the root; scripts is a folder of programs, no package
"""Write docs/errors.md: every error a person can meet, from the classes themselves. Touches that one file.

    python -m scripts.make_errors            # writes it
    python -m scripts.make_errors --print    # prints it instead
    python -m scripts.make_errors --check    # writes nothing, exits with 1 when the file differs

When it happens is the first sentence of a class's docstring; the sentence is the class's own, of an instance with the example
values below. A class that has a field without an example, or a place in no section, is refused by its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

PROJECT: Final = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))  # in a checkout the packages lie beside this folder

from client import errors as client  # noqa: E402 - found through the path above
from worker import doctor, errors  # noqa: E402 - as above
from worker.plan import plan_command as plan  # noqa: E402 - as above
from worker.seed import errors as seed_errors  # noqa: E402 - as above
from worker.seed import seed_command as seeder  # noqa: E402 - as above
from worker.up import errors as up_errors  # noqa: E402 - as above

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

ErrorClass: TypeAlias = type[errors.WorkerError] | type[client.ClientError]

PAGE: Final = PROJECT / "docs" / "errors.md"
MODULES: Final = (errors, seed_errors, up_errors, client)
"""Where errors are defined."""


@dataclass(frozen=True, slots=True)
class Section:
    """The errors below one class, under a heading."""

    title: str
    base: ErrorClass
    about: str = ""


SECTIONS: Final = (
    Section(
        "The request is wrong",
        errors.RequestError,
        "The same request will fail again: correct it. The workflow did not run.",
    ),
    Section(
        "A file that comes with a job",
        errors.InputError,
        "The request has the right form, but one of its `images` or `files` cannot be fetched or written.",
    ),
    Section(
        "A model is unavailable",
        errors.ModelError,
        "The volume, a source or a token is the cause. Jobs whose models are available still run. "
        "`python -m worker plan WORKFLOW` finds most of these before a job does.",
    ),
    Section("A list of models is wrong", errors.ManifestInvalid, "`models.toml` on the volume, `MODELS_MANIFEST` or `MODELS`."),
    Section(
        "ComfyUI failed while it had the job",
        errors.EngineError,
        "ComfyUI accepted the workflow and did not finish it. A ComfyUI that died or hangs is restarted automatically.",
    ),
    Section(
        "The result cannot be delivered",
        errors.DeliveryError,
        "The workflow ran, but its outputs cannot be returned. If a part can be, it is, with these sentences in `errors`.",
    ),
    Section(
        "The worker does not start",
        errors.StartError,
        "Or it exits, because ComfyUI does not restart. The log has one line, and the worker exits with status 1. RunPod "
        "starts another.",
    ),
    Section("The settings are wrong", errors.SettingsError, "The worker and its commands exit before they do anything."),
    Section("A defect", errors.InternalError, "An unexpected failure of the worker."),
    Section("`python -m worker COMMAND`", errors.CommandUnknown, "A command line that the worker does not know."),
    Section("`python -m worker convert`", errors.ConvertUsage, "The command that prints a graph."),
    Section(
        "`python -m worker seed`, `scripts/seed_volume.py`",
        seed_errors.SeedError,
        "It also reports the errors of models and lists above. With `--json` each has its `code` and `text`.",
    ),
    Section(
        "`python -m worker up`, `scripts/up.py`",
        up_errors.UpError,
        "It also reports the errors of models, of `seed` and of `run_workflow.py`. With `--json` each has its `code` and "
        "`text`. The same command resumes after each of them.",
    ),
    Section(
        "`scripts/run_workflow.py`: the command line",
        client.UsageError,
        "The client prints the sentence followed by the code, and exits with the status below.",
    ),
    Section("`scripts/run_workflow.py`: the key", client.KeyMissing),
    Section("`scripts/run_workflow.py`: a defect", client.ClientDefect),
    Section("`scripts/run_workflow.py`: the job", client.JobError),
    Section("`scripts/run_workflow.py`: the endpoint or worker", client.ServiceError),
)

NEVER_RAISED: Final = frozenset(
    {
        *(errors.WorkerError, errors.StartError, errors.RequestError, errors.InputError, errors.ModelError, errors.EngineError),
        *(errors.DeliveryError, errors.BucketFailed, errors.FileUnusable, seed_errors.SeedError, up_errors.UpError),
        *(client.ClientError, client.JobError, client.ServiceError),
    }
)
"""What the others are kinds of; a test looks that nobody raises one."""

# By field, or by Class.field where the field means something else in that class.
EXAMPLES: Final[Mapping[str, Any]] = {
    "actual": "5f1d8c2e...",
    "address": "127.0.0.1:8188",
    "allowed_hosts": ("huggingface.co", "civitai.com"),
    "allowed_suffixes": (".safetensors", ".sft", ".gguf"),
    "bucket": "results",
    "BucketRefused.advice": "check BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY",
    "BucketRefused.reason": "SignatureDoesNotMatch, The request signature we calculated does not match",
    "BucketUnreachable.advice": "send the job again, and check the store if this repeats",
    "BucketUnreachable.reason": "SlowDown, Please reduce your request rate",
    "source": "models.toml",
    "AnswerUnreadable.found": "'Welcome to nginx!'",
    "command": "plann",
    "commands": ("convert", "doctor", "plan", "seed", "settings"),
    "candidates": (
        "vae/ae.safetensors from hf://org/one/ae.safetensors",
        "vae/ae.safetensors from hf://org/two/ae.safetensors",
    ),
    "container": None,
    "ContentMismatch.what": "sha256",
    "ConvertUsage.reason": "flux.json cannot be read (No such file or directory).",
    "DatacenterUnknown.name": "EU-XX-1",
    "deaths": 3,
    "EngineDied.cause": "was killed by SIGKILL (exit code -9, as the kernel does when memory runs out)",
    "EngineGaveUp.cause": "exited with code 1",
    "EngineStartFailed.cause": "it exited with code 1",
    "EngineUnreachable.reason": "no answer within 30 s on POST /prompt",
    "EngineAnswerInvalid.request": "POST /prompt",
    "EngineAnswerInvalid.status": 500,
    "expected": "9a41c07b...",
    "field": "timeout_s",
    "file": "flux1-dev.safetensors",
    "WorkflowUnknown.name": "portrait",
    "WorkflowUnknown.there": ("flux", "upscale/4x"),
    "WorkflowUnknown.taken": False,
    "NoWorkflowInFile.fault": "",
    "UnsafePath.nameless": False,
    "LinkAstray.nameless": False,
    "saved": ("flux", "upscale/4x"),
    "filename": "ComfyUI_00001_.png",
    "OutputElsewhere.filename": "remote/Image_00001_.png",
    "OutputElsewhere.missing": ("Node 5 lists the file 'remote/Image_00001_.png', which is not in ComfyUI's output folder.",),
    "OutputElsewhere.nodes": frozenset({"5"}),
    "OutputGone.nodes": frozenset({"9"}),
    "files": ("ComfyUI_00001_.mp4 of node 9: 41200000 bytes",),
    "FileUnreadable.path": "flux.json",
    "FileUnreadable.reason": "cannot be read (No such file or directory)",
    "free_bytes": 4_100_000_000,
    "GpuFault.message": "CUDA error: an illegal memory access was encountered",
    "has_token": True,
    "host": "s3.example.com",
    "HostNotAllowed.host": "example.com",
    "input_name": "cfg",
    "InputNameInvalid.reason": "is no name of a file",
    "InputNotJson.reason": "Expecting value: line 1 column 1 (char 0)",
    "InputNotServed.reason": "it answered with status 404",
    "InputNotStored.reason": "No space left on device",
    "InputUnreachable.reason": "the connection was cut",
    "InputTooDeep.what": "The input",
    "InputUrlRefused.reason": "it leads into a private or reserved network, which requests must not reach; "
    "the operator can allow a host with INPUT_URL_ALLOW_PRIVATE",
    "job_id": "5d0c1c1e-e1",
    "JobFailed.details": (),
    "JobFailed.may_pass": False,
    "JobFailed.sentence": "'timeout_s' must be a number of seconds, 0 or more; 0 sets no limit of its own.",
    "JobFailed.worker_code": "field_invalid",
    "key": "models/loras/x.safetensors",
    "kind": "ValueError",
    "known": ("EU-CZ-1", "EU-RO-1", "US-KS-2"),
    "last_lines": ("ModuleNotFoundError: No module named 'torchvision'",),
    "limit_bytes": 9_800_000,
    "ManifestInvalid.problems": ("line 4: folder is missing", "line 9: sourc is no field of a model; write source"),
    "ManifestInvalid.where": "/runpod-volume/models.toml",
    "max_bytes": 512_000_000,
    "PromptFatal.cause": "RecursionError: maximum recursion depth exceeded",
    "stalled_s": 12.0,
    "memory": "GPU",
    "most": 100,
    "message": "Allocation on device",
    "model": "x.safetensors",
    "ModelMissing.problems": (
        """node 4 (LoraLoader) needs the model 'fox.safetensors' in models/loras, which is not there and in no manifest; \
there is 'fox_v2.safetensors'; correct the name, put the file on the volume, or name its source in 'models' or models.toml""",
    ),
    "ModelUnavailable.cause": "repo_gated",
    "ModelUnavailable.reason": "The repository 'org/repo' (for 'flux1-dev.safetensors') is gated: accept its terms on its page "
    "with the account that HF_TOKEN belongs to.",
    "name": "clip.mp4",
    "names": ("clip.mp4", "mask.png"),
    "near": ("flux_dev_checkpoint_example", "flux_schnell"),
    "needed_bytes": 23_802_932_552,
    "node_id": "3",
    "node_type": "KSampler",
    "outputs": {},
    "nodes": ("UltimateSDUpscale (comfyui_ultimatesdupscale)", "FaceDetailer (comfyui-impact-pack)"),
    "NotAFile.found": "a web page",
    "operation": "UploadPart of models/checkpoints/flux1-dev.safetensors",
    "option": "--set",
    "OutputNotSaved.reason": "pictures/clip.mp4 cannot be written (No space left on device)",
    "OverrideInvalid.key": "6.txt",
    "OverrideInvalid.reason": "finds no input 'txt' at node 6 (CLIPTextEncode), which has text, clip",
    "path": Path("/runpod-volume/models/checkpoints/flux1-dev.safetensors"),
    "EngineNotFound.path": Path("/comfyui/main.py"),
    "VolumeFull.path": Path("/runpod-volume"),
    "VolumeMissing.path": Path("/runpod-volume"),
    "ClientDefect.place": "client/save.py, line 93",
    "place": "EU-RO-1",
    "prompt_id": "8c3f1f2a",
    "repo": "org/repo",
    "RequestRefused.reason": "payload too large",
    "ResultTooLarge.size_bytes": 54_960_000,
    "ResultTooLarge.volume": "there is no network volume at /runpod-volume",
    "revision": "v2",
    "rule": "must be a number of seconds, 0 or more; 0 sets no limit of its own",
    "S3ConfigInvalid.reason": "lacks accessSecret",
    "S3Failed.reason": "the server has another MD5 than was sent",
    "S3FileDiffers.actual": "11901466276",
    "S3FileDiffers.expected": "23802932552",
    "S3FileDiffers.what": "size",
    "S3Unreachable.reason": "PutObject: status 502",
    "SeedUsage.reason": "Give --volume or --s3, not both.",
    "ServiceFailed.reason": "Bad Gateway",
    "SetInvalid.reason": "takes NODE.INPUT=VALUE, such as 6.text=\"a fox\", not '6.text'",
    "setting": "COMFYUI_DIR",
    "SdkUnknown.version": "1.14.0",
    "SdkUnknown.parts": ("runpod.serverless.modules.rp_scale.JobScaler.handle_job",),
    "SettingsError.problems": ("COMFYUI_PORT must be a whole number, not 'x'", "REFRESH_WORKER must be true or false, not 'y'"),
    "NotAModel.found": "a web page",
    "silent_s": 180.0,
    "size_bytes": 11_901_466_276,
    "RequestRefused.size_bytes": 24_500_000,
    "SourceUnreachable.reason": "status 503",
    "SpecInvalid.field": "source",
    "SpecInvalid.reason": "is no address; write hf://org/repo/path or https://...",
    "status": 403,
    "RequestRefused.status": 400,
    "ServiceFailed.status": 502,
    "SourceRefused.status": 410,
    "stopped": "it was cancelled",
    "SuffixNotAllowed.name": "x.ckpt",
    "AmbiguousModel.name": "ae.safetensors",
    "EnsureCancelled.name": "flux1-dev.safetensors",
    "HostNotAllowed.name": "x.safetensors",
    "InputNameInvalid.name": "clips/",
    "NoWorkflowInFile.name": "photo.png",
    "timeout_s": 120.0,
    "RunTimedOut.timeout_s": 300.0,
    "UiWorkflowInvalid.reason": "node 12 is a group node; convert it to nodes or to a subgraph in the editor",
    "Unreachable.advice": "check the address and the network",
    "Unreachable.reason": "its name cannot be looked up",
    "Unreachable.was_sent": False,
    "SpecInvalid.odd": False,
    "NotOnWindows.command": "doctor",
    "ProxyUnusable.where": "http://proxy.example:3128",
    "ProxyUnusable.reason": "requires another user or password (status 407)",
    "TokenMalformed.variable": "HF_TOKEN",
    "LinkAstray.what": "The link",
    "LinkAstray.value": "/runpod-volume/models",
    "LinkAstray.target": "/workspace/models-of-last-year",
    "LinkAstray.exists": False,
    "UpUsage.reason": "Say what to create: up WORKFLOW.json. `up status` and `up down` are for what was created; see --help.",
    "StateInvalid.path": Path("/home/you/.local/state/comfyui-volume-worker/flux.json"),
    "StateInvalid.reason": "it is not JSON",
    "VolumeUnknown.volume": "abc123xyz",
    "models": ("loras/fox.safetensors (unknown)", "vae/ae.safetensors (gated)"),
    "FillFailed.reason": "its Pod ended before it was done",
    "ApiKeyLacksRights.operation": "POST serverless",
    "NoBalance.operation": "POST pods",
    "workers": 3,
    "WorkerQuota.reason": "max workers across all endpoints must not exceed your workers quota (5)",
    "pools": ("ADA_24", "AMPERE_24"),
    "NoCpuFree.reason": "there are no instances available",
    "image": "ghcr.io/you/comfyui-volume-worker:1.0.0",
    "ImageNotFound.reason": "image not found",
    "RunPodFailed.operation": "POST serverless",
    "RunPodFailed.status": 502,
    "RunPodUnreachable.operation": "GET catalog/gpus",
    "RunPodUnreachable.reason": "no answer in time",
    "RunPodRefused.operation": "POST network-volumes",
    "RunPodRefused.reason": "size must be at least 10",
    "RunPodRefused.status": 422,
    "UnsafePath.what": "Input 'image' of node 3 (LoadImage)",
    "UsageError.reason": "Give either a workflow or --job ID",
    "value": "../secret.png",
    "variable": "HF_TOKEN",
    "variables": ("RUNPOD_S3_ACCESS_KEY_ID", "RUNPOD_S3_SECRET_ACCESS_KEY"),
    "volume": "abc123xyz in EU-RO-1",
    "S3VolumeNotFound.volume": "abc123xyz",
    "VolumeFailed.reason": "Input/output error",
    "VolumeReadOnly.reason": "Read-only file system",
    "waited_s": 62.0,
    "came_bytes": 480,
    "WhatUnknown.what": "flux_dev",
    "where": "https://huggingface.co/org/repo/resolve/main/x.safetensors",
    "InputNotServed.where": "https://example.com/clip.mp4",
    "InputUnreachable.where": "https://example.com/clip.mp4",
    "InputUrlRefused.where": "http://10.0.0.7/clip.mp4",
    "NotAFile.where": "https://civitai.com/models/1",
    "SourceRefused.where": "https://example.com/x.safetensors",
    "AnswerUnreadable.where": "https://api.runpod.ai/v2/abc123",
    "EndpointUnknown.where": "https://api.runpod.ai/v2/abc123",
    "KeyRefused.where": "https://api.runpod.ai/v2/abc123",
    "RequestRefused.where": "https://api.runpod.ai/v2/abc123",
    "ServiceFailed.where": "https://api.runpod.ai/v2/abc123",
    "TooManyRequests.where": "https://api.runpod.ai/v2/abc123",
    "Unreachable.where": "https://api.runpod.ai/v2/abc123",
    "UnknownNodes.comfyui": "0.3.75",
    "UnknownNodes.gone": (),
    "UnknownNodes.newer": ("LTXVAudioVAELoader (node 12)",),
    "UnknownNodes.off": (),
    "UnknownNodes.wanted": "0.33.0",
    "whole_bytes": 23_802_932_552,
    "WorkflowInvalid.reason": "bad link: input 'images' of node 2 (SaveImage) comes from node 99, which is not in the workflow",
    "WorkflowRejected.problems": ("node 3 (KSampler): Value 0 smaller than min of 1: steps",),
}

# What is worth knowing beside the sentence.
MORE: Final[Mapping[str, str]] = {
    "workflow_invalid": "Each wrong node, link and cycle has its own reason.",
    "unknown_nodes": "[customization.md](customization.md) says how to add custom nodes to the image or the volume; "
    "`python -m worker doctor` names those that ComfyUI could not import. Removed classes of ComfyUI, and "
    "classes of its own that did not load, have their own advice.",
    "override_invalid": "Other reasons: no node has that id, title or class, or several have it.",
    "input_url_refused": "Other reasons: a host that `INPUT_URL_HOSTS` does not name, a user name in the address, a redirect "
    "from https to http.",
    "model_missing": "`python -m worker plan WORKFLOW` shows each model's source. The next job that names a file sees it if it "
    "was put on the volume.",
    "repo_gated": "A fine-grained token also needs the permission to read gated repositories.",
    "content_mismatch": "The file was replaced at its source, or the sha256 is that of another revision.",
    "file_incomplete": "A copy is still running, or was interrupted.",
    "volume_full": "`python scripts/seed_volume.py --list` lists the models, `--prune` removes those that no list names.",
    "node_failed": "The message is the node's own; its traceback is in the worker's log.",
    "out_of_memory": "`COMFY_ARGS=--novram` needs less of the GPU's memory and takes longer; "
    "`--lowvram` has no effect in newer releases of ComfyUI.",
    "gpu_fault": "If every job of one worker ends like this, its GPU is broken: stop that worker, and RunPod starts another.",
    "job_timeout": "Downloads of models and input files do not count. RunPod's own limit (600 s by default) counts the whole "
    "job, and ends it without this sentence.",
    "engine_died": "`details` are ComfyUI's last lines. After SIGKILL, use a machine with more memory, or smaller weights.",
    "engine_start_failed": "`details` are ComfyUI's last lines. If ComfyUI is only slow, raise `COMFY_START_TIMEOUT_S`.",
    "result_too_large": "`details` are the files with their sizes.",
    "bucket_refused": "Amazon S3 requires the right `BUCKET_REGION`.",
    "settings_invalid": "`python -m worker settings` prints all settings.",
    "job_failed": "Sentence, code and details are the worker's; look up its code on this page.",
    "output_not_saved": "The other outputs were saved. For an endpoint, `--job ID` downloads the result again, for 30 minutes.",
}
"""By code."""

HEAD: Final = """\
# Errors

<!-- Made by `python -m scripts.make_errors` from every errors.py; a test holds it to them. -->

A failed job has one sentence in `error`: what happened and what to do. It also has a stable `code` for programs, `retryable`,
and for some errors `details`, a list with one finding a line. In the worker's log the same sentence ends with the code:
`job 5d0c1c1e-e1: failed after 0.31 s: ... [model_missing]`.

*Retryable* means that the same job may succeed later, unchanged. Other errors repeat until the cause that the sentence names is
fixed. The sentences below are made from example values. Some begin as worker-comfyui's do, because its clients match on them.
"""


class Incomplete(Exception):  # noqa: N818 - says what is the matter
    """This script does not know enough about an error class; the text says of which, and what to add."""


def main(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit status. Raises `Incomplete`."""
    parser = argparse.ArgumentParser(prog="python -m scripts.make_errors", description="Write docs/errors.md from the code.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the page, write nothing")
    what.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page differs")
    options = parser.parse_args(argv)
    text = page()
    if options.print:
        print(text, end="")
    elif options.check:
        before = PAGE.read_text("utf-8") if PAGE.is_file() else ""
        for line in difflib.unified_diff(before.splitlines(), text.splitlines(), PAGE.name, "the code", lineterm=""):
            print(line)
        return int(before != text)
    else:
        PAGE.write_text(text, "utf-8")
    return 0


# --- the errors -----------------------------------------------------------------------------------


def classes() -> tuple[ErrorClass, ...]:
    """Return every error that is raised, in the order of the code."""
    return tuple(kind for module in MODULES for kind in _classes_of(module) if kind not in NEVER_RAISED)


def _classes_of(module: ModuleType) -> Iterator[ErrorClass]:
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, (errors.WorkerError, client.ClientError))
            and value.__module__ == module.__name__
        ):
            yield value


def fields_of(kind: ErrorClass) -> tuple[str, ...]:
    """Return the names of an error's fields."""
    if issubclass(kind, errors.WorkerError):
        return kind.fields
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def section_of(kind: ErrorClass) -> Section:
    """Return the section of an error: that of its nearest base with one. Raises `Incomplete` if there is none."""
    found = [(kind.__mro__.index(section.base), section) for section in SECTIONS if issubclass(kind, section.base)]
    if not found:
        raise Incomplete(f"{kind.__name__} has no section: add one to SECTIONS")
    return min(found, key=lambda pair: pair[0])[1]


def example(kind: ErrorClass) -> errors.WorkerError | client.ClientError:
    """Return an instance with example values. Raises `Incomplete` for a field without one."""
    return kind(**{name: _value(kind, name) for name in fields_of(kind)})


def _value(kind: ErrorClass, field: str) -> Any:  # noqa: ANN401 - of whatever type the field has
    for key in (f"{kind.__name__}.{field}", field):
        if key in EXAMPLES:
            return EXAMPLES[key]
    raise Incomplete(f"{kind.__name__} has the field '{field}', for which there is no example: add one to EXAMPLES")


def when(kind: ErrorClass) -> str:
    """Return when it happens: the first sentence of the class's own docstring. Raises `Incomplete` if there is none."""
    text = " ".join((vars(kind).get("__doc__") or "").split())
    if not text or text.startswith(f"{kind.__name__}("):  # what dataclass writes where there is none
        raise Incomplete(f"{kind.__name__} has no docstring")
    return text.partition(". ")[0].rstrip(".") + "."


# --- the page -------------------------------------------------------------------------------------


def page() -> str:
    """Return the whole page."""
    kinds = classes()
    if unknown := MORE.keys() - {kind.code for kind in kinds}:
        raise Incomplete(f"MORE speaks of codes that do not exist: {', '.join(sorted(unknown))}")
    parts = [HEAD]
    for section in SECTIONS:
        entries = [_entry(kind) for kind in kinds if section_of(kind) is section]
        parts.append("\n".join([f"## {section.title}", *(["", section.about] if section.about else []), ""]))
        parts += entries
    return "\n".join([*parts, _exits()])


def _entry(kind: ErrorClass) -> str:
    error = example(kind)
    facts = [f"Retryable: {'yes' if kind.retryable else 'no'}."]
    if isinstance(error, errors.WorkerError) and error.details():
        facts.append("Has `details`.")
    if isinstance(error, client.ClientError):
        facts.append(f"Exit status {error.exit_status}.")
    if more := MORE.get(kind.code):
        facts.append(more)
    sentence = str(error).replace("<", "&lt;")  # what GitHub would take for HTML
    return f"### `{kind.code}`\n\n{when(kind)}\n\n> {sentence}\n\n{' '.join(facts)}\n"


def _exits() -> str:
    rows = "\n".join(f"| {program} | {status} | {meaning} |" for program, status, meaning in exits())
    return f"## Exit statuses\n\n| Program | Status | When |\n| --- | --- | --- |\n{rows}\n"


def exits() -> tuple[tuple[str, int, str], ...]:
    """Return program, status and when. The numbers are the programs' own."""
    worker, plan_, doctor_, convert = (f"`python -m worker{name}`" for name in ("", " plan", " doctor", " convert"))
    seed, run = "`python -m worker seed`, `scripts/seed_volume.py`", "`scripts/run_workflow.py`"
    return (
        (worker, 0, "SIGTERM arrived, or its last job is done (`REFRESH_WORKER`), and every accepted job was answered"),
        (worker, 1, "it could not start, ComfyUI did not restart, or there is no such command: the last line says why"),
        (worker, 143, "SIGTERM arrived before it accepted jobs"),
        (plan_, 0, "the workflow can run"),
        (plan_, plan.CANNOT_RUN, "something blocks it, or the settings are wrong"),
        (plan_, plan.USAGE, "the command line or the workflow cannot be read"),
        (doctor_, 0, "no problem was found"),
        (doctor_, doctor.PROBLEM_FOUND, "at least one problem was found, or the settings are wrong"),
        (doctor_, 2, "the command line is wrong"),
        (convert, 0, "the graph was printed"),
        (convert, 1, "the workflow cannot be read or converted, or no ComfyUI answers"),
        (convert, 2, "the command line is wrong"),
        (seed, 0, "everything is there"),
        (seed, seeder.FAILED, "something failed; the same command resumes"),
        (seed, seeder.USAGE, "the command line, a list of models, a key that is not set, or a setting is wrong"),
        (seed, seeder.STOPPED, "it was stopped (Ctrl-C, SIGTERM); the same command resumes"),
        (run, client.DONE, "the job is done and its outputs are saved"),
        (run, client.FAILED, "the job failed, an output could not be saved, or the client has a defect"),
        (run, client.USAGE, "the command line, a file that it names, or the key is missing or wrong"),
        (run, client.UNREACHABLE, "the endpoint or the worker cannot be reached, or refuses"),
        (run, client.INTERRUPTED, "Ctrl-C or SIGTERM; the job was cancelled if possible"),
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Incomplete as exc:
        sys.exit(f"scripts/make_errors.py: {exc}")
