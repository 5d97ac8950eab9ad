"""Score given continuations of given contexts, on any mesh."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist.evaluate.continuation import check_decodes, continue_tokens
from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.text import Text, Windows
from lcdist.inference.settings import Generation

# Context and continuation, as tokens.
Pair = tuple[Sequence[int], Sequence[int]]


def score_continuations(
    loaded: LoadedModel, pairs: Sequence[Pair], find_greedy: bool = True
) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation, and whether it is the most likely one.

    All ranks call it with the same pairs. The most likely continuation takes the most likely token
    at every place. Where the likelihoods leave it open, the context is continued to find out, once
    for all pairs with the same context.

    Args:
        loaded: the model.
        pairs: contexts of one token or more, and their continuations.
        find_greedy: whether to find out where it is open; if not, the second result is False there.

    Raises:
        ValueError: a context has no token; or the model cannot generate.
    """
    if any(not context for context, _ in pairs):
        raise ValueError("a context has no token: begin it with the token that begins a text")
    losses = _losses(loaded, pairs)
    # A token with more than half of the probability is the most likely one.
    sure = [bool((x < math.log(2)).all()) for x in losses]
    open_ones = [
        pair for pair, is_sure in zip(pairs, sure, strict=True) if find_greedy and not is_sure
    ]
    likely = _most_likely(loaded, open_ones)
    found = []
    for (context, new), x, is_sure in zip(pairs, losses, sure, strict=True):
        is_greedy = is_sure or likely.get(tuple(context), [])[: len(new)] == list(new)
        found.append((-x.sum().item(), is_greedy))
    return found


def _most_likely(loaded: LoadedModel, pairs: Sequence[Pair]) -> dict[tuple[int, ...], list[int]]:
    """Return the most likely continuation of each context, as long as its longest one in pairs."""
    lengths: dict[tuple[int, ...], int] = {}
    for context, new in pairs:
        lengths[tuple(context)] = max(lengths.get(tuple(context), 0), len(new))
    found = {}
    for context, tokens in lengths.items():
        how = Generation(tokens)
        check_decodes(loaded, how)
        [found[context]] = continue_tokens(loaded, [context], how)
    return found


def _losses(loaded: LoadedModel, pairs: Sequence[Pair]) -> list[Tensor]:
    """Return the losses of each continuation's tokens; pairs of the same length share a pass."""
    by_length: dict[int, list[int]] = {}
    found = [torch.zeros(0, dtype=torch.float64)] * len(pairs)
    for number, (context, continuation) in enumerate(pairs):
        if continuation:
            by_length.setdefault(len(context) + len(continuation), []).append(number)
    vocab_size = loaded.plan.config.model.vocab_size
    for length, numbers in sorted(by_length.items()):
        rows = torch.tensor([[*pairs[number][0], *pairs[number][1]] for number in numbers])
        text = Text(rows.flatten(), torch.zeros(rows.numel(), dtype=torch.bool), False)
        starts = range(0, rows.numel(), length)
        losses = loaded.losses(Windows(text, length - 1, vocab_size, starts), lambda _: None)
        for row, number in zip(losses, numbers, strict=True):
            found[number] = row[len(pairs[number][0]) - 1 :]
    return found
