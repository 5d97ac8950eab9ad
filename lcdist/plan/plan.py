"""The run before the run: configuration and world size to every number that can be known.

Everything that contradicts something else is collected and raised together, in the user's words,
before any process group or file is made.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

from lcdist.attention import HeadSlice, Shape
from lcdist.config import ConfigError
from lcdist.config.schema import Config
from lcdist.hardware.device import has_cuda
from lcdist.layout import ContextLayout, pieces_needed
from lcdist.layout.documents import DocumentLayout
from lcdist.plan.activations import Activations
from lcdist.plan.checks import (
    check_batch,
    check_layers,
    check_lora,
    check_loss,
    check_memory,
    check_methods,
    check_model,
    check_rope,
    check_schedule,
)
from lcdist.plan.resolve import (
    LayerAttention,
    common_layouts,
    common_multiple,
    document_layout_for,
    resolve_layers,
)

# Training runs every matrix product once forward and twice backward.
PASSES = 3


@dataclass(frozen=True)
class Plan(Activations):
    """Every number of a run. Lengths are in tokens, memory and traffic in bytes per rank."""

    @property
    def product_flops_per_token(self) -> int:
        """Forward operations per token of the products with weights, all layers and the output."""
        model = self.config.model
        beside = 2 * model.hidden_size + self.layer_biases
        layer = self.layer_parameters - beside + self.layer_adapters(1)
        return 2 * (model.num_layers * layer + self.padded_vocab_size * model.hidden_size)

    @property
    def frozen_flops_per_token(self) -> int:
        """Of `product_flops_per_token`, those with weights that get no gradient of their own."""
        model, lora = self.config.model, self.config.lora
        if not lora.rank:
            return 0
        trained = model.num_layers * self.layer_adapters(1)
        if lora.embeddings if model.tied_embeddings else lora.head:
            trained += self.padded_vocab_size * model.hidden_size
        return self.product_flops_per_token - 2 * trained

    @property
    def slots(self) -> DocumentLayout:
        """How the loader lays documents out for the attention of these layers."""
        return document_layout_for(self.layers, self.config.model.vocab_size)

    @property
    def text_vocab_size(self) -> int:
        """Tokens that text can have: the model's vocabulary without the landmark."""
        return self.config.model.vocab_size - (self.slots.landmark is not None)

    @property
    def attention_name(self) -> str:
        """The methods at work, and how many layers each has where there are several."""
        counts = Counter(layer.method.name for layer in self.layers)
        if len(counts) == 1:
            return self.layers[0].method.name
        return ", ".join(f"{count} x {name}" for name, count in counts.items())

    @cached_property
    def attention_flops_per_token(self) -> float:
        """Forward operations per token of all layers' attention, touched area only."""
        shape = self.shape(batch=1)
        alike = Counter(self.layers)
        flops = sum(n * one.method.flops(one.options, shape) for one, n in alike.items())
        return flops / self.seqlen

    @property
    def flops_per_token(self) -> float:
        """Operations to train on one token, attention counted over the area it touches."""
        flops = self.product_flops_per_token + self.attention_flops_per_token
        return PASSES * flops - self.frozen_flops_per_token

    @property
    def flops_per_token_square(self) -> float:
        """The same with attention counted over the whole square of scores, as if nothing was
        masked."""
        model = self.config.model
        square = 4 * self.seqlen * model.nheads * self.head_dim * model.num_layers
        return PASSES * (self.product_flops_per_token + square) - self.frozen_flops_per_token

    @cached_property
    def _sent(self) -> dict[LayerAttention, list[tuple[int, int]]]:
        """Bytes (forward, backward) that each (tp, cp) rank sends in a layer of each kind."""
        parallel, batch = self.config.parallel, self.config.train.micro_batch_size
        shapes = [self.shape(batch, rank) for rank in range(parallel.tp_size)]
        return {
            layer: [
                sent
                for shape in shapes
                for sent in zip(*layer.method.bytes(layer.options, shape, self.layout), strict=True)
            ]
            for layer in (dict.fromkeys(self.layers) if parallel.cp_size > 1 else ())
        }

    @property
    def exchange_bytes(self) -> tuple[int, int]:
        """Most bytes a rank sends in one layer for a micro-batch: (forward, backward)."""
        ranks = [sent for ranks in self._sent.values() for sent in ranks] or [(0, 0)]
        return max(forward for forward, _ in ranks), max(backward for _, backward in ranks)

    @property
    def exchange_bytes_per_step(self) -> int:
        """Bytes the busiest rank sends for attention in one step, recomputation included."""
        if not self._sent:
            return 0
        passes = 2 if self.recompute == "full" else 1
        sums = []
        for stage in self.stage_layers:
            layers = [self._sent[self.layers[number]] for number in stage]
            sums += [sum(passes * f + b for f, b in rank) for rank in zip(*layers, strict=True)]
        return self.num_micro_batches * max(sums)

    def shape(self, batch: int, tp_rank: int | None = None) -> Shape:
        """The attention's shape for `batch` samples on a tensor-parallel rank; None: all heads."""
        nheads, tp_size = self.config.model.nheads, self.config.parallel.tp_size
        whole = Shape(
            batch, nheads, self.nheads_kv, self.head_dim, self.itemsize, seqlen=self.seqlen
        )
        if tp_rank is None:
            return whole
        first = tp_rank * (nheads // tp_size)
        return replace(
            whole,
            nheads=nheads // tp_size,
            nheads_kv=max(1, self.nheads_kv // tp_size),
            heads=HeadSlice(first, nheads, first * self.nheads_kv // nheads, self.nheads_kv),
        )

    @property
    def _verbs(self) -> list[str]:
        used = [layer.method.exchange_for(layer.options) for layer in dict.fromkeys(self.layers)]
        return list(dict.fromkeys(verb for verbs in used for verb in verbs))

    def _landmark_row(self) -> list[tuple[str, str]]:
        slots = self.slots
        if slots.landmark is None:
            return []
        return [("landmarks", f"token {slots.landmark}, the last of every {slots.block_size}")]

    def _loss_row(self) -> tuple[str, str]:
        whole, chunk = f"{self.whole_logits_bytes / 2**30:.3f} GiB", self.loss_chunk(self.tokens)
        if chunk is None:
            return "loss", f"whole logits, {whole} a rank"
        held = f"{sum(self.loss_bytes) / 2**30:.3f} GiB a rank"
        return "loss", f"logits of {chunk:,} tokens at a time, {held}; whole they take {whole}"

    def _lora_row(self) -> list[tuple[str, str]]:
        lora = self.config.lora
        if not lora.rank:
            return []
        beside = [key for key in ("embeddings", "norms", "head") if getattr(lora, key)]
        what = f"LoRA of rank {lora.rank} on {', '.join([*lora.targets, *beside])}"
        share = self.trained_parameters / self.num_parameters
        return [("trained", f"{self.trained_parameters:,} ({share:.3%}): {what}")]

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (what, how much), for people."""
        train, parallel = self.config.train, self.config.parallel
        mesh = f"dp {self.dp_size} x pp {parallel.pp_size} x cp {parallel.cp_size}"
        padding = self.seqlen - train.seqlen
        forward, backward = self.exchange_bytes
        return [
            ("world", f"{self.world_size} = {mesh} x tp {parallel.tp_size}"),
            ("attention", f"{self.attention_name} ({self.config.attention.impl})"),
            ("exchange", " + ".join(self._verbs) if parallel.cp_size > 1 else "none"),
            ("layout", f"{self.layout.kind}, {self.layout.local_seqlen} tokens a rank"),
            ("seqlen", f"{self.seqlen}" + (f" ({padding} of padding)" if padding else "")),
            *self._landmark_row(),
            ("batch", f"{train.global_batch_size} samples, {self.num_micro_batches} micro-batches"),
            ("tokens a step", f"{train.global_batch_size * train.seqlen:,}"),
            ("parameters", f"{self.num_parameters:,} in {self.dtype}"),
            *self._lora_row(),
            ("vocabulary", f"{self.config.model.vocab_size} (padded to {self.padded_vocab_size})"),
            ("FLOPs a token", f"{self.flops_per_token:.3g} (whole square: "
             f"{self.flops_per_token_square:.3g})"),
            ("sent a layer", f"{forward:,} B forward, {backward:,} B backward"),
            ("sent a step", f"{self.exchange_bytes_per_step:,} B for attention"),
            ("weights and states", f"{self.state_bytes / 2**30:.3f} GiB a rank"),
            ("checkpoint", f"{self.checkpoint_bytes / 2**30:.3f} GiB"),
            self._loss_row(),
            *self.memory_rows,
            ("activations", f"about {self.activation_bytes / 2**30:.3f} GiB a rank"),
        ]  # fmt: skip


def smallest_world(config: Config) -> int:
    """The fewest ranks the mesh of `config` can run on."""
    parallel = config.parallel
    return parallel.tp_size * parallel.pp_size * parallel.cp_size


def make_plan(config: Config, world_size: int) -> Plan:
    """The plan of `config` on `world_size` ranks. Raises ConfigError with every contradiction."""
    errors: list[str] = []
    dp_size = _data_parallel_size(config, world_size, errors)
    check_model(config, errors)
    check_batch(config, dp_size, errors)
    check_rope(config, errors)
    check_loss(config, errors)
    check_memory(config, errors)
    check_lora(config, errors)
    check_schedule(config, errors)
    layers = resolve_layers(config, errors)
    check_methods(config, layers, errors)
    layout = _layout(config, layers, errors) if layers else None
    if layout is not None:
        check_layers(config, layers, layout, errors)
    if errors or layout is None:
        raise ConfigError(errors)
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "bf16" if has_cuda() else "fp32"
    return Plan(config, world_size, dp_size, layers, layout, dtype, may_offload=has_cuda())


def _data_parallel_size(config: Config, world_size: int, errors: list[str]) -> int:
    mesh = smallest_world(config)
    if world_size < 1 or world_size % mesh:
        sizes = config.parallel
        errors.append(
            f"world size {world_size} is not a multiple of parallel.tp_size x pp_size x cp_size = "
            f"{sizes.tp_size} x {sizes.pp_size} x {sizes.cp_size} = {mesh}; "
            f"start {mesh} processes or a multiple"
        )
        return 1
    return world_size // mesh


def _layout(
    config: Config, layers: tuple[LayerAttention, ...], errors: list[str]
) -> ContextLayout | None:
    parallel, legal = config.parallel, common_layouts(layers)
    kind = parallel.layout
    names = ", ".join(dict.fromkeys(f"'{layer.method.name}'" for layer in layers))
    if not legal:
        takes = "; ".join(
            f"'{layer.method.name}' takes {', '.join(layer.method.layouts_for(layer.options))}"
            for layer in dict.fromkeys(layers)
        )
        errors.append(f"attention.layers: the layers have no layout in common: {takes}")
        return None
    if kind == "auto":
        # Zigzag gives every rank the same share of a causal mask.
        kind = "zigzag" if "zigzag" in legal else legal[0]
    if kind not in legal:
        errors.append(
            f"parallel.layout = '{kind}': attention.method = {names} takes {', '.join(legal)}"
        )
        return None
    own = common_multiple(layers, parallel.cp_size, kind)
    step = lcm(
        own,
        pieces_needed(kind, parallel.cp_size),
        # Sequence parallelism cuts each rank's tokens once more.
        parallel.cp_size * (parallel.tp_size if parallel.sequence_parallel else 1),
    )
    padded = -(-config.train.seqlen // step) * step
    if padded > 2 * config.train.seqlen and own > pieces_needed(kind, parallel.cp_size):
        errors.append(
            f"train.seqlen = {config.train.seqlen} would be mostly padding: attention.method = "
            f"{names} on parallel.cp_size = {parallel.cp_size} needs a multiple of {step}; use a "
            "longer seqlen, fewer ranks or smaller blocks"
        )
        return None
    return ContextLayout(kind, padded, parallel.cp_size, multiple_of=step)
