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
