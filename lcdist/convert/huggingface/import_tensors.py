"""The rows of an imported model's tensors, read from their Hugging Face parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist.checkpoint.tensors import TensorSource
from lcdist.convert.huggingface.names import EMBEDDING, OUTPUT, FusedTensor, SourceRows
from lcdist.convert.huggingface.weights import Weights
from lcdist.plan import Plan


def tensor_sources(
    fused: Sequence[FusedTensor], weights: Weights, plan: Plan
) -> list[TensorSource]:
    """Return a source of each of our tensors; reading one raises ValueError if it is not finite."""
    return [
        _vocabulary_source(ours, weights, plan)
        if ours.key in (EMBEDDING, OUTPUT)
        else TensorSource(
            ours.key,
            ours.shape,
            _fused_dtype(ours, weights),
            lambda first, stop, ours=ours: _fused_rows(ours, weights, first, stop),
        )
        for ours in fused
    ]


def _finite(rows: Tensor, part: SourceRows) -> Tensor:
    """Return the rows of a part; raise ValueError if a value in them is not finite."""
    bad = (~rows.isfinite()).reshape(len(rows), -1).any(1)
    if bad.any():
        row = part.first + int(bad.nonzero()[0])
        raise ValueError(
            f"{part.name}, row {row}, has a weight that is not finite: the model is damaged or has "
            "diverged; take another copy or an earlier checkpoint of it"
        )
    return rows


def _fused_rows(ours: FusedTensor, weights: Weights, first: int, stop: int) -> Tensor:
    """Read rows first to stop of one of our tensors from its Hugging Face parts."""
    dtype = _fused_dtype(ours, weights)
    parts = [
        _finite(weights.rows(part.name, part.first, part.first + part.count), part).to(dtype)
        for part in ours.parts_between(first, stop)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fused_dtype(ours: FusedTensor, weights: Weights) -> torch.dtype:
    """Return the parts' common dtype, or fp32, which holds all others, if they differ."""
    dtypes = {weights.dtype(part.name) for part in ours.parts}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _vocabulary_source(ours: FusedTensor, weights: Weights, plan: Plan) -> TensorSource:
    """Return an embedding or output layer: old rows, their mean for new tokens, zero padding."""
    num_old, num_tokens = ours.count, plan.config.model.vocab_size
    dtype = _fused_dtype(ours, weights)
    mean = _mean_row(ours, weights).to(dtype) if num_tokens > num_old else None

    def rows(first: int, stop: int) -> Tensor:
        if stop <= num_old:
            return _fused_rows(ours, weights, first, stop)
        out = torch.zeros(stop - first, *ours.rest, dtype=dtype)
        old_rows = max(0, min(stop, num_old) - first)
        if old_rows:
            out[:old_rows] = _fused_rows(ours, weights, first, first + old_rows)
        if mean is not None:
            out[max(0, num_old - first) : max(0, num_tokens - first)] = mean
        return out

    return TensorSource(ours.key, (plan.shape.padded_vocab_size, *ours.rest), dtype, rows)


def _mean_row(ours: FusedTensor, weights: Weights) -> Tensor:
    """Return the mean of all rows, summed in float64."""
    total = torch.zeros(ours.rest, dtype=torch.float64)
    for first in range(0, ours.count, 1024):
        stop = min(first + 1024, ours.count)
        total += _fused_rows(ours, weights, first, stop).double().sum(0)
    return total / ours.count
