"""Read tokens into a cache: a prompt in pieces, then one token of each text a step, on any mesh.

Tensor-parallel ranks hold shards of the layers as in training. Pipeline stages hand hidden states
on; the last one has the logits. Context-parallel ranks share a long prompt: each computes its part
of a piece and keeps its part of the cache. The last tokens of a prompt and all new tokens are
computed by all of them, each reading the part of the cache that it keeps.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcdist.attention.cache import NewTokens
from lcdist.inference.cache import CacheSize, ModelCache
from lcdist.inference.lookahead import looking_ahead
from lcdist.model.build import CausalLM
from lcdist.model.core_attention import LongContextAttention
from lcdist.model.sequence import SequenceParams

OnTokens = Callable[[int], None]


class Decoder:
    """A model with a cache for some texts.

    Args:
        model: this rank's whole model or pipeline stage.
        size: of the cache.
        piece: most tokens of a prompt that a context-parallel rank reads at once.

    Raises:
        ValueError: sequence or interleaved pipeline parallelism, or a method that does not fit.
    """

    def __init__(self, model: CausalLM, size: CacheSize, piece: int) -> None:
        if model.config.sequence_parallel:
            raise ValueError(
                "generation reads one token at a time, which parallel.sequence_parallel = true "
                "cannot cut: set it to false"
            )
        self.model, self.size = model, size
        self._stages, self._ranks = model.pg_collection.pp, model.pg_collection.cp.size()
        self.cache = ModelCache(_attention_layers(model), size)
        self._lengths = [0] * size.rows
        page = self._page_of_all_stages()
        # A sharded call gives each rank whole pages.
        self._piece = -(-piece // page) * page
        self._page = page

    def _page_of_all_stages(self) -> int:
        pages = [self.cache.page]
        if self._stages.size() > 1:
            pages = pages * self._stages.size()
            dist.all_gather_object(pages, self.cache.page, group=self._stages)
        return lcm(*pages)

    def prefill(self, row: int, tokens: Tensor, on_tokens: OnTokens | None = None) -> Tensor | None:
        """Read tokens `[n]` into an empty row; return the logits after the last one.

        Args:
            row: number of the text.
            tokens: int64, on the model's device; landmarks are among them.
            on_tokens: called with the number of tokens read, after each layer.

        Returns:
            fp32 `[1, vocab]` on the CPU; None before the last pipeline stage.
        """
        logits, length = None, len(tokens)
        while self._lengths[row] < length:
            start = self._lengths[row]
            new = self._next_piece(row, length)
            own = tokens[start : start + new.count]
            if new.sharded:
                own = own.chunk(self._ranks)[self.model.pg_collection.cp.rank()]
            with _layers_counted(self.model, start, new.count, on_tokens):
                logits = self._forward(own[None], new)
        return logits

    def _next_piece(self, row: int, length: int) -> NewTokens:
        """Return the next tokens of a prompt. Those of the last call are on all ranks."""
        start, unit = self._lengths[row], self._ranks * self._page
        left = length - start
        if self._ranks > 1 and left > unit:
            count = min(self._ranks * self._piece, (left - 1) // unit * unit)
            return NewTokens((row,), (start,), count, sharded=True)
        return NewTokens((row,), (start,), min(left, self._piece))

    def step(self, rows: Sequence[int], tokens: Tensor) -> Tensor | None:
        """Read one token `[rows]` of each of some texts; as `prefill`, logits `[rows, vocab]`."""
        starts = tuple(self._lengths[row] for row in rows)
        return self._forward(tokens[:, None], NewTokens(tuple(rows), starts, 1))

    def _forward(self, tokens: Tensor, new: NewTokens) -> Tensor | None:
        """Run this stage; return logits fp32 `[rows, vocab]` after the last tokens."""
        model = self.model
        self.cache.new = new
        if not model.pre_process:
            model.set_input_tensor(self._receive(tokens))
        layers: Any = model.decoder.layers
        with looking_ahead(list(layers), self.cache):
            out = model(tokens, None, None, packed_seq_params=SequenceParams(cache=self.cache))
        for row in new.rows:
            self._lengths[row] += new.count
        if not model.post_process:
            self._send(out)
            return None
        return model.gather_logits(out[:, -1]).float().cpu()

    def _receive(self, tokens: Tensor) -> Tensor:
        config: Any = self.model.config
        shape = tokens.shape[1], tokens.shape[0], config.hidden_size
        hidden = torch.empty(shape, dtype=config.params_dtype, device=tokens.device)
        source = dist.get_global_rank(self._stages, self._stages.rank() - 1)
        dist.recv(hidden, source, group=self._stages)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        target = dist.get_global_rank(self._stages, self._stages.rank() + 1)
        dist.send(hidden.contiguous(), target, group=self._stages)

    def share(self, tokens: Tensor | None, count: int, like: Tensor) -> Tensor:
        """Give all stages the `count` tokens, int64 on the CPU, that the last stage chose."""
        if self._stages.size() == 1:
            assert tokens is not None
            return tokens
        shared = torch.empty(count, dtype=torch.int64, device=like.device)
        if tokens is not None:
            shared.copy_(tokens)
        last = dist.get_global_rank(self._stages, self._stages.size() - 1)
        dist.broadcast(shared, last, group=self._stages)
        return shared.cpu()


def _attention_layers(model: CausalLM) -> list[LongContextAttention]:
    layers: Any = model.decoder.layers
    return [layer.self_attention.core_attention for layer in layers]


@contextlib.contextmanager
def _layers_counted(
    model: CausalLM, start: int, count: int, on_tokens: OnTokens | None
) -> Iterator[None]:
    """Call `on_tokens` after each layer of a pass over `count` tokens from `start` on.

    The tokens of the pass count by the layers that have read them.
    """
    layers: list[Any] = [] if on_tokens is None else list(model.decoder.layers)
    done = [0]

    def after_layer(*_: object) -> None:
        done[0] += 1
        assert on_tokens is not None
        on_tokens(start + count * done[0] // len(layers))

    hooks = [layer.register_forward_hook(after_layer) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
