"""What is looked at before the first step: one folder for all ranks, room to save in, clocks.

A run folder on a disk of one machine, or a full one, would show at the first save, hours in.
"""

import logging
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

log = logging.getLogger(__name__)

# A network file system may show a new file late: NFS caches a folder for up to a minute, but looks
# again where a name is asked for that it does not know.
SEEN_WITHIN = 15.0
SKEW = 5.0
TOKEN = ".here-"


def check_start(folder: Path, checkpoint_bytes: int, seen_within: float = SEEN_WITHIN) -> None:
    """All ranks call it; `folder` exists on rank 0. checkpoint_bytes: of one checkpoint.

    Raises ValueError on every rank where a rank does not see the folder that rank 0 sees, or where
    the file system has no room for a checkpoint. Clocks that differ by more than 5 s are logged.
    """
    box = [uuid.uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    token = folder / f"{TOKEN}{box[0]}"
    if dist.get_rank() == 0:
        token.touch()
    dist.barrier()
    now = time.time()
    mine = (socket.gethostname(), _appears(token, seen_within), now)
    everyone: list[tuple[str, bool, float]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        _warn_of_clocks([(host, clock) for host, _, clock in everyone])
        token.unlink()
    blind = sorted({host for host, seen, _ in everyone if not seen})
    if blind:
        raise ValueError(
            f"log.folder = '{folder}' is not the same folder on all machines: {', '.join(blind)} "
            f"does not see what {everyone[0][0]} writes there; choose a folder on a file system "
            "that all of them share"
        )
    _check_room(folder, checkpoint_bytes)


def _appears(file: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _warn_of_clocks(clocks: Sequence[tuple[str, float]]) -> None:
    """Read right after a barrier, so clocks that are right agree to well under a second."""
    middle = sorted(clock for _, clock in clocks)[len(clocks) // 2]
    wrong = {host: clock - middle for host, clock in clocks if abs(clock - middle) > SKEW}
    for host, skew in sorted(wrong.items()):
        log.warning(
            "the clock of %s is %+.0f s off: times in logs and metrics will be wrong; start "
            "chronyd or ntpd there",
            host,
            skew,
        )


def _check_room(folder: Path, checkpoint_bytes: int) -> None:
    box: list[int] = [0]
    if dist.get_rank() == 0:
        box = [shutil.disk_usage(folder).free]
    dist.broadcast_object_list(box, src=0)
    if box[0] < checkpoint_bytes:
        raise ValueError(
            f"log.folder = '{folder}': {box[0] / 2**30:.2f} GiB are free there and one checkpoint "
            f"takes {checkpoint_bytes / 2**30:.2f} GiB; free some space, lower "
            "checkpoint.keep_last, or choose another log.folder"
        )
