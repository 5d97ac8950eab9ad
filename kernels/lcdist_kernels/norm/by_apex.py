"""The norm by apex, with the residual and the sum of gradients as torch operations beside it."""

from typing import Any, NamedTuple

from torch import Tensor

from lcdist_kernels.apex import norm_bwd, norm_fwd


class ByApex(NamedTuple):
    """Norms by an extension that `apex.find` returned; eps: added to the mean square."""

    module: Any
    eps: float

    def fwd(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, n and r of x and delta `[.., h]`, as `plain.fwd`."""
        total = x if delta is None else x + delta
        return total, *norm_fwd(self.module, total, weight, eps)

    def scale(self, total: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """Return n again: apex rounds in an order of its own, so it computes r again as well."""
        return norm_fwd(self.module, total, weight, self.eps)[0]

    def bwd(
        self,
        total: Tensor,
        rstd: Tensor,
        weight: Tensor,
        dnormed: Tensor,
        dtotal: Tensor | None,
        needs_dweight: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of t and of the weight, as `plain.bwd`."""
        dx, dweight = norm_bwd(self.module, dnormed, total, rstd, weight, self.eps)
        if dtotal is not None:
            dx = dx.add_(dtotal)
        return dx, dweight if needs_dweight else None
