"""Compare a checkpoint with the digests of its manifest."""

import logging
from pathlib import Path
from typing import Literal

from lcdist.checkpoint.manifest import TENSOR_SUFFIX, Checkpoint
from lcdist.distributed.verify import damaged_on_any_rank
from lcdist.rundir.paths import DamagedCheckpointError

log = logging.getLogger(__name__)


def verify_checkpoint(checkpoint: Checkpoint, mode: Literal["full", "size"] = "full") -> None:
    """Compare the SHA-256 of files with the manifest's; all ranks of the world call it.

    Args:
        checkpoint: opened, so that sizes agree.
        mode: `checkpoint.verify`; with "size" the files of tensors are left out.

    Raises:
        DamagedCheckpointError: on all ranks, if a file differs or cannot be read.
    """
    digests = checkpoint.manifest.get("sha256")
    if digests is None:
        log.info("%s keeps no digests: only sizes were compared", checkpoint.path)
        return
    if mode == "size":
        digests = {n: digest for n, digest in digests.items() if Path(n).suffix != TENSOR_SUFFIX}
    damage = damaged_on_any_rank(checkpoint.path, digests, checkpoint.manifest["files"])
    if damage:
        raise DamagedCheckpointError(checkpoint.path, "; ".join(damage))
