"""Open a checkpoint to evaluate it or to generate text, on any mesh, without training state."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lcdist.checkpoint.read import Checkpoint, load_weights, open_checkpoint, saved_config
from lcdist.checkpoint.verify import verify_checkpoint
from lcdist.config.schema import Config
from lcdist.data.meta import Meta, check_vocabulary
from lcdist.distributed.mesh import Mesh, build_mesh, least_of_ranks, start_world, world_size
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.engines.engine import ForwardEngine
from lcdist.engines.forward import MegatronForward
from lcdist.evaluate.text import Text, Windows, open_text, text_losses
from lcdist.model.build import CausalLM, build_model
from lcdist.plan import Plan, make_plan
from lcdist.plan.deepspeed import without_deepspeed
from lcdist.plan.resolve import evaluation_layers
from lcdist.rundir.paths import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model with a checkpoint's weights, on the mesh of this world.

    attention: the method that reads the text, and the trained one where they differ.
    engine: evaluates the model.
    chunks: this rank's part of the model, for generation.
    marks: what another checkpoint, `evaluate.marker`, marked in the text, by unit; None without.
    """

    plan: Plan
    attention: str
    mesh: Mesh
    checkpoint: Checkpoint
    engine: ForwardEngine
    chunks: list[CausalLM]
    marks: Mapping[str, Mapping[str, Any]] | None = None

    def losses(self, windows: Windows, count: Callable[[int], None]) -> Tensor:
        """Return the loss of the token after each token of the windows; as `text_losses`."""
        return text_losses(self.engine, self.plan, self.mesh, windows, count)

    @cached_property
    def text(self) -> Text:
        """The held-out text that `[evaluate]` asks for; read when it is first asked for.

        Raises:
            ValueError: as `open_text`; or the text's vocabulary is not the model's.
        """
        text, meta = open_text(self.plan.config, self.checkpoint)
        self.check_vocabulary(meta)
        return text

    def check_vocabulary(self, meta: Meta) -> None:
        """Raise ValueError unless the tokens of a folder match the model's vocabulary."""
        vocab_size = self.plan.config.model.vocab_size
        check_vocabulary(meta, vocab_size, reserved=vocab_size - self.plan.shape.text_vocab_size)


def load_model(path: Path, overrides: Sequence[str], mesh_overrides: Sequence[str]) -> LoadedModel:
    """Build the model of a checkpoint and load its weights, without DDP and without an optimizer.

    Args:
        path: a checkpoint, or a run folder for its latest.
        overrides: `section.key=value`, over the checkpoint's own configuration.
        mesh_overrides: overrides that come before `overrides`: the mesh to use by default, since
            the checkpoint's own may not fit this world.

    Raises:
        ConfigError, CheckpointError: the checkpoint or the overrides do not fit.
    """
    # The configuration decides the mesh and so the world: it is read before there is a world.
    _, config = configure(path, overrides, mesh_overrides)
    trained = make_plan(_one_sample_a_rank(without_deepspeed(config)), world_size())
    plan = replace(trained, layers=evaluation_layers(trained.layers, config.evaluate.attention))
    attention = plan.shape.attention_name
    if attention != trained.shape.attention_name:
        attention += f" (dense; trained with {trained.shape.attention_name})"
    start_world(config.parallel.timeout)
    plan = plan.with_device_memory(least_of_ranks(plan.hardware.memory_bytes))
    mesh = build_mesh(config.parallel, config.train.seed)
    chunks = build_model(plan, mesh.device)
    engine = MegatronForward(mesh, chunks)
    checkpoint = _load_newest(path, config, engine)
    return LoadedModel(plan, attention, mesh, checkpoint, engine, chunks)


def configure(
    path: Path, overrides: Sequence[str], mesh_overrides: Sequence[str]
) -> tuple[Checkpoint, Config]:
    """Return the checkpoint at `path` and its configuration with overrides; see `load_model`."""
    checkpoint = open_checkpoint(path)
    alone = ["parallel.tp_size=1", "parallel.pp_size=1", "parallel.cp_size=1"]
    alone += ["parallel.vp_size=1", "parallel.sequence_parallel=false"]
    return checkpoint, saved_config(checkpoint, [*alone, *mesh_overrides, *overrides])


def _load_newest(path: Path, config: Config, engine: MegatronForward) -> Checkpoint:
    """Load the weights of the checkpoint at `path`, and return it; all ranks call it.

    A run that trains meanwhile may delete the checkpoint while it is read. Then the run's newest is
    taken instead.
    """
    while True:
        checkpoint = run_on_rank_zero(lambda: open_checkpoint(path))
        try:
            verify_checkpoint(checkpoint, config.checkpoint.verify)
            weights = load_weights(checkpoint, engine.state_dict()["model"])
        except (CheckpointError, CheckpointException, OSError) as error:
            gone = checkpoint.path
            if run_on_rank_zero(gone.is_dir) or path == gone:
                raise
            log.warning("%s was deleted while it was read (%s): reading the newest", gone, error)
            continue
        engine.load_state({"model": weights})
        return checkpoint


def _one_sample_a_rank(config: Config) -> Config:
    """Return `config` with one sample per data-parallel rank in place of the training batch."""
    parallel = config.parallel
    dp_size = max(1, world_size() // (parallel.tp_size * parallel.pp_size * parallel.cp_size))
    return replace(
        config, train=replace(config.train, micro_batch_size=1, global_batch_size=dp_size)
    )
