"""`python -m worker doctor`: the volume as it is, each finding with what to do. Touches the disk, starts processes.

Only a child process touches the volume. What waits for a network file system whose server is gone cannot be interrupted, and
the process it belongs to cannot even be killed (seen on MooseFS: state D until the server is back), so threads alone would
leave this command hanging at its end. The child runs the checks in threads and says what each found; this process prints it,
and leaves the child behind where it must.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import secrets
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from worker.comfy.custom_nodes import read_failures
from worker.errors import FileIncomplete, ManifestInvalid
from worker.models.disk import FULL, READ_ONLY, check_whole
from worker.models.layout import Layout
from worker.models.links import ALIASES
from worker.models.locks import Locks, Timing
from worker.models.names import IN_FLIGHT, Scan
from worker.models.partial import Ranges
from worker.models.progress import size_text
from worker.models.seals import read_seal, stat_file
from worker.models.sources import Sources
from worker.models.spec import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized

    from worker.models.names import Folder
    from worker.models.spec import ModelSpec
    from worker.settings import Settings

PROBLEM_FOUND: Final = 1

FOLDERS: Final = frozenset(
    {
        *("audio_encoders", "background_removal", "checkpoints", "classifiers", "clip", "clip_vision", "configs", "controlnet"),
        *("detection", "diffusers", "diffusion_models", "embeddings", "frame_interpolation", "geometry_estimation", "gligen"),
        *("hypernetworks", "latent_upscale_models", "loras", "model_patches", "optical_flow", "photomaker", "style_models"),
        *("t2i_adapter", "text_encoders", "unet", "upscale_models", "vae", "vae_approx"),
    }
)
"""The folders that ComfyUI's own loaders read. Custom nodes add more, so that another name is no mistake by itself."""

_LOW_BYTES: Final = 1_000_000_000
_SCARCE_BYTES: Final = 20_000_000_000
_SHOWN: Final = 3
_SHOWN_PROBLEMS: Final = 8
_LOOKED_AT: Final = 5_000  # files: a stat and a seal for each cost some ms on a network volume
_WALKED_FOLDERS: Final = 5_000
_WALKED_DEPTH: Final = 6
_NEVER_MODELS: Final = frozenset({"custom_nodes", "site-packages", "dist-packages", "node_modules", "__pycache__", "outputs"})
_SURE_SUFFIXES: Final = (".safetensors", ".sft", ".gguf", ".ckpt")
_ACTIVE_S: Final = 60.0


class Severity(StrEnum):
    """How much a finding matters: only a problem makes the command fail."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found: a sentence with what to do; `paths` are all it is about, the sentence names a few."""

    severity: Severity
    message: str
    paths: tuple[str, ...] = ()
    check: str = ""


@dataclass(frozen=True, slots=True)
class FolderCount:
    """What one folder of models holds; `size_bytes` and `sealed` are None where there are too many files to look at each."""

    folder: str
    files: int
    size_bytes: int | None
    sealed: int | None


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the volume may take to answer at all, and each check after that."""

    answer_s: float = 10.0
    check_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at, as it is handed to the child."""

    volume: str
    comfyui_models: str
    manifest: str | None
    models: str | None
    require_volume: bool
    deadlines: Deadlines = field(default_factory=Deadlines)

    @classmethod
    def of(cls, settings: Settings, deadlines: Deadlines) -> Subject:
        """What the settings say."""
        comfyui_models = str(settings.base_dir / "models")
        manifest, models = settings.models_manifest, settings.models
        return cls(str(settings.volume_path), comfyui_models, manifest, models, settings.require_volume, deadlines)


# --- the command --------------------------------------------------------------------------------


def run(argv: Sequence[str], settings: Settings, deadlines: Deadlines | None = None) -> int:
    """Print what is found; 0 when there is no problem, 1 when there is one, 2 for wrong arguments; in bounded time."""
    parser = argparse.ArgumentParser(
        prog="python -m worker doctor", description="The volume as it is, each finding with what to do."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every path")
    try:
        options = parser.parse_args(list(argv))
    except SystemExit as exc:
        return int(exc.code or 0)
    findings, folders = examine(Subject.of(settings, deadlines or Deadlines()))
    healthy = all(finding.severity is not Severity.PROBLEM for finding in findings)
    if options.json:
        report = {"findings": [asdict(found) for found in findings], "folders": [asdict(found) for found in folders]}
        text = json.dumps({"volume": str(settings.volume_path), "ok": healthy, **report}, indent=2)
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        text = "\n".join(_lines(findings, folders, width, colour=sys.stdout.isatty()))
    print(text)  # noqa: T201 - the command's output
    return 0 if healthy else PROBLEM_FOUND


def examine(subject: Subject) -> tuple[list[Finding], list[FolderCount]]:
    """Everything that the checks find, in their order. A check that hangs is a finding; so is a child that says nothing."""
    child = _Child("_probe_in_child")
    child.tell(json.dumps(asdict(subject)))
    until_s = time.monotonic() + subject.deadlines.answer_s + subject.deadlines.check_s + 5
    findings: list[Finding] = []
    folders: list[FolderCount] = []
    said: list[str] = []
    try:
        while (line := child.line(until_s)) != _END:
            if not line.startswith("{"):
                said.append(line)
                continue
            found = json.loads(line)
            findings += [Finding(Severity(item.pop("severity")), **item) for item in found["findings"]]
            folders += [FolderCount(**item) for item in found["folders"]]
    except (TimeoutError, EOFError) as exc:
        why = "hangs" if isinstance(exc, TimeoutError) else f"ended: {' '.join(said)[-300:]}"
        findings.append(_problem(f"The process that looks at {subject.volume} {why}.", check="volume"))
    finally:
        child.leave()
    return findings, folders


# --- processes ----------------------------------------------------------------------------------

_END: Final = "end"
_RUN: Final = "import sys; sys.path.insert(0, sys.argv[1]); from worker import doctor; getattr(doctor, sys.argv[2])()"


class _Child:
    """A process that runs a function of this module; its lines are read with a deadline, and nothing ever waits for its end."""

    def __init__(self, function: str, *arguments: str) -> None:
        home = str(Path(__file__).parent.parent)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, on this module
            [sys.executable, "-c", _RUN, home, function, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # whoever reads this command's own output must not wait for a child that cannot end
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def tell(self, text: str = "") -> None:
        """Give it this, then the end of its input."""
        stream = self._process.stdin
        if stream and not stream.closed:
            with contextlib.suppress(BrokenPipeError):
                stream.write(text)
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def line(self, until_s: float) -> str:
        """Its next line. Raises `TimeoutError`, and `EOFError` when it has ended."""
        try:
            line = self._lines.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise EOFError
        return line

    def leave(self) -> None:
        """End it, or go on without it."""
        self.tell()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)


def _probe_in_child() -> None:
    """The child: run every check, say what it found, and end whatever still hangs."""
    values = json.loads(sys.stdin.read())
    subject = Subject(**{**values, "deadlines": Deadlines(**values["deadlines"])})
    probe = Probe(subject)
    for found in _checked(probe):
        print(json.dumps(found), flush=True)  # noqa: T201 - the line to the parent
    print(_END, flush=True)  # noqa: T201 - as above
    os._exit(0)  # the interpreter's own end would wait for threads that cannot end


def _checked(probe: Probe) -> Iterator[dict[str, Any]]:
    """What each check found, in order: first whether the volume answers at all, then everything else at once."""
    deadlines = probe.subject.deadlines
    answers = _Check("volume", probe.volume)
    yield answers.result(time.monotonic() + deadlines.answer_s)
    if not probe.answers:
        return
    checks = [_Check(name, look) for name, look in probe.checks.items()]
    until_s = time.monotonic() + deadlines.check_s
    for check in checks:
        result = check.result(until_s)
        yield result | ({"folders": [asdict(found) for found in probe.folders]} if check.name == "models" else {})


class _Check:
    """One check in a thread of its own."""

    def __init__(self, name: str, look: Callable[[], Iterable[Finding]]) -> None:
        self.name = name
        self._look = look
        self._findings: list[Finding] = []
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for found in self._look():
                self._findings.append(found)
        except OSError as exc:
            where = f" at {exc.filename}" if exc.filename else ""
            self._findings.append(_problem(f"This check broke off{where} ({exc.strerror or exc}): look at the volume."))
        except Exception as exc:  # noqa: BLE001 - a check that has a defect must not hide what the others found
            self._findings.append(_problem(f"This check itself failed ({exc!r}): a defect of the doctor."))

    def result(self, until_s: float) -> dict[str, Any]:
        """What it found, and that it hangs if it does, by then."""
        self._thread.join(max(0.0, until_s - time.monotonic()))
        findings = list(self._findings)
        if self._thread.is_alive():
            waited_s = time.monotonic() - self._began_s
            text = (
                f"No answer within {waited_s:.0f} s: the volume hangs or is very slow. If other workers are fine, end this one."
            )
            findings.append(_problem(text))
        return {"findings": [asdict(replace(found, check=self.name)) for found in findings], "folders": []}


def _ok(message: str) -> Finding:
    return Finding(Severity.OK, message)


def _note(message: str, paths: Iterable[object] = ()) -> Finding:
    return Finding(Severity.NOTE, message, tuple(map(str, paths)))


def _listing(severity: Severity, text: str, names: Sequence[str]) -> Finding:
    """A finding about several things, the first few named, all of them in `paths`."""
    return Finding(severity, f"{text}: {_some(names)}", tuple(names))


def _problem(message: str, paths: Iterable[object] = (), check: str = "") -> Finding:
    return Finding(Severity.PROBLEM, message, tuple(map(str, paths)), check)


# --- the checks ---------------------------------------------------------------------------------


class Probe:
    """The checks of one volume, each a generator of findings. They run in threads and share nothing but what never changes."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.layout = Layout(Path(subject.volume))
        self.answers = False
        self.folders: list[FolderCount] = []

    @property
    def checks(self) -> dict[str, Callable[[], Iterable[Finding]]]:
        """What is looked at once the volume answers, in the order in which it is told."""
        return {
            "space": self.space,
            "writable": self.writable,
            "locks": self.locks,
            "models": self.models,
            "seals": self.seals,
            "misplaced": self.misplaced,
            "downloads": self.downloads,
            "manifests": self.manifests,
            "host cache": self.host_cache,
            "custom nodes": self.custom_nodes,
        }

    def volume(self) -> Iterator[Finding]:
        """Whether there is one, what it is, and whether it answers."""
        root = self.layout.root
        try:
            os.listdir(root)  # noqa: PTH208 - a stat may be answered from a cache
        except (FileNotFoundError, NotADirectoryError):
            yield _problem(
                f"There is no volume at {root}: attach one to the endpoint, or set VOLUME_PATH to where it is mounted."
            )
            return
        except OSError as exc:
            yield _problem(f"{root} is there and cannot be read ({exc.strerror}): end this worker, its host lost the volume.")
            return
        self.answers = True
        mount = find_mount(Path("/proc/self/mountinfo").read_text("utf-8"), os.path.realpath(root))
        if mount is None or mount.point == "/":
            text = f"{root} is a folder on this container's own disk, gone with the container: attach a network volume."
            yield _problem(text) if self.subject.require_volume else _note(text)
        else:
            yield _ok(f"{mount.title} ({mount.source}), mounted {mount.mode} at {mount.point}")

    def custom_nodes(self) -> Iterator[Finding]:
        """The volume's nodes, and those that ComfyUI could not import when a worker started last."""
        folder = self.layout.root / "custom_nodes"
        failures = read_failures(self.layout.root)
        for failed in failures:
            text = f"The custom node '{failed.name}' could not be imported ({failed.reason}): add what it lacks to its"
            yield _problem(f"{text} requirements.txt, or remove it.", [folder / failed.name])
        if folder.is_dir() and not failures:
            yield _ok(f"{_count(_names_in(folder), 'custom node')} on the volume, none known to fail")

    def space(self) -> Iterator[Finding]:
        """Bytes and inodes, as far as the file system tells."""
        found = os.statvfs(self.layout.root)
        free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        text = f"{size_text(free)} free of {size_text(total)}, less if there is a quota"
        if free < _LOW_BYTES:
            yield _problem(f"{text}: enlarge the volume or remove models.")
        elif free < _SCARCE_BYTES:
            yield _note(f"{text}: not enough for a large model.")
        else:
            yield _ok(text)
        if found.f_files and found.f_favail * 100 < found.f_files:
            yield _problem(f"{found.f_favail} of {found.f_files} inodes are free: remove small files.")

    def writable(self) -> Iterator[Finding]:
        """A file is really written, flushed, renamed and removed."""
        began_s = time.monotonic()
        try:
            whole_seconds = _write_and_remove(self.layout.state)
        except OSError as exc:
            yield _not_writable(self.layout.state, exc)
            return
        took_ms = (time.monotonic() - began_s) * 1000
        mtimes = "whole seconds" if whole_seconds else "fractions of a second"
        yield _ok(f"1 MiB written, flushed, renamed and removed in {took_ms:.0f} ms; mtimes are kept in {mtimes}")

    def locks(self) -> Iterator[Finding]:
        """Two processes want one lock, as two workers would that miss the same model."""
        if not os.access(self.layout.root, os.W_OK):
            yield _note("Locks need a volume that can be written; without them two workers may fetch the same model.")
            return
        yield _contest(str(self.layout.root))

    def models(self) -> Iterator[Finding]:
        """What lies under `models/`, and what of it ComfyUI does not see or cannot load."""
        root = self.layout.models
        if not root.is_dir():
            yield _note(f"There is no {root} yet: it comes with the first download, or put files under models/<folder>/.")
            return
        scan = Scan((os.path.realpath(self.layout.root), os.path.realpath(root)), leave_out="")
        tree = scan.root(str(root))
        files = list(_files_of(tree))
        looked = len(files) <= _LOOKED_AT
        if looked:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda file: file.look(self.layout), files))
        self.folders = list(_counts(tree, files))
        yield _ok(
            f"{_count(files, 'file')} in {_count(self.folders, 'folder')}{'' if looked else ', too many to look at each'}"
        )
        yield from _capped([(str(problem), problem.path) for problem in sorted(scan.problems, key=lambda found: found.path)])
        yield from self._of_files(files)
        yield from self._of_folders(tree)

    def _of_files(self, files: Sequence[_File]) -> Iterator[Finding]:
        yield from _capped([(file.trouble, str(self.layout.models / file.path)) for file in files if file.trouble])
        by_hand = [file.path for file in files if file.sealed is False and not (file.changed or file.trouble)]
        if by_hand:
            yield _listing(Severity.NOTE, f"{_count(by_hand, 'file')} put there by hand, used as is, never checked", by_hand)
        changed = [file.path for file in files if file.changed and not file.trouble]
        if changed:
            yield _listing(Severity.NOTE, f"{_count(changed, 'file')} changed after being sealed, to be checked again", changed)

    def _of_folders(self, tree: Folder) -> Iterator[Finding]:
        loose = sorted(name for name in tree.files if name.lower().endswith(WEIGHT_SUFFIXES))
        if loose:
            text = f"{_count(loose, 'file')} directly in models/, where ComfyUI does not look; move each into its folder"
            yield _listing(Severity.PROBLEM, text, loose)
        for top in sorted(tree.folders.keys() - FOLDERS):
            if meant := _meant(top):
                yield _note(
                    f"models/{top} is no folder of ComfyUI's own loaders, models/{meant} is: rename it if that was meant."
                )
            for relative, folder in tree.folders[top].below(top):
                *_, above, kind = "/", *relative.split("/")
                if above == "models" and kind in FOLDERS and folder.count:
                    yield _problem(
                        f"models/{relative}/ lies too deep: move its {folder.count} files to models/{kind}/.", [folder.path]
                    )
        busy = [path for relative, folder in tree.below("models") for path in _in_flight(relative, folder.path)]
        if busy:
            text = f"{_count(busy, 'file')} named like a copy under way and hidden from ComfyUI; finish or remove"
            yield _listing(Severity.NOTE, text, busy)
        for first, second in ALIASES:
            ours, theirs = _names_below(tree, first), _names_below(tree, second)
            if twins := sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]):
                text = f"{_count(twins, 'name')} both in models/{first}, from where it is loaded, and in models/{second}"
                yield _listing(Severity.NOTE, text, twins)

    def seals(self) -> Iterator[Finding]:
        """Seals that speak of no file, and publications that were cut short."""
        seals = [Path(folder, name) for folder, _, names in os.walk(self.layout.seals) for name in names if name[0] != "."]
        sealed = [seal for seal in seals if seal.suffix == ".json"]
        yield _ok(_count(sealed, "seal") if sealed else "none yet")
        gone = [name for seal in sealed if stat_file(self.layout.models / (name := self._sealed_by(seal))) is None]
        if gone:
            text = f"{_count(gone, 'seal')} whose file somebody removed; fetched again when wanted"
            yield _listing(Severity.NOTE, text, gone)
        unreadable = [str(seal) for seal in sealed if read_seal(seal) is None]
        if unreadable:
            text = f"{_count(unreadable, 'seal')} that cannot be read; remove it, its file then counts as put there by hand"
            yield _listing(Severity.NOTE, text, unreadable)
        pending = [self._sealed_by(seal.with_suffix("")) for seal in seals if seal.suffix == ".pending"]
        if pending:
            text = f"{_count(pending, 'publication')} under way or cut short; the next worker that wants it completes it"
            yield _listing(Severity.NOTE, text, pending)

    def _sealed_by(self, seal: Path) -> str:
        return seal.relative_to(self.layout.seals).as_posix().removesuffix(".json")

    def misplaced(self) -> Iterator[Finding]:
        """Weights where people put them and no worker looks."""
        known = FOLDERS.union(_names_in(self.layout.models), _names_in(Path(self.subject.comfyui_models)))
        misplaced: dict[tuple[str, str], list[str]] = {}
        stray: list[str] = []
        walk = _Walk(self.layout)
        for parts, names in walk:
            if belongs := _belongs(parts, known):
                found = misplaced.setdefault(belongs, [])
                found += ["/".join((*parts, name)) for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
            else:
                stray += ["/".join((*parts, name)) for name in names if name.lower().endswith(_SURE_SUFFIXES)]
        misplaced = {key: found for key, found in misplaced.items() if found}
        for (group, folder), found in sorted(misplaced.items()):
            to = self.layout.models / folder
            yield _problem(f"{_count(found, 'model file')} in {group}/, where no worker looks: move to {to}/.", found)
        if stray:
            text = f"{_count(stray, 'model file')} outside models/, where no worker looks; move those that workflows use"
            yield _listing(Severity.NOTE, text, stray)
        if walk.cut_short:
            yield _note(f"Only the first {_WALKED_FOLDERS} folders outside models/ were looked at.")
        if not (misplaced or stray):
            yield _ok("no weights outside models/")

    def downloads(self) -> Iterator[Finding]:
        """What is half there: how far it is, who fetches it, or how long ago it broke off."""
        now_s = self._now_s()
        parts = [part for folder in _entries(self.layout.partials) for part in sorted(folder.glob("*.part"))]
        if not parts:
            yield _ok("none under way, none broken off")
        for part in parts:
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                yield self._partial(part, now_s)
        holders = [holder for lock in _entries(self.layout.locks) for holder in _entries(lock / "holders")]
        stale = [str(holder) for holder in holders if _age_s(holder, now_s) > _ACTIVE_S]
        if stale:
            text = f"{_count(stale, 'lock')} of workers that are gone: nothing to do, the next one takes over in 30 s."
            yield _note(text, stale)
        uploads = [upload.name for upload in _entries(self.layout.root / ".s3compat_uploads")]
        if uploads:
            text = f"{_count(uploads, 'upload')} through S3 not completed; complete or abort it to have the space back"
            yield _listing(Severity.NOTE, text, uploads)

    def _partial(self, part: Path, now_s: float) -> Finding:
        journal, key = part.with_suffix(".journal"), part.parent.name
        size_bytes = part.stat().st_size
        try:
            done_bytes = Ranges((start, end) for start, end in json.loads(journal.read_bytes())["ranges"]).total
        except (OSError, ValueError, TypeError, KeyError):
            return _note(f"{part} has no journal to go on with: remove it.", [part])
        holder = Locks(self.layout, _LOCK).holder(key)
        by = f"worker {holder.by}" if holder else "a worker"
        amount = f"{key[:12]}, {size_text(done_bytes)} of {size_text(size_bytes)}"
        age_s = min(_age_s(journal, now_s), _age_s(self.layout.lock_progress(key), now_s))
        if age_s <= _ACTIVE_S:
            rate = f" at {size_text(int(holder.bytes_per_s))}/s" if holder else ""
            return _ok(f"{amount}: {by} fetches it{rate}")
        folder = part.parent.with_name(f"{key[:12]}*")
        text = (
            f"{amount}: {by} broke off {_duration(age_s)} ago, the next one goes on from there. If nobody will, remove {folder}"
        )
        return _note(text, [part])

    def _now_s(self) -> float:
        """The volume's own clock, by which its files are dated; this machine's where nothing can be written."""
        with contextlib.suppress(OSError):
            return _touch_and_remove(self.layout.state)
        return time.time()

    def manifests(self) -> Iterator[Finding]:
        """Whether the lists of models can be read, and what they name that is not there."""
        subject = self.subject
        lists: list[dict[str, Any]] = [
            {"volume_manifest": self.layout.manifest},
            {"manifest": subject.manifest},
            {"models": subject.models},
        ]
        specs: list[ModelSpec] = []
        wrong = False
        for one in lists:
            try:
                specs += Sources.read(**one).manifest()
            except ManifestInvalid as exc:
                wrong = True
                for problem in exc.problems:
                    yield _problem(f"{exc.where}: {problem}", [exc.where])
        names = {f"{spec.folder}/{spec.name}" for spec in specs}
        missing = sorted(name for name in names if stat_file(self.layout.models / name) is None)
        if missing:
            yield _ok(f"{_count(names, 'model')}, {len(missing)} still to be fetched: {_some(missing)}")
        elif names:
            yield _ok(f"{_count(names, 'model')}, all there")
        elif not wrong:
            yield _ok("no model in models.toml, MODELS_MANIFEST or MODELS")

    def host_cache(self) -> Iterator[Finding]:
        """What RunPod put on this machine: used before anything is fetched."""
        repos = [entry.name.partition("--")[2].replace("--", "/") for entry in _entries(self.layout.host_cache)]
        repos = [repo for repo in repos if repo]
        yield _ok(f"{_count(repos, 'repository')}: {_some(repos)}" if repos else "none on this machine")


def _capped(troubles: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """A problem for each sentence and its path; a volume full of them must not hide the rest."""
    for text, path in troubles[:_SHOWN_PROBLEMS]:
        yield _problem(text, [path])
    if rest := [path for _, path in troubles[_SHOWN_PROBLEMS:]]:
        yield _listing(Severity.PROBLEM, f"{len(rest)} more like these (--json names all)", rest)


# --- what the checks are made of ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of `/proc/self/mountinfo`."""

    point: str
    kind: str
    source: str
    mode: str

    @property
    def title(self) -> str:
        """What people call the file system."""
        return "MooseFS" if self.kind.startswith("fuse") and self.source.startswith("mfs") else self.kind


def find_mount(mountinfo: str, path: str) -> Mount | None:
    """The mount that a path with no links in it lies on: the last one made on the longest point above it."""
    found: Mount | None = None
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kinds = head.split(" "), tail.split(" ")
        point = _unescaped(fields[4])
        above = point in {"/", path} or path.startswith(f"{point}/")
        if above and (found is None or len(point) >= len(found.point)):
            options = {*fields[5].split(","), *kinds[2].split(",")}
            found = Mount(point, kinds[0], _unescaped(kinds[1]), "read-only" if "ro" in options else "read-write")
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _write_and_remove(folder: Path) -> bool:
    """Write a file as a download does; whether the file system keeps whole seconds. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".doctor.{secrets.token_hex(4)}.tmp"
    renamed = path.with_suffix(".renamed.tmp")
    try:
        with path.open("xb") as stream:
            stream.write(bytes(1 << 20))
            stream.flush()
            os.fsync(stream.fileno())
        path.replace(renamed)
        os.utime(renamed, ns=(1_500_000_000_123_456_789, 1_500_000_000_123_456_789))
        return renamed.stat().st_mtime_ns % 1_000_000_000 == 0
    finally:
        path.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)


def _touch_and_remove(folder: Path) -> float:
    path = folder / f".doctor.{secrets.token_hex(4)}.tmp"
    try:
        path.touch()
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _not_writable(folder: Path, exc: OSError) -> Finding:
    reason = exc.strerror or str(exc)
    if exc.errno in FULL:
        return _problem(f"{folder} takes no more ({reason}): enlarge the volume or its quota, or remove models.")
    if exc.errno in READ_ONLY:
        return _problem(
            f"{folder} cannot be written ({reason}): what is missing goes to the container's disk; mount it writable."
        )
    return _problem(f"{folder} cannot be written ({reason}): look at the volume.")


# --- locks

_LOCK: Final = "doctor"
_CONTEST_S: Final = 20.0
# Short times: if this command is killed, the next one need not wait for its lock.
_TIMING: Final = Timing(heartbeat_s=1.0, stale_s=5.0, poll_s=0.05, attempt_s=0.2, patience_s=60.0, lone_patience_s=0.0)


def _contest(root: str) -> Finding:
    until_s = time.monotonic() + _CONTEST_S
    first, second = _Contender(root), None
    try:
        if (state := first.state(until_s)) != "held":
            return _no_locks(f"the file system has none of the kind that is needed; {first.said or state}")
        second = _Contender(root)
        if second.next(until_s) != "waiting":
            return _no_locks("two processes got the same lock at once")
        first.tell()
        began_s = time.monotonic()
        if (state := second.state(until_s)) != "held":
            return _no_locks(second.said or state)
        took_ms = (time.monotonic() - began_s) * 1000
    except TimeoutError:
        return _no_locks(f"no process got a lock within {_CONTEST_S:g} s")
    except EOFError:
        return _no_locks(f"a process that wanted one ended: {first.said}{second.said if second else ''}"[:500])
    finally:
        first.leave()
        if second:
            second.leave()
    return _ok(f"a process waited for one that held the lock, and had it {took_ms:.0f} ms after it was let go")


def _no_locks(reason: str) -> Finding:
    return _problem(f"Locks do not work here ({reason}): models stay correct, but workers may fetch the same one twice.")


class _Contender(_Child):
    """One of two processes that want the same lock. What it says besides is kept in `said`."""

    def __init__(self, root: str) -> None:
        super().__init__("_contend_in_child", root)
        self.said = ""

    def next(self, until_s: float) -> str:
        """`waiting`, `held` or `unlocked`."""
        while (line := self.line(until_s)) not in {"waiting", "held", "unlocked"}:
            self.said = f"{self.said} {line}".strip()
        return line

    def state(self, until_s: float) -> str:
        """How its wait ended."""
        while (line := self.next(until_s)) == "waiting":
            pass
        return line


def _contend_in_child() -> None:
    """Want the lock as a worker does, say how that goes, and hold it until there is no more input."""
    said: set[str] = set()

    def say(word: str) -> None:
        if word not in said:
            said.add(word)
            print(word, flush=True)  # noqa: T201 - the line to the parent

    locks = Locks(Layout(Path(sys.argv[3])), _LOCK, _TIMING)
    with locks.hold(_LOCK, published=lambda: False, cancel=threading.Event(), on_wait=lambda _: say("waiting")) as hold:
        say(hold.state)
        sys.stdin.read()


# --- files


@dataclass(slots=True)
class _File:
    """A file under `models/`. `sealed` is None until somebody looked; `trouble` is why it cannot be loaded."""

    path: str
    size_bytes: int = 0
    sealed: bool | None = None
    changed: bool = False
    trouble: str | None = None

    def look(self, layout: Layout) -> None:
        """Compare it with its seal; without a fitting one, see that it is whole as far as its header tells."""
        path = layout.models / self.path
        found = stat_file(path)
        if found is None:
            return
        self.size_bytes = found.st_size
        seal = read_seal(layout.seals / f"{self.path}.json")
        self.sealed = seal is not None and seal.size == found.st_size and (seal.mtime is None or seal.fits(found))
        self.changed = seal is not None and not self.sealed
        if not self.sealed and self.path.lower().endswith(WEIGHT_SUFFIXES):
            self.trouble = _trouble(path, found.st_size)


def _trouble(path: Path, size_bytes: int) -> str | None:
    try:
        with path.open("rb") as stream:
            head = stream.read(64).lstrip().lower()
        if head.startswith(b"version https://git-lfs"):
            return f"{path} is a Git LFS pointer, not the weights: fetch the file itself in its place."
        if head.startswith((b"<!doctype", b"<html", b"<?xml")):
            return f"{path} is a web page, not weights: its download needed a login; remove it and fetch it again."
        if not size_bytes:
            return f"{path} is empty: wait for the copy to finish, or remove it to have it fetched."
        check_whole(path, size_bytes)
    except FileIncomplete as exc:
        return str(exc)
    except OSError as exc:
        return f"{path} cannot be read ({exc.strerror}): look at its permissions."
    return None


def _files_of(tree: Folder) -> Iterator[_File]:
    for top, folder in sorted(tree.folders.items()):
        for relative, below in folder.below(top):
            yield from (_File(f"{relative}/{name}") for name in sorted(below.files))


def _counts(tree: Folder, files: Sequence[_File]) -> Iterator[FolderCount]:
    looked = len(files) <= _LOOKED_AT
    for top in sorted(tree.folders):
        here = [file for file in files if file.path.startswith(f"{top}/")]
        if here:
            size_bytes, sealed = sum(file.size_bytes for file in here), sum(bool(file.sealed) for file in here)
            yield FolderCount(top, len(here), size_bytes if looked else None, sealed if looked else None)


def _names_below(tree: Folder, top: str) -> dict[str, str]:
    """The names a loader of this folder sees, with where their bytes are."""
    below = tree.folders[top].below("") if top in tree.folders else ()
    return {f"{relative}/{name}".lstrip("/"): folder.real_path(name) for relative, folder in below for name in folder.files}


def _in_flight(relative: str, path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        yield from (f"{relative}/{entry.name}" for entry in entries if entry.name[0] != "." and entry.name.endswith(IN_FLIGHT))


def _meant(name: str) -> str | None:
    """The folder of ComfyUI's that only spelling keeps this one from being."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    spelled = (plain, f"{plain}s", plain.removesuffix("s"), f"{plain}_models")
    return next((folder for folder in spelled if folder in FOLDERS), None)


class _Walk:
    """The folders of a volume outside `models/` as (parts of the path, names of files), with bounds."""

    def __init__(self, layout: Layout) -> None:
        self._root = os.path.realpath(layout.root)
        self._leave_out = {os.path.realpath(place) for place in (layout.models, layout.state, layout.host_cache.parent)}
        self.cut_short = False

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        for count, (folder, below, names) in enumerate(os.walk(self._root)):
            if count == _WALKED_FOLDERS:
                self.cut_short = True
                return
            parts = Path(folder).relative_to(self._root).parts
            deep = len(parts) >= _WALKED_DEPTH or "pyvenv.cfg" in names
            below[:] = [] if deep else sorted(name for name in below if self._enters(folder, name))
            yield parts, names

    def _enters(self, folder: str, name: str) -> bool:
        return name[0] != "." and name not in _NEVER_MODELS and f"{folder}/{name}" not in self._leave_out


def _belongs(parts: tuple[str, ...], known: Collection[str]) -> tuple[str, str] | None:
    """The folder whose files somebody took for models of a kind, and that kind; None when the path tells no kind."""
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] in known and (at == 0 or parts[at - 1] == "models"):
            return "/".join(parts[: at + 1]), parts[at]
    return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _names_in(folder: Path) -> list[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.name for entry in entries]
    return []


def _age_s(path: Path, now_s: float) -> float:
    try:
        return max(0.0, now_s - path.stat().st_mtime)
    except OSError:
        return float("inf")


# --- for people ---------------------------------------------------------------------------------

_COLOURS: Final = {Severity.OK: "32", Severity.NOTE: "33", Severity.PROBLEM: "1;31"}
_LABEL_WIDTH: Final = max(map(len, Severity))
_CHECK_WIDTH: Final = len("host cache")


def _lines(findings: Sequence[Finding], folders: Sequence[FolderCount], width: int, *, colour: bool) -> Iterator[str]:
    indent = 2 + _LABEL_WIDTH + 2 + _CHECK_WIDTH + 2
    before = ""
    for found in findings:
        label = f"{found.severity.upper() if found.severity is Severity.PROBLEM else found.severity:<{_LABEL_WIDTH}}"
        check = "" if found.check == before else found.check
        text = _wrapped(found.message, indent, width)
        shown = f"\x1b[{_COLOURS[found.severity]}m{label}\x1b[0m" if colour else label
        yield f"  {shown}  {check:<{_CHECK_WIDTH}}  {text[0].lstrip()}"
        yield from text[1:]
        before = found.check
    if folders:
        yield ""
        yield from _table(folders)
    yield ""
    problems, notes = ([found for found in findings if found.severity is one] for one in (Severity.PROBLEM, Severity.NOTE))
    yield f"{_count(problems, 'problem')}, {_count(notes, 'note')}"


def _table(folders: Sequence[FolderCount]) -> Iterator[str]:
    width = max(len("folder"), *(len(count.folder) for count in folders))
    yield f"  {'folder':<{width}}  {'files':>7}  {'size':>9}  {'sealed':>7}"
    for count in folders:
        size = "?" if count.size_bytes is None else size_text(count.size_bytes)
        sealed = "?" if count.sealed is None else str(count.sealed)
        yield f"  {_printable(count.folder):<{width}}  {count.files:>7}  {size:>9}  {sealed:>7}"


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    margin = " " * indent
    # Paths stay whole: they are there to be copied.
    return textwrap.wrap(
        _printable(text),
        max(width, indent + 40),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """A file name may hold line breaks and bytes that are no text; a terminal may not."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _some(names: Sequence[str]) -> str:
    """The first few by name."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _count(things: Sized, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{len(things)} {what if len(things) == 1 else plural}"


def _duration(age_s: float) -> str:
    for unit, length_s in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= 2 * length_s:
            return f"{age_s / length_s:.0f} {unit}"
    return f"{age_s:.0f} s"
