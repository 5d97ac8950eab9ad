"""The Megatron parts behind a trainer's engine, for tests that look inside or change the model.

The only place in the tests that knows how `MegatronEngine` names them.
"""

from typing import Any

from torch import Tensor

from lcdist.engines.optimizer import ShardedAdamW
from lcdist.model.build import CausalLM
from lcdist.train.trainer import Trainer


def chunks_of(trainer: Trainer) -> list[CausalLM]:
    """Return this rank's model chunks."""
    engine: Any = trainer.engine
    return engine.chunks


def ddp_wrappers_of(trainer: Trainer) -> list[Any]:
    """Return the DDP wrappers of this rank's model chunks."""
    engine: Any = trainer.engine
    return engine.wrapped


def optimizer_of(trainer: Trainer) -> ShardedAdamW:
    """Return this rank's share of the optimizer."""
    engine: Any = trainer.engine
    return engine.optimizer


def log_entry_of(trainer: Trainer) -> Tensor:
    """Return this rank's part of the last step's summed loss and number of tokens."""
    engine: Any = trainer.engine
    return engine._log


def let_go(trainer: Trainer) -> None:
    """Remove what DeepSpeed has hung on a model, if that is the engine."""
    engine = getattr(trainer.engine, "engine", None)
    if engine is not None:
        engine.destroy()


def spoil_gradients(trainer: Trainer, is_chosen: bool) -> None:
    """Make a gradient of each coming backward pass NaN, if this rank is chosen."""
    weight = chunks_of(trainer)[0].decoder.layers[1].mlp.linear_fc2.weight
    weight.register_hook(lambda gradient: gradient * float("nan") if is_chosen else gradient)
