"""Rotary embedding of config.json, in all forms, against transformers' frequencies."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lcdist.config import rope as ropes
from lcdist.convert.huggingface.rope import rope_from_hf, rope_to_hf
from lcdist.convert.reference_forward import hf_frequencies
from lcdist.model.rotary import attention_factor, inverse_frequencies
from tests.tolerance import assert_matches

WIDTH = 16
FACTORS = tuple(1 + i / 3 for i in range(WIDTH // 2))
ROPES: list[ropes.Rope] = [
    ropes.RopePlain(base=500.0),
    ropes.RopePI(base=700.0, factor=4.0),
    ropes.RopeDynamic(base=900.0, factor=3.0, original_seqlen=32),
    ropes.RopeYarn(
        factor=4.0, original_seqlen=64, beta_fast=3.0, beta_slow=0.3, attention_factor=1.2
    ),
    ropes.RopeYarn(factor=4.0, original_seqlen=64, attention_factor=1.5, truncate=False),
    ropes.RopeLlama3(factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0, original_seqlen=64),
    ropes.RopeLong(
        factor=4.0,
        original_seqlen=32,
        short_factors=FACTORS[::-1],
        long_factors=FACTORS,
        attention_factor=1.4,
    ),
]
names = [f"{rope.scaling}-{i}" for i, rope in enumerate(ROPES)]


def transformers_frequencies(table: dict[str, Any], seqlen: int) -> tuple[torch.Tensor, float]:
    """Return transformers' (frequencies, attention factor) for `seqlen` tokens."""
    shape = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, head_dim=WIDTH, **table)
    rotary = LlamaForCausalLM(config).model.rotary_emb
    rotary(torch.zeros(1), torch.arange(seqlen)[None])
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("seqlen", [20, 100])
@pytest.mark.parametrize("rope", ROPES, ids=names)
def test_frequencies_match_transformers(rope: ropes.Rope, seqlen: int) -> None:
    """Compare transformers, the reference and our model, below and beyond the original length."""
    table = rope_to_hf(rope, WIDTH, 128)
    theirs, factor = transformers_frequencies(dict(table), seqlen)
    read, read_factor = hf_frequencies(table, WIDTH, seqlen)
    ours = inverse_frequencies(rope, WIDTH, seqlen)
    assert_matches(read, ours, 1e-12)
    assert_matches(theirs, ours, 1e-6)
    assert factor == pytest.approx(attention_factor(rope), rel=1e-12)
    assert read_factor == pytest.approx(attention_factor(rope), rel=1e-12)


@pytest.mark.parametrize("rope", ROPES, ids=names)
def test_rope_survives_a_round_trip_in_both_forms(rope: ropes.Rope) -> None:
    old = rope_to_hf(rope, WIDTH, 128)
    assert rope_from_hf(old) == rope
    block = {**(old["rope_scaling"] or {"rope_type": "default"}), "rope_theta": old["rope_theta"]}
    new = {"max_position_embeddings": old["max_position_embeddings"], "rope_parameters": block}
    assert rope_from_hf(new) == rope
    if old["rope_scaling"]:
        del old["rope_scaling"]["rope_type"]  # the oldest form has `type` alone
        assert rope_from_hf(old) == rope


def test_ntk_is_written_as_a_larger_base() -> None:
    """Hugging Face has no such type; the frequencies are the same."""
    rope = ropes.RopeNTK(base=10000.0, factor=4.0)
    table = rope_to_hf(rope, WIDTH, 128)
    assert table["rope_scaling"] is None and table["max_position_embeddings"] == 128
    back = rope_from_hf(table)
    assert isinstance(back, ropes.RopePlain)
    assert_matches(inverse_frequencies(back, WIDTH), inverse_frequencies(rope, WIDTH), 1e-14)


def test_yarn_derives_factor_from_lengths_and_scale_from_mscale() -> None:
    """DeepSeek's configurations have this form."""
    table = {
        "max_position_embeddings": 160,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "original_max_position_embeddings": 40,
            "factor": None,
            "mscale": 1.3,
            "mscale_all_dim": 0.7,
        },
    }
    rope = rope_from_hf(table)
    assert isinstance(rope, ropes.RopeYarn) and rope.factor == 4.0 and rope.original_seqlen == 40
    read, factor = hf_frequencies(table, WIDTH, 10)
    assert factor == pytest.approx(attention_factor(rope), rel=1e-12)
    assert_matches(read, inverse_frequencies(rope, WIDTH), 1e-12)
    block = {**table["rope_scaling"], "rope_type": "yarn"}
    theirs, their_factor = transformers_frequencies({**table, "rope_scaling": block}, 10)
    assert their_factor == pytest.approx(factor, rel=1e-12)
    assert_matches(theirs, read, 1e-6)


BASE = {"max_position_embeddings": 128, "rope_theta": 10000.0}
WRONG = {
    "type 'su' is": {"rope_scaling": {"type": "su", "factor": 2.0}},
    "no key mrope_section": {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
    "'linear' needs factor": {"rope_scaling": {"rope_type": "linear"}},
    "factor = '2'": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "factor = -1": {"rope_scaling": {"rope_type": "linear", "factor": -1}},
    "partial_rotary_factor = 0.5": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}
    },
    "has both": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
    "rope_theta is 10000.0, but 5.0 in": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}
    },
    "differs between layers": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "set attention_factor": {
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": 3.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0],
            "long_factor": [1.0],
        }
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_unknown_type_or_key_is_rejected(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_from_hf({**BASE, **WRONG[message]})
