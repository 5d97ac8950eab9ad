"""Writes checkpoints that are whole or not there, while training waits or while it goes on.

A checkpoint is written under another name and renamed when all of it is there, manifest included,
so a kill at any moment leaves the ones before it as they were. Written asynchronously, the state is
copied to the host first and the next steps are taken while threads write the copy; there is never
more than one copy.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.read import FORMAT, HALF, MANIFEST
from lcdist.checkpoint.writer import staged, write_in_this_process
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.rundir.paths import (
    LATEST,
    STEP_PREFIX,
    CheckpointError,
    checkpoint_name,
    latest_in,
    step_of,
)
from megatron.core import dist_checkpointing

log = logging.getLogger(__name__)


@dataclass
class _Writing:
    """A checkpoint under way: its step, its manifest, Megatron's request and who carries it out."""

    step: int
    manifest: Mapping[str, Any]
    request: Any
    thread: threading.Thread


class Checkpointer:
    """Writes checkpoints of one run into `folder`, keeping the last `keep_last`.

    keep_every: those of multiples of so many steps are kept as well; 0: none.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._writing: _Writing | None = None
        write_in_this_process()

    def save(self, step: int, state: dict[str, Any], manifest: Mapping[str, Any]) -> Path:
        """Write the sharded `state` and the manifest as `step_<step>`; all ranks call it.

        Returns the folder's final name. Nothing carries that name before all of it is written.
        Raises CheckpointError on every rank where it cannot be.
        """
        self._start(step, state, manifest, own=False)
        self.finish()
        return self._final(step)

    def begin(self, step: int, state: dict[str, Any], manifest: Mapping[str, Any]) -> None:
        """Copy the state to the host and start to write it; all ranks call it, then `finish`.

        What was begun before has been finished. Raises as `save`.
        """
        self._start(step, state, manifest, own=True)

    def _start(
        self, step: int, state: dict[str, Any], manifest: Mapping[str, Any], own: bool
    ) -> None:
        assert not self.unfinished, "one at a time: finish what was begun"
        half = self._half(step)

        def prepare() -> None:
            self.sweep()
            self._check_room()
            half.mkdir(parents=True)

        run_on_rank_zero(prepare)
        request: Any = dist_checkpointing.save(state, str(half), async_sharded_save=True)
        # Not a daemon: leaving the interpreter waits until it has written.
        thread = threading.Thread(target=lambda: None)
        if request.async_fn is not None:
            # A rank may have nothing to write.
            rank, buckets, results = request.async_fn_args
            arguments = (rank, staged(buckets, own), results)
            thread = threading.Thread(target=request.async_fn, args=arguments)
        thread.start()
        self._writing = _Writing(step, manifest, request, thread)

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._writing is not None and self._writing.thread.is_alive()

    @property
    def unfinished(self) -> bool:
        """Whether a checkpoint was begun and not finished: the same on all ranks."""
        return self._writing is not None

    def finish(self) -> Path | None:
        """Wait for what was begun and give it its name; all ranks call it. None: nothing was."""
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        writing.thread.join()
        half, final = self._half(writing.step), self._final(writing.step)
        try:
            for finalize in writing.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            raise CheckpointError(self._not_written(final, error)) from error
        run_on_rank_zero(lambda: self._finish(half, final, writing))
        return final

    def _final(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def _half(self, step: int) -> Path:
        return self.folder / f"{HALF}{self._final(step).name}"

    def _check_room(self) -> None:
        newest = latest_in(self.folder)
        if newest is None:
            return
        needed = sum(file.stat().st_size for file in newest.iterdir())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"no room for a checkpoint in {self.folder}: {free / 2**30:.2f} GiB are free, the "
                f"last one has {needed / 2**30:.2f} GiB. It is whole: free some space, or lower "
                "checkpoint.keep_last, then start the same command again"
            )

    def _not_written(self, final: Path, error: CheckpointException) -> str:
        causes = {str(cause[0]) for cause in error.failures.values()}
        said = f" ({'; '.join(sorted(causes))})" if causes else ""
        return (
            f"{final} could not be written{said}. The checkpoints before it are whole: free space "
            "or mend the file system, then start the same command again"
        )

    def _finish(self, half: Path, final: Path, writing: _Writing) -> None:
        files = {p.name: p.stat().st_size for p in sorted(half.iterdir()) if p.is_file()}
        content = {"format": FORMAT, "step": writing.step, **writing.manifest, "files": files}
        _write_durably(half / MANIFEST, json.dumps(content, indent=1))
        if final.exists():
            # The same step again, after resuming from an older one: same content, newer name.
            final.rename(self.folder / f"{HALF}old-{final.name}")
        half.rename(final)
        _write_durably(self.folder / f"{LATEST}.new", final.name + "\n")
        (self.folder / f"{LATEST}.new").replace(self.folder / LATEST)
        _sync(self.folder)
        for old in sorted(self.folder.glob(f"{STEP_PREFIX}*"))[: -self.keep_last]:
            if old != final and not self._stays(old):
                old.rename(self.folder / f"{HALF}old-{old.name}")
        self.sweep()

    def _stays(self, checkpoint: Path) -> bool:
        return bool(self.keep_every) and step_of(checkpoint) % self.keep_every == 0

    def sweep(self) -> None:
        """Remove what an interrupted save left behind; rank 0 only."""
        for half in self.folder.glob(f"{HALF}*"):
            shutil.rmtree(half)


def _write_durably(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
