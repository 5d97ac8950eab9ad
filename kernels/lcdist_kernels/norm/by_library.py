"""The norm of another package, with residual and sum of gradients as torch operations beside it."""

from typing import Any, NamedTuple

from torch import Tensor


class ByLibrary(NamedTuple):
    """Norms of another package.

    Attributes:
        library: our module with its `norm_fwd` and `norm_bwd`.
        module: the extension that `extensions.find` returned for its part "norm".
        eps: added to the mean square.
    """

    library: Any
    module: Any
    eps: float

    def fwd(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, n and r of x and delta `[.., h]`, as `plain.fwd`."""
        total = x if delta is None else x + delta
        return total, *self.library.norm_fwd(self.module, total, weight, eps)

    def scale(self, total: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
        """Return n again, and r with it: each package rounds in an order of its own."""
        return self.library.norm_fwd(self.module, total, weight, self.eps)[0]

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
        dx, dweight = self.library.norm_bwd(self.module, dnormed, total, rstd, weight, self.eps)
        if dtotal is not None:
            dx = dx.add_(dtotal)
        return dx, dweight if needs_dweight else None
