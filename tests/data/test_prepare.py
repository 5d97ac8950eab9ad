"""Token folders: Megatron's format, the same bytes everywhere, complete or absent."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401  # isort: skip
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # isort: skip

from lcdist.data.meta import check_vocabulary
from lcdist.data.prepare import chunks as chunks_module
from lcdist.data.prepare import shards as shards_module
from lcdist.data.prepare.corpus import Source
from lcdist.data.prepare.indexed import IndexedWriter
from lcdist.data.prepare.prepare import Prepared, prepare
from lcdist.data.prepare.settings import TokenizeSettings
from lcdist.data.tokenizers.sentencepiece_bpe import SentencePieceTokenizer
from tests.data.conftest import SETTINGS, write_corpus


def change(**values) -> TokenizeSettings:
    return dataclasses.replace(SETTINGS, **values)


def texts_of(made: Prepared, split: str) -> list[str]:
    """Return the texts of a split's documents and check that each ends with eos."""
    tokenizer = SentencePieceTokenizer(made.folder / "tokenizer.model")
    # Keep a reference: the arrays that Megatron's class returns are freed with it.
    data = IndexedDataset(str(made.folder / split))
    assert all(data[i][-1] == tokenizer.eos_id for i in range(len(data)))
    return [tokenizer.decode(data[i][:-1].tolist()) for i in range(len(data))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_files_equal_those_of_megatron(tmp_path: Path, vocab_size: int) -> None:
    texts = [torch.randint(60000, (n,)) for n in (3, 1, 700)]
    with IndexedWriter(tmp_path / "ours", vocab_size) as writer:
        for tokens in texts:
            writer.add(tokens.tolist())
    dtype = np.uint16 if vocab_size < 65500 else np.int32
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for tokens in texts:
        theirs.add_document(tokens.numpy(), [len(tokens)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        ours = (tmp_path / f"ours.{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs.{ending}").read_bytes()


def test_every_document_is_stored_once_with_eos(corpus: Path, prepared: Prepared) -> None:
    tokenizer = SentencePieceTokenizer(prepared.folder / "tokenizer.model")
    texts = []
    for split in ("train", "valid"):
        data = IndexedDataset(str(prepared.folder / split))
        assert len(data) == prepared.meta.documents[split] > 0
        assert data.sequence_lengths.sum() == prepared.meta.tokens[split]
        texts += texts_of(prepared, split)
    files = [path.read_bytes().decode() for path in corpus.rglob("*.txt")]
    assert sorted(texts) == sorted(text for text in files if text)
    assert (prepared.meta.empty, prepared.meta.skipped) == (1, [])
    assert prepared.meta.fingerprint == tokenizer.fingerprint


def test_processes_shards_and_location_change_no_byte(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "elsewhere")
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 4000)
    again = prepare(Source(tmp_path / "elsewhere"), tmp_path / "out", change(workers=3))
    ours, theirs = contents(again.folder), contents(prepared.folder)
    assert again.meta.digest == prepared.meta.digest
    assert ours.pop("meta.json") and theirs.pop("meta.json") and ours == theirs


def test_the_split_depends_on_seed_and_name_alone(corpus: Path, tmp_path: Path) -> None:
    def valid(name: str, source: Path, seed: int) -> set[str]:
        made = prepare(Source(source), tmp_path / name, change(seed=seed))
        return set(texts_of(made, "valid"))

    more = write_corpus(tmp_path / "more")
    (more / "a.txt").write_text("one document more")
    assert valid("a", corpus, 0) == valid("b", more, 0) - {"one document more"}
    assert valid("a1", corpus, 1) != valid("a", corpus, 0)


def test_a_single_text_file_is_split_at_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(
        "".join(f"line {i} of a {'very ' * (i % 5)}long book on many things\n" for i in range(1000))
    )
    made = prepare(Source(path), tmp_path / "out", change(valid_fraction=0.1))
    assert made.meta.documents == {"train": 1, "valid": 1}
    halves = texts_of(made, "train") + texts_of(made, "valid")
    assert "".join(halves) == path.read_text() and halves[0].endswith("\n")
    assert 0.08 < len(halves[1]) / len(path.read_text()) < 0.12


def test_few_files_still_have_a_valid_split(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=3)
    made = prepare(Source(tmp_path / "text"), tmp_path / "out", change(valid_fraction=1e-6))
    assert made.meta.documents == {"train": 2, "valid": 1}
    none = prepare(Source(tmp_path / "text"), tmp_path / "none", change(valid_fraction=0.0))
    assert none.meta.documents == {"train": 3}


def test_jsonl_is_split_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(
            f'{{"text": "document number {i} of {i * i} about lines of many words" }}\n'
            for i in range(200)
        )
    )
    first = prepare(Source(path), tmp_path / "a", SETTINGS)
    assert sum(first.meta.documents.values()) == 200 and 20 < first.meta.documents["valid"] < 60
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 64)
    second = prepare(Source(path), tmp_path / "b", SETTINGS, first.folder / "tokenizer.model")
    assert contents(second.folder)["valid.bin"] == contents(first.folder)["valid.bin"]


def test_a_second_call_does_nothing_and_other_contents_raise(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(Source(corpus), out, SETTINGS)
    before = contents(out)
    again = prepare(Source(corpus), out, change(workers=2))
    assert (first.fresh, again.fresh, again.meta) == (True, False, first.meta)
    with pytest.raises(ValueError, match="out: already has tokens of other text or other"):
        prepare(Source(corpus), out, change(seed=1))
    assert contents(out) == before
    replaced = prepare(Source(corpus), out, change(seed=1), overwrite=True)
    assert replaced.fresh and replaced.meta.settings["seed"] == 1
    assert os.listdir(tmp_path) == ["out"]
    changed = write_corpus(tmp_path / "changed")
    (changed / "even" / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match="already has tokens of other text"):
        prepare(Source(changed), out, change(seed=1))


def test_incomplete_folders_are_not_touched(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"half")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not a complete token folder .meta.json is missing"):
            prepare(Source(corpus), tmp_path, SETTINGS, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["train.bin"]


def test_a_second_process_raises(corpus: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def start_second(stage: str, _done: int, _total: int) -> None:
        if stage == "tokenizing":
            with pytest.raises(ValueError, match="out: another process is making it"):
                prepare(Source(corpus), tmp_path / "out", SETTINGS)
            refused.append(stage)

    assert prepare(Source(corpus), tmp_path / "out", SETTINGS, progress=start_second).fresh
    assert refused


def test_progress_counts_all_bytes(corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    for workers in (1, 2):
        seen.clear()
        out, settings = tmp_path / f"out{workers}", change(workers=workers)
        made = prepare(Source(corpus), out, settings, progress=lambda *now: seen.append(now))
        total = made.meta.source["bytes"]
        for stage in ("reading", "tokenizing", "joining"):
            done = [now[1] for now in seen if now[0] == stage]
            assert done == sorted(done) and done[-1] == total
        assert {now[2] for now in seen} == {total}


def test_skipped_documents_are_listed_in_meta(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "text")
    (source / "bad.txt").write_bytes(b"good until \xff")
    with pytest.raises(ValueError, match=r"bad\.txt, byte 11"):
        prepare(Source(source), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
    made = prepare(Source(source), tmp_path / "out", change(on_error="skip"))
    (entry,) = made.meta.skipped
    assert (entry["file"], entry["offset"]) == ("bad.txt", 11)


def test_invalid_settings_raise(corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    model = prepared.folder / "tokenizer.model"
    cases = [
        (change(valid_fraction=1.0), None, r"valid_fraction = 1.0: must be in \[0, 1\)"),
        (change(workers=0), None, "workers = 0"),
        (change(vocab_size=None), None, "give a vocab_size"),
        (change(vocab_size=512), model, "--vocab-size 512: .* has 320 pieces"),
        (change(on_error="ignore"), None, "on_error = 'ignore'"),
    ]
    for settings, tokenizer, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(Source(corpus), tmp_path / "out", settings, tokenizer)
    taken = prepare(Source(corpus), tmp_path / "out", change(vocab_size=None), model)
    assert taken.meta.fingerprint == prepared.meta.fingerprint
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="train split has no document .0 skipped, 1 empty"):
        prepare(Source(tmp_path / "empty.txt"), tmp_path / "none", change(vocab_size=None), model)


def test_a_vocabulary_that_does_not_match_raises(prepared: Prepared) -> None:
    check_vocabulary(prepared.meta, 320)
    with pytest.raises(ValueError, match="vocab_size = 512, but .* 320 pieces: set"):
        check_vocabulary(prepared.meta, 512)
