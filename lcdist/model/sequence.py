"""Per-batch attention inputs besides q, k, v: layout, document boundaries, KV cache.

Megatron passes them as `packed_seq_params`, which layers hand to core attention unchanged.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.layout import ContextLayout
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SequenceParams(PackedSeqParams):
    """Attention inputs of one batch.

    layout: of this batch's sequences; None: the training layout.
    seqlen: tokens of the sequences without padding; None: layout.seqlen.
    cu_seqlens: one global int32 table per batch row if documents are packed, else None.
    cache: KV cache that decoding reads and extends, else None.
    """

    qkv_format: str = "sbhd"  # type: ignore[assignment]
    layout: ContextLayout | None = None
    seqlen: int | None = None
    cu_seqlens: tuple[Tensor, ...] | None = None
    cache: Any = None
