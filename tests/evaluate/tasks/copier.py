"""A model that finds the number in a text, made by hand: one layer whose attention looks for it.

Every word is a token, and every number one word. A token's embedding is a random code and a mark:
whether it is a number, whether it is "is", or neither. A query asks only after "is", and only
numbers answer; what they answer is their code, which the output matrix finds among all words. After
a number the text ends.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch import Tensor

from lcdist.evaluate.tasks.case import Question
from tests.evaluate.tasks.facts import words_and_lines

HIDDEN, CODE = 128, 120
NUMBER, ASKS, NEITHER = 120, 121, 122
EOS = "<eos>"
# A number that answers outweighs all other words of a text of any length here.
SHARPNESS = 60.0


class Listening:
    """A format of prompts that collects the words of all questions."""

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def tokens(self, question: Question) -> list[int]:
        text = question.text + question.prefix
        self.texts.add(text)
        return [0] * len(words_and_lines(text))


def words_of(texts: Iterable[str]) -> list[str]:
    """Return the words of texts, as the tokenizer cuts them."""
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})


def write_model(folder: Path, words: list[str], copies: bool) -> Path:
    """Write a model in Hugging Face's format, with its tokenizer.

    Args:
        folder: to write to.
        words: of its vocabulary.
        copies: whether it copies numbers; otherwise its weights are random.
    """
    folder.mkdir(parents=True)
    names = ["<unk>", EOS, *words]
    model = tokenizers.Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(names)}, unk_token="<unk>")
    )
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens([EOS])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(names),
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights_of(names, copies), folder / "model.safetensors", {"format": "pt"})
    return folder


def weights_of(names: list[str], copies: bool) -> dict[str, Tensor]:
    """Return the weights of a model with these words."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    embedding = noise(len(names), HIDDEN)
    query, key, value, output = (noise(HIDDEN, HIDDEN) for _ in range(4))
    down = noise(HIDDEN, 16)
    if copies:
        embedding[:] = 0
        embedding[:, :CODE] = noise(len(names), CODE).sign() / math.sqrt(CODE)
        for number, word in enumerate(names):
            mark = NUMBER if word.isdigit() else ASKS if word == "is" else NEITHER
            embedding[number, mark] = 1.0
        # No text contains it, so that its length is free: after a number nothing is likelier.
        embedding[names.index(EOS), NUMBER] = 4.0
        for matrix in (query, key, value, output, down):
            matrix.zero_()
        # Normalized, a mark is sqrt(HIDDEN / 2), as an embedding has the square 2. The last pair of
        # features hardly turns with the position.
        slow = HIDDEN // 2 - 1
        query[slow, ASKS] = SHARPNESS * math.sqrt(HIDDEN) * 2 / HIDDEN
        key[slow, NUMBER] = 1.0
        value[:CODE, :CODE] = output[:CODE, :CODE] = torch.eye(CODE)
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": embedding,
        f"{layer}self_attn.q_proj.weight": query,
        f"{layer}self_attn.k_proj.weight": key,
        f"{layer}self_attn.v_proj.weight": value,
        f"{layer}self_attn.o_proj.weight": output,
        f"{layer}mlp.gate_proj.weight": noise(16, HIDDEN),
        f"{layer}mlp.up_proj.weight": noise(16, HIDDEN),
        f"{layer}mlp.down_proj.weight": down,
        f"{layer}input_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}post_attention_layernorm.weight": torch.ones(HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
