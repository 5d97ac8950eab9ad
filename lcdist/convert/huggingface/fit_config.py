"""A model of the user's own in the place of the one that a configuration was written for.

The rotation is stretched by how much longer the run reads than the model did: position
interpolation (arXiv:2306.15595) where the model has no scaling, and its own rule where it has one.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from lcdist.config import dump, parse
from lcdist.config.rope import Rope, RopeDynamic, RopeLong, RopePI, RopePlain, RopeYarn
from lcdist.config.schema import AttentionConfig, Config, ModelConfig
from lcdist.convert.huggingface.config import HFModel
from lcdist.convert.huggingface.custom_attention import reading
from lcdist.convert.huggingface.import_model import open_model
from lcdist.convert.huggingface.tokenizer import JSON, SENTENCEPIECE
from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.plan import make_plan


def open_own_model(folder: Path) -> HFModel:
    """The Hugging Face model in `folder`, which has to have its tokenizer beside it.

    Raises ValueError naming what is missing, what does not fit, and what cannot part documents.
    """
    hf, _ = open_model(folder)
    if not any((folder / name).is_file() for name in (JSON, SENTENCEPIECE)):
        raise ValueError(
            f"{folder} has no tokenizer: neither {JSON} nor {SENTENCEPIECE}; put the model's own "
            "there, the text is read with it"
        )
    tokenizer, rows = open_tokenizer(folder), text_rows(hf)
    padded = tokenizer.kind == "huggingface" and tokenizer.vocab_size < rows
    if tokenizer.vocab_size != rows and not padded:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens and the model {rows} "
            "(vocab_size): this is not the model's tokenizer"
        )
    return hf


def text_rows(hf: HFModel) -> int:
    """Rows of the vocabulary that text can use: without the landmark of a model that has one."""
    layers = reading(hf.model, hf.attention)
    return hf.model.vocab_size - any("landmarks" in layer.method.supports for layer in layers)


def for_own_model(config: Config, hf: HFModel, overrides: Sequence[str], world_size: int) -> Config:
    """`config` with the shape of `hf`, its rotation stretched to `config.train.seqlen`.

    A vocabulary that landmarks need grows by one. Learning rates shrink as 1 / hidden_size where
    the model is wider than the one `config` was written for. overrides: `section.key=value` over
    all that. Raises ValueError where the model reads as far already or changes its shape, and as
    `make_plan`.
    """
    asked = config.train.seqlen
    if hf.seqlen >= asked:
        raise ValueError(
            f"the model reads {hf.seqlen} tokens already, and the run is to extend it to {asked}: "
            f"set train.seqlen above {hf.seqlen}"
        )
    _check_method(config.attention, hf.attention)
    narrower = min(1.0, config.model.hidden_size / hf.model.hidden_size)
    optim = replace(
        config.optim, lr=config.optim.lr * narrower, min_lr=config.optim.min_lr * narrower
    )
    if any(word.startswith("model.rope.scaling=") for word in overrides):
        rope = RopePlain(base=hf.model.rope.base)
    else:
        rope = stretched(hf.model.rope, hf.seqlen, asked)
    found = replace(config, model=replace(hf.model, rope=rope), optim=optim)
    found = parse(tomllib.loads(dump(found)), overrides)
    _check_shape(found.model, hf.model)
    reading(found.model, found.attention)  # what cannot be exported is refused now
    landmarks = found.model.vocab_size - make_plan(found, world_size).shape.text_vocab_size
    rows = max(hf.model.vocab_size, text_rows(hf) + landmarks)
    return replace(found, model=replace(found.model, vocab_size=rows))


def stretched(rope: Rope, seqlen: int, target: int) -> Rope:
    """`rope` of a model that reads `seqlen` tokens, for one that is to read `target`.

    Raises ValueError for LongRoPE, of which every factor was searched for one length.
    """
    ratio = target / seqlen
    if isinstance(rope, RopePlain):
        return RopePI(base=rope.base, factor=ratio)
    if isinstance(rope, RopeDynamic):
        return rope  # it grows with what is read
    if isinstance(rope, RopeLong):
        raise ValueError(
            f"the model's rotation is LongRoPE, of which each factor was searched for {seqlen} "
            f"tokens; none is known for {target}: ask for another rule, as in "
            f"model.rope.scaling=pi model.rope.factor={ratio:g}"
        )
    if isinstance(rope, RopeYarn):
        written, usual = rope.attention_factor, 0.1 * math.log(rope.factor) + 1
        usual = written is None or math.isclose(written, usual, rel_tol=1e-6)
        factor = max(rope.factor, target / rope.original_seqlen)
        return replace(rope, factor=factor, attention_factor=None if usual else written)
    return replace(rope, factor=rope.factor * ratio)


def _check_method(asked: AttentionConfig, there: AttentionConfig) -> None:
    """A model whose attention is not plain is extended with its own."""
    if there != AttentionConfig() and (asked.method, asked.layers) != (there.method, there.layers):
        words = f"METHOD={there.method}"
        words += f" WITH=\"attention.layers='{there.layers}'\"" if there.layers else ""
        raise ValueError(
            f"attention.method = '{asked.method}': the model attends with {there.method}, and its "
            f"weights mean nothing to another method; extend it with {words}"
        )


def _check_shape(asked: ModelConfig, there: ModelConfig) -> None:
    for name in (field.name for field in fields(asked)):
        ours, theirs = getattr(asked, name), getattr(there, name)
        if name not in ("rope", "init_std") and ours != theirs:
            raise ValueError(f"model.{name} = {ours!r}: the model has {theirs!r}; leave it out")
