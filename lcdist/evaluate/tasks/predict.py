"""Let a model answer prompts: the only place where the tasks meet a model."""

from collections.abc import Sequence

import torch

from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.inference.generate import generate


def check_can_answer(loaded: LoadedModel) -> None:
    """Raise ValueError if the model or its mesh cannot generate."""
    for layer in loaded.plan.layers:
        if "decode" not in layer.method.supports:
            raise ValueError(
                f"evaluate.measure: the attention method '{layer.method.name}' cannot generate "
                "answers; measure perplexity alone"
            )
    parallel = loaded.plan.config.parallel
    if parallel.cp_size > 1 or parallel.pp_size > 1:
        raise ValueError(
            f"evaluate.measure: answers are generated with parallel.cp_size = 1 and pp_size = 1, "
            f"not {parallel.cp_size} and {parallel.pp_size}: give parallel.cp_size=1 and "
            f"parallel.tp_size={parallel.cp_size * parallel.pp_size * parallel.tp_size}, or start "
            "one process"
        )


def continuations(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """Return the most likely continuation of each prompt; all ranks call it.

    Args:
        loaded: the model.
        prompts: tokens, without landmarks.
        max_new_tokens: upper limit of a continuation.
        stops: tokens that end one; they are not part of it.

    Returns:
        New tokens for each prompt, the same on all ranks.
    """
    found = []
    for prompt in prompts:
        tokens = torch.tensor([*prompt], dtype=torch.int64, device=loaded.mesh.device)
        whole = generate(loaded.chunks[0], tokens, max_new_tokens, stop=stops[0] if stops else None)
        new = whole[len(prompt) :].tolist()
        end = next((n for n, token in enumerate(new) if token in stops), len(new))
        found.append(new[:end])
    return found
