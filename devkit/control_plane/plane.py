"""An endpoint of RunPod in this process: what tests and scripts hold in their hands. Threads, loopback network, a folder."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from devkit.control_plane.board import Board
from devkit.control_plane.client_api import ClientApi, Via
from devkit.control_plane.faults import Book, Fault, FaultKind, FaultRoute, Rule
from devkit.control_plane.jobs import FINAL, Job
from devkit.control_plane.pods import freeze_all, kill_all, thaw_all
from devkit.control_plane.server import Bell, Server
from devkit.control_plane.worker_api import WorkerApi

if TYPE_CHECKING:
    from collections.abc import Callable

    from devkit.control_plane.jobs import Ping, Post, Update

MB = 1_000_000


class JobHandle:
    """One submitted job: what a client would see of it, and what its workers did."""

    def __init__(self, board: Board, job: Job) -> None:
        self._board = board
        self._job = job
        self.id = job.id

    def status(self) -> dict[str, Any]:
        """Return the current answer of GET /status."""
        return self._board.shown(self._job)

    def result(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Return the final status: `id`, `status`, and `output` and `error` if any. Raises TimeoutError with what is known."""
        if not self._board.wait_until(lambda: self._job.status in FINAL, timeout_s):
            late = " by an update that came after the result" if self.late_updates else ""
            raise TimeoutError(f"job {self.id} is {self._job.status}{late} after {timeout_s:g} s; taken by {self.takes}")
        return self.status()

    @property
    def answers(self) -> int:
        """Return how many results arrived, including lost ones: 1, or 0 for a job that was cancelled or never run."""
        return self._job.answers

    @property
    def updates(self) -> list[Update]:
        """Return the progress updates in the order of arrival."""
        return list(self._job.updates)

    @property
    def late_updates(self) -> list[Update]:
        """Return those that came after the result: each leaves the job IN_PROGRESS for its client for ever."""
        return [update for update in self._job.updates if update.late]

    @property
    def posts(self) -> list[Post]:
        """Return everything that workers posted about it, including refused posts."""
        return list(self._job.posts)

    @property
    def takes(self) -> list[str]:
        """Return the pods that got it, in order."""
        return list(self._job.takes)

    @property
    def lost(self) -> bool:
        """Return whether a result was refused as too large, or as no JSON. Clients see COMPLETED without output."""
        return self._job.lost

    @property
    def stop_pod(self) -> bool:
        """Return whether a result asked for a replacement of the worker."""
        return self._job.stop_pod


class ControlPlane:
    """One endpoint, listening from construction until `close`.

    A poll is held for `poll_s`; how long RunPod holds one is not known, the SDK gives up after 90 s. A job's result may have
    `run_limit_bytes`, through runsync `runsync_limit_bytes`; as may requests. A job that runs longer than
    `execution_timeout_s`, or than its own `policy.executionTimeout` in ms, is stopped and TIMED_OUT.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        endpoint_id: str = "ep",
        poll_s: float = 10.0,
        ping_interval_s: int = 2,
        run_limit_bytes: int = 10 * MB,
        runsync_limit_bytes: int = 20 * MB,
        execution_timeout_s: float = 600.0,
    ) -> None:
        self.endpoint_id = endpoint_id
        self.worker_key = "rpa_worker"
        self._ping_interval_s = max(1, ping_interval_s)  # at 0 the SDK pings without pause
        self._limits_bytes: dict[Via, int] = {"run": run_limit_bytes, "runsync": runsync_limit_bytes}
        self._execution_timeout_s = execution_timeout_s
        bell, self._book = Bell(), Book()
        self._board = Board(bell.ring)
        self._workers = WorkerApi(self._board, self._book, bell, self.worker_key, poll_s)
        clients = ClientApi(self._board, bell, self._submit, self._limits_bytes)
        root = f"/v2/{endpoint_id}"
        self._homes = tempfile.TemporaryDirectory(prefix="control-plane-")
        self._server = Server([*self._workers.routes(root), *clients.routes(root)], bell, port)
        self.base_url = f"http://127.0.0.1:{self._server.port}/v2"
        self.url = f"{self.base_url}/{endpoint_id}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; end every connection, held ones with no job."""
        self._server.close()
        self._homes.cleanup()

    def environ(self, pod_id: str = "pod-1") -> dict[str, str]:
        """What to set for a worker's process, over an environment without other RUNPOD_ variables.

        HOME is a folder of its own: the SDK prefers the key in ~/.runpod/config.toml to the one it is given. The checks that
        are off ask for 4 GB of memory, for the internet and for a GPU.
        """
        home = self._home(pod_id)
        home.mkdir(exist_ok=True)
        loopback = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost")))
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID?gpu=CPU",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=CPU",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=CPU",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID?gpu=CPU",
            "RUNPOD_PING_INTERVAL": str(self._ping_interval_s * 1000),
            "RUNPOD_AI_API_KEY": self.worker_key,
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_POD_HOSTNAME": f"{pod_id}-host",
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "HOME": str(home),
            "NO_PROXY": loopback,
            "no_proxy": loopback,
        }

    def _home(self, pod_id: str) -> Path:
        return Path(self._homes.name) / pod_id

    # --- jobs

    def submit(self, job_input: Any, /, id: str | None = None, via: Via = "run", **job_fields: Any) -> JobHandle:  # noqa: A002, ANN401 - the job's own words, any JSON
        """Put a job in the queue. `job_fields` are what a request may have beside `input`: s3Config, policy, webhook.

        ValueError for an id that is taken.
        """
        return JobHandle(self._board, self._submit({**job_fields, "input": job_input}, via, id))

    def _submit(self, fields: dict[str, Any], via: Via, job_id: str | None = None) -> Job:
        made = f"{'sync-' if via == 'runsync' else ''}{uuid.uuid4()}-e1"
        policy = fields.get("policy") or {}
        timeout_s = policy["executionTimeout"] / 1000 if "executionTimeout" in policy else self._execution_timeout_s
        return self._board.submit({**fields, "id": job_id or made}, self._limits_bytes[via], timeout_s)

    def job(self, job_id: str) -> JobHandle:
        """Return a job by its id. Raises LookupError."""
        return JobHandle(self._board, self._board.find(job_id))

    @property
    def jobs(self) -> list[JobHandle]:
        """Return every job in the order of submission."""
        return [JobHandle(self._board, job) for job in list(self._board.jobs.values())]

    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job as a client does: it is CANCELLED at once, its worker is told through job-stop. LookupError."""
        return self._stop(job_id, "CANCELLED")

    def time_out(self, job_id: str) -> dict[str, Any]:
        """End a job as its execution timeout does. LookupError."""
        return self._stop(job_id, "TIMED_OUT")

    def _stop(self, job_id: str, status: Any) -> dict[str, Any]:  # noqa: ANN401 - Board.stop's literal
        job = self._board.find(job_id)
        self._board.stop(job, status)
        return {"id": job.id, "status": job.status}

    def requeue(self, job_id: str) -> None:
        """Give a job IN_PROGRESS, whose worker died, to the next worker. LookupError, ValueError for any other state."""
        self._board.requeue(self._board.find(job_id))

    # --- pods

    @property
    def pings(self) -> list[Ping]:
        """Return every heartbeat so far."""
        with self._board.changed:
            return list(self._board.pings)

    @property
    def pods_to_stop(self) -> set[str]:
        """Return pods that asked to be replaced. RunPod stops them. Here they get no more jobs, and the test ends them."""
        with self._board.changed:
            return set(self._board.retired)

    def readmit(self, pod_id: str) -> None:
        """Give jobs to this pod again: a new process has taken its place."""
        with self._board.changed:
            self._board.retired.discard(pod_id)

    def kill_pod(self, pod_id: str = "pod-1") -> int:
        """Send SIGKILL to every process of this pod, as its machine's death does. Return how many there were."""
        return kill_all(self._home(pod_id))

    def freeze_pod(self, pod_id: str = "pod-1") -> int:
        """Stop every process of this pod where it stands, as FlashBoot does; returns how many there are."""
        return freeze_all(self._home(pod_id))

    def thaw_pod(self, pod_id: str = "pod-1", *, cut: bool = True) -> int:
        """Let a frozen pod go on; returns its number of processes. `cut`: its connections to RunPod are dead, silently."""
        if cut:
            self._workers.silence(pod_id)
            self._board.end_polls(pod_id)
        return thaw_all(self._home(pod_id))

    def is_polling(self, pod_id: str = "pod-1") -> bool:
        """Return whether the pod waits for a job: it runs, and has room for one."""
        return self._board.is_polling(pod_id)

    def end_polls(self, pod_id: str | None = None) -> None:
        """Answer what this pod (None: every pod) has held with nothing, as when the time is over; it asks again at once."""
        self._board.end_polls(pod_id)

    # --- faults and waiting

    def fault(self, kind: FaultKind, route: FaultRoute, **options: Any) -> Rule:  # noqa: ANN401 - fields of Fault
        """Let something go wrong; the options are Fault's fields. The rule counts how often it has. TypeError, ValueError."""
        return self._book.add(Fault(kind, route, **options))

    def clear_faults(self) -> None:
        """Remove all faults."""
        self._book.clear()

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Return once `happened()`, which is asked again at every change here and every 50 ms; TimeoutError."""
        if not self._board.wait_until(happened, timeout_s):
            raise TimeoutError(f"it did not happen within {timeout_s:g} s")

    def wait_polling(self, pod_id: str = "pod-1", timeout_s: float = 30.0) -> None:
        """Return once the pod waits for a job; TimeoutError."""
        self.wait_until(lambda: self.is_polling(pod_id), timeout_s)
