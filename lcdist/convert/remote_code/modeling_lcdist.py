"""LLaMA-shaped model with a custom attention method, trained by lcdist, for transformers.

Exported models carry a copy of this file, of attention_lcdist.py and of rotary_lcdist.py:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.lcdist["attention"]` lists each layer's method and options. `rope_scaling` or
`rope_parameters` defines the rotary embedding. There is no KV cache: every call reads the text from
its beginning. Works with transformers 4.45 to 5. It uses LLaMA's modules and generate(), but not
transformers' masks, rotary embedding, attention or cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

from .attention_lcdist import METHODS, Rotate, attend
from .rotary_lcdist import rotation

logger = logging.get_logger(__name__)

IGNORED = -100
# Stands in config.json for LLaMA's activation and beside the rotation's type, so that no program
# takes the model for a plain LLaMA.
NEEDS_CODE = "lcdist: load this model with trust_remote_code=True"
ROPE_KEYS = ("rope_scaling", "rope_parameters")


class LcdistConfig(LlamaConfig):
    """LLaMA's configuration plus a table `lcdist`: attention per layer, qkv_bias, qk_norm."""

    # One that transformers does not know would make AutoTokenizer ask whether to run this code.
    model_type = "llama"

    def __init__(self, **keys: Any) -> None:
        if keys.get("hidden_act") == NEEDS_CODE:
            keys["hidden_act"] = "silu"
        for key in ROPE_KEYS:
            rope = dict(keys.get(key) or {})
            if rope.get("type") == NEEDS_CODE:
                del rope["type"]
                keys[key] = None if rope == {"rope_type": "default"} else rope
        super().__init__(**keys)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        table = super().to_dict()
        table["hidden_act"] = NEEDS_CODE
        rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
        # Programs read one or the other.
        for key in ROPE_KEYS:
            if key == "rope_scaling" or key in table:
                table[key] = {"rope_type": "default", **rope, "type": NEEDS_CODE}
        return table


class LcdistAttention(nn.Module):
    """Attention of one layer with the method it was trained with."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        nheads, nheads_kv = config.num_attention_heads, config.num_key_value_heads
        table: dict[str, Any] = config.lcdist
        self.options, bias = table["attention"][layer], table["qkv_bias"]
        self.q_proj = nn.Linear(hidden, nheads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, nheads_kv * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, nheads_kv * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(nheads * self.head_dim, hidden, bias=False)
        normalizes, eps = table.get("qk_norm", False), config.rms_norm_eps
        self.q_norm = LlamaRMSNorm(self.head_dim, eps) if normalizes else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, eps) if normalizes else nn.Identity()
        modes = self.options.get("modes")
        self.branch_bias = nn.Parameter(torch.zeros(len(modes), nheads)) if modes else None

    def forward(self, x: Tensor, rotate: Rotate, select_tokens: int | None = None) -> Tensor:
        """Map x `[b, s, hidden]`, whole texts from position 0, to the same shape.

        select_tokens: overrides the option of landmark attention.
        """
        qkv = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        options = self.options
        if select_tokens is not None:
            options = options | {"select_tokens": select_tokens}
        return self.o_proj(attend(options, (q, k, v), rotate, self.branch_bias).flatten(2))


class LcdistModel(LlamaModel):
    """LLaMA's layers with one attention method per layer."""

    def __init__(self, config: LcdistConfig) -> None:
        table = getattr(config, "lcdist", None) or {}
        layers = table.get("attention", ())
        if len(layers) != config.num_hidden_layers:
            raise ValueError(
                f"config.lcdist lists attention for {len(layers)} of {config.num_hidden_layers} "
                "layers; use the config.json that 'lcdist convert export' wrote"
            )
        methods = [layer["method"] for layer in layers]
        unknown = [method for method in methods if method not in METHODS]
        if unknown:
            raise ValueError(
                f"config.lcdist: method {unknown[0]!r}: must be one of {', '.join(METHODS)}"
            )
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            layer.self_attn = LcdistAttention(config, number)
        self.rotary_emb = None
        sizes = [layer["block_size"] for layer in layers if layer["method"] == "landmark"]
        # Text tokens per block; then comes a landmark, the last token of the vocabulary.
        self.text_in_block = sizes[0] - 1 if sizes else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        select_tokens: int | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the last hidden states `[b, s, hidden]` of the text.

        Args:
            input_ids: token ids `[b, s]`.
            attention_mask: `[b, s]`, 0 for padding, anywhere in a row. Padding gets hidden state 0,
                and does not change the hidden states of the row's tokens.
            inputs_embeds: embeddings `[b, s, hidden]` instead of input_ids.
            select_tokens: as in `LcdistForCausalLM`.
            unknown: arguments of transformers that this model does not support.

        Raises:
            ValueError: an unsupported argument is given.
        """
        check_unsupported(unknown)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = token_mask(attention_mask, x)
        if mask is None:
            return BaseModelOutputWithPast(last_hidden_state=self.run_layers(x, select_tokens))
        out = torch.zeros_like(x)
        for row, is_token in enumerate(mask):
            if is_token.any():
                hidden = self.run_layers(x[row : row + 1, is_token], select_tokens)
                out = out.index_put((torch.tensor(row, device=x.device), is_token), hidden[0])
        return BaseModelOutputWithPast(last_hidden_state=out)

    def run_layers(self, x: Tensor, select_tokens: int | None = None) -> Tensor:
        """Map embedded text without padding, `[b, s, hidden]`, to hidden states of that shape."""
        text = torch.arange(x.shape[1], device=x.device)
        if self.text_in_block is not None and x.shape[1]:
            text = text + text // self.text_in_block
            landmark = self.embed_tokens.weight[-1].to(x)
            slots = landmark.expand(len(x), int(text[-1]) + 1, -1)
            x = slots.index_copy(1, text, x)
        config: Any = self.config
        rotate = rotation(
            rope_of(config), config.head_dim, config.max_position_embeddings, x.shape[1]
        )
        layers: Any = self.layers
        for layer in layers:
            x = x + layer.self_attn(layer.input_layernorm(x), rotate, select_tokens)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)[:, text]


class LcdistForCausalLM(LlamaForCausalLM):
    """The model with its output layer.

    Input and output are text without landmarks: the model inserts landmarks, and the logit of the
    landmark token is -inf. The argument select_tokens of `forward` overrides the trained size of
    landmark attention's selection units. generate() uses 1: then no token depends on a later one.
    """

    config_class = LcdistConfig
    supports_gradient_checkpointing = False
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flash_attn_2 = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    # The loss is a mean over this batch: a trainer divides by the number of batches.
    accepts_loss_kwargs = False

    def __init__(self, config: LcdistConfig) -> None:
        # Skips LlamaForCausalLM, which would build its own layers first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LcdistModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        select_tokens: int | None = None,
        **unknown: Any,
    ) -> Any:
        """Compute logits `[b, s, vocab]`, and the mean loss if labels are given.

        Args:
            input_ids: as in `LcdistModel.forward`, like the other arguments not listed here.
            labels: the tokens themselves, `[b, s]`; -100 and a row's first token do not count.
            logits_to_keep: number of last positions, or their indices; 0 keeps all.
        """
        as_tuple = unknown.pop("return_dict", None) is False
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        others = {"attention_mask": attention_mask, "select_tokens": select_tokens, **unknown}
        hidden = self.model(**inputs, **others).last_hidden_state
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep out")
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        if self.model.text_in_block is not None:
            landmark = logits.shape[-1] - 1
            is_landmark = torch.arange(landmark + 1, device=logits.device) == landmark
            logits = logits.masked_fill(is_landmark, -torch.inf)
        loss = None if labels is None else self.mean_loss(logits, labels, attention_mask)
        if as_tuple:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def mean_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the mean cross entropy of next tokens; padding neither predicts nor counts."""
        targets = labels[:, 1:].to(logits.device)
        if attention_mask is not None:
            is_token = attention_mask.to(logits.device) != 0
            targets = targets.masked_fill(~(is_token[:, 1:] & is_token[:, :-1]), IGNORED)
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, without a cache: each token reads the whole text again."""
        if kwargs.get("use_cache"):
            logger.warning_once("this model has no cache: use_cache = True is ignored")
        parent: Any = super()
        return parent.generate(*args, **{**kwargs, "use_cache": False})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """Return the whole text as input of every step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "select_tokens": 1}


def check_unsupported(unknown: dict[str, Any]) -> None:
    """Raise ValueError for an unsupported argument; warn if a cache is requested."""
    if unknown.pop("use_cache", None):
        logger.warning_once("this model has no cache: use_cache = True is ignored")
    for name, value in unknown.items():
        if value is not None and value is not False:
            position = "position" in name
            reason = "positions follow from attention_mask" if position else "not supported"
            raise ValueError(f"{name} is given: {reason}; leave it out")


def token_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return bool `[b, s]`, True for tokens; None if there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)}: expected {list(x.shape[:2])}, "
            "0 for padding"
        )
    mask = attention_mask.to(x.device) != 0
    return None if bool(mask.all()) else mask


def rope_of(config: LcdistConfig) -> dict[str, Any]:
    """Return the rotary keys of config.json in the form of transformers 5, also from 4's form."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = {"rope_theta": getattr(config, "rope_theta", None), **rope}
    original = getattr(config, "original_max_position_embeddings", None)
    return {"original_max_position_embeddings": original, **rope}
