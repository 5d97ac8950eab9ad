"""The plan of a run: every number that follows from configuration and world size."""

from lcdist.plan.plan import Plan, make_plan, smallest_world

__all__ = ["Plan", "make_plan", "smallest_world"]
