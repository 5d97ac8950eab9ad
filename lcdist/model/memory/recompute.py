"""Activations that are computed again in backward instead of being kept (arXiv:1604.06174).

Gradients of parameters are returned to autograd and never accumulated on the way: so the hooks of
each run once a backward, as Megatron's data parallelism counts on, whatever is recomputed inside of
what; and a function whose input asks for no gradient still trains its own parameters.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.memory.offload import OffloadedTensor
from megatron.core.tensor_parallel import random


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """The modules' parameters that ask for a gradient."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def recomputed(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    params: Sequence[Tensor] = (),
    put: Callable[[Tensor], OffloadedTensor] | None = None,
) -> Tensor:
    """`run(x)`, of which only x is kept until backward: where `put` puts it.

    params: all that `run` reads and that asks for a gradient. Random numbers repeat.
    """
    return _Recomputed.apply(run, put, x, *params)


class _Recomputed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        put: Callable[[Tensor], OffloadedTensor] | None,
        x: Tensor,
        *params: Tensor,
    ) -> Tensor:
        ctx.run, ctx.randomness = run, randomness()
        ctx.away = put(x) if put is not None else None
        # Parameters live anyway; saved, they might come back as other objects.
        ctx.params = params
        ctx.save_for_backward(*([x] if put is None else []))
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0] if ctx.away is None else ctx.away.get()
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with repeating(ctx.randomness), torch.enable_grad():
            out = ctx.run(x)
        return None, None, *gradients(out, [x, *ctx.params], grads[0])


def gradients(out: Tensor, of: Sequence[Tensor], dout: Tensor) -> list[Tensor | None]:
    """Of each tensor, None where it asks for no gradient or `out` does not depend on it."""
    wanted = [x for x in of if x.requires_grad]
    if not wanted:
        return [None] * len(of)
    found = iter(torch.autograd.grad(out, wanted, dout, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in of]


def randomness() -> tuple[Any, ...]:
    """The state of every generator that Megatron's layers draw from."""
    return random._get_all_rng_states()


@contextlib.contextmanager
def repeating(states: tuple[Any, ...]) -> Iterator[None]:
    """Draw what was drawn after `randomness()` gave `states`; then go on as before."""
    with random._fork_rng():
        random._set_all_rng_states(*states)
        yield


# --- selective ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """How to make a tensor again, or a view of it."""

    make: Callable[[Tensor], Tensor]
    x: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class Cheap(saved_tensors_hooks):
    """Within the block, what `made` was told of is not kept by whoever saves it.

    It is made from x whenever backward asks for it (arXiv:2205.05198, for what costs memory and
    little compute). All else is kept as ever.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._made: dict[int, tuple[Any, Callable[[Tensor], Tensor], Tensor]] = {}

    def made(self, out: Tensor, make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`out`, which is `make(x)`."""
        # Known by its memory, which is another tensor's once it is freed.
        self._made[_memory(out)] = weakref.ref(out), make, x.detach()
        return out

    def _pack(self, x: Tensor) -> Tensor | _Recipe:
        alive, make, source = self._made.get(_memory(x), (None, None, None))
        if make is None or source is None or alive is None or alive() is None:
            return x
        return _Recipe(make, source, x.size(), x.stride(), x.storage_offset())


def _unpack(kept: Tensor | _Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make(kept.x).as_strided(kept.size, kept.stride, kept.offset)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata
