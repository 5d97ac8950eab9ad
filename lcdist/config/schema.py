"""Schema of a run: one tree of frozen dataclasses, and the only place with defaults.

Lengths are in tokens, sizes of the mesh in ranks, times in seconds. This module does not import
torch, so that a configuration can be checked where torch is not installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lcdist.config.checkpoint import CheckpointConfig
from lcdist.config.deepspeed import DeepSpeedConfig
from lcdist.config.fields import above, at_least, required
from lcdist.config.lora import LoraConfig
from lcdist.config.rope import Rope, RopePlain


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

    Attributes:
        shift: Distance of the shifted units, for `fixed` and `longmixed` only; None: half a chunk.
        wrap: Keys of a shifted unit's first chunks: none (`mask`), or the chunk at a shorter
            distance (`fold`). None: `fold` for `flow`, else `mask`.
        fractions: Fractions of the heads for each unit of `longmixed`.
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

    The coarsest mode is not listed: it grows with the sequence. An empty list is full attention.
    """

    modes: tuple[int, ...] = at_least(1, (512,))
    local_blocks: int = at_least(1, 2)
    pe: Literal["mode", "global"] = "mode"
    hop_heads: Literal["auto", "q", "kv"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LandmarkOptions:
    """Landmark attention (arXiv:2305.16300); lengths in tokens, landmarks included.

    Attributes:
        top_k: Past blocks that a unit of select_tokens tokens attends to; None: all of them.
    """

    block_size: int = at_least(2, 64)
    top_k: int | None = at_least(1, None)
    select_tokens: int = at_least(1, 4096)


@dataclass(frozen=True, kw_only=True)
class LssarOptions:
    """Length-scaled softplus attention with re-weighting (LSSAR); without `reweight`, LSSA."""

    power: float = at_least(1, 15.0)  # below 1, gradients are unbounded at a row's mean
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
    """Options of a method from another package, unchecked until the method is known."""

    table: Mapping[str, Any]


# --- sections -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaMA-shaped decoder: RMSNorm, rotary grouped-query attention, SwiGLU."""

    vocab_size: int = required(2)
    num_layers: int = required(1)
    hidden_size: int = required(1)
    nheads: int = required(1)
    nheads_kv: int = at_least(0, 0)  # 0: equal to nheads
    head_dim: int = at_least(0, 0)  # 0: hidden_size / nheads
    ffn_hidden_size: int = required(1)
    norm_eps: float = above(0, 1e-5)
    tied_embeddings: bool = False
    qkv_bias: bool = False  # biases of the query, key and value projections, as in Qwen2
    init_std: float = above(0, 0.02)
    rope: Rope = field(default_factory=RopePlain)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The attention method and its options, which are keys of the same table.

    Attributes:
        layers: Layers with another method, as words `method@layers`: layer numbers from 0 or
            slices, separated by commas, such as "full@3::4 coca@0,-1".
        impl: What computes attention. auto: the fastest for the tensors. cudnn, fa3, fa4: cuDNN,
            FlashAttention-3 or -4, for the methods full and coca without packed documents. triton:
            our kernels. torch, reference: slow, for comparisons.
        options: Options of `method`.
        others: Options of the methods in `layers`, each a table `[attention.<method>]`.
    """

    method: str = "full"
    layers: str = ""
    impl: Literal["auto", "cudnn", "fa3", "fa4", "triton", "torch", "reference"] = "auto"
    options: Any = field(default_factory=FullOptions, metadata={"flattened": True})
    others: Mapping[str, Any] = field(default_factory=dict, metadata={"flattened": True})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh. The data-parallel size is the world size over the other sizes; it has no key."""

    tp_size: int = at_least(1, 1)
    pp_size: int = at_least(1, 1)
    cp_size: int = at_least(1, 1)
    vp_size: int = at_least(1, 1)  # model chunks a pipeline stage; 1: 1F1B, more: interleaved
    sequence_parallel: bool = False
    layout: Literal["auto", "contiguous", "zigzag", "striped"] = "auto"
    timeout: float = above(0, 600.0)  # longest wait of a collective for a rank, in seconds
    # Seconds without progress after which the watchdog reports the stuck ranks and ends the run.
    # A first step and a save may take `timeout`, a step five times the longest one so far.
    stall: float = above(0, 300.0)


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One folder of a mixture; its share of the tokens is its weight over the sum of weights."""

    path: str = required()  # folder written by `lcdist tokenize`
    weight: float = above(0, 1.0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source of tokens: folders written by `lcdist tokenize`, or synthetic tokens.

    Attributes:
        mixture: Several folders, each a table `[data.mixture.<name>]`. `path` is then the folder
            for evaluation and generation; by default the first.
        long_from: Lower bounds of document lengths, increasing.
        long_factor: In every folder, documents of long_from[i] to long_from[i + 1] tokens are drawn
            long_factor[i] times as often as shorter ones (arXiv:2402.10171).
    """

    source: Literal["tokens", "synthetic"] = "tokens"
    path: str = ""  # folder written by `lcdist tokenize`
    mixture: Mapping[str, MixtureSource] = field(default_factory=dict)
    long_from: tuple[int, ...] = at_least(1, ())
    long_factor: tuple[float, ...] = above(0, ())
    documents: Literal["join", "pack"] = "join"  # pack: no attention across documents
    # cut: documents fill rows one after another and are cut where a row ends. best_fit: each goes
    # whole to the row where it fits best, with padding (arXiv:2404.10830); only documents longer
    # than a row are cut.
    packing: Literal["cut", "best_fit"] = "cut"
    # Distribute a step's packed samples over data-parallel ranks by the FLOPs of their attention.
    balance: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate schedule."""

    lr: float = above(0, 3e-4)
    min_lr: float = at_least(0, 0.0)
    beta1: float = at_least(0, 0.9)
    beta2: float = at_least(0, 0.95)
    eps: float = above(0, 1e-8)
    weight_decay: float = at_least(0, 0.1)  # not applied to norms and biases
    clip_norm: float = at_least(0, 1.0)  # 0: no clipping
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = at_least(0, 0)
    decay_steps: int = at_least(0, 0)  # wsd: length of the final decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batch sizes, dtype and memory savings."""

    seqlen: int = required(1)
    steps: int = required(1)
    micro_batch_size: int = at_least(1, 1)  # samples of one forward pass on a data-parallel rank
    global_batch_size: int = at_least(1, 1)  # samples a step, over all ranks
    seed: int = at_least(0, 0)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    # Activation checkpointing. selective: backward recomputes norms and the MLP's activation. full:
    # it recomputes whole layers from their saved input. keep_attention: as full, but attention's
    # result is saved too, so that attention is neither computed nor exchanged again.
    # auto, here and for offload, mlp and loss: on a GPU, the cheapest that fits its memory with 8 %
    # left free (lcdist/plan/rungs.py); on a CPU, full above 16,384 tokens a rank, else none.
    recompute: Literal["auto", "none", "selective", "keep_attention", "full"] = "auto"
    # host: what recomputed layers save is moved to the host's memory until backward. auto: on a GPU
    # as above, if it fits there.
    offload: Literal["auto", "none", "host"] = "auto"
    # tiled: the MLP runs some tokens at a time, and again in backward. auto: on a CPU, tiled above
    # 16,384 tokens a rank.
    mlp: Literal["auto", "whole", "tiled"] = "auto"
    # tokens a tile; 0: as many as have gate and up in 128 MiB, at least 1,024
    mlp_chunk: int = at_least(0, 0)
    # whole: logits of a micro-batch are kept until backward. chunked: they are computed for some
    # tokens at a time, and again in backward. auto: chunked too where they take more than 4 GiB.
    loss: Literal["auto", "whole", "chunked"] = "auto"
    # tokens a chunk; 0: up to 4,096 within 1 GiB of logits, or as many as fit 128 MiB
    loss_chunk: int = at_least(0, 0)
    # Steps to profile, from 1: "STEP" or "FIRST-LAST"; empty: none. A trace, a table of kernels by
    # place and a memory snapshot go to the folder `profile` of the run.
    profile: str | int = ""
    profile_rank: int = at_least(0, 0)  # the rank that is profiled
    # Of norms, SwiGLU, loss, AdamW and weight gradients: ours, NVIDIA's apex or plain torch. auto:
    # ours, and apex's gradients where torch has none in fp32. deepspeed: the last two are torch's.
    kernels: Literal["auto", "own", "apex", "torch"] = "auto"
    # megatron: ZeRO-1 on any mesh. deepspeed: as `[deepspeed]` says, without pipeline stages.
    engine: Literal["megatron", "deepspeed"] = "megatron"
    # A step whose loss or gradient is not finite changes nothing. stop: the run ends. skip: it goes
    # on with the next samples, until bad_step_limit steps of the run were skipped.
    on_bad_step: Literal["stop", "skip"] = "stop"
    bad_step_limit: int = at_least(1, 10)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The run folder and loggers."""

    folder: str = required()
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "lcdist"
    peak_tflops: float = at_least(0, 0.0)  # of one device, for MFU; 0: data sheet, else measured


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Perplexity by length.

    Attributes:
        attention: Attention of evaluation and generation. `method`: as trained. `dense`: full
            attention in place of a sparse pattern. auto: dense if the pattern is for training only
            (scca), else method.
    """

    attention: Literal["auto", "dense", "method"] = "auto"
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    tokens: int = at_least(1, 65536)  # scored tokens per length


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a run: one attribute for each section of the file."""

    model: ModelConfig
    train: TrainConfig
    log: LogConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
