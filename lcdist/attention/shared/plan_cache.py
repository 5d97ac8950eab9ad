"""Cache of communication and work plans, bounded by the bytes of their tensors.

A plan depends on small values alone: options, layout, rank, document borders, device. All layers
of a micro-batch, and all micro-batches without packed documents, share it.
"""

from lcdist_kernels.plans import PlanCache

MAX_BYTES = 1 << 30

cached_plan = PlanCache(MAX_BYTES).cached
