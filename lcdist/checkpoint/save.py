"""Write checkpoints atomically, while training waits or in the background.

A checkpoint is written under a temporary name and renamed when it is complete, manifest included.
A process killed at any moment leaves the earlier checkpoints as they were. There is never more than
one save at a time. Training goes on

- with `save`, when the checkpoint has its name. Files are hashed while they are written;
- with `begin`, when the files are written. A thread reads them back and hashes them during the next
  step, since beside the writes that may take as long as the writes;
- with `begin` and a copy, when the state is in host memory. Threads write and hash the copy during
  the next steps.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lcdist.checkpoint.manifest import write_latest, write_manifest
from lcdist.checkpoint.writer import copy_to_host, start_no_process, start_save, write_buckets
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.rundir.paths import (
    STEP_PREFIX,
    CheckpointError,
    checkpoint_name,
    latest_in,
    step_of,
)
from lcdist.utils.atomic import sync_folder
from lcdist.utils.digests import sha256_of_all

PARTIAL_PREFIX = ".writing-"
DISCARDED_PREFIX = f"{PARTIAL_PREFIX}old-"


class _PendingSave:
    """A checkpoint being written: its step, the content of its manifest, and Megatron's request.

    Attributes:
        digests: SHA-256 of the files of this rank's share by name, complete after `wait`.
        files: this rank's share.
        written: whether Megatron knows of all ranks that their share is written.
    """

    def __init__(self, step: int, manifest: Mapping[str, Any], request: Any) -> None:
        self.step, self.manifest, self.request = step, manifest, request
        self.digests: dict[str, str] = {}
        self.files: list[Path] = []
        self.written = False
        self._thread = threading.Thread()

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do the next part of this rank's work in a thread."""
        # Not a daemon: the interpreter exits only after the thread has ended.
        self._thread = threading.Thread(target=work, args=arguments)
        self._thread.start()

    @property
    def working(self) -> bool:
        """Return whether this rank still writes or hashes."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait for this rank's work."""
        if self.working:
            self._thread.join()

    def read_back(self) -> None:
        """Hash this rank's files. Those that cannot be read are left to `write_manifest`."""
        with contextlib.suppress(OSError):
            self.digests |= sha256_of_all(self.files)


class Checkpointer:
    """Writes the checkpoints of one run and deletes old ones.

    Args:
        folder: folder of the run's checkpoints.
        keep_last: number of newest checkpoints to keep; the newest that `note_finite_step` proved
            is kept too.
        keep_every: checkpoints at multiples of this many steps are kept too; 0 for none.

    Attributes:
        seconds: that callers have waited for saves on this rank.
        on_saved: called after each save.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._pending: _PendingSave | None = None
        self._finite_step, self._may_prune = 0, True
        self.seconds, self.on_saved = 0.0, lambda: None
        start_no_process()

    def save(self, step: int, state: dict[str, Any], manifest: Mapping[str, Any]) -> Path:
        """Write the sharded `state` and the manifest, and return the folder; all ranks call it.

        Raises:
            CheckpointError: on every rank, if the checkpoint cannot be written.
        """
        with self._timed():
            self._start(step, state, manifest, copy=False, hash_beside=True)
        self.finish()
        return self._final(step)

    def begin(
        self, step: int, state: dict[str, Any], manifest: Mapping[str, Any], copy: bool
    ) -> None:
        """Start a save that `finish` completes later; all ranks call both.

        Args:
            step, state, manifest: as for `save`. An earlier save must have been finished.
            copy: write a copy of the state in the background. Otherwise the state is written at
                once, and only hashed in the background.

        Raises:
            CheckpointError: as `save`.
        """
        with self._timed():
            self._start(step, state, manifest, copy, hash_beside=copy)
            if self._pending is not None and not copy:
                self._end_write(self._pending)
                self._pending.run(self._pending.read_back)

    def _start(
        self,
        step: int,
        state: dict[str, Any],
        manifest: Mapping[str, Any],
        copy: bool,
        hash_beside: bool,
    ) -> None:
        assert not self.unfinished, "one save at a time: finish the earlier one first"
        partial = self._partial(step)

        def prepare() -> None:
            sweep_leftovers(self.folder)
            self._check_free_space()
            partial.mkdir(parents=True)

        run_on_rank_zero(prepare)
        request = start_save(state, partial)
        pending = self._pending = _PendingSave(step, manifest, request)
        if request.async_fn is not None:
            # None if this rank has nothing to write.
            _, buckets, results = request.async_fn_args
            pending.files = [Path(name) for name, *_ in buckets]
            digests = pending.digests if hash_beside else None
            pending.run(write_buckets, copy_to_host(buckets, copy), results, digests)

    def _end_write(self, pending: _PendingSave) -> None:
        """Wait until all ranks have written; on an error, forget the save and raise."""
        pending.wait()
        final, self._pending = self._final(pending.step), None
        try:
            for finalize in pending.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            causes = {str(cause[0]) for cause in error.failures.values()}
            raise CheckpointError(self._write_error(final, causes)) from error
        except OSError as error:
            # Megatron writes the metadata on one rank, outside of its own error handling.
            raise CheckpointError(self._write_error(final, {str(error)})) from error
        # Megatron's request holds the tensors.
        pending.request, pending.written, self._pending = None, True, pending

    @property
    def working(self) -> bool:
        """Return whether this rank is still writing or hashing."""
        return self._pending is not None and self._pending.working

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
        pending = self._pending
        if pending is None:
            return None
        with self._timed():
            if not pending.written:
                self._end_write(pending)
            pending.wait()
            self._pending = None
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, pending.digests)
            digests = {name: digest for share in shares for name, digest in share.items()}
            run_on_rank_zero(lambda: self._publish(pending, digests))
        self.on_saved()
        return self._final(pending.step)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time within to `seconds`."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

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

    def _write_error(self, final: Path, causes: set[str]) -> str:
        listed = f" ({'; '.join(sorted(causes))})" if causes else ""
        return (
            f"{final} could not be written{listed}. The earlier checkpoints are complete: free "
            "space or repair the file system, then start the same command again"
        )

    def _publish(self, pending: _PendingSave, digests: Mapping[str, str]) -> None:
        """Write the manifest, rename the folder, update `latest`, delete old checkpoints."""
        partial, final = self._partial(pending.step), self._final(pending.step)
        write_manifest(partial, pending.step, pending.manifest, digests)
        if final.exists():
            # The same step after resuming from an older one: the newer checkpoint replaces it.
            final.rename(self._discarded(final))
        partial.rename(final)
        write_latest(final)
        sync_folder(self.folder)
        self._prune(final)
        self._may_prune = True
        sweep_leftovers(self.folder)

    def _discarded(self, checkpoint: Path) -> Path:
        """Return the name a checkpoint gets before it is deleted: no `step_` folder is partial."""
        return self.folder / f"{DISCARDED_PREFIX}{checkpoint.name}"

    def note_finite_step(self, step: int) -> None:
        """Note that `step` was finite, which proves the checkpoints before it.

        A checkpoint that no finite step has followed may hold weights that have diverged. On rank
        0, the first finite step after a save deletes what only had to stay until then.
        """
        self._finite_step = step
        if self._may_prune and dist.get_rank() == 0:
            self._may_prune = False
            with contextlib.suppress(OSError):
                self._prune()
                sweep_leftovers(self.folder, only_discarded=True)

    def _prune(self, newest: Path | None = None) -> None:
        """Rename the checkpoints that need not stay; `newest` stays in any case."""
        saved = sorted(self.folder.glob(f"{STEP_PREFIX}*"), key=step_of)
        proven = [path for path in saved if step_of(path) < self._finite_step]
        kept = {*saved[-self.keep_last :], *proven[-1:], newest}
        for old in saved:
            if old not in kept and not self._is_kept(old):
                old.rename(self._discarded(old))

    def _is_kept(self, checkpoint: Path) -> bool:
        return bool(self.keep_every) and step_of(checkpoint) % self.keep_every == 0


def sweep_leftovers(folder: Path, only_discarded: bool = False) -> None:
    """Delete what an interrupted save or deletion left in a folder of checkpoints; rank 0 only.

    only_discarded: leave a checkpoint that is being written.
    """
    for leftover in folder.glob(f"{DISCARDED_PREFIX if only_discarded else PARTIAL_PREFIX}*"):
        shutil.rmtree(leftover)
