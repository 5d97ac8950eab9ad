"""Time short training steps of a model before a job begins."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lcdist.commands.extend_choice import Speed
from lcdist.config import ConfigError, dump
from lcdist.config.schema import Config, DataConfig
from lcdist.plan import Plan, make_plan
from lcdist.plan.time import step_work

SHORTEST = 128


def probe_speed(
    length: int,
    config_at: Callable[[int], Config],
    ranks: int,
    start: Callable[[Sequence[str]], None],
) -> Speed:
    """Return how fast this machine takes steps of a model.

    Args:
        length: longest length to time, in tokens.
        config_at: returns the configuration at a length.
        ranks: processes to start.
        start: runs a command of lcdist on all of them.
    """
    with tempfile.TemporaryDirectory(prefix="lcdist-probe-") as name:
        plans = probed_plans(length, config_at, ranks, Path(name))
        files, output = [], Path(name, "steps.json")
        for short, plan in plans.items():
            files.append(str(Path(name, f"{short}.toml")))
            Path(files[-1]).write_text(dump(plan.config), encoding="utf-8")
        start(["probe", str(output), *files])
        rows = json.loads(output.read_text(encoding="utf-8"))
    return Speed.of_steps([(step_work(plans[short]).flops, *seconds) for short, *seconds in rows])


def probed_plans(
    length: int, config_at: Callable[[int], Config], ranks: int, folder: Path
) -> dict[int, Plan]:
    """Return plans of growing lengths up to `length`, on made-up text, by length.

    Lengths that the attention refuses are left out: the user's blocks or chunks may be longer.
    """
    lengths = [SHORTEST]
    while 2 * lengths[-1] <= length:
        lengths.append(2 * lengths[-1])
    if length > lengths[-1] or len(lengths) == 1:
        lengths = [*(short for short in lengths if short < length), length]
    plans = {}
    for short in lengths:
        config = config_at(short)
        data = DataConfig(source="synthetic", documents=config.data.documents)
        config = replace(
            config,
            data=data,
            log=replace(config.log, folder=str(folder / "run")),
            checkpoint=replace(config.checkpoint, load=""),
            lora=replace(config.lora, load=""),
        )
        try:
            plans[short] = make_plan(config, ranks)
        except ConfigError:
            continue
    return plans
