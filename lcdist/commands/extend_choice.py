"""Choose length, mesh and number of steps that fit this machine and the minutes of a job."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lcdist.config import ConfigError
from lcdist.config.schema import Config
from lcdist.plan import Plan, make_plan
from lcdist.plan.memory import USABLE_SHARE
from lcdist.plan.time import step_work
from lcdist.verify.preflight import host_memory

GIB = 2**30
# Without a length: times the model's own, the first that fits.
FACTORS = (4, 2)
# With fewer steps a model does not learn its new rotation. Position interpolation was trained for
# 1,000 (arXiv:2306.15595).
FEWEST_STEPS, MOST_STEPS = 5, 1000
# Of the minutes, for perplexities before and after.
EVALUATION_SHARE = 0.25
MODELS_EVALUATED = 2
CHECKPOINTS_OF_A_RUN = 4
# What a CPU's memory may need: there the plan decides by the number of tokens alone.
LESS_MEMORY = ("train.recompute=full", "train.mlp=tiled", "train.loss=chunked")
MESH = {"parallel.tp_size", "parallel.pp_size", "parallel.cp_size"}


@dataclass(frozen=True)
class Asked:
    """Hold what the user asks of a job.

    Attributes:
        length: Tokens; None: some times the model's own.
        minutes: For training and evaluation.
        settings: Names of the settings that the user gives, such as "train.steps".
    """

    length: int | None
    minutes: float
    settings: frozenset[str] = frozenset()

    def to_table(self) -> dict[str, Any]:
        """Return length and minutes as plain data."""
        return {"length": self.length, "minutes": self.minutes}

    def steps_of(self, config: Config) -> int:
        """Return the steps of a whole job: those that the user gives, or the most."""
        return config.train.steps if "train.steps" in self.settings else MOST_STEPS


@dataclass(frozen=True)
class Speed:
    """Hold the speed at which this machine trains.

    Attributes:
        flops: Operations a second in the passes forward and backward.
        update: Seconds of the optimizer's update, whatever the length.
    """

    flops: float
    update: float = 0.0

    @classmethod
    def of_steps(cls, rows: Sequence[tuple[float, float, float]]) -> "Speed":
        """Return the speed that steps show, of (operations, seconds of passes, of the update).

        The greatest: longer steps are faster for their operations, and other programs may hold one
        up. A line through two steps would take twice their noise for a part that does not grow.
        """
        flops = max(flops / passes for flops, passes, _ in rows)
        return cls(flops, min(update for _, _, update in rows))

    def step(self, plan: Plan) -> float:
        """Return the seconds of a training step."""
        return self.update + step_work(plan).flops / self.flops

    def evaluated_token(self, plan: Plan) -> float:
        """Return the seconds to score a token at all lengths, before and after."""
        lengths = plan.config.evaluate.lengths
        products = plan.compute.product_flops_per_token * len(lengths)
        heads = 2 * plan.config.model.nheads * plan.shape.head_dim * plan.config.model.num_layers
        return MODELS_EVALUATED * (products + heads * sum(lengths)) / self.flops


@dataclass(frozen=True)
class Choice:
    """Hold the settings of a job and its expected time.

    Attributes:
        length: Of the training, in tokens.
        settings: `section.key=value` that follow from machine and minutes.
        steps: Of the training.
        step_seconds: Expected of a step.
        evaluation_seconds: Expected of the evaluation.
        said: What the user reads before the training.
    """

    length: int
    settings: list[str]
    steps: int
    step_seconds: float
    evaluation_seconds: float
    said: list[str]


class Chooser:
    """Tries lengths, the longest first.

    Args:
        config_at: returns the configuration at a length, with more `section.key=value` words.
        ranks: processes of the job.
        own_length: of the model as it came.
        asked: by the user.
        probe: times steps at short lengths up to the given one, with more words, and returns the
            speed.
    """

    def __init__(
        self,
        config_at: Callable[[int, Sequence[str]], Config],
        ranks: int,
        own_length: int,
        asked: Asked,
        probe: Callable[[int, Sequence[str]], Speed],
    ) -> None:
        self.config_at, self.ranks, self.own_length = config_at, ranks, own_length
        self.asked, self.probe = asked, probe
        self.speed: Speed | None = None
        self.reasons: list[str] = []

    def choose(self) -> Choice | None:
        """Return what fits; None if nothing does, and then `reasons` say why."""
        lengths = [factor * self.own_length for factor in FACTORS]
        if self.asked.length is not None:
            lengths = [self.asked.length]
        for length in lengths:
            plan, words, reason = self.in_memory(length)
            if not reason:
                self.speed = self.speed or self.probe(length, words)
                found = self._within_minutes(plan, words, self.speed)
                if isinstance(found, Choice):
                    return found
                reason = found
            self.reasons.append(f"{length:,} tokens: {reason}")
        return None

    def in_memory(self, length: int) -> tuple[Plan, list[str], str]:
        """Return the first plan that fits the memory of this machine, its words, and "".

        Else the plan that lacks the least, with what it lacks.
        """
        plan = make_plan(self.config_at(length, ()), self.ranks)
        tried = [(plan, list[str](), lack_of_memory(plan))]
        on_gpu = plan.hardware.kind == "cuda"
        given = self.asked.settings
        for words in [] if not tried[0][2] else ways(self.ranks, on_gpu, given):
            try:
                plan = make_plan(self.config_at(length, words), self.ranks)
            except ConfigError:
                # The heads cannot be divided so.
                continue
            tried.append((plan, words, lack_of_memory(plan)))
            if not tried[-1][2]:
                return tried[-1]
        return min(tried, key=lambda each: each[0].memory.device_bytes)

    def _within_minutes(self, plan: Plan, words: list[str], speed: Speed) -> Choice | str:
        """Return the steps and the evaluation that fit, or why too few do."""
        config, seconds, settings = plan.config, 60 * self.asked.minutes, list(words)
        tokens = config.evaluate.tokens
        if "evaluate.tokens" not in self.asked.settings:
            tokens = _evaluated_tokens(plan, EVALUATION_SHARE * seconds, speed)
            settings.append(f"evaluate.tokens={tokens}")
        evaluation, step = tokens * speed.evaluated_token(plan), speed.step(plan)
        whole = self.asked.steps_of(config)
        steps = min(whole, int((seconds - evaluation) / step))
        takes = f"a step takes about {duration(step)}, the evaluation about {duration(evaluation)}"
        if "train.steps" in self.asked.settings:
            # Without a length, a shorter one may fit; the user has chosen the rest.
            is_last = self.asked.length or config.train.seqlen == FACTORS[-1] * self.own_length
            if steps < whole and not is_last:
                return f"{takes}; train.steps = {whole} do not fit {self._minutes}"
            steps = whole
        elif steps < FEWEST_STEPS:
            return f"{takes}; fewer than {FEWEST_STEPS} steps fit {self._minutes}"
        else:
            settings += _schedule(config, steps, self.asked.settings)
        said = [*self.reasons, self._summary(plan, steps, step, evaluation)]
        return Choice(config.train.seqlen, settings, steps, step, evaluation, said)

    def _summary(self, plan: Plan, steps: int, step: float, evaluation: float) -> str:
        length = plan.config.train.seqlen
        times = f"{length / self.own_length:.3g} times the model's own {self.own_length:,}"
        total = steps * step + evaluation
        text = (
            f"{length:,} tokens, {times}: {steps} steps of about {duration(step)} and the "
            f"evaluation of about {duration(evaluation)}, {duration(total)} in all"
        )
        if "train.steps" in self.asked.settings:
            return text + ("" if total <= 60 * self.asked.minutes else f": beyond {self._minutes}")
        return text + (f"; more steps do not fit {self._minutes}" if steps < MOST_STEPS else "")

    @property
    def _minutes(self) -> str:
        return f"{self.asked.minutes:g} minutes"


def meshes(ranks: int) -> Iterator[tuple[int, int]]:
    """Yield (tensor-parallel size, context-parallel size), in the order in which they are tried."""
    yield from ((tp, ranks // tp) for tp in range(1, ranks + 1) if ranks % tp == 0)


def ways(ranks: int, on_gpu: bool, given: frozenset[str]) -> Iterator[list[str]]:
    """Yield settings that need less memory than none at all, without those that the user gives.

    Tensor parallelism divides the weights; recomputation takes a third more operations, and on a
    GPU the plan chooses it itself.
    """
    again = [word for word in LESS_MEMORY if word.partition("=")[0] not in given]
    sizes = [(1, ranks)] if MESH & given else list(meshes(ranks))
    for saving in [[]] if on_gpu else [[], again]:
        for tp, cp in sizes:
            words = [f"parallel.tp_size={tp}", f"parallel.cp_size={cp}"]
            words += ["parallel.sequence_parallel=true"]
            found = [*(words if tp > 1 else []), *saving]
            if found:
                yield found


def lack_of_memory(plan: Plan) -> str:
    """Return why a plan does not fit the memory of this machine; empty if it does."""
    memory = plan.memory
    if plan.hardware.kind == "cuda":
        needed, usable, where = memory.device_bytes, memory.usable_bytes, "on each GPU"
    else:
        # All ranks are on this host.
        needed, usable = memory.device_bytes * plan.world_size, int(host_memory() * USABLE_SHARE)
        where = "here"
    if needed <= usable:
        return ""
    return f"{needed / GIB:,.1f} GiB are needed {where}, and {usable / GIB:,.1f} GiB may be filled"


def duration(seconds: float) -> str:
    """Return seconds as text, in the unit that suits them."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60)):
        count = seconds / size
        if count >= 1.5:
            return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _evaluated_tokens(plan: Plan, seconds: float, speed: Speed) -> int:
    """Return how many tokens to score: as the file says, or those windows that fit `seconds`."""
    length = max(plan.config.evaluate.lengths)
    most = int(seconds / speed.evaluated_token(plan))
    return min(plan.config.evaluate.tokens, max(1, most // length) * length)


def _schedule(config: Config, steps: int, given: frozenset[str]) -> list[str]:
    """Return the settings of another number of steps: the schedule keeps its shape."""
    share = steps / config.train.steps
    optim = config.optim
    settings = {
        "train.steps": steps,
        "optim.warmup_steps": math.floor(share * optim.warmup_steps),
        "optim.decay_steps": max(min(optim.decay_steps, 1), math.floor(share * optim.decay_steps)),
        "checkpoint.every": -(-steps // CHECKPOINTS_OF_A_RUN),
    }
    return [f"{key}={value}" for key, value in settings.items() if key not in given]
