"""The held-out text that is scored, and the loss of each of its tokens on any mesh.

The text is cut into windows. Every token is scored given all tokens before it in its window, but
for the first token of a document: no text before it says what it is. Of conversations only the
answers are scored.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcdist.checkpoint.manifest import Checkpoint
from lcdist.checkpoint.read import saved_config
from lcdist.config.schema import Config
from lcdist.data.datasets.aligned import AlignedDataset
from lcdist.data.datasets.build import held_out_folder
from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.data.meta import META, REMAKE, Meta
from lcdist.distributed.mesh import Mesh
from lcdist.distributed.verify import refuse_damaged
from lcdist.engines.engine import ForwardEngine
from lcdist.layout import ContextLayout
from lcdist.plan import Plan


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

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and of which are scored."""
        parts = self.tokens.numpy().tobytes(), self.unscored.numpy().tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()


class Windows:
    """Dataset of windows of `length` tokens of a text.

    Args:
        text: the text.
        length: of every window.
        vocab_size: of the model.
        starts: first token of every window; by default the windows tile the text.
    """

    seed = 0

    def __init__(
        self, text: Text, length: int, vocab_size: int, starts: Sequence[int] | None = None
    ) -> None:
        self.text, self.seqlen, self.vocab_size = text, length, vocab_size
        whole = range(0, len(text.tokens) - length, length)
        self.starts = whole if starts is None else starts

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.starts)

    def sample(self, index: int) -> Sample:
        """Return window number `index` as one document; beyond the last one, the last one."""
        start = self.starts[min(index, self.count - 1)]
        window = slice(start, start + self.seqlen + 1)
        borders = torch.tensor([0, self.seqlen], dtype=torch.int32)
        return Sample(self.text.tokens[window], borders, False, ~self.text.unscored[window])

    def scored(self) -> Tensor:
        """Return whether the token after each token is scored: bool `[windows, length]`."""
        inside = torch.arange(1, self.seqlen + 1)
        return ~self.text.unscored[torch.tensor([*self.starts])[:, None] + inside]


def open_text(config: Config, checkpoint: Checkpoint) -> tuple[Text, Meta]:
    """Return the held-out text that `[evaluate]` asks for, and the description of its folder.

    Raises:
        ValueError: an imported model without data of its own, damaged or too little text.
    """
    if "imported" in checkpoint.manifest and config.data == saved_config(checkpoint).data:
        raise ValueError(
            f"{checkpoint.path} is an imported model, which has no text of its own: say what to "
            "read with data.path=FOLDER, a folder made by 'lcdist tokenize'"
        )
    split = TokenSplit(held_out_folder(config.data), "valid")
    if config.checkpoint.verify == "full":
        refuse_damaged(Path(split.folder), split.meta.sha256 or {}, split.meta.files, META, REMAKE)
    answers_only = config.data.targets == "answers"
    length, tokens = max(config.evaluate.lengths), config.evaluate.tokens
    return held_out_text(split, length, tokens, answers_only), split.meta


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


def stretches(text: Text, length: int, stretch: int) -> dict[str, list[int]]:
    """Return the first tokens of the windows that tile the text, by the stretch they begin in.

    Args:
        text: the text.
        length: of the windows.
        stretch: tokens of each stretch.

    Returns:
        Lists by names of the stretches, in the order of the text.
    """
    found: dict[str, list[int]] = {}
    for start in Windows(text, length, 0).starts:
        found.setdefault(f"stretch {start // stretch}", []).append(start)
    return found


def text_losses(
    engine: ForwardEngine, plan: Plan, mesh: Mesh, windows: Windows, count: Callable[[int], None]
) -> Tensor:
    """Return the loss of the token after each token of the windows; all ranks call it.

    Args:
        engine: of the model.
        plan: of the model.
        mesh: on which it runs.
        windows: the text.
        count: called with the tokens that are read.

    Returns:
        Nats, float64 `[windows, length]`, the same on every rank. Landmarks and padding have none;
        `Windows.scored` tells which of them count.
    """
    slots, length = plan.shape.document_layout, windows.seqlen
    # Lengths count text only. Landmarks are extra, so that all methods score the same windows.
    row = slots.num_slots(length)
    layout = layout_for(plan, row)
    spec = LoaderSpec(
        layout, mesh.dp_rank, mesh.dp_size, mesh.cp_rank, 1, mesh.dp_size, document_layout=slots
    )
    loader = Loader(windows if row == length else AlignedDataset(windows, slots, row), spec)
    placed = slots.place(torch.zeros(length, dtype=torch.int64), 0, row, length)
    text_slots = slots.is_text(placed).nonzero().flatten()
    rounds = []
    # In the last round data-parallel ranks without a window read the last one once more.
    for first in range(0, windows.count, mesh.dp_size):
        batches = [batch.to(mesh.device) for batch in loader.next_step()]
        [losses] = engine.token_losses(batches, layout, row)
        rounds.append(losses[:, text_slots])
        count(length * min(mesh.dp_size, windows.count - first))
    return torch.cat(rounds)[: windows.count]


def layout_for(plan: Plan, length: int) -> ContextLayout:
    """Return the run's kind of layout for `length` tokens, padded to the multiple it needs."""
    step = plan.layout.multiple_of
    padded = -(-length // step) * step
    return ContextLayout(plan.layout.kind, padded, plan.layout.cp_size, step)
