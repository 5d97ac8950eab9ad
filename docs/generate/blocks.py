"""Replace the lines `<!-- make: NAME -->` of a page by what is made under that name."""

import re
from collections.abc import Callable, Mapping
from functools import cache

from docs.generate import benchmarks, claims, growth, methods, smollm2
from docs.generate.configuration import configuration_reference

_LINE = re.compile(r"^<!-- make: ([\w-]+) -->$", re.MULTILINE)

MAKERS: Mapping[str, Callable[[], str]] = {
    "chooser": methods.chooser,
    "claims": claims.claims_results,
    "claims-growth": growth.claims_growth,
    "configuration": configuration_reference,
    "cpu-loss": benchmarks.loss_on_a_cpu,
    "cpu-methods": benchmarks.methods_on_a_cpu,
    "cpu-mlp": benchmarks.mlp_on_a_cpu,
    "cpu-saves": benchmarks.saves_on_a_cpu,
    "cpu-startup": benchmarks.startup_on_a_cpu,
    "cpu-training": benchmarks.training_on_a_cpu,
    "crossovers": benchmarks.crossovers,
    "gpu-runs": benchmarks.gpu_runs,
    "gpu-summary": benchmarks.gpu_summary,
    "gpu-training": benchmarks.training_on_a_gpu,
    "methods": methods.facts_table,
    "smollm2": smollm2.smollm2_table,
}


def fill(markdown: str, origin: str, makers: Mapping[str, Callable[[], str]] = MAKERS) -> str:
    """Return the text of the page `origin` with every such line replaced.

    Links of what is made are those of the page's own file.

    Raises:
        ValueError: A line names what nothing makes.
    """

    def replace(found: re.Match[str]) -> str:
        if found[1] not in makers:
            legal = ", ".join(makers)
            raise ValueError(f"{origin}: nothing makes {found[1]!r}; there are {legal}")
        return _made(makers[found[1]])

    return _LINE.sub(replace, markdown)


@cache
def _made(maker: Callable[[], str]) -> str:
    """Return what a maker makes; a page is read once for its links and once for its text."""
    return maker()
