"""Perplexity by length: the right text, every token once, one number on every mesh."""

import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.data.datasets.aligned import AlignedDataset
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.engines.optimizer import ShardedAdamW
from lcdist.evaluate.evaluation import evaluate_checkpoint
from lcdist.evaluate.loaded_model import load_model
from lcdist.evaluate.perplexity import Perplexity, Score
from lcdist.evaluate.text import Windows, held_out_text
from lcdist.layout import ContextLayout
from lcdist.layout.documents import DocumentLayout
from megatron.core.distributed import DistributedDataParallel
from tests.distributed import run_ranks
from tests.evaluate.worlds import (
    VOCAB,
    document,
    plain_losses,
    trained_model,
    with_data,
    write_tokens,
)
from tests.live import LiveTensors, id_of

LENGTHS = (7, 24, 96)
TOKENS = 192


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    """Documents of 4, 13, 2 and 9 tokens, each token telling its document and its place."""
    lengths = [4, 13, 2, 9]
    texts = [[20 * number + place for place in range(n)] for number, n in enumerate(lengths)]
    return TokenSplit(write_tokens(tmp_path / "data", {"valid": texts}), "valid")


def test_windows_come_whole_from_the_longest_documents(split: TokenSplit) -> None:
    text = held_out_text(split, length=4, tokens=20)
    assert not text.joined
    # Three windows of the 13, two of the 9, and the label of the last token.
    assert text.tokens.tolist() == [*range(20, 32), *range(60, 68), 68]


def test_fewer_tokens_take_fewer_windows(split: TokenSplit) -> None:
    text = held_out_text(split, length=4, tokens=5)
    assert not text.joined and text.tokens.tolist() == [*range(20, 28), 28]


def test_a_document_must_hold_the_last_label_too(split: TokenSplit) -> None:
    assert held_out_text(split, length=12, tokens=12).tokens.tolist() == [*range(20, 33)]
    joined = held_out_text(split, length=13, tokens=13)
    assert joined.joined
    assert joined.tokens.tolist() == [*range(4), *range(20, 30)]


def test_documents_are_joined_in_stored_order_where_they_are_too_short(split: TokenSplit) -> None:
    text = held_out_text(split, length=4, tokens=24)
    assert text.joined
    stored = [*range(4), *range(20, 33), 40, 41, *range(60, 69)]
    assert text.tokens.tolist() == stored[:25]


def test_too_little_text_is_refused(split: TokenSplit) -> None:
    assert len(held_out_text(split, length=27, tokens=27).tokens) == 28
    with pytest.raises(ValueError) as caught:
        held_out_text(split, length=28, tokens=20)
    message = str(caught.value)
    assert (
        "the valid split has 28 tokens; evaluate.tokens = 20 in windows of 28 needs 29" in message
    )
    assert "lower evaluate.tokens" in message


def test_windows_tile_the_text(split: TokenSplit) -> None:
    text = held_out_text(split, length=12, tokens=12)
    windows = Windows(text, 5, VOCAB)
    assert windows.count == 2
    assert windows.sample(1).tokens.tolist() == [*range(25, 31)]
    assert windows.sample(1).cu_seqlens.tolist() == [0, 5] and not windows.sample(1).ends_document


@pytest.mark.parametrize("slots", [DocumentLayout(), DocumentLayout(block_size=4, landmark=249)])
@pytest.mark.parametrize("length", [4, 8, 24])
def test_no_label_lies_across_the_end_of_a_document(
    split: TokenSplit, slots: DocumentLayout, length: int
) -> None:
    texts = [held_out_text(split, 8, 16), held_out_text(split, 24, 24)]
    assert [text.joined for text in texts] == [False, True]
    for text in texts:
        windows = Windows(text, length, VOCAB)
        row = slots.num_slots(length)
        spec = LoaderSpec(ContextLayout("contiguous", row, 1), 0, 1, 0, 1, 1, document_layout=slots)
        loader = Loader(AlignedDataset(windows, slots, row), spec)
        scored = 0
        for _ in range(windows.count):
            [batch] = loader.next_step()
            pairs = zip(batch.tokens[0], batch.labels[0], batch.loss_mask[0], strict=True)
            # A token's first digits tell its document, but for the landmark's.
            labels = [int(label) for token, label, mask in pairs if mask]
            assert not {0, 20, 40, 60} & {*labels}
            scored += len(labels)
        inside = text.tokens[1 : windows.count * length + 1]
        skipped = sum(bool(begins) for begins in text.unscored[1 : len(inside) + 1])
        assert scored == len(inside) - skipped


def test_perplexity_is_exp_of_the_loss() -> None:
    assert Score(8, 80, 2.0).perplexity == math.exp(2.0)
    assert math.isfinite(Score(8, 80, 1e6).perplexity)


def train_and_score(
    rank: int, world_size: int, folder: Path, *words: str
) -> dict[int, list[float]]:
    """Save a model; [perplexity, tokens] by length, from plain forward passes and float64."""
    model, stored = trained_model(folder, *words), document(folder)
    found = {}
    for length in LENGTHS:
        total, count = 0.0, TOKENS // length
        for start in range(0, count * length, length):
            total += plain_losses(model, stored[start : start + length + 1]).sum().item()
        found[length] = [math.exp(total / (count * length)), count * length]
    return found


def evaluated(rank: int, world_size: int, folder: Path, meshes: list[list[str]]) -> list[Any]:
    os.environ["WORLD_SIZE"] = str(world_size)
    asked = [f"evaluate.lengths={list(LENGTHS)}", f"evaluate.tokens={TOKENS}"]
    return [evaluate_checkpoint(folder / "checkpoints", [*asked, *mesh]) for mesh in meshes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[float]]]:
    folder = with_data(tmp_path_factory.mktemp("perplexity"))
    return folder, run_ranks(train_and_score, 1, folder)[0]


def test_equals_plain_passes_on_one_rank_and_on_two(trained: Any) -> None:
    folder, expected = trained
    results = run_ranks(evaluated, 1, folder, [[], ["train.loss=chunked", "train.loss_chunk=5"]])
    # By default all ranks are context parallel: 7 tokens then need padding.
    results += run_ranks(evaluated, 2, folder, [[], ["parallel.layout=striped"]])
    for of_rank in results:
        for result in of_rank:
            assert result["lengths"] == list(LENGTHS) and not result["joined"]
            assert result["scored"] == [expected[length][1] for length in LENGTHS]
            found = dict(zip(LENGTHS, result["perplexity"], strict=True))
            for length in LENGTHS:
                assert found[length] == pytest.approx(expected[length][0], rel=1e-5)
            assert (result["step"], result["tokens"]) == (3, TOKENS)


def test_other_meshes_score_the_same_windows(trained: Any) -> None:
    folder, expected = trained
    meshes = [
        ["parallel.cp_size=1"],
        ["parallel.cp_size=1", "parallel.pp_size=2"],
        ["parallel.cp_size=1", "parallel.tp_size=2", "parallel.sequence_parallel=true"],
    ]
    for of_rank in run_ranks(evaluated, 2, folder, meshes):
        for result in of_rank:
            assert result["perplexity"] == pytest.approx(
                [expected[length][0] for length in LENGTHS], rel=1e-5
            )
            # Two data-parallel ranks share 27 windows of 7 tokens: one reads its last one twice.
            assert result["scored"] == [expected[length][1] for length in LENGTHS]


@pytest.mark.parametrize(
    "words",
    [
        # The landmark is a token of its own, the model's last.
        ("attention.method=landmark", "attention.block_size=5", f"model.vocab_size={VOCAB + 1}"),
        pytest.param(
            ("attention.method=tensorized", "attention.modes=[4]"), marks=pytest.mark.exhaustive
        ),
        # The padding of a layout is no part of the length that the rotation depends on.
        pytest.param(
            (
                "attention.method=full",
                'model.rope={scaling="dynamic",factor=40,original_seqlen=5}',
                "model.init_std=0.2",
            ),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda words: words[0],
)
def test_text_laid_out_in_blocks_is_scored_token_by_token(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    folder = with_data(tmp_path)
    expected = run_ranks(train_and_score, 1, folder, *words)[0]
    for [result] in [
        *run_ranks(evaluated, 1, folder, [[]]),
        *run_ranks(evaluated, 2, folder, [[]]),
    ]:
        assert result["attention"] == words[0].removeprefix("attention.method=")
        assert result["scored"] == [expected[length][1] for length in LENGTHS]
        for length, found in zip(LENGTHS, result["perplexity"], strict=True):
            assert found == pytest.approx(expected[length][0], rel=1e-5)


def test_what_was_trained_with_a_pattern_is_read_densely_unless_told(trained: Any) -> None:
    folder, expected = trained
    scca = ["attention.method=scca", "attention.chunk_size=5"]
    ways = [scca, [*scca, "evaluate.attention=dense"], [*scca, "evaluate.attention=method"]]
    [[default, dense, method]] = run_ranks(evaluated, 1, folder, ways)
    full = [expected[length][0] for length in LENGTHS]
    assert default["perplexity"] == dense["perplexity"] == pytest.approx(full, rel=1e-5)
    assert default["attention"] == dense["attention"] == "full (dense; trained with scca)"
    assert method["attention"] == "scca"
    assert method["perplexity"][-1] != pytest.approx(full[-1], rel=1e-4)


def test_made_up_text_has_no_valid_split(trained: Any) -> None:
    folder, _ = trained
    with pytest.raises(ValueError, match="has no valid split"):
        run_ranks(evaluated, 1, folder, [["data.source=synthetic", "data.path="]])


def held_by_evaluation(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Bytes of the model's weights, bytes alive and peak of an evaluation, and training objects."""
    os.environ["WORLD_SIZE"] = str(world_size)
    gc.collect()
    before = {id(x) for x in gc.get_objects()}
    words = [f"parallel.cp_size={world_size}", "evaluate.lengths=[96]", "evaluate.tokens=96"]
    loaded = load_model(folder / "checkpoints", [], words)
    part = Perplexity(loaded)
    with LiveTensors() as live:
        [unit] = part.units()
        part.measure(unit.key, lambda tokens: None)
    gc.collect()
    new = [x for x in gc.get_objects() if id(x) not in before]
    weights = [p for chunk in loaded.chunks for p in chunk.parameters()]
    tensors = {id_of(x): x for x in new if isinstance(x, Tensor) and x.is_floating_point()}
    training = torch.optim.Optimizer | ShardedAdamW | DistributedDataParallel
    return {
        "weights": sum(p.nbytes for p in weights),
        "alive": sum(x.untyped_storage().nbytes() for x in tensors.values()),
        "left by evaluation": live.now,
        "training objects": [type(x).__name__ for x in new if isinstance(x, training)],
        "gradients": [p for p in weights if p.grad is not None or hasattr(p, "main_grad")],
    }


def test_evaluation_has_no_optimizer_state_and_no_gradient_buffer(trained: Any) -> None:
    folder, _ = trained
    for found in run_ranks(held_by_evaluation, 2, folder):
        assert found["training objects"] == [] and found["gradients"] == []
        # Rotation tables, masks and the text are small beside the weights.
        assert found["weights"] <= found["alive"] < 1.1 * found["weights"]
        assert found["left by evaluation"] < 0.1 * found["weights"]
