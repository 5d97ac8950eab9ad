"""Train models with custom attention; return their logits and generated tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcdist.inference.generate import generate
from lcdist.plan.resolve import evaluation_layers
from lcdist.train.trainer import Trainer
from tests.convert.hf import tokens
from tests.convert.ours import whole_logits
from tests.engines.internals import chunks_of
from tests.model.small import Meshes, small

SEQLEN, VOCAB = 40, 250
# Odd text lengths below and beyond the original length of the rotary scalings, 16.
LENGTHS = (1, 11, 37)
PROMPT, NEW = 12, 7
LONG = "long_factors=[1.0, 1.1, 1.3, 1.7, 2.1, 2.6, 3.0, 3.9]"
SHORT = "short_factors=[1.0, 1.0, 1.05, 1.1, 1.1, 1.2, 1.2, 1.25]"
ROPES = {
    "pi": "{scaling='pi', factor=2.5, base=900.0}",
    "ntk": "{scaling='ntk', factor=2.5}",
    "dynamic": "{scaling='dynamic', factor=2.0, original_seqlen=16}",
    "yarn": "{scaling='yarn', factor=2.5, original_seqlen=16, beta_fast=2.0, beta_slow=0.2}",
    "llama3": "{scaling='llama3', factor=4.0, original_seqlen=16, base=100.0}",
    "longrope": f"{{scaling='longrope', factor=2.5, original_seqlen=16, {SHORT}, {LONG}}}",
}


def words(method: str, *more: str, rope: str = "") -> tuple[str, ...]:
    rope = ROPES.get(rope, "{scaling='none'}")
    return (f"attention.method={method}", f"model.rope={rope}", *more)


def options(**given: Any) -> tuple[str, ...]:
    return tuple(f"attention.{key}={str(value).lower()}" for key, value in given.items())


MIXED = "attention.layers=coca@0 tensorized@1 scca@3"
MARKED = "attention.layers=coca@0 full@2"
CASES: dict[str, tuple[str, ...]] = {
    "length": words("full", *options(length_scale=9), rope="yarn"),
    "slack": words("coca", rope="dynamic"),
    "strict": words("coca", "attention.variant=strict", rope="yarn"),
    "lssar": words("lssar", rope="llama3"),
    "lssar-2": words("lssar", *options(power=2.5, exempt_rows=0), rope="pi"),
    "lssa": words("lssar", *options(reweight=False), "model.tied_embeddings=true"),
    "fold": words("tensorized", *options(modes=[4]), "model.qk_norm=true", rope="longrope"),
    "fold-2": words("tensorized", *options(modes=[3, 4], local_blocks=1, hop_heads="kv")),
    "fold-global": words("tensorized", *options(modes=[5], pe="global"), rope="ntk"),
    "fold-none": words("tensorized", *options(modes=[])),
    "fold-wide": words("tensorized", *options(modes=[4]), "model.nheads=8", "model.qkv_bias=true"),
    "marks": words("landmark", *options(block_size=5), rope="dynamic"),
    "marks-units": words(
        "landmark", *options(block_size=4, top_k=2, select_tokens=7), "model.qk_norm=true"
    ),
    "marks-tokens": words(
        "landmark", *options(block_size=4, top_k=2, select_tokens=1), rope="longrope"
    ),
    "mixed": words("lssar", MIXED, "attention.tensorized.modes=[4]", "attention.scca.chunk_size=8"),
    "mixed-marks": words("landmark", *options(block_size=5), MARKED, "model.qkv_bias=true"),
    "stages": words(
        "tensorized", MIXED, *options(modes=[3, 4], local_blocks=1), "attention.scca.chunk_size=8"
    ),
    "half": words("coca", "train.dtype=bf16"),
}
# Variants of other cases; `test_modelling_maths` covers their formulas.
EXHAUSTIVE = (
    *("lssar-2", "fold-2", "fold-global", "fold-none"),
    *("marks", "marks-tokens", "stages"),
)
DEFAULT = tuple(name for name in CASES if name not in EXHAUSTIVE)
# The mesh of the case "stages": interleaved pipeline stages with layers 0 and 2, and 1 and 3.
STAGES = ("parallel.tp_size=1", "parallel.pp_size=2", "parallel.vp_size=2")
NOT_GENERATED = ("stages", "half")  # generation needs one pipeline stage


def run_all(rank: int, world_size: int, folder: Path, names: Sequence[str]) -> Any:
    """Train one step of each case and save it; return (logits by length, generated tokens)."""
    meshes, answers = Meshes(), {}
    for name in names:
        mesh = STAGES if name == "stages" else (f"parallel.tp_size={world_size}",)
        own = (f"train.seqlen={SEQLEN}", "model.init_std=0.25", f"log.folder={folder / name}")
        trainer = meshes.trainer(small(*mesh, *CASES[name], *own))
        trainer.engine.forward_backward(trainer.loader.next_step())
        # A learning rate that moves norms away from 1 and biases away from 0.
        trainer.engine.step(0.1)
        trainer.step += 1
        trainer.save(wait=True)
        read_densely(trainer)
        generated = None
        if name not in NOT_GENERATED:
            generated = generate(chunks_of(trainer)[0], text(PROMPT)[0], NEW)
        answers[name] = [text_logits(trainer, text(count)) for count in LENGTHS], generated
    return answers


def text(count: int) -> Tensor:
    """Return two rows of text without the last token of the vocabulary."""
    return tokens(count) % (VOCAB - 1)


def read_densely(trainer: Trainer) -> None:
    """Replace training-only patterns by full attention, as evaluation does."""
    dense = evaluation_layers(trainer.plan.layers, "auto")
    for chunk in chunks_of(trainer):
        layers: Any = chunk.decoder.layers
        for layer in layers:
            core, mine = layer.self_attention.core_attention, dense[layer.layer_number - 1]
            core.method, core.options = mine.method, mine.options


def text_logits(trainer: Trainer, x: Tensor) -> Tensor:
    """Return logits `[b, s, vocab]` of text `[b, s]`, with landmarks inserted."""
    plan, count = trainer.plan, x.shape[1]
    slots = plan.shape.document_layout
    laid = torch.stack([slots.place(row, 0, slots.num_slots(count), count) for row in x])
    logits = whole_logits(chunks_of(trainer), trainer.mesh, plan, laid)
    if logits is None:
        return torch.empty(0)
    return logits[:, slots.is_text(laid[0])]
