"""Make folders of conversations whose answers can be told from their tokens alone."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from lcdist.commands.main import main
from tests.data.test_tokenizers import make

# Numbers of the tokens of `make`: "<|begin|>" and "<|end|>".
BEGIN, END = 256, 257
PLAIN = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
# Whatever is lower case is part of an answer, and so is the token that ends it.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|pad|>{% generation %}{{ m.content }}"
    "<|end|>{% endgeneration %}{% else %}<|begin|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def chat_folder(folder: Path, template: str | None) -> Path:
    """Write a byte-level tokenizer, with a chat template unless it is None."""
    make(folder, bos_token="<|begin|>", eos_token="<|end|>")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder / "tokenizer.json"


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Return conversations of several turns: users write capitals, the assistant small letters."""
    draw = random.Random(1)

    def words(alphabet: str) -> str:
        return "".join(draw.choices(alphabet, k=draw.randrange(4, 60)))

    return [
        [
            message
            for _ in range(draw.randrange(1, 4))
            for message in (
                {"role": "user", "content": words("ABCDEFGH ")},
                {"role": "assistant", "content": words("abcdefgh")},
            )
        ]
        for _ in range(count)
    ]


def tokenized(source: Path, folder: Path, tokenizer: Path, workers: int = 1) -> Path:
    """Tokenize conversations and return the folder of tokens."""
    words = ["tokenize", str(source), str(folder), "--tokenizer", str(tokenizer)]
    words += ["--conversations", "--valid-fraction", "0.2", "--workers", str(workers)]
    assert main(words) == 0
    return folder


def answered(tokens: Tensor) -> Tensor:
    """Return which tokens are part of an answer: small letters, and the end behind one."""
    # The bytes of small letters have these numbers in `make`'s alphabet.
    small = torch.isin(tokens, SMALL)
    before = torch.cat([torch.zeros(1, dtype=torch.bool), small[:-1]])
    return small | ((tokens == END) & before)


def _small_letters() -> Tensor:

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return torch.tensor([alphabet.index(letter) for letter in "abcdefgh"])


SMALL = _small_letters()
