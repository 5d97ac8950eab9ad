"""The loss inside the model: one function on every mesh, and no more logits than it says."""

import pytest
import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.distributed.mesh import build_mesh
from lcdist.inference.generate import generate
from lcdist.model.output_loss import VocabShard, output_losses
from megatron.core import tensor_parallel
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, ddp_wrappers_of
from tests.live import LiveTensors
from tests.model.cases import Case, assert_same_gradients, results, tiers
from tests.model.small import Meshes, small, take_steps
from tests.model.test_mesh import meshes
from tests.tolerance import assert_matches

# No size of a chunk divides the 35.5 to 192 tokens that a rank has of a micro-batch.
HOW = ("train.loss=chunked", "train.loss_chunk=13")
TP, PP, CP = (f"parallel.{axis}_size=2" for axis in ("tp", "pp", "cp"))
SP = "parallel.sequence_parallel=true"


def cases() -> list[Case]:
    """Every mesh; tied or untied embeddings, packed or joined, an odd length, in turn."""
    found = []
    for number, (world_size, mesh) in enumerate(meshes()):
        tied, packed = number % 2, number // 2 % 2
        shape = (
            f"model.tied_embeddings={'true' if tied else 'false'}",
            f"data.documents={'pack' if packed else 'join'}",
            f"train.seqlen={71 if number // 4 % 2 else 96}",
        )
        samples = 8 if "parallel.vp_size=2" in mesh else 4
        pairs = ("train.micro_batch_size=2",) if number % 3 == 0 and samples == 8 else ()
        found.append(Case(world_size, mesh, shape, (*HOW, *pairs), samples=samples))
    # A table of which the second rank has padding alone, for both kinds of embeddings.
    for tied in ("true", "false"):
        shape = ("model.vocab_size=60", f"model.tied_embeddings={tied}", "train.seqlen=71")
        found += [Case(2, mesh, shape, HOW) for mesh in ((TP,), (TP, SP))]
    # Tied embeddings live on the first and on the last stage.
    tied_stages = ("model.tied_embeddings=true", "train.seqlen=71")
    found += [Case(4, (TP, PP), tied_stages, HOW), Case(2, (PP,), tied_stages, HOW)]
    return list(dict.fromkeys(found))


# By default every mesh of two ranks.
CASES = cases()
TIERS = tiers([case for case in CASES if case.world_size < 4], CASES)


@pytest.mark.parametrize(("tier", "case"), TIERS)
def test_gradients_equal_those_of_whole_logits_in_one_process(
    tier: tuple[Case, ...], case: Case
) -> None:
    assert_same_gradients(results(tier, case.world_size)[case], results(tier, 1)[case.reference])


Steps = tuple[list[tuple[float, float]], set[int], set[int]]


def two_steps(rank: int, world_size: int, ways: list[tuple[str, ...]]) -> list[Steps]:
    """Of each configuration: (loss, gradient norm) of two steps, how often weights' hooks ran in a
    backward, and for how many tokens the model asked what to do."""
    found, meshes = [], Meshes()
    for words in ways:
        trainer = meshes.trainer(small(*words))
        asked: set[int] = set()
        for chunk in chunks_of(trainer):
            choose = chunk.loss_chunk
            chunk.loss_chunk = lambda n, asked=asked, choose=choose: asked.add(n) or choose(n)
        numbers = take_steps(trainer, 2)
        groups = [group for wrapped in ddp_wrappers_of(trainer) for group in wrapped.bucket_groups]
        counts = {n for group in groups for n in group.golden_per_param_grad_ready_counts.values()}
        found.append((numbers, counts, asked))
    return found


@pytest.mark.parametrize(
    ("mesh", "tokens"),
    [
        pytest.param((), 2 * 64, id="dp2", marks=pytest.mark.exhaustive),
        pytest.param((CP,), 2 * 32, id="cp2", marks=pytest.mark.exhaustive),
        pytest.param((TP, SP), 2 * 64, id="tp2-sp"),
        pytest.param((PP,), 2 * 64, id="pp2"),
    ],
)
def test_steps_and_gradient_hooks_are_those_of_whole_logits(
    mesh: tuple[str, ...], tokens: int
) -> None:
    words = (*mesh, "train.micro_batch_size=2")
    tied = (*words, "model.tied_embeddings=true")
    ranks = run_ranks(two_steps, 2, [(*words, *HOW), words, (*tied, *HOW), tied])
    for rank, found in enumerate(ranks):
        for (numbers, counts, asked), (whole, whole_counts, _) in zip(
            found[::2], found[1::2], strict=True
        ):
            for step, of_whole in zip(numbers, whole, strict=True):
                assert step == pytest.approx(of_whole, rel=1e-5)
            # Ranks that hold the same weights start to sum gradients when every hook has run once.
            assert counts == whole_counts == ({1} if mesh in ((), (CP,)) else set())
            assert asked == ({tokens} if PP not in mesh or rank else set())


# --- memory ---------------------------------------------------------------------------------------

# A vocabulary that makes tokens x vocabulary greater than anything else of the model.
VOCAB, TOKENS = 4096, 512
WIDE = (f"model.vocab_size={VOCAB}", f"train.seqlen={TOKENS}")


def largest_tensors(
    rank: int, world_size: int, mesh: tuple[str, ...], how: tuple[str, ...]
) -> tuple[int, int, int]:
    """Elements of the largest tensor of a training step, of an evaluation, of generation."""
    trainer = Meshes().trainer(small(*mesh, *WIDE, *how))
    engine, layout = trainer.engine, trainer.plan.layout
    with LiveTensors() as step:
        engine.forward_backward(trainer.loader.next_step())
        engine.step(1e-3)
    with LiveTensors() as read:
        engine.evaluate(trainer.loader.next_step(), layout, layout.seqlen)
    with LiveTensors() as decoded:
        if not any("pp_size" in word or word == SP or "cp_size" in word for word in mesh):
            generate(chunks_of(trainer)[0], torch.arange(TOKENS), 1)
    return step.largest, read.largest, decoded.largest


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((), id="one"),
        pytest.param((TP,), id="tp2", marks=pytest.mark.exhaustive),
        pytest.param((TP, SP), id="tp2-sp", marks=pytest.mark.exhaustive),
        pytest.param((PP,), id="pp2", marks=pytest.mark.exhaustive),
        pytest.param((CP,), id="cp2", marks=pytest.mark.exhaustive),
    ],
)
def test_no_tensor_of_tokens_times_vocabulary_exists(mesh: tuple[str, ...]) -> None:
    ranks = run_ranks(largest_tensors, 2 if mesh else 1, mesh, HOW)
    logits = TOKENS * VOCAB // (2 if TP in mesh or CP in mesh else 1)
    for largest in ranks:
        # All gradients together, in one buffer, are less than two thirds of it.
        assert max(largest) < logits, largest


def test_whole_logits_are_seen() -> None:
    [(step, read, _)] = run_ranks(largest_tensors, 1, (), ())
    assert step == read == TOKENS * VOCAB


# 32,768 tokens, 32,768 words and 1,024 hidden units, all by 16; so are the 1,024 of a chunk.
SIXTEENTH = 2048, 2048, 64, 64
WAYS = ("chunks", "kept", "megatron")


def peaks(
    rank: int, world_size: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, list[Tensor]]]:
    """Return the peak bytes of forward and backward, and the gradients, of each way."""
    tokens, vocab, size, chunk = SIXTEENTH
    group = build_mesh(small().parallel, 0).tp_group
    assert group.size() == 1
    hidden, weight = (torch.randn(shape).to(dtype) for shape in ((tokens, 1, size), (vocab, size)))
    targets = torch.randint(vocab, (tokens, 1))
    shard = VocabShard(0, vocab)
    found, gradients = {}, {}
    for way in WAYS:
        x, w = (leaf.clone().requires_grad_() for leaf in (hidden, weight))
        with LiveTensors() as live:
            if way == "megatron":
                losses = tensor_parallel.vocab_parallel_cross_entropy(x @ w.t(), targets)
            else:
                losses = output_losses(x, w, targets, shard, chunk if way == "chunks" else None)
            losses.sum().backward()
        found[way], gradients[way] = live.peak, [x.grad, w.grad]
    return found, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_has_logits_in_the_models_dtype_once(dtype: torch.dtype) -> None:
    [(found, gradients)] = run_ranks(peaks, 1, dtype)
    tokens, vocab, size, chunk = SIXTEENTH
    assert found["megatron"] >= 4 * tokens * vocab
    assert found["chunks"] * 8 < found["megatron"]
    # Both gradients, logits once, and little else: in torch, some rows in fp32.
    products = dtype.itemsize * (tokens * size + vocab * size)
    rows = 4 * 2**15 if dtype == torch.bfloat16 else 0
    kept = products + dtype.itemsize * tokens * vocab
    assert found["kept"] == pytest.approx(kept + rows, rel=0.02)
    # Over chunks the weight's gradient is summed in fp32.
    fp32_sum = 4 * vocab * size if dtype == torch.bfloat16 else 0
    chunked = products + dtype.itemsize * chunk * vocab + fp32_sum
    assert found["chunks"] == pytest.approx(chunked + rows, rel=0.1)
    for way in ("chunks", "kept"):
        for mine, theirs in zip(gradients[way], gradients["megatron"], strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            else:
                assert_matches(mine, theirs, torch.finfo(dtype).eps)
