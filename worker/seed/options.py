"""Parse the seeder's command line, and refuse contradictory options. Pure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from worker.seed.errors import S3KeysMissing, SeedUsage
from worker.seed.s3_api import DATACENTERS, S3Keys, S3Place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Action = Literal["seed", "dry_run", "list", "verify", "prune", "sync"]

KEY_ID, KEY_SECRET = "RUNPOD_S3_ACCESS_KEY_ID", "RUNPOD_S3_SECRET_ACCESS_KEY"

_WHAT = """\
WHAT is any mix of:
  models.toml                             a manifest, in any format that the worker reads
  workflow.json, picture.png, -           a workflow (either format), a request, a saved picture or video, standard input
  NAME                                    a workflow on the volume, workflows/NAME.json
  hf://org/repo/file.safetensors[@rev]    one file; say with --folder where it belongs
  'hf://org/repo/*.safetensors[@rev]'     a repository's matching files
  loras=hf://org/repo/file.safetensors    the same, with the folder; folder/name=... gives it another name
  flux_dev_checkpoint_example             the name of one of ComfyUI's official templates
With none of these, what models.toml on the volume, MODELS_MANIFEST and MODELS name.
"""
_EPILOG = f"""\
{_WHAT}
Where: --volume, or one --s3 for each region; one download feeds all of them. The keys of RunPod's S3 API are read from
{KEY_ID} and {KEY_SECRET}. HF_TOKEN, HF_ENDPOINT and CIVITAI_TOKEN are as for the worker.

Data centres with an S3 API: {", ".join(DATACENTERS)}

Exit codes: 0 everything is there, 1 something failed, 2 wrong usage, 130 stopped. Whatever stops it, run the same
command again: it resumes.
"""


@dataclass(frozen=True, slots=True)
class SeedOptions:
    """A valid command line of the seeder. It has either `places` or `volume`; with neither, the settings' volume is used."""

    whats: tuple[str, ...]
    action: Action
    volume: Path | None
    places: tuple[S3Place, ...]
    folder: str | None
    json: bool
    yes: bool
    repair: bool
    keep_gb: float | None = None
    least_used: bool = False
    sync_from: S3Place | None = None


def seed_parser() -> argparse.ArgumentParser:
    """Return the parser of the seeder's command line."""
    found = argparse.ArgumentParser(
        prog="python scripts/seed_volume.py",
        description="Fill a volume with models before the first job: mounted, or from anywhere through RunPod's S3 API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("what", nargs="*", metavar="WHAT", help="what to seed, see below")
    found.add_argument(
        "--volume", type=Path, metavar="PATH", help="a mounted volume (default: VOLUME_PATH, in a Pod /workspace)"
    )
    found.add_argument("--s3", action="append", default=[], metavar="VOLUME_ID", help="a volume through its S3 API; repeatable")
    found.add_argument(
        "--datacenter", action="append", default=[], metavar="DC", help="its data centre, such as EU-RO-1: one for each --s3"
    )
    found.add_argument("--endpoint", metavar="URL", help="another S3 endpoint than RunPod's; --s3 is a bucket there")
    found.add_argument("--sync", metavar="VOLUME_ID", help="copy the sealed models of this volume to those of --to, through S3")
    found.add_argument(
        "--to", action="append", default=[], metavar="VOLUME_ID", help="with --sync: a volume to fill; repeatable"
    )
    found.add_argument("--folder", metavar="NAME", help="the folder under models/ for addresses, such as checkpoints")
    action = found.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="only show what would be done, with sizes and space")
    action.add_argument("--list", action="store_true", help="list what is sealed on the volume")
    action.add_argument("--verify", action="store_true", help="read everything that is sealed and check its sha256")
    action.add_argument(
        "--prune", action="store_true", help="remove sealed models that no manifest and no WHAT names, after a question"
    )
    found.add_argument(
        "--repair",
        action="store_true",
        help="with --verify: download damaged and missing files again",
    )
    found.add_argument(
        "--yes",
        action="store_true",
        help="with --prune: do not ask; with --repair: also replace files that were put there by hand",
    )
    found.add_argument(
        "--keep-gb",
        type=float,
        metavar="GB",
        help="how much all models on a mounted volume may take: the least used are removed (default: VOLUME_KEEP_GB)",
    )
    found.add_argument(
        "--least-used",
        action="store_true",
        help="with --prune and --keep-gb: remove what jobs use least until the rest fits; asks",
    )
    found.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    return found


def parse_seed_options(argv: Sequence[str]) -> SeedOptions:
    """Return the options of the seeder. Raises `SeedUsage`, `DatacenterUnknown`, and SystemExit as argparse does."""
    given = seed_parser().parse_args(list(argv))
    actions: dict[Action, bool] = {"dry_run": given.dry_run, "list": given.list, "verify": given.verify, "prune": given.prune}
    actions["sync"] = given.sync is not None
    action: Action = next((name for name, on in actions.items() if on), "seed")
    _check(given, action)
    source: S3Place | None = None
    if given.sync:
        source, *places = _places([given.sync, *given.to], given.datacenter, given.endpoint)
    else:
        places = [*_places(given.s3, given.datacenter, given.endpoint)]
    return SeedOptions(
        whats=tuple(given.what),
        action=action,
        volume=given.volume,
        places=tuple(places),
        folder=given.folder,
        json=given.json,
        yes=given.yes,
        repair=given.repair,
        keep_gb=given.keep_gb,
        least_used=given.least_used,
        sync_from=source,
    )


def _check(given: argparse.Namespace, action: Action) -> None:
    rules = (
        (given.volume and given.s3, "Give --volume or --s3, not both."),
        (
            (given.datacenter or given.endpoint) and not (given.s3 or given.sync),
            "--datacenter and --endpoint belong to --s3 VOLUME_ID.",
        ),
        (given.sync and not given.to, "Say with --to which volumes --sync fills."),
        (given.to and not given.sync, "--to belongs to --sync."),
        (given.sync and (given.s3 or given.volume), "--sync takes the volumes to fill with --to."),
        (given.sync and action != "sync", "--sync is an action of its own."),
        (given.sync and given.what, "--sync copies what is sealed; it takes no WHAT."),
        (given.repair and action != "verify", "--repair belongs to --verify."),
        (given.yes and action != "prune" and not given.repair, "--yes belongs to --prune and --repair."),
        (given.least_used and action != "prune", "--least-used belongs to --prune."),
        (given.least_used and given.keep_gb is None, "Say with --keep-gb how many GB are to be kept."),
        (given.least_used and given.what, "--least-used goes by the uses on the volume; it takes no WHAT."),
        (given.keep_gb is not None and given.keep_gb < 0, "--keep-gb is a number of GB, 0 or more."),
        (
            given.keep_gb is not None and action not in {"seed", "list", "prune"},
            "--keep-gb belongs to seeding, --list and --prune.",
        ),
        (given.keep_gb is not None and action == "prune" and not given.least_used, "Say --least-used with --prune --keep-gb."),
        (given.keep_gb is not None and given.s3, "--keep-gb needs a mounted volume: links and uses do not show through S3."),
        (action == "list" and given.what, "--list shows what is on the volume; it takes no WHAT."),
    )
    for wrong, reason in rules:
        if wrong:
            raise SeedUsage(reason)


def _places(volumes: Sequence[str], datacenters: Sequence[str], endpoint: str | None) -> tuple[S3Place, ...]:
    if volumes and endpoint is None and not datacenters:
        raise SeedUsage(f"Say with --datacenter where the volume is: one of {', '.join(DATACENTERS)}.")
    if len(datacenters) not in {0, 1, len(volumes)}:
        raise SeedUsage("Give one --datacenter for all volumes, or one for each --s3, in the same order.")
    named = [*datacenters] * len(volumes) if len(datacenters) == 1 else [*datacenters] or [""] * len(volumes)
    places = tuple(S3Place.of(volume, name, endpoint) for volume, name in zip(volumes, named, strict=True))
    if len(set(places)) < len(places):
        raise SeedUsage("One volume is named twice: name each once.")
    return places


def keys_from(environ: Mapping[str, str]) -> S3Keys:
    """Return the keys of RunPod's S3 API that the seeder's environment has. Raises `S3KeysMissing`, naming the missing ones."""
    missing = [name for name in (KEY_ID, KEY_SECRET) if not environ.get(name, "").strip()]
    if missing:
        raise S3KeysMissing(missing)
    return S3Keys(environ[KEY_ID].strip(), environ[KEY_SECRET].strip())
