"""The loss is the dense loss: one number a token, both gradients, logits kept or cut anyhow."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lcdist.model.output_loss import VocabShard, output_losses
from tests.distributed import run_ranks
from tests.tolerance import assert_as_good_as_eager, assert_matches

HIDDEN = 7


@dataclass(frozen=True)
class Problem:
    """seqlen x batch tokens; rows of the weight, of which the first `vocab` stand for tokens."""

    seqlen: int
    batch: int
    vocab: int
    rows: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Hidden states, weight, targets and a gradient of the losses with zeros in it."""
        device = torch.get_default_device()
        generator = torch.Generator("cpu").manual_seed(7)

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return x.to(device, dtype)

        hidden, weight = draw(self.seqlen, self.batch, HIDDEN), draw(self.rows, HIDDEN)
        shape = (self.seqlen, self.batch)
        targets = torch.randint(self.vocab, shape, generator=generator, device="cpu")
        dloss = draw(*shape)
        dloss *= dloss.abs() > 0.3
        wide = torch.promote_types(dtype, torch.float32)
        return hidden, weight, targets.to(device), dloss.to(wide)


PROBLEMS = [
    Problem(1, 1, 1, 1),
    Problem(13, 1, 11, 11),
    Problem(13, 3, 10, 16),
    Problem(64, 2, 129, 130),
]
# Kept, one token, sizes that do not divide, all at once, more than there are.
CHUNKS = [None, 1, 5, 16, 38, 39, 1000]


def dense(problem: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Losses and the gradients of hidden states and weight, from whole logits."""
    hidden, weight, targets, dloss = problem.tensors(dtype)
    hidden, weight = (x.requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight[: problem.vocab].t()).to(dloss.dtype)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view(targets.shape)
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), dloss)]


def chunked(
    problem: Problem, chunk: int | None, shard: VocabShard, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Compute the same for this rank's part of the problem."""
    hidden, weight, targets, dloss = problem.tensors(dtype)
    ranks = shard.group.size() if shard.group is not None else 1
    rank = shard.group.rank() if shard.group is not None else 0
    weight = weight.chunk(ranks)[rank].clone()
    if shard.sequence_parallel:
        hidden = hidden.chunk(ranks)[rank].clone()
    hidden, weight = (x.requires_grad_() for x in (hidden, weight))
    losses = output_losses(hidden, weight, targets, shard, chunk)
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), dloss)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_one_process_equals_whole_logits(problem: Problem, chunk: int | None) -> None:
    found = chunked(problem, chunk, VocabShard(0, problem.vocab))
    for actual, expected in zip(found, dense(problem), strict=True):
        assert_matches(actual, expected)
    assert not found[2][problem.vocab :].count_nonzero(), "padding has a gradient"


def over_ranks(
    rank: int, world_size: int, cases: list[tuple[Problem, int | None, bool]]
) -> list[list[Tensor]]:
    """Of each (problem, chunk, whether under sequence parallelism): this rank's loss, gradients."""
    found = []
    for problem, chunk, sequence_parallel in cases:
        local = problem.rows // world_size
        real = min(max(problem.vocab - rank * local, 0), local)
        shard = VocabShard(rank * local, real, dist.group.WORLD, sequence_parallel)
        found.append(chunked(problem, chunk, shard))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_tensor_parallel_ranks_equal_whole_logits(world_size: int) -> None:
    sizes = [
        Problem(6, 1, 60, 60),
        # Padding on the last rank, then a rank of padding alone, then one token for the first.
        Problem(18, 3, 55, 60),
        Problem(18, 3, 19, 60),
        Problem(12, 1, 1, 6),
    ]
    cases = [(p, chunk, sp) for p in sizes for chunk in (None, 1, 4, 1000) for sp in (False, True)]
    answers = run_ranks(over_ranks, world_size, cases)
    for number, (problem, _, sequence_parallel) in enumerate(cases):
        losses, dhidden, dweight = dense(problem)
        of_ranks = [answer[number] for answer in answers]
        for found, _, _ in of_ranks:
            assert_matches(found, losses)
            assert torch.equal(found, of_ranks[0][0])
        parts = [found for _, found, _ in of_ranks]
        for found in [torch.cat(parts)] if sequence_parallel else parts:
            assert_matches(found, dhidden)
        assert_matches(torch.cat([found for _, _, found in of_ranks]), dweight)


@pytest.mark.parametrize("chunk", [None, 5])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(chunk: int | None) -> None:
    problem = Problem(13, 3, 10, 16)
    _, dhidden, dweight = dense(problem)
    hidden, weight, targets, dloss = problem.tensors()
    shard = VocabShard(0, problem.vocab)
    alone = output_losses(hidden.requires_grad_(), weight, targets, shard, chunk)
    assert_matches(torch.autograd.grad(alone, hidden, dloss)[0], dhidden)
    alone = output_losses(hidden.detach(), weight.requires_grad_(), targets, shard, chunk)
    assert_matches(torch.autograd.grad(alone, weight, dloss)[0], dweight)
    with torch.no_grad():
        assert not output_losses(hidden, weight, targets, shard, chunk).requires_grad


def test_every_backward_of_one_graph_is_the_same() -> None:
    hidden, weight, targets, dloss = Problem(13, 3, 10, 16).tensors()
    losses = output_losses(hidden.requires_grad_(), weight, targets, VocabShard(0, 10), None)
    [first, *more] = (
        torch.autograd.grad(losses, hidden, dloss, retain_graph=True)[0] for _ in range(3)
    )
    # The first overwrites the logits that were kept.
    assert all(torch.equal(first, other) for other in more)


def test_large_logits_are_no_harm() -> None:
    problem = Problem(13, 1, 11, 11)
    hidden, weight, targets, _ = problem.tensors(torch.float32)
    hidden, weight = hidden * 300, weight * 300
    losses = output_losses(hidden, weight, targets, VocabShard(0, 11), 5)
    logits = hidden.double() @ weight.double().t()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert expected.max() > 1e5
    assert_matches(losses.flatten(), expected, 1e-6)


def check_low_precision(problem: Problem, chunk: int | None, dtype: torch.dtype) -> None:
    """By chunks as good as from whole logits, both in `dtype`, measured by float64."""
    tensors = problem.tensors(dtype)
    rounded = [x.double() for x in (*tensors[:2], tensors[3])]
    hidden, weight = (x.requires_grad_() for x in rounded[:2])
    shard = VocabShard(0, problem.vocab)
    losses = output_losses(hidden, weight, tensors[2], shard, 10**6)
    truth = [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), rounded[2])]
    found = chunked(problem, chunk, shard, dtype)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    for actual, eager, reference in zip(found, dense(problem, dtype), truth, strict=True):
        assert_as_good_as_eager(actual, eager, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_good_as_whole_logits(dtype: torch.dtype) -> None:
    # So many chunks that sums of them in the weight's dtype would show.
    for chunk in (None, 1):
        check_low_precision(Problem(1024, 1, 5, 6), chunk, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_is_as_good_as_with_whole_logits(dtype: torch.dtype, chunk: int | None) -> None:
    with torch.device("cuda"):
        check_low_precision(Problem(1000, 2, 4000, 4096), chunk, dtype)
