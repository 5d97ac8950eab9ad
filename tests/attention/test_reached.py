"""Methods with a full causal mask give weight to exactly the earlier tokens of a document."""

import dataclasses
from typing import Any

import pytest
import torch

from lcdist.attention import METHODS
from lcdist_kernels.common import document_starts
from tests.attention.body import Variant, make, on_virtual_ranks

FULL_MASK: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("coca", {"variant": "slack"}),
    ("coca", {"variant": "strict"}),
    ("lssar", {"reweight": False}),
    ("lssar", {"reweight": True}),
]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("name", "words"), FULL_MASK)
def test_tokens_with_weight_are_those_of_the_mask(
    name: str, words: dict[str, Any], kind: str, impl: str
) -> None:
    variant = Variant(name, METHODS[name].options(**words))
    problem = make(variant, kind, 2, packed=True, at_least=16)
    seqlen = problem.layout.seqlen
    assert seqlen == 16
    # The value of token j is unit vector j, so a row of out is that query's weights.
    v = torch.eye(seqlen, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1).clone()
    problem = dataclasses.replace(problem, qkv=[*problem.qkv[:2], v])
    weights = on_virtual_ranks(problem, impl)[0][0]  # [b, s, h, s]
    index = torch.arange(seqlen)
    starts = document_starts(problem.cu_seqlens, index, seqlen)
    mask = (index <= index[:, None]) & (index >= starts[:, None])
    reached = (weights != 0).any(0).any(1)
    if words.get("reweight"):  # Keys below a row's mean get no weight at all.
        assert not (reached & ~mask).any() and reached.any(1).all()
    elif name == "coca":  # A coefficient of zero gives a weight, as exp(0) is not zero.
        assert torch.equal((weights > 0).all(0).all(1), mask)
    else:
        assert torch.equal(reached, mask)
