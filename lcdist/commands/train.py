"""The story of a training run, from a configuration to the last checkpoint."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from lcdist.checkpoint.read import (
    MERGE,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    saved_config,
)
from lcdist.checkpoint.save import Checkpointer
from lcdist.config.lora import LoraConfig
from lcdist.config.schema import Config, ModelConfig
from lcdist.convert.lora.adapter import check_adapter, import_adapter
from lcdist.data.datasets.aligned import AlignedDataset, PackedSyntheticDataset
from lcdist.data.datasets.build import build_dataset, coverage_lines
from lcdist.data.datasets.sample import Dataset
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.data.meta import check_vocabulary
from lcdist.distributed.mesh import Mesh, build_mesh, start_world, world_size
from lcdist.distributed.rank_zero import enter_on_rank_zero, run_on_rank_zero
from lcdist.distributed.store import shared_store
from lcdist.distributed.watchdog import Watchdog
from lcdist.engines.megatron import MegatronEngine
from lcdist.hardware.device import device_name
from lcdist.hardware.peak import Peak, device_peak
from lcdist.layout.documents import DocumentLayout
from lcdist.model.build import DTYPES, build_model
from lcdist.plan import Plan, make_plan, plan_rows
from lcdist.rundir.header import (
    Lost,
    RunHeader,
    lost_since,
    record_first_step,
    record_start,
    versions,
)
from lcdist.rundir.lock import lock_run_folder
from lcdist.rundir.paths import METRICS_FILE, latest_in
from lcdist.rundir.run_config import check_same_run, write_config
from lcdist.rundir.signals import clear_signals, write_done, write_stopped
from lcdist.rundir.status import write_status
from lcdist.train.metrics import open_metrics
from lcdist.train.trainer import Outcome, Trainer
from lcdist.verify.preflight import check_host_memory, check_start

log = logging.getLogger(__name__)


def run(config: Config, console: Console | None = None, also_stop: Path | None = None) -> Outcome:
    """Train as `config` says, in the world the launcher made; resumes what its folder holds.

    console: where rank 0 shows progress; None: standard output. also_stop: a file whose presence
    asks to save and stop, beside the one in its folder. Raises ConfigError, ValueError or
    CheckpointError for the user's mistakes, before anything is overwritten.
    """
    plan = make_plan(config, world_size())
    start_world(config.parallel.timeout)
    mesh = build_mesh(config.parallel, config.train.seed)
    folder = Path(config.log.folder)
    dataset = open_dataset(plan)
    checkpoint, changes = run_on_rank_zero(lambda: _what_is_there(folder, config))
    with enter_on_rank_zero(lock_run_folder(folder)):
        for change in changes if mesh.rank == 0 else []:
            log.warning("resuming with a changed setting: %s", change)
        if checkpoint is not None and checkpoint.step >= config.train.steps:
            reason = f"all {config.train.steps} steps were done before"
            outcome = Outcome("finished", checkpoint.step, reason)
            # A run killed right after its last save has not said so yet.
            run_on_rank_zero(lambda: _ended(folder, outcome))
            return outcome
        check_start(folder, plan.memory.checkpoint_bytes)
        plan = check_host_memory(plan)
        peak = device_peak(mesh.device, DTYPES[plan.dtype], config.log.peak_tflops)
        trainer = make_trainer(plan, mesh, dataset, peak)
        trainer.also_stop = [also_stop] if also_stop is not None else []
        begin(trainer, checkpoint)
        outcome = _train(trainer, console)
    return outcome


def open_dataset(plan: Plan) -> Dataset:
    """The training samples of `plan`, laid out for its attention.

    Raises ValueError where they do not fit.
    """
    train, data, slots = plan.config.train, plan.config.data, plan.shape.document_layout
    pack, vocab_size = data.documents == "pack", plan.shape.text_vocab_size
    landmarks = slots.landmark is not None
    seqlen = train.seqlen if pack else slots.num_text_slots(train.seqlen)
    if data.source == "synthetic":
        made_up = SyntheticDataset(vocab_size, seqlen, train.seed)
        if pack and not slots.plain:
            return PackedSyntheticDataset(made_up, slots)
        return AlignedDataset(made_up, slots, train.seqlen) if landmarks and not pack else made_up
    dataset = build_dataset(data, seqlen, train.seed, slots if pack else DocumentLayout())
    check_vocabulary(dataset.meta, plan.config.model.vocab_size, reserved=landmarks)
    for line in coverage_lines(dataset, train.steps * train.global_batch_size):
        log.info(line)
    return AlignedDataset(dataset, slots, train.seqlen) if landmarks and not pack else dataset


def make_trainer(plan: Plan, mesh: Mesh, dataset: Dataset, peak: Peak) -> Trainer:
    """The rooms of a run, put together for this rank."""
    train = plan.config.train
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
    engine = MegatronEngine(plan, mesh, build_model(plan, mesh.device))
    folder = Path(plan.config.log.folder) / "checkpoints"
    kept = plan.config.checkpoint
    checkpointer = Checkpointer(folder, kept.keep_last, kept.keep_every)
    return Trainer(plan, mesh, engine, Loader(dataset, spec), checkpointer, peak)


def begin(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Put the trainer where the run stands: resumed, at another run's weights, or at the start."""
    config = trainer.plan.config
    if checkpoint is not None:
        trainer.resume(checkpoint)
        log.info("resumed %s at step %d", config.log.folder, trainer.step)
    elif config.checkpoint.load:
        source = Path(config.checkpoint.load)
        trainer.start_from(run_on_rank_zero(lambda: open_fitting(source, config)))
        if config.lora.load:
            import_adapter(Path(config.lora.load), config, trainer.engine.chunks)
            trainer.engine.optimizer.refresh_masters()


def open_fitting(path: Path, config: Config) -> Checkpoint:
    """The checkpoint at `path`.

    Raises CheckpointError where its model has another architecture or other adapters.
    """
    checkpoint, model = open_checkpoint(path), config.model
    there = saved_config(checkpoint)
    saved, asked = _architecture(there.model), _architecture(model)
    differing = [
        f"model.{key} is {saved[key]!r} there and {asked[key]!r} here"
        for key in asked
        if saved[key] != asked[key]
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of another architecture: {'; '.join(differing)}"
        )
    _check_same_adapters(checkpoint, there.lora, config.lora)
    return checkpoint


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """The keys of `[model]` that decide the shapes of weights, with what is left out filled in."""
    # What scales the rotation or draws initial values does not change the shape of any weight.
    free = {"rope", "init_std", "norm_eps"}
    shape = {
        key: getattr(model, key) for key in ModelConfig.__dataclass_fields__ if key not in free
    }
    shape["nheads_kv"] = model.nheads_kv or model.nheads
    shape["head_dim"] = model.head_dim or model.hidden_size // model.nheads
    return shape


def _check_same_adapters(checkpoint: Checkpoint, there: LoraConfig, here: LoraConfig) -> None:
    if not there.rank:
        return
    keys = {"rank": (there.rank, here.rank), "alpha": (there.alpha, here.alpha)}
    keys["targets"] = (", ".join(sorted(there.targets)), ", ".join(sorted(here.targets)))
    others = [f"lora.{k} is {a} there and {b} here" for k, (a, b) in keys.items() if a != b]
    if others:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has other LoRA adapters: {'; '.join(others)}; {MERGE}"
        )


def _what_is_there(folder: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, and the settings changed since; raises before any writing."""
    changes = check_same_run(folder, config)
    newest = latest_in(folder / "checkpoints")
    if newest is not None:
        checkpoint = open_fitting(newest, config)
        if "imported" in checkpoint.manifest:
            raise CheckpointError(
                f"log.folder = '{folder}' holds an imported model, which has no run to go on with: "
                f"start from it with checkpoint.load={folder} and another log.folder"
            )
        return checkpoint, changes
    if config.checkpoint.load:
        base = open_fitting(Path(config.checkpoint.load), config)
        if config.lora.load and saved_config(base).lora.rank:
            raise ValueError(
                f"lora.load = '{config.lora.load}': checkpoint.load has adapters already "
                f"({base.path}); leave one of them out"
            )
    if config.lora.load:
        check_adapter(Path(config.lora.load), config)
    return None, changes


def _train(trainer: Trainer, console: Console | None) -> Outcome:
    config, mesh = trainer.plan.config, trainer.mesh
    folder = Path(config.log.folder)
    reason = "resumed" if trainer.step else "new run"

    def announce() -> str:
        lost = lost_since(folder / METRICS_FILE, trainer.step) if trainer.step else Lost()
        if lost.steps:
            log.warning("%d steps, %.0f s of work, are done again", lost.steps, lost.seconds)
        clear_signals(folder)
        write_config(folder, config)
        write_status(folder, "running", trainer.step, reason)
        header = RunHeader(
            plan=dict(plan_rows(trainer.plan)),
            device=device_name(mesh.device),
            peak=asdict(trainer.peak),
            world_size=mesh.world_size,
            versions=versions(),
        )
        return record_start(folder, header, trainer.step, reason, lost)

    run_id = run_on_rank_zero(announce)
    metrics = open_metrics(
        config, rank=mesh.rank, step=trainer.step, run_id=run_id, console=console
    )
    with metrics, make_watchdog(trainer) as watchdog:
        outcome = trainer.train(metrics, watchdog, lambda: _note_first_step(folder, mesh.rank))
    run_on_rank_zero(lambda: _ended(folder, outcome))
    return outcome


def _note_first_step(folder: Path, rank: int) -> None:
    if rank == 0:
        record_first_step(folder, time.time() - psutil.Process().create_time())


def make_watchdog(trainer: Trainer) -> Watchdog:
    """Who tells, when the ranks of this run wait for one another in vain, which and where."""
    parallel, mesh = trainer.plan.config.parallel, trainer.mesh
    folder = Path(trainer.plan.config.log.folder)
    methods = dict.fromkeys(layer.method for layer in trainer.plan.layers)

    def tell(report: str) -> None:
        for line in report.splitlines():
            log.error("watchdog: %s", line)
        write_status(folder, "stalled", trainer.step, report)

    return Watchdog(
        shared_store("watchdog"),
        mesh.rank,
        mesh.world_size,
        stall=parallel.stall,
        patient=parallel.timeout,
        step=trainer.step,
        methods={method.module: method.name for method in methods},
        tell=tell,
    )


def _ended(folder: Path, outcome: Outcome) -> None:
    write_status(folder, outcome.status, outcome.step, outcome.reason)
    if outcome.status == "finished":
        write_done(folder, outcome.step)
    else:
        newest = latest_in(folder / "checkpoints")
        assert newest is not None, "a stopped run has saved"
        write_stopped(folder, outcome.step, outcome.reason, newest)
