"""Fit a configuration to a model that the user brings.

The rotary embedding is scaled by target length over model length: with position interpolation
(arXiv:2306.15595) if the model has no scaling, with its own rule otherwise.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcdist.config import ConfigError, dump, parse
from lcdist.config.overrides import merge_overrides
from lcdist.config.rope import Rope, RopeDynamic, RopeLong, RopePI, RopePlain, RopeYarn
from lcdist.config.rope_extend import with_factor
from lcdist.config.schema import AttentionConfig, Config, OptimConfig
from lcdist.config.source import Source, fill_model, rope_table
from lcdist.convert.huggingface.config import HFModel
from lcdist.convert.huggingface.custom_attention import has_landmarks, inference_layers
from lcdist.convert.huggingface.import_model import open_model
from lcdist.convert.huggingface.tokenizer import JSON, SENTENCEPIECE
from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.plan import make_plan

# Times the rates of a configuration that extends a model of some hundred steps. With those rates
# themselves the perplexity of one trained to the end was higher after 30 steps than before.
TRAINED_MODEL_RATE = 0.25


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
    the model is wider than the one in `config`, and to a quarter without LoRA.

    Args:
        config: configuration written for another model.
        hf: the user's model.
        overrides: the user's `section.key=value`. Those of `[model]` are applied last; `config` has
            the others.
        world_size: number of processes, to plan the run.

    Raises:
        ValueError: the model already has this context length, an override changes its shape, or
            `make_plan` rejects the result.
    """
    seqlen = config.train.seqlen
    if hf.seqlen >= seqlen:
        raise ValueError(
            f"the model already has a context of {hf.seqlen} tokens, and the run extends it to "
            f"{seqlen}: give a greater --length, or leave it out"
        )
    _check_method(config.attention, hf.attention)
    table = tomllib.loads(dump(replace(config, optim=_fitted_optim(config, hf, overrides))))
    fitted = parse({**table, "model": _model_table(hf, overrides, seqlen)})
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
    scales = [getattr(one.options, "length_scale", None) for one in (ours, theirs)]
    if theirs != AttentionConfig() and scales[0] != scales[1]:
        told = "without length_scale" if scales[1] is None else f"with {scales[1]}"
        remedy = (
            "leave it out" if scales[1] is None else f'WITH="attention.length_scale={scales[1]}"'
        )
        raise ValueError(
            f"attention.length_scale = {scales[0]}: the model was trained {told}; extend it in the "
            f"same way: {remedy}"
        )


def _fitted_optim(config: Config, hf: HFModel, overrides: Sequence[str]) -> OptimConfig:
    """Return the rates of `config` for the width of `hf`; what the user gives is kept."""
    optim = config.optim
    factor = min(1.0, config.model.hidden_size / hf.model.hidden_size)
    factor *= 1.0 if config.lora.rank else TRAINED_MODEL_RATE
    given = {word.partition("=")[0] for word in overrides}
    lr = optim.lr if "optim.lr" in given else factor * optim.lr
    min_lr = optim.min_lr if "optim.min_lr" in given else min(lr, factor * optim.min_lr)
    return replace(optim, lr=lr, min_lr=min_lr)


def _model_table(hf: HFModel, overrides: Sequence[str], seqlen: int) -> dict[str, Any]:
    """Return `[model]` as `overrides` and, for what they leave out, the user's model have it.

    Raises:
        ValueError: an override changes the model's shape, or no rotation follows from the model's.
    """
    errors: list[str] = []
    words = [word for word in overrides if word.startswith("model.")]
    table = merge_overrides({"model": {}}, words, errors)
    model = table["model"]
    rope = model.setdefault("rope", {})
    if isinstance(rope, dict) and not {"scaling", "extend"} & rope.keys():
        model["rope"] = {**rope_table(scaled_rope(hf.model.rope, hf.seqlen, seqlen)), **rope}
    source = Source("the model", hf.model, hf.seqlen)
    fill_model(table, source, source, errors)
    if errors:
        raise ConfigError(errors)
    return model
