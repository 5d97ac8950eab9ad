"""A Hugging Face config.json to our model, and back; what changes the maths is refused by name.

Known families: LlamaForCausalLM, MistralForCausalLM whose window hides nothing, Qwen2ForCausalLM,
and LcdistForCausalLM, which is what we export where attention is not a plain LLaMA's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.config.schema import AttentionConfig, ModelConfig
from lcdist.convert.huggingface.custom_attention import AUTO_MAP, FAMILY, KIND, attention_of
from lcdist.convert.huggingface.names import head_dim
from lcdist.convert.huggingface.rope import ORIGINAL, from_hf, to_hf

CONFIG = "config.json"
# What our exports say of themselves.
BLOCK = "lcdist"
LLAMA, MISTRAL, QWEN2 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"
_TYPES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, KIND: FAMILY}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_SIZES += ("num_attention_heads", "max_position_embeddings")
_READ = {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"}
_READ |= {"architectures", "model_type", "rope_theta", "rope_scaling", "rope_parameters", ORIGINAL}
_READ |= {BLOCK, "sliding_window", "use_sliding_window", "layer_types"}
# Keys that no weight and no logit depends on, at inference as LLaMA-like models read them.
_HARMLESS = {
    *("_name_or_path", "_attn_implementation_autoset", "transformers_version", "torch_dtype"),
    *("dtype", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "output_attentions"),
    *("output_hidden_states", "return_dict", "is_decoder", "problem_type", "id2label", "label2id"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "unsloth_fixed", "task_specific_params"),
}
# Keys that do change the maths, the one value of each that is ours, and what they would mean.
_ONLY: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the activation of the MLP"),
    "attention_bias": (False, "biases on all four projections of the attention"),
    "mlp_bias": (False, "biases in the MLP"),
    "partial_rotary_factor": (1.0, "rotation of a part of each head"),
    "quantization_config": (None, "quantized weights: take the model they were made from"),
    "auto_map": (None, "code of the model's own"),
    "use_mrope": (False, "rotation by several positions"),
    "final_logit_softcapping": (None, "capped logits"),
    "attn_logit_softcapping": (None, "capped scores"),
    "rope_interleaved": (False, "rotation of neighbouring pairs"),
    "tie_encoder_decoder": (False, "an encoder"),
    "add_cross_attention": (False, "an encoder"),
}


@dataclass(frozen=True)
class HFModel:
    """A config.json that has been checked.

    seqlen: tokens the model is meant to read. attention: how, where not as a plain LLaMA.
    """

    table: Mapping[str, Any]
    model: ModelConfig
    seqlen: int
    attention: AttentionConfig = AttentionConfig()


def read_config(folder: Path) -> HFModel:
    """The model that `folder`/config.json describes.

    Raises ValueError with every key that is missing, that is not what it should be, or that asks
    for what is not here.
    """
    path = folder / CONFIG
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no Hugging Face model: it has no {CONFIG}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a table of keys")
    errors = [*_wrong_family(table), *_wrong_sizes(table), *_unknown(table), *_window(table)]
    errors += _method(table)
    rope = None
    if not any("max_position_embeddings" in error for error in errors):
        try:
            rope = from_hf(table)
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
        qkv_bias=_family(table) == QWEN2 or (_is_own(table) and table[BLOCK]["qkv_bias"]),
        rope=rope,
    )
    seqlen = table.get(BLOCK, {}).get("seqlen", table["max_position_embeddings"])
    if not _is_own(table):
        return HFModel(table, model, seqlen)
    try:
        return HFModel(table, model, seqlen, attention_of(table[BLOCK], model))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _family(table: Mapping[str, Any]) -> str | None:
    named = table.get("architectures") or [_TYPES.get(str(table.get("model_type")))]
    return named[0] if isinstance(named, list) and len(named) == 1 else None


def _is_own(table: Mapping[str, Any]) -> bool:
    return _family(table) == FAMILY


def _wrong_family(table: Mapping[str, Any]) -> list[str]:
    family, known = _family(table), ", ".join(_TYPES.values())
    if family not in _TYPES.values():
        return [f"architectures = {table.get('architectures')!r}: must be one of {known}"]
    kind = table.get("model_type")
    if _TYPES.get(str(kind)) != family:
        return [f"model_type = {kind!r} is not that of {family}"]
    # Their own defaults are not the number of heads, and a mistake would show in no shape.
    if family != LLAMA and not table.get("num_key_value_heads"):
        return ["num_key_value_heads is missing"]
    return []


def _wrong_sizes(table: Mapping[str, Any]) -> list[str]:
    errors = [f"{key} is missing" for key in _SIZES if table.get(key) is None]
    for key in (*_SIZES, "num_key_value_heads", "head_dim"):
        value = table.get(key)
        if value is not None and (type(value) is not int or value < 1):
            errors.append(f"{key} = {value!r}: expected a whole number above 0")
    if errors:
        return errors
    hidden, nheads = table["hidden_size"], table["num_attention_heads"]
    if not table.get("head_dim") and hidden % nheads:
        errors.append(
            f"hidden_size = {hidden} is not a multiple of num_attention_heads = {nheads}, and "
            "there is no head_dim"
        )
    nheads_kv = table.get("num_key_value_heads") or nheads
    if nheads % nheads_kv:
        errors.append(
            f"num_attention_heads = {nheads} is not a multiple of num_key_value_heads = {nheads_kv}"
        )
    return errors


def _unknown(table: Mapping[str, Any]) -> list[str]:
    errors = []
    for key, value in table.items():
        if key == "auto_map" and _is_own(table):
            # The code is that of whoever installed lcdist, never that of the folder.
            if value != AUTO_MAP:
                errors.append(f"auto_map = {value!r}: an export of ours has {AUTO_MAP!r}")
        elif key in _ONLY:
            ours, meaning = _ONLY[key]
            if value is not None and value != ours:
                errors.append(f"{key} = {value!r}: {meaning}, which is not known here")
        elif key not in _READ | _HARMLESS and value not in (None, False):
            errors.append(f"{key} = {value!r}: not known here, and it may change the maths")
    return errors


def _window(table: Mapping[str, Any]) -> list[str]:
    """A window of keys is harmless where it is switched off or no shorter than the context."""
    odd = {str(kind) for kind in table.get("layer_types") or []} - {"full_attention"}
    if odd:
        return [f"layer_types has {', '.join(sorted(odd))}: only full_attention is known here"]
    # Mistral's own default where the key is absent; null is no window.
    unsaid = 4096 if _family(table) == MISTRAL else None
    window, context = table.get("sliding_window", unsaid), table.get("max_position_embeddings")
    used = table.get("use_sliding_window", _family(table) != QWEN2)
    if window is None or not used or type(context) is not int:
        return []
    if type(window) is not int or window < context:
        return [
            f"sliding_window = {window!r} is shorter than max_position_embeddings = {context}: "
            "attention over a window is not known here"
        ]
    return []


def _method(table: Mapping[str, Any]) -> list[str]:
    block = table.get(BLOCK, {})
    if not isinstance(block, Mapping):
        return [f"{BLOCK} = {block!r}: expected a table"]
    if _is_own(table):
        if type(block.get("qkv_bias")) is not bool:
            return [f"{BLOCK}.qkv_bias = {block.get('qkv_bias')!r}: expected true or false"]
    elif "attention" in block or block.get("method", "full") not in ("full", "scca"):
        return [
            f"{BLOCK}.method = {block.get('method')!r}: a plain {_family(table)} computes "
            f"something else; its architectures should be {FAMILY}"
        ]
    seqlen = block.get("seqlen", 1)
    if type(seqlen) is not int or seqlen < 1:
        return [f"{BLOCK}.seqlen = {seqlen!r}: expected a whole number above 0"]
    return []


def check_shapes(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError naming each tensor of a folder that the config does not lead one to expect.

    shapes: what the files hold. want: what the model needs.
    """
    errors = [
        f"{folder}: {name} is missing; the config asks for it with shape {list(shape)}"
        for name, shape in want.items()
        if name not in shapes
    ]
    errors += [
        f"{folder}: {name} has shape {list(shapes[name])}; the config says {list(shape)}"
        for name, shape in want.items()
        if name in shapes and shapes[name] != shape
    ]
    errors += [
        f"{folder}: {name} {list(shape)} belongs to nothing that the config tells of"
        for name, shape in shapes.items()
        if name not in want
    ]
    if errors:
        more = f"\n... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise ValueError("\n".join(errors[:20]) + more)


def config_table(model: ModelConfig, seqlen: int, dtype: str, block: Mapping) -> dict[str, Any]:
    """The config.json of our model, trained on `seqlen` tokens. dtype: "float32" or "bfloat16".

    block: what stands under the key "lcdist".
    """
    family = QWEN2 if model.qkv_bias else LLAMA
    [kind] = [kind for kind, name in _TYPES.items() if name == family]
    own = {"use_sliding_window": False} if model.qkv_bias else {"attention_bias": False}
    own |= {} if model.qkv_bias else {"mlp_bias": False, "pretraining_tp": 1}
    return {
        "architectures": [family],
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
        **own,
        "use_cache": True,
        "torch_dtype": dtype,
        **to_hf(model.rope, head_dim(model), seqlen),
        BLOCK: dict(block),
    }
