"""Steps and states that are not finite: skip or stop, and never save."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcdist.config.schema import TrainConfig
from lcdist.engines.engine import NoTargetError, RefusedStepError, TrainEngine
from lcdist.rundir.status import way_back

log = logging.getLogger(__name__)

# Names of tensors that a message lists.
_SHOWN = 6


class BadSteps:
    """Skips steps that an engine refused, up to a limit.

    A step without a target, as of prompts alone, is always passed over: it is no fault.

    Args:
        train: `on_bad_step` and `bad_step_limit` hold.
        folder: of the run.
        complete_save: waits for a save that is under way, so that a message names the checkpoint
            that the run goes on from; all ranks call it.

    Attributes:
        skipped: steps of the run that changed nothing.
        empty: those of them without a target.
    """

    def __init__(self, train: TrainConfig, folder: Path, complete_save: Callable[[], None]) -> None:
        self._skips, self._limit = train.on_bad_step == "skip", train.bad_step_limit
        self._folder, self._complete_save = folder, complete_save
        self.skipped = self.empty = 0

    def counts(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"skipped_steps": self.skipped, "steps_without_target": self.empty}

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """Take over the counts of a checkpoint; older ones have none."""
        self.skipped = manifest.get("skipped_steps", 0)
        self.empty = manifest.get("steps_without_target", 0)

    def update(self, engine: TrainEngine, lr: float, step: int, samples: range) -> float | None:
        """Let the engine update the weights; return the gradient norm, or None for a skipped step.

        Args:
            engine: after forward and backward.
            lr: learning rate.
            step: number of the step, from 1.
            samples: numbers of its samples in the run's order.

        Raises:
            FloatingPointError: on all ranks, as `add`.
        """
        try:
            return engine.step(lr)
        except RefusedStepError as error:
            self.add(error, step, samples)
            return None

    def add(self, error: RefusedStepError, step: int, samples: range) -> None:
        """Count a refused step; the same on all ranks.

        Args:
            error: of the engine.
            step: number of the step, from 1.
            samples: numbers of its samples in the run's order.

        Raises:
            FloatingPointError: the run stops, by its setting or because the limit is reached.
        """
        told = f"step {step} (samples {samples.start} to {samples.stop - 1}): {error}"
        if isinstance(error, NoTargetError):
            self.skipped, self.empty = self.skipped + 1, self.empty + 1
            log.warning("passed over %s", told)
            return
        if not self._skips:
            self._complete_save()
            raise FloatingPointError(
                f"{told}. No weight was changed. {way_back(self._folder)}; "
                "train.on_bad_step=skip passes over such samples"
            )
        self.skipped += 1
        if self.skipped - self.empty > self._limit:
            self._complete_save()
            raise FloatingPointError(
                f"{told}. {self._limit} steps were skipped before, as many as "
                f"train.bad_step_limit allows. {way_back(self._folder)}"
            )
        bad = self.skipped - self.empty
        log.warning("skipped %s (%d of at most %d)", told, bad, self._limit)


@torch.no_grad()
def refuse_non_finite(state: Mapping[str, Any], step: int, folder: Path) -> None:
    """Raise FloatingPointError on all ranks if a weight or moment is not finite; all ranks call it.

    Args:
        state: sharded state of an engine.
        step: optimizer steps behind it.
        folder: of the run.
    """
    tensors = list(_tensors(state))
    on_host = [(key, x) for key, x in tensors if x.is_cpu]
    on_device = [(key, x) for key, x in tensors if not x.is_cpu]
    found: list[str] = []
    for part, finite in ((on_host, finite_by_ends), (on_device, finite_by_norm)):
        answers = finite([x for _, x in part])
        found += [key for (key, _), good in zip(part, answers, strict=True) if not good]
    everywhere: list[Any] = [found]
    if dist.get_world_size() > 1:
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
    names = sorted({key for keys in everywhere for key in keys})
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise FloatingPointError(
            f"after step {step} these are not finite: {', '.join(names[:_SHOWN])}{more}. Nothing "
            f"is saved. {way_back(folder)}; a smaller optim.lr or optim.clip_norm may help"
        )


def finite_by_norm(tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether all of it is finite: one launch and one wait on a GPU."""
    if not tensors:
        return []
    largest = torch._foreach_norm(list(tensors), torch.inf)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([x.isfinite() for x in largest]).tolist()


def finite_by_ends(tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether all of it is finite: on a CPU 14 times as fast as by norm.

    A NaN anywhere makes both ends of its tensor NaN.
    """
    return [bool(torch.stack(torch.aminmax(x)).isfinite().all()) for x in tensors]


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield key and data of the sharded floating-point tensors in a state."""
    if isinstance(state, Mapping):
        for part in state.values():
            yield from _tensors(part)
    elif isinstance(getattr(state, "data", None), Tensor):
        data = state.data
        if data.is_floating_point() and data.numel():
            yield state.key, data
