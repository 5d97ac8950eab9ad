"""Write checkpoints atomically, while training waits or in the background.

A checkpoint is written under a temporary name and renamed when it is complete, manifest included.
A process killed at any moment leaves the earlier checkpoints as they were. In the background, the
state is first copied to the host, and threads write the copy during the next steps. There is never
more than one copy.
"""

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.manifest import write_latest, write_manifest
from lcdist.checkpoint.writer import copy_to_host, write_with_threads
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.rundir.paths import (
    STEP_PREFIX,
    CheckpointError,
    checkpoint_name,
    latest_in,
    step_of,
)
from lcdist.utils.atomic import sync_folder
from megatron.core import dist_checkpointing

PARTIAL_PREFIX = ".writing-"


@dataclass
class _PendingSave:
    """A checkpoint being written. request: Megatron's; thread: writes this rank's share."""

    step: int
    manifest: Mapping[str, Any]
    request: Any
    thread: threading.Thread


class Checkpointer:
    """Writes the checkpoints of one run and deletes old ones.

    Args:
        folder: folder of the run's checkpoints.
        keep_last: number of newest checkpoints to keep.
        keep_every: checkpoints at multiples of this many steps are kept too; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._pending: _PendingSave | None = None
        write_with_threads()

    def save(self, step: int, state: dict[str, Any], manifest: Mapping[str, Any]) -> Path:
        """Write the sharded `state` and the manifest, and return the folder; all ranks call it.

        Raises:
            CheckpointError: on every rank, if the checkpoint cannot be written.
        """
        self._start(step, state, manifest, copy=False)
        self.finish()
        return self._final(step)

    def begin(self, step: int, state: dict[str, Any], manifest: Mapping[str, Any]) -> None:
        """Copy the state to the host and start writing it; all ranks call it, and `finish` later.

        An earlier save must have been finished. Raises as `save`.
        """
        self._start(step, state, manifest, copy=True)

    def _start(
        self, step: int, state: dict[str, Any], manifest: Mapping[str, Any], copy: bool
    ) -> None:
        assert not self.unfinished, "one save at a time: finish the earlier one first"
        partial = self._partial(step)

        def prepare() -> None:
            self.sweep()
            self._check_free_space()
            partial.mkdir(parents=True)

        run_on_rank_zero(prepare)
        request: Any = dist_checkpointing.save(state, str(partial), async_sharded_save=True)
        # Not a daemon: the interpreter exits only after the thread has written.
        thread = threading.Thread(target=lambda: None)
        if request.async_fn is not None:
            # None if this rank has nothing to write.
            rank, buckets, results = request.async_fn_args
            arguments = (rank, copy_to_host(buckets, copy), results)
            thread = threading.Thread(target=request.async_fn, args=arguments)
        thread.start()
        self._pending = _PendingSave(step, manifest, request, thread)

    @property
    def writing(self) -> bool:
        """Return whether this rank is still writing."""
        return self._pending is not None and self._pending.thread.is_alive()

    @property
    def unfinished(self) -> bool:
        """Return whether a save was begun and not finished; the same on all ranks."""
        return self._pending is not None

    def finish(self) -> Path | None:
        """Wait for the pending save and rename its folder; all ranks call it.

        Returns:
            The folder of the checkpoint, or None if no save was pending.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        pending.thread.join()
        final = self._final(pending.step)
        try:
            for finalize in pending.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            raise CheckpointError(self._write_error(final, error)) from error
        run_on_rank_zero(lambda: self._publish(pending))
        return final

    def _final(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def _partial(self, step: int) -> Path:
        return self.folder / f"{PARTIAL_PREFIX}{checkpoint_name(step)}"

    def _check_free_space(self) -> None:
        """Raise CheckpointError if the disk has less free space than the last checkpoint needs."""
        newest = latest_in(self.folder)
        if newest is None:
            return
        needed = sum(file.stat().st_size for file in newest.iterdir())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"no room for a checkpoint in {self.folder}: {free / 2**30:.2f} GiB are free, the "
                f"last one has {needed / 2**30:.2f} GiB. It is complete: free some space, or lower "
                "checkpoint.keep_last, then start the same command again"
            )

    def _write_error(self, final: Path, error: CheckpointException) -> str:
        causes = {str(cause[0]) for cause in error.failures.values()}
        listed = f" ({'; '.join(sorted(causes))})" if causes else ""
        return (
            f"{final} could not be written{listed}. The earlier checkpoints are complete: free "
            "space or repair the file system, then start the same command again"
        )

    def _publish(self, pending: _PendingSave) -> None:
        """Write the manifest, rename the folder, update `latest`, delete old checkpoints."""
        partial, final = self._partial(pending.step), self._final(pending.step)
        write_manifest(partial, pending.step, pending.manifest)
        if final.exists():
            # The same step after resuming from an older one: the newer checkpoint replaces it.
            final.rename(self._discarded(final))
        partial.rename(final)
        write_latest(final)
        sync_folder(self.folder)
        for old in sorted(self.folder.glob(f"{STEP_PREFIX}*"))[: -self.keep_last]:
            if old != final and not self._is_kept(old):
                old.rename(self._discarded(old))
        self.sweep()

    def _discarded(self, checkpoint: Path) -> Path:
        """Return the name a checkpoint gets before it is deleted: no `step_` folder is partial."""
        return self.folder / f"{PARTIAL_PREFIX}old-{checkpoint.name}"

    def _is_kept(self, checkpoint: Path) -> bool:
        return bool(self.keep_every) and step_of(checkpoint) % self.keep_every == 0

    def sweep(self) -> None:
        """Delete the leftovers of an interrupted save; rank 0 only."""
        for leftover in self.folder.glob(f"{PARTIAL_PREFIX}*"):
            shutil.rmtree(leftover)
