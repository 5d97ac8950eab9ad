"""One step of AdamW (arXiv:1711.05101) in float64, to compare others with.

With the summed gradient G of n tokens, the norm N of all summed gradients, and c = clip_norm:

    g = G min(1 / n, c / N)
    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    w = w - lr decay w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
"""

from torch import Tensor

from lcdist_kernels.adamw.tensors import Hyper, Tensors, scale_of


def adamw_reference(
    tensors: Tensors, totals: Tensor, hyper: Hyper
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each tensor's new (master, first, second) in float64; arguments as of `adamw_`."""
    scale, is_refused = scale_of(totals, hyper.clip_norm)
    found = []
    for gradient, w, m, v, _, decay, lr_ratio in zip(*tensors, strict=True):
        w, m, v = (x.double() for x in (w, m, v))
        if not is_refused:
            g, lr = gradient.double() * scale, hyper.lr * lr_ratio
            m = hyper.beta1 * m + (1 - hyper.beta1) * g
            v = hyper.beta2 * v + (1 - hyper.beta2) * g.square()
            mean, square = m / (1 - hyper.beta1**hyper.step), v / (1 - hyper.beta2**hyper.step)
            w = w - lr * decay * w - lr * mean / (square.sqrt() + hyper.eps)
        found.append((w, m, v))
    return found
