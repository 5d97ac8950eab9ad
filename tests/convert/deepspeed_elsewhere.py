"""Train tiny transformers models with DeepSpeed alone, as a user without lcdist would."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcdist.hardware.deepspeed_on_cpu import import_deepspeed
from tests.convert.hf import make_model, tokens

FROZEN = "model.norm.weight"
ODD = {"hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 3}
# Odd sizes: DeepSpeed pads them. Stage 1 has bf16 weights with fp32 masters, stage 3 tied weights.
# 4 is stage 3 with a frozen norm, which the converter to universal checkpoints would leave out.
MODELS: dict[int, tuple[str, dict[str, Any]]] = {
    1: ("llama3", {**ODD, "num_key_value_heads": 1}),
    2: ("llama3", {"hidden_size": 48}),
    3: ("llama2", {**ODD, "head_dim": 12}),
    4: ("llama2", {**ODD, "head_dim": 12}),
}


def train_each(rank: int, world_size: int, folder: Path) -> dict[int, dict[str, Tensor]]:
    """Save each of MODELS in folder/zeroN, and 1 and 3 in folder/universalN, too.

    Returns the fp32 weights by N and name; a function for run_ranks.
    """
    deepspeed = import_deepspeed()
    weights = {}
    for run, (family, shape) in MODELS.items():
        model = make_model(family, num_hidden_layers=1, **shape)
        if rank == 0:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / f"hf{run}")
        weights[run] = _train(deepspeed, model, run, folder / f"zero{run}", rank)
    if rank == 0:
        for stage in (1, 3):
            _make_universal(folder / f"zero{stage}/global_step1", folder / f"universal{stage}")
    return weights


def _train(deepspeed: Any, model: Any, run: int, out: Path, rank: int) -> dict[str, Tensor]:
    """Take one step, save, and return the weights."""
    model.get_parameter(FROZEN).requires_grad_(run == 3)
    stage = min(run, 3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": stage == 1},
        },
    )
    x = tokens(9)[rank : rank + 1]
    engine.backward(engine(input_ids=x, labels=x).loss)
    engine.step()
    engine.save_checkpoint(str(out))
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().float().clone()
        else:
            found[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
    engine.destroy()
    return found


def _make_universal(source: Path, out: Path) -> None:
    converter = import_module("deepspeed.checkpoint.ds_to_universal")
    converter.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
