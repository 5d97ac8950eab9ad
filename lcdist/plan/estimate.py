"""Name what each estimate of a run is made from."""

from dataclasses import dataclass

from lcdist.plan.parameters import ParameterCounts
from lcdist.plan.shape import RunShape


@dataclass(frozen=True)
class Estimate:
    """Base of the estimates.

    Attributes:
        shape: The run.
        parameters: Numbers of parameters.
    """

    shape: RunShape
    parameters: ParameterCounts
