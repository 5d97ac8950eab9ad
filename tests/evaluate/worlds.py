"""A small trained checkpoint with text, for the tests of evaluations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcdist.checkpoint.save import Checkpointer
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.meta import Meta, write_meta
from lcdist.data.prepare.indexed import IndexedWriter
from lcdist.layout import ContextLayout
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams
from tests.engines.internals import chunks_of
from tests.model.small import Meshes, small, take_steps

VOCAB = 250


def write_tokens(
    folder: Path,
    documents: dict[str, list[list[int]]],
    fingerprint: str = "",
    vocab_size: int = VOCAB,
) -> Path:
    """Write a token folder of the given documents by split."""
    folder.mkdir(parents=True)
    for split, of_split in documents.items():
        with IndexedWriter(folder / split, vocab_size) as writer:
            for document in of_split:
                writer.add(document)
    counts = {split: len(of_split) for split, of_split in documents.items()}
    tokens = {split: sum(map(len, of_split)) for split, of_split in documents.items()}
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    write_meta(
        folder, Meta(1, "", vocab_size, 0, fingerprint, counts, tokens, {}, {}, 0, [], files)
    )
    return folder


def with_data(folder: Path, lengths: Sequence[int] = (50, 400, 90)) -> Path:
    """Write random documents of the given lengths to the folder's `data`."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    write_tokens(folder / "data", {"train": texts, "valid": texts})
    return folder


def trained_model(folder: Path, *words: str) -> CausalLM:
    """Train on the folder's data for a few steps, save to `checkpoints`, and return the model."""
    config = small("data.source=tokens", f"data.path={folder / 'data'}", *words)
    trainer = Meshes().trainer(config)
    take_steps(trainer, 3)
    trainer.checkpointer = Checkpointer(folder / "checkpoints", keep_last=1)
    trainer.save()
    [model] = chunks_of(trainer)
    return model


def document(folder: Path, number: int = 1) -> Tensor:
    """Return a document of the folder's valid split."""
    return TokenSplit(folder / "data", "valid").document(number)


def text_logits(model: CausalLM, text: Tensor) -> Tensor:
    """`[len(text), vocab]` after each token of the text, laid out as the model wants it."""
    slots = model.document_layout
    padded = -(-slots.num_slots(len(text)) // slots.step) * slots.step
    laid = slots.place(text, 0, padded, len(text))
    how = SequenceParams(layout=ContextLayout("contiguous", padded, 1))
    logits = model(laid.clamp(min=0)[None], None, None, packed_seq_params=how)[0]
    return logits[slots.is_text(laid), : model.true_vocab_size]


def plain_losses(model: CausalLM, tokens: Tensor) -> Tensor:
    """Return the loss of each token but the first from one plain forward pass, float64."""
    with torch.no_grad():
        logits = text_logits(model, tokens[:-1])
    return torch.nn.functional.cross_entropy(logits.double(), tokens[1:], reduction="none")
