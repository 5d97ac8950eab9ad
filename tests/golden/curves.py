"""The first 20 steps of the debug configurations and of the quickstart, on any mesh.

`python -m tests.golden.curves` writes them anew, one file a configuration beside this one. Only a
change that is meant to change the numbers may come with a new file, and says so in the changelog.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from lcdist.config import load
from lcdist.distributed.mesh import end_world, start_world
from lcdist.train.schedule import learning_rate
from tests.model.small import Meshes

FOLDER = Path(__file__).parent
CONFIGS = FOLDER.parents[1] / "configs"
STEPS = 20
# The quickstart's text is the running interpreter's library, which no two versions share: its
# curve is that of made-up text.
MADE_UP = ("data.source=synthetic", "data.path=''")


def names() -> list[str]:
    """Return the configurations that have a curve, as paths under configs/ without the ending."""
    debug = sorted(f"debug/{file.stem}" for file in (CONFIGS / "debug").glob("*.toml"))
    return [*debug, "quickstart/pretrain"]


def golden_file(name: str) -> Path:
    """Return the file that has the curve of configs/<name>.toml."""
    return FOLDER / f"{name.replace('/', '-')}.json"


def curve(
    name: str, mesh: tuple[str, ...], meshes: Meshes, steps: int = STEPS
) -> dict[str, list[float]]:
    """Return loss (nats a token) and gradient norm of the first steps of configs/<name>.toml.

    mesh: overrides; the world has been started.
    """
    overrides = ["train.dtype=fp32", "log.peak_tflops=1.0", *mesh]
    if name.startswith("quickstart"):
        overrides += MADE_UP
    else:
        # The schedule of 20 steps, whatever length people are given to try.
        overrides.append(f"train.steps={STEPS}")
    config = load(CONFIGS / f"{name}.toml", overrides)
    trainer = meshes.trainer(config)
    losses, norms = [], []
    for step in range(steps):
        loss = trainer.engine.forward_backward(trainer.loader.next_step())
        losses.append(loss.mean)
        norms.append(trainer.engine.step(learning_rate(config.optim, step, config.train.steps)))
    return {"loss": losses, "grad_norm": norms}


def write(name: str) -> None:
    """Make one configuration's golden file."""
    table: dict[str, Any] = {"config": f"configs/{name}.toml"}
    table |= {"made by": "python -m tests.golden.curves", "torch": torch.__version__}
    table |= curve(name, (), Meshes())
    golden_file(name).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.pop("WORLD_SIZE", None)
    torch.set_num_threads(1)
    start_world(60)
    for each in names():
        write(each)
    end_world()
