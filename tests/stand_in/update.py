"""Count what an update of the weights does on a device that is not there.

    python -m tests.stand_in.update RANK WORLD_SIZE "CONFIG [SECTION.KEY=VALUE ...]" ...

Prints a line of JSON for each configuration: the second step's update.
"""

import json
import sys
from typing import Any

from tests.stand_in.counting import Counting
from tests.stand_in.cuda import install, leave

STAND_IN = install(*map(int, sys.argv[1:3]))

from lcdist.config import load  # noqa: E402
from lcdist.distributed.mesh import build_mesh  # noqa: E402
from lcdist.hardware.peak import Peak  # noqa: E402
from lcdist.plan import make_plan  # noqa: E402
from lcdist.train.build import build_trainer, open_dataset  # noqa: E402
from tests.engines.internals import optimizer_of  # noqa: E402


def count(words: str) -> dict[str, Any]:
    """Return operations, kernels and waits of an update, and the parameters that it is for."""
    path, *overrides = words.split()
    config = load(path, overrides)
    plan = make_plan(config, int(sys.argv[2]))
    mesh = build_mesh(config.parallel, config.train.seed)
    trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "not measured"))
    found: dict[str, Any] = {}
    for _ in range(2):
        batches = [batch.to(mesh.device) for batch in trainer.loader.next_step()]
        trainer.engine.forward_backward(batches)
        STAND_IN.launches.clear()
        STAND_IN.waits.clear()
        with Counting() as counting:
            trainer.engine.step(1e-3)
        found = {
            "kernels": dict(STAND_IN.launches),
            "operations": counting.device_operations,
            "bytes": counting.device_bytes,
            "elsewhere": counting.cpu_operations + counting.copies,
            "waits": dict(STAND_IN.waits),
        }
    parameters = sum(x.numel() for x in optimizer_of(trainer).masters)
    return {"of": words, "parameters": parameters, **found}


with STAND_IN:
    for each in sys.argv[3:]:
        print(json.dumps(count(each)), flush=True)
leave()
