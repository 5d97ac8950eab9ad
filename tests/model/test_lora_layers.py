"""Linears with adapters cut over ranks, in float64: the formula's outputs and gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcdist.config.lora import LoraConfig
from lcdist.distributed.mesh import build_mesh
from lcdist.model.lora import LoraColumn, LoraRow
from lcdist.model.transformer_config import transformer_config
from tests.distributed import run_ranks
from tests.model.lora_cases import SP, TP
from tests.model.small import small
from tests.tolerance import assert_matches

HEADS, GROUPS, WIDTH, HIDDEN, FFN, RANK, ALPHA = 4, 2, 6, 10, 14, 3, 5.0
LAYERS = {
    "qkv": ("q", "k", "v"),
    "kv": ("v", "k"),
    "gate-up": ("gate", "up"),
    "up": ("up",),
    "o": ("o",),
}
TOKENS, ROWS = 6, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(layer: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute every target by the formula, in the order of Megatron's fused output."""
    out = {}
    for target in ("o",) if layer == "o" else ("gate", "up") if "up" in layer else ("q", "k", "v"):
        out[target] = x @ weights[target].T
        if target in LAYERS[layer]:
            A, B = weights[f"{target}.A"], weights[f"{target}.B"]
            out[target] = out[target] + ALPHA / RANK * (x @ A.T) @ B.T
    if len(out) < 3:
        return torch.cat([*out.values()], -1)
    groups = weights["v"].shape[0] // WIDTH
    each = HEADS // groups * WIDTH
    columns = []
    for g in range(groups):
        columns.append(out["q"][..., g * each : (g + 1) * each])
        columns += [out[t][..., g * WIDTH : (g + 1) * WIDTH] for t in ("k", "v")]
    return torch.cat(columns, -1)


def my_part(layer: str, whole: Tensor, dim: int) -> Tensor:
    """Return this rank's part of a sharded tensor; gate and up are sharded separately."""
    halves = whole.chunk(2, dim) if "up" in layer and dim == 0 else [whole]
    return torch.cat(
        [half.chunk(dist.get_world_size(), dim)[dist.get_rank()] for half in halves], dim
    )


def built(layer: str, groups: int, sequence_parallel: bool) -> Any:
    words = ["model.nheads=4", f"model.nheads_kv={groups}", f"model.head_dim={WIDTH}"]
    words += [f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={FFN}", TP]
    config = transformer_config(small(*words, *([SP] if sequence_parallel else [])), torch.float64)
    lora = LoraConfig(rank=RANK, alpha=ALPHA, targets=LAYERS[layer])  # type: ignore[arg-type]
    same: Any = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    same |= {"skip_bias_add": True, "lora": lora, "targets": LAYERS[layer]}
    if layer == "o":
        return LoraRow(HEADS * WIDTH, HIDDEN, input_is_parallel=True, **same)
    if "up" in layer:
        return LoraColumn(HIDDEN, 2 * FFN, stride=2, **same)
    return LoraColumn(HIDDEN, (HEADS + 2 * groups) * WIDTH, **same)


def compare(layer: str, groups: int, sequence_parallel: bool) -> None:
    torch.manual_seed(7)
    module = built(layer, groups, sequence_parallel)
    kv, q = groups * WIDTH, HEADS * WIDTH
    sizes = {"q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, q)}
    sizes |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN)}
    whole = {target: draw(*size) for target, size in sizes.items()}
    for target in LAYERS[layer]:
        whole[f"{target}.A"] = draw(RANK, sizes[target][1]).requires_grad_()
        whole[f"{target}.B"] = draw(sizes[target][0], RANK).requires_grad_()
    x = draw(TOKENS, ROWS, sizes["o" if layer == "o" else "q"][1]).requires_grad_()
    out = dense(layer, whole, x)
    dout = draw(*out.shape)
    out.backward(dout)

    row = layer == "o"
    # The columns of the whole weight as the formula lays them: a product with the identity.
    frozen = {k: v.detach() * (0 if "." in k else 1) for k, v in whole.items()}
    weight = dense(layer, frozen, torch.eye(x.shape[-1], dtype=torch.float64)).T
    tokens = slice(None)
    if sequence_parallel:
        half = TOKENS // 2
        tokens = slice(dist.get_rank() * half, dist.get_rank() * half + half)
    with torch.no_grad():
        module.weight.copy_(my_part(layer, weight, 1 if row else 0))
        module.weight.requires_grad_(False)
        for target, adapter in module.lora.items():
            A, B = whole[f"{target}.A"], whole[f"{target}.B"]
            adapter.A.copy_(my_part("", A, 1) if row else A)
            adapter.B.copy_(B if row or not module.shards_b else my_part("", B, 0))
    x_part = (my_part("", x, 2) if row else x[tokens]).detach().requires_grad_()
    found, _ = module(x_part)
    dout_part = dout[tokens] if row else my_part(layer, dout.movedim(-1, 0), 0).movedim(0, -1)
    found.backward(dout_part)
    whole_out = out[tokens] if row else my_part(layer, out.movedim(-1, 0), 0).movedim(0, -1)
    assert_matches(found, whole_out.detach())
    assert x.grad is not None and x_part.grad is not None
    assert_matches(x_part.grad, my_part("", x.grad, 2) if row else x.grad[tokens])
    for target, adapter in module.lora.items():
        dA, dB = whole[f"{target}.A"].grad, whole[f"{target}.B"].grad
        assert dA is not None and dB is not None
        for parameter in (adapter.A, adapter.B):
            # What Megatron does, after the last micro-batch, with what is marked so.
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad)
        assert_matches(adapter.A.grad, my_part("", dA, 1) if row else dA)
        assert_matches(adapter.B.grad, dB if row or not module.shards_b else my_part("", dB, 0))


def compare_all(rank: int, world_size: int) -> None:
    build_mesh(small(TP).parallel, 0)
    for sequence_parallel in (False, True):
        for layer in LAYERS:
            for groups in (GROUPS, 1) if "v" in layer else (GROUPS,):
                compare(layer, groups, sequence_parallel)


def test_layers_cut_over_ranks_are_the_formula() -> None:
    run_ranks(compare_all, 2)
