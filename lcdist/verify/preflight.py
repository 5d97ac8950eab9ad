"""What is looked at before the first step: one folder for all ranks, room to save in and to
offload to, clocks.

A run folder on a disk of one machine, or a full one, would show at the first save, hours in.
"""

import logging
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch.distributed as dist

from lcdist.hardware.device import has_cuda
from lcdist.plan import Plan

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


def check_host_memory(plan: Plan, available: int | None = None) -> Plan:
    """The plan, without offload where `train.offload = "auto"` and a host has too little memory.

    All ranks call it. available: bytes on this rank's host; None: as found. Raises ValueError on
    every rank where memory is short for `train.offload = "host"`.
    """
    if not plan.memory.offloads:
        return plan
    mine = (socket.gethostname(), host_memory() if available is None else available)
    everyone: list[tuple[str, int]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    ranks, free = Counter(host for host, _ in everyone), {}
    for host, found in everyone:
        free[host] = min(found, free.get(host, found))
    short = [
        f"{host} has {free[host] / 2**30:.2f} GiB of memory left and its {count} ranks would fill "
        f"{count * plan.memory.host_bytes / 2**30:.2f} GiB with inputs of layers"
        for host, count in sorted(ranks.items())
        if count * plan.memory.host_bytes > free[host]
    ]
    if not has_cuda() and dist.get_rank() == 0:
        log.warning("train.offload = 'host' on a CPU copies within one memory and saves nothing")
    if not short:
        return plan
    if plan.config.train.offload == "host":
        raise ValueError(
            f"train.offload = 'host': {'; '.join(short)}; use train.offload = 'none', fewer "
            "ranks on a host, or a greater parallel.cp_size"
        )
    if dist.get_rank() == 0:
        log.warning("train.offload = 'auto' keeps activations on the device: %s", "; ".join(short))
    return replace(plan, may_offload=False)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this host can still give to this process: what is free, and what a limit leaves.

    root: where /proc and /sys are. Batch systems limit a job by the control group it runs in, of
    version 2, or by one above it.
    """
    found, mounted = psutil.virtual_memory().available, root / "sys/fs/cgroup"
    mine = root / "proc/self/cgroup"
    for line in mine.read_text().splitlines() if mine.exists() else []:
        group = mounted / line.removeprefix("0::/")
        while line.startswith("0::/") and group.is_relative_to(mounted):
            limit, used = group / "memory.max", group / "memory.current"
            if limit.exists() and used.exists() and limit.read_text().strip() != "max":
                found = min(found, max(0, int(limit.read_text()) - int(used.read_text())))
            group = group.parent
    return found
