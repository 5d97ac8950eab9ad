"""A model small enough to train in a test, and what it takes to run it on a mesh."""

from collections.abc import Sequence

import torch.distributed as dist

from lcdist.config import parse
from lcdist.config.schema import Config
from lcdist.data.datasets.sample import Dataset, Sample
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.distributed.mesh import Mesh, build_mesh
from lcdist.hardware.peak import Peak
from lcdist.plan import make_plan
from lcdist.train.build import build_trainer, open_dataset
from lcdist.train.trainer import Trainer

# 250 is no multiple of 128, so that the vocabulary is padded.
TABLE = {
    "model": {
        "vocab_size": 250,
        "num_layers": 4,
        "hidden_size": 64,
        "nheads": 4,
        "nheads_kv": 2,
        "ffn_hidden_size": 96,
    },
    "data": {"source": "synthetic"},
    "train": {"seqlen": 64, "steps": 8, "global_batch_size": 4, "seed": 3},
    "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
    "log": {"folder": "unused", "tensorboard": False, "peak_tflops": 1.0},
}


# Ways to keep less for the backward.
SELECTIVE, FULL, HOST = "train.recompute=selective", "train.recompute=full", "train.offload=host"
KEEP = "train.recompute=keep_attention"


def memory_options(tiled: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the options that save memory, each without and with those of a tiled MLP."""
    return [
        (SELECTIVE,),
        tiled,
        (SELECTIVE, *tiled),
        *((way, *more) for way in (FULL, HOST) for more in ((), tiled)),
        (KEEP,),
        (KEEP, HOST, *tiled),
    ]


# DeepSpeed allocates a whole bucket at each step, and tests/unwritten.py fills it: the default one
# has half a gigabyte. This one holds the gradients of a part of a layer.
DEEPSPEED = "train.engine=deepspeed"
BUCKET = "deepspeed.reduce_bucket_elements=20000"


def small(*overrides: str) -> Config:
    """Return the small model's configuration with `section.key=value` overrides."""
    engines = [word for word in overrides if word.startswith("train.engine=")]
    return parse(TABLE, (BUCKET, *overrides) if engines[-1:] == [DEEPSPEED] else overrides)


class ShortSamples:
    """Samples of `seqlen` tokens for rows that the plan makes longer: the rest is padding."""

    def __init__(self, vocab_size: int, seqlen: int, seed: int) -> None:
        self.inner = SyntheticDataset(vocab_size, seqlen, seed)
        self.vocab_size, self.seqlen, self.seed = vocab_size, seqlen, seed

    def sample(self, index: int) -> Sample:
        """Return the sample with number `index`."""
        return self.inner.sample(index)


class Meshes:
    """Trainers on one mesh after another; process groups are made once a mesh."""

    def __init__(self) -> None:
        self.built: tuple[object, Mesh] | None = None

    def trainer(self, config: Config, dataset: Dataset | None = None) -> Trainer:
        """Build a trainer for `config` on all ranks of this world."""
        plan = make_plan(config, dist.get_world_size())
        if self.built is None or self.built[0] != config.parallel:
            self.built = config.parallel, build_mesh(config.parallel, config.train.seed)
        return build_trainer(plan, self.built[1], dataset or open_dataset(plan), PEAK)


PEAK = Peak(1e12, "config")


def take_steps(trainer: Trainer, count: int, lr: float = 1e-3) -> list[tuple[float, float]]:
    """(loss, gradient norm) of `count` steps at a fixed learning rate."""
    numbers = []
    for _ in range(count):
        loss = trainer.engine.forward_backward(trainer.loader.next_step())
        numbers.append((loss.mean, trainer.engine.step(lr)))
        trainer.step += 1
    return numbers


def mesh_name(words: Sequence[str]) -> str:
    """Return a test's name for a mesh: "tp_size=2 cp_size=2" to "tp2-cp2"."""
    short = [word.split(".")[-1].replace("_size=", "") for word in words]
    return "-".join(word.replace("sequence_parallel=true", "sp") for word in short) or "one"
