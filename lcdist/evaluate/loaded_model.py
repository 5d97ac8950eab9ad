"""A checkpoint opened for use: evaluated or continued, on any mesh, under its own configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lcdist.checkpoint.read import Checkpoint, load_weights, open_checkpoint, saved_config
from lcdist.config.schema import Config
from lcdist.data.datasets.build import held_out_folder
from lcdist.data.datasets.tokens import TokenSplit
from lcdist.data.meta import check_vocabulary
from lcdist.data.tokenizers.files import bos_prefix, open_tokenizer
from lcdist.distributed.mesh import Mesh, build_mesh, start_world, world_size
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.engines.megatron import MegatronEngine
from lcdist.engines.state import load_model_state, model_state
from lcdist.evaluate.perplexity import held_out_text, perplexity_by_length
from lcdist.inference.generate import generate
from lcdist.model.build import CausalLM, build_model
from lcdist.plan import Plan, make_plan
from lcdist.plan.resolve import evaluation_layers


@dataclass(frozen=True)
class Session:
    """A model with the weights of a checkpoint, on the mesh of this world.

    attention: what its text is read with, in words.
    """

    plan: Plan
    attention: str
    mesh: Mesh
    checkpoint: Checkpoint
    chunks: list[CausalLM]


def open_session(path: Path, overrides: Sequence[str], mesh_overrides: Sequence[str]) -> Session:
    """Load the weights at `path` (a checkpoint, or a run folder for its latest).

    overrides: `section.key=value`, over the checkpoint's own configuration. mesh_overrides:
    overrides that go before them, since a checkpoint's mesh is not that of who reads it. Raises
    ConfigError or
    CheckpointError for the user's mistakes.
    """
    # The configuration decides the mesh and so the world: it is read before there is a world.
    checkpoint = open_checkpoint(path)
    alone = ["parallel.tp_size=1", "parallel.pp_size=1", "parallel.cp_size=1"]
    alone += ["parallel.vp_size=1", "parallel.sequence_parallel=false"]
    config = saved_config(checkpoint, [*alone, *mesh_overrides, *overrides])
    trained = make_plan(_one_sample_a_rank(config), world_size())
    dense = evaluation_layers(trained.layers, config.evaluate.attention)
    plan = replace(trained, layers=dense)
    attention = plan.shape.attention_name
    if attention != trained.shape.attention_name:
        attention += f" (dense; trained with {trained.shape.attention_name})"
    start_world(config.parallel.timeout)
    mesh = build_mesh(config.parallel, config.train.seed)
    checkpoint = run_on_rank_zero(lambda: open_checkpoint(path))
    chunks = build_model(plan, mesh.device)
    load_model_state(chunks, load_weights(checkpoint, model_state(chunks)))
    return Session(plan, attention, mesh, checkpoint, chunks)


def evaluate_checkpoint(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Perplexity by length of the checkpoint on the valid split of its data.

    Without overrides the whole world is context parallel. Returns lengths, perplexity (None
    where it overflows), scored (tokens at each length), tokens asked for, attention (what the
    text was read with), and whether documents had to be joined.
    """
    session = open_session(path, overrides, [f"parallel.cp_size={world_size()}"])
    config, mesh = session.plan.config, session.mesh
    checkpoint = session.checkpoint
    if "imported" in checkpoint.manifest and config.data == saved_config(checkpoint).data:
        raise ValueError(
            f"{path} is an imported model, which has no text of its own: say what to read with "
            "data.path=FOLDER, a folder made by 'lcdist tokenize'"
        )
    split = TokenSplit(held_out_folder(config.data), "valid")
    vocab_size = config.model.vocab_size
    check_vocabulary(
        split.meta, vocab_size, reserved=vocab_size - session.plan.shape.text_vocab_size
    )
    lengths = tuple(sorted(config.evaluate.lengths))
    text = held_out_text(split, lengths[-1] * mesh.dp_size, config.evaluate.tokens)
    engine = MegatronEngine(session.plan, mesh, session.chunks)
    scores = perplexity_by_length(engine, mesh, text, lengths)
    return {
        "checkpoint": str(session.checkpoint.path),
        "step": session.checkpoint.step,
        "lengths": list(lengths),
        "perplexity": [score.perplexity for score in scores],
        "scored": [score.tokens for score in scores],
        "tokens": config.evaluate.tokens,
        "attention": session.attention,
        "joined": text.joined,
    }


def generate_text(
    path: Path,
    prompt: str,
    overrides: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The prompt continued by the checkpoint's model; all of the world is tensor parallel."""
    session = open_session(path, overrides, [f"parallel.tp_size={world_size()}"])
    for layer in session.plan.layers:
        if "decode" not in layer.method.supports:
            raise ValueError(f"attention method '{layer.method.name}' cannot generate text")
    tokenizer = open_tokenizer(held_out_folder(session.plan.config.data))
    read = [*bos_prefix(tokenizer), *tokenizer.encode(prompt)]
    tokens = torch.tensor(read, dtype=torch.int64, device=session.mesh.device)
    out = generate(
        session.chunks[0], tokens, max_new_tokens, temperature, seed, stop=tokenizer.eos_id
    )
    return tokenizer.decode([t for t in out.tolist() if t != tokenizer.eos_id])


def _one_sample_a_rank(config: Config) -> Config:
    """Batch sizes are the training run's; here every rank reads what it is given."""
    parallel = config.parallel
    dp_size = max(1, world_size() // (parallel.tp_size * parallel.pp_size * parallel.cp_size))
    return replace(
        config, train=replace(config.train, micro_batch_size=1, global_batch_size=dp_size)
    )
