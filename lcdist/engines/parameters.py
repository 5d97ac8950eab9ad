"""The parameters that a run trains, and what AdamW does with each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lcdist.model.init import LORA_PARAMS, METHOD_PARAMS, whole_model_names


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter under its whole-model name.

    decays: whether weight decay applies: to matrices, not to norms, biases and parameters of an
        attention method.
    lr_ratio: its learning rate relative to the schedule's.
    """

    name: str
    parameter: nn.Parameter
    decays: bool
    lr_ratio: float


def trained_parameters(chunks: Sequence[nn.Module], lr_ratio: float) -> list[TrainedParameter]:
    """Return the parameters of `chunks` that require a gradient, in order.

    lr_ratio: learning rate of LoRA's B relative to all others (LoRA+, arXiv:2402.12354).
    """
    found = []
    for chunk in chunks:
        names = whole_model_names(chunk)
        for local, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                name = names[local]
                decays = parameter.ndim > 1 and METHOD_PARAMS not in name
                is_b = LORA_PARAMS in name and name.endswith(".B")
                found.append(TrainedParameter(name, parameter, decays, lr_ratio if is_b else 1.0))
    return found
