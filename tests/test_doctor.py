"""`python -m worker doctor`: what is wrong with a volume is found, said with what to do, and never waited for without end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from devkit.hub import Hub as StandIn
from devkit.moosefs import MooseFS
from worker import doctor
from worker.doctor import Deadlines, Finding, Probe, Severity, Subject, lock_check, model_checks
from worker.doctor.doctor_command import report_lines
from worker.doctor.volume_checks import find_mount
from worker.errors import EnsureCancelled
from worker.fetch.http import Network
from worker.fetch.hub import Hub, credentials
from worker.model_spec import parse_spec
from worker.settings import Settings
from worker.store import pod_links
from worker.store.layout import Layout
from worker.store.seals import Seal, whole_mtime, write_seal
from worker.store.store import RangeTuning, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = json.dumps({"t": {"dtype": "U8", "shape": [892], "data_offsets": [0, 892]}}).encode().ljust(100)
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(892)
HOUR_S = 3600


class Patient:
    """A volume to be looked at."""

    def __init__(self, volume: Path, comfyui: Path) -> None:
        self.volume = volume
        self.layout = Layout(volume)
        self.comfyui = comfyui

    def put(self, path: str, data: bytes = WEIGHTS) -> Path:
        target = self.volume / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return target

    def seal(self, path: str) -> None:
        """As the worker seals a file that it fetched."""
        folder, _, name = path.partition("/")
        found = (self.layout.models / path).stat()
        seal = Seal(size=found.st_size, mtime=whole_mtime(found), sha256="ab" * 32)
        write_seal(self.layout.seal(folder, name), seal)

    def settings(self, **environ: str) -> Settings:
        return Settings.from_env({"VOLUME_PATH": str(self.volume), "COMFYUI_DIR": str(self.comfyui), **environ})

    def look(self, check: str, **environ: str) -> list[Finding]:
        """What one check finds, here in this process."""
        probe = Probe(Subject.of(self.settings(**environ), Deadlines()))
        return list({"volume": probe.volume, **probe.checks}[check]())

    def only(self, check: str, **environ: str) -> Finding:
        """The one finding of a check that is more than well."""
        (finding,) = (found for found in self.look(check, **environ) if found.severity is not Severity.OK)
        return finding

    def report(self, capsys: pytest.CaptureFixture[str], deadlines: Deadlines | None = None, **environ: str) -> dict[str, Any]:
        """The command's own report."""
        status = doctor.run(["--json"], self.settings(**environ), deadlines)
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert status == (0 if said["ok"] else 1)
        return said


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    (tmp_path / "volume").mkdir()
    return Patient(tmp_path / "volume", tmp_path / "comfyui")


def severities(report: dict[str, Any]) -> dict[str, str]:
    """The worst that each check found."""
    order = ["ok", "note", "problem"]
    worst: dict[str, str] = {}
    for found in report["findings"]:
        worst[found["check"]] = max(worst.get(found["check"], "ok"), found["severity"], key=order.index)
    return worst


# --- the whole command --------------------------------------------------------------------------


def test_a_healthy_volume_is_told_in_short_lines_and_left_as_it_was(
    patient: Patient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    patient.put("models/loras/a.safetensors")
    patient.seal("loras/a.safetensors")
    patient.put("models/vae/b.safetensors")
    before = {path for path in patient.volume.rglob("*") if path.is_file()}
    assert doctor.run([], patient.settings()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if str(patient.volume) not in line)
    assert "\x1b" not in "".join(lines), "no colours where nobody sees them"
    assert lines[-1] == "0 problems, 2 notes", "a plain folder, and a file put there by hand"
    assert [line.split() for line in lines if line.split()[:1] in (["loras"], ["vae"])] == [
        ["loras", "1", "1.0", "kB", "1"],
        ["vae", "1", "1.0", "kB", "0"],
    ]
    left = {path for path in patient.volume.rglob("*") if path.is_file()} - before
    assert {path.relative_to(patient.layout.locks).parts[0] for path in left} == {"doctor.rw"}, (
        "its own lock, as any lock stays"
    )


def test_the_report_for_programs_has_every_check_and_every_path(patient: Patient, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        patient.put(f"models/loras/{number}.safetensors")
    patient.put("checkpoints/x.safetensors")
    report = patient.report(capsys)
    assert list(severities(report)) == [
        *("volume", "space", "writable", "locks", "models", "seals", "misplaced", "downloads", "manifests", "host cache"),
    ]
    assert severities(report)["misplaced"] == "problem"
    by_hand = next(found for found in report["findings"] if "by hand" in found["message"])
    assert by_hand["paths"] == [f"loras/{number}.safetensors" for number in range(5)]
    assert report["folders"] == [{"folder": "loras", "files": 5, "size_bytes": 5000, "sealed": 0}]


def test_no_volume_is_one_problem(patient: Patient, capsys: pytest.CaptureFixture[str]) -> None:
    patient.volume.rmdir()
    (found,) = patient.report(capsys)["findings"]
    assert (found["severity"], found["check"]) == ("problem", "volume")
    assert str(patient.volume) in found["message"]
    assert "VOLUME_PATH" in found["message"]


def test_wrong_arguments_give_2(patient: Patient, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(["--wrong"], patient.settings()) == 2
    assert capsys.readouterr().err


def test_colours_are_for_terminals() -> None:
    found = [Finding(Severity.PROBLEM, "It is broken.", check="space")]
    plain, coloured = ("\n".join(report_lines(found, [], 80, colour=colour)) for colour in (False, True))
    assert "\x1b[1;31mPROBLEM\x1b[0m" in coloured
    assert "\x1b" not in plain


def test_a_name_that_is_no_text_does_not_break_the_terminal(patient: Patient) -> None:
    os.link(
        patient.put("models/loras/a.safetensors"), os.fsencode(patient.volume) + b"/models/loras/b\xff\n\x1b[2J.safetensors"
    )
    out = "\n".join(report_lines(patient.look("models"), [], 80, colour=False))
    assert all(line.isprintable() for line in out.split("\n"))
    assert "b\\udcff\\n\\x1b[2J.safetensors" in out


# --- what hangs ---------------------------------------------------------------------------------


def test_a_check_that_hangs_is_told_and_the_others_are_not_held_up(
    patient: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    patient.put("models/loras/a.safetensors")
    os.mkfifo(patient.layout.manifest)  # whoever opens it waits for a writer, for ever
    report = patient.report(capsys, Deadlines(check_s=10))
    assert severities(report) | {"manifests": "problem"} == severities(report)
    assert [check for check, worst in severities(report).items() if worst == "problem"] == ["manifests"]
    assert "No answer within 10 s" in next(found["message"] for found in report["findings"] if found["check"] == "manifests")


def test_a_volume_whose_servers_are_gone_is_told_within_the_deadline(
    moosefs: MooseFS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moosefs.mounts  # this machine can: otherwise the fixture has skipped, or failed in CI
    with MooseFS(tmp_path / "volume", mounts=1) as volume:
        patient = Patient(volume.mounts[0], tmp_path / "comfyui")
        volume._servers[0].send_signal(signal.SIGSTOP)
        try:
            # The child that asks cannot even be killed until the server goes on.
            (found,) = patient.report(capsys, Deadlines(answer_s=2))["findings"]
        finally:
            volume._servers[0].send_signal(signal.SIGCONT)
        assert (found["severity"], found["check"]) == ("problem", "volume")
        assert "No answer within 2 s" in found["message"]
        volume.kill_mount(0)
        (found,) = patient.report(capsys)["findings"]
        assert os.strerror(errno.ENOTCONN) in found["message"]


# --- the volume ---------------------------------------------------------------------------------


def test_a_network_volume_is_known_for_one(
    moosefs: MooseFS, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = moosefs.mounts[0] / request.node.name
    volume.mkdir()
    patient = Patient(volume, tmp_path / "comfyui")
    patient.put("models/loras/a.safetensors")
    report = patient.report(capsys)
    assert report["ok"]
    said = {found["check"]: found["message"] for found in report["findings"] if found["severity"] == "ok"}
    assert said["volume"].startswith("MooseFS (mfs")
    assert said["volume"].endswith(f"mounted read-write at {moosefs.mounts[0]}")
    assert said["writable"].endswith("whole seconds")
    assert said["locks"].startswith("a process waited for the lock's holder")


def test_a_read_only_volume_is_told_and_what_lies_on_it_as_well(
    moosefs: MooseFS, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = request.node.name
    Patient(moosefs.mounts[0] / name, tmp_path).put("models/loras/a.safetensors")
    island = moosefs.mount(("-o", "ro"))
    report = Patient(island / name, tmp_path / "comfyui").report(capsys)
    assert severities(report)["writable"] == "problem"
    assert severities(report)["locks"] == "note"
    assert report["folders"][0]["files"] == 1
    assert "mounted read-only" in report["findings"][0]["message"]


def test_a_plain_folder_is_a_problem_only_where_a_volume_is_required(patient: Patient) -> None:
    assert patient.only("volume").severity is Severity.NOTE
    assert patient.only("volume", REQUIRE_VOLUME="true").severity is Severity.PROBLEM


MOUNTINFO = r"""
22 1 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/a
30 22 0:30 / /proc rw - proc proc rw
41 22 0:39 / /runpod-volume rw,relatime - fuse.mfs mfs\04310.0.0.1:9421 rw,user_id=0
42 22 0:40 / /mnt/my\040disk ro,relatime shared:1 - nfs4 server:/x rw
43 22 0:41 / /mnt/twice rw - ext4 /dev/old rw
44 22 0:42 / /mnt/twice rw - ext4 /dev/new rw
""".strip()


@pytest.mark.parametrize(
    ("path", "title", "source", "mode", "point"),
    [
        ("/runpod-volume", "MooseFS", "mfs#10.0.0.1:9421", "read-write", "/runpod-volume"),
        ("/runpod-volume/sub", "MooseFS", "mfs#10.0.0.1:9421", "read-write", "/runpod-volume"),
        ("/runpod-volume2", "overlay", "overlay", "read-write", "/"),
        ("/mnt/my disk/x", "nfs4", "server:/x", "read-only", "/mnt/my disk"),
        ("/mnt/twice", "ext4", "/dev/new", "read-write", "/mnt/twice"),
    ],
)
def test_the_mount_of_a_path_is_the_longest_and_last_one(path: str, title: str, source: str, mode: str, point: str) -> None:
    found = find_mount(MOUNTINFO, path)
    assert found
    assert (found.title, found.source, found.mode, found.point) == (title, source, mode, point)


@pytest.mark.parametrize(("free", "severity"), [(500, "problem"), (5_000_000, "note"), (50_000_000, "ok")])
def test_little_space_is_told(patient: Patient, monkeypatch: pytest.MonkeyPatch, free: int, severity: str) -> None:
    values = os.statvfs_result((1000, 1000, 10**9, free, free, 10**6, 10**6, 10**6, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: values)
    (found,) = patient.look("space")
    assert found.severity == severity


def test_few_inodes_are_told(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    values = os.statvfs_result((1000, 1000, 10**9, 10**9, 10**9, 10**6, 10, 10, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: values)
    assert "inodes" in patient.only("space").message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_volume_that_takes_nothing_is_told_with_the_reason(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    found = patient.only("writable")
    assert found.severity is Severity.PROBLEM
    assert os.strerror(number) in found.message
    assert not list(patient.layout.state.iterdir()), "nothing is left behind"


# --- locks --------------------------------------------------------------------------------------


def test_two_processes_get_a_lock_one_after_the_other(patient: Patient) -> None:
    (found,) = patient.look("locks")
    assert found.severity is Severity.OK


def test_locks_that_cannot_be_made_are_told(patient: Patient) -> None:
    (patient.layout.locks).mkdir(parents=True)
    (patient.layout.locks / "doctor.rw").write_text("a file where filelock keeps a folder")
    found = patient.only("locks")
    assert found.severity is Severity.PROBLEM
    assert "doctor.rw" in found.message


class Scripted:
    """A contender that says what it is told to, in place of a process."""

    scripts: ClassVar[list[list[str]]] = []
    said = "the reason"

    def __init__(self, _: str) -> None:
        self._lines = self.scripts.pop(0)

    def next(self, _: float) -> str:
        if not self._lines:
            raise TimeoutError
        return self._lines.pop(0)

    def state(self, until_s: float) -> str:
        while (line := self.next(until_s)) == "waiting":
            pass
        return line

    def tell(self) -> None:
        """Nothing follows from it."""

    def leave(self) -> None:
        """There is no process."""


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (["held"], ["held"], "two processes got the same lock at once"),
        (["held"], ["waiting"], "no process got a lock within"),
        (["waiting"], [], "no process got a lock within"),
        (["held"], ["waiting", "unlocked"], "the reason"),
    ],
)
def test_locks_that_do_not_exclude_or_do_not_hand_over_are_told(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, first: list[str], second: list[str], said: str
) -> None:
    monkeypatch.setattr(Scripted, "scripts", [list(first), list(second)])
    monkeypatch.setattr(lock_check, "_Contender", Scripted)
    found = patient.only("locks")
    assert found.severity is Severity.PROBLEM
    assert said in found.message


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("cut.safetensors", WEIGHTS[:500], "its header says 1000"),
        ("empty.ckpt", b"", "is empty"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n", "Git LFS pointer"),
        ("page.pth", b"\n<!DOCTYPE html><html>Log in</html>", "is a web page"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_a_problem(patient: Patient, name: str, data: bytes, said: str) -> None:
    path = patient.put(f"models/loras/{name}", data)
    patient.put("models/loras/whole.safetensors")
    patient.put("models/loras/readme.txt", b"")
    (found,) = (found for found in patient.look("models") if found.severity is Severity.PROBLEM)
    assert said in found.message
    assert found.paths == (str(path),)


def test_a_volume_full_of_problems_is_told_in_a_few_lines(patient: Patient) -> None:
    for number in range(30):
        patient.put(f"models/loras/{number}.safetensors", WEIGHTS[:500])
    found = [found for found in patient.look("models") if found.severity is Severity.PROBLEM]
    assert len(found) < 10
    assert len({path for one in found for path in one.paths}) == 30


def test_links_that_lead_nowhere_or_out_of_the_volume_are_problems(patient: Patient, tmp_path: Path) -> None:
    patient.put("models/loras/a.safetensors")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(WEIGHTS)
    (patient.layout.models / "loras/away.safetensors").symlink_to(outside)
    (patient.layout.models / "loras/broken.safetensors").symlink_to("nowhere")
    (patient.layout.models / "loras/inside.safetensors").symlink_to("a.safetensors")
    found = [found for found in patient.look("models") if found.severity is Severity.PROBLEM]
    assert [Path(one.paths[0]).name for one in found] == ["away.safetensors", "broken.safetensors"]


@pytest.mark.parametrize("mount", pod_links.NAMES)
def test_links_that_name_the_volume_by_a_mount_are_told_with_the_command_that_mends_them(patient: Patient, mount: str) -> None:
    there = patient.put("ComfyUI/models/loras/a.safetensors")
    (patient.volume / "models").symlink_to(f"{mount}/ComfyUI/models")
    (there.parents[1] / "my vae").symlink_to(f"{mount}/elsewhere")
    patient.put("elsewhere/v.safetensors")
    assert "2 files in 2 folders" in str(patient.look("models"))
    found = [found for found in patient.look("models") if "by its mount" in found.message]
    assert [one.severity for one in found] == [Severity.NOTE] * 2
    for one in found:
        command = one.message.partition(": ")[2]
        assert subprocess.run(command, shell=True, check=True).returncode == 0
    assert (patient.volume / "models/my vae/v.safetensors").read_bytes() == WEIGHTS
    assert not [found for found in patient.look("models") if "by its mount" in found.message]


def test_a_models_folder_that_is_a_link_to_nowhere_is_a_problem(patient: Patient) -> None:
    (patient.volume / "models").symlink_to("/workspace/ComfyUI/models")
    found = patient.only("models")
    assert found.severity is Severity.PROBLEM
    assert f"rm {patient.volume}/models" in found.message


def test_a_file_that_changed_after_it_was_sealed_is_told_apart_from_one_put_there_by_hand(patient: Patient) -> None:
    patient.put("models/loras/sealed.safetensors")
    patient.put("models/loras/changed.safetensors")
    for name in ("sealed", "changed"):
        patient.seal(f"loras/{name}.safetensors")
    os.utime(patient.layout.models / "loras/changed.safetensors", (0, 0))
    patient.put("models/loras/hand.safetensors")
    notes = {found.paths for found in patient.look("models") if found.severity is Severity.NOTE}
    assert notes == {("loras/changed.safetensors",), ("loras/hand.safetensors",)}


@pytest.mark.parametrize(
    ("path", "severity", "said"),
    [
        ("models/x.safetensors", Severity.PROBLEM, "directly in models/"),
        ("models/models/vae/x.safetensors", Severity.PROBLEM, "to models/vae/"),
        ("models/ComfyUI/models/vae/x.safetensors", Severity.PROBLEM, "to models/vae/"),
        ("models/lora/x.safetensors", Severity.NOTE, "models/loras"),
        ("models/VAE/x.safetensors", Severity.NOTE, "models/vae"),
        ("models/loras/x.safetensors.part", Severity.NOTE, "copy under way"),
    ],
)
def test_what_comfyui_does_not_see_under_models_is_told(patient: Patient, path: str, severity: Severity, said: str) -> None:
    patient.put(path)
    assert any(found.severity is severity and said in found.message for found in patient.look("models"))


def test_a_custom_nodes_folder_is_no_mistake(patient: Patient) -> None:
    patient.put("models/LLM/sub/x.safetensors")
    patient.seal("LLM/sub/x.safetensors")
    assert [found.severity for found in patient.look("models")] == [Severity.OK]


def test_a_name_in_two_folders_that_comfyui_reads_as_one_is_told_unless_it_is_one_file(patient: Patient) -> None:
    patient.put("models/diffusion_models/x.safetensors")
    patient.seal("diffusion_models/x.safetensors")
    (patient.layout.models / "unet").symlink_to("diffusion_models")
    patient.seal("unet/x.safetensors")
    assert [found.severity for found in patient.look("models")] == [Severity.OK]
    (patient.layout.models / "unet").unlink()
    patient.put("models/unet/x.safetensors")
    patient.seal("unet/x.safetensors")
    assert "models/unet, from where it is loaded" in patient.only("models").message


# --- seals --------------------------------------------------------------------------------------


def test_seals_without_a_file_unreadable_ones_and_cut_short_publications_are_told(patient: Patient) -> None:
    for name in ("kept", "gone", "garbled"):
        patient.put(f"models/loras/{name}.safetensors")
        patient.seal(f"loras/{name}.safetensors")
    (patient.layout.models / "loras/gone.safetensors").unlink()
    patient.layout.seal("loras", "garbled.safetensors").write_text("{")
    patient.layout.pending_seal("loras", "late.safetensors").write_text("{}")
    notes = [found for found in patient.look("seals") if found.severity is Severity.NOTE]
    assert [found.paths for found in notes] == [
        ("loras/gone.safetensors",),
        (str(patient.layout.seal("loras", "garbled.safetensors")),),
        ("loras/late.safetensors",),
    ]


# --- misplaced ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("checkpoints/x.safetensors", "checkpoints"),
        ("loras/style/x.pt", "loras"),
        ("ComfyUI/models/vae/x.safetensors", "vae"),
        ("apps/ComfyUI/models/unet/deep/x.gguf", "unet"),
        ("ComfyUI/models/LLM/x.safetensors", "LLM"),
    ],
)
def test_weights_where_no_worker_looks_are_a_problem_that_says_where_to(patient: Patient, path: str, to: str) -> None:
    (patient.comfyui / "models/LLM").mkdir(parents=True)
    patient.put(path)
    found = patient.only("misplaced")
    assert found.severity is Severity.PROBLEM
    assert found.message.endswith(f"move to {patient.volume}/models/{to}/.")
    assert found.paths == (path,)


@pytest.mark.parametrize(
    "path",
    [
        "models/vae/x.safetensors",
        ".worker/partial/x/x.safetensors",
        ".cache/hub/x.safetensors",
        "huggingface-cache/hub/models--a--b/snapshots/c/x.safetensors",
        "ComfyUI/custom_nodes/pack/models/vae/x.safetensors",
        "venv/lib/python3.11/site-packages/pack/models/vae/x.pt",
        "outputs/job/x.safetensors",
        "checkpoints/readme.txt",
    ],
)
def test_what_belongs_where_it_is_is_not_called_misplaced(patient: Patient, path: str) -> None:
    patient.put(path)
    assert [found.severity for found in patient.look("misplaced")] == [Severity.OK]


def test_a_link_at_the_volumes_root_to_the_right_folder_is_fine(patient: Patient) -> None:
    patient.put("models/checkpoints/x.safetensors")
    (patient.volume / "checkpoints").symlink_to("models/checkpoints")
    assert [found.severity for found in patient.look("misplaced")] == [Severity.OK]


def test_a_models_folder_that_is_a_link_into_comfyuis_is_not_misplaced(patient: Patient) -> None:
    patient.put("ComfyUI/models/checkpoints/x.safetensors")
    patient.layout.models.symlink_to("ComfyUI/models")
    assert [found.severity for found in patient.look("misplaced")] == [Severity.OK]


def test_weights_elsewhere_are_only_noted(patient: Patient) -> None:
    patient.put("training/run1/x.safetensors")
    assert patient.only("misplaced").severity is Severity.NOTE


def test_a_volume_with_no_end_of_folders_is_not_walked_to_the_end(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "_WALKED_FOLDERS", 20)
    for number in range(30):
        (patient.volume / f"data/{number}").mkdir(parents=True)
    assert "first 20 folders" in patient.only("misplaced").message


# --- downloads ----------------------------------------------------------------------------------


@contextlib.contextmanager
def half_download(patient: Patient, root: Path) -> Iterator[None]:
    """A real download of a real store, held in the middle until it is left; then it has broken off."""
    (root / "org/repo").mkdir(parents=True)
    (root / "org/repo/x.bin").write_bytes(bytes(8 << 20))
    with StandIn(root) as hub:
        hub.fault("stall", origin="cdn", after_bytes=2 << 20, count=None)
        store = Store(
            patient.layout,
            Hub(hub.endpoint, Network(credentials(hub.endpoint, None, None))),
            "pod-7",
            tuning=RangeTuning(buffer_bytes=2 << 20),
        )
        cancel = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(store.ensure, parse_spec("loras", "hf://org/repo/x.bin"), cancel=cancel)
            try:
                wait_for(lambda: "4.2 MB of 8.4 MB" in patient.look("downloads")[0].message)
                yield
            finally:
                cancel.set()
            with pytest.raises(EnsureCancelled):
                fetching.result(20)


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait for what another thread does on its own."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.1)


def test_a_download_under_way_is_told_with_who_fetches_it_and_one_that_broke_off_with_how_long_ago(
    patient: Patient, tmp_path: Path
) -> None:
    with half_download(patient, tmp_path / "hub"):
        (found,) = patient.look("downloads")
        assert found.severity is Severity.OK
        assert "4.2 MB of 8.4 MB: worker pod-7 downloads it" in found.message
    for path in patient.layout.state.rglob("*"):
        os.utime(path, (time.time() - 3 * HOUR_S,) * 2)
    found = patient.only("downloads")
    assert "4.2 MB of 8.4 MB: worker pod-7 stopped 3 h ago" in found.message
    (part,) = found.paths
    pattern = Path(found.message.rpartition(" ")[2])
    assert list(pattern.parent.glob(pattern.name)) == [Path(part).parent], (
        "what is to be removed can be copied from the sentence"
    )


def test_what_is_left_of_a_model_that_is_there_can_go(patient: Patient) -> None:
    key = "c0ffee" * 10 + "0000"
    patient.put(f".worker/partial/{key}/1.part", bytes(10))
    patient.put(f".worker/partial/{key}/1.journal", b'{"v": 1, "size": 10, "ranges": [[0, 4]]}')
    write_seal(patient.layout.seal("loras", "x.safetensors"), Seal(size=10, mtime=1, sha256=key))
    for path in patient.layout.partial(key).iterdir():
        os.utime(path, (time.time() - 3 * HOUR_S,) * 2)
    assert "stopped 3 h ago, and the model is complete now: remove" in patient.only("downloads").message


def test_a_record_without_its_file_is_told(patient: Patient) -> None:
    young = patient.put(".worker/partial/abc/1.journal")
    old = patient.put(".worker/partial/abc/2.journal")
    os.utime(old, (0, 0))
    (found,) = [found for found in patient.look("downloads") if found.severity is Severity.NOTE]
    assert found.message.startswith("1 record of downloads that no longer exist")
    assert found.paths == (str(old),)
    assert young.exists()


def test_leftovers_that_nobody_can_go_on_with_are_told(patient: Patient) -> None:
    patient.put(".worker/partial/abc/1.part")
    patient.put(".s3compat_uploads/upload-1/part.1")
    holder = patient.put(".worker/locks/abc.rw/holders/1", b"dead")
    os.utime(holder, (0, 0))
    said = [found.message for found in patient.look("downloads") if found.severity is Severity.NOTE]
    assert len(said) == 3
    assert "no journal" in said[0]
    assert "1 lock of workers that are gone" in said[1]
    assert "upload-1" in said[2]


# --- manifests and the host cache ---------------------------------------------------------------


def test_everything_wrong_with_every_list_is_told_at_once(patient: Patient) -> None:
    patient.put("models.toml", b'[[model]]\nsource = "nonsense"\nfolder = "../x"\nname = "x"\n')
    found = patient.look("manifests", MODELS="loras", MODELS_MANIFEST="/no/such/manifest.toml")
    assert all(one.severity is Severity.PROBLEM for one in found)
    said = [one.message for one in found]
    assert sum("models.toml: line 2" in text for text in said) == 1
    assert sum("models.toml: line 3" in text for text in said) == 1
    assert any("/no/such/manifest.toml" in text for text in said)
    assert any(text.startswith("MODELS:") for text in said)


def test_what_the_manifest_names_and_the_volume_lacks_is_told(patient: Patient) -> None:
    patient.put("models/loras/here.safetensors")
    models = "loras=hf://org/repo/here.safetensors loras=hf://org/repo/missing.safetensors"
    (found,) = patient.look("manifests", MODELS=models)
    assert found.message == "2 models, 1 still to be downloaded: loras/missing.safetensors"


def test_the_machines_cache_is_told(patient: Patient) -> None:
    assert [found.message for found in patient.look("host cache")] == ["none on this machine"]
    patient.put("huggingface-cache/hub/models--org--name/refs/main", b"c0ffee")
    assert [found.message for found in patient.look("host cache")] == ["1 repository: org/name"]


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Every process that a test's command started has ended, or is named here."""
    yield
    mine = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    children = mine.read_text().split() if mine.exists() else []  # a kernel can be built without
    left = [pid for pid in children if b"worker.doctor." in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert left == []


# --- making room --------------------------------------------------------------------------------


def sealed_with_a_source(patient: Patient, name: str, size: int) -> None:
    path = patient.put(f"models/loras/{name}", b"\x01" * size)
    seal = Seal(size=size, mtime=whole_mtime(path.stat()), sha256="ab" * 32, repo="org/repo", file=name)
    write_seal(patient.layout.seal("loras", name), seal)
    os.utime(patient.layout.seal("loras", name), (1, 1))


def test_what_would_be_removed_next_is_told_where_models_are_removed(patient: Patient) -> None:
    sealed_with_a_source(patient, "a.bin", 1000)
    sealed_with_a_source(patient, "b.bin", 2000)
    assert patient.look("room") == []
    fits, kept = patient.look("room", VOLUME_KEEP_GB="1", MODELS="loras=hf://org/repo/b.bin")
    assert "3.0 kB taken by models, of 1.0 GB" in fits.message
    assert "next to go: loras/a.bin (1.0 kB, used" in fits.message
    assert kept.paths == ("loras/b.bin: a manifest names it",)
    assert "to remove: loras/b.bin" in patient.only("room", VOLUME_KEEP_GB="0.000001").message


def test_a_manifest_that_keeps_everything_is_a_problem(patient: Patient) -> None:
    patient.put("models.toml", b"[[")
    sealed_with_a_source(patient, "a.bin", 1000)
    found = patient.only("room", VOLUME_KEEP_GB="1")
    assert (found.severity, "No model is removed" in found.message) == (Severity.PROBLEM, True)
