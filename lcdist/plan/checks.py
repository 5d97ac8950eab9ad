"""Cross-field checks: report settings that are valid alone but conflict.

Every check appends one line a conflict to `errors`, with the values and the remedy, and continues.
"""

from collections.abc import Sequence
from dataclasses import fields

from lcdist.attention import HeadSlice
from lcdist.config.lora import LoraConfig
from lcdist.config.rope import RopeLlama3, RopeYarn
from lcdist.config.schema import Config, ModelConfig
from lcdist.layout import ContextLayout
from lcdist.plan.data_checks import data_errors
from lcdist.plan.resolve import LayerAttention, document_layout_for
from lcdist_kernels.full import FORCED

# Entries of the tables of all layers that a plan is made of: some seconds of work.
MOST_ENTRIES = 2**21


def check_model(config: Config, errors: list[str]) -> None:
    """Check that the model's sizes fit each other and the mesh that divides them."""
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
                f"model.{key} = {value} is not a multiple of parallel.tp_size = {tp_size}; set it "
                f"to one of {_divisors(value)}"
            )
    if nheads_kv % tp_size and tp_size % nheads_kv:
        errors.append(
            f"model.nheads_kv = {nheads_kv} and parallel.tp_size = {tp_size}: "
            "one must be a multiple of the other"
        )
    _check_family(model, errors)
    stages = parallel.pp_size * parallel.vp_size
    if model.num_layers % stages:
        errors.append(
            f"model.num_layers = {model.num_layers} is not a multiple of parallel.pp_size x "
            f"vp_size = {parallel.pp_size} x {parallel.vp_size} = {stages}; choose a product of "
            f"{_divisors(model.num_layers)}"
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


def _check_family(model: ModelConfig, errors: list[str]) -> None:
    if model.qkv_bias and model.qk_norm:
        errors.append(
            "model.qkv_bias = true and model.qk_norm = true: no published model has both, and an "
            "export could not be loaded; set one of them to false"
        )


def _divisors(number: int) -> str:
    """Return the sizes up to 64 that divide a number, for a message."""
    return ", ".join(str(size) for size in range(1, 65) if number % size == 0)


def _near(number: int, step: int) -> list[int]:
    """Return the multiples of `step` around a number, from one on."""
    below = number // step * step
    return [each for each in (below, below + step) if each]


def check_batch(config: Config, dp_size: int, errors: list[str]) -> None:
    """Check that the batch divides over data-parallel ranks and the pipeline."""
    train, parallel = config.train, config.parallel
    step = train.micro_batch_size * dp_size
    if train.global_batch_size % step:
        errors.append(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size x data-parallel size = {train.micro_batch_size} x {dp_size} = "
            f"{step}; set it to {' or '.join(map(str, _near(train.global_batch_size, step)))}"
        )
    elif parallel.vp_size > 1 and (train.global_batch_size // step) % parallel.pp_size:
        errors.append(
            f"{train.global_batch_size // step} micro-batches a step: with parallel.vp_size > 1 "
            f"they must be a multiple of parallel.pp_size = {parallel.pp_size}; "
            "raise train.global_batch_size"
        )


def check_rope(config: Config, errors: list[str]) -> None:
    """Check the order of a rotation's bounds and the number of its factors."""
    model, rope = config.model, config.model.rope
    features = (model.head_dim or model.hidden_size // model.nheads) // 2
    for key in ("short_factors", "long_factors"):
        factors = getattr(rope, key, None)
        if factors is not None and len(factors) != features:
            errors.append(
                f"model.rope.{key} has {len(factors)} numbers; it needs head_dim / 2 = {features}"
            )
    for low, high, kind in (
        ("low_freq_factor", "high_freq_factor", RopeLlama3),
        ("beta_slow", "beta_fast", RopeYarn),
    ):
        if isinstance(rope, kind) and getattr(rope, low) >= getattr(rope, high):
            errors.append(
                f"model.rope.{low} = {getattr(rope, low)} must be less than model.rope.{high} = "
                f"{getattr(rope, high)}"
            )


def check_loss(config: Config, errors: list[str]) -> None:
    """Check that `train.loss_chunk` is set for a chunked loss only."""
    _check_chunk("loss", config.train.loss, config.train.loss_chunk, "chunked", errors)


def _check_chunk(part: str, how: str, tokens: int, other: str, errors: list[str]) -> None:
    """Check that a part that is computed whole has no chunk length."""
    if how == "whole" and tokens:
        errors.append(
            f"train.{part}_chunk = {tokens} has no meaning with train.{part} = 'whole'; "
            f"set it to 0 or use '{other}'"
        )


def check_memory(config: Config, errors: list[str]) -> None:
    """Check that offload and MLP tiling fit the recomputation."""
    train = config.train
    _check_chunk("mlp", train.mlp, train.mlp_chunk, "tiled", errors)
    if train.offload == "host" and train.recompute in ("none", "selective"):
        errors.append(
            "train.offload = 'host' moves the layer inputs that recomputed layers save, but "
            f"train.recompute = '{train.recompute}'; use 'keep_attention', 'full' or 'auto', or "
            "offload = 'none'"
        )


def check_lora(config: Config, errors: list[str]) -> None:
    """Check LoRA's settings against its rank and the model."""
    lora, default = config.lora, LoraConfig()
    changed = [f.name for f in fields(lora) if getattr(lora, f.name) != getattr(default, f.name)]
    if not lora.rank:
        errors.extend(
            f"lora.{key} = {getattr(lora, key)!r} has no meaning with lora.rank = 0; "
            "set lora.rank to 1 or more, or leave the key out"
            for key in changed
        )
        return
    if not lora.targets:
        errors.append(
            "lora.targets is empty: name some of q, k, v, o, gate, up, down, or set lora.rank = 0"
        )
    if len(set(lora.targets)) < len(lora.targets):
        errors.append(f"lora.targets = {', '.join(lora.targets)}: name every target once")
    if lora.head and config.model.tied_embeddings and not lora.embeddings:
        errors.append(
            "lora.head = true: with model.tied_embeddings = true the output layer is the "
            "embedding; set lora.embeddings = true as well, or lora.head = false"
        )
    if lora.load and not config.checkpoint.load:
        errors.append(
            f"lora.load = '{lora.load}': an adapter only works on the weights it was trained on; "
            "set checkpoint.load to them"
        )


def check_schedule(config: Config, errors: list[str]) -> None:
    """Check the learning rate's schedule, `[data]`, and the lengths of evaluation."""
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
            f"train.steps = {steps}; lower them, or raise train.steps"
        )
    if optim.schedule == "wsd" and not optim.decay_steps:
        errors.append("optim.schedule = 'wsd' needs optim.decay_steps > 0")
    if optim.schedule != "wsd" and optim.decay_steps:
        errors.append(
            f"optim.decay_steps = {optim.decay_steps} has no meaning with optim.schedule = "
            f"'{optim.schedule}'; set it to 0 or use 'wsd'"
        )
    errors.extend(data_errors(data))
    _check_evaluation(config, errors)


def _check_evaluation(config: Config, errors: list[str]) -> None:
    asked = config.evaluate
    if not asked.lengths:
        errors.append("evaluate.lengths = []: name at least one length, such as [4096]")
    if not asked.measure:
        errors.append("evaluate.measure = []: name at least one part, such as [perplexity]")
    twice = [name for name in dict.fromkeys(asked.measure) if asked.measure.count(name) > 1]
    errors.extend(f"evaluate.measure names '{name}' twice: name it once" for name in twice)
    longest = max(asked.lengths, default=0)
    if "longppl" in asked.measure and asked.short_context >= longest:
        errors.append(
            f"evaluate.short_context = {asked.short_context}: must be less than the longest of "
            f"evaluate.lengths, {longest}; lower it, or add a longer length"
        )


UNORDERED = (
    "attention.impl = '{}' with train.deterministic = true: that library's backward adds in "
    "another order in every run; use impl 'auto' or 'triton'"
)


def check_methods(config: Config, layers: Sequence[LayerAttention], errors: list[str]) -> None:
    """Check that the layers' methods support the settings of data, kernels and evaluation."""
    impl, documents, dtype = config.attention.impl, config.data.documents, config.train.dtype
    if impl in FORCED and (documents == "pack" or dtype == "fp32"):
        errors.append(
            f"attention.impl = '{impl}': a library takes bf16 and no packed documents, here are "
            f"data.documents = '{documents}', train.dtype = '{dtype}'; use impl 'auto' or 'triton'"
        )
    elif impl in FORCED and config.train.deterministic:
        errors.append(UNORDERED.format(impl))
    for method in dict.fromkeys(layer.method for layer in layers):
        name = f"attention.method = '{method.name}'"
        if documents == "pack" and "varlen" not in method.supports:
            errors.append(f"data.documents = 'pack': {name} cannot pack documents")
        if impl not in method.impls:
            errors.append(f"attention.impl = '{impl}': {name} has {', '.join(method.impls)}")
        if config.evaluate.attention == "dense" and "dense" not in method.supports:
            errors.append(
                f"evaluate.attention = 'dense': {name} trains weights that do not work with full "
                "attention; use 'method' or 'auto'"
            )


def check_layers(
    config: Config, layers: Sequence[LayerAttention], layout: ContextLayout, errors: list[str]
) -> None:
    """Check every layer's attention against model, layout, mesh and data."""
    model, layer_errors = config.model, list[str]()
    heads = HeadSlice(0, model.nheads, 0, model.nheads_kv or model.nheads)
    entries, tp_size = 0, config.parallel.tp_size
    for count, layer in enumerate(dict.fromkeys(layers), 1):
        try:
            layer.method.check(layer.options, layout, heads, tp_size)
            entries += layer.method.plan_entries(layer.options, layout, heads, tp_size)
        except ValueError as error:
            layer_errors.append(f"attention.method = '{layer.method.name}': {error}")
        if entries > MOST_ENTRIES:
            layer_errors.append(_too_many_entries(entries, count, layout, tp_size))
            break
    errors.extend(dict.fromkeys(layer_errors))
    try:
        documents = document_layout_for(layers, model.vocab_size)
    except ValueError as error:
        errors.append(str(error))
        return
    if config.data.documents == "pack" and config.train.seqlen % documents.step:
        errors.append(
            f"train.seqlen = {config.train.seqlen}: with data.documents = 'pack' this attention "
            f"needs a multiple of {documents.step}; the next is "
            f"{-(-config.train.seqlen // documents.step) * documents.step}"
        )
    if documents.landmark is not None and documents.num_text_slots(config.train.seqlen) < 2:
        errors.append(
            f"train.seqlen = {config.train.seqlen} holds fewer than two tokens of text beside "
            "landmarks; use a longer one"
        )


def _too_many_entries(entries: int, kinds: int, layout: ContextLayout, tp_size: int) -> str:
    """Return the error of layers whose plan would take too long to make."""
    return (
        f"attention on parallel.tp_size x cp_size = {tp_size} x {layout.cp_size} ranks: {kinds} "
        f"kinds of layers have a plan of {entries:,} entries already, and at most {MOST_ENTRIES:,} "
        "are legal; use larger chunks, fewer ranks, or layers of one kind"
    )
