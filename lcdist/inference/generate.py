"""Text generation: one prefill over the prompt, then one token per step with a KV cache.

Every token is the one that a full pass over all tokens before it predicts. If the rotation depends
on the length (dynamic NTK; LongRoPE when it changes its factors), a change of rotation therefore
runs the prefill again over the whole text.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.inference.cache import KVCache
from lcdist.inference.sampling import GREEDY, Sampling
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams
from lcdist.utils.progress import Progress, silent


@dataclass(frozen=True)
class Watch:
    """Name the functions to call while a text is generated.

    Attributes:
        progress: With the tokens of the prompt that are read, averaged over the layers.
        on_token: With each new token; None: nobody.
    """

    progress: Progress = silent
    on_token: Callable[[int], None] | None = None


def generate(
    model: CausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: int | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return the prompt and its continuation, int64 `[n + new]` on the prompt's device.

    Landmark tokens are inserted for models that use them, and left out of the result.

    Args:
        model: the whole model, or its tensor-parallel shard.
        prompt: int64 `[n]`.
        max_new_tokens: upper limit of the continuation.
        sampling: how tokens are chosen.
        stop: token that ends the continuation; None: continue to max_new_tokens.
        watch: what is told of the progress.

    Raises:
        ValueError: the prompt is empty, or the mesh has pipeline, context or sequence parallelism.
    """
    _check(model, prompt)
    layout = model.document_layout
    cache = KVCache(layout.num_slots(len(prompt) + max_new_tokens))
    generator, watch = sampling.generator(), watch or Watch()
    tokens = prompt
    new = layout.place(prompt.cpu(), 0, layout.num_slots(len(prompt)), len(prompt))
    model.eval()
    with torch.no_grad():
        for count in range(len(prompt), len(prompt) + max_new_tokens):
            with _layers_counted(model, count, watch.progress if count == len(prompt) else silent):
                logits = _last_logits(model, new.to(prompt.device), cache)
            if layout.landmark is not None:
                logits[layout.landmark] = -torch.inf  # inserted by position, never predicted
            token = sampling.choose(logits, generator)
            tokens = torch.cat([tokens, token.to(prompt.device)])
            if watch.on_token is not None:
                watch.on_token(int(token))
            if stop is not None and int(token) == stop:
                break
            # A landmark before the new token is read in the same step.
            length, next_length = layout.num_slots(count), layout.num_slots(count + 1)
            if model.rotary(next_length) is model.rotary(length):
                new = layout.place(token, length, next_length, count + 1)
            else:
                # The cached keys and values of later layers were computed with another rotation.
                cache = KVCache(cache.max_seqlen)
                new = layout.place(tokens.cpu(), 0, next_length, count + 1)
    return tokens


@contextlib.contextmanager
def _layers_counted(model: CausalLM, tokens: int, progress: Progress) -> Iterator[None]:
    """Call `progress` after each layer of a forward pass over so many tokens."""
    layers = [] if progress is silent else list(model.decoder.layers)
    done = [0]

    def after_layer(*_: object) -> None:
        done[0] += 1
        progress("reading the prompt", tokens * done[0] // len(layers), tokens)

    if layers:
        progress("reading the prompt", 0, tokens)
    hooks = [layer.register_forward_hook(after_layer) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(model: CausalLM, prompt: Tensor) -> None:
    """Raise ValueError if the prompt is empty or the mesh is not one for generation."""
    config = model.config
    if config.sequence_parallel:
        raise ValueError(
            "generation reads one token at a time, which parallel.sequence_parallel = true cannot "
            "cut: set it to false"
        )
    if config.pipeline_model_parallel_size > 1 or config.context_parallel_size > 1:
        raise ValueError(
            f"generation runs with parallel.pp_size = 1 and cp_size = 1, not "
            f"{config.pipeline_model_parallel_size} and {config.context_parallel_size}; "
            "a checkpoint of any mesh loads on such a one"
        )
    if not len(prompt):
        raise ValueError("the prompt has no token")


def _last_logits(model: CausalLM, new: Tensor, cache: KVCache) -> Tensor:
    """Return the logits of the token after `new`, fp32 `[vocab]` on the CPU."""
    logits = model(new[None], None, None, packed_seq_params=SequenceParams(cache=cache))
    return model.gather_logits(logits[:, -1])[0].float().cpu()
