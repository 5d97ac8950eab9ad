"""A LLaMA-shaped model that lcdist trained with attention of its own, for `transformers`.

A copy of this file and of attention_lcdist.py lies beside the weights of an exported model:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.lcdist["attention"]` has the method and its options, layer by layer; the rotation is what
`rope_scaling` or `rope_parameters` says. A text is always read from its beginning: there is no
cache. Of transformers (4.45 to 5) this uses the parts of LLaMA and generate(), no mask, no rotary
embedding, no attention, no cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .attention_lcdist import METHODS, Rotate, attend, rotation

logger = logging.get_logger(__name__)

IGNORED = -100


class LcdistConfig(LlamaConfig):
    """LLaMA's, and a table `lcdist`: attention, a table a layer; qkv_bias; how it was trained."""

    model_type = "lcdist"


class LcdistAttention(nn.Module):
    """One layer's attention by the method that it was trained with."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        nheads, nheads_kv = config.num_attention_heads, config.num_key_value_heads
        about: dict[str, Any] = config.lcdist
        self.asked, bias = about["attention"][layer], about["qkv_bias"]
        self.q_proj = nn.Linear(hidden, nheads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, nheads_kv * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, nheads_kv * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(nheads * self.head_dim, hidden, bias=False)
        modes = self.asked.get("modes")
        self.branch_bias = nn.Parameter(torch.zeros(len(modes), nheads)) if modes else None

    def forward(self, x: Tensor, rotate: Rotate, select_tokens: int | None = None) -> Tensor:
        """x `[b, s, hidden]`, whole texts from position 0, to the same shape."""
        qkv = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        asked = (
            self.asked if select_tokens is None else self.asked | {"select_tokens": select_tokens}
        )
        return self.o_proj(attend(asked, (q, k, v), rotate, self.branch_bias).flatten(2))


class LcdistModel(LlamaModel):
    """The layers, of which each attends by its own method."""

    def __init__(self, config: LcdistConfig) -> None:
        about = getattr(config, "lcdist", None) or {}
        layers = about.get("attention", ())
        if len(layers) != config.num_hidden_layers:
            raise ValueError(
                f"config.lcdist says how {len(layers)} of {config.num_hidden_layers} layers "
                "attend; take the config.json that 'lcdist convert export' wrote"
            )
        odd = [one["method"] for one in layers if one["method"] not in METHODS]
        if odd:
            raise ValueError(f"config.lcdist: method {odd[0]!r} is none of {', '.join(METHODS)}")
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            layer.self_attn = LcdistAttention(config, number)
        self.rotary_emb = None
        blocks = [one["block_size"] for one in layers if one["method"] == "landmark"]
        # A landmark, the last token of the vocabulary, is put in after so many tokens of text.
        self.text_in_block = blocks[0] - 1 if blocks else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        select_tokens: int | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids `[b, s]` or inputs_embeds `[b, s, hidden]` to last hidden states of the text.

        attention_mask `[b, s]`: 0 where there is no token, anywhere in a row; hidden states are 0
        there, and elsewhere those of the row's tokens alone. select_tokens: as in
        `LcdistForCausalLM`. Raises ValueError for what this model cannot do.
        """
        refuse(unknown)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = whole_rows(attention_mask, x)
        if mask is None:
            return BaseModelOutputWithPast(last_hidden_state=self.read(x, select_tokens))
        out = torch.zeros_like(x)
        for row, kept in enumerate(mask):
            if kept.any():
                alone = self.read(x[row : row + 1, kept], select_tokens)
                out = out.index_put((torch.tensor(row, device=x.device), kept), alone[0])
        return BaseModelOutputWithPast(last_hidden_state=out)

    def read(self, x: Tensor, select_tokens: int | None = None) -> Tensor:
        """Embedded text without padding, `[b, s, hidden]`, to hidden states of that shape."""
        text = torch.arange(x.shape[1], device=x.device)
        if self.text_in_block is not None and x.shape[1]:
            text = text + text // self.text_in_block
            mark = self.embed_tokens.weight[-1].to(x)
            slots = mark.expand(len(x), int(text[-1]) + 1, -1)
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

    A model with landmarks takes and gives text alone: landmarks are put in here, and the logit of
    the landmark token is -inf. select_tokens of `forward`: another size of landmark attention's
    selection units than the trained one; generate() uses 1, with which no token depends on a later
    one.
    """

    config_class = LcdistConfig
    supports_gradient_checkpointing = False
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flash_attn_2 = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    # Told of no other batch's tokens: a trainer divides by the number of batches.
    accepts_loss_kwargs = False

    def __init__(self, config: LcdistConfig) -> None:
        # Not LLaMA's own, which would make its layers first.
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
        """Logits `[b, s, vocab]`, and with labels `[b, s]` the mean loss of the tokens they name.

        labels: the tokens themselves; -100 is not counted, nor is a row's first token. Other
        arguments as those of `LcdistModel.forward` and LlamaForCausalLM.
        """
        as_tuple = unknown.pop("return_dict", None) is False
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        asked = {"attention_mask": attention_mask, "select_tokens": select_tokens, **unknown}
        hidden = self.model(**inputs, **asked).last_hidden_state
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep out")
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        if self.model.text_in_block is not None:
            never = torch.arange(logits.shape[-1], device=logits.device) == logits.shape[-1] - 1
            logits = logits.masked_fill(never, -torch.inf)
        loss = None if labels is None else self.mean_loss(logits, labels, attention_mask)
        if as_tuple:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def mean_loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Each token predicts the next one; what is padded neither predicts nor is predicted."""
        targets = labels[:, 1:].to(logits.device)
        if attention_mask is not None:
            kept = attention_mask.to(logits.device) != 0
            targets = targets.masked_fill(~(kept[:, 1:] & kept[:, :-1]), IGNORED)
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which reads the whole text again for every token: without a cache."""
        if kwargs.get("use_cache"):
            logger.warning_once("this model has no cache: use_cache = True is ignored")
        theirs: Any = super()
        return theirs.generate(*args, **{**kwargs, "use_cache": False})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """All of the text, whatever was read before."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "select_tokens": 1}


def refuse(unknown: dict[str, Any]) -> None:
    """Raise ValueError for what is asked for beside text, and warn of a cache that is not there."""
    if unknown.pop("use_cache", None):
        logger.warning_once("this model has no cache: use_cache = True is ignored")
    for name, value in unknown.items():
        if value is not None and value is not False:
            why = "positions follow from attention_mask" if "position" in name else "not done here"
            raise ValueError(f"{name} is given: {why}; leave it out")


def whole_rows(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Where rows have tokens, bool `[b, s]`; None where they have them everywhere."""
    if attention_mask is None:
        return None
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)}: expected {list(x.shape[:2])}, "
            "0 where there is no token"
        )
    mask = attention_mask.to(x.device) != 0
    return None if bool(mask.all()) else mask


def rope_of(config: LcdistConfig) -> dict[str, Any]:
    """The rotation that config.json asks for, in the form of transformers 5, from 4's too."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = {"rope_theta": getattr(config, "rope_theta", None), **rope}
    original = getattr(config, "original_max_position_embeddings", None)
    return {"original_max_position_embeddings": original, **rope}
