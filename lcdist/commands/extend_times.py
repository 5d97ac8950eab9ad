"""Say what each length would take: on this machine, and on H100s."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from lcdist.commands.extend_choice import (
    EVALUATION_SHARE,
    FEWEST_STEPS,
    Chooser,
    Speed,
    duration,
    lack_of_memory,
    meshes,
)
from lcdist.config import ConfigError
from lcdist.config.schema import Config
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import Plan, make_plan
from lcdist.plan.measured import H100, H100_SOURCE, STEPS
from lcdist.plan.time import step_seconds

GIB = 2**30
GPUS = (1, 2, 4)
UNKNOWN = "?"


@dataclass(frozen=True)
class LengthRow:
    """Hold the time and memory that a job of one length takes.

    Attributes:
        length: In tokens.
        steps: Of a whole job.
        step_here: Seconds of a step on this machine; None: it lacks memory, or was not timed.
        minutes_here: That the fewest steps and their evaluation take.
        lack: Of memory on this machine, in words; empty if it has enough.
        gpus: H100s that it needs; None: more than one machine's four.
        step_there: Seconds of a step on them; None: unmeasured.
        memory_there: Bytes on each of them.
    """

    length: int
    steps: int
    step_here: float | None
    minutes_here: float
    lack: str
    gpus: int | None
    step_there: float | None
    memory_there: int


def length_rows(lengths: Sequence[int], chooser: Chooser) -> list[LengthRow]:
    """Return a row for each length that the settings allow.

    Args:
        lengths: In tokens.
        chooser: That has found that nothing fits here.
    """
    rows = []
    for length in lengths:
        try:
            plan, _, lack = chooser.in_memory(length)
        except ValueError:
            continue
        steps = chooser.asked.steps_of(plan.config)
        step, minutes = None, 0.0
        if not lack and chooser.speed is not None:
            step, minutes = chooser.speed.step(plan), _minutes(plan, chooser.speed, steps)
        there = _there(chooser.config_at(length, ()))
        rows.append(LengthRow(length, steps, step, minutes, lack, *there))
    return rows


def _minutes(plan: Plan, speed: Speed, steps: int) -> float:
    """Return what the fewest steps and the least evaluation take on this machine."""
    # One window of text is the least that can be scored.
    evaluation = max(plan.config.evaluate.lengths) * speed.evaluated_token(plan)
    training = min(FEWEST_STEPS, steps) * speed.step(plan)
    return max(training + evaluation, training / (1 - EVALUATION_SHARE)) / 60


def _there(config: Config) -> tuple[int | None, float | None, int]:
    """Return the fewest H100s that a configuration fits, seconds of a step and bytes on each."""
    needed = 0
    for gpus in GPUS:
        for tp, cp in meshes(gpus):
            mesh = replace(config.parallel, tp_size=tp, cp_size=cp, sequence_parallel=tp > 1)
            try:
                plan = make_plan(replace(config, parallel=mesh), gpus, GPU_SPECS["h100"])
            except ConfigError:
                continue
            needed = plan.memory.device_bytes
            if not lack_of_memory(plan):
                return gpus, step_seconds(plan, H100), needed
    return None, None, needed


def lengths_table(rows: Sequence[LengthRow]) -> Table:
    """Return the rows as a table."""
    steps = f"{rows[0].steps:,}" if rows else ""
    title = "Time of steps here, and on H100s without what the host adds between kernels"
    table = Table("tokens", "a step here", f"{steps} here", "H100s", "a step there", title=title)
    for name in (f"{steps} there", "GiB each"):
        table.add_column(name)
    for row in rows:
        table.add_row(f"{row.length:,}", *_here_in_words(row), *_there_in_words(row))
    return table


def _here_in_words(row: LengthRow) -> tuple[str, str]:
    if row.step_here is None:
        return ("lacks memory" if row.lack else "not timed"), UNKNOWN
    return duration(row.step_here), duration(row.steps * row.step_here)


def _there_in_words(row: LengthRow) -> tuple[str, ...]:
    memory = f"{row.memory_there / GIB:.0f} of 80"
    if row.gpus is None:
        return f"more than {GPUS[-1]}", UNKNOWN, UNKNOWN, memory
    if row.step_there is None:
        return str(row.gpus), "unmeasured", UNKNOWN, memory
    return str(row.gpus), duration(row.step_there), duration(row.steps * row.step_there), memory


def errors_table() -> Table:
    """Return how far the estimates for an H100 are off where a step was measured."""
    title = f"Estimates for one H100 (rates {H100_SOURCE}) beside measured steps"
    table = Table("step", "measured on", "ms", "estimate", "error", title=title)
    for row in STEPS:
        numbers = [f"{row.milliseconds:.0f}", f"{row.estimate:.0f}", f"{row.error:+.0%}"]
        table.add_row(row.what, row.device, *numbers)
    return table


def commands_elsewhere(rows: Sequence[LengthRow], command: str, length_word: str) -> list[str]:
    """Return the command for each length on a machine that can run it.

    Args:
        rows: of all lengths.
        command: what the user typed, without length and minutes.
        length_word: what gives the length to it: "LENGTH=" or "--length ".
    """
    lines = ["On another machine:"]
    for row in rows:
        if row.gpus is not None:
            machine = "one H100" if row.gpus == 1 else f"{row.gpus} H100s"
            lines.append(f"  {command} {length_word}{row.length}    ({machine})")
    return lines if len(lines) > 1 else []


def refusal(reasons: Sequence[str], rows: Sequence[LengthRow]) -> str:
    """Return one line: why nothing fits, and what to do here.

    Args:
        reasons: for each length that was tried.
        rows: of all lengths.
    """
    timed = [row for row in rows if row.step_here is not None]
    remedy = "use a machine with more memory, or a smaller model"
    if timed:
        # The estimate is no promise.
        minutes = math.ceil(1.2 * timed[0].minutes_here)
        remedy = f"give it longer, --length {timed[0].length} --minutes {minutes}, or another"
        remedy += " machine"
    return f"nothing was done, as nothing fits: {reasons[-1]}; {remedy}"
