"""Compute our model's logits on a mesh, through Megatron's schedules."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcdist.checkpoint.read import load_weights, open_checkpoint, saved_config
from lcdist.config.schema import Config
from lcdist.distributed.mesh import build_mesh
from lcdist.engines.state import load_model_state, model_state
from lcdist.layout import ContextLayout
from lcdist.model.build import build_model
from lcdist.model.sequence import SequenceParams
from lcdist.plan import make_plan
from megatron.core.pipeline_parallel import get_forward_backward_func


def on_mesh(config: Config, mesh: Sequence[str]) -> Config:
    """Return `config` with `key=value` overrides of [parallel]."""
    words = (word.split("=") for word in mesh)
    sizes: dict[str, Any] = {key: value == "true" or int(value) for key, value in words}
    parallel = replace(config.parallel, **sizes)
    train = replace(config.train, global_batch_size=dist.get_world_size() * 2, dtype="fp32")
    return replace(config, parallel=parallel, train=train)


def logits_on(
    rank: int, world_size: int, jobs: Sequence[tuple[Path, Sequence[str], Tensor]]
) -> Any:
    """Return logits `[b, s, vocab]` on rank 0 for each (checkpoint, mesh, tokens `[b, s]`).

    A function for run_ranks. Jobs must be sorted by mesh, so that each mesh is built once.
    """
    answers, built = [], None
    for path, mesh, x in jobs:
        checkpoint = open_checkpoint(path)
        config = on_mesh(saved_config(checkpoint), mesh)
        plan = make_plan(config, world_size)
        if built is None or built[0] != config.parallel:
            built = config.parallel, build_mesh(config.parallel, 1)
        chunks = build_model(plan, built[1].device)
        load_model_state(chunks, load_weights(checkpoint, model_state(chunks)))
        answers.append(whole_logits(chunks, built[1], plan, x))
    return answers


def whole_logits(chunks: Any, mesh: Any, plan: Any, x: Tensor) -> Tensor | None:
    """Return logits of all rows and tokens on rank 0, None elsewhere; DP ranks compute the same."""
    layout = ContextLayout(plan.layout.kind, x.shape[1], mesh.cp_size)
    mine = layout.shard(x, mesh.cp_rank, 1)
    single = len(chunks) == 1

    def forward(iterator: Any, model: Any) -> Any:
        row = next(iterator)
        out = model(row, None, None, packed_seq_params=SequenceParams(layout=layout))
        return out, lambda logits, **_: model.gather_logits(logits)

    iterators = [iter(mine.split(1)) for _ in chunks]
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators[0] if single else iterators,
            model=chunks[0] if single else list(chunks),
            num_microbatches=len(x),
            seq_length=x.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    local = torch.cat(found) if mesh.is_last_stage else None
    everywhere: list[Any] = [None] * dist.get_world_size()
    shown = local if mesh.tp_rank == 0 and mesh.dp_rank == 0 else None
    dist.all_gather_object(everywhere, (mesh.cp_rank, shown))
    if mesh.rank:
        return None
    shards = dict(pair for pair in everywhere if pair[1] is not None)
    whole = layout.unshard([shards[rank] for rank in range(mesh.cp_size)], 1)
    return whole[..., : plan.config.model.vocab_size]
