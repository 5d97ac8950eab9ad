"""Activation checkpointing: recompute activations in backward (arXiv:1604.06174).

What a parameter gets goes through autograd: its gradient, or a placeholder where a product has
added it to `main_grad` (`model/gradient.py`). So each parameter's hooks run once per backward,
which Megatron's data parallelism requires, also for nested recomputation. And a function whose
input does not require a gradient still trains its parameters.
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
from lcdist_kernels import tape
from megatron.core.tensor_parallel import random


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the modules' parameters that require a gradient."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def recomputed(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    params: Sequence[Tensor] = (),
    put: Callable[[Tensor], OffloadedTensor] | None = None,
    keep: bool = False,
) -> Tensor:
    """Return `run(x)`; save only x for backward, which runs `run` again.

    The second run draws the same random numbers as the first.

    Args:
        run: the function to recompute.
        x: its input.
        params: all other tensors that `run` reads and that require a gradient.
        put: stores x elsewhere until backward; None: x stays where it is.
        keep: also save what attention keeps on a tape, as x, so that the second run does not
            compute it again.
    """
    return _Recomputed.apply(run, put, keep, x, *params)


class _Recomputed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        put: Callable[[Tensor], OffloadedTensor] | None,
        keep: bool,
        x: Tensor,
        *params: Tensor,
    ) -> Tensor:
        ctx.run, ctx.rng_states = run, rng_states()
        ctx.offloaded = put(x) if put is not None else None
        # Parameters stay alive anyway. Saved-tensor hooks could return them as other objects.
        ctx.params = params
        ctx.tape, kept = None, list[Tensor]()
        if keep:
            with tape.record() as ctx.tape:
                out = run(x)
            kept = ctx.tape.release()
        else:
            out = run(x)
        if ctx.offloaded is None:
            ctx.save_for_backward(x, *kept)
        else:
            ctx.offloaded.add(kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors if ctx.offloaded is None else ctx.offloaded.get_all()
        x = x.detach().requires_grad_(ctx.needs_input_grad[3])
        again = contextlib.nullcontext() if ctx.tape is None else tape.replay(ctx.tape, kept)
        with again, replay_rng(ctx.rng_states), torch.enable_grad():
            out = ctx.run(x)
        # Backward reads what it needs from the graph, which frees it on the way.
        del kept
        return None, None, None, *gradients([out], [x, *ctx.params], grads)


def gradients(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], douts: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradient of each input, given those of the outputs.

    None for an input that requires no gradient or on which no output depends.
    """
    differentiable = [x for x in inputs if x.requires_grad]
    pairs = [pair for pair in zip(outs, douts, strict=True) if pair[0].requires_grad]
    if not differentiable or not pairs:
        return [None] * len(inputs)
    made, given = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(made, differentiable, given, allow_unused=True))
    return [next(grads) if x.requires_grad else None for x in inputs]


def rng_states() -> tuple[Any, ...]:
    """Return the state of every generator that Megatron's layers draw from."""
    return random._get_all_rng_states()


@contextlib.contextmanager
def replay_rng(states: tuple[Any, ...]) -> Iterator[None]:
    """Set the generators to `states` inside the block; restore their current state after it."""
    with random._fork_rng():
        random._set_all_rng_states(*states)
        yield


# --- selective ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recomputation:
    """Recipe to recompute a tensor or a view of it: `make(x)`, then size, stride and offset.

    version: of x when it was registered, to tell whether x has been overwritten since.
    """

    make: Callable[[Tensor], Tensor]
    x: Tensor
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class SelectiveRecompute(saved_tensors_hooks):
    """Inside the block, autograd saves a recomputation instead of each registered tensor.

    Backward recomputes the tensor from its input (arXiv:2205.05198, for activations that are large
    and cheap). All other tensors are saved as usual.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._registered: dict[int, tuple[Any, Callable[[Tensor], Tensor], Tensor]] = {}

    def register(self, out: Tensor, make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Register `out = make(x)` to be recomputed; return it."""
        # The key is the storage. The weak reference tells when another tensor has reused it.
        self._registered[_storage_id(out)] = weakref.ref(out), make, x.detach()
        return out

    def _pack(self, x: Tensor) -> Tensor | _Recomputation:
        alive, make, source = self._registered.get(_storage_id(x), (None, None, None))
        if make is None or source is None or alive is None or alive() is None:
            return x
        version, view = source._version, (x.size(), x.stride(), x.storage_offset())
        return _Recomputation(make, source, version, *view)


def _unpack(saved: Tensor | _Recomputation) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    if saved.x._version != saved.version:
        raise RuntimeError("the input of a recomputation has been overwritten since the forward")
    with torch.no_grad():
        return saved.make(saved.x).as_strided(saved.size, saved.stride, saved.offset)


def _storage_id(x: Tensor) -> int:
    return x.untyped_storage()._cdata
