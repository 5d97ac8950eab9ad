"""Convert a Hugging Face config.json to our model configuration and back.

Supported architectures: LlamaForCausalLM, MistralForCausalLM with a window no shorter than the
context, Qwen2ForCausalLM, Qwen3ForCausalLM, and LcdistForCausalLM (our exports with custom
attention). A key that changes the computation and is not supported is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.config.fields import FEATURES, HEADS, LAYERS, SEQLEN, VOCABULARY
from lcdist.config.schema import AttentionConfig, ModelConfig
from lcdist.config.values import shown
from lcdist.convert.huggingface.custom_attention import (
    ARCHITECTURE,
    AUTO_MAP,
    MODEL_TYPE,
    NEEDS_CODE,
    OLD_MODEL_TYPE,
    attention_config,
)
from lcdist.convert.huggingface.names import head_dim
from lcdist.convert.huggingface.rope import ORIGINAL_LENGTH, is_positive, rope_from_hf, rope_to_hf
from lcdist.utils.json_file import read_json

CONFIG = "config.json"
# Key of the table that our exports add.
LCDIST_KEY = "lcdist"
LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
_ARCHITECTURES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
_ARCHITECTURES |= {OLD_MODEL_TYPE: ARCHITECTURE}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_SIZES += ("num_attention_heads", "max_position_embeddings")
_LIMITS = {
    **{"vocab_size": VOCABULARY, "hidden_size": FEATURES, "intermediate_size": FEATURES},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS},
    **{"max_position_embeddings": SEQLEN, "head_dim": FEATURES},
}
_READ = {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"}
_READ |= {"architectures", "model_type", "rope_theta", "rope_scaling", "rope_parameters"}
_READ |= {ORIGINAL_LENGTH}
_READ |= {LCDIST_KEY, "sliding_window", "use_sliding_window", "layer_types"}
# Keys that change neither weights nor logits of LLaMA-like models at inference.
_HARMLESS = {
    *(
        "_name_or_path",
        "_model_name_or_path",
        "_attn_implementation_autoset",
        "transformers_version",
        "torch_dtype",
    ),
    *("dtype", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "output_attentions"),
    *("output_hidden_states", "return_dict", "is_decoder", "problem_type", "id2label", "label2id"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "unsloth_fixed", "task_specific_params"),
}
# Keys that change the computation: the one supported value, and what other values mean.
_ONLY: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the activation of the MLP"),
    "attention_bias": (False, "biases on all four attention projections"),
    "mlp_bias": (False, "biases in the MLP"),
    "partial_rotary_factor": (1.0, "rotation of part of each head"),
    "quantization_config": (None, "quantized weights: use the model they were made from"),
    "auto_map": (None, "custom model code"),
    "use_mrope": (False, "rotation by several positions per token"),
    "final_logit_softcapping": (None, "capped logits"),
    "attn_logit_softcapping": (None, "capped attention scores"),
    "rope_interleaved": (False, "rotation of neighbouring pairs"),
    "tie_encoder_decoder": (False, "an encoder"),
    "add_cross_attention": (False, "an encoder"),
}


@dataclass(frozen=True)
class HFModel:
    """A checked config.json.

    Attributes:
        table: the file's content.
        model: our model configuration.
        seqlen: context length in tokens.
        attention: attention method; the default is a plain LLaMA's.
    """

    table: Mapping[str, Any]
    model: ModelConfig
    seqlen: int
    attention: AttentionConfig = AttentionConfig()


def read_config(folder: Path) -> HFModel:
    """Read `folder`/config.json.

    Raises:
        ValueError: listing every key that is missing, invalid or not supported.
    """
    path = folder / CONFIG
    try:
        table = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a Hugging Face model: it has no {CONFIG}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a JSON object")
    errors = [*_architecture_errors(table), *_size_errors(table), *_key_errors(table)]
    errors += [*_window_errors(table), *_lcdist_errors(table), *_value_errors(table)]
    rope = None
    if not any("max_position_embeddings" in error for error in errors):
        try:
            rope = rope_from_hf(table)
        except ValueError as error:
            errors.append(str(error).removeprefix("config.json: "))
    if errors or rope is None:
        raise ValueError("\n".join(f"{path}: {error}" for error in errors))
    model = ModelConfig(
        vocab_size=table["vocab_size"],
        num_layers=table["num_hidden_layers"],
        hidden_size=table["hidden_size"],
        nheads=table["num_attention_heads"],
        nheads_kv=table.get("num_key_value_heads") or table["num_attention_heads"],
        head_dim=table.get("head_dim") or table["hidden_size"] // table["num_attention_heads"],
        ffn_hidden_size=table["intermediate_size"],
        norm_eps=float(table.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(table.get("tie_word_embeddings", False)),
        qkv_bias=_architecture(table) == QWEN2
        or (_is_custom(table) and table[LCDIST_KEY]["qkv_bias"]),
        # Older exports have no such key.
        qk_norm=_architecture(table) == QWEN3
        or (_is_custom(table) and table[LCDIST_KEY].get("qk_norm", False)),
        rope=rope,
    )
    seqlen = table.get(LCDIST_KEY, {}).get("seqlen", table["max_position_embeddings"])
    if not _is_custom(table):
        return HFModel(table, model, seqlen)
    try:
        return HFModel(table, model, seqlen, attention_config(table[LCDIST_KEY], model))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _architecture(table: Mapping[str, Any]) -> str | None:
    """Return the one architecture that the table names, or that its model_type implies."""
    named = table.get("architectures") or [_ARCHITECTURES.get(str(table.get("model_type")))]
    return named[0] if isinstance(named, list) and len(named) == 1 else None


def _is_custom(table: Mapping[str, Any]) -> bool:
    """Return whether the model needs our model code."""
    return _architecture(table) == ARCHITECTURE


def _architecture_errors(table: Mapping[str, Any]) -> list[str]:
    name, known = _architecture(table), ", ".join(_ARCHITECTURES.values())
    if name not in _ARCHITECTURES.values():
        return [f"architectures = {table.get('architectures')!r}: must be one of {known}"]
    kind = table.get("model_type")
    if _ARCHITECTURES.get(str(kind)) != name and (name, kind) != (ARCHITECTURE, MODEL_TYPE):
        return [f"model_type = {kind!r} is not the model type of {name}"]
    # Their defaults differ from the number of heads, and no shape would show the mistake.
    if name != LLAMA and not table.get("num_key_value_heads"):
        return ["num_key_value_heads is missing"]
    return []


def _size_errors(table: Mapping[str, Any]) -> list[str]:
    errors = [f"{key} is missing" for key in _SIZES if table.get(key) is None]
    for key in (*_SIZES, "num_key_value_heads", "head_dim"):
        value = table.get(key)
        if value is not None and (type(value) is not int or value < 1):
            errors.append(f"{key} = {value!r}: expected a whole number above 0")
        elif value is not None and value > _LIMITS[key].most:
            most = f"{_LIMITS[key].most:,} {_LIMITS[key].unit}"
            errors.append(f"{key} = {shown(value)}: at most {most} are legal")
    if errors:
        return errors
    hidden, nheads = table["hidden_size"], table["num_attention_heads"]
    if not table.get("head_dim") and hidden % nheads:
        errors.append(
            f"hidden_size = {hidden} is not a multiple of num_attention_heads = {nheads}, and "
            "head_dim is missing"
        )
    nheads_kv = table.get("num_key_value_heads") or nheads
    if nheads % nheads_kv:
        errors.append(
            f"num_attention_heads = {nheads} is not a multiple of num_key_value_heads = {nheads_kv}"
        )
    return errors


def _key_errors(table: Mapping[str, Any]) -> list[str]:
    errors = []
    for key, value in table.items():
        if key == "auto_map" and _is_custom(table):
            # The installed lcdist computes the model; code in the folder is never run.
            if value != AUTO_MAP:
                errors.append(f"auto_map = {value!r}: exports of lcdist have {AUTO_MAP!r}")
        elif key == "hidden_act" and value == NEEDS_CODE and _is_custom(table):
            # Stands for "silu".
            continue
        elif key in _ONLY:
            supported, meaning = _ONLY[key]
            if value is not None and value != supported:
                errors.append(f"{key} = {value!r}: {meaning}, which lcdist does not support")
        elif key not in _READ | _HARMLESS and value not in (None, False):
            errors.append(f"{key} = {value!r}: unknown to lcdist, and may change the computation")
    return errors


def _value_errors(table: Mapping[str, Any]) -> list[str]:
    """Check the types of keys that are no sizes."""
    eps, tied = table.get("rms_norm_eps", 1e-6), table.get("tie_word_embeddings")
    errors = [] if is_positive(eps) else [f"rms_norm_eps = {eps!r}: expected a number above 0"]
    known = tied is None or isinstance(tied, bool)
    return errors if known else [*errors, f"tie_word_embeddings = {tied!r}: expected true or false"]


def _window_errors(table: Mapping[str, Any]) -> list[str]:
    """Accept a window of keys that is switched off or no shorter than the context."""
    types = table.get("layer_types") or []
    types = types if isinstance(types, list) else [repr(types)]
    other_types = {str(kind) for kind in types} - {"full_attention"}
    if other_types:
        names = ", ".join(sorted(other_types))
        return [f"layer_types has {names}: lcdist supports full_attention only"]
    # Mistral's default for a missing key; null means no window.
    default = 4096 if _architecture(table) == MISTRAL else None
    window, context = table.get("sliding_window", default), table.get("max_position_embeddings")
    used = table.get("use_sliding_window", _architecture(table) not in (QWEN2, QWEN3))
    if window is None or not used or type(context) is not int:
        return []
    if type(window) is not int or window < context:
        return [
            f"sliding_window = {window!r} is shorter than max_position_embeddings = {context}: "
            "lcdist does not support attention over a window"
        ]
    return []


def _lcdist_errors(table: Mapping[str, Any]) -> list[str]:
    block = table.get(LCDIST_KEY, {})
    if not isinstance(block, Mapping):
        return [f"{LCDIST_KEY} = {block!r}: expected a table"]
    if _is_custom(table):
        for key, value in (("qkv_bias", None), ("qk_norm", False)):
            if type(block.get(key, value)) is not bool:
                return [f"{LCDIST_KEY}.{key} = {block.get(key)!r}: expected true or false"]
    elif "attention" in block or block.get("method", "full") not in ("full", "scca"):
        return [
            f"{LCDIST_KEY}.method = {block.get('method')!r}: a plain {_architecture(table)} has "
            f"full attention; architectures must be ['{ARCHITECTURE}']"
        ]
    seqlen = block.get("seqlen", 1)
    if type(seqlen) is not int or seqlen < 1:
        return [f"{LCDIST_KEY}.seqlen = {seqlen!r}: expected a whole number above 0"]
    return []


def config_table(
    model: ModelConfig, seqlen: int, dtype: str, lcdist_table: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of config.json for our model.

    Args:
        model: our model configuration.
        seqlen: tokens of a training sequence.
        dtype: "float32" or "bfloat16".
        lcdist_table: value of the key "lcdist".
    """
    architecture = QWEN3 if model.qk_norm else QWEN2 if model.qkv_bias else LLAMA
    [kind] = [kind for kind, name in _ARCHITECTURES.items() if name == architecture]
    family_keys: Mapping[str, Any] = {
        LLAMA: {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        QWEN2: {"use_sliding_window": False},
        QWEN3: {"attention_bias": False, "use_sliding_window": False},
    }[architecture]
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.nheads,
        "num_key_value_heads": model.nheads_kv or model.nheads,
        "head_dim": head_dim(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        **family_keys,
        "use_cache": True,
        "torch_dtype": dtype,
        **rope_to_hf(model.rope, head_dim(model), seqlen),
        LCDIST_KEY: dict(lcdist_table),
    }
