"""The schema of a run: one tree of frozen dataclasses, and the only place where defaults live.

Lengths are in tokens, sizes of the mesh in ranks, times in seconds. No torch in here, so that a
configuration can be checked where torch is not installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lcdist.config.fields import above, at_least, required
from lcdist.config.lora import LoraConfig
from lcdist.config.rope import Rope, RopePlain

# --- attention methods' options -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FullOptions:
    """Full causal attention has no options."""


@dataclass(frozen=True, kw_only=True)
class CocaOptions:
    """Collinear constrained attention (arXiv:2309.08646)."""

    variant: Literal["slack", "strict"] = "slack"


@dataclass(frozen=True, kw_only=True)
class SccaOptions:
    """Shifted cross chunk attention and its relatives (arXiv:2312.07305); lengths in tokens.

    shift: of the shifted units, `fixed` and `longmixed` alone; None: half a chunk. wrap: what the
    first chunks of a shifted unit see, nothing (`mask`) or the chunk at a shorter distance
    (`fold`); None: mask, and fold for `flow`. fractions: of the heads for `longmixed`.
    """

    pattern: Literal["fixed", "flow", "sda", "sda_key", "longmixed", "s2"] = "fixed"
    chunk_size: int = at_least(1, 2048)
    shift: int | None = at_least(0, None)
    wrap: Literal["mask", "fold"] | None = None
    dilation: int = at_least(1, 2)
    fractions: tuple[float, ...] = at_least(0, (0.5, 0.25, 0.25))
    stagger: int = at_least(0, 0)


@dataclass(frozen=True, kw_only=True)
class TensorizedOptions:
    """Tensorized attention, lexicographic (arXiv:2410.20926); modes in tokens, finest first.

    The coarsest mode is left out: it grows with the sequence. No modes: full attention.
    """

    modes: tuple[int, ...] = at_least(1, (512,))
    local_blocks: int = at_least(1, 2)
    pe: Literal["mode", "global"] = "mode"
    hop_heads: Literal["auto", "q", "kv"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LandmarkOptions:
    """Landmark attention (arXiv:2305.16300); lengths in tokens, landmarks included.

    top_k: past blocks that a unit of select_tokens tokens reads; None: all of them.
    """

    block_size: int = at_least(2, 64)
    top_k: int | None = at_least(1, None)
    select_tokens: int = at_least(1, 4096)


@dataclass(frozen=True, kw_only=True)
class LssarOptions:
    """Length-scaled softplus attention with re-weighting; reweight False is LSSA."""

    power: float = at_least(1, 15.0)  # below 1 gradients are unbounded at a row's mean
    reweight: bool = True
    exempt_rows: int = at_least(0, 3)


OPTIONS: Mapping[str, type] = {
    "full": FullOptions,
    "coca": CocaOptions,
    "scca": SccaOptions,
    "tensorized": TensorizedOptions,
    "landmark": LandmarkOptions,
    "lssar": LssarOptions,
}


@dataclass(frozen=True, kw_only=True)
class RawOptions:
    """Options of a method that is not built in, kept as they were written until it is known."""

    table: Mapping[str, Any]


# --- sections -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaMA-shaped decoder: RMSNorm, rotary attention with grouped heads, SwiGLU."""

    vocab_size: int = required(2)
    num_layers: int = required(1)
    hidden_size: int = required(1)
    nheads: int = required(1)
    nheads_kv: int = at_least(0, 0)  # 0: as many as nheads
    head_dim: int = at_least(0, 0)  # 0: hidden_size / nheads
    ffn_hidden_size: int = required(1)
    norm_eps: float = above(0, 1e-5)
    tied_embeddings: bool = False
    qkv_bias: bool = False  # a bias on the projections to queries, keys and values, as Qwen2 has
    init_std: float = above(0, 0.02)
    rope: Rope = field(default_factory=RopePlain)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which attention method, and its options (written beside `method`, in the same table).

    layers: layers that use another method, as `method@layers` words, the layers numbers or slices
    from 0 with commas between them: "full@3::4 coca@0,-1". others: the options of those methods,
    each a table `[attention.<method>]`.
    """

    method: str = "full"
    layers: str = ""
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"
    options: Any = field(default_factory=FullOptions, metadata={"flattened": True})
    others: Mapping[str, Any] = field(default_factory=dict, metadata={"flattened": True})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh. The data-parallel size is what remains of the world; it is never configured."""

    tp_size: int = at_least(1, 1)
    pp_size: int = at_least(1, 1)
    cp_size: int = at_least(1, 1)
    vp_size: int = at_least(1, 1)  # model chunks per pipeline stage: 1 is 1F1B, more interleaves
    sequence_parallel: bool = False
    layout: Literal["auto", "contiguous", "zigzag", "striped"] = "auto"
    timeout: float = above(0, 600.0)  # seconds a collective may wait for a rank
    # Seconds without progress after which the watchdog tells who waits for whom, and ends the run;
    # a first step and a save may take as long as `timeout`, a step five times the longest before.
    stall: float = above(0, 300.0)


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One folder of a mixture; its share of the tokens is its weight over all weights."""

    path: str = required()  # folder written by `lcdist tokenize`
    weight: float = above(0, 1.0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from: folders made by `lcdist tokenize`, or made-up ones.

    mixture: several folders, each a table `[data.mixture.<name>]`; `path` is then the one that is
    evaluated on and generated with, by default the first. long_from, long_factor: in every folder,
    documents of at least long_from[i] tokens, and fewer than long_from[i + 1], are drawn
    long_factor[i] times as often as shorter ones (arXiv:2402.10171).
    """

    source: Literal["tokens", "synthetic"] = "tokens"
    path: str = ""  # folder written by `lcdist tokenize`
    mixture: Mapping[str, MixtureSource] = field(default_factory=dict)
    long_from: tuple[int, ...] = at_least(1, ())
    long_factor: tuple[float, ...] = above(0, ())
    documents: Literal["join", "pack"] = "join"  # pack: attention never crosses a document's end
    # How packed documents fill rows: one after another, cut where a row ends; or each whole where
    # it fits best, with padding (arXiv:2404.10830), so that only those longer than a row are cut.
    packing: Literal["cut", "best_fit"] = "cut"
    # Deal a step's packed samples to data-parallel ranks by the work of their attention.
    balance: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = above(0, 3e-4)
    min_lr: float = at_least(0, 0.0)
    beta1: float = at_least(0, 0.9)
    beta2: float = at_least(0, 0.95)
    eps: float = above(0, 1e-8)
    weight_decay: float = at_least(0, 0.1)  # never on norms and biases
    clip_norm: float = at_least(0, 1.0)  # 0: no clipping
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = at_least(0, 0)
    decay_steps: int = at_least(0, 0)  # wsd: length of the final decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, size and number of the steps."""

    seqlen: int = required(1)
    steps: int = required(1)
    micro_batch_size: int = at_least(1, 1)  # samples a data-parallel rank runs at once
    global_batch_size: int = at_least(1, 1)  # samples a step, over all ranks
    seed: int = at_least(0, 0)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    # What backward computes again: nothing; norms and the MLP's activation; whole layers, of which
    # the input is kept. auto: whole layers above 16,384 tokens a rank, else nothing.
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    # host: the inputs wait for backward in the host's memory. auto: on a GPU, above 16,384 tokens
    # a rank, where they fit there.
    offload: Literal["auto", "none", "host"] = "auto"
    # tiled: some tokens at a time, once more in backward; auto: above 16,384 tokens a rank
    mlp: Literal["auto", "whole", "tiled"] = "auto"
    # tokens at a time; 0: as many as have gate and up in 128 MiB, at least 1,024
    mlp_chunk: int = at_least(0, 0)
    # chunked: logits for some tokens at a time, twice; auto: above 16,384 tokens a rank
    loss: Literal["auto", "whole", "chunked"] = "auto"
    loss_chunk: int = at_least(0, 0)  # tokens at a time; 0: as many as fit 128 MiB, at least 1,024
    engine: Literal["megatron"] = "megatron"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, and where to start from."""

    every: int = at_least(0, 0)  # steps between saves; 0: only at the end or when told to stop
    keep_last: int = at_least(1, 2)
    keep_every: int = at_least(0, 0)  # checkpoints of multiples of so many steps stay; 0: none
    asynchronous: bool = False  # copy to the host's memory, and write while training goes on
    load: str = ""  # a checkpoint whose weights a new run starts from


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The run folder and what is written there."""

    folder: str = required()
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "lcdist"
    peak_tflops: float = at_least(0, 0.0)  # of one device, for MFU; 0: known GPU, else measured


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Perplexity by length.

    attention: `dense` reads with full attention what a sparse pattern was trained for, here and in
    generation; auto: dense where the method's pattern is meant for training alone (scca).
    """

    attention: Literal["auto", "dense", "method"] = "auto"

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    tokens: int = at_least(1, 65536)  # scored tokens per length


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig
    train: TrainConfig
    log: LogConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
