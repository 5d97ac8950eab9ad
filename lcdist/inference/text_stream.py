"""Turn tokens into text while they are generated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcdist.data.tokenizers.files import TextTokenizer
from lcdist.utils.progress import Progress, silent

OnText = Callable[[str], None]
# What bytes that are no whole character yet are decoded to.
INCOMPLETE = "\ufffd"
# More of them at the end are bytes of no character.
MOST_INCOMPLETE = 4
# Tokens before the new ones that decide how these are decoded.
CONTEXT = 8


@dataclass(frozen=True)
class TextWatch:
    """Name the functions to call while a text is continued.

    Attributes:
        progress: With the tokens of the prompt that are read.
        on_text: With each piece of the text as soon as it is known, the prompt first.
    """

    progress: Progress = silent
    on_text: OnText | None = None


class TextStream:
    """Decodes a growing text and hands over what is new.

    Only the last tokens are decoded again with each new one. The pieces together are the text of
    all tokens, unless a tokenizer changes more of it than the last CONTEXT tokens.

    Args:
        tokenizer: of the model.
        prompt: its tokens.
        on_text: called with each piece, the prompt first.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], on_text: OnText) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._last = list(prompt[-CONTEXT:])
        self._told = self._decode(self._last)
        # Handed over with the first token: until then, an error would stand behind it on its line.
        self._prompt: str | None = self._decode(prompt)

    def add(self, token: int) -> None:
        """Hand over what a token adds to the text, as soon as its characters are whole."""
        self._tell_prompt()
        self._last.append(token)
        text = self._decode(self._last)
        missing = len(text) - len(text.rstrip(INCOMPLETE))
        if not 0 < missing < MOST_INCOMPLETE:
            self._tell(text)

    def end(self) -> None:
        """Hand over the rest, whole or not."""
        self._tell_prompt()
        self._tell(self._decode(self._last))

    def _tell_prompt(self) -> None:
        if self._prompt is not None:
            self._on_text(self._prompt)
            self._prompt = None

    def _tell(self, text: str) -> None:
        if len(text) > len(self._told):
            self._on_text(text[len(self._told) :])
        self._last = self._last[-CONTEXT:]
        self._told = self._decode(self._last)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([t for t in tokens if t != self._tokenizer.eos_id])
