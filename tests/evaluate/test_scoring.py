"""Likelihoods of given continuations: those of plain forward passes, on every mesh."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.evaluate.loaded_model import load_model
from lcdist.evaluate.scoring import Pair, score_continuations
from lcdist.model.build import CausalLM
from tests.distributed import run_ranks
from tests.evaluate.worlds import document, plain_losses, text_logits, trained_model, with_data

# A model of larger weights: some tokens have more than half of the probability, most have not.
WORDS = ("model.init_std=0.3",)
MESHES = [
    [],
    ["parallel.tp_size=2", "parallel.cp_size=1"],
    ["parallel.pp_size=2", "parallel.cp_size=1"],
    ["parallel.cp_size=1"],
]


def pairs_and_scores(
    rank: int, world_size: int, folder: Path, *words: str
) -> tuple[list[Pair], list[tuple[float, bool]]]:
    """Return pairs of several lengths with their scores; some continuations are the most likely."""
    model, text = trained_model(folder, *WORDS, *words), document(folder)
    cuts = [(0, 1, 2), (3, 40, 41), (3, 40, 47), (60, 90, 97), (0, 200, 203)]
    pairs: list[Pair] = [(text[a:b].tolist(), text[b:c].tolist()) for a, b, c in cuts]
    for context, _ in pairs[:4]:
        likely = list(context)
        for _ in range(5):
            likely.append(best_token(model, likely))
        pairs.append((context, likely[len(context) :]))
        # All but the last token are the most likely ones.
        other = (likely[-1] + 1) % 250
        pairs.append((context, [*likely[len(context) : -1], other]))
        pairs.append((context, likely[len(context) : len(context) + 2]))
    pairs.append(likely_but_second(model, text))
    scores = []
    for context, new in pairs:
        tokens = text.new_tensor([*context, *new])
        losses = plain_losses(model, tokens)[len(context) - 1 :]
        best = [best_token(model, [*context, *new[:i]]) for i in range(len(new))]
        scores.append((-losses.sum().item(), best == list(new)))
    pairs.append(([5, 6], []))
    scores.append((0.0, True))
    return pairs, scores


def likely_but_second(model: CausalLM, text: Tensor) -> Pair:
    """Return a context with a token that has much of the probability, and another has more."""
    with torch.no_grad():
        shares, tokens = text_logits(model, text[:300]).softmax(-1).topk(2)
    place = int(shares[:, 1].argmax())
    assert 0.27 < shares[place, 1] < shares[place, 0] - 0.01
    return text[: place + 1].tolist(), [int(tokens[place, 1])]


def best_token(model: CausalLM, tokens: list[int]) -> int:
    with torch.no_grad():
        return int(text_logits(model, torch.tensor(tokens))[-1].argmax())


def scored(
    rank: int, world_size: int, folder: Path, pairs: list[Pair], meshes: list[list[str]]
) -> list[list[tuple[float, bool]]]:
    os.environ["WORLD_SIZE"] = str(world_size)
    found = []
    for mesh in meshes:
        loaded = load_model(folder / "checkpoints", mesh, [f"parallel.cp_size={world_size}"])
        found.append(score_continuations(loaded, pairs))
    return found


@pytest.mark.parametrize(
    ("words", "meshes"),
    [
        ((), MESHES[:1]),
        pytest.param((), MESHES[1:], marks=pytest.mark.exhaustive),
        pytest.param(
            ("attention.method=landmark", "attention.block_size=5", "model.vocab_size=251"),
            MESHES[:1],
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["cp", "other meshes", "landmark"],
)
def test_scores_are_those_of_plain_passes(
    tmp_path: Path, words: tuple[str, ...], meshes: list[list[str]]
) -> None:
    folder = with_data(tmp_path)
    [(pairs, expected)] = run_ranks(pairs_and_scores, 1, folder, *words)
    assert sorted({is_greedy for _, is_greedy in expected}) == [False, True]
    for of_rank in run_ranks(scored, 1, folder, pairs, [[]]) + run_ranks(
        scored, 2, folder, pairs, meshes
    ):
        for found in of_rank:
            assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
            assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)


def test_a_context_has_a_token() -> None:
    never_read: Any = None
    with pytest.raises(ValueError, match="a context has no token"):
        score_continuations(never_read, [([], [1])])
