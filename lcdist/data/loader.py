"""Turn samples into batches: labels, loss mask, and the shard of each context-parallel rank.

A step uses samples [n, n + global_batch_size). Micro-batch m of data-parallel rank d uses the
micro_batch_size samples that start at n + (m dp_size + d) micro_batch_size. All tp, pp and cp ranks
of d use the same samples. The loader state is therefore n alone, and n has the same meaning at any
dp_size. With `balance` the samples of a step are assigned to the ranks by their work (balance.py);
the state stays the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcdist.data.balance import assign_by_work, attention_work, sample_cu_seqlens
from lcdist.data.datasets.sample import Dataset, Sample
from lcdist.layout import ContextLayout
from lcdist.layout.documents import DocumentLayout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """One rank's shard of a micro-batch.

    Attributes:
        tokens: int64 `[b, s_local]`.
        labels: int64 `[b, s_local]`.
        loss_mask: fp32 `[b, s_local]`, 1 where a label counts; 0 on padding and landmarks.
        cu_seqlens: for packed documents one int32 table per row, in positions of the whole row of
            layout.seqlen tokens. None if each row is read as one text.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    cu_seqlens: tuple[Tensor, ...] | None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`; document tables stay on the CPU.

        The host does not wait for CUDA: the copies are from pinned memory. A copy from other memory
        would wait for all work queued before it.
        """

        def sent(x: Tensor) -> Tensor:
            pinned = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
            return pinned.to(device, non_blocking=True)

        return Batch(sent(self.tokens), sent(self.labels), sent(self.loss_mask), self.cu_seqlens)


@dataclass(frozen=True)
class LoaderSpec:
    """Selection of samples for one rank, and their sharding.

    Attributes:
        layout: shards rows of layout.seqlen tokens, which may be more than the dataset's seqlen.
        dp_rank, dp_size, cp_rank: position of this rank in the mesh.
        micro_batch_size: samples that one data-parallel rank processes at once.
        global_batch_size: samples per step over all ranks.
        documents: "join" reads a row as one text; "pack" keeps the documents separate.
        document_layout: layout with which the dataset placed documents in its samples.
        balance: whether to assign the samples of a step by their attention work.

    Raises:
        ValueError: `documents` is unknown, or global_batch_size is not a multiple of
            micro_batch_size x dp_size.
    """

    layout: ContextLayout
    dp_rank: int
    dp_size: int
    cp_rank: int
    micro_batch_size: int
    global_batch_size: int
    documents: Literal["join", "pack"] = "join"
    document_layout: DocumentLayout = field(default_factory=DocumentLayout)
    balance: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size and 0 <= self.cp_rank < self.layout.cp_size
        if self.documents not in ("join", "pack"):
            raise ValueError(f"data.documents = {self.documents!r}: must be 'join' or 'pack'")
        parallel_samples = self.micro_batch_size * self.dp_size
        batch_size = self.global_batch_size
        if parallel_samples < 1 or batch_size < 1 or batch_size % parallel_samples:
            raise ValueError(
                f"train.global_batch_size = {self.global_batch_size}: must be a multiple of "
                f"train.micro_batch_size x dp_size = {self.micro_batch_size} x {self.dp_size} = "
                f"{parallel_samples}"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step of one data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)


class Loader:
    """Produces the batches of one rank.

    The whole state is the number of samples that all ranks together have drawn so far.

    Raises:
        ValueError: the samples of the dataset are longer than the rows of the layout.
    """

    def __init__(self, dataset: Dataset, spec: LoaderSpec) -> None:
        if dataset.seqlen > spec.layout.seqlen:
            raise ValueError(
                f"the dataset's samples have {dataset.seqlen} tokens, but the layout's rows only "
                f"{spec.layout.seqlen}: the two must agree up to padding"
            )
        self.dataset = dataset
        self.spec = spec
        self.sample = 0
        self._ahead: tuple[int, torch.device, list[Batch]] | None = None

    def next_step(self, device: torch.device = CPU) -> list[Batch]:
        """Return the next step's micro-batches on `device`, in order; advance by a global batch."""
        self.draw_ahead(device)
        assert self._ahead is not None
        batches, self._ahead = self._ahead[2], None
        self.sample += self.spec.global_batch_size
        return batches

    def draw_ahead(self, device: torch.device) -> None:
        """Draw the next step's micro-batches now and send them to `device`.

        The state does not change: it stays that of the last step taken.
        """
        if self._ahead is None or self._ahead[:2] != (self.sample, device):
            batches = [batch.to(device) for batch in self.step_at(self.sample)]
            self._ahead = self.sample, device, batches

    def step_at(self, sample: int) -> list[Batch]:
        """Return the micro-batches of the step that starts at sample number `sample`."""
        size, spec = self.spec.micro_batch_size, self.spec
        if spec.balance and spec.dp_size > 1:
            step_samples = range(sample, sample + spec.global_batch_size)
            works = [attention_work(sample_cu_seqlens(self.dataset, i)) for i in step_samples]
            own_items = assign_by_work(works, spec.dp_size)[spec.dp_rank]
            own = [sample + item for item in own_items]
            return [self._batch(own[first : first + size]) for first in range(0, len(own), size)]
        firsts = [
            sample + (micro * spec.dp_size + spec.dp_rank) * size
            for micro in range(spec.num_micro_batches)
        ]
        return [self._batch(range(first, first + size)) for first in firsts]

    def state_dict(self) -> dict[str, int]:
        """Return {"seed", "sample"}, which is valid for any mesh and batch size."""
        return {"seed": self.dataset.seed, "sample": self.sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError if it was saved with another seed."""
        if state["seed"] != self.dataset.seed:
            raise ValueError(
                f"the saved loader state has seed = {state['seed']}, this run train.seed = "
                f"{self.dataset.seed}: set train.seed = {state['seed']} to continue with its "
                "samples"
            )
        self.sample = int(state["sample"])

    def _batch(self, indices: Sequence[int]) -> Batch:
        pack = self.spec.documents == "pack"
        samples = [self.dataset.sample(index) for index in indices]
        targets = [_targets(sample, self.spec.document_layout, pack) for sample in samples]
        return Batch(
            # Padding needs some valid token number; its output is masked.
            tokens=self._shard([sample.tokens[:-1].clamp(min=0) for sample in samples]),
            labels=self._shard([labels for labels, _ in targets]),
            loss_mask=self._shard([mask for _, mask in targets]),
            cu_seqlens=tuple(map(self._padded_cu_seqlens, samples)) if pack else None,
        )

    def _shard(self, rows: list[Tensor]) -> Tensor:
        """Pad rows to the layout's length, stack them and return this rank's shard."""
        layout = self.spec.layout
        whole = torch.stack([pad(row, (0, layout.seqlen - len(row))) for row in rows])
        return layout.shard(whole, self.spec.cp_rank, dim=1)

    def _padded_cu_seqlens(self, sample: Sample) -> Tensor:
        """Return the document borders of a padded row; the padding is a document of its own."""
        cu_seqlens, seqlen = sample.cu_seqlens, self.spec.layout.seqlen
        if int(cu_seqlens[-1]) == seqlen:
            return cu_seqlens
        return torch.cat([cu_seqlens, cu_seqlens.new_tensor([seqlen])])


def _targets(sample: Sample, document_layout: DocumentLayout, pack: bool) -> tuple[Tensor, Tensor]:
    """Return (labels int64 `[seqlen]`, loss mask fp32 `[seqlen]`).

    Every text token predicts the next text token. The token before a landmark predicts the token
    after it; landmarks and padding predict nothing (arXiv:2305.16300). If documents are packed, the
    last token of a document predicts nothing. Joined documents keep that label, so that the model
    learns which tokens follow an eos.
    """
    tokens, seqlen = sample.tokens, len(sample.tokens) - 1
    is_text = document_layout.is_text(tokens)
    text_positions = is_text.nonzero().flatten()
    if not len(text_positions):
        return torch.zeros(seqlen, dtype=torch.int64), torch.zeros(seqlen)
    # For each position, the index into text_positions of the next text token.
    following = torch.searchsorted(text_positions, torch.arange(seqlen), right=True)
    mask = is_text[:-1] & (following < len(text_positions))
    following = following.clamp(max=len(text_positions) - 1)
    label_positions = text_positions[following]
    if sample.is_target is not None:
        mask &= sample.is_target[following]
    if pack:
        ends = sample.cu_seqlens[1:] if sample.ends_document else sample.cu_seqlens[1:-1]
        document = torch.searchsorted(ends.long(), torch.arange(seqlen + 1), right=True)
        mask &= document[label_positions] == document[:-1]
    return tokens[label_positions].clamp(min=0), mask.float()
