"""The run before the run: configuration and world size to every number that can be known.

Everything that contradicts something else is collected and raised together, in the user's words,
before any process group or file is made.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any

from lcdist.attention import METHODS, AttentionMethod, Shape
from lcdist.config import ConfigError
from lcdist.config.load import build_options
from lcdist.config.schema import Config, RawOptions
from lcdist.device import has_cuda
from lcdist.layout import ContextLayout, pieces_needed

VOCAB_MULTIPLE = 128
FP32_BYTES = 4
ITEMSIZE = {"fp32": 4, "bf16": 2}
# Training runs every matrix product once forward and twice backward.
PASSES = 3


@dataclass(frozen=True)
class Plan:
    """Every number of a run. Lengths are in tokens, memory and traffic in bytes per rank.

    config: as given. seqlen (of `layout`) is the training length padded so that the layout cuts
    it evenly. dtype: of the weights, "fp32" or "bf16".
    """

    config: Config
    world_size: int
    dp_size: int
    method: AttentionMethod
    options: Any
    layout: ContextLayout
    dtype: str

    @property
    def seqlen(self) -> int:
        """Tokens of a sample as the model sees it, padding included."""
        return self.layout.seqlen

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes a step on each data-parallel rank."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.dp_size)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or activation."""
        return ITEMSIZE[self.dtype]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        model = self.config.model
        return model.head_dim or model.hidden_size // model.nheads

    @property
    def nheads_kv(self) -> int:
        """Key and value heads of the whole model."""
        return self.config.model.nheads_kv or self.config.model.nheads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up; padding never takes part in a loss."""
        step = lcm(VOCAB_MULTIPLE, self.config.parallel.tp_size)
        return -(-self.config.model.vocab_size // step) * step

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        model = self.config.model
        width = self.head_dim * (2 * model.nheads + 2 * self.nheads_kv)
        return model.hidden_size * (width + 3 * model.ffn_hidden_size + 2)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, padding of the vocabulary included."""
        model = self.config.model
        tables = 1 if model.tied_embeddings else 2
        outside = (tables * self.padded_vocab_size + 1) * model.hidden_size
        return outside + model.num_layers * self.layer_parameters

    @property
    def product_flops_per_token(self) -> int:
        """Forward operations per token of the products with weights, all layers and the output."""
        model = self.config.model
        weights = model.num_layers * (self.layer_parameters - 2 * model.hidden_size)
        return 2 * (weights + self.padded_vocab_size * model.hidden_size)

    @cached_property
    def attention_flops_per_token(self) -> float:
        """Forward operations per token of all layers' attention, touched area only."""
        flops = self.method.flops(self.options, self.shape(batch=1, tp_size=1))
        return self.config.model.num_layers * flops / self.seqlen

    @property
    def flops_per_token(self) -> float:
        """Operations to train on one token, attention counted over the area it touches."""
        return PASSES * (self.product_flops_per_token + self.attention_flops_per_token)

    @property
    def flops_per_token_square(self) -> float:
        """The same with attention counted over the whole square of scores, as if nothing was
        masked."""
        model = self.config.model
        square = 4 * self.seqlen * model.nheads * self.head_dim * model.num_layers
        return PASSES * (self.product_flops_per_token + square)

    @cached_property
    def exchange_bytes(self) -> tuple[int, int]:
        """Bytes the busiest rank sends per layer and micro-batch: (forward, backward)."""
        parallel = self.config.parallel
        if parallel.cp_size == 1:
            return 0, 0
        shape = self.shape(self.config.train.micro_batch_size, parallel.tp_size)
        forward, backward = self.method.bytes(self.options, shape, self.layout)
        return max(forward), max(backward)

    @property
    def exchange_bytes_per_step(self) -> int:
        """Bytes the busiest rank sends for attention in one step, recomputation included."""
        forward, backward = self.exchange_bytes
        if self.config.train.recompute == "full":
            forward *= 2
        layers = -(-self.config.model.num_layers // self.config.parallel.pp_size)
        return layers * self.num_micro_batches * (forward + backward)

    @property
    def state_bytes(self) -> int:
        """Weights, fp32 gradients, and this rank's share of the optimizer's fp32 state."""
        parallel = self.config.parallel
        local = self.num_parameters // (parallel.tp_size * parallel.pp_size)
        replicas = self.dp_size * parallel.cp_size
        master = FP32_BYTES if self.itemsize < FP32_BYTES else 0
        return local * (self.itemsize + FP32_BYTES) + local * (2 * FP32_BYTES + master) // replicas

    @property
    def activation_bytes(self) -> int:
        """An estimate of what forward keeps for backward on one rank, logits included.

        Per layer the inputs of norms, projections and MLP and q, k, v, out; with full recompute
        the layer's input alone, and one layer's worth while it is recomputed.
        """
        model, train, parallel = self.config.model, self.config.train, self.config.parallel
        tokens = train.micro_batch_size * self.layout.local_seqlen
        tp_size, hidden = parallel.tp_size, model.hidden_size
        spread = tp_size if parallel.sequence_parallel else 1
        heads = self.head_dim * (2 * model.nheads + 2 * self.nheads_kv)
        layer = 6 * hidden // spread + (heads + 4 * model.ffn_hidden_size) // tp_size
        kept = hidden // spread if train.recompute == "full" else layer
        in_flight = min(parallel.pp_size, self.num_micro_batches)
        layers = -(-model.num_layers // parallel.pp_size)
        logits = 2 * FP32_BYTES * tokens * self.padded_vocab_size // tp_size
        return tokens * self.itemsize * (kept * layers * in_flight + layer) + logits

    def shape(self, batch: int, tp_size: int) -> Shape:
        """The attention's shape for `batch` samples on one of `tp_size` tensor-parallel ranks."""
        return Shape(
            batch=batch,
            seqlen=self.seqlen,
            nheads=self.config.model.nheads // tp_size,
            nheads_kv=max(1, self.nheads_kv // tp_size),
            head_dim=self.head_dim,
            itemsize=self.itemsize,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (what, how much), for people."""
        train, parallel = self.config.train, self.config.parallel
        mesh = f"dp {self.dp_size} x pp {parallel.pp_size} x cp {parallel.cp_size}"
        padding = self.seqlen - train.seqlen
        forward, backward = self.exchange_bytes
        return [
            ("world", f"{self.world_size} = {mesh} x tp {parallel.tp_size}"),
            ("attention", f"{self.method.name} ({self.config.attention.impl})"),
            ("exchange", " + ".join(self.method.exchange) if parallel.cp_size > 1 else "none"),
            ("layout", f"{self.layout.kind}, {self.layout.local_seqlen} tokens a rank"),
            ("seqlen", f"{self.seqlen}" + (f" ({padding} of padding)" if padding else "")),
            ("batch", f"{train.global_batch_size} samples, {self.num_micro_batches} micro-batches"),
            ("tokens a step", f"{train.global_batch_size * train.seqlen:,}"),
            ("parameters", f"{self.num_parameters:,} in {self.dtype}"),
            ("vocabulary", f"{self.config.model.vocab_size} (padded to {self.padded_vocab_size})"),
            ("FLOPs a token", f"{self.flops_per_token:.3g} (whole square: "
             f"{self.flops_per_token_square:.3g})"),
            ("sent a layer", f"{forward:,} B forward, {backward:,} B backward"),
            ("sent a step", f"{self.exchange_bytes_per_step:,} B for attention"),
            ("weights and states", f"{self.state_bytes / 2**30:.3f} GiB a rank"),
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
    _check_model(config, errors)
    _check_batch(config, dp_size, errors)
    _check_schedule(config, errors)
    method, options = _method(config, errors)
    layout = None
    if method is not None:
        layout = _layout(config, method, options, errors)
    if errors or method is None or layout is None:
        raise ConfigError(errors)
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "bf16" if has_cuda() else "fp32"
    return Plan(config, world_size, dp_size, method, options, layout, dtype)


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


def _check_model(config: Config, errors: list[str]) -> None:
    model, parallel = config.model, config.parallel
    nheads_kv = model.nheads_kv or model.nheads
    head_dim = model.head_dim or model.hidden_size // model.nheads
    tp_size = parallel.tp_size
    if not model.head_dim and model.hidden_size % model.nheads:
        errors.append(
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.nheads = "
            f"{model.nheads}; change one of them or set model.head_dim"
        )
    elif head_dim % 2 or head_dim < 4:
        errors.append(f"head_dim = {head_dim}: rotary embedding needs an even number from 4")
    if model.nheads % nheads_kv:
        errors.append(
            f"model.nheads = {model.nheads} is not a multiple of model.nheads_kv = {nheads_kv}"
        )
    for key, value in (("nheads", model.nheads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if value % tp_size:
            errors.append(
                f"model.{key} = {value} is not a multiple of parallel.tp_size = {tp_size}"
            )
    if nheads_kv % tp_size and tp_size % nheads_kv:
        errors.append(
            f"model.nheads_kv = {nheads_kv} and parallel.tp_size = {tp_size}: "
            "one must be a multiple of the other"
        )
    stages = parallel.pp_size * parallel.vp_size
    if model.num_layers % stages:
        errors.append(
            f"model.num_layers = {model.num_layers} is not a multiple of parallel.pp_size x "
            f"vp_size = {parallel.pp_size} x {parallel.vp_size} = {stages}"
        )
    if parallel.vp_size > 1 and parallel.pp_size == 1:
        errors.append(
            f"parallel.vp_size = {parallel.vp_size} interleaves pipeline stages and needs "
            "parallel.pp_size > 1; set vp_size = 1"
        )
    if parallel.sequence_parallel and tp_size == 1:
        errors.append(
            "parallel.sequence_parallel = true needs parallel.tp_size > 1; set it to false"
        )


def _check_batch(config: Config, dp_size: int, errors: list[str]) -> None:
    train, parallel = config.train, config.parallel
    step = train.micro_batch_size * dp_size
    if train.global_batch_size % step:
        errors.append(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size x data-parallel size = {train.micro_batch_size} x {dp_size} = "
            f"{step}"
        )
    elif parallel.vp_size > 1 and (train.global_batch_size // step) % parallel.pp_size:
        errors.append(
            f"{train.global_batch_size // step} micro-batches a step: with parallel.vp_size > 1 "
            f"they must be a multiple of parallel.pp_size = {parallel.pp_size}; "
            "raise train.global_batch_size"
        )


def _check_schedule(config: Config, errors: list[str]) -> None:
    optim, steps, data = config.optim, config.train.steps, config.data
    if optim.min_lr > optim.lr:
        errors.append(f"optim.min_lr = {optim.min_lr} is greater than optim.lr = {optim.lr}")
    if max(optim.beta1, optim.beta2) >= 1:
        errors.append(
            f"optim.beta1 = {optim.beta1}, optim.beta2 = {optim.beta2}: must be less than 1"
        )
    decay = optim.decay_steps if optim.schedule == "wsd" else 0
    if optim.warmup_steps + decay > steps:
        errors.append(
            f"optim.warmup_steps + decay_steps = {optim.warmup_steps} + {decay} is more than "
            f"train.steps = {steps}"
        )
    if optim.schedule == "wsd" and not optim.decay_steps:
        errors.append("optim.schedule = 'wsd' needs optim.decay_steps > 0")
    if optim.schedule != "wsd" and optim.decay_steps:
        errors.append(
            f"optim.decay_steps = {optim.decay_steps} has no meaning with optim.schedule = "
            f"'{optim.schedule}'; set it to 0 or use 'wsd'"
        )
    if data.source == "tokens" and not data.path:
        errors.append(
            "data.path is empty: name a folder made by 'lcdist tokenize', or set "
            "data.source = 'synthetic'"
        )
    if data.source == "synthetic" and data.path:
        errors.append(f"data.path = '{data.path}' has no meaning with data.source = 'synthetic'")
    if any(length < 2 for length in config.evaluate.lengths):
        errors.append(f"evaluate.lengths = {config.evaluate.lengths}: each must be at least 2")


def _method(config: Config, errors: list[str]) -> tuple[AttentionMethod | None, Any]:
    name, options = config.attention.method, config.attention.options
    if name not in METHODS:
        errors.append(f"attention.method = '{name}': must be one of {', '.join(METHODS)}")
        return None, None
    method = METHODS[name]
    if isinstance(options, RawOptions):
        try:
            options = build_options(method.options, options)
        except ConfigError as error:
            errors.extend(error.errors)
            return None, None
    if config.data.documents == "pack" and "varlen" not in method.supports:
        errors.append(f"data.documents = 'pack': attention.method = '{name}' cannot pack documents")
    return method, options


def _layout(
    config: Config, method: AttentionMethod, options: Any, errors: list[str]
) -> ContextLayout | None:
    parallel, legal = config.parallel, method.layouts_for(options)
    kind = parallel.layout
    if kind == "auto":
        # Zigzag gives every rank the same share of a causal mask.
        kind = "zigzag" if "zigzag" in legal else legal[0]
    if kind not in legal:
        errors.append(
            f"parallel.layout = '{kind}': attention.method = '{method.name}' takes "
            f"{', '.join(legal)}"
        )
        return None
    step = lcm(
        method.multiple_of(options, parallel.cp_size, kind),
        pieces_needed(kind, parallel.cp_size),
        # Sequence parallelism cuts each rank's tokens once more.
        parallel.cp_size * (parallel.tp_size if parallel.sequence_parallel else 1),
    )
    padded = -(-config.train.seqlen // step) * step
    return ContextLayout(kind, padded, parallel.cp_size, multiple_of=step)
