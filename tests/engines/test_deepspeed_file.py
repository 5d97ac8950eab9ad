"""A DeepSpeed file's settings of speed and memory leave every loss as it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from lcdist.plan.deepspeed import NEUTRAL, NEUTRAL_ZERO
from tests.distributed import run_ranks
from tests.engines.internals import let_go
from tests.model.small import Meshes, small, take_steps

# Other values than DeepSpeed's own.
ZERO: dict[str, Any] = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "allgather_partitions": False,
    "sub_group_size": 5000,
    "round_robin_gradients": True,
    "use_multi_rank_bucket_allreduce": False,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 10,
}
OTHERS: dict[str, Any] = {
    "aio": {"block_size": 262144},
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    "memory_breakdown": True,
    "dump_state": True,
    "wall_clock_breakdown": True,
    "steps_per_print": 1,
}
FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{key: {"zero_optimization": {key: value}} for key, value in ZERO.items()},
    **{key: {key: value} for key, value in OTHERS.items()},
}
# Each where its code is DeepSpeed's own.
NAMES = {
    2: [name for name in FILES if not name.startswith("stage3")],
    3: ["nothing", *ZERO],
}


def losses(rank: int, world_size: int, folder: Path) -> dict[Any, list[float]]:
    """Return losses of some steps, by stage and file."""
    meshes, found = Meshes(), {}
    words = ("model.num_layers=2", "train.global_batch_size=4", "train.engine=deepspeed")
    for stage, names in NAMES.items():
        for name in names:
            file = f"deepspeed.json_file={folder / name}.json"
            more = (f"deepspeed.stage={stage}", "train.dtype=bf16", file)
            trainer = meshes.trainer(small(*words, *more))
            # Norms are summed in another order, so their last digit may differ.
            found[stage, name] = [loss for loss, _ in take_steps(trainer, 3)]
            let_go(trainer)
    return found


@pytest.mark.exhaustive
def test_what_is_said_to_be_of_speed_and_memory_changes_no_loss(tmp_path: Path) -> None:
    assert ZERO.keys() == set(NEUTRAL_ZERO)
    assert OTHERS.keys() == set(NEUTRAL) - {"zero_optimization"}
    for name, content in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = run_ranks(losses, 2, tmp_path, timeout=300)[0]
    for (stage, name), steps in found.items():
        assert steps == found[stage, "nothing"], (stage, name)
