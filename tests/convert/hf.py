"""Build tiny transformers models, compute their logits, and run conversions."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from lcdist.checkpoint import tensors as stored
from lcdist.convert import reference_forward as reference
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.import_model import import_model

logging.disable_progress_bar()
logging.set_verbosity_error()

SEQLEN = 40
# 250 is no multiple of 128, so the vocabulary is padded. The initializer range is large: with the
# usual small weights attention would be nearly uniform, and tests would not see rotation.
SHAPE: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQLEN,
    "initializer_range": 0.25,
    "rms_norm_eps": 3e-6,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    # Heads wider than hidden_size / heads; another base.
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama2": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 20}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


def make_model(family: str = "llama3", seed: int = 0, **changes: Any) -> Any:
    """Return a random model with random norms and biases."""
    config, model, own = FAMILIES[family]
    torch.manual_seed(seed)
    made = model(config(**{**SHAPE, **own, **changes})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    return made


def save(model: Any, folder: Path, shards: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def tokens(count: int = SEQLEN, rows: int = 2) -> Tensor:
    return torch.randint(250, (rows, count), generator=torch.Generator().manual_seed(1))


def logits_of(folder_or_model: Any, x: Tensor) -> Tensor:
    """Return logits `[b, s, vocab]` in fp32 of a transformers model or folder."""
    model = folder_or_model
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(x, use_cache=False).logits


def import_all(
    rank: int, world_size: int, jobs: Sequence[tuple[Path, Path, Sequence[str]]]
) -> list:
    """Run `import_model` for each job with small pieces; a function for run_ranks."""
    with small_pieces():
        return [import_model(*job).difference.max_difference for job in jobs]


def export_all(rank: int, world_size: int, jobs: Sequence[tuple[Path, Path, int]]) -> list:
    """Run `export_model` for each job with small pieces; a function for run_ranks."""
    with small_pieces():
        return [export_model(*job).difference.max_difference for job in jobs]


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Use pieces of ten rows, a divisor of neither the vocabulary nor the MLP's width."""
    with patch.object(stored, "PIECE_BYTES", 2000), patch.object(reference, "CHUNK_ELEMENTS", 500):
        yield
