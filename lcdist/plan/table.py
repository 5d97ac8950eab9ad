"""Show a plan as rows of text, for a terminal, `run.json` and the report."""

from dataclasses import replace

from lcdist.plan.memory import MemoryEstimate
from lcdist.plan.plan import Plan

GIB = 2**30


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as (quantity, value) rows."""
    config, shape, memory = plan.config, plan.shape, plan.memory
    train, parallel, layout = config.train, config.parallel, plan.layout
    mesh = f"dp {plan.dp_size} x pp {parallel.pp_size} x cp {parallel.cp_size}"
    padding = shape.seqlen - train.seqlen
    forward, backward = plan.traffic.exchange_bytes
    compute = plan.compute
    return [
        ("world", f"{plan.world_size} = {mesh} x tp {parallel.tp_size}"),
        ("attention", f"{shape.attention_name} ({config.attention.impl})"),
        ("exchange", " + ".join(plan.traffic.exchanges) or "none"),
        ("layout", f"{layout.kind}, {layout.local_seqlen} tokens a rank"),
        ("seqlen", f"{shape.seqlen}" + (f" ({padding} of padding)" if padding else "")),
        *_landmark_rows(plan),
        ("batch", f"{_counted(train.global_batch_size, 'sample')}, "
         f"{_counted(shape.num_micro_batches, 'micro-batch')}"),
        ("tokens a step", f"{train.global_batch_size * train.seqlen:,}"),
        ("parameters", f"{plan.parameters.total:,} in {plan.dtype}"),
        *_lora_rows(plan),
        ("vocabulary", f"{config.model.vocab_size} (padded to {shape.padded_vocab_size})"),
        ("FLOPs a token", f"{compute.flops_per_token:.3g} (whole square: "
         f"{compute.flops_per_token_square:.3g})"),
        ("sent a layer", f"{forward:,} B forward, {backward:,} B backward"),
        ("sent a step", f"{plan.traffic.exchange_bytes_per_step:,} B for attention"),
        ("weights and states", f"{_gib(memory.state_bytes)} a rank"),
        *_engine_rows(plan),
        ("checkpoint", _gib(memory.checkpoint_bytes)),
        *_memory_rows(plan),
        ("activations", f"about {_gib(memory.activation_bytes)} a rank"),
        *_device_rows(plan),
    ]  # fmt: skip


def _counted(count: int, word: str) -> str:
    """Return a number with its noun: "1 sample", "2 micro-batches"."""
    return f"{count} {word}" + ("" if count == 1 else "es" if word.endswith("ch") else "s")


def _gib(count: int) -> str:
    return f"{count / GIB:.3f} GiB"


def _landmark_rows(plan: Plan) -> list[tuple[str, str]]:
    documents = plan.shape.document_layout
    if documents.landmark is None:
        return []
    return [("landmarks", f"token {documents.landmark}, the last of every {documents.block_size}")]


def _lora_rows(plan: Plan) -> list[tuple[str, str]]:
    lora, counts = plan.config.lora, plan.parameters
    if not lora.rank:
        return []
    whole = [key for key in ("embeddings", "norms", "head") if getattr(lora, key)]
    modules = f"LoRA of rank {lora.rank} on {', '.join([*lora.targets, *whole])}"
    share = counts.trained / counts.total
    return [("trained", f"{counts.trained:,} ({share:.3%}): {modules}")]


def _engine_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.memory.zero is None:
        return []
    settings = plan.config.deepspeed
    places = [
        f"{what} on '{target}'"
        for what, target in (
            ("optimizer", settings.offload_optimizer),
            ("parameters", settings.offload_parameters),
        )
        if target != "none"
    ]
    host = plan.memory.zero.host_bytes
    places += [f"up to {_gib(host)} of host memory a rank"] if host else []
    return [("engine", ", ".join([f"DeepSpeed, ZeRO stage {settings.stage}", *places]))]


def _device_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.hardware.kind == "cpu":
        # All ranks of a host share its memory.
        return []
    needed, memory = plan.memory.device_bytes / GIB, plan.hardware.memory_bytes / GIB
    return [
        ("memory", f"about {needed:.1f} of {memory:.1f} GiB on each {plan.hardware.name}"),
        ("savings", _savings_text(plan.memory)),
    ]


def _savings_text(memory: MemoryEstimate) -> str:
    """Return why memory is saved as it is."""
    needed, usable = memory.needed_bytes, f"{memory.usable_bytes / GIB:.1f} GiB may be filled"
    if needed[memory.rung] > memory.usable_bytes:
        return (
            f"nothing that the settings allow fits, {usable}: use more ranks, shorter samples or "
            "smaller micro-batches"
        )
    before = [*needed][: [*needed].index(memory.rung)]
    if not before:
        return f"no more than the settings say, as all fits, {usable}"
    least = min(needed[rung] for rung in before) / GIB
    return f"the cheapest that fits, {usable}; what is cheaper needs at least {least:.1f} GiB"


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return how the plan saves memory: loss, MLP, recomputation, offload."""
    memory = plan.memory
    chunk = memory.mlp_chunk(plan.shape.local_tokens)
    return [
        ("loss", _loss_text(plan)),
        ("MLP", "whole" if chunk is None else f"{chunk:,} tokens at a time"),
        ("recompute", _recompute_text(memory)),
        ("offload", _offload_text(plan)),
    ]


def _recompute_text(memory: MemoryEstimate) -> str:
    text = f"{memory.recompute}; kept for backward: {_gib(memory.layer_bytes)} a layer"
    if memory.mix is None or memory.cheaper is None:
        return text
    rung, layers = memory.mix.rung, f"{memory.mix.layers} of {memory.shape.chunk_layers}"
    mlp = "" if rung.tiled == memory.rung.tiled else ", MLP whole"
    kept = _gib(memory.cheaper.layer_bytes)
    return f"{text}; for the deepest {layers} there is room: {rung.recompute}{mlp}, {kept} a layer"


def _loss_text(plan: Plan) -> str:
    memory = plan.memory
    whole, chunk = _gib(memory.whole_logits_bytes), memory.loss_chunk(plan.shape.local_tokens)
    if chunk is None:
        return f"logits kept for backward, {whole} a rank"
    chunked = _gib(sum(memory.loss_bytes))
    return f"logits of {chunk:,} tokens at a time, {chunked} a rank; whole they take {whole}"


def _offload_text(plan: Plan) -> str:
    text = "inputs of layers to {} of host memory a rank"
    if plan.memory.offloads:
        return text.format(_gib(plan.memory.offloaded_bytes))
    on_gpu = replace(plan, may_offload=True).memory
    if not on_gpu.offloads:
        return "none"
    return (
        f"none; on a GPU whose host has the room, {text.format(_gib(on_gpu.offloaded_bytes))}, and "
        f"{_gib(on_gpu.activation_bytes)} of activations"
    )
