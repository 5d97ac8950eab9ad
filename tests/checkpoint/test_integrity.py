"""Test that a changed file is named, and that a run goes on from the newest whole checkpoint."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lcdist.checkpoint import manifest as room
from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.verify import verify_checkpoint
from lcdist.commands.main import main
from lcdist.commands.train import run
from lcdist.distributed.verify import share_out
from lcdist.evaluate.evaluation import evaluate_checkpoint
from lcdist.rundir.paths import CheckpointError, DamagedCheckpointError
from lcdist.utils import digests
from lcdist.utils.digests import damaged_files, read_sums, refuse_damaged_sums, write_sums
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.train.test_resume import STEPS, config_in, launched, unmeasured

FALLEN = f"damaged_step_{STEPS:08d}"


def flip(file: Path, chance: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def zero(file: Path) -> None:
    """Fill the second half of a file with zeros, as a power cut may."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / f"step_{STEPS:08d}"


class Calls:
    """Within, counts the files that this process hashes after they were written."""

    def __enter__(self) -> list[str]:
        self.names: list[str] = []
        self.real = digests.sha256_of

        def counted(file: Path) -> str:
            self.names.append(file.name)
            return self.real(file)

        digests.sha256_of = counted
        return self.names

    def __exit__(self, *_: object) -> None:
        digests.sha256_of = self.real


class Synced:
    """Within, notes what reached the disk before each folder was renamed."""

    def __enter__(self) -> "Synced":
        self.unsynced: list[str] = []
        self._inodes: set[int] = set()
        self.fsync, self.rename = os.fsync, Path.rename

        def fsync(handle: int) -> None:
            self._inodes.add(os.fstat(handle).st_ino)
            self.fsync(handle)

        def rename(path: Path, target: Path) -> Path:
            if path.name.startswith(".writing-step"):
                parts = [path, *path.iterdir()]
                late = [p.name for p in parts if p.stat().st_ino not in self._inodes]
                self.unsynced += late
            return self.rename(path, target)

        os.fsync, Path.rename = fsync, rename  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync, Path.rename = self.fsync, self.rename  # type: ignore[method-assign]


def damage_and_go_on(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Train, damage the newest checkpoint and start again; return what was seen on this rank."""
    launched(world_size)
    words = ("checkpoint.keep_last=9",)
    with Calls() as hashed, Synced() as synced:
        run(config_in(folder / "whole", *words))
    seen: dict[str, Any] = {"hashed": hashed, "unsynced": synced.unsynced if rank == 0 else []}
    if rank == 0:
        for name in ("falls", "refuses", "all", "zeros"):
            shutil.copytree(folder / "whole", folder / name)
            config = folder / name / "config.toml"
            text = config.read_text().replace(str(folder / "whole"), str(folder / name))
            config.write_text(text)
            file = newest(folder / name) / "__0_0.distcp"
            zero(file) if name == "zeros" else flip(file, random.Random(0))
        for step in (2, 4):
            flip(
                folder / "all" / "checkpoints" / f"step_{step:08d}" / ".metadata", random.Random(1)
            )
    with Calls() as verified:
        seen["outcome"] = run(config_in(folder / "falls", *words))
    seen["verified"] = verified
    for name, more in (("refuses", "checkpoint.fallback=false"), ("all", "train.steps=6")):
        with pytest.raises(CheckpointError) as caught:
            run(config_in(folder / name, *words, more))
        seen[name] = str(caught.value)
    with pytest.raises(DamagedCheckpointError):
        evaluate_checkpoint(newest(folder / "refuses"), [])
    size = "checkpoint.verify=size"
    seen["zeros"] = []
    for load in (
        lambda: run(config_in(folder / "zeros", *words, size, "train.steps=8")),
        lambda: evaluate_checkpoint(newest(folder / "zeros"), [size]),
    ):
        with pytest.raises(DamagedCheckpointError) as caught:
            load()
        seen["zeros"].append(str(caught.value))
    return seen


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("damage")
    return folder, run_ranks(damage_and_go_on, 2, folder)


def test_a_run_falls_back_to_the_newest_whole_checkpoint(damaged: Any) -> None:
    folder, of_ranks = damaged
    for seen in of_ranks:
        assert (seen["outcome"].status, seen["outcome"].step) == ("finished", STEPS)
    assert unmeasured(folder / "falls") == unmeasured(folder / "whole")
    assert_same_tensors(newest(folder / "falls"), newest(folder / "whole"))
    kept = folder / "falls" / "checkpoints" / FALLEN
    assert (kept / "__0_0.distcp").read_bytes() == (
        newest(folder / "refuses") / "__0_0.distcp"
    ).read_bytes()
    starts = json.loads((folder / "falls" / "run.json").read_text())["starts"]
    assert starts[-1]["step"] == 4


def test_a_damaged_file_is_named_with_both_digests(damaged: Any) -> None:
    folder, of_ranks = damaged
    wanted = json.loads((newest(folder / "refuses") / "lcdist.json").read_text())["sha256"]
    found = digests.sha256_of(newest(folder / "refuses") / "__0_0.distcp")
    for seen in of_ranks:
        text = f"file __0_0.distcp has sha256 {found}, not {wanted['__0_0.distcp']}"
        assert text in seen["refuses"] and str(newest(folder / "refuses")) in seen["refuses"]
        assert "has no checkpoint that is not damaged" in seen["all"]
    assert (newest(folder / "all")).is_dir(), "nothing is renamed without a whole checkpoint"


def test_each_rank_hashes_what_it_wrote(damaged: Any) -> None:
    """Of three saves, two are read back; the last is hashed while it is written.

    Rank 0 reads Megatron's and torch's small files of all three.
    """
    _, of_ranks = damaged
    small = [".metadata", "common.pt", "metadata.json"]
    for rank, seen in enumerate(of_ranks):
        own = [f"__{rank}_0.distcp", f"__{rank}_1.distcp"]
        assert sorted(seen["hashed"]) == sorted([*own, *own, *(small * 3 if rank == 0 else [])])


def test_each_file_is_read_once_by_one_rank(damaged: Any) -> None:
    folder, (first, other) = damaged
    files = json.loads((newest(folder / "whole") / "lcdist.json").read_text())["sha256"]
    # The damaged checkpoint, the one before it, and on rank 0 the small files of the last save.
    saved = [".metadata", "common.pt", "metadata.json"]
    assert sorted(first["verified"] + other["verified"]) == sorted([*files, *files, *saved])
    assert first["verified"] and other["verified"]
    assert share_out({"a": 5, "b": 3, "c": 3, "d": 1}, 2) == [["a", "d"], ["b", "c"]]


def test_all_of_a_save_is_on_disk_before_it_has_its_name(damaged: Any) -> None:
    assert not damaged[1][0]["unsynced"]


@pytest.fixture
def copied(damaged: Any, tmp_path: Path) -> Path:
    """Copy a whole checkpoint."""
    return Path(shutil.copytree(newest(damaged[0] / "whole"), tmp_path / "copy"))


def test_every_flipped_bit_is_noticed(copied: Path) -> None:
    chance = random.Random(2)
    for file in sorted(copied.iterdir()):
        whole = file.read_bytes()
        for _ in range(12):
            flip(file, chance)
            with pytest.raises(CheckpointError, match=rf"{file.name}|format"):
                verify_checkpoint(open_checkpoint(copied))
            file.write_bytes(whole)
    verify_checkpoint(open_checkpoint(copied))


def test_an_older_checkpoint_has_sizes_only(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copied / room.MANIFEST
    table = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in table.items() if not k.startswith("sha256")}))
    flip(copied / "__0_0.distcp", random.Random(3))
    with caplog.at_level("INFO"):
        verify_checkpoint(open_checkpoint(copied))
    assert "keeps no digests: only sizes were compared" in caplog.text


def load_each_without_digests(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """Return what resuming says for each damaged file of a checkpoint older than digests."""
    launched(world_size)
    home, folder = folder, newest(folder)
    file = folder / room.MANIFEST
    table = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in table.items() if not k.startswith("sha256")}))
    said = {}
    for each in sorted(set(folder.iterdir()) - {file, folder / ".metadata"}):
        whole = each.read_bytes()
        zero(each)
        with pytest.raises(DamagedCheckpointError) as caught:
            run(config_in(home, "train.steps=8"))
        said[each.name] = str(caught.value)
        each.write_bytes(whole)
    return said


def test_what_cannot_be_loaded_of_an_older_checkpoint_is_told(damaged: Any, tmp_path: Path) -> None:
    home = Path(shutil.copytree(damaged[0] / "whole", tmp_path / "run"))
    [said] = run_ranks(load_each_without_digests, 1, home)
    assert len(said) == 6
    for text in said.values():
        assert f"{newest(home)} is damaged: a file cannot be loaded: " in text and "\n" not in text
        assert "(it is older than digests, which would say which); restore it, or delete" in text


def test_sizes_alone_pass_over_a_changed_tensor_and_nothing_else(copied: Path) -> None:
    for file in sorted(copied.iterdir()):
        whole = file.read_bytes()
        zero(file)
        if file.suffix == room.TENSOR_SUFFIX:
            verify_checkpoint(open_checkpoint(copied), "size")
        else:
            with pytest.raises(DamagedCheckpointError, match=file.name):
                verify_checkpoint(open_checkpoint(copied), "size")
        file.write_bytes(whole)


def test_a_file_that_cannot_be_loaded_is_named_where_sizes_alone_were_compared(
    damaged: Any,
) -> None:
    folder, of_ranks = damaged
    start = f"{newest(folder / 'zeros')} is damaged: file __0_0.distcp has sha256 "
    for seen in of_ranks:
        assert [message[: len(start)] for message in seen["zeros"]] == [start, start]


def test_check_names_what_is_damaged(damaged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged[0]
    assert main(["check", str(folder / "whole"), str(newest(folder / "whole"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.endswith("MB, whole") for line in lines)
    assert main(["check", str(folder / "falls")]) == 2
    printed = capsys.readouterr()
    assert f"{FALLEN}: checkpoint, " in printed.out and "DAMAGED\n  file __0_0" in printed.out
    assert printed.err.splitlines()[-1].startswith("error: 1 damaged folder, named above: ")
    assert main(["check", str(folder)]) == 2
    assert "has no lcdist.json, meta.json or SHA256SUMS" in capsys.readouterr().err
    assert main(["check", str(folder / "nowhere")]) == 2
    assert "nowhere: no such folder; give a run, a checkpoint" in capsys.readouterr().err


def test_sums_are_those_of_coreutils(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"abc")
    write_sums(tmp_path)
    (tmp_path / "added").touch()
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (tmp_path / "SHA256SUMS").read_text() == f"{abc}  a b\n"
    refuse_damaged_sums(tmp_path)
    (tmp_path / "a b").unlink()
    assert damaged_files(tmp_path, read_sums(tmp_path)) == [
        "file a b cannot be read: No such file or directory"
    ]
    (tmp_path / "SHA256SUMS").write_text(f"{abc}  ../a\n")
    with pytest.raises(ValueError, match="line 1: .* is not a SHA-256, two spaces and the name"):
        read_sums(tmp_path)


def test_a_hashing_writer_leaves_the_callers_buffer_alone(tmp_path: Path) -> None:
    """torch reuses its buffer after a write, so the digest may not be of what comes later."""
    small, large = bytearray(b"x" * 10), bytearray(os.urandom(2**20))
    with (tmp_path / "file").open("wb") as stream:
        writer = digests.HashingWriter(stream)
        for buffer in (small, large):
            assert writer.write(memoryview(buffer)) == len(buffer)
            buffer[:] = bytes(len(buffer))
        writer.close()
    assert writer.digest() == digests.sha256_of(tmp_path / "file")
