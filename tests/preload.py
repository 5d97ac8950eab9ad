"""Modules that the fork server imports once, so that starting a rank takes a tenth of a second.

`lcdist.hardware.megatron_on_cpu` must come before Megatron-core: with it Megatron-core runs without
CUDA.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed

from tests.interpreter import interpret_without_gpu

torch.set_num_threads(1)
interpret_without_gpu()

if find_spec("lcdist.hardware.megatron_on_cpu") is not None:
    import_module("lcdist.hardware.megatron_on_cpu")
    import_module("megatron.core")
    # What most ranks import later: torch's optimizers load `torch._dynamo`, which takes seconds.
    for module in (
        "torch._dynamo",
        "lcdist.commands.train",
        "lcdist.evaluate.evaluation",
        "pytest",
        "hypothesis.strategies",
    ):
        import_module(module)
