"""Evaluate a checkpoint: measure every unit of every part that is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcdist.distributed.mesh import world_size
from lcdist.evaluate.loaded_model import load_model
from lcdist.evaluate.registry import PART_KINDS
from lcdist.utils.progress import Progress, counter, silent

# Keys that the results have had from the beginning, when perplexity was all that was measured.
_FIRST_KEYS = ("lengths", "perplexity", "scored", "joined")


def evaluate_checkpoint(
    path: Path, overrides: Sequence[str], progress: Progress = silent
) -> dict[str, Any]:
    """Measure the parts `evaluate.measure` of a checkpoint; all ranks call it.

    Without overrides the whole world is context parallel.

    Args:
        path: a checkpoint, or a run folder for its latest.
        overrides: `section.key=value`, over the checkpoint's own configuration.
        progress: called with the tokens of all units.

    Returns:
        checkpoint, step, tokens (asked for), seed, attention (method that read the text), and
        measured: the summary of each part by its name. If perplexity is measured, also lengths,
        perplexity (None if it is not finite), scored (tokens at each length) and joined (whether
        documents were joined to fill the windows).
    """
    loaded = load_model(path, overrides, [f"parallel.cp_size={world_size()}"])
    asked = loaded.plan.config.evaluate
    parts = {name: PART_KINDS[name].open(loaded) for name in asked.measure}
    units = {name: part.units() for name, part in parts.items()}
    count = counter("evaluating", sum(u.work for each in units.values() for u in each), progress)
    measured = {
        name: {unit.key: part.measure(unit.key, count) for unit in units[name]}
        for name, part in parts.items()
    }
    summaries = {name: part.summary(measured[name]) for name, part in parts.items()}
    first = summaries.get("perplexity", {})
    return {
        "checkpoint": str(loaded.checkpoint.path),
        "step": loaded.checkpoint.step,
        **{key: first[key] for key in _FIRST_KEYS if key in first},
        "tokens": asked.tokens,
        "seed": asked.seed,
        "attention": loaded.attention,
        "measured": summaries,
    }
