"""Configurations on a device that is not there: two training steps, an evaluation, some words.

A line each, as JSON.

    python -m tests.stand_in.training RANK WORLD_SIZE "CONFIG [SECTION.KEY=VALUE ...]" ...

What is wrong ends it.
"""

import json
import sys
from typing import Any

import torch

# Installs the device, which must come before anything of lcdist.
from tests.stand_in.moved import STAND_IN, second_step  # isort: skip
from lcdist.config import load
from lcdist.distributed.mesh import build_mesh
from lcdist.hardware.peak import Peak
from lcdist.inference.generate import generate
from lcdist.model.kernel_calls import call_kernels
from lcdist.plan import make_plan
from lcdist.train.build import build_trainer, open_dataset
from tests.engines.internals import chunks_of
from tests.stand_in.counting import Counting
from tests.stand_in.cuda import StandIn, leave


def train(words: str, stand_in: StandIn) -> None:
    path, *overrides = words.split()
    config = load(path, overrides)
    plan = make_plan(config, int(sys.argv[2]))
    mesh = build_mesh(config.parallel, config.train.seed)
    with Counting() as building:
        trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "not measured"))
    weights = sum(x.ndim == 2 for chunk in chunks_of(trainer) for x in chunk.parameters())
    drawn = stand_in.launches.pop("_normal_kernel")
    stand_in.variants.clear()
    call_kernels(plan, mesh)
    compiled, stand_in.variants = stand_in.variants, set()
    work = second_step(trainer, mesh)
    said: dict[str, Any] = {"launches": dict(stand_in.launches), "waits": dict(stand_in.waits)}
    said["other"] = work["other"].rows()
    late = stand_in.variants - compiled if config.attention.impl == "auto" else set()
    said["compiled late"] = sorted({name for name, *_ in late})
    # LoRA's factors are a few columns wide, and drawn on the host.
    if not config.lora.rank and config.attention.method != "tensorized":
        assert drawn == weights and not any("normal" in x for x in building.cpu_operations)
    stand_in.waits.clear()
    batches = [batch.to(mesh.device) for batch in trainer.loader.next_step()]
    trainer.engine.evaluate(batches, plan.layout, config.train.seqlen)
    parallel = config.parallel
    if parallel.cp_size == parallel.pp_size == 1 and not parallel.sequence_parallel:
        prompt = torch.randint(plan.shape.text_vocab_size, (37,), device=mesh.device)
        assert generate(chunks_of(trainer)[0], prompt, 5).shape == (42,)
    said["waits in use"] = dict(stand_in.waits)
    for chunk in chunks_of(trainer):
        assert all(x.is_cuda for x in (*chunk.parameters(), *chunk.buffers()))
    assert plan.dtype == "bf16" and mesh.device.type == "cuda"
    print(json.dumps({"of": words, **said}), flush=True)


with STAND_IN:
    for each in sys.argv[3:]:
        train(each, STAND_IN)
leave()
