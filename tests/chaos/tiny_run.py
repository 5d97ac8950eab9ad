"""A training run of a second: start it, kill it, and compare how it ended with another."""

import contextlib
import json
import multiprocessing as mp
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from lcdist.commands.main import main
from lcdist.rundir.paths import latest_in
from lcdist.rundir.records import read_records
from lcdist.rundir.status import read_status
from lcdist.verify.at_rest import check_at_rest
from tests.chaos.stdio import output_to
from tests.checkpoint.stored import stored_tensors
from tests.distributed import COLLECTIVE_TIMEOUT
from tests.train.test_resume import computed

STEPS = 8
SETTINGS = """
[model]
vocab_size = 258
num_layers = 1
hidden_size = 16
nheads = 2
ffn_hidden_size = 16
[data]
path = "{data}"
[train]
seqlen = 16
steps = {steps}
global_batch_size = 4
seed = 3
[optim]
lr = 1e-3
schedule = "constant"
[checkpoint]
every = 2
[log]
folder = "{folder}"
tensorboard = false
peak_tflops = 1
"""
OTHER_LOSSES = "other losses in metrics.jsonl"
# A start that takes longer hangs.
SECONDS = 120.0


def write_data(folder: Path) -> Path:
    """Make a folder of tokens out of a few words."""
    words, text = random.Random(0), folder / "text"
    text.mkdir(parents=True)
    for number in range(8):
        line = " ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=100))
        (text / f"{number}.txt").write_text(line)
    options = ["--tokenizer", "bytes", "--workers", "1"]
    with output_to(folder / "tokenize.log"):
        status = main(["tokenize", str(text), str(folder / "data"), *options])
    assert status == 0, (folder / "tokenize.log").read_text()
    return folder / "data"


def write_settings(file: Path, data: Path, folder: Path, steps: int = STEPS) -> Path:
    """Write the configuration of a run in `folder`."""
    file.write_text(SETTINGS.format(data=data, folder=folder, steps=steps))
    return file


class Start:
    """One start of `lcdist WORDS` on `ranks` processes; their output goes to the file `printed`."""

    def __init__(self, words: Sequence[str], printed: Path, ranks: int = 1) -> None:
        context = mp.get_context("forkserver")
        # Has no effect once the fork server runs.
        context.set_forkserver_preload(["tests.preload", "tests.chaos.tiny_run"])
        self.printed = printed
        printed.write_bytes(b"")
        self._folder = tempfile.TemporaryDirectory(prefix="lcdist-chaos-")
        store = f"{self._folder.name}/store"
        self.ranks: list[ForkServerProcess] = []
        for rank in range(ranks):
            process = context.Process(
                target=_rank_main, args=(list(words), rank, ranks, store, printed), daemon=False
            )
            process.start()
            self.ranks.append(process)

    def wait(self, seconds: float = SECONDS) -> bool:
        """Wait up to `seconds`; return whether all ranks have ended."""
        for process in self.ranks:
            process.join(seconds)
            if process.is_alive():
                return False
        return True

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to one rank, or to all of them, and to what they started."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            # It may end by itself meanwhile.
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            process.join()

    def end(self) -> int:
        """Wait for the end, kill what hangs; return the exit status, -9 for a start that hung."""
        if not self.wait():
            self.kill()
        self._folder.cleanup()
        return next((p.exitcode or 0 for p in self.ranks if p.exitcode), 0)


def _rank_main(words: list[str], rank: int, ranks: int, store: str, printed: Path) -> None:
    with output_to(printed, append=True):
        torch.set_num_threads(1)
        # Log messages are not broken over lines.
        os.environ |= {"RANK": str(rank), "COLUMNS": "1000"}
        if ranks > 1:
            os.environ["WORLD_SIZE"] = str(ranks)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=COLLECTIVE_TIMEOUT,
            )
        try:
            status = main(words)
        except BaseException:
            traceback.print_exc()
            status = 1
    sys.exit(status)


def difference(folder: Path, expected: Path) -> str | None:
    """Return how the end of a run differs from that of an undisturbed one; None if it does not.

    Compared are all tensors, bit for bit, and the losses of every step. Besides, the run says that
    it is finished, all its files fit their digests, and nothing half written is left.
    """
    status, newest = read_status(folder), latest_in(folder / "checkpoints")
    wanted = latest_in(expected / "checkpoints")
    assert wanted is not None, f"{expected} has no checkpoint"
    if status is None or status["status"] != "finished" or not (folder / "DONE").exists():
        return f"not finished: {status}"
    if newest is None or newest.name != wanted.name:
        return f"the newest checkpoint is {newest}, not {wanted.name}"
    ours, theirs = stored_tensors(newest), stored_tensors(wanted)
    names = sorted(ours.keys() ^ theirs.keys()) or [
        name for name in theirs if not _same_bits(ours[name], theirs[name])
    ]
    if names:
        return f"other tensors: {', '.join(names)}"
    for key in ("loader", "random_states", "skipped_steps"):
        if _manifest(newest).get(key) != _manifest(wanted).get(key):
            return f"other {key} in the manifest"
    losses = [
        [computed(record) for record in read_records(run / "metrics.jsonl")]
        for run in (folder, expected)
    ]
    if losses[0] != losses[1]:
        return OTHER_LOSSES
    left = [path.name for path in (folder / "checkpoints").glob(".*")]
    damaged = [f"{found.folder.name}: {found.damage}" for found in check_at_rest(folder)
               if found.damage and not found.folder.name.startswith("damaged_")]  # fmt: skip
    return f"left behind: {left}, damaged: {damaged}" if left or damaged else None


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and _bytes(a) == _bytes(b)


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "lcdist.json").read_text())
