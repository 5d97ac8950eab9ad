"""Map rows of Hugging Face tensors to rows of ours: one table for import and export.

Ours are the whole model's names in a checkpoint. Queries, keys and values are fused in one tensor:
for each group of heads that share a key, the queries' rows, then the key's, then the value's. Gate
and up projections are fused too, gate first. Both sides rotate pairs that lie half a head apart, so
no row moves within a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.config.schema import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
HF_FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class SourceRows:
    """Rows `first` to `first + count` of the Hugging Face tensor `name`."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class FusedTensor:
    """One of our tensors: `parts` stacked along dimension 0. rest: its shape without the rows."""

    key: str
    parts: tuple[SourceRows, ...]
    rest: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(part.count for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without padding of the vocabulary."""
        return (self.count, *self.rest)

    def parts_from(self, name: str) -> list[tuple[int, SourceRows]]:
        """Return (first row in ours, part) for each part of the tensor `name`, in its row order."""
        row, found = 0, []
        for part in self.parts:
            if part.name == name:
                found.append((row, part))
            row += part.count
        return sorted(found, key=lambda pair: pair[1].first)

    def parts_between(self, first: int, stop: int) -> Iterator[SourceRows]:
        """Yield the source rows of our rows first to stop, in order."""
        row = 0
        for part in self.parts:
            begin, end = max(first, row), min(stop, row + part.count)
            if begin < end:
                yield SourceRows(part.name, part.first + begin - row, end - begin)
            row += part.count


def layer_prefix(layer: int) -> str:
    """Return the prefix of our tensor names in one layer."""
    return f"decoder.layers.{layer}."


def hf_prefix(layer: int) -> str:
    """Return the prefix of Hugging Face's tensor names in one layer."""
    return f"model.layers.{layer}."


def head_dim(model: ModelConfig) -> int:
    """Return the width of one attention head."""
    return model.head_dim or model.hidden_size // model.nheads


def fused_tensors(model: ModelConfig) -> list[FusedTensor]:
    """Return every tensor of the model in the order of writing, without padding of the vocabulary.

    Tied embeddings are one tensor on both sides.
    """
    hidden, vocab = (model.hidden_size,), model.vocab_size
    tensors = [FusedTensor(EMBEDDING, (SourceRows(HF_EMBEDDING, 0, vocab),), hidden)]
    for layer in range(model.num_layers):
        tensors += _layer_tensors(model, layer)
    tensors.append(FusedTensor(FINAL_NORM, (SourceRows(HF_FINAL_NORM, 0, model.hidden_size),), ()))
    if not model.tied_embeddings:
        tensors.append(FusedTensor(OUTPUT, (SourceRows(HF_OUTPUT, 0, vocab),), hidden))
    return tensors


def _layer_tensors(model: ModelConfig, layer: int) -> list[FusedTensor]:
    ours, theirs = layer_prefix(layer), hf_prefix(layer)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    width = model.nheads * head_dim(model)

    def unfused(key: str, name: str, rows: int, *rest: int) -> FusedTensor:
        return FusedTensor(ours + key, (SourceRows(theirs + name, 0, rows),), rest)

    gate_and_up = (
        SourceRows(theirs + "mlp.gate_proj.weight", 0, ffn),
        SourceRows(theirs + "mlp.up_proj.weight", 0, ffn),
    )
    biases = [_fused_qkv(model, layer, "bias", ())] if model.qkv_bias else []
    head_norms = [
        unfused(f"self_attention.{one}_layernorm.weight", f"self_attn.{one}_norm.weight", rows)
        for one, rows in (("q", head_dim(model)), ("k", head_dim(model)))
        if model.qk_norm
    ]
    return [
        unfused("input_layernorm.weight", "input_layernorm.weight", hidden),
        _fused_qkv(model, layer, "weight", (hidden,)),
        *biases,
        *head_norms,
        unfused("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, width),
        unfused("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden),
        FusedTensor(f"{ours}mlp.linear_fc1.weight", gate_and_up, (hidden,)),
        unfused("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn),
    ]


def _fused_qkv(model: ModelConfig, layer: int, kind: str, rest: tuple[int, ...]) -> FusedTensor:
    """Return the fused qkv tensor of a layer. kind: "weight" or "bias"."""
    theirs, width = f"{hf_prefix(layer)}self_attn.", head_dim(model)
    groups = model.nheads_kv or model.nheads
    queries = model.nheads // groups * width
    parts = [
        part
        for group in range(groups)
        for part in (
            SourceRows(f"{theirs}q_proj.{kind}", group * queries, queries),
            SourceRows(f"{theirs}k_proj.{kind}", group * width, width),
            SourceRows(f"{theirs}v_proj.{kind}", group * width, width),
        )
    ]
    return FusedTensor(f"{layer_prefix(layer)}self_attention.linear_qkv.{kind}", tuple(parts), rest)


def hf_shapes(model: ModelConfig, extras: Sequence[FusedTensor] = ()) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor of the model, in the order of writing.

    extras: tensors in addition to the plain model's.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for ours in (*fused_tensors(model), *extras):
        for part in ours.parts:
            rows = part.first + part.count
            shapes[part.name] = (max(rows, shapes.get(part.name, (0,))[0]), *ours.rest)
    return shapes


def check_shapes(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError listing missing tensors, unexpected tensors and wrong shapes.

    Args:
        folder: Hugging Face folder, for messages.
        shapes: shape of each tensor in the files.
        expected: shape of each tensor that config.json implies.
    """
    errors = [
        f"{folder}: {name} is missing; config.json implies shape {list(shape)}"
        for name, shape in expected.items()
        if name not in shapes
    ]
    errors += [
        f"{folder}: {name} has shape {list(shapes[name])}; config.json implies {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    errors += [
        f"{folder}: {name} {list(shape)} is not a tensor of the model in config.json"
        for name, shape in shapes.items()
        if name not in expected
    ]
    if errors:
        more = f"\n... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise ValueError("\n".join(errors[:20]) + more)
