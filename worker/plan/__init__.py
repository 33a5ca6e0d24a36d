"""`python -m worker plan WORKFLOW`: what a workflow needs, what is there, and how large the missing downloads are.

Reads the disk and asks the sources for metadata, in parallel and with deadlines. It downloads and writes nothing.
"""

from worker.plan.items import ItemState, Plan, PlanItem
from worker.plan.plan_command import make_hub, make_plan, run

__all__ = ["ItemState", "Plan", "PlanItem", "make_hub", "make_plan", "run"]
