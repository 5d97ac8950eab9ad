"""Build a run's dataset and its trainer from the plan."""

import logging
from pathlib import Path
from typing import Any

import torch

from lcdist.checkpoint.save import Checkpointer
from lcdist.config import ConfigError
from lcdist.data.datasets.aligned import AlignedDataset, PackedSyntheticDataset
from lcdist.data.datasets.build import build_dataset, coverage_lines, token_folders
from lcdist.data.datasets.sample import Dataset
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.data.meta import META, REMAKE, check_vocabulary, read_meta
from lcdist.distributed.mesh import Mesh
from lcdist.distributed.verify import refuse_damaged
from lcdist.engines.deepspeed.engine import DeepSpeedEngine
from lcdist.engines.megatron import MegatronEngine
from lcdist.hardware.peak import Peak
from lcdist.layout.documents import DocumentLayout
from lcdist.model.build import build_model
from lcdist.plan import Plan
from lcdist.plan.profile import NO_STEPS, profiled_steps
from lcdist.train.profiler import StepProfiler
from lcdist.train.trainer import Trainer
from lcdist_kernels import apex, transformer_engine
from lcdist_kernels.extensions import missing
from lcdist_kernels.step_kernels import choose_step_kernels

log = logging.getLogger(__name__)


def open_dataset(plan: Plan) -> Dataset:
    """Open the training samples of `plan`, in the document layout of its attention.

    All ranks of the world call it. Raises ValueError if the samples do not fit the plan, or a
    folder of tokens is damaged.
    """
    train, data, slots = plan.config.train, plan.config.data, plan.shape.document_layout
    pack, vocab_size = data.documents == "pack", plan.shape.text_vocab_size
    landmarks = slots.landmark is not None
    seqlen = train.seqlen if pack else slots.num_text_slots(train.seqlen)
    if data.source == "synthetic":
        synthetic = SyntheticDataset(vocab_size, seqlen, train.seed)
        if pack and not slots.plain:
            return PackedSyntheticDataset(synthetic, slots)
        aligned = landmarks and not pack
        return AlignedDataset(synthetic, slots, train.seqlen) if aligned else synthetic
    dataset = build_dataset(data, seqlen, train.seed, slots if pack else DocumentLayout())
    if plan.config.checkpoint.verify == "full":
        for folder in token_folders(data):
            meta = read_meta(folder)
            refuse_damaged(folder, meta.sha256 or {}, meta.files, META, REMAKE)
    check_vocabulary(dataset.meta, plan.config.model.vocab_size, reserved=landmarks)
    for line in coverage_lines(dataset, train.steps * train.global_batch_size):
        log.info(line)
    return AlignedDataset(dataset, slots, train.seqlen) if landmarks and not pack else dataset


def choose_kernels(kernels: str, device: torch.device) -> None:
    """Choose what computes norms, SwiGLU, loss, updates and weight gradients in this process.

    Raises ConfigError if `train.kernels` asks for apex or Transformer Engine and a part of it is
    missing.
    """
    choose_step_kernels(kernels)
    other = apex.other_project() if kernels in ("auto", "apex") else None
    library: Any = {"apex": apex, "te": transformer_engine}.get(kernels)
    absent = missing(library.PARTS.values(), device) if library else []
    if absent:
        also = f" ({other})" if other else ""
        raise ConfigError(
            [
                f"train.kernels = {kernels!r}: this machine lacks {', '.join(absent)}{also}; "
                f"{library.BUILD}, or set train.kernels to 'auto', 'own' or 'torch'"
            ]
        )


def build_trainer(plan: Plan, mesh: Mesh, dataset: Dataset, peak: Peak) -> Trainer:
    """Build this rank's model, engine, loader and checkpointer; return the trainer over them."""
    train = plan.config.train
    choose_kernels(train.kernels, mesh.device)
    spec = LoaderSpec(
        layout=plan.layout,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        cp_rank=mesh.cp_rank,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        documents=plan.config.data.documents,
        document_layout=plan.shape.document_layout,
        balance=plan.config.data.balance,
    )
    chunks = build_model(plan, mesh.device)
    engines = {"megatron": MegatronEngine, "deepspeed": DeepSpeedEngine}
    engine = engines[train.engine](plan, mesh, chunks)
    folder = Path(plan.config.log.folder) / "checkpoints"
    retention = plan.config.checkpoint
    checkpointer = Checkpointer(folder, retention.keep_last, retention.keep_every)
    trainer = Trainer(plan, mesh, engine, Loader(dataset, spec), checkpointer, peak)
    trainer.profiler = StepProfiler(
        Path(plan.config.log.folder),
        profiled_steps(train.profile) or NO_STEPS,
        is_profiled=mesh.rank == train.profile_rank,
        rank=train.profile_rank,
        device=mesh.device,
        models=chunks,
    )
    return trainer
