"""Evaluate a checkpoint: measure every unit of every part that is asked for."""

import contextlib
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lcdist import __version__
from lcdist.checkpoint.manifest import Checkpoint
from lcdist.config.schema import Config
from lcdist.data.datasets.build import held_out_folder
from lcdist.data.meta import read_meta
from lcdist.distributed.mesh import start_world, world_size
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.evaluate.loaded_model import LoadedModel, configure, load_model
from lcdist.evaluate.marker import MARKS, has_marker, load_marker, open_marker
from lcdist.evaluate.parts import Part
from lcdist.evaluate.registry import PART_KINDS
from lcdist.evaluate.unit_file import UnitFile
from lcdist.rundir.run_config import flat_settings
from lcdist.utils.progress import Progress, counter, silent

# Keys that the results have had from the beginning, when perplexity was all that was measured.
_FIRST_KEYS = ("lengths", "perplexity", "scored", "joined")
# Settings that change nothing in what a unit measures.
_OF_NO_UNIT = (
    *("evaluate.measure", "log.", "optim.", "checkpoint."),
    # Units of tasks have the task, the depth and the numbers of their cases in their keys.
    *("evaluate.samples", "evaluate.depths", "evaluate.ruler_tasks", "evaluate.effective_score"),
    "evaluate.device_blocks",
    *("parallel.timeout", "parallel.stall"),
)
# What all units measured, by part and key.
Measured = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Kept:
    """Name where finished units are kept. overwrite: whether to measure them again."""

    file: Path
    overwrite: bool = False


def evaluate_checkpoint(
    path: Path | str,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Measure the parts `evaluate.measure` of a checkpoint; all ranks call it.

    Without overrides the whole world is context parallel.

    Args:
        path: a checkpoint, or a run folder for its latest.
        overrides: `section.key=value`, over the checkpoint's own configuration.
        progress: called with the tokens of all units.
        kept: where finished units are kept; those that are there already are not measured again.

    Returns:
        checkpoint, step, tokens (asked for), seed, attention (method that read the text), version
        (of lcdist), settings (`[evaluate]`), and measured: the summary of each part by its name. If
        perplexity is measured, also lengths, perplexity (None if it is not finite), scored (tokens
        at each length) and joined (whether documents were joined to fill the windows).
    """
    path, mesh = Path(path), [f"parallel.cp_size={world_size()}"]
    checkpoint, config = configure(path, overrides, mesh)
    with contextlib.ExitStack() as stack:
        units, marks = _Units({}, None), None
        if kept is not None or has_marker(config):
            start_world(config.parallel.timeout)
        if kept is not None:
            units = _open(kept, _question(checkpoint, config), stack)
        if has_marker(config):
            part = load_marker(checkpoint, config, overrides, mesh)
            marks = _measure({MARKS: part}, units, "marking", progress)[MARKS]
            # Only one of the two models is in memory; its objects refer to each other.
            del part
            gc.collect()
        loaded = replace(load_model(path, overrides, mesh), marks=marks)
        if kept is not None and loaded.checkpoint.digest != checkpoint.digest:
            raise ValueError(
                f"{path} was replaced by {loaded.checkpoint.path} while it was opened: run the "
                "command again"
            )
        asked = loaded.plan.config.evaluate
        parts = {name: PART_KINDS[name].open(loaded) for name in asked.measure}
        # What another version of a part measured is not taken over.
        versions = {name: f"{name} {PART_KINDS[name].version}" for name in parts}
        found = _measure(
            {versions[n]: part for n, part in parts.items()}, units, "evaluating", progress
        )
        measured = {name: found[versions[name]] for name in parts}
    summaries = {name: part.summary(measured[name]) for name, part in parts.items()}
    return _results(loaded, summaries)


def _results(loaded: LoadedModel, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `evaluate_checkpoint` returns, from the summary of each part."""
    asked, first = loaded.plan.config.evaluate, summaries.get("perplexity", {})
    return {
        "checkpoint": str(loaded.checkpoint.path),
        "step": loaded.checkpoint.step,
        **{key: first[key] for key in _FIRST_KEYS if key in first},
        "tokens": asked.tokens,
        "seed": asked.seed,
        "attention": loaded.attention,
        "version": __version__,
        "settings": asdict(asked),
        "measured": summaries,
    }


@dataclass(frozen=True)
class _Units:
    """Units that are finished, the same on every rank, and how rank 0 keeps another one."""

    finished: Mapping[tuple[str, str], dict[str, Any]]
    keep: Callable[[str, str, Mapping[str, Any]], None] | None


def _open(kept: Kept, question: Mapping[str, Any], stack: contextlib.ExitStack) -> _Units:
    """Open the file of finished units on rank 0; it is closed with the stack."""
    files: list[UnitFile] = []

    def read() -> Mapping[tuple[str, str], dict[str, Any]]:
        files.append(stack.enter_context(UnitFile(kept.file, question, kept.overwrite)))
        return files[0].measured

    finished = run_on_rank_zero(read)
    return _Units(finished, lambda *unit: run_on_rank_zero(lambda: files[0].add(*unit)))


def _measure(parts: Mapping[str, Part], units: _Units, title: str, progress: Progress) -> Measured:
    """Measure the units that are not finished; return what all of them measured."""
    wanted = [(name, unit) for name, part in parts.items() for unit in part.units()]
    done = sum(unit.work for name, unit in wanted if (name, unit.key) in units.finished)
    count = counter(title, sum(unit.work for _, unit in wanted), progress, done)
    measured: Measured = {name: {} for name in parts}
    for name, unit in wanted:
        found = units.finished.get((name, unit.key))
        if found is None:
            # As it is read back from a file, so that a resumed evaluation has the same types.
            found = json.loads(json.dumps(parts[name].measure(unit.key, count)))
            if units.keep is not None:
                units.keep(name, unit.key, found)
        measured[name][unit.key] = found
    return measured


def _question(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    """Return all that decides what a unit measures."""
    settings = flat_settings(config)
    folder = None
    # Without a folder of tokens a part that needs one says so.
    with contextlib.suppress(ValueError):
        folder = read_meta(held_out_folder(config.data))
    return {
        "lcdist": __version__,
        "checkpoint": checkpoint.digest,
        "step": checkpoint.step,
        "text": folder and folder.digest,
        "marker": open_marker(config).digest if has_marker(config) else None,
        "ranks": world_size(),
        **{key: value for key, value in settings.items() if not key.startswith(_OF_NO_UNIT)},
    }
