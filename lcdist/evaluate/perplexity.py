"""Perplexity by length: score the same held-out text in windows of several lengths.

At each length the text is split into windows without overlap. Every token is scored given all
tokens before it in its window, but for the first token of a document: no text before it says what
it is. The text is the same at all lengths, so longer windows improve the score only of a model that
uses its context. Most models fail beyond their training length.
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
    begins: bool `[n + 1]`, whether a token does not continue the document of the one before it.
    joined: whether documents were concatenated to fill the windows.
    """

    tokens: Tensor
    begins: Tensor
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
        return Sample(self.text.tokens[window], borders, False, ~self.text.begins[window])


def held_out_text(split: TokenSplit, length: int, tokens: int) -> Text:
    """Return at least `tokens` tokens of text, in complete windows of `length` tokens.

    Takes windows from documents that are long enough, longest first, so that each window is part of
    one document. If these do not suffice, concatenates all documents in their stored order. Raises
    ValueError if the split is too small.
    """
    count = -(-tokens // length)
    pieces: list[Tensor] = []
    begins = torch.zeros(count * length + 1, dtype=torch.bool)
    for number in split.longest_documents(length + 1):
        document = split.document(number)
        room = min((len(document) - 1) // length, count - len(pieces))
        begins[len(pieces) * length] = True
        pieces += [document[i * length : (i + 1) * length] for i in range(room)]
        if len(pieces) == count:
            # Label of the last token; a window's last label is otherwise the next window's start.
            last = document[room * length : room * length + 1]
            return Text(torch.cat([*pieces, last]), begins, joined=False)
    if split.num_tokens < count * length + 1:
        raise ValueError(
            f"the {split.split} split has {split.num_tokens} tokens; evaluate.tokens = {tokens} in "
            f"windows of {length} needs {count * length + 1}: lower evaluate.tokens or "
            "evaluate.lengths, or tokenize with a larger --valid-fraction"
        )
    begins = torch.zeros_like(begins)
    starts = torch.from_numpy(split.document_starts)
    begins[starts[starts < len(begins)]] = True
    return Text(split.window(0, count * length + 1), begins, joined=True)


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
