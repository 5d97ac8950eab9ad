"""Text generation: the prompts are read in pieces, then one token of every text a step.

Every token is the one that a full pass over all tokens before it predicts. If the rotation depends
on the length (dynamic NTK; LongRoPE when it changes its factors), a change of rotation therefore
reads the whole text again; then texts are continued one after the other.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcdist.attention.cache import SwapCount
from lcdist.inference.cache import CacheSize
from lcdist.inference.decoder import Decoder
from lcdist.inference.sampling import GREEDY, Sampling
from lcdist.inference.settings import Figures, Generation, Watch
from lcdist.model.build import CausalLM
from lcdist.utils.progress import silent

READING = "reading the prompt"


def generate(
    model: CausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: int | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return one prompt and its continuation, int64 `[n + new]`; as `generate_batch`.

    stop: token that ends the continuation; None: continue to max_new_tokens.
    """
    stops = frozenset[int]() if stop is None else frozenset({stop})
    how = Generation(max_new_tokens, sampling, stops)
    return generate_batch(model, [prompt], how, watch)[0]


def generate_batch(
    model: CausalLM,
    prompts: Sequence[Tensor],
    how: Generation,
    watch: Watch | None = None,
) -> list[Tensor]:
    """Return each prompt and its continuation, int64 `[n + new]` on the prompt's device.

    All ranks of the model call it and return the same. Landmark tokens are inserted for models that
    use them, and left out of the results. A text's continuation does not depend on the others.

    Args:
        model: the whole model, its tensor-parallel shard or its pipeline stage.
        prompts: int64 `[n]` each, of any lengths.
        how: limits and sampling.
        watch: what is told of the progress.

    Raises:
        ValueError: a prompt is empty, or the mesh or a method does not fit generation.
    """
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("the prompt has no token")
    texts = [_Text(i, prompt, how) for i, prompt in enumerate(prompts)]
    total = sum(len(prompt) for prompt in prompts)
    watch, figures = watch or Watch(), Figures()
    reading = _Reading(watch, total)
    model.eval()
    with torch.no_grad():
        for group in _with_one_rotation(model, texts, how.max_new_tokens):
            waiting = group
            while waiting:
                run = _Run(model, waiting, how, reading)
                waiting = run.until_rotation_changes(figures)
    if watch.on_figures is not None:
        watch.on_figures(figures)
    return [text.tokens for text in texts]


@dataclass
class _Text:
    """A text that is continued.

    Attributes:
        number: Of the prompt.
        tokens: Text so far, int64 `[n]`.
        how: Limits and sampling.
        length: Tokens of the prompt.
        stopped: Whether the last token ends the text.
    """

    number: int
    tokens: Tensor
    how: Generation
    length: int = field(init=False)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.length = len(self.tokens)
        self.generator = self.how.sampling.generator(self.number)

    @property
    def is_done(self) -> bool:
        """Return whether the text has all tokens that it may get, or a token that ends it."""
        return self.stopped or len(self.tokens) - self.length >= self.how.max_new_tokens


@dataclass
class _Reading:
    """Report the progress of reading prompts.

    Attributes:
        watch: The functions to call.
        total: Tokens of all prompts.
        before: Tokens of the prompts that are read.
    """

    watch: Watch
    total: int
    before: int = 0

    def on_tokens(self, count: int) -> None:
        """Tell that `count` tokens of the present prompt are read."""
        self.watch.progress(READING, self.before + count, self.total)


def _with_one_rotation(
    model: CausalLM, texts: list[_Text], max_new_tokens: int
) -> list[list[_Text]]:
    """Return groups of texts that are continued together: one group if the rotation stays."""
    slots = model.document_layout.num_slots
    lengths = [slots(length) for text in texts for length in (text.length, _end(text))]
    if not lengths or model.rotary(min(lengths)) is model.rotary(max(lengths)):
        return [texts] if texts else []
    return [[text] for text in texts]


def _end(text: _Text) -> int:
    """Return the greatest length that a text is read at."""
    return text.length + max(0, text.how.max_new_tokens - 1)


class _Run:
    """Texts that are continued together while the rotation stays the same."""

    def __init__(
        self, model: CausalLM, texts: list[_Text], how: Generation, reading: _Reading
    ) -> None:
        self._model, self._layout = model, model.document_layout
        self._texts, self._how, self._reading = texts, how, reading
        slots = self._layout.num_slots
        capacity = max(slots(max(len(text.tokens), _end(text))) for text in texts)
        length = max(slots(len(text.tokens)) for text in texts)
        self._rotary = model.rotary(length)
        size = CacheSize(len(texts), capacity, length, how.device_blocks)
        self._decoder = Decoder(model, size, how.piece)

    def until_rotation_changes(self, figures: Figures) -> list[_Text]:
        """Continue the texts and count what it takes; return those that need another rotation."""
        rows = dict(enumerate(text for text in self._texts if not text.is_done))
        start = time.perf_counter()
        logits = [self._prefill(row, text) for row, text in rows.items()]
        self._choose(list(rows.values()), logits)
        figures.reading_seconds += time.perf_counter() - start
        figures.read += sum(self._layout.num_slots(len(text.tokens) - 1) for text in rows.values())
        start = time.perf_counter()
        waiting = self._continue(rows, figures)
        figures.step_seconds += time.perf_counter() - start
        cache = self._decoder.cache
        figures.cache_bytes = max(figures.cache_bytes, cache.nbytes // len(self._texts))
        figures.swaps = SwapCount.total(figures.swaps, cache.swaps)
        return waiting

    def _continue(self, rows: dict[int, _Text], figures: Figures) -> list[_Text]:
        """Add tokens to texts; return those that go on with another rotation."""
        while True:
            rows = {row: text for row, text in rows.items() if not text.is_done}
            if not rows:
                return []
            changed = [text for text in rows.values() if not self._rotation_holds(text)]
            if changed:
                return changed
            self._step(rows)
            figures.steps += 1

    def _rotation_holds(self, text: _Text) -> bool:
        return self._model.rotary(self._layout.num_slots(len(text.tokens))) is self._rotary

    def _prefill(self, row: int, text: _Text) -> Tensor | None:
        """Read a text; return the logits after its last token, if this stage has them."""
        count, reading = len(text.tokens), self._reading
        slots = self._layout.num_slots(count)
        laid = self._layout.place(text.tokens.cpu(), 0, slots, count).to(text.tokens.device)
        first = count == text.length and reading.watch.progress is not silent
        if first:
            reading.on_tokens(0)
        logits = self._decoder.prefill(row, laid, self._on_slots if first else None)
        if first:
            reading.before += count
        return logits

    def _on_slots(self, slots: int) -> None:
        """Tell of a prompt's tokens, landmarks left out."""
        self._reading.on_tokens(self._layout.num_text_slots(slots))

    def _step(self, rows: dict[int, _Text]) -> None:
        """Add one token to each text."""
        # A landmark before the new token is read first.
        landmark, layout = self._layout.landmark, self._layout
        if landmark is not None:
            ends = [
                row
                for row, text in rows.items()
                if layout.num_slots(len(text.tokens)) - layout.num_slots(len(text.tokens) - 1) > 1
            ]
            if ends:
                like = rows[ends[0]].tokens
                self._decoder.step(ends, like.new_full((len(ends),), landmark))
        tokens = torch.stack([text.tokens[-1] for text in rows.values()])
        logits = self._decoder.step(list(rows), tokens)
        self._choose(list(rows.values()), None if logits is None else list(logits.split(1)))

    def _choose(self, texts: list[_Text], logits: Sequence[Tensor | None] | None) -> None:
        """Append the next token of each text, chosen on the last stage."""
        if not texts:
            return
        chosen = [
            self._how.sampling.choose(self._allowed(row[0]), text.generator)
            for text, row in zip(texts, logits or (), strict=False)
            if row is not None
        ]
        shared = self._decoder.share(
            torch.cat(chosen) if chosen else None, len(texts), texts[0].tokens
        )
        on_token = self._reading.watch.on_token
        for text, token in zip(texts, shared, strict=True):
            text.tokens = torch.cat([text.tokens, token[None].to(text.tokens.device)])
            if self._how.stops:
                text.stopped = int(token) in self._how.stops
            if on_token is not None:
                on_token(int(token), text.number)

    def _allowed(self, logits: Tensor) -> Tensor:
        """Return logits without the landmark, which is inserted by position, never predicted."""
        if self._layout.landmark is not None:
            logits[self._layout.landmark] = -torch.inf
        return logits
