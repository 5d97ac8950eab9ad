"""The run folder: who may write to it, what it already holds, and how the run in it stands.

Rank 0 alone looks and writes; what it finds wrong is raised on every rank, so that nobody waits
for a rank that has given up.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from lcdist.config import dump, load
from lcdist.config.schema import Config
from lcdist.utils.atomic import write_file

CONFIG_FILE = "config.toml"
STATUS_FILE = "status.json"
LOCK_FILE = "lock"
# What may change between the starts of one run. Everything else would make it another run.
MAY_CHANGE = (
    "attention.impl",
    "parallel.",
    "optim.",
    "lora.lr_ratio",
    "train.steps",
    "train.micro_batch_size",
    "train.recompute",
    "train.offload",
    "train.mlp",
    "train.loss",
    "checkpoint.every",
    "checkpoint.keep_",
    "checkpoint.asynchronous",
    "log.",
    "evaluate.",
)
_T = TypeVar("_T")


def run_on_rank_zero(action: Callable[[], _T]) -> _T:
    """`action()` run on rank 0 alone; every rank gets its (picklable) result or its exception."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (OSError, ValueError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this run alone; made where it does not exist.

    Raises ValueError on every rank where another living process holds it.
    """
    held: list[Any] = []

    def claim() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK_FILE).open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            handle.close()
            raise ValueError(
                f"log.folder = '{folder}' is in use by {owner}; "
                "wait for that run, stop it, or choose another log.folder"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        held.append(handle)

    run_on_rank_zero(claim)
    try:
        yield
    finally:
        for handle in held:
            handle.close()


def check_same_run(folder: Path, config: Config) -> list[str]:
    """The settings that differ from those the run in `folder` was last started with.

    An empty list where there is no run yet. Raises ValueError where the folder holds another run:
    one whose model, data or sample order would not be this one's.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        return []
    before, now = _flat(load(file)), _flat(config)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    forbidden = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if forbidden:
        listed = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in forbidden)
        raise ValueError(
            f"log.folder = '{folder}' holds another run: {listed}. Choose another log.folder (and "
            "start from this run's weights with checkpoint.load), or restore the settings"
        )
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]


def write_config(folder: Path, config: Config) -> None:
    """The resolved configuration as TOML that loads back."""
    write_file(folder / CONFIG_FILE, dump(config))


def write_status(folder: Path, status: str, step: int, reason: str) -> None:
    """How the run stands: "running", "stopped" or "finished", at which step, and why."""
    table = {"status": status, "step": step, "reason": reason}
    write_file(folder / STATUS_FILE, json.dumps(table) + "\n")


def read_status(folder: Path) -> Mapping[str, Any] | None:
    """What `write_status` wrote last, or None."""
    file = folder / STATUS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            values |= _flat(value, f"{key}.")
        else:
            values[key] = value
    return values
