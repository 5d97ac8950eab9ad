"""Fit a configuration to a model that the user brings.

The rotary embedding is scaled by target length over model length: with position interpolation
(arXiv:2306.15595) if the model has no scaling, with its own rule otherwise.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from lcdist.config import dump, parse
from lcdist.config.rope import Rope, RopeDynamic, RopeLong, RopePI, RopePlain, RopeYarn
from lcdist.config.rope_extend import with_factor
from lcdist.config.schema import AttentionConfig, Config, ModelConfig
from lcdist.convert.huggingface.config import HFModel
from lcdist.convert.huggingface.custom_attention import has_landmarks, inference_layers
from lcdist.convert.huggingface.import_model import open_model
from lcdist.convert.huggingface.tokenizer import JSON, SENTENCEPIECE
from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.plan import make_plan


def open_user_model(folder: Path) -> HFModel:
    """Open the Hugging Face model and tokenizer in `folder`.

    Raises:
        ValueError: naming what is missing or does not fit, or a tokenizer that has no token to
            separate documents.
    """
    hf, _ = open_model(folder)
    if not any((folder / name).is_file() for name in (JSON, SENTENCEPIECE)):
        raise ValueError(
            f"{folder} has no tokenizer: neither {JSON} nor {SENTENCEPIECE}; add the model's own, "
            "which tokenizes the text"
        )
    tokenizer, num_tokens = open_tokenizer(folder), num_text_tokens(hf)
    padded = tokenizer.kind == "huggingface" and tokenizer.vocab_size < num_tokens
    if tokenizer.vocab_size != num_tokens and not padded:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens and the model {num_tokens} "
            "(vocab_size): this is not the model's tokenizer"
        )
    return hf


def num_text_tokens(hf: HFModel) -> int:
    """Return the size of the vocabulary without a landmark."""
    return hf.model.vocab_size - has_landmarks(inference_layers(hf.model, hf.attention))


def fit_config(config: Config, hf: HFModel, overrides: Sequence[str], world_size: int) -> Config:
    """Return `config` with the shape of `hf` and rotation scaled to `config.train.seqlen`.

    The vocabulary grows by one if landmarks need it. Learning rates shrink as 1 / hidden_size if
    the model is wider than the one in `config`.

    Args:
        config: configuration written for another model.
        hf: the user's model.
        overrides: `section.key=value`, applied last.
        world_size: number of processes, to plan the run.

    Raises:
        ValueError: the model already has this context length, an override changes its shape, or
            `make_plan` rejects the result.
    """
    seqlen = config.train.seqlen
    if hf.seqlen >= seqlen:
        raise ValueError(
            f"the model already has a context of {hf.seqlen} tokens, and the run extends it to "
            f"{seqlen}: set train.seqlen above {hf.seqlen}"
        )
    _check_method(config.attention, hf.attention)
    lr_factor = min(1.0, config.model.hidden_size / hf.model.hidden_size)
    optim = replace(
        config.optim, lr=config.optim.lr * lr_factor, min_lr=config.optim.min_lr * lr_factor
    )
    if any(word.startswith("model.rope.scaling=") for word in overrides):
        rope = RopePlain(base=hf.model.rope.base)
    else:
        rope = scaled_rope(hf.model.rope, hf.seqlen, seqlen)
    fitted = replace(config, model=replace(hf.model, rope=rope), optim=optim)
    fitted = parse(tomllib.loads(dump(fitted)), overrides)
    _check_shape(fitted.model, hf.model)
    inference_layers(fitted.model, fitted.attention)  # refuse now what cannot be exported later
    landmarks = fitted.model.vocab_size - make_plan(fitted, world_size).shape.text_vocab_size
    vocab_size = max(hf.model.vocab_size, num_text_tokens(hf) + landmarks)
    return replace(fitted, model=replace(fitted.model, vocab_size=vocab_size))


def scaled_rope(rope: Rope, seqlen: int, target: int) -> Rope:
    """Scale the rotary embedding of a model with context `seqlen` to the context `target`.

    Raises:
        ValueError: `rope` is LongRoPE, whose factors were searched for one length.
    """
    ratio = target / seqlen
    if isinstance(rope, RopePlain):
        return RopePI(base=rope.base, factor=ratio)
    if isinstance(rope, RopeDynamic):
        return rope  # scales with the length of the input
    if isinstance(rope, RopeLong):
        raise ValueError(
            f"the model has LongRoPE, whose factors were searched for {seqlen} tokens; none are "
            f"known for {target}: choose another rule, such as "
            f"model.rope.scaling=pi model.rope.factor={ratio:g}"
        )
    if isinstance(rope, RopeYarn):
        return with_factor(rope, max(rope.factor, target / rope.original_seqlen))
    return with_factor(rope, rope.factor * ratio)


def _check_method(ours: AttentionConfig, theirs: AttentionConfig) -> None:
    """Raise ValueError if a model with custom attention would get another method."""
    if theirs != AttentionConfig() and (ours.method, ours.layers) != (theirs.method, theirs.layers):
        remedy = f"METHOD={theirs.method}"
        remedy += f" WITH=\"attention.layers='{theirs.layers}'\"" if theirs.layers else ""
        raise ValueError(
            f"attention.method = '{ours.method}': the model was trained with {theirs.method}, and "
            f"its weights do not fit another method; extend it with {remedy}"
        )


def _check_shape(ours: ModelConfig, theirs: ModelConfig) -> None:
    """Raise ValueError if an override has changed the model's shape."""
    for name in (field.name for field in fields(ours)):
        ours_value, theirs_value = getattr(ours, name), getattr(theirs, name)
        if name not in ("rope", "init_std") and ours_value != theirs_value:
            raise ValueError(
                f"model.{name} = {ours_value!r}: the model has {theirs_value!r}; leave it out"
            )
