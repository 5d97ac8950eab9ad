"""CoCA under context parallelism: bytes and flops by hand, saved tensors, a cache of t."""

import dataclasses

import pytest
import torch

from lcdist.attention import METHODS, HeadSlice, Shape, Traffic
from lcdist.config.schema import CocaOptions
from lcdist.exchange import Group, VirtualGroup
from lcdist.layout import KINDS, ContextLayout
from tests.attention.body import Problem, assert_all_match, make, on_virtual_ranks
from tests.attention.checks import (
    assert_documents_of_one_token_return_values,
    assert_ranks_equal_reference,
)
from tests.saved import saved_bytes

METHOD = METHODS["coca"]
STRICT = CocaOptions(variant="strict")


def strict(kind: str, cp_size: int, **keywords) -> Problem:
    return dataclasses.replace(make("coca", kind, cp_size, **keywords), options=STRICT)


@pytest.mark.parametrize(("itemsize", "grad_size"), [(2, 4), (4, 4), (8, 8)])
def test_bytes_by_hand(itemsize: int, grad_size: int) -> None:
    shape = Shape(batch=1, nheads=4, nheads_kv=2, head_dim=8, itemsize=itemsize)
    block = 1 * 6 * 2 * (4 + 8)
    layout = ContextLayout("contiguous", 18, 3)
    counted = METHOD.bytes(CocaOptions(), shape, layout)
    assert counted == Traffic(
        (2 * block * itemsize,) * 3, (2 * block * itemsize + 3 * block * grad_size,) * 3
    )
    full = METHODS["full"].bytes(METHODS["full"].options(), shape, layout)
    for mine, keys_and_values in zip(counted, full, strict=True):
        assert [4 * sent for sent in mine] == [3 * sent for sent in keys_and_values]
    assert METHOD.bytes(STRICT, shape, ContextLayout("zigzag", 18, 1)) == Traffic((0,), (0,))


def test_flops_are_those_of_full_attention() -> None:
    shape = Shape(batch=2, nheads=3, nheads_kv=1, head_dim=6, itemsize=2, seqlen=4)
    assert METHOD.flops(STRICT, shape) == 2 * 3 * 10 * (6 + 6) * 2
    with pytest.raises(ValueError, match="seqlen"):
        METHOD.flops(STRICT, dataclasses.replace(shape, seqlen=None))


def test_half_precision_inputs_give_half_precision_results() -> None:
    problem = strict("zigzag", 2, dtype=torch.float16)
    for impl in ("reference", "torch", "auto"):
        assert all(x.dtype == torch.float16 for x in on_virtual_ranks(problem, impl)[0])


def test_rank_saves_q_its_block_out_and_lse_alone() -> None:
    problem = make("coca", "zigzag", 2, at_least=512)

    def saved_by(group: Group) -> int:
        mine = [problem.layout.shard(x, 0, 1).requires_grad_() for x in problem.qkv]
        keywords = problem.keywords() | {"layout": problem.layout, "group": group, "impl": "torch"}
        with saved_bytes() as saved:
            METHOD.attention(*mine, **keywords)
        return sum(saved.values())

    batch, local, nheads, nheads_kv, head_dim = 2, 256, 4, 2, 16
    elements = nheads * (2 * head_dim + 1) + nheads_kv * (head_dim + head_dim // 2)
    assert VirtualGroup(2).run(saved_by) == 2 * [8 * batch * local * elements]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_one_token_return_values(kind: str) -> None:
    assert_documents_of_one_token_return_values(make("coca", kind, 3))


def test_one_token_per_rank_equals_reference() -> None:
    for kind in ("contiguous", "striped"):
        assert_ranks_equal_reference(make("coca", kind, 8, at_least=1))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_illegal_calls_raise(impl: str) -> None:
    problem = make("coca", "contiguous", 1)
    call = problem.keywords() | {"layout": problem.layout, "group": None, "impl": impl}
    with pytest.raises(ValueError, match="8 frequencies"):
        METHOD.attention(*(x[..., :8] for x in problem.qkv), **call)
    odd = [x[..., :15] for x in problem.qkv]
    with pytest.raises(ValueError, match="head_dim = 15.*even"):
        METHOD.attention(*odd, **(call | {"rotary": None}))
    with pytest.raises(ValueError, match="'tied'.*slack, strict"):
        METHOD.attention(*problem.qkv, **(call | {"options": CocaOptions(variant="tied")}))  # pyright: ignore[reportArgumentType]
    heads = HeadSlice(first=0, nheads=4, first_kv=0, nheads_kv=2)
    out = METHOD.attention(*problem.qkv, **(call | {"heads": heads}))
    assert_all_match([out], [METHOD.reference(*problem.qkv, **problem.keywords())])
