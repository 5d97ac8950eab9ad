"""Describe and export attention that a plain LLaMA does not have.

Layers of `scca`, and of `full` without options, use full attention at inference, so they export as
a plain LLaMA. An export with another method carries the model code in `remote_code/` and an
`auto_map` that names it.

Such an export has LLaMA's `model_type`: with one that transformers does not know, AutoTokenizer
asks whether to run the model's code. A program that goes by `model_type` alone must not take it for
a plain LLaMA. So its activation has a name that no program knows, and so has the key `type` of its
rotation, which transformers passes over beside `rope_type` and mlx-lm reads first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from lcdist.config.build import build
from lcdist.config.schema import (
    OPTIONS,
    AttentionConfig,
    Config,
    FullOptions,
    LogConfig,
    ModelConfig,
    RawOptions,
    TrainConfig,
)
from lcdist.convert.huggingface.names import FusedTensor, SourceRows, hf_prefix, layer_prefix
from lcdist.convert.remote_files import read_remote_files
from lcdist.model.init import METHOD_PARAMS
from lcdist.plan.resolve import LayerAttention, evaluation_layers, resolve_layers

ARCHITECTURE, MODEL_TYPE = "LcdistForCausalLM", "llama"
# Of exports before version 0.1.0.
OLD_MODEL_TYPE = "lcdist"
# As in `remote_code/modeling_lcdist.py`: what a program says that does not run that code.
NEEDS_CODE = "lcdist: load this model with trust_remote_code=True"
AUTO_MAP = {
    "AutoConfig": "modeling_lcdist.LcdistConfig",
    "AutoModelForCausalLM": f"modeling_lcdist.{ARCHITECTURE}",
}


def inference_layers(model: ModelConfig, attention: AttentionConfig) -> tuple[LayerAttention, ...]:
    """Return each layer's attention at inference: full attention for training-only patterns.

    Raises:
        ValueError: `attention` is invalid, or names a method from outside lcdist, which the
            exported code does not know.
    """
    errors: list[str] = []
    train = TrainConfig(seqlen=1, steps=1)
    config = Config(model=model, attention=attention, train=train, log=LogConfig(folder=""))
    layers = resolve_layers(config, errors)
    if errors:
        raise ValueError("\n".join(errors))
    layers = evaluation_layers(layers, "auto")
    unknown = [layer.method.name for layer in layers if layer.method.name not in OPTIONS]
    if unknown:
        raise ValueError(
            f"attention.method = '{unknown[0]}': this method is not built into lcdist and cannot "
            f"be exported; exportable methods are {', '.join(OPTIONS)}"
        )
    return layers


def has_landmarks(layers: Sequence[LayerAttention]) -> bool:
    """Return whether the last token of the vocabulary is a landmark."""
    return any("landmarks" in layer.method.supports for layer in layers)


def is_plain_llama(layers: Sequence[LayerAttention]) -> bool:
    """Return whether every layer computes a plain LLaMA's attention."""
    return all(layer.options == FullOptions() for layer in layers)


def layer_tables(layers: Sequence[LayerAttention]) -> list[dict[str, Any]]:
    """Return each layer's method and options as JSON values."""
    return [
        {
            "method": layer.method.name,
            **{k: _json_value(v) for k, v in dataclasses.asdict(layer.options).items()},
        }
        for layer in layers
    ]


def method_parameters(model: ModelConfig, layers: Sequence[LayerAttention]) -> list[FusedTensor]:
    """Return the tensors that attention methods learn besides the projections.

    The Hugging Face names end in the method's own parameter names.
    """
    tensors = []
    for number, layer in enumerate(layers):
        for name, shape in layer.method.parameters(layer.options, model.nheads).items():
            key = f"{layer_prefix(number)}self_attention{METHOD_PARAMS}{name}"
            rows = SourceRows(f"{hf_prefix(number)}self_attn.{name}", 0, shape[0])
            tensors.append(FusedTensor(key, (rows,), tuple(shape[1:])))
    return tensors


def with_remote_code(
    layers: Sequence[LayerAttention], table: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the model code that an export needs, by file name, and its config.json.

    table: config.json of the model as a plain LLaMA.
    """
    if is_plain_llama(layers):
        return {}, dict(table)
    keys = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "hidden_act": NEEDS_CODE,
        "rope_scaling": {
            **(table["rope_scaling"] or {"rope_type": "default"}),
            "type": NEEDS_CODE,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
    }
    return read_remote_files(), {**table, **keys}


def training_table(config: Config, step: int) -> dict[str, Any]:
    """Return the table "lcdist" of an exported config.json: how the weights were trained.

    The key "attention" lists the layers at inference, unless all are a plain LLaMA's.
    """
    attention, layers = config.attention, inference_layers(config.model, config.attention)
    others = {name: _option_table(options) for name, options in attention.others.items()}
    mixed = {"layers": attention.layers, "others": others} if attention.layers else {}
    custom = {} if is_plain_llama(layers) else {"attention": layer_tables(layers)}
    return {
        "version": metadata.version("lcdist"),
        "method": attention.method,
        "options": _option_table(attention.options),
        **mixed,
        **custom,
        "qkv_bias": config.model.qkv_bias,
        "qk_norm": config.model.qk_norm,
        "rope": _option_table(config.model.rope),
        "seqlen": config.train.seqlen,
        "step": step,
    }


def attention_config(table: Mapping[str, Any], model: ModelConfig) -> AttentionConfig:
    """Return `[attention]` of a model exported with code, from its table "lcdist".

    Raises:
        ValueError: the table is invalid, or its list of layers does not follow from its method
            and options.
    """
    others = table.get("others", {})
    options = table.get("options", {})
    if not isinstance(options, Mapping) or not isinstance(others, Mapping):
        raise ValueError("lcdist.options and lcdist.others: expected tables")
    section = {
        "method": table.get("method"),
        "layers": table.get("layers", ""),
        **_without_none(options),
        **{name: _without_none(each) for name, each in others.items()},
    }
    errors: list[str] = []
    attention = build(AttentionConfig, section, "lcdist", errors)
    if errors:
        raise ValueError("\n".join(errors))
    expected = layer_tables(inference_layers(model, attention))
    if table.get("attention") != expected:
        raise ValueError(
            f"lcdist.attention = {table.get('attention')!r}: its method and options mean "
            f"{expected!r}"
        )
    return attention


def with_short_blocks(layers: Sequence[LayerAttention]) -> tuple[LayerAttention, ...]:
    """Return the layers with blocks so short that a few tokens span several of them."""
    limits = {"block_size": 5, "select_tokens": 7, "top_k": 2}
    shortened = []
    for layer in layers:
        options = dataclasses.asdict(layer.options)
        changes = {
            name: min(value, limits[name])
            for name, value in options.items()
            if name in limits and value is not None
        }
        if "modes" in options:
            changes["modes"] = tuple(min(mode, 3) for mode in options["modes"])
        shortened.append(LayerAttention(layer.method, replace(layer.options, **changes)))
    return tuple(shortened)


def _without_none(options: Any) -> Any:
    """Drop keys that are None: TOML, and so a configuration, has no null."""
    if not isinstance(options, Mapping):
        return options
    return {key: value for key, value in options.items() if value is not None}


def _json_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _option_table(options: Any) -> dict[str, Any]:
    return dict(options.table) if isinstance(options, RawOptions) else dataclasses.asdict(options)
