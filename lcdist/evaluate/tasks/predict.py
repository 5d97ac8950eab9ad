"""Let a model answer prompts: the only place where the tasks meet a model."""

from collections.abc import Sequence

from lcdist.evaluate.continuation import continue_tokens
from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.inference.settings import Generation


def check_can_answer(loaded: LoadedModel) -> None:
    """Raise ValueError if the model cannot generate, or not with so few blocks on the device."""
    for layer in loaded.plan.layers:
        if "decode" not in layer.method.supports:
            raise ValueError(
                f"evaluate.measure: the attention method '{layer.method.name}' cannot generate "
                "answers; measure perplexity alone"
            )
    blocks = loaded.plan.config.evaluate.device_blocks
    if not blocks:
        return
    most = max(getattr(layer.options, "top_k", None) or 0 for layer in loaded.plan.layers)
    if not most:
        raise ValueError(
            f"evaluate.device_blocks = {blocks}: only landmark attention with attention.top_k "
            "reads chosen blocks; set it to 0, or give attention.top_k=NUMBER"
        )
    if blocks < most:
        raise ValueError(
            f"evaluate.device_blocks = {blocks}: a token reads attention.top_k = {most} blocks, "
            f"and all of them must be on the device; set it to {most} or more, or to 0"
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
    blocks = loaded.plan.config.evaluate.device_blocks or None
    how = Generation(max_new_tokens, stops=frozenset(stops), device_blocks=blocks)
    return [
        new[:-1] if new and new[-1] in how.stops else new
        for new in continue_tokens(loaded, prompts, how)
    ]
