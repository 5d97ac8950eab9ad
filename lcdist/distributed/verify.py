"""Compare files with their SHA-256, each file on one rank."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lcdist.utils.digests import damaged_files


def damaged_on_any_rank(
    folder: Path, digests: Mapping[str, str], sizes: Mapping[str, int]
) -> list[str]:
    """Return what is wrong with the files of `folder`; all ranks of the world call it, if any.

    Args:
        folder: folder of the files, the same for all ranks.
        digests: expected SHA-256 by file name.
        sizes: bytes by file name, by which the files are shared out.

    Returns:
        One text for each wrong file, the same on all ranks.
    """
    if not dist.is_initialized():
        return damaged_files(folder, digests)
    shares = share_out({name: sizes[name] for name in digests}, dist.get_world_size())
    own = {name: digests[name] for name in shares[dist.get_rank()]}
    found: list[Any] = [None] * len(shares)
    dist.all_gather_object(found, damaged_files(folder, own))
    return sorted(text for texts in found for text in texts)


def refuse_damaged(
    folder: Path, digests: Mapping[str, str], sizes: Mapping[str, int], source: str, remedy: str
) -> None:
    """Raise ValueError on all ranks if a file of `folder` is damaged; all ranks call it.

    Args:
        folder, digests, sizes: as for `damaged_on_any_rank`.
        source: file that holds the digests, which may be the damaged one.
        remedy: what to do, for the message.
    """
    damage = damaged_on_any_rank(folder, digests, sizes)
    if damage:
        raise ValueError(f"{folder} is damaged: {'; '.join(damage)} (from {source}); {remedy}")


def share_out(sizes: Mapping[str, int], ranks: int) -> Sequence[list[str]]:
    """Return the files of each rank: the largest first, each to the rank with the fewest bytes."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += sizes[name]
    return shares
