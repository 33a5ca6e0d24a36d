"""Parse the command line of `up`, and refuse contradictory options. Pure."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from worker import __version__
from worker.up.errors import UpUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

Action = Literal["up", "status", "down"]
Fill = Literal["s3", "pod", "job"]

IMAGE: Final = f"ghcr.io/OWNER/comfyui-volume-worker:{__version__}"
"""The default image. OWNER is the owner of the cloned repository, because a fork's release workflow publishes to the fork's own
packages. A fork that publishes elsewhere changes this line."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,38}")
_CUDA_OF_TAG: Final = re.compile(r"-cu(\d\d)(\d)$")
_CUDA: Final = re.compile(r"\d+\.\d+")
_DEFAULT_CUDA: Final = "13.0"
_EPILOG: Final = """\
It plans the workflow, shows where a GPU is free and what everything costs, and asks once. Then it creates a network volume, an
endpoint, the workflow's models on the volume, and a first picture. If it is interrupted, the same command resumes and creates
nothing twice.

Environment: RUNPOD_API_KEY. If RUNPOD_S3_ACCESS_KEY_ID and RUNPOD_S3_SECRET_ACCESS_KEY are set, this machine uploads the models
to the volume. Otherwise a small CPU Pod downloads them, and ends when it is done. HF_TOKEN, HF_ENDPOINT and CIVITAI_TOKEN are
passed to the Pod and to the endpoint.

examples:
  python -m worker up flux.json --dry-run        show what it would create, and the cost
  python -m worker up flux.json                  create it
  python -m worker up flux.json models.toml      with sources for models that no list knows
  python -m worker up status --name flux         show what exists, and its cost now
  python -m worker up down --name flux           remove the endpoint; with --volume-too the volume and its models

exit status: 0 done; 1 something failed, and the last line says what to do; 2 the command line or a key is wrong; 130 stopped.
"""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """A valid command line of `up`. `whats` are lists of models besides the workflow, as in `seed`."""

    action: Action
    name: str
    workflow: str = ""
    whats: tuple[str, ...] = ()
    image: str | None = None
    cuda: str = _DEFAULT_CUDA
    registry: str | None = None
    volume: str | None = None
    size_gb: int | None = None
    high_performance: bool = False
    datacenter: str | None = None
    pools: tuple[str, ...] = ()
    max_workers: int | None = None
    fill: Fill | None = None
    s3_endpoint: str | None = None
    images: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    picture: bool = True
    output: Path = Path("outputs")
    dry_run: bool = False
    volume_too: bool = False
    yes: bool = False
    json: bool = False

    @property
    def resource(self) -> str:
        """Return the name of all of this deployment's resources at RunPod."""
        return f"worker-up-{self.name}"


def up_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `up`."""
    found = argparse.ArgumentParser(
        prog="python -m worker up",
        description="Create an endpoint on RunPod for a workflow. `up status` shows it, `up down` removes it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("what", nargs="*", metavar="WORKFLOW", help="a workflow as ComfyUI saves or exports it; status; down")
    found.add_argument("--name", help="the deployment's name (default: the workflow's file name)")
    found.add_argument("--dry-run", action="store_true", help="only show what would be created, and its cost")
    found.add_argument("--yes", action="store_true", help="do not ask")
    found.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    volume = found.add_argument_group("the volume")
    volume.add_argument("--volume", metavar="ID", help="use this network volume; `down` never removes it")
    volume.add_argument("--size", type=int, metavar="GB", help="the volume's size (default: the models and some GB more)")
    volume.add_argument("--high-performance", action="store_true", help="use the faster storage, at its data centre's price")
    volume.add_argument("--datacenter", metavar="DC", help="create everything there, such as EU-RO-1")
    volume.add_argument(
        "--fill",
        choices=("s3", "pod", "job"),
        help="how to put models onto it: from here through S3, by a CPU Pod, or by the first job",
    )
    volume.add_argument("--s3-endpoint", metavar="URL", help="another S3 endpoint than RunPod's")
    endpoint = found.add_argument_group("the endpoint")
    endpoint.add_argument("--image", help=f"the workers' image (default: {IMAGE})")
    endpoint.add_argument("--cuda", metavar="VERSION", help="the CUDA that the image needs (default: as its tag says, or 13.0)")
    endpoint.add_argument("--registry", metavar="ID", help="the credential for a private image, from Container Registry Auth")
    endpoint.add_argument(
        "--gpu", metavar="POOL,...", help="GPU pools, such as ADA_24,AMPERE_24 (default: by the models' size)"
    )
    endpoint.add_argument("--max-workers", type=int, metavar="N", help="the largest number of workers (default: 3)")
    picture = found.add_argument_group("the first picture")
    picture.add_argument(
        "--image-file", action="append", default=[], metavar="NAME=PATH", help="a file the workflow loads by NAME"
    )
    picture.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="a value of the graph")
    picture.add_argument("--no-picture", action="store_true", help="do not make one")
    picture.add_argument(
        "--output", type=Path, default=Path("outputs"), metavar="DIR", help="where it is saved (default: outputs)"
    )
    found.add_argument("--volume-too", action="store_true", help="with down: remove the volume and its models as well")
    return found


def parse_up_options(argv: Sequence[str]) -> UpOptions:
    """Return the options of `up`. Raises `UpUsage`, and SystemExit as argparse does."""
    given = up_parser().parse_intermixed_args(list(argv))
    if not given.what:
        raise UpUsage("Say what to create: up WORKFLOW.json. `up status` and `up down` are for what was created; see --help.")
    first, *rest = given.what
    action: Action = first if first in {"status", "down"} else "up"
    if action != "up" and rest:
        raise UpUsage(f"`up {action}` takes no file: name the deployment with --name, as `up` did.")
    if given.volume_too and action != "down":
        raise UpUsage("--volume-too belongs to `up down`.")
    if given.max_workers is not None and given.max_workers < 1:
        raise UpUsage("--max-workers must be at least 1.")
    cuda = given.cuda or _cuda_of(given.image)
    if not _CUDA.fullmatch(cuda):
        raise UpUsage("--cuda must be a version such as 12.8.")
    return UpOptions(
        action=action,
        name=_name(given.name, first if action == "up" else None),
        workflow=first if action == "up" else "",
        whats=tuple(rest),
        image=given.image,
        cuda=cuda,
        registry=given.registry,
        volume=given.volume,
        size_gb=given.size,
        high_performance=given.high_performance,
        datacenter=given.datacenter.strip().upper() if given.datacenter else None,
        pools=tuple(pool.strip().upper() for pool in (given.gpu or "").split(",") if pool.strip()),
        max_workers=given.max_workers,
        fill=given.fill,
        s3_endpoint=given.s3_endpoint,
        images=tuple(given.image_file),
        values=tuple(given.set),
        picture=not given.no_picture,
        output=given.output,
        dry_run=given.dry_run,
        volume_too=given.volume_too,
        yes=given.yes,
        json=given.json,
    )


def _name(given: str | None, workflow: str | None) -> str:
    if given is None and workflow is None:
        return ""
    text = given if given is not None else Path(workflow or "").stem
    if text in {"workflow", "request"} and given is None and workflow:  # as in examples: the folder says more
        text = Path(workflow).resolve().parent.name
    name = text if given is not None else re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:39].strip("-")
    if not _NAME.fullmatch(name):
        raise UpUsage(f"--name must be small letters, digits and hyphens, at most 39, such as flux-dev, not '{text}'.")
    return name


def _cuda_of(image: str | None) -> str:
    """Return the CUDA version that the option `--image` names at the end of its tag, as the release workflow writes it."""
    found = _CUDA_OF_TAG.search((image or "").partition("@")[0])
    return f"{found[1]}.{found[2]}" if found else _DEFAULT_CUDA
