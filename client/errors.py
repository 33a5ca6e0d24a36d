# ruff: noqa: N818 - an error's name says what happened; "Error" on each would be noise
"""Every error of the client, as one tree; each ends the command with a sentence and an exit status. Pure.

ClientError
├── UsageError           status 2: the command line, or a file that it names
│   └── FileUnreadable, SetInvalid
├── KeyMissing           status 2
├── ClientDefect         status 1
├── JobError             status 1: the job has no result, or its result is not on this disk
│   └── JobFailed, JobCancelled, JobOverdue, JobTimedOut, JobUnknown, ResultLost, OutputNotSaved
└── ServiceError         status 3: the endpoint or the worker cannot be reached, or refuses
    └── KeyRefused, EndpointUnknown, RequestRefused, TooManyRequests, ServiceFailed, Unreachable, AnswerUnreadable
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
"""The command's exit statuses. 130 is what shells expect after Ctrl-C."""

# RunPod answers 400 to a request above 10 MB, as to any other request that it refuses.
_NEARLY_TOO_LARGE_BYTES = 9_000_000
_TOO_LARGE = 413


class ClientError(Exception):
    """The root: every error that the client raises on purpose is one of these. `code` is stable, as in the worker."""

    code: ClassVar[str] = "client_failed"
    exit_status: ClassVar[int] = FAILED
    retryable: ClassVar[bool] = False


# --- the command line ---------------------------------------------------------------------------


@dataclass(eq=False)
class UsageError(ClientError):
    """The command line is wrong."""

    reason: str
    code = "usage"
    exit_status = USAGE

    def __str__(self) -> str:
        return f"{self.reason}."


@dataclass(eq=False)
class FileUnreadable(UsageError):
    """A file that the command line names cannot be used."""

    path: str
    code = "file_unreadable"

    def __str__(self) -> str:
        return f"{self.path} {self.reason}."


@dataclass(eq=False)
class SetInvalid(UsageError):
    """`--set`, `--image`, `--file` or `--model` was given something that is no pair."""

    option: str
    code = "option_invalid"

    def __str__(self) -> str:
        return f"{self.option} {self.reason}."


@dataclass(eq=False)
class KeyMissing(ClientError):
    """There is no key for the endpoint."""

    code = "key_missing"
    exit_status = USAGE

    def __str__(self) -> str:
        return (
            "RUNPOD_API_KEY is not set: make a key in RunPod's console (Settings > API Keys) and export it, "
            "or use --url for a local worker."
        )


@dataclass(eq=False)
class ClientDefect(ClientError):
    """A defect of the client itself. `kind` and `place` name the exception and the line, without any value."""

    kind: str
    place: str
    code = "client_defect"

    def __str__(self) -> str:
        return f"The client failed unexpectedly ({self.kind} in {self.place}): please report it, without any key."


# --- the job ------------------------------------------------------------------------------------


class JobError(ClientError):
    """The job has no result, or its result is not on this disk."""

    code = "job_failed"


@dataclass(eq=False)
class JobFailed(JobError):
    """The worker reports that the job failed. `code` and `details` are the worker's own, if it gave any."""

    sentence: str
    worker_code: str | None = None
    may_pass: bool = False
    details: Sequence[str] = ()
    code = "job_failed"

    def __str__(self) -> str:
        return self.sentence


@dataclass(eq=False)
class JobCancelled(JobError):
    """The job was cancelled."""

    job_id: str
    code = "job_cancelled"

    def __str__(self) -> str:
        return f"The job {self.job_id} was cancelled; send the workflow again if it is still wanted."


@dataclass(eq=False)
class JobOverdue(JobError):
    """The job took longer than --timeout. `stopped` says whether it could be cancelled."""

    timeout_s: float
    job_id: str | None
    stopped: str
    code = "job_overdue"

    def __str__(self) -> str:
        job = f"The job {self.job_id}" if self.job_id else "The job"
        return f"{job} was not done after {self.timeout_s:g} s; {self.stopped}; raise --timeout if it needs more."


@dataclass(eq=False)
class JobTimedOut(JobError):
    """RunPod ended the job."""

    job_id: str
    code = "job_timed_out"

    def __str__(self) -> str:
        return (
            f"RunPod ended the job {self.job_id}, because it ran longer than the endpoint allows or waited too long: raise the "
            "execution timeout in the endpoint's settings (600 s unless changed), or its number of workers."
        )


@dataclass(eq=False)
class JobUnknown(JobError):
    """The endpoint knows no such job."""

    job_id: str
    code = "job_unknown"

    def __str__(self) -> str:
        return (
            f"The endpoint does not know the job {self.job_id}: RunPod keeps results for 30 minutes; check the id and the "
            "endpoint, or send the workflow again."
        )


@dataclass(eq=False)
class ResultLost(JobError):
    """The job completed, but its result is missing."""

    job_id: str
    code = "result_lost"

    def __str__(self) -> str:
        return (
            f"The job {self.job_id} completed, but RunPod has no result of it: it was larger than RunPod accepts (10 MB), or "
            "is no longer kept; give the worker a bucket (BUCKET_ENDPOINT_URL) or a network volume."
        )


@dataclass(eq=False)
class OutputNotSaved(JobError):
    """An output cannot be written here, or cannot be downloaded. The others were saved."""

    name: str
    reason: str
    code = "output_not_saved"

    def __str__(self) -> str:
        return f"The output '{self.name}' is not saved: {self.reason}."


# --- the other side -----------------------------------------------------------------------------


class ServiceError(ClientError):
    """The endpoint or the worker cannot be reached, or refuses the request."""

    code = "service_failed"
    exit_status = UNREACHABLE

    @property
    def may_have_arrived(self) -> bool:
        """Return whether the other side may have accepted the request all the same."""
        return False


@dataclass(eq=False)
class KeyRefused(ServiceError):
    """The key is wrong, or may not use this endpoint."""

    where: str
    status: int
    code = "key_refused"

    def __str__(self) -> str:
        return (
            f"{self.where} refused the key (status {self.status}): check RUNPOD_API_KEY, and that the key is of the endpoint's "
            "account and may use it."
        )


@dataclass(eq=False)
class EndpointUnknown(ServiceError):
    """There is no such endpoint, or no such path at this address."""

    where: str
    code = "endpoint_unknown"

    def __str__(self) -> str:
        return (
            f"{self.where} does not exist (status 404): copy the endpoint's id from RunPod's console, or correct the address."
        )


@dataclass(eq=False)
class RequestRefused(ServiceError):
    """The request was refused before a worker received it."""

    where: str
    status: int
    reason: str
    size_bytes: int
    code = "request_refused"

    def __str__(self) -> str:
        too_large = self.size_bytes > _NEARLY_TOO_LARGE_BYTES or self.status == _TOO_LARGE
        advice = "RunPod accepts up to 10 MB; give large files by their address, --image NAME=https://..."
        return (
            f"{self.where} refused the request of {self.size_bytes / 1e6:.1f} MB (status {self.status}: {self.reason}): "
            f"{advice if too_large else 'correct what it names, and check the endpoint and its settings.'}"
        )


@dataclass(eq=False)
class TooManyRequests(ServiceError):
    """The endpoint asked for fewer requests, even after some waiting."""

    where: str
    waited_s: float
    code = "too_many_requests"
    retryable = True

    def __str__(self) -> str:
        return (
            f"{self.where} still had too many requests (status 429) after {self.waited_s:.0f} s: send fewer at a time, "
            "or try again later."
        )


@dataclass(eq=False)
class ServiceFailed(ServiceError):
    """The endpoint or the worker failed."""

    where: str
    status: int
    reason: str
    code = "service_failed"
    retryable = True
    may_have_arrived = True

    def __str__(self) -> str:
        return f"{self.where} failed (status {self.status}: {self.reason}): try again in a minute."


@dataclass(eq=False)
class Unreachable(ServiceError):
    """Nothing answers at this address."""

    where: str
    reason: str
    advice: str = "check the address and the network"
    was_sent: bool = False
    code = "unreachable"
    retryable = True

    @property
    def may_have_arrived(self) -> bool:
        """Return whether the connection broke only after the request."""
        return self.was_sent

    def __str__(self) -> str:
        return f"{self.where} cannot be reached ({self.reason}): {self.advice}."


@dataclass(eq=False)
class AnswerUnreadable(ServiceError):
    """The answer is not that of an endpoint or a worker."""

    where: str
    found: str
    code = "answer_unreadable"
    may_have_arrived = True

    def __str__(self) -> str:
        return f"{self.where} answered with {self.found}, which no endpoint does: check the address and any proxy."
