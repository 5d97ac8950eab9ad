"""Samples to batches: which rank draws which sample, labels, loss mask, and the cut over cp ranks.

A step takes samples [n, n + global_batch_size). Micro-batch m of data-parallel rank d takes the
micro_batch_size samples from n + (m dp_size + d) micro_batch_size on; every tp, pp and cp rank of
d draws the same ones. So the state is n alone, and n means the same at any dp_size. With `balance`
the same samples are dealt to the ranks by their work (balance.py); the state stays what it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcdist.data.balance import attention_work, deal, table_of
from lcdist.data.datasets.sample import Dataset, Sample
from lcdist.layout import ContextLayout
from lcdist.layout.documents import DocumentLayout


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-batch.

    tokens, labels: int64 `[b, s_local]`. loss_mask: fp32 `[b, s_local]`, 1 where the loss counts:
    nowhere on padding and on landmarks.
    cu_seqlens: for packed documents one global int32 table a row, over layout.seqlen tokens; None
    where the tokens of a row are one text.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    cu_seqlens: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class LoaderSpec:
    """What a rank draws, and how it is cut.

    layout: cuts rows of layout.seqlen tokens, which may be more than the data set's seqlen.
    micro_batch_size: samples a data-parallel rank runs at once. global_batch_size: samples a
    step, over all ranks. documents: "join" reads a row as one text; "pack" keeps the documents
    apart. slots: how the data set laid out its samples. balance: whether a step's samples are dealt
    to the data-parallel ranks by the work of their attention. Raises ValueError where
    global_batch_size does not divide.
    """

    layout: ContextLayout
    dp_rank: int
    dp_size: int
    cp_rank: int
    micro_batch_size: int
    global_batch_size: int
    documents: Literal["join", "pack"] = "join"
    slots: DocumentLayout = field(default_factory=DocumentLayout)
    balance: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size and 0 <= self.cp_rank < self.layout.cp_size
        if self.documents not in ("join", "pack"):
            raise ValueError(f"data.documents = {self.documents!r}: must be 'join' or 'pack'")
        at_once = self.micro_batch_size * self.dp_size
        if at_once < 1 or self.global_batch_size < 1 or self.global_batch_size % at_once:
            raise ValueError(
                f"train.global_batch_size = {self.global_batch_size}: must be a multiple of "
                f"train.micro_batch_size x dp_size = {self.micro_batch_size} x {self.dp_size} = "
                f"{at_once}"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a data-parallel rank runs in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)


class Loader:
    """Draws this rank's batches; its whole state is the number of samples drawn by all ranks.

    Raises ValueError where the data set's samples are longer than the layout's rows.
    """

    def __init__(self, dataset: Dataset, spec: LoaderSpec) -> None:
        if dataset.seqlen > spec.layout.seqlen:
            raise ValueError(
                f"the data set's samples have {dataset.seqlen} tokens, the layout's rows only "
                f"{spec.layout.seqlen}: the two must agree up to padding"
            )
        self.dataset = dataset
        self.spec = spec
        self.sample = 0

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, in order; moves on by global_batch_size samples."""
        batches = self.step_at(self.sample)
        self.sample += self.spec.global_batch_size
        return batches

    def step_at(self, sample: int) -> list[Batch]:
        """The micro-batches of the step that starts with sample number `sample`."""
        size, spec = self.spec.micro_batch_size, self.spec
        if spec.balance and spec.dp_size > 1:
            every = range(sample, sample + spec.global_batch_size)
            works = [attention_work(table_of(self.dataset, index)) for index in every]
            mine = [sample + place for place in deal(works, spec.dp_size)[spec.dp_rank]]
            return [self._batch(mine[first : first + size]) for first in range(0, len(mine), size)]
        firsts = [
            sample + (micro * spec.dp_size + spec.dp_rank) * size
            for micro in range(spec.num_micro_batches)
        ]
        return [self._batch(range(first, first + size)) for first in firsts]

    def state_dict(self) -> dict[str, int]:
        """{"seed", "sample"}: valid at any mesh and batch size."""
        return {"seed": self.dataset.seed, "sample": self.sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises ValueError where it belongs to another seed."""
        if state["seed"] != self.dataset.seed:
            raise ValueError(
                f"the saved loader state has seed = {state['seed']}, this run train.seed = "
                f"{self.dataset.seed}: set train.seed = {state['seed']} to go on with its samples"
            )
        self.sample = int(state["sample"])

    def _batch(self, indices: Sequence[int]) -> Batch:
        pack = self.spec.documents == "pack"
        samples = [self.dataset.sample(index) for index in indices]
        targets = [_targets(sample, self.spec.slots, pack) for sample in samples]
        return Batch(
            # Padding is read as some token, and its output by nobody.
            tokens=self._rows([sample.tokens[:-1].clamp(min=0) for sample in samples]),
            labels=self._rows([labels for labels, _ in targets]),
            loss_mask=self._rows([mask for _, mask in targets]),
            cu_seqlens=tuple(map(self._padded_table, samples)) if pack else None,
        )

    def _rows(self, rows: list[Tensor]) -> Tensor:
        layout = self.spec.layout
        whole = torch.stack([pad(row, (0, layout.seqlen - len(row))) for row in rows])
        return layout.shard(whole, self.spec.cp_rank, dim=1)

    def _padded_table(self, sample: Sample) -> Tensor:
        """Document borders of a row; the padding is a document of its own."""
        table, seqlen = sample.cu_seqlens, self.spec.layout.seqlen
        if int(table[-1]) == seqlen:
            return table
        return torch.cat([table, table.new_tensor([seqlen])])


def _targets(sample: Sample, slots: DocumentLayout, pack: bool) -> tuple[Tensor, Tensor]:
    """(labels int64 `[seqlen]`, loss mask fp32 `[seqlen]`): text predicts the next text.

    The token before a landmark predicts the one after it; landmarks and padding predict nothing
    (arXiv:2305.16300). Packed, the last token of a document predicts nothing; joined documents
    keep that label: the model learns what may follow an eos.
    """
    tokens, seqlen = sample.tokens, len(sample.tokens) - 1
    text = slots.is_text(tokens)
    places = text.nonzero().flatten()
    if not len(places):
        return torch.zeros(seqlen, dtype=torch.int64), torch.zeros(seqlen)
    here = torch.arange(seqlen)
    number = torch.searchsorted(places, here, right=True)
    learned = text[:-1] & (number < len(places))
    following = places[number.clamp(max=len(places) - 1)]
    if pack:
        ends = sample.cu_seqlens[1:] if sample.closed else sample.cu_seqlens[1:-1]
        document = torch.searchsorted(ends.long(), torch.arange(seqlen + 1), right=True)
        learned &= document[following] == document[:-1]
    return tokens[following].clamp(min=0), learned.float()
