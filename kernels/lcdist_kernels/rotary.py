"""Rotary position embedding (arXiv:2104.09864); pairs are halves, as in Hugging Face's LLaMA.

With half = head_dim / 2 and angle[p, i] = p * inv_freq[i], feature i < half pairs with i + half:

    y[i]        = x[i] cos - x[i + half] sin
    y[i + half] = x[i + half] cos + x[i] sin
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels import rotary_kernel
from lcdist_kernels.common import document_borders, document_starts, wide_dtype
from lcdist_kernels.plans import cached_plan
from lcdist_kernels.tile_ranges import DeviceStream, device_stream, send
from lcdist_kernels.triton_common import DTYPES

# A forward pass uses one set of positions, and a second one when packed or evaluated.
TABLES_KEPT = 2


class _Table(NamedTuple):
    """Cosines and sines of some positions."""

    positions: Tensor
    dtype: torch.dtype
    device: torch.device
    cos: Tensor
    sin: Tensor


class Rotary:
    """Rotary embedding with fixed frequencies.

    Args:
        inv_freq: `[head_dim / 2]`, radians per token.
        attention_factor: multiplies cos and sin, so it scales a logit by its square (YaRN,
            arXiv:2309.00071).

    Raises:
        ValueError: inv_freq is not a floating vector.
    """

    def __init__(self, inv_freq: Tensor, attention_factor: float = 1.0) -> None:
        if inv_freq.dim() != 1 or not inv_freq.is_floating_point():
            raise ValueError(
                f"inv_freq of shape {tuple(inv_freq.shape)}, {inv_freq.dtype}: "
                "expected floats [head_dim / 2]"
            )
        self.inv_freq = inv_freq.detach()
        self.attention_factor = attention_factor
        self._turns = rotary_kernel.turns(self.inv_freq)
        self._tables: tuple[_Table, ...] = ()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` `[b, s, h, d]` by `positions`, integers `[s]` or `[b, s]`; differentiable.

        On CUDA, below float64, one kernel computes angles that are exact to fp32 at any position.
        Elsewhere angles are computed in the wider of fp32 and x.dtype, and cos and sin are cast to
        x.dtype. Tables of positions on the CPU are cached and found again by value. Raises
        ValueError for shapes that do not fit.
        """
        return self._rotate(x, positions, 1)

    def rotate_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply the adjoint of `rotate`: the rotation by the opposite angles, times the factor."""
        return self._rotate(x, positions, -1)

    def _rotate(self, x: Tensor, positions: Tensor, sign: int) -> Tensor:
        self._check(x, positions)
        if x.is_cuda and x.dtype in DTYPES:
            if self._turns.device != x.device:
                self._turns = self._turns.to(x.device)
            factor = self.attention_factor
            return rotary_kernel.rotate(x, positions, self._turns, factor, float(sign))
        table = self._find(positions, x)
        return _Rotate.apply(x, table.cos, table.sin if sign > 0 else -table.sin)

    def rotation(self, positions: Tensor, x: Tensor) -> rotary_kernel.Rotation:
        """Return the rotation of tokens like those of x by `positions`, for use inside kernels.

        Arguments and errors as of `rotate`.
        """
        self._check(x, positions)
        factor = self.attention_factor
        return rotary_kernel.rotation_of(self.inv_freq, factor, positions, x)

    def _check(self, x: Tensor, positions: Tensor) -> None:
        """Raise ValueError unless x `[b, s, h, d]`, positions and the frequencies fit."""
        if x.dim() != 4 or x.shape[3] != 2 * len(self.inv_freq):
            raise ValueError(
                f"x of shape {tuple(x.shape)}: expected [b, s, h, {2 * len(self.inv_freq)}], "
                f"as this rotary has {len(self.inv_freq)} frequencies"
            )
        if positions.is_floating_point() or positions.shape not in (x.shape[1:2], x.shape[:2]):
            raise ValueError(
                f"positions of shape {tuple(positions.shape)}, {positions.dtype}: expected "
                f"integers [{x.shape[1]}] or {list(x.shape[:2])}"
            )

    def _find(self, positions: Tensor, x: Tensor) -> _Table:
        """Return the cached table of these positions, or a new one."""
        # Comparing values on a GPU would block.
        on_cpu = positions.device.type == "cpu"
        tables = self._tables
        if on_cpu:
            for table in tables:
                same_kind = table.dtype == x.dtype and table.device == x.device
                if same_kind and torch.equal(table.positions, positions):
                    return table
        table = self._make(positions, x)
        if on_cpu:
            # One atomic assignment, as virtual ranks share this object between threads.
            self._tables = (table, *tables)[:TABLES_KEPT]
        return table

    @torch.no_grad()
    def _make(self, positions: Tensor, x: Tensor) -> _Table:
        wide = wide_dtype(x.dtype)
        inv_freq = self.inv_freq.to(x.device, wide)
        angles = positions.to(x.device, wide)[..., None, None] * inv_freq  # [(b,) s, 1, d / 2]
        cos = (angles.cos() * self.attention_factor).to(x.dtype)
        sin = (angles.sin() * self.attention_factor).to(x.dtype)
        return _Table(positions.clone(), x.dtype, x.device, cos, sin)


def rotate_self(
    q: Tensor, k: Tensor, rotary: Rotary | None, positions: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate queries and keys of the same tokens and number the tokens.

    Args:
        q, k: `[b, s, h, d]`, `[b, s, h_kv, d]`.
        positions: integers `[s]` or `[b, s]`; default: from 0 in every document.
        cu_seqlens: see `document_starts`.

    Returns:
        q, k: rotated; unchanged where rotary is None.
        index: token numbers `[s]`, int64 on the CPU; shared by all calls, so never write to it.
        starts: the first token of each token's document, like index.
    """
    documents = document_borders(cu_seqlens, q.shape[1])
    if rotary is not None:
        positions = document_positions(q, documents) if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    return q, k, *token_numbers(q.shape[1], documents)


def document_positions(x: Tensor, documents: tuple[int, ...] | None) -> Tensor:
    """Return each token's position in its document `[s]`, where `Rotary.rotate` of x reads it.

    x `[b, s, h, d]`. documents: see `document_borders`. Shared by all calls, so never write to it.
    """
    on_gpu = x.is_cuda and x.dtype in DTYPES
    place = device_stream(x) if on_gpu else DeviceStream(torch.device("cpu"), 0)
    return _positions(x.shape[1], documents, place)


@cached_plan
def token_numbers(seqlen: int, documents: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Return token numbers and the first token of each one's document: int64 `[s]` on the CPU."""
    index = torch.arange(seqlen)
    borders = None if documents is None else torch.tensor(documents)
    return index, document_starts(borders, index, seqlen)


@cached_plan
def _positions(seqlen: int, documents: tuple[int, ...] | None, place: DeviceStream) -> Tensor:
    """Return each token's position in its document: `[s]`, int32 on a GPU and int64 on the CPU."""
    index, starts = token_numbers(seqlen, documents)
    positions = index - starts
    return positions if place.device.type == "cpu" else send(positions.to(torch.int32), place)


class _Rotate(torch.autograd.Function):
    """Rotation that saves the two tables, not x; the adjoint rotates by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = torch.empty_like(x)
        torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-1)
        torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, -sin), None, None
