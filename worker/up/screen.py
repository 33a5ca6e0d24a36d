"""Show `up` to a person or a program: the plan with its costs, each finished step. Prints."""

from __future__ import annotations

import json
import shutil
import sys
from typing import IO, TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from worker.base.text import count, size_text, wrapped
from worker.plan.plan_command import plan_row
from worker.seed.screen import ScreenBars, ScreenJson, ScreenLines
from worker.up.runpod_offer import PRICES_OF, volume_usd_month, wanted_gpu_gb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.seed.screen import SeedScreen
    from worker.up.plan import UpPlan
    from worker.up.runpod_offer import Offer

_WIDE: Final = 160
_MOST_OFFERS: Final = 5
_LABEL: Final = 9
_FILLS: Final = {
    "s3": "from here, through S3",
    "pod": "by a CPU Pod that ends itself",
    "job": "by the first job, while its GPU waits",
}


class UpScreen:
    """The output of `up`: for a terminal, a log, or a program."""

    def __init__(self, stream: IO[str], *, as_json: bool) -> None:
        self.stream = stream
        self.as_json = as_json
        self._lines = ScreenJson(stream)
        self._console = Console(file=stream, highlight=False, soft_wrap=True)

    @property
    def width(self) -> int:
        """Return the width of a line."""
        return shutil.get_terminal_size((100, 24)).columns if self._console.is_terminal else _WIDE

    def models(self) -> SeedScreen:
        """Return the output for the models' progress, which is the seeder's."""
        if self.as_json:
            return self._lines
        return ScreenBars(Console(file=self.stream, highlight=False)) if self._console.is_terminal else ScreenLines(self.stream)

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self.as_json:
            self._lines.say(text)
        else:
            self._console.print(Text(text))

    def note(self, text: str) -> None:
        """Print a sentence besides the result: a warning, or what is awaited."""
        if self.as_json:
            self._lines.say(text)
        else:
            print(text, file=sys.stderr)  # noqa: T201 - the command's output

    def step(self, name: str, text: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        """Report a finished step."""
        if self.as_json:
            self._lines.tell("step", step=name, text=text, **values)
        else:
            self._console.print(Text.assemble(("✓ ", "green"), (f"{name:<{_LABEL}}", "bold"), text))

    def result(self, event: str, text: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        """Report the result."""
        if self.as_json:
            self._lines.tell(event, **values)
        else:
            self._console.print(Text(text))

    def plan(self, plan: UpPlan) -> None:
        """Show what will be created, and its cost."""
        if self.as_json:
            self._lines.tell("plan", **plan.to_dict())
        else:
            for line in up_plan_lines(plan, self.width):
                self._console.print(Text(line))

    def raw(self, event: dict[str, Any]) -> None:
        """Pass on an event of a seeder elsewhere, for a program."""
        print(json.dumps(event), file=self.stream, flush=True)


def ask_once(question: str) -> bool:
    """Ask the person at the screen. Anything but yes means no."""
    print(f"{question} [y/N] ", end="", flush=True)  # noqa: T201 - a question
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def up_plan_lines(plan: UpPlan, width: int) -> Iterator[str]:
    """Yield the lines of `up`'s plan for a terminal's screen."""
    needs = plan.needs
    if needs is not None:
        total = size_text(needs.size_bytes) if needs.fetched else "nothing to download"
        gpu = f"a GPU with {wanted_gpu_gb(needs.size_bytes)} GB holds them all"
        yield f"{plan.name}: {count(len(needs.items), 'model')}, {total}; {gpu}"
        for item in sorted(needs.items, key=lambda item: -(item.size_bytes or 0)):
            yield plan_row(item.state.upper() if item.blocking else item.state, item.size_bytes, item.title)
            if item.message:
                yield from wrapped(item.message, 4, width)
        if needs.unknown_sizes:
            files = count(needs.unknown_sizes, "file")
            yield f"  The size of {files} is not known now: say with --size how large the volume shall be."
        yield ""
    if plan.offers:
        yield "GPUs that are free now:"
        for offer in plan.offers[:_MOST_OFFERS]:
            yield f"  {offer.datacenter:<9}  {_pools_text(offer)}"
        yield ""
    yield "To be made:" if plan.new else "As it was agreed:"
    for label, what, cost in _costs(plan):
        yield f"  {label:<{_LABEL}} {what}"
        yield from wrapped(cost, _LABEL + 3, width) if cost else ()
    yield f"GPUs and Pods cost what RunPod's API says now, volumes what its documentation said in {PRICES_OF}."


def _pools_text(offer: Offer) -> str:
    return ", ".join(
        f"{pool.name} {pool.memory_gb} GB ${pool.usd_second:.5f}/s ({pool.level(offer.datacenter).lower()})"
        for pool in offer.pools
    )


def _costs(plan: UpPlan) -> Iterator[tuple[str, str, str]]:
    tier = (
        "high-performance, priced by its data centre"
        if plan.high_performance
        else f"${volume_usd_month(plan.size_gb):.2f} a month"
    )
    kept = "yours, used as it is" if plan.volume_id and not plan.own_volume else tier
    yield "volume", f"{plan.size_gb} GB in {plan.datacenter}{f' ({plan.volume_id})' if plan.volume_id else ''}", kept
    yield (
        "endpoint",
        f"{plan.image}, up to {count(plan.max_workers, 'worker')}",
        f"{plan.gpu_cost} while a worker runs, nothing otherwise",
    )
    if plan.needs is None or plan.needs.fetched:
        hour = f"${plan.pod_usd_hour:.2f} an hour while it runs" if plan.fill == "pod" and plan.pod_usd_hour else ""
        yield "models", _FILLS[plan.fill], hour
