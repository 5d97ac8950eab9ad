"""Two training steps of configurations on a device that is not there: a line each, as JSON.

    python -m tests.stand_in.training RANK WORLD_SIZE "CONFIG [SECTION.KEY=VALUE ...]" ...

What is wrong ends it.
"""

import json
import sys

from tests.stand_in.cuda import StandIn, install, leave

STAND_IN = install(*map(int, sys.argv[1:3]))

from lcdist.config import load  # noqa: E402
from lcdist.parallel import build_grid  # noqa: E402
from lcdist.plan import make_plan  # noqa: E402
from lcdist.run import make_trainer, open_dataset  # noqa: E402
from lcdist.train.peak import Peak  # noqa: E402
from lcdist.train.trainer import to_device  # noqa: E402


def train(words: str, stand_in: StandIn) -> None:
    path, *overrides = words.split()
    config = load(path, overrides)
    plan = make_plan(config, int(sys.argv[2]))
    grid = build_grid(config.parallel, config.train.seed)
    trainer = make_trainer(plan, grid, open_dataset(plan), Peak(1.0, "not measured"))
    engine = trainer.engine
    for _ in range(2):
        stand_in.launches.clear()
        stand_in.waits.clear()
        engine.forward_backward([to_device(b, grid.device) for b in trainer.loader.next_step()])
        engine.update(1e-3)
    for chunk in engine.chunks:
        assert all(x.is_cuda for x in (*chunk.parameters(), *chunk.buffers()))
    assert plan.dtype == "bf16" and grid.device.type == "cuda"
    said = {"launches": stand_in.launches, "waits": stand_in.waits}
    print(json.dumps({"of": words, **said}), flush=True)


with STAND_IN:
    for each in sys.argv[3:]:
        train(each, STAND_IN)
leave()
