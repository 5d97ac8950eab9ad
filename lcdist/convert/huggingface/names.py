"""Which rows of which Hugging Face tensor are which rows of ours: one table for both directions.

Ours are the names of the whole model in a checkpoint. Queries, keys and values are one tensor: for
each group of heads that share a key, the queries' rows, then the key's, then the value's. Gate and
up are one, gate first. Both sides rotate pairs half a head apart, so no row moves within a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """A tensor of ours, made of `parts` one below the other. rest: its shape without the rows."""

    key: str
    parts: tuple[SourceRows, ...]
    rest: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many rows the parts make."""
        return sum(part.count for part in self.parts)

    def places(self, name: str) -> list[tuple[int, SourceRows]]:
        """The parts of `name` in its own order, each with our row where it begins."""
        row, found = 0, []
        for part in self.parts:
            if part.name == name:
                found.append((row, part))
            row += part.count
        return sorted(found, key=lambda place: place[1].first)

    def slices(self, first: int, stop: int) -> Iterator[SourceRows]:
        """What our rows first to stop are made of, in order."""
        row = 0
        for part in self.parts:
            begin, end = max(first, row), min(stop, row + part.count)
            if begin < end:
                yield SourceRows(part.name, part.first + begin - row, end - begin)
            row += part.count


def layer_prefix(layer: int) -> str:
    """What the names of our tensors of layer number `layer` begin with."""
    return f"decoder.layers.{layer}."


def hf_prefix(layer: int) -> str:
    """The same on the other side."""
    return f"model.layers.{layer}."


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.nheads


def correspondence(model: ModelConfig) -> list[FusedTensor]:
    """Every tensor of the model, in the order in which it is written; padding of no token left out.

    Tied embeddings are one tensor on both sides.
    """
    hidden, vocab = (model.hidden_size,), model.vocab_size
    table = [FusedTensor(EMBEDDING, (SourceRows(HF_EMBEDDING, 0, vocab),), hidden)]
    for layer in range(model.num_layers):
        table += _layer(model, layer)
    table.append(FusedTensor(FINAL_NORM, (SourceRows(HF_FINAL_NORM, 0, model.hidden_size),), ()))
    if not model.tied_embeddings:
        table.append(FusedTensor(OUTPUT, (SourceRows(HF_OUTPUT, 0, vocab),), hidden))
    return table


def _layer(model: ModelConfig, layer: int) -> list[FusedTensor]:
    ours, theirs = layer_prefix(layer), hf_prefix(layer)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    width = model.nheads * head_dim(model)

    def same(key: str, name: str, rows: int, *rest: int) -> FusedTensor:
        return FusedTensor(ours + key, (SourceRows(theirs + name, 0, rows),), rest)

    gated = (
        SourceRows(theirs + "mlp.gate_proj.weight", 0, ffn),
        SourceRows(theirs + "mlp.up_proj.weight", 0, ffn),
    )
    biases = [_fused(model, layer, "bias", ())] if model.qkv_bias else []
    return [
        same("input_layernorm.weight", "input_layernorm.weight", hidden),
        _fused(model, layer, "weight", (hidden,)),
        *biases,
        same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, width),
        same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden),
        FusedTensor(f"{ours}mlp.linear_fc1.weight", gated, (hidden,)),
        same("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn),
    ]


def _fused(model: ModelConfig, layer: int, kind: str, rest: tuple[int, ...]) -> FusedTensor:
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
    """The shape of every Hugging Face tensor of the model, in the order of `correspondence`.

    extras: tensors beside those.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for ours in (*correspondence(model), *extras):
        for part in ours.parts:
            rows = part.first + part.count
            shapes[part.name] = (max(rows, shapes.get(part.name, (0,))[0]), *ours.rest)
    return shapes
