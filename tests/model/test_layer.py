"""Count how often a layer runs norms and SwiGLU, forward and backward, and what it saves."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.distributed.mesh import build_mesh
from lcdist.model import norm as norm_module
from lcdist.model.build import build_model
from lcdist.plan import make_plan
from lcdist_kernels.norm import plain, scale_rows
from lcdist_kernels.swiglu import op as swiglu_op
from megatron.core.transformer.mlp import MLP
from tests.distributed import run_ranks
from tests.model.small import FULL, SELECTIVE, small
from tests.saved import saved_bytes

TOKENS, HIDDEN, FFN = 71, 64, 96
SHAPE = (f"train.seqlen={TOKENS}", "model.num_layers=1")
# 6 tiles, the last of them short.
TILED = ("train.mlp=tiled", "train.mlp_chunk=13")
GATE_UP = ("lora.rank=3", 'lora.targets=["gate","up"]')
DOWN = ("lora.rank=3", 'lora.targets=["down"]')

Calls = tuple[int, int, int]
Norms = tuple[int, int, int, int]


def built(words: tuple[str, ...]) -> tuple[Any, torch.Tensor]:
    """Return the layer of a model of one layer, and an input for it."""
    plan = make_plan(small(*SHAPE, *words), 1)
    [model] = build_model(plan, build_mesh(plan.config.parallel, 0).device)
    return model.decoder.layers[0], torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)


def calls(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[Calls]:
    """Return for each case how often SwiGLU ran: in forward, again in backward, and backward."""
    found = []
    for words in cases:
        layer, x = built(words)
        with (
            patch.object(swiglu_op, "fwd", wraps=swiglu_op.fwd) as forward,
            patch.object(swiglu_op, "bwd_", wraps=swiglu_op.bwd_) as backward,
            patch.object(MLP, "forward", side_effect=AssertionError("Megatron's own MLP")),
        ):
            y, _ = layer(hidden_states=x)
            first = forward.call_count
            y.backward(torch.randn_like(y))
        found.append((first, forward.call_count - first, backward.call_count))
    return found


# (forward, again in backward, backward)
CALLS: dict[tuple[str, ...], Calls] = {
    (): (1, 0, 1),
    # Backward makes z again in its one pass.
    (SELECTIVE,): (1, 0, 1),
    (FULL,): (1, 0, 1),
    TILED: (6, 0, 6),
    (FULL, *TILED): (6, 0, 6),
    # fc2 is frozen and has no adapter: its backward reads no input.
    (SELECTIVE, *GATE_UP): (1, 0, 1),
    (SELECTIVE, *DOWN): (1, 1, 1),
}


def test_swiglu_runs_no_more_often_than_it_must() -> None:
    [found] = run_ranks(calls, 1, [*CALLS])
    assert dict(zip(CALLS, found, strict=True)) == CALLS


class Additions(TorchDispatchMode):
    """Counts additions of hidden states `[.., 1, h]`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_addition = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.count += is_addition and result.shape[1:] == (1, HIDDEN)
        return result


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, whose operations no mode sees."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run


def norms(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[Norms]:
    """Return for each case how often norms ran forward, backward and again, and loose additions."""
    found = []
    for words in cases:
        layer, x = built(words)
        with (
            patch.object(plain, "fwd", wraps=unseen(plain.fwd)) as forward,
            patch.object(plain, "bwd", wraps=unseen(plain.bwd)) as backward,
            patch.object(norm_module, "scale_rows", wraps=scale_rows) as again,
            Additions() as additions,
        ):
            y, _ = layer(hidden_states=x)
            y.backward(torch.randn_like(y))
        found.append((forward.call_count, backward.call_count, again.call_count, additions.count))
    return found


# (forward, backward, scaled again, additions of hidden states outside norms)
NORMS: dict[tuple[str, ...], Norms] = {
    (): (2, 2, 0, 1),
    (SELECTIVE,): (2, 2, 2, 1),
    (FULL,): (4, 2, 0, 2),
    # The attention's, and those of tiles.
    TILED: (1 + 2 * 6, 1 + 6, 0, 1 + 6),
    # A frozen product saves no input. Its gradient and that of the adapters are added.
    (SELECTIVE, *GATE_UP): (2, 2, 1, 2),
}


def test_the_residual_is_added_in_norms_but_for_the_last_time() -> None:
    [found] = run_ranks(norms, 1, [*NORMS])
    assert dict(zip(NORMS, found, strict=True)) == NORMS


def kept(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[tuple[int, int]]:
    """Return for each case how many tensors of z's size and of gate_up's are saved."""
    found = []
    for words in cases:
        layer, x = built(words)
        with saved_bytes() as saved:
            y, _ = layer(hidden_states=x)
        counts = Counter(saved.values())
        z = 4 * TOKENS * FFN
        found.append((counts[z], counts[2 * z]))
        y.backward(torch.randn_like(y))
    return found


def test_z_is_saved_for_a_trained_fc2_alone() -> None:
    [found] = run_ranks(kept, 1, [(), GATE_UP, DOWN])
    assert found == [(1, 1), (0, 1), (1, 1)]


def twice(rank: int, world_size: int, way: tuple[str, ...]) -> list[str]:
    """Return what a second backward says, of the layer and of fc2 alone."""
    layer, x = built(way)
    y, _ = layer(hidden_states=x)
    fc2 = layer.mlp.linear_fc2.weight
    y.sum().backward(retain_graph=True)
    said = []
    for leaf in (x, fc2):
        try:
            torch.autograd.grad(y.sum(), leaf, retain_graph=True)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("way", [(), (SELECTIVE,)])
def test_a_second_backward_is_refused(way: tuple[str, ...]) -> None:
    [(layer, fc2)] = run_ranks(twice, 1, way)
    assert "overwritten" in layer
    # Without recomputation z is still there.
    assert ("overwritten" in fc2) == (way == (SELECTIVE,))
