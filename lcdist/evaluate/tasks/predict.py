"""Let a model answer prompts: the only place where the tasks meet a model."""

from collections.abc import Sequence

from lcdist.evaluate.continuation import continue_tokens
from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.inference.settings import Generation


def check_can_answer(loaded: LoadedModel) -> None:
    """Raise ValueError if the model cannot generate."""
    for layer in loaded.plan.layers:
        if "decode" not in layer.method.supports:
            raise ValueError(
                f"evaluate.measure: the attention method '{layer.method.name}' cannot generate "
                "answers; measure perplexity alone"
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
    how = Generation(max_new_tokens, stops=frozenset(stops))
    return [
        new[:-1] if new and new[-1] in how.stops else new
        for new in continue_tokens(loaded, prompts, how)
    ]
