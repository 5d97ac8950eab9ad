"""What the attention of one batch needs to know beyond q, k and v.

It travels through Megatron in the place of `packed_seq_params`, which every layer hands on to its
core attention untouched.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.layout import ContextLayout
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SequenceParams(PackedSeqParams):
    """layout: the cut of this batch's sequences, where it is not the run's own (evaluation).

    cu_seqlens: one global int32 table a batch row where documents are packed, else None.
    seqlen: tokens of the sequences without padding, where they are not the layout's.
    cache: where decoding keeps keys and values, else None.
    """

    qkv_format: str = "sbhd"  # type: ignore[assignment]
    layout: ContextLayout | None = None
    seqlen: int | None = None
    cu_seqlens: tuple[Tensor, ...] | None = None
    cache: Any = None
