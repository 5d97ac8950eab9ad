"""A module with the names and functions of Transformer Engine's extension, and torch's mathematics.

Their signatures were read from github.com/NVIDIA/TransformerEngine at
01a4d046939c8505b5b0aeb70322f8c88c89262a.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.kernels.apex_stand_ins import installed


class DType(Enum):
    """Its names of dtypes."""

    kBFloat16 = torch.bfloat16  # noqa: N815
    kFloat16 = torch.float16  # noqa: N815
    kFloat32 = torch.float32  # noqa: N815


class StandIn:
    """The extension, which counts its calls; a factor other than 1 makes its results wrong."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls: list[str] = []

    def modules(self) -> dict[str, Any]:
        """Return the extension, and the package that loads it, by name."""
        names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine_torch")
        made = {name: ModuleType(name) for name in names}
        extension: Any = made["transformer_engine_torch"]
        extension.rmsnorm_fwd, extension.rmsnorm_bwd = self.rmsnorm_fwd, self.rmsnorm_bwd
        extension.DType = DType
        return made

    def rmsnorm_fwd(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Any,
        quantizer: Any,
        out_dtype: DType,
        sm_margin: int,
        zero_centered_gamma: bool,
    ) -> list[Tensor | None]:
        """Return the norm of x `[n, h]`, None, and 1 / rms of each row in fp32."""
        assert x.dim() == 2 and x.is_contiguous() and weight.is_contiguous()
        assert out is quantizer is None and not sm_margin and not zero_centered_gamma
        self.calls.append("fwd")
        rows = x.float()
        rstd = (rows.square().mean(-1) + eps).rsqrt()
        normed = self.factor * rows * rstd[:, None] * weight
        return [normed.to(out_dtype.value), None, rstd]

    def rmsnorm_bwd(
        self,
        dout: Tensor,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        sm_margin: int,
        zero_centered_gamma: bool,
    ) -> list[Tensor]:
        """Return the gradients of x and weight."""
        assert dout.shape == x.shape == (len(rstd), len(weight)) and rstd.dtype == torch.float32
        assert not sm_margin and not zero_centered_gamma
        self.calls.append("bwd")
        normed = x.float() * rstd[:, None]
        scaled = dout.float() * weight.float()
        dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return [dx.to(x.dtype), (dout.float() * normed).sum(0).to(weight.dtype)]


@contextmanager
def transformer_engine_installed(stand_in: StandIn, kernels: str = "te") -> Iterator[StandIn]:
    """Put the package where imports find it, and choose `kernels`, inside the block."""
    with installed(stand_in.modules(), kernels):
        yield stand_in
