"""What an export has beside a LLaMA's weights: how every layer attends, and the code for it.

`full` and `scca` are read with full attention, so theirs is a plain LLaMA. For the other methods
`modeling_lcdist.py` and `attention_lcdist.py` go along, and an `auto_map` that names them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from lcdist.config.load import build
from lcdist.config.schema import (
    OPTIONS,
    AttentionConfig,
    Config,
    LogConfig,
    ModelConfig,
    RawOptions,
    TrainConfig,
)
from lcdist.convert.huggingface.names import FusedTensor, SourceRows, hf_prefix, layer_prefix
from lcdist.convert.remote_files import read_remote_files
from lcdist.model.init import EXTRAS
from lcdist.plan.resolve import LayerAttention, evaluation_layers, resolve_layers

FAMILY, KIND = "LcdistForCausalLM", "lcdist"
AUTO_MAP = {
    "AutoConfig": "modeling_lcdist.LcdistConfig",
    "AutoModelForCausalLM": f"modeling_lcdist.{FAMILY}",
}


def reading(model: ModelConfig, attention: AttentionConfig) -> tuple[LayerAttention, ...]:
    """How every layer is read, which for a pattern that is meant for training is full attention.

    Raises ValueError for what is wrong with `attention`, and for a method that was not built in,
    of which the code that goes along knows nothing.
    """
    errors: list[str] = []
    train = TrainConfig(seqlen=1, steps=1)
    whole = Config(model=model, attention=attention, train=train, log=LogConfig(folder=""))
    layers = resolve_layers(whole, errors)
    if errors:
        raise ValueError("\n".join(errors))
    layers = evaluation_layers(layers, "auto")
    odd = [layer.method.name for layer in layers if layer.method.name not in OPTIONS]
    if odd:
        raise ValueError(
            f"attention.method = '{odd[0]}': not a method of lcdist's own, and it cannot be "
            f"exported; {', '.join(OPTIONS)} can"
        )
    return layers


def is_plain(layers: Sequence[LayerAttention]) -> bool:
    """Whether a plain LLaMA computes what these layers do."""
    return all(layer.method.name == "full" for layer in layers)


def tables(layers: Sequence[LayerAttention]) -> list[dict[str, Any]]:
    """Each layer's method and options, as JSON has them."""
    return [
        {
            "method": layer.method.name,
            **{k: _listed(v) for k, v in dataclasses.asdict(layer.options).items()},
        }
        for layer in layers
    ]


def learned(model: ModelConfig, layers: Sequence[LayerAttention]) -> list[FusedTensor]:
    """What the layers learnt beside their projections; on the other side under its own name."""
    found = []
    for number, layer in enumerate(layers):
        for name, shape in layer.method.parameters(layer.options, model.nheads).items():
            key = f"{layer_prefix(number)}self_attention{EXTRAS}{name}"
            part = SourceRows(f"{hf_prefix(number)}self_attn.{name}", 0, shape[0])
            found.append(FusedTensor(key, (part,), tuple(shape[1:])))
    return found


def modelling(layers: Sequence[LayerAttention]) -> tuple[dict[str, str], dict[str, Any]]:
    """(text by file name, keys of config.json) that an export has besides, for these layers."""
    if is_plain(layers):
        return {}, {}
    keys = {
        "architectures": [FAMILY],
        "model_type": KIND,
        "auto_map": AUTO_MAP,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
    }
    return read_remote_files(), keys


def about(config: Config, step: int) -> dict[str, Any]:
    """The block "lcdist" of a config.json: how the weights were trained, as plain data.

    attention: how every layer is read, where that is not a plain LLaMA's way.
    """
    attention, layers = config.attention, reading(config.model, config.attention)
    others = {name: _plain(options) for name, options in attention.others.items()}
    mixed = {"layers": attention.layers, "others": others} if attention.layers else {}
    own = {} if is_plain(layers) else {"attention": tables(layers)}
    return {
        "version": metadata.version("lcdist"),
        "method": attention.method,
        "options": _plain(attention.options),
        **mixed,
        **own,
        "qkv_bias": config.model.qkv_bias,
        "rope": _plain(config.model.rope),
        "seqlen": config.train.seqlen,
        "step": step,
    }


def attention_of(block: Mapping[str, Any], model: ModelConfig) -> AttentionConfig:
    """`[attention]` of a model that was exported with code, from its block.

    Raises ValueError where the block is no such thing, or says of a layer what does not follow.
    """
    others = block.get("others", {})
    options = block.get("options", {})
    if not isinstance(options, Mapping) or not isinstance(others, Mapping):
        raise ValueError("lcdist.options and lcdist.others: expected tables")
    said = {"method": block.get("method"), "layers": block.get("layers", ""), **_given(options)}
    said |= {name: _given(one) for name, one in others.items()}
    errors: list[str] = []
    attention = build(AttentionConfig, said, "lcdist", errors)
    if errors:
        raise ValueError("\n".join(errors))
    want = tables(reading(model, attention))
    if block.get("attention") != want:
        raise ValueError(
            f"lcdist.attention = {block.get('attention')!r}: its method and options say {want!r}"
        )
    return attention


def shrunk(layers: Sequence[LayerAttention]) -> tuple[LayerAttention, ...]:
    """The same methods with blocks so short that a few tokens reach across several."""
    limits = {"block_size": 5, "select_tokens": 7, "top_k": 2}
    found = []
    for layer in layers:
        given = dataclasses.asdict(layer.options)
        less = {k: min(v, limits[k]) for k, v in given.items() if k in limits and v is not None}
        if "modes" in given:
            less["modes"] = tuple(min(mode, 3) for mode in given["modes"])
        found.append(LayerAttention(layer.method, replace(layer.options, **less)))
    return tuple(found)


def _given(options: Any) -> Any:
    """Without what is None, for which TOML, and so a configuration, has no word."""
    if not isinstance(options, Mapping):
        return options
    return {key: value for key, value in options.items() if value is not None}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plain(options: Any) -> dict[str, Any]:
    return dict(options.table) if isinstance(options, RawOptions) else dataclasses.asdict(options)
