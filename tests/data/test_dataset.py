"""Token and synthetic datasets: every epoch uses each token once, damaged folders raise."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lcdist.data.datasets.split import TokenSplit
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.meta import REMAKE, read_meta, write_meta
from lcdist.data.prepare.indexed import IndexedWriter
from lcdist.data.prepare.prepare import Prepared
from lcdist.distributed.verify import refuse_damaged

LENGTHS = (7, 1, 30, 2, 19, 44)
TOTAL = sum(LENGTHS)


@pytest.fixture
def counted(prepared: Prepared, tmp_path: Path) -> Path:
    """Make a token folder with the tokens 0, 1, 2, ... in stored order."""
    folder = tmp_path / "counted"
    shutil.copytree(prepared.folder, folder)
    fill(folder, [list(range(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1]))) for i in range(6)])
    return folder


def fill(folder: Path, documents: Sequence[list[int]]) -> None:
    with IndexedWriter(folder / "train", 320) as writer:
        for tokens in documents:
            writer.add(tokens)
    meta = read_meta_without_check(folder)
    sizes = {name: (folder / name).stat().st_size for name in meta.files}
    tokens = {**meta.tokens, "train": writer.tokens}
    write_meta(folder, dataclasses.replace(meta, files=sizes, tokens=tokens))


def read_meta_without_check(folder: Path):
    table = json.loads((folder / "meta.json").read_text())
    table["files"] = table["sha256"] = {}
    (folder / "meta.json").write_text(json.dumps(table))
    names = [path.name for path in folder.iterdir() if path.name != "meta.json"]
    return dataclasses.replace(read_meta(folder), files=dict.fromkeys(sorted(names), 0))


@pytest.mark.parametrize("seqlen", [1, 10, 51, 102])
def test_every_epoch_uses_every_window_once(counted: Path, seqlen: int) -> None:
    data = TokenDataset(counted, "train", seqlen, seed=3)
    assert data.num_tokens == TOTAL == 103
    windows = [data.sample(i).tokens for i in range(TOTAL)]  # exactly seqlen epochs
    seen = torch.cat([window[:-1] for window in windows]).bincount(minlength=TOTAL)
    assert seen.tolist() == [seqlen] * TOTAL
    inside = seqlen * torch.arange(1, TOTAL + 1)
    for epoch in range(min(seqlen, 3)):
        first, last = (int((inside <= e * TOTAL).sum()) for e in (epoch, epoch + 1))
        starts = [int(window[0]) for window in windows[first + (epoch > 0) : last]]
        assert len(set(starts)) == len(starts)


def test_epochs_form_one_string_of_whole_documents(counted: Path) -> None:
    data = TokenDataset(counted, "train", 10, seed=3)
    follower: dict[tuple[int, int], set[int]] = {}
    for i in range(TOTAL):
        tokens = data.sample(i).tokens
        epoch = i * 10 // TOTAL
        for a, b in zip(tokens.tolist(), tokens.tolist()[1:], strict=False):
            follower.setdefault((epoch, a), set()).add(b)
    ends = {sum(LENGTHS[: i + 1]) - 1 for i in range(len(LENGTHS))}
    for (_, token), after in follower.items():
        if token not in ends:
            assert after == {token + 1}
    orders = {
        tuple(sorted((t, *f) for (e, t), f in follower.items() if e == n and t in ends))
        for n in range(10)
    }
    assert len(orders) > 5, "every epoch has its own order of documents"


def test_documents_end_at_cu_seqlens(counted: Path) -> None:
    data = TokenDataset(counted, "train", 10, seed=0)
    ends = {sum(LENGTHS[: i + 1]) - 1 for i in range(len(LENGTHS))}
    closed = 0
    for i in range(300):
        sample = data.sample(i)
        cu = sample.cu_seqlens
        assert cu.dtype == torch.int32 and sample.tokens.dtype == torch.int64
        assert (cu[0], cu[-1], len(sample.tokens)) == (0, 10, 11) and bool((cu.diff() > 0).all())
        last = {int(end) - 1 for end in (cu[1:] if sample.ends_document else cu[1:-1])}
        assert last == {n for n in range(10) if int(sample.tokens[n]) in ends}
        closed += sample.ends_document
    assert closed


def test_a_sample_is_a_function_of_seed_and_index(counted: Path) -> None:
    order = [250, 3, 11, 10, 9, 0, 102, 103, 51]
    for make in (
        lambda seed: TokenDataset(counted, "train", 10, seed),
        lambda seed: SyntheticDataset(50, 64, seed),
    ):
        one, other = make(5), make(5)
        forward = {i: one.sample(i) for i in sorted(order)}
        for i in order:
            again = other.sample(i)
            assert torch.equal(again.tokens, forward[i].tokens)
            assert torch.equal(again.cu_seqlens, forward[i].cu_seqlens)
        for a, b in ((5, 6), (2**64 - 1, 2**64 - 2)):
            first, second = make(a), make(b)
            pairs = [(first.sample(i), second.sample(i)) for i in order]
            assert any(not torch.equal(a.tokens, b.tokens) for a, b in pairs)
            tables = [(a.cu_seqlens.tolist(), b.cu_seqlens.tolist()) for a, b in pairs]
            assert any(a != b for a, b in tables)
        with pytest.raises(ValueError, match="seed = -1"):
            make(-1)


def test_a_split_gives_documents_and_windows(counted: Path) -> None:
    data = TokenSplit(counted, "train")
    assert (
        data.num_documents == 6
        and data.longest_documents(19) == [5, 2, 4]
        and len(data.longest_documents()) == 6
    )
    assert data.document(2).tolist() == list(range(8, 38))
    assert data.window(6, 40).tolist() == list(range(6, 46))
    for start, tokens in ((64, 40), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="the train split has 103"):
            data.window(start, tokens)


def test_a_corpus_smaller_than_a_sample_raises(counted: Path) -> None:
    with pytest.raises(ValueError, match="103 tokens, fewer than one sample of .* = 104; give"):
        TokenDataset(counted, "train", 103, 0)


def test_missing_and_incomplete_folders_raise(counted: Path) -> None:
    with pytest.raises(ValueError, match="nowhere': no such folder"):
        TokenSplit(counted / "nowhere", "train")
    with pytest.raises(ValueError, match="no split 'test', only train, valid"):
        TokenSplit(counted, "test")
    (counted / "meta.json").unlink()
    with pytest.raises(ValueError, match="has no meta.json, so it is incomplete"):
        TokenSplit(counted, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"format": 99}', "format 99, this version reads 1"), ("[]", "None"),
     ('{"format": 1}', "missing or unknown keys: digest")],
)  # fmt: skip
def test_a_damaged_meta_raises(counted: Path, text: str, message: str) -> None:
    (counted / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TokenSplit(counted, "train")


@pytest.mark.parametrize(
    ("written", "damaged", "message"),
    [
        ('"train.idx": "', '"vrain.idx": "', r"name the same files \(train\.idx, vrain\.idx\)"),
        ('"train.idx": "', '"train.idx": "`', r"sha256 of train\.idx is '`.*', not a SHA-256"),
    ],
)
def test_damaged_digests_are_told_as_such(
    prepared: Prepared, tmp_path: Path, written: str, damaged: str, message: str
) -> None:
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    text = (folder / "meta.json").read_text()
    assert text.count(written) == 1
    (folder / "meta.json").write_text(text.replace(written, damaged))
    with pytest.raises(ValueError, match=rf"meta\.json: .*{message}; remove the folder"):
        TokenSplit(folder, "train")


def test_a_truncated_or_missing_file_raises(counted: Path) -> None:
    whole = (counted / "train.bin").read_bytes()
    (counted / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"train\.bin: has 204 bytes, meta.json says 206"):
        TokenSplit(counted, "train")
    meta = read_meta_without_check(counted)
    sizes = {name: (counted / name).stat().st_size for name in meta.files}
    write_meta(counted, dataclasses.replace(meta, files=sizes))
    with pytest.raises(ValueError, match=r"204 bytes, but .*train\.idx lists 103 tokens in 206"):
        TokenSplit(counted, "train")
    (counted / "train.bin").unlink()
    with pytest.raises(ValueError, match=r"train\.bin: is missing"):
        TokenSplit(counted, "train")


def test_a_flipped_bit_is_found(prepared: Prepared, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    meta = read_meta(folder)
    assert meta.sha256 is not None and meta.sha256.keys() == meta.files.keys()
    refuse_damaged(folder, meta.sha256, meta.files, "meta.json", REMAKE)
    content = bytearray((folder / "train.bin").read_bytes())
    content[7] ^= 4
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"file train\.bin has sha256 .* \(from meta\.json\); remove the"
    ):
        refuse_damaged(folder, meta.sha256, meta.files, "meta.json", REMAKE)


def test_synthetic_documents_repeat_a_word() -> None:
    data = SyntheticDataset(50, 256, seed=1)
    lengths, copies = [], 0
    for i in range(20):
        sample = data.sample(i)
        cu = sample.cu_seqlens.tolist()
        assert len(sample.tokens) == 257 and cu[0] == 0 and cu[-1] == 256
        assert set(sample.tokens.tolist()) <= set(range(50))
        zeros = (sample.tokens[:-1] == 0).nonzero().flatten() + 1
        assert zeros.tolist() == (cu[1:] if sample.ends_document else cu[1:-1])
        lengths += [b - a for a, b in zip(cu, cu[1:], strict=False)]
        text = sample.tokens[: cu[1]]
        word = min(16, len(text) // 4)
        copies += sum(torch.equal(text[:word], text[n : n + word]) for n in range(32, len(text)))
    assert len(set(lengths)) > 10 and copies >= 20
    with pytest.raises(ValueError, match="vocab_size = 1, seqlen = 8"):
        SyntheticDataset(1, 8, 0)


def test_synthetic_neighbours_can_be_learned() -> None:
    data = SyntheticDataset(50, 512, seed=1)
    pairs = torch.zeros(50, 50)
    for i in range(40):
        tokens = data.sample(i).tokens
        pairs.index_put_((tokens[:-1], tokens[1:]), torch.ones(512), accumulate=True)
    best_four = pairs.topk(4, dim=1).values.sum() / pairs.sum()
    assert best_four > 0.6
