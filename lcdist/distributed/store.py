"""The key-value store that all ranks share."""

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


def shared_store(name: str) -> Any:
    """Return a torch Store shared by all ranks, on a connection of its own.

    Under torchrun the launcher's agent hosts it, so it outlives any rank.

    Args:
        name: prefix of the keys.
    """
    # torch has no public function that returns the store of the default process group.
    store: Any = distributed_c10d._get_default_store()
    innermost = store
    while isinstance(innermost, distributed_c10d.PrefixStore):
        innermost = innermost.underlying_store
    # A FileStore has no connection to share. Its file is deleted as soon as as many copies of the
    # store have been destroyed as there are ranks, so it must not be cloned.
    if not isinstance(innermost, dist.FileStore):  # pyright: ignore[reportPrivateImportUsage]
        store = store.clone()
    return distributed_c10d.PrefixStore(name, store)
