"""Stand-ins for cuDNN and FlashAttention in torch, where the libraries are looked for.

torch's operators get a CPU implementation, so their real signatures are met; modules of
FlashAttention are made with the functions that releases offer.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lcdist_kernels.full import library, library_choice


class Call(NamedTuple):
    """One call of a stand-in: sizes of its block, key heads, mask."""

    rows: int
    keys: int
    nheads_kv: int
    causal: bool


def call_of(q: Tensor, k: Tensor, causal: bool) -> Call:
    """Return the sizes of a call, heads first."""
    return Call(q.shape[2], k.shape[2], k.shape[1], causal)


class StandIns:
    """Compute what the libraries compute, heads first, and note the calls.

    wrong: changes (out, lse) or (dq, dk, dv) before they are returned.
    """

    def __init__(self) -> None:
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        self.wrong: Callable[..., Any] = lambda *results: results

    def fwd(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Any, ...]:
        """Return (out, lse `[b, h, s]`) of q `[b, h, s, d]`."""
        self.forward.append(call_of(q, k, causal))
        assert scale >= 0, "a library takes the maximum before the scale"
        scores, values = self._scores(q, k, causal, scale), self._heads(v, q)
        lse = scores.logsumexp(-1)
        out = ((scores - lse[..., None]).exp() @ values).to(q.dtype)
        return self.wrong(out, lse)

    def bwd(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Any, ...]:
        """Return (dq, dk, dv) by the lse and out that are given."""
        self.backward.append(call_of(q, k, causal))
        assert lse.shape == q.shape[:3] and lse.is_contiguous()
        dout, out = self._wide(dout), self._wide(out)
        weights = (self._scores(q, k, causal, scale) - lse[..., None]).exp()
        dscores = weights * (dout @ self._heads(v, q).mT - (dout * out).sum(-1, keepdim=True))
        dq = scale * dscores @ self._heads(k, q)
        dk, dv = (
            x.unflatten(1, (k.shape[1], -1)).sum(2)
            for x in (scale * dscores.mT @ self._wide(q), weights.mT @ dout)
        )
        return self.wrong(dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype))

    def _wide(self, x: Tensor) -> Tensor:
        assert x.stride(-1) == 1
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _heads(self, x: Tensor, q: Tensor) -> Tensor:
        return self._wide(x).repeat_interleave(q.shape[1] // x.shape[1], 1)

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        scores = scale * self._wide(q) @ self._heads(k, q).mT
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -math.inf) if causal else scores


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def install_operators(made: torch.library.Library, name: str, stand_ins: StandIns) -> None:
    """Implement torch's operators of "cudnn" or "fa2" on the CPU; signatures as in torch 2.11."""

    def cudnn(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
              return_debug_mask=False, *, scale: Any = None):  # fmt: skip
        assert attn_bias is None and compute_log_sumexp and not dropout_p
        out, lse = stand_ins.fwd(q, k, v, is_causal, scale)
        return _nine(out, lse[..., None], k)

    def cudnn_bwd(grad_out, q, k, v, out, logsumexp, philox_seed, philox_offset, attn_bias,
                  cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *,
                  scale: Any = None):  # fmt: skip
        assert attn_bias is cum_seq_q is cum_seq_k is None and not dropout_p
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        # torch keeps a plan by the layout of q, k and v alone, and this is the one layout.
        assert all(x.transpose(1, 2).is_contiguous() for x in (grad_out, out))
        assert logsumexp.shape[3] == 1
        return stand_ins.bwd(grad_out, q, k, v, out, logsumexp[..., 0], is_causal, scale)

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
              scale: Any = None):  # fmt: skip
        assert not dropout_p
        out, lse = stand_ins.fwd(q, k, v, is_causal, scale)
        return _nine(out, lse, k)

    def flash_bwd(grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                  is_causal, philox_seed, philox_offset, *, scale: Any = None):  # fmt: skip
        assert cum_seq_q is cum_seq_k is None and not dropout_p
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        return stand_ins.bwd(grad_out, q, k, v, out, logsumexp, is_causal, scale)

    word, pair = ("cudnn", (cudnn, cudnn_bwd)) if name == "cudnn" else ("flash", (flash, flash_bwd))
    for ending, function in zip(("", "_backward"), pair, strict=True):
        made.impl(f"_scaled_dot_product_{word}_attention{ending}", function, "CPU")


def _nine(out: Tensor, lse: Tensor, k: Tensor) -> tuple[Any, ...]:
    """Return the results of a forward: random state and a mask to look at are for dropout."""
    state = torch.zeros((), dtype=torch.int64)
    return out, lse, None, None, out.shape[2], k.shape[2], state, state, None


def flash_3(stand_ins: StandIns, newer: bool) -> ModuleType:
    """Return flash_attn_interface; newer releases have operators that are told of `is_causal`."""

    def _flash_attn_forward(
        q, k, v, k_new=None, softmax_scale: Any = None, causal=False, sm_margin=0
    ):
        out, lse = stand_ins.fwd(*heads_first(q, k, v), causal=causal, scale=softmax_scale)
        return out.transpose(1, 2).contiguous(), lse, None, None

    def fill(grads: list[Tensor], *given: Any) -> None:
        dout, q, k, v, out, lse, causal, scale = given
        results = stand_ins.bwd(
            *heads_first(dout, q, k, v, out), lse=lse, causal=causal, scale=scale
        )
        for grad, result in zip(grads, results, strict=True):
            grad.copy_(result.transpose(1, 2))

    def old(dout, q, k, v, out, softmax_lse, dq: Any = None, dk: Any = None, dv: Any = None,
            softmax_scale: Any = None, causal=False, deterministic=False):  # fmt: skip
        fill([dq, dk, dv], dout, q, k, v, out, softmax_lse, causal, softmax_scale)

    def new(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, softmax_scale: float, is_causal: bool = False,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        fill([dq, dk, dv], dout, q, k, v, out, softmax_lse, is_causal, softmax_scale)

    if newer:
        changed = ("dq", "dk", "dv")
        backward: Any = torch.library.custom_op(
            f"lcdist_tests::bwd_{id(stand_ins)}", new, mutates_args=changed
        )
    else:
        backward = old
    return module_of(
        "flash_attn_interface",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=backward,
    )


def flash_4(stand_ins: StandIns) -> ModuleType:
    """Return flash_attn.cute.interface."""

    def _flash_attn_fwd(q, k, v, softmax_scale: Any = None, causal=False, return_lse=False):
        out, lse = stand_ins.fwd(*heads_first(q, k, v), causal=causal, scale=softmax_scale)
        return out.transpose(1, 2).contiguous(), lse if return_lse else None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale: Any = None, causal=False):
        first = heads_first(dout, q, k, v, out)
        return tuple(
            heads_first(*stand_ins.bwd(*first, lse=lse, causal=causal, scale=softmax_scale))
        )

    return module_of(
        "flash_attn.cute.interface",
        _flash_attn_fwd=_flash_attn_fwd,
        _flash_attn_bwd=_flash_attn_bwd,
    )


def module_of(name: str, **functions: Any) -> ModuleType:
    """Return a module that the import system finds under a name once it is in sys.modules."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(functions)
    return module


@contextmanager
def libraries(
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    capability: int = 9,
    dtypes: tuple[torch.dtype, ...] = library_choice.HALF,
    newer: bool = True,
) -> Iterator[dict[str, StandIns]]:
    """Put stand-ins in place of the libraries `names`; CPU tensors are as on a GPU of capability.

    dtypes: those that libraries are said to take. newer: of FlashAttention-3's two forms.
    """
    made = {name: StandIns() for name in names}
    operators = torch.library.Library("aten", "IMPL")
    for name, stand_ins in made.items():
        if name in ("cudnn", "fa2"):
            install_operators(operators, name, stand_ins)
        else:
            module = flash_3(stand_ins, newer) if name == "fa3" else flash_4(stand_ins)
            for parent in ("flash_attn", "flash_attn.cute"):
                monkeypatch.setitem(sys.modules, parent, module_of(parent))
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(library_choice, "capability_of", lambda x: capability)
    monkeypatch.setattr(library_choice, "HALF", dtypes)
    library.find_library.cache_clear()
    library_choice.tested.cache_clear()
    try:
        yield made
    finally:
        library.find_library.cache_clear()
        library_choice.tested.cache_clear()
        operators._destroy()
