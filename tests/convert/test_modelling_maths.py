"""Exported attention matches the methods' references, in one step and in many."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS
from lcdist.config import rope as ropes
from lcdist.config.schema import (
    CocaOptions,
    FullOptions,
    LandmarkOptions,
    LssarOptions,
    TensorizedOptions,
)
from lcdist.convert.huggingface.rope import rope_block, rope_to_hf
from lcdist.convert.remote_files import load_remote_attention, load_remote_rotary
from lcdist.model.rotary import attention_factor, inverse_frequencies, make_rotary
from tests.tolerance import assert_matches

attention_lcdist = load_remote_attention()
rotary_lcdist = load_remote_rotary()
attend = attention_lcdist.attend
frequencies, rotation = rotary_lcdist.frequencies, rotary_lcdist.rotation

OPTIONS = {
    "full": [FullOptions(), FullOptions(length_scale=11)],
    "coca": [CocaOptions(), CocaOptions(variant="strict")],
    "lssar": [
        LssarOptions(power=power, reweight=reweight, exempt_rows=exempt)
        for power, reweight, exempt in (
            (15.0, True, 3),
            (2.5, True, 0),
            (0.5, True, 5),
            (9, False, 3),
        )
    ],
    "landmark": [
        LandmarkOptions(block_size=block, top_k=top_k, select_tokens=unit)
        for block, top_k, unit in ((4, None, 9), (5, 2, 1), (3, 3, 7), (2, 1, 4), (4, 2, 4096))
    ],
    "tensorized": [
        TensorizedOptions(modes=modes, local_blocks=near, pe=pe, hop_heads=hop)
        for modes, near in (((4,), 2), ((3, 4), 1), ((), 2), ((5,), 1))
        for pe in ("mode", "global")
        for hop in ("q", "kv", "auto")
    ],
}
WIDTH = 8


def cases() -> Iterator[Any]:
    for method, all_options in OPTIONS.items():
        for number, options in enumerate(all_options):
            yield pytest.param(method, options, id=f"{method}-{number}")


@pytest.mark.parametrize("at_once", [attention_lcdist.SCORES_AT_ONCE, 600])
@pytest.mark.parametrize(("method", "options"), [*cases()])
def test_exported_method_matches_its_reference(
    method: str, options: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare outputs and gradients at odd lengths, one token, grouped heads, a learnt bias."""
    monkeypatch.setattr(attention_lcdist, "SCORES_AT_ONCE", at_once)
    rotary = make_rotary(ropes.RopePlain(), WIDTH)
    rotate = rotation({"rope_theta": 10000.0}, WIDTH, 40, 40)
    table = {"method": method, **dataclasses.asdict(options)}
    for seqlen, nheads, nheads_kv in ((1, 4, 4), (7, 4, 2), (53, 6, 2), (29, 2, 2)):
        generator = torch.Generator().manual_seed(seqlen)
        qkv = [random(generator, 2, seqlen, n, WIDTH) for n in (nheads, nheads_kv, nheads_kv)]
        extras = []
        if table.get("modes"):
            extras.append(random(generator, len(table["modes"]), nheads))
        params = {"branch_bias": extras[0]} if extras else None
        ours = METHODS[method].reference(*qkv, options=options, rotary=rotary, params=params)
        theirs = attend(table, (qkv[0], qkv[1], qkv[2]), rotate, *extras)
        assert_matches(theirs, ours)
        dout = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
        ones = torch.autograd.grad(ours, qkv, dout)
        for one, other in zip(torch.autograd.grad(theirs, qkv, dout), ones, strict=True):
            # A row that attends only to itself has zero gradients, up to rounding.
            assert (one - other).norm() <= 1e-10 * (1 + other.norm())


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


ROPES: list[ropes.Rope] = [
    ropes.RopePlain(base=700.0),
    ropes.RopePI(factor=2.5),
    ropes.RopeNTK(factor=2.5),
    ropes.RopeDynamic(factor=2.0, original_seqlen=16),
    ropes.RopeYarn(factor=2.5, original_seqlen=16, beta_fast=2.0, beta_slow=0.2),
    ropes.RopeYarn(
        factor=3.0, original_seqlen=16, beta_slow=0.2, truncate=False, attention_factor=1.3
    ),
    ropes.RopeYarn(factor=4.0, original_seqlen=4096),
    ropes.RopeLlama3(factor=4.0, original_seqlen=16, base=100.0),
    ropes.RopeLong(
        factor=2.5,
        original_seqlen=16,
        short_factors=(1.0, 1.1, 1.2, 1.3),
        long_factors=(1.0, 1.5, 2.0, 3.0),
    ),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.scaling)
def test_frequencies_match_training(rope: ropes.Rope) -> None:
    """Use the exported config.json, at lengths below and beyond the original length."""
    table = rope_to_hf(rope, WIDTH, 40)
    block, _ = rope_block(table)
    for seqlen in (1, 16, 17, 40, 1001):
        theta, factor = frequencies(block, WIDTH, table["max_position_embeddings"], seqlen)
        assert_matches(theta, inverse_frequencies(rope, WIDTH, seqlen))
        assert math.isclose(factor, attention_factor(rope), rel_tol=1e-12)


def test_unknown_method_or_rope_type_is_rejected() -> None:
    q = torch.randn(1, 3, 2, WIDTH)
    with pytest.raises(ValueError, match="method 'ring': must be one of full, coca, lssar"):
        attend({"method": "ring"}, (q, q, q), lambda x: x)
    with pytest.raises(ValueError, match="rope_type 'mrope' is unknown"):
        rotation({"rope_type": "mrope", "rope_theta": 1e4}, WIDTH, 40, 40)
