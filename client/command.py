"""The command: a workflow in, its outputs saved. Reads arguments, prints, ends with an exit status."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import textwrap
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from client.errors import (
    DONE,
    INTERRUPTED,
    ClientDefect,
    ClientError,
    JobCancelled,
    JobFailed,
    JobTimedOut,
    OutputNotSaved,
    ResultLost,
    UsageError,
)
from client.plain import one_line, printable
from client.progress import size
from client.request import Wishes, build, node_names
from client.save import Saved, check_folder, save_outputs
from client.screen import Screen
from client.service import Endpoint, LocalWorkerApi
from client.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from client.service import Service

_TEXT_LINES: Final = 20
_VOLUME_KEYS: Final = """\
  (Put in the volume's id and data centre. The keys are those of RunPod's S3 API, from Settings > S3 API Keys:
  export AWS_ACCESS_KEY_ID=$RUNPOD_S3_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY=$RUNPOD_S3_SECRET_ACCESS_KEY)"""
_EXIT = """\
exit status: 0 done; 1 the job failed, or an output could not be saved; 2 the command line, the key or a file is wrong;
3 the endpoint or worker cannot be reached or refuses; 130 interrupted (Ctrl-C cancels the job).

examples:
  run_workflow.py flux.json --endpoint abc123 --set 6.text="a fox in the snow" --seed random
  run_workflow.py upscale.json --url http://127.0.0.1:8000 --image in.png=~/photo.png --output upscaled
  run_workflow.py ComfyUI_00001_.png --endpoint abc123 --seed next     # runs the workflow that made the picture
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parse = argparse.ArgumentParser(
        prog="run_workflow.py",
        description="Send a ComfyUI workflow to an endpoint or a local worker, and save what comes back.",
        epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument(
        "workflow",
        nargs="?",
        help='a workflow as ComfyUI saves or exports it, a whole request ({"input": ...}), or a PNG, WEBP, MP4 or WEBM that '
        "ComfyUI made; the name of a workflow on the endpoint's volume; - for standard input",
    )
    where = parse.add_argument_group("where").add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", metavar="ID", help="a RunPod endpoint; the key is read from RUNPOD_API_KEY")
    where.add_argument("--url", help="a local worker, such as http://127.0.0.1:8000")
    what = parse.add_argument_group("what")
    what.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="a value of the graph; JSON, or a text"
    )
    what.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a file the workflow loads by NAME; or NAME=https://...",
    )
    what.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="the same for other files")
    what.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="FOLDER/NAME=SOURCE",
        help="a model's source: hf://org/repo/path",
    )
    what.add_argument("--seed", metavar="random|next|N", help="other seeds than the saved ones; -1 is random")
    what.add_argument("--previews", action="store_true", help="also return the outputs of preview nodes")
    what.add_argument("--timeout", type=_seconds, metavar="S", help="cancel the job if it is not done after S seconds")
    what.add_argument("--job", metavar="ID", help="send nothing: wait for this job of the endpoint and save its result")
    result = parse.add_argument_group("the result")
    result.add_argument("--output", type=Path, metavar="DIR", help="where outputs are saved (default: outputs)")
    result.add_argument(
        "--json", action="store_true", help="print the whole answer; outputs are saved only if --output is given"
    )
    return parse


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command. Return the exit status, see `--help`. Raises nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name in a result may contain what this terminal's encoding lacks
    try:
        options = parser().parse_args(list(argv))
    except SystemExit as exc:
        return int(exc.code or 0)
    before = signal.signal(signal.SIGTERM, _interrupt)  # an abandoned job costs money
    try:
        return _run(options, environ)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ClientError as exc:
        return tell_failure(exc, sys.stderr)
    except Exception as exc:  # noqa: BLE001 - the command's edge; a traceback's last line would show values, a key among them
        return tell_failure(_defect(exc), sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if (options.workflow is None) == (options.job is None):
        raise UsageError("Give either a workflow or --job ID")
    if options.job is not None and options.endpoint is None:
        raise UsageError("--job goes with --endpoint: a local worker keeps no results")
    job: dict[str, Any] = {} if options.job is not None else build(_wishes(options))
    service = endpoint_or_worker(options, environ)
    folder = options.output or (None if options.json else Path("outputs"))
    if folder is not None:
        check_folder(folder)
    answer = watched(service, job, options.timeout)
    if answer is None:
        return INTERRUPTED
    if options.json:
        _print(as_json(answer, sys.stdout.encoding), sys.stdout)
    check(answer)
    if folder is None:
        return DONE
    job_id = service.job_id if isinstance(service, Endpoint) else None
    return tell_outputs(answer["output"], folder, sys.stderr if options.json else sys.stdout, job_id)


def as_json(value: object, encoding: str) -> str:
    """Return readable JSON. It is in ASCII if a terminal would obey some of it or `encoding` lacks some."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(encoding)
        shows = text.replace("\n", "").isprintable()
    except UnicodeEncodeError:
        shows = False
    return text if shows else json.dumps(value, indent=2)


def _wishes(options: argparse.Namespace) -> Wishes:
    return Wishes(
        options.workflow,
        values=options.set,
        images=options.image,
        files=options.file,
        models=options.model,
        seed=options.seed,
        timeout_s=options.timeout,
        previews=options.previews,
    )


def endpoint_or_worker(options: argparse.Namespace, environ: Mapping[str, str]) -> Service:
    """Return the service that runs the job."""
    if options.endpoint is not None:
        return Endpoint.of(options.endpoint, environ, options.job)
    return LocalWorkerApi(Wire(options.url.rstrip("/")))


def watched(
    service: Service, job: Mapping[str, Any], timeout_s: float | None, stream: IO[str] | None = None
) -> dict[str, Any] | None:
    """Return the job's final answer, and show its progress. None after Ctrl-C, which cancels it. Raises a `ClientError`."""
    screen = Screen(stream or sys.stderr, node_names(dict(job)) if job else {})
    try:
        answer = service.run(job, screen.show, timeout_s)
    except KeyboardInterrupt:
        screen.say(f"interrupted: {service.abandon()}")
        return None
    except Exception as exc:
        if note := service.aftermath(exc):
            screen.say(note)
        raise
    finally:
        screen.end()
    return answer


def check(answer: Mapping[str, Any]) -> None:
    """Return if the job has a result. Raises a `JobError` that says why there is none."""
    job_id, output, error = str(answer.get("id", "?")), answer.get("output"), answer.get("error")
    status = answer.get("status")
    if status == "CANCELLED":
        raise JobCancelled(job_id)
    if status == "TIMED_OUT":
        raise JobTimedOut(job_id)
    more = output if isinstance(output, dict) else {}
    error = error or more.get("error")
    if status == "FAILED" or error:
        details = more.get("details")
        code = more.get("code")
        raise JobFailed(
            _sentence(error),
            code if isinstance(code, str) else None,
            may_pass=more.get("retryable") is True,
            details=tuple(map(str, details)) if isinstance(details, list) else (),
        )
    if not isinstance(output, dict):
        raise ResultLost(job_id)


def _sentence(error: object) -> str:
    """Return the worker's sentence, also from the SDK's report of a broken worker: JSON with `error_message`."""
    try:
        report = json.loads(error) if isinstance(error, str) else error
    except (ValueError, RecursionError):
        report = None
    if isinstance(report, dict) and report.get("error_message"):
        return f"The worker broke: {str(report['error_message']).strip()}; its log has more."
    return str(error) if error else "The job failed, and RunPod says no more; look at the worker's log in its console."


def tell_outputs(output: Mapping[str, Any], folder: Path, stream: IO[str], job_id: str | None = None) -> int:
    """Save a result's outputs and print a line for each. Return the exit status.

    `job_id` is set if the result can be requested again.
    """
    status, count, on_volume = DONE, 0, False
    for saved in save_outputs(output, folder):
        count += 1
        if isinstance(saved, OutputNotSaved):
            status = tell_failure(saved, sys.stderr)
        else:
            say(saved_line(saved), stream)
            on_volume = on_volume or saved.volume_path is not None
    if on_volume:
        say(_VOLUME_KEYS, stream)
    if status != DONE and job_id is not None:
        say(f"The result can be fetched again with --job {job_id} within 30 minutes.", sys.stderr)
    warnings = output.get("errors") or []
    for warning in warnings if isinstance(warnings, list) else [warnings]:
        say(f"warning: {warning}", sys.stderr)
    if not count:
        say(
            "The job finished and returned no file: give the workflow an output node such as SaveImage, or use --previews.",
            stream,
        )
    return status


def saved_line(saved: Saved) -> str:
    """Return what was done with one output, for people."""
    facts = ", ".join(filter(None, (saved.media_type, size(saved.size_bytes))))
    if saved.volume_path is not None:
        path = one_line(saved.volume_path)
        return (
            f"on the volume  {path}  ({facts})\n  aws s3 cp {shlex.quote(f's3://VOLUME_ID/{path}')} . "
            "--region DATACENTER --endpoint-url https://s3api-DATACENTER.runpod.io/"
        )
    line = f"saved  {saved.path}  ({facts})"
    if saved.text is None:
        return line
    lines = saved.text.splitlines()
    shown = [*lines[:_TEXT_LINES], *(["..."] if len(lines) > _TEXT_LINES else [])]
    return line + "\n" + textwrap.indent("\n".join(shown), "  ")


def tell_failure(error: ClientError, stream: IO[str]) -> int:
    """Print an error as a sentence, its details, and whether a retry can help. Return its exit status."""
    code = error.worker_code or error.code if isinstance(error, JobFailed) else error.code
    say(f"error: {error} [{code}]", stream)
    if isinstance(error, JobFailed):
        for detail in error.details:
            if detail not in str(error):
                say(f"  {detail}", stream)
        if error.may_pass:
            say("This may pass: the same command again can succeed.", stream)
    return error.exit_status


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print a text for people, without sequences that a terminal would obey."""
    _print(printable(text), stream or sys.stdout)


def _print(text: str, stream: IO[str]) -> None:
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # as with `| head`: nobody reads any more, but the rest is still wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _defect(error: Exception) -> ClientDefect:
    """Return an unexpected error by its kind and our line that met it."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == Path(__file__).parent
    ]
    return ClientDefect(type(error).__name__, f"client/{Path(frames[-1].filename).name}, line {frames[-1].lineno}")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number of seconds, more than 0")
    return value


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
