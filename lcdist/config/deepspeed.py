"""Configuration of the DeepSpeed engine."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import ELEMENTS, at_least


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """The DeepSpeed engine: what its ranks share, and what waits outside the device.

    Attributes:
        stage: ZeRO (arXiv:1910.02054). 0: every rank holds everything. 1: data- and context-
            parallel ranks share the optimizer's state; 2: gradients, too; 3: weights, too.
        offload_optimizer: Where the optimizer's state lies and is updated.
        offload_parameters: Where weights wait for their layer; needs stage 3.
        nvme_folder: Folder on a fast disk for what is offloaded to `nvme`.
        overlap: Whether gradients are reduced while backward goes on.
        reduce_bucket_elements: Elements of gradients that are reduced at once.
        gather_bucket_elements: Elements of weights that are gathered at once.
        json_file: A DeepSpeed configuration with more settings. What the run decides it must not
            contradict.
    """

    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_folder: str = ""
    overlap: bool = True
    reduce_bucket_elements: int = at_least(1, 2**27, ELEMENTS)
    gather_bucket_elements: int = at_least(1, 2**27, ELEMENTS)
    json_file: str = ""
