"""A real MooseFS volume on one machine, with several client mounts standing for several hosts. Processes, mounts, disk.

RunPod's network volumes have been seen to be MooseFS, and it is unlike a local disk where it hurts: whole-second mtimes, sizes
that other hosts see only after fsync, locks that outlive a crashed host, a round trip for each stat. So what has to hold on a
volume is tested on one:

    with MooseFS(folder) as volume:
        here, there = volume.mounts

Needs root, /dev/fuse and Debian's `PACKAGES`; `available()` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKAGES = ("moosefs-master", "moosefs-chunkserver", "moosefs-client", "iproute2")

LOCAL_FLOCK = ("-o", "mfsnobsdlocks")
"""For `mount`: flock is granted by this mount alone, so that two hosts hold one lock. Volumes are seen mounted like this."""

_PROGRAMS = ("mfsmaster", "mfschunkserver", "mfsmount", "mfssetquota", "ip", "unshare", "nsenter", "setpriv", "umount")
_EMPTY = Path("/var/lib/mfs/metadata.mfs.empty")
_ADDRESS = "10.77.0.1"  # seen inside the volume's own network namespace only
_START_S = 120.0
_STOP_S = 120.0
_POLL_S = 0.02

# A chunk server refuses loopback addresses, so the namespace gets a pair of virtual cards; it ends with its last process.
_NETWORK = f"""
ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add {_ADDRESS}/24 dev v0 &&
ip link set v0 up && ip link set v1 up && exec "$@"
"""


class MooseFSError(RuntimeError):
    """The volume did not start, or a part of it ended; the text holds what the part said last."""


def available() -> str | None:
    """Return why no MooseFS can run here, or None."""
    if os.geteuid() != 0:
        return "MooseFS needs root, to mount"
    if not Path("/dev/fuse").exists():
        return "MooseFS needs /dev/fuse"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing or not _EMPTY.exists():
        return f"MooseFS is not installed ({', '.join(missing) or _EMPTY} missing): apt-get install {' '.join(PACKAGES)}"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        return "MooseFS needs a network namespace of its own, which this container may not make"
    return None


class MooseFS:
    """A volume in `folder` (empty or new) with `mounts` client mounts; a context manager.

    Entering takes about two seconds and raises MooseFSError when a part does not come up. Leaving ends every process and
    mount at once, and the volume with them. Any number can run at a time: each has its own network. The processes end with
    the thread that entered, even when that is killed, so enter from one that lasts.
    """

    def __init__(self, folder: Path, mounts: int = 2) -> None:
        self.mounts: list[Path] = []
        self._folder = folder.resolve()
        self._first_mounts = mounts
        self._clients: list[subprocess.Popen[bytes]] = []
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        reason = available()
        if reason:
            raise MooseFSError(reason)
        try:
            self._write_configuration()
            self._start_servers()
            for _ in range(self._first_mounts):
                self.mount()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def mount(self, options: Sequence[str] = ()) -> Path:
        """One more host: mount the volume, with further options of mfsmount, and wait until it can be written."""
        number = len(self.mounts) + 1
        point = self._folder / f"mnt{number}"
        point.mkdir()
        client = self._spawn(f"mount{number}", [*self._inside(), "mfsmount", "-f", "-H", _ADDRESS, *options, str(point)])
        self.mounts.append(point)
        self._clients.append(client)
        # The first mount can be up before the chunk server has joined; then the volume has no room yet.
        self._wait(client, f"mount{number}", lambda: point.is_mount() and os.statvfs(point).f_blocks > 0)
        return point

    def kill_mount(self, number: int) -> None:
        """Crash the host that has mount `number` (from 0): its files answer ENOTCONN, its locks and session stay."""
        self._clients[number].kill()
        self._clients[number].wait(_STOP_S)

    def set_quota(self, folder: Path, size_bytes: int) -> None:
        """Let the files below `folder` (on a living mount) be that long in sum; more gives EDQUOT."""
        subprocess.run(
            [*self._inside(), "mfssetquota", "-L", str(size_bytes), str(folder)],
            check=True,
            capture_output=True,
            timeout=_STOP_S,
        )

    def limit_line(self, bytes_per_s: int) -> None:
        """Let no more than that go between the mounts and the chunk server, as on the line to a volume elsewhere.

        Nearly all of it is file content. Raises MooseFSError where the kernel has no token bucket (sch_tbf).
        """
        # Room for 20 ms of the rate: a smaller bucket loses packets between two ticks, a larger one lets whole files through.
        bucket = ["rate", f"{bytes_per_s * 8}bit", "burst", str(bytes_per_s // 50), "latency", "100ms"]
        command = [*self._inside(), "tc", "qdisc", "replace", "dev", "lo", "root", "tbf", *bucket]
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=_STOP_S)
        if done.returncode != 0:
            raise MooseFSError(f"the volume's line cannot be limited: {done.stderr.strip()}")

    def _write_configuration(self) -> None:
        for name in ("etc", "master", "chunk", "data"):
            (self._folder / name).mkdir(parents=True)
        shutil.copy(_EMPTY, self._folder / "master/metadata.mfs")
        etc = self._folder / "etc"
        # No trash: MooseFS keeps what was deleted for a day, and a bench that writes gigabytes would fill the disk with it.
        (etc / "exports").write_text("10.77.0.0/24 / rw,alldirs,admin,maproot=0,maxtrashtime=0\n")
        (etc / "topology").write_text("")
        (etc / "disks").write_text(f"{self._folder}/data\n")
        common = ["WORKING_USER = root", "WORKING_GROUP = root", "NICE_LEVEL = 0"]
        master = [
            f"DATA_PATH = {self._folder}/master",
            f"EXPORTS_FILENAME = {etc}/exports",
            f"TOPOLOGY_FILENAME = {etc}/topology",
            *(f"{port}_LISTEN_HOST = {_ADDRESS}" for port in ("MATOML", "MATOCS", "MATOCL")),
        ]
        chunk = [
            f"DATA_PATH = {self._folder}/chunk",
            f"HDD_CONF_FILENAME = {etc}/disks",
            *(f"{key} = {_ADDRESS}" for key in ("MASTER_HOST", "BIND_HOST", "CSSERV_LISTEN_HOST")),
        ]
        (etc / "master.cfg").write_text("\n".join([*common, *master, ""]))
        (etc / "chunk.cfg").write_text("\n".join([*common, *chunk, ""]))

    def _start_servers(self) -> None:
        etc = self._folder / "etc"
        network = ["unshare", "--net", "sh", "-c", _NETWORK, "sh"]
        master = self._spawn("master", [*network, "mfsmaster", "-f", "-c", f"{etc}/master.cfg", "start"])
        self._servers.append(master)
        self._wait(master, "master", lambda: "main master server module: listen" in self._said("master"))
        chunk = self._spawn("chunk", [*self._inside(), "mfschunkserver", "-f", "-c", f"{etc}/chunk.cfg", "start"])
        self._servers.append(chunk)

    def _inside(self) -> list[str]:
        """Return the command prefix that enters the volume's network. It lives as long as a process in it, the master first."""
        return ["nsenter", f"--net=/proc/{self._servers[0].pid}/ns/net"]

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for whoever uses the volume, who then unmounts it
            )

    def _wait(self, process: subprocess.Popen[bytes], name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            if process.poll() is not None:
                raise MooseFSError(f"MooseFS's {name} ended with {process.returncode}: {self._said(name)[-2000:]}")
            if time.monotonic() > deadline:
                raise MooseFSError(f"MooseFS's {name} was not ready after {_START_S:g} s: {self._said(name)[-2000:]}")
            time.sleep(_POLL_S)

    def _said(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _stop(self) -> None:
        for point in self.mounts:
            # Lazily: a mount that something still uses, or whose process was killed, goes as well.
            subprocess.run(["umount", "--lazy", str(point)], capture_output=True, check=False, timeout=_STOP_S)
        for process in [*self._clients, *reversed(self._servers)]:
            process.kill()  # nobody reads the volume again, and an orderly end takes the four of them 8 seconds
            process.wait(_STOP_S)
