"""Plans: every number of a run that follows from configuration, world size and hardware."""

from lcdist.plan.plan import Plan, make_plan, smallest_world
from lcdist.plan.table import plan_rows

__all__ = ["Plan", "make_plan", "plan_rows", "smallest_world"]
