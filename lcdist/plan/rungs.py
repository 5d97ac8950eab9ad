"""Ways to need less memory for activations, and which of them a configuration allows.

A way down the list costs more time and needs less memory. Where the first that fits leaves room,
the deepest layers of each model chunk take a cheaper one. What costs least depends on the model:
norms and the MLP's activation are a percent or two of a layer's forward, the logits less than the
MLP's first product (in a model with many layers), attention the most at long lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lcdist.config.schema import TrainConfig

# With more tokens a rank, activations fill the memory. It decides where the device's is unknown or
# shared by ranks, as on a CPU, and for batches longer than the training's.
LONG_SEQUENCE_TOKENS = 16_384
# Recomputation that saves layer inputs, which may be offloaded.
SAVES_INPUTS = ("keep_attention", "full")


@dataclass(frozen=True)
class Rung:
    """Name what is computed again or moved to the host, so that less is kept for backward.

    Attributes:
        recompute: Of a layer, as `train.recompute`.
        tiled: The MLP runs some tokens at a time, and its first product again in backward.
        chunked: Logits are made for some tokens at a time, and again in backward.
        offload: What is saved of a layer waits for backward in the host's memory.
    """

    recompute: str
    tiled: bool = False
    chunked: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Mix:
    """Name the deepest `layers` of each model chunk, which take a cheaper `rung` than the others.

    Backward frees them first.
    """

    rung: Rung
    layers: int


KEEP_ALL = Rung("none")
# From the cheapest to the dearest.
RUNGS = (
    KEEP_ALL,
    Rung("selective"),
    Rung("selective", chunked=True),
    Rung("selective", chunked=True, tiled=True),
    Rung("keep_attention", chunked=True, tiled=True),
    Rung("full", chunked=True, tiled=True),
    Rung("keep_attention", chunked=True, tiled=True, offload=True),
    Rung("full", chunked=True, tiled=True, offload=True),
)


def allowed_rungs(train: TrainConfig, may_offload: bool) -> list[Rung]:
    """Return the rungs with what is set explicitly, from the cheapest to the dearest.

    Args:
        train: The settings.
        may_offload: Whether offload = "auto" may use the host's memory.
    """
    found = []
    for rung in RUNGS:
        recompute = rung.recompute if train.recompute == "auto" else train.recompute
        offload = rung.offload and may_offload
        if train.offload != "auto":
            offload = train.offload == "host"
        if offload and recompute not in SAVES_INPUTS:
            continue
        tiled = rung.tiled if train.mlp == "auto" else train.mlp == "tiled"
        chunked = rung.chunked if train.loss == "auto" else train.loss == "chunked"
        found.append(Rung(recompute, tiled, chunked, offload))
    return list(dict.fromkeys(found))


def cheaper_for_a_layer(rung: Rung, allowed: Sequence[Rung]) -> Rung | None:
    """Return the dearest rung below `rung` that a layer of its own may have, or None.

    allowed: the rungs that the configuration allows, from the cheapest to the dearest.
    """
    if rung.offload:
        on_device = any(each.recompute == rung.recompute and not each.offload for each in allowed)
        return replace(rung, offload=False) if on_device else None
    # All layers share the loss.
    below = reversed(allowed[: allowed.index(rung)])
    found = (replace(each, chunked=rung.chunked) for each in below)
    return next((each for each in found if each != rung), None)


def rung_by_tokens(train: TrainConfig, tokens: int, may_offload: bool) -> Rung:
    """Return the rung for a device of unknown memory: everything above `LONG_SEQUENCE_TOKENS`.

    Args:
        train: The settings.
        tokens: Of a micro-batch on a rank.
        may_offload: As of `allowed_rungs`.
    """
    is_long = tokens > LONG_SEQUENCE_TOKENS
    recompute = train.recompute
    if recompute == "auto":
        recompute = "full" if is_long or train.offload == "host" else "none"
    offload = train.offload == "host"
    if train.offload == "auto":
        offload = may_offload and is_long and recompute in SAVES_INPUTS
    tiled = is_long if train.mlp == "auto" else train.mlp == "tiled"
    return Rung(recompute, tiled, train.loss == "chunked", offload)
