"""Perplexity by length: score the same held-out text in windows of several lengths.

At each length the text is split into windows without overlap. Every token is scored given all
tokens before it in its window, but for the first token of a document: no text before it says what
it is. Of conversations only the answers are scored. The text is the same at all lengths, so longer
windows improve the score only of a model that uses its context. Most models fail beyond their
training length.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.data.datasets.aligned import AlignedDataset
from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.distributed.mesh import Mesh
from lcdist.engines.engine import ForwardEngine
from lcdist.layout import ContextLayout
from lcdist.plan import Plan
from lcdist.utils.progress import Progress, counter, silent


@dataclass(frozen=True)
class Text:
    """Text to score.

    tokens: int64 `[n + 1]`; the last one is a label only.
    unscored: bool `[n + 1]`, whether a token begins a document, or is part of no answer.
    joined: whether documents were concatenated to fill the windows.
    """

    tokens: Tensor
    unscored: Tensor
    joined: bool


@dataclass(frozen=True)
class Score:
    """Result at one length.

    length: of the windows, in tokens.
    tokens: number of scored tokens.
    loss: nats per token.
    """

    length: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss), with the loss limited to 700 so that it does not overflow."""
        return math.exp(min(self.loss, 700.0))


class Windows:
    """Dataset of the windows of `length` tokens of a text."""

    seed = 0

    def __init__(self, text: Text, length: int, vocab_size: int) -> None:
        self.text, self.seqlen, self.vocab_size = text, length, vocab_size

    @property
    def count(self) -> int:
        """Number of complete windows in the text."""
        return (len(self.text.tokens) - 1) // self.seqlen

    def sample(self, index: int) -> Sample:
        """Return window number `index` as one document."""
        start = index * self.seqlen
        window = slice(start, start + self.seqlen + 1)
        borders = torch.tensor([0, self.seqlen], dtype=torch.int32)
        return Sample(self.text.tokens[window], borders, False, ~self.text.unscored[window])


def held_out_text(split: TokenSplit, length: int, tokens: int, answers_only: bool = True) -> Text:
    """Return at least `tokens` tokens of text, in complete windows of `length` tokens.

    Takes windows from documents that are long enough, longest first, so that each window is part of
    one document. If these do not suffice, concatenates all documents in their stored order.

    Args:
        split: what is held out.
        length: of a window.
        tokens: at least so many.
        answers_only: whether of conversations only the answers are scored.

    Raises:
        ValueError: the split is too small, or there is nothing to score.
    """
    count = -(-tokens // length)
    pieces, unscored = list[Tensor](), list[Tensor]()
    for number in split.longest_documents(length + 1):
        document, skipped = split.document(number), ~_scored(split, number, answers_only)
        skipped[0] = True
        room = min((len(document) - 1) // length, count - len(pieces))
        # Label of the last token; a window's last label is otherwise the next window's start.
        end = room * length + (len(pieces) + room == count)
        pieces += document[:end].split(length)[:room]
        unscored.append(skipped[:end])
        if len(pieces) == count:
            text = torch.cat([*pieces, document[room * length : end]])
            return _checked(Text(text, torch.cat(unscored), joined=False), split, tokens)
    if split.num_tokens < count * length + 1:
        raise ValueError(
            f"the {split.split} split has {split.num_tokens} tokens; evaluate.tokens = {tokens} in "
            f"windows of {length} needs {count * length + 1}: lower evaluate.tokens or "
            "evaluate.lengths, or tokenize with a larger --valid-fraction"
        )
    size, number, unscored = 0, 0, []
    while size < count * length + 1:
        skipped = ~_scored(split, number, answers_only)
        skipped[0] = True
        unscored.append(skipped)
        size, number = size + len(skipped), number + 1
    skipped = torch.cat(unscored)[: count * length + 1]
    return _checked(Text(split.window(0, len(skipped)), skipped, joined=True), split, tokens)


def _scored(split: TokenSplit, number: int, answers_only: bool) -> Tensor:
    """Return which tokens of a document are scored, but for its first: bool `[n]`."""
    if split.targets is not None and answers_only:
        return split.document_targets(number)
    return torch.ones(int(split.document_lengths[number]), dtype=torch.bool)


def _checked(text: Text, split: TokenSplit, tokens: int) -> Text:
    """Return a text; raise ValueError if none of it is scored."""
    if text.unscored[1:].all():
        raise ValueError(
            f"{split.folder}: none of the {split.split} split's first {tokens} tokens is part of "
            "an answer: raise evaluate.tokens, or set data.targets=all"
        )
    return text


def perplexity_by_length(
    engine: ForwardEngine,
    plan: Plan,
    mesh: Mesh,
    text: Text,
    lengths: tuple[int, ...],
    progress: Progress = silent,
) -> list[Score]:
    """Score `text` at each length over all ranks; every rank returns the same numbers.

    `progress` is called with the tokens that are read, of all lengths.
    """
    count = counter("perplexity", len(lengths) * (len(text.tokens) - 1), progress)
    slots = plan.shape.document_layout
    scores = []
    for length in lengths:
        windows = Windows(text, length, plan.config.model.vocab_size)
        # Lengths count text only. Landmarks are extra, so that all methods score the same windows.
        row = slots.num_slots(length)
        layout = layout_for(plan, row)
        spec = LoaderSpec(
            layout, mesh.dp_rank, mesh.dp_size, mesh.cp_rank, 1, mesh.dp_size, document_layout=slots
        )
        loader = Loader(windows if row == length else AlignedDataset(windows, slots, row), spec)
        total, tokens = 0.0, 0
        for _ in range(windows.count // mesh.dp_size):
            batches = [batch.to(mesh.device) for batch in loader.next_step()]
            loss = engine.evaluate(batches, layout, row)
            total, tokens = total + loss.mean * loss.tokens, tokens + loss.tokens
            count(length * mesh.dp_size)
        scores.append(Score(length, tokens, total / max(1, tokens)))
    return scores


def layout_for(plan: Plan, length: int) -> ContextLayout:
    """Return the run's kind of layout for `length` tokens, padded to the multiple it needs."""
    step = plan.layout.multiple_of
    padded = -(-length // step) * step
    return ContextLayout(plan.layout.kind, padded, plan.layout.cp_size, step)
