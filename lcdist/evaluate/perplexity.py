"""Perplexity by length: the same held-out text, read in windows of growing length.

At every length the text is cut into windows that do not overlap, and every token of a window is
scored given all tokens before it in the window. Since the text is the same, a longer window can
only help a model that uses its context; past the length it was trained for, most models fail.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.data.datasets.aligned import AlignedDataset
from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.tokens import TokenSplit
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.distributed.mesh import Mesh
from lcdist.engines.engine import ForwardEngine
from lcdist.layout import ContextLayout
from lcdist.plan import Plan


@dataclass(frozen=True)
class Text:
    """The text that is scored. tokens: int64 `[n + 1]`; joined: whether documents were joined."""

    tokens: Tensor
    joined: bool


@dataclass(frozen=True)
class Score:
    """length: of the windows, in tokens; tokens: scored; loss: nats a token."""

    length: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))


class Windows:
    """The windows of `length` tokens of a text, as a data set."""

    seed = 0

    def __init__(self, text: Text, length: int, vocab_size: int) -> None:
        self.text, self.seqlen, self.vocab_size = text, length, vocab_size

    @property
    def count(self) -> int:
        """How many whole windows the text has."""
        return (len(self.text.tokens) - 1) // self.seqlen

    def sample(self, index: int) -> Sample:
        """Window number `index`, read as one document."""
        start = index * self.seqlen
        tokens = self.text.tokens[start : start + self.seqlen + 1]
        borders = torch.tensor([0, self.seqlen], dtype=torch.int32)
        return Sample(tokens, borders, ends_document=False)


def held_out_text(split: TokenSplit, length: int, tokens: int) -> Text:
    """At least `tokens` tokens of text, in whole windows of `length` tokens.

    Windows are taken from documents that are long enough, longest first, so that all of a window
    is one document; where those do not suffice, from the documents joined in their stored order.
    Raises ValueError where the split is smaller than that.
    """
    count = -(-tokens // length)
    pieces: list[Tensor] = []
    for number in split.longest_documents(length + 1):
        document = split.document(number)
        room = min((len(document) - 1) // length, count - len(pieces))
        pieces += [document[i * length : (i + 1) * length] for i in range(room)]
        if len(pieces) == count:
            # The label of the last token; the labels between windows are the next window's start.
            last = document[room * length : room * length + 1]
            return Text(torch.cat([*pieces, last]), joined=False)
    if split.num_tokens < count * length + 1:
        raise ValueError(
            f"the {split.split} split has {split.num_tokens} tokens; evaluate.tokens = {tokens} in "
            f"windows of {length} needs {count * length + 1}: lower evaluate.tokens or "
            "evaluate.lengths, or tokenize with a larger --valid-fraction"
        )
    return Text(split.window(0, count * length + 1), joined=True)


def perplexity_by_length(
    engine: ForwardEngine, plan: Plan, mesh: Mesh, text: Text, lengths: tuple[int, ...]
) -> list[Score]:
    """Score `text` at each length over all ranks; every rank returns the same numbers."""
    slots = plan.shape.document_layout
    scores = []
    for length in lengths:
        windows = Windows(text, length, plan.config.model.vocab_size)
        # Lengths count text: landmarks come on top, so that every method reads the same windows.
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
        scores.append(Score(length, tokens, total / max(1, tokens)))
    return scores


def layout_for(plan: Plan, length: int) -> ContextLayout:
    """The run's kind of layout for sequences of `length` tokens, padded to what it needs."""
    step = plan.layout.multiple_of
    padded = -(-length // step) * step
    return ContextLayout(plan.layout.kind, padded, plan.layout.cp_size, step)
