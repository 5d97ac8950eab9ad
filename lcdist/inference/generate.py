"""Text from a trained model: the prompt is read once, then one token a step against the cache.

Where the rotation depends on the length (dynamic NTK, and LongRoPE where it changes its factors),
all of the text is read again when it changes: each token is what a pass over all before it says.
"""

import torch
from torch import Tensor

from lcdist.inference.cache import KVCache
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams


def generate(
    model: CausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
) -> Tensor:
    """The prompt and what follows it: int64 `[n]` in, `[n + new]` out, on the prompt's device.

    temperature: 0 takes the likeliest token, else sampling with this divisor of the logits from a
    generator seeded with `seed`, alike on all tensor-parallel ranks. stop: a token to end after.
    Landmarks, for a model that wants them, are read and not in the result. Raises ValueError for
    an empty prompt, or a mesh with pipeline, context or sequence parallelism.
    """
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
    slots = model.slots
    cache = KVCache(slots.num_slots(len(prompt) + max_new_tokens))
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    new = slots.place(prompt.cpu(), 0, slots.num_slots(len(prompt)), len(prompt))
    model.eval()
    with torch.no_grad():
        for count in range(len(prompt), len(prompt) + max_new_tokens):
            logits = _last_logits(model, new.to(prompt.device), cache)
            if slots.landmark is not None:
                logits[slots.landmark] = -torch.inf  # put in by rule, never said
            token = _choose(logits, temperature, generator)
            tokens = torch.cat([tokens, token.to(prompt.device)])
            if stop is not None and int(token) == stop:
                break
            # A landmark before the token is read together with it.
            read, grown = slots.num_slots(count), slots.num_slots(count + 1)
            if model.rotary(grown) is model.rotary(read):
                new = slots.place(token, read, grown, count + 1)
            else:
                # What lies in the cache was computed from tokens that were rotated otherwise.
                cache = KVCache(cache.max_seqlen)
                new = slots.place(tokens.cpu(), 0, grown, count + 1)
    return tokens


def _last_logits(model: CausalLM, new: Tensor, cache: KVCache) -> Tensor:
    """fp32 `[vocab]` for the token after `new`, on the CPU."""
    logits = model(new[None], None, None, packed_seq_params=SequenceParams(cache=cache))
    return model.whole_logits(logits[:, -1])[0].float().cpu()


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax()[None]
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
