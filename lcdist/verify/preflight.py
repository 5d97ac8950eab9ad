"""Checks before the first step: shared run folder, disk space, host memory, clocks.

Without them, a run folder on a local disk or a full disk would fail at the first save, after hours.
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

# Seconds to wait for a new file on a network file system. NFS caches a folder for up to a minute,
# but asks the server again for a name that is not in its cache.
VISIBLE_WITHIN = 15.0
MAX_CLOCK_SKEW = 5.0
PROBE_PREFIX = ".here-"


def check_start(
    folder: Path, checkpoint_bytes: int, visible_within: float = VISIBLE_WITHIN
) -> None:
    """Check that all ranks share the run folder and that a checkpoint fits; all ranks call it.

    Logs a warning for clocks that differ by more than MAX_CLOCK_SKEW seconds.

    Args:
        folder: the run folder; exists on rank 0.
        checkpoint_bytes: size of one checkpoint.
        visible_within: seconds until a file of rank 0 must be visible to all ranks.

    Raises:
        ValueError: on every rank, if a rank does not see rank 0's folder or disk space is short.
    """
    box = [uuid.uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    probe = folder / f"{PROBE_PREFIX}{box[0]}"
    if dist.get_rank() == 0:
        probe.touch()
    dist.barrier()
    now = time.time()
    own = (socket.gethostname(), _appears(probe, visible_within), now)
    ranks: list[tuple[str, bool, float]] = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    if dist.get_rank() == 0:
        _warn_about_clocks([(host, clock) for host, _, clock in ranks])
        probe.unlink()
    blind_hosts = sorted({host for host, visible, _ in ranks if not visible})
    if blind_hosts:
        raise ValueError(
            f"log.folder = '{folder}' is not the same folder on all machines: "
            f"{', '.join(blind_hosts)} does not see what {ranks[0][0]} writes there; choose a "
            "folder on a file system that all of them share"
        )
    _check_disk_space(folder, checkpoint_bytes)


def _appears(file: Path, seconds: float) -> bool:
    """Return whether `file` exists within `seconds`."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _warn_about_clocks(clocks: Sequence[tuple[str, float]]) -> None:
    """Log hosts with a wrong clock.

    clocks: (host, time in seconds) of each rank, read right after a barrier. Correct clocks agree
    to well under a second.
    """
    median = sorted(clock for _, clock in clocks)[len(clocks) // 2]
    skews = {host: clock - median for host, clock in clocks}
    wrong = {host: skew for host, skew in skews.items() if abs(skew) > MAX_CLOCK_SKEW}
    for host, skew in sorted(wrong.items()):
        log.warning(
            "the clock of %s is %+.0f s off: times in logs and metrics will be wrong; start "
            "chronyd or ntpd there",
            host,
            skew,
        )


def _check_disk_space(folder: Path, checkpoint_bytes: int) -> None:
    """Raise ValueError on every rank if one checkpoint does not fit on rank 0's file system."""
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
    """Return the plan, with offload disabled if a host lacks memory and train.offload is "auto".

    All ranks call it.

    Args:
        plan: of the run.
        available: free bytes on this rank's host; None: measure.

    Raises:
        ValueError: on every rank, if a host lacks memory for what is to be offloaded: inputs of
            layers where train.offload is "host", and optimizer and parameters of DeepSpeed.
    """
    if not plan.memory.host_bytes:
        return plan
    own = (socket.gethostname(), host_memory() if available is None else available)
    ranks: list[tuple[str, int]] = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    if plan.memory.offloads and not has_cuda() and dist.get_rank() == 0:
        log.warning("train.offload = 'host' on a CPU copies within one memory and saves nothing")
    states = plan.memory.host_bytes - plan.memory.offloaded_bytes
    short = _short_hosts(ranks, states, "optimizer states and weights")
    if short:
        settings = plan.config.deepspeed
        raise ValueError(
            f"deepspeed.offload_optimizer = '{settings.offload_optimizer}', offload_parameters = "
            f"'{settings.offload_parameters}': {short}; use 'none' or 'nvme', fewer ranks on a "
            "host, or more hosts"
        )
    what = "inputs of layers" + (", optimizer states and weights" if states else "")
    short = _short_hosts(ranks, plan.memory.host_bytes, what)
    if not short:
        return plan
    if plan.config.train.offload == "host":
        raise ValueError(
            f"train.offload = 'host': {short}; use train.offload = 'none', fewer ranks on a host, "
            "or a greater parallel.cp_size"
        )
    if dist.get_rank() == 0:
        log.warning("train.offload = 'auto' keeps activations on the device: %s", short)
    return replace(plan, may_offload=False)


def _short_hosts(ranks: Sequence[tuple[str, int]], needed: int, what: str) -> str:
    """Return the hosts that have too little memory, as words; empty if none.

    Args:
        ranks: (host, its free bytes) of each rank.
        needed: bytes of one rank.
        what: fills them.
    """
    ranks_per_host, free = Counter(host for host, _ in ranks), dict[str, int]()
    for host, free_bytes in ranks:
        free[host] = min(free_bytes, free.get(host, free_bytes))
    return "; ".join(
        f"{host} has {free[host] / 2**30:.2f} GiB of memory left and its {count} ranks would fill "
        f"{count * needed / 2**30:.2f} GiB with {what}"
        for host, count in sorted(ranks_per_host.items())
        if count * needed > free[host]
    )


def host_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still allocate: free memory and control group limits.

    Batch systems limit a job by its control group (version 2) or by a parent of it.

    root: folder that contains proc and sys.
    """
    available, cgroups = psutil.virtual_memory().available, root / "sys/fs/cgroup"
    own_cgroups = root / "proc/self/cgroup"
    for line in own_cgroups.read_text().splitlines() if own_cgroups.exists() else []:
        group = cgroups / line.removeprefix("0::/")
        while line.startswith("0::/") and group.is_relative_to(cgroups):
            limit, used = group / "memory.max", group / "memory.current"
            if limit.exists() and used.exists() and limit.read_text().strip() != "max":
                left = max(0, int(limit.read_text()) - int(used.read_text()))
                available = min(available, left)
            group = group.parent
    return available
