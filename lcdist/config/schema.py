"""Schema of a run: one tree of frozen dataclasses, and the only place with defaults.

Lengths are in tokens, sizes of the mesh in ranks, times in seconds. This module does not import
torch, so that a configuration can be checked where torch is not installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lcdist.config import fields as limits
from lcdist.config.checkpoint import CheckpointConfig
from lcdist.config.deepspeed import DeepSpeedConfig
from lcdist.config.evaluate import EvaluateConfig
from lcdist.config.fields import above, at_least, required
from lcdist.config.lora import LoraConfig

# Re-exported: methods of other packages and of this one import them from here.
from lcdist.config.methods import OPTIONS as OPTIONS
from lcdist.config.methods import CocaOptions as CocaOptions
from lcdist.config.methods import FullOptions as FullOptions
from lcdist.config.methods import LandmarkOptions as LandmarkOptions
from lcdist.config.methods import LssarOptions as LssarOptions
from lcdist.config.methods import RawOptions as RawOptions
from lcdist.config.methods import SccaOptions as SccaOptions
from lcdist.config.methods import TensorizedOptions as TensorizedOptions
from lcdist.config.rope import Rope, RopePlain


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaMA-shaped decoder: RMSNorm, rotary grouped-query attention, SwiGLU."""

    vocab_size: int = required(2, limits.VOCABULARY)  # tokens, a landmark token included
    num_layers: int = required(1, limits.LAYERS)  # of attention and MLP
    hidden_size: int = required(1, limits.FEATURES)  # features of a token between layers
    nheads: int = required(1, limits.HEADS)  # query heads
    nheads_kv: int = at_least(0, 0, limits.HEADS)  # key and value heads; 0: equal to nheads
    head_dim: int = at_least(0, 0, limits.FEATURES)  # features of a head; 0: hidden_size / nheads
    ffn_hidden_size: int = required(1, limits.FEATURES)  # features of gate and up in the MLP
    norm_eps: float = above(0, 1e-5, limits.SMALL)  # added to the mean square in RMSNorm
    tied_embeddings: bool = False  # the output layer has the embedding's weights
    qkv_bias: bool = False  # biases of the query, key and value projections, as in Qwen2
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation, as in Qwen3
    init_std: float = above(0, 0.02, limits.SMALL)  # standard deviation of initial weights
    rope: Rope = field(default_factory=RopePlain)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The attention method and its options, which are keys of the same table.

    Attributes:
        method: One of those that `lcdist methods` prints.
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

    tp_size: int = at_least(1, 1, limits.TP_RANKS)  # ranks that share every layer's weights
    pp_size: int = at_least(1, 1, limits.PP_RANKS)  # pipeline stages, each with some layers
    cp_size: int = at_least(1, 1, limits.CP_RANKS)  # ranks that share every sequence
    # model chunks a pipeline stage; 1: 1F1B, more: interleaved
    vp_size: int = at_least(1, 1, limits.LAYERS)
    # tensor-parallel ranks share the tokens of norms and residuals; needs tp_size > 1
    sequence_parallel: bool = False
    # Which tokens a context-parallel rank holds. contiguous: neighbours. zigzag: a piece from each
    # end, so that causal work is equal. striped: every cp_size-th. auto: zigzag if all layers
    # take it, else the first that they take.
    layout: Literal["auto", "contiguous", "zigzag", "striped"] = "auto"
    # longest wait of a collective for a rank, in seconds
    timeout: float = at_least(0.1, 600.0, limits.SECONDS)
    # Seconds without progress after which the watchdog reports the stuck ranks and ends the run.
    # A first step and a save may take `timeout`, a step five times the longest one so far.
    stall: float = at_least(0.1, 300.0, limits.SECONDS)


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One folder of a mixture; its share of the tokens is its weight over the sum of weights."""

    path: str = required()  # folder written by `lcdist tokenize`
    weight: float = above(0, 1.0, limits.WEIGHT)  # over the sum of weights: its share


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

    source: Literal["tokens", "synthetic"] = "tokens"  # synthetic: random, to time a step
    path: str = ""  # folder written by `lcdist tokenize`
    mixture: Mapping[str, MixtureSource] = field(default_factory=dict)
    long_from: tuple[int, ...] = at_least(1, (), limits.TOKENS)
    long_factor: tuple[float, ...] = above(0, (), limits.FACTOR)
    documents: Literal["join", "pack"] = "join"  # pack: no attention across documents
    # cut: documents fill rows one after another and are cut where a row ends. best_fit: each goes
    # whole to the row where it fits best, with padding (arXiv:2404.10830); only documents longer
    # than a row are cut.
    packing: Literal["cut", "best_fit"] = "cut"
    # What is predicted of conversations, which `lcdist tokenize --conversations` writes: their
    # answers alone, or all of them. Of other text every token is.
    targets: Literal["answers", "all"] = "answers"
    # Distribute a step's packed samples over data-parallel ranks by the FLOPs of their attention.
    balance: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate schedule."""

    lr: float = above(0, 3e-4, limits.RATE)  # the highest learning rate
    min_lr: float = at_least(0, 0.0, limits.RATE)  # the rate at the last step of cosine and wsd
    beta1: float = at_least(0, 0.9, limits.SMALL)  # decay of the mean of gradients
    beta2: float = at_least(0, 0.95, limits.SMALL)  # decay of the mean of their squares
    eps: float = above(0, 1e-8, limits.SMALL)  # added to the root of the latter
    weight_decay: float = at_least(0, 0.1, limits.RATE)  # not applied to norms and biases
    clip_norm: float = at_least(
        0, 1.0, limits.NORM
    )  # most norm of all gradients together; 0: no clipping
    # after the warmup. wsd: constant, then a linear decay (arXiv:2404.06395)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = at_least(0, 0, limits.STEPS)  # steps of a linear rise to lr
    decay_steps: int = at_least(0, 0, limits.STEPS)  # wsd: length of the final decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batch sizes, dtype and memory savings."""

    seqlen: int = required(1, limits.SEQLEN)  # tokens a sample
    steps: int = required(1, limits.STEPS)  # optimizer steps of the run
    # samples of one forward pass on a data-parallel rank
    micro_batch_size: int = at_least(1, 1, limits.SAMPLES)
    global_batch_size: int = at_least(1, 1, limits.SAMPLES)  # samples a step, over all ranks
    seed: int = at_least(0, 0, limits.SEED)  # of initial weights and the order of samples
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    # Activation checkpointing. selective: backward recomputes norms and the MLP's activation. full:
    # it recomputes whole layers from their saved input. keep_attention: as full, but attention's
    # result is saved too, so that attention is neither computed nor exchanged again.
    # auto, here and for offload, mlp and loss: on a GPU, the cheapest that fits its memory with 8 %
    # left free (lcdist/plan/rungs.py), and a cheaper one for as many layers as have room; on a CPU,
    # full above 16,384 tokens a rank, else none.
    recompute: Literal["auto", "none", "selective", "keep_attention", "full"] = "auto"
    # host: what recomputed layers save is moved to the host's memory until backward. auto: on a GPU
    # as above, if it fits there.
    offload: Literal["auto", "none", "host"] = "auto"
    # tiled: the MLP runs some tokens at a time, and again in backward. auto: on a CPU, tiled above
    # 16,384 tokens a rank.
    mlp: Literal["auto", "whole", "tiled"] = "auto"
    # tokens a tile; 0: as many as have gate and up in 128 MiB, at least 1,024
    mlp_chunk: int = at_least(0, 0, limits.SEQLEN)
    # whole: logits of a micro-batch are kept until backward. chunked: they are computed for some
    # tokens at a time, and again in backward. auto: chunked too where they take more than 4 GiB.
    loss: Literal["auto", "whole", "chunked"] = "auto"
    # tokens a chunk; 0: up to 4,096 within 1 GiB of logits, or as many as fit 128 MiB
    loss_chunk: int = at_least(0, 0, limits.SEQLEN)
    # Steps to profile, from 1: "STEP" or "FIRST-LAST"; empty: none. A trace, a table of kernels by
    # place and a memory snapshot go to the folder `profile` of the run.
    profile: str | int = field(default="", metadata={"limit": limits.STEPS})
    profile_rank: int = at_least(0, 0, limits.RANKS)  # the rank that is profiled
    # Of norms, SwiGLU, loss, AdamW and weight gradients: ours, NVIDIA's apex or plain torch. auto:
    # ours, and apex's gradients where torch has none in fp32. te: the norm of Transformer Engine,
    # ours for the rest. deepspeed: the last two are torch's.
    kernels: Literal["auto", "own", "apex", "te", "torch"] = "auto"
    # megatron: ZeRO-1 on any mesh. deepspeed: as `[deepspeed]` says, without pipeline stages.
    engine: Literal["megatron", "deepspeed"] = "megatron"
    # The same bits in every run on the same GPUs: cuBLAS and torch as well, at some cost in speed.
    deterministic: bool = False
    # A step whose loss or gradient is not finite changes nothing. stop: the run ends. skip: it goes
    # on with the next samples, until bad_step_limit steps of the run were skipped.
    on_bad_step: Literal["stop", "skip"] = "stop"
    bad_step_limit: int = at_least(1, 10, limits.STEPS)  # of on_bad_step = "skip"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The run folder and loggers."""

    folder: str = limits.folder()  # everything a run writes; the same folder again: it goes on
    tensorboard: bool = True  # write the metrics for TensorBoard too
    wandb: bool = False  # send them to Weights & Biases; needs `pip install 'lcdist[wandb]'`
    wandb_project: str = "lcdist"  # project of Weights & Biases
    # peak rate of one device, for MFU; 0: that of its data sheet, or a measured one
    peak_tflops: float = at_least(0, 0.0, limits.TFLOPS)


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
