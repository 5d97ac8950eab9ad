"""Turn a question into the tokens that a model reads: as plain text, or as a turn of a chat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lcdist.data.prepare.conversations import ChatTemplate
from lcdist.data.tokenizers.chat import chat_tokenizer, read_chat_template
from lcdist.data.tokenizers.files import TextTokenizer, bos_prefix
from lcdist.data.tokenizers.huggingface import HuggingFaceTokenizer
from lcdist.evaluate.tasks.case import Question


class PlainFormat:
    """A text that ends where the answer begins, for models that continue text.

    Attributes:
        stops: tokens that end an answer.
        specials: texts that no haystack may contain.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.stops: tuple[int, ...] = (tokenizer.eos_id,)
        self.specials: Sequence[str] = ()

    def tokens(self, question: Question) -> list[int]:
        """Return the prompt of a question."""
        text = question.text + question.prefix
        return [*bos_prefix(self._tokenizer), *self._tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer; tokens that only pad the vocabulary have none."""
        return self._tokenizer.decode([t for t in tokens if 0 <= t < self._tokenizer.vocab_size])


class ChatFormat(PlainFormat):
    """A turn of the user, and the beginning of the assistant's turn.

    Raises:
        ValueError: the tokenizer has no tokens for turns, or the template refuses a question.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str) -> None:
        super().__init__(tokenizer)
        self._chat = chat_tokenizer(tokenizer)
        self._template = ChatTemplate(template, self._chat.names, self._chat.specials)
        self.specials = self._chat.specials
        end = self._template.end_of_turn()
        if end is not None:
            self.stops = (tokenizer.eos_id, *self._chat.encode_prompt(end)[:1])

    def tokens(self, question: Question) -> list[int]:
        """Return the prompt of a question; the template says where bos stands."""
        return self._chat.encode_prompt(self._template.prompt(question.text) + question.prefix)


def open_format(
    tokenizer: TextTokenizer, how: Literal["text", "chat"], folders: Sequence[Path]
) -> PlainFormat:
    """Return the format that `evaluate.prompt` names.

    Args:
        tokenizer: of the model.
        how: the format.
        folders: where a chat template may be: that of the tokenizer first.

    Raises:
        ValueError: there is no chat template, or no token for turns.
    """
    if how == "text":
        return PlainFormat(tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            f"evaluate.prompt = 'chat': the {tokenizer.kind} tokenizer in {folders[0]} has no "
            "tokens for turns; leave evaluate.prompt = 'text'"
        )
    reasons = []
    for folder in folders:
        try:
            return ChatFormat(tokenizer, read_chat_template(folder))
        except ValueError as error:
            # What else the message advises is for `lcdist tokenize`.
            reasons.append(str(error).partition("; ")[0])
    raise ValueError(
        f"evaluate.prompt = 'chat': {reasons[0]}; put the model's chat_template.jinja into "
        f"{folders[0]}, or leave evaluate.prompt = 'text'"
    )
