"""SwiGLU in three operations of torch; the other implementations are compared with it."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Return silu(g) * u `[.., n]` of gate_up = (g, u) `[.., 2 n]`."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
