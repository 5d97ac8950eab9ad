"""Who is measured on a GPU: our kernels, and the libraries that are installed beside them."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist.attention import METHODS, Shape
from lcdist.layout import ContextLayout
from lcdist_kernels import full_reference

# Of a backward to its forward: five products to two (arXiv:2307.08691).
BACKWARD = 2.5
REPETITIONS = 7
GATE_SEQLEN, GATE = 512, {torch.bfloat16: 3e-2, torch.float32: 1e-4}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "scca": [{"pattern": "fixed"}, {"pattern": "sda", "dilation": 4}, {"pattern": "longmixed"}],
    "landmark": [{}, {"top_k": 64}],
}


@dataclass(frozen=True)
class Size:
    """One shape; dtype as torch names it."""

    seqlen: int
    nheads: int
    nheads_kv: int
    head_dim: int
    dtype: str = "bfloat16"

    def facts(self) -> dict[str, Any]:
        """The columns of a row."""
        return asdict(self)

    def inputs(self, device: str, seqlen: int | None = None) -> list[Tensor]:
        """q, k, v, dout."""
        made = torch.Generator(device).manual_seed(0)
        length, dtype = seqlen or self.seqlen, getattr(torch, self.dtype)
        heads = (self.nheads, self.nheads_kv, self.nheads_kv, self.nheads)
        return [
            torch.randn(1, length, n, self.head_dim, generator=made, dtype=dtype, device=device)
            for n in heads
        ]


def sizes(gpu: bool) -> list[Size]:
    """The shared list; without a GPU two that take seconds in the interpreter."""
    if not gpu:
        return [Size(64, 2, 1, 16, "float32"), Size(128, 2, 2, 16, "float32")]
    lengths = (32768, 131072, 4096, 16384)
    return [Size(n, 32, 8, d) for n in lengths for d in (128, 64)]


@dataclass(frozen=True)
class Contender:
    """fn(q, k, v) -> out; flops: of the forward over the touched area."""

    name: str
    fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    size: Size
    device: str
    flops: int
    gated: bool = False

    def measure(self) -> dict[str, Any]:
        """Medians of forward and backward in ms, TFLOP/s, MiB above inputs and outputs."""
        if self.gated:
            self._gate()
        q, k, v, dout = self.size.inputs(self.device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        taken = [self._once(leaves, dout) for _ in range(REPETITIONS if self._cuda else 2)]
        # The first one compiles, and warms up what there is to warm.
        fwd, bwd = (statistics.median(column) for column in zip(*taken[1:], strict=True))
        peak = torch.cuda.max_memory_allocated() / 2**20 if self._cuda else 0.0
        return {
            "fwd_ms": round(fwd, 3),
            "bwd_ms": round(bwd, 3),
            "fwd_tflops": round(self.flops / fwd / 1e9, 1),
            "bwd_tflops": round(BACKWARD * self.flops / bwd / 1e9, 1),
            "extra_mib": round(max(0.0, peak - self._inputs_mib()), 1),
        }

    @property
    def _cuda(self) -> bool:
        return self.device == "cuda"

    def _once(self, leaves: list[Tensor], dout: Tensor) -> tuple[float, float]:
        """Milliseconds of one forward and one backward."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        forward, out = timed(lambda: self.fn(*leaves), self.device)
        backward, _ = timed(lambda: torch.autograd.grad(out, leaves, dout), self.device)
        return forward, backward

    def _gate(self) -> None:
        q, k, v, _ = self.size.inputs(self.device, min(GATE_SEQLEN, self.size.seqlen))
        expected = full_reference(q.double(), k.double(), v.double())
        error = ((self.fn(q, k, v).double() - expected).norm() / expected.norm()).item()
        if not error < GATE[getattr(torch, self.size.dtype)]:
            raise ArithmeticError(f"not timed: off by {error:.3g} from the dense reference")

    def _inputs_mib(self) -> float:
        size = self.size
        elements = size.seqlen * size.head_dim * (4 * size.nheads + 4 * size.nheads_kv)
        return elements * getattr(torch, size.dtype).itemsize / 2**20


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Milliseconds and the result."""
    if device != "cuda":
        begin = time.perf_counter()
        result = run()
        return 1e3 * (time.perf_counter() - begin), result
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), result


def contenders(size: Size, device: str) -> Iterator[Contender]:
    """Our methods that have kernels, then libraries for plain causal attention."""
    for name, method in METHODS.items():
        if "triton" in method.impls:
            for words in OPTIONS.get(name, [{}]):
                yield ours(name, words, size, device)
    full = METHODS["full"]
    flops = full.flops(full.options(), shape_of(size))
    for name, fn in libraries(device):
        yield Contender(name, fn, size, device, flops, gated=True)


def shape_of(size: Size) -> Shape:
    """One process, one sample."""
    return Shape(1, size.nheads, size.nheads_kv, size.head_dim, 2, seqlen=size.seqlen)


def ours(name: str, words: dict[str, Any], size: Size, device: str) -> Contender:
    """A method's one-process attention by its kernels."""
    method = METHODS[name]
    options = method.options(**words)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = ContextLayout("contiguous", q.shape[1], 1)
        return method.attention(q, k, v, options=options, layout=layout, group=None, impl="triton")

    title = " ".join([f"lcdist {name}", *(f"{key}={value}" for key, value in words.items())])
    flops = method.flops(options, shape_of(size))
    return Contender(title, fn, size, device, flops, gated=name == "full")


def libraries(device: str) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """torch's SDPA and FlexAttention, FlashAttention 3 and 2 where they are installed."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    yield "torch sdpa", sdpa
    if device != "cuda":
        return
    flex = import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention)

    def flexed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seqlen = q.shape[1]
        mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    yield "FlexAttention, its mask made anew", flexed
    for module, title in (("flash_attn_interface", "FlashAttention-3"), ("flash_attn", "2")):
        if find_spec(module):
            flash = import_module(module).flash_attn_func
            name = title if title.startswith("Flash") else f"FlashAttention-{title}"
            yield name, lambda q, k, v, flash=flash: first(flash(q, k, v, causal=True))


def first(answer: Any) -> Tensor:
    """Some versions return (out, lse)."""
    return answer[0] if isinstance(answer, tuple) else answer
