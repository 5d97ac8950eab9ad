"""Cross-entropy over a shard of the vocabulary: two passes over logits in their own dtype."""

from lcdist_kernels.vocab_loss.op import IMPLS, grad_, stats
from lcdist_kernels.vocab_loss.reference import grad_reference, stats_reference

__all__ = ["IMPLS", "grad_", "grad_reference", "stats", "stats_reference"]
