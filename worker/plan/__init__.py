"""`python -m worker plan WORKFLOW`: what a workflow needs, what of it is there, what fetching the rest takes.

Reads the disk and asks the sources for metadata, in parallel and with deadlines. Nothing is downloaded, nothing is written.
"""

from worker.plan.command import make_hub, make_plan, run
from worker.plan.items import Item, Plan, State

__all__ = ["Item", "Plan", "State", "make_hub", "make_plan", "run"]
