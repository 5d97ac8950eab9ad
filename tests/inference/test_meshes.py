"""Texts are continued alike on every mesh, in batches and one by one, read in pieces."""

from functools import partial

import pytest
import torch

from lcdist.inference.generate import generate_batch
from lcdist.inference.sampling import Sampling
from lcdist.inference.settings import Generation
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of
from tests.inference.test_generate import METHOD_WORDS
from tests.model.small import Meshes, small

NEW = 7
WORDS = [
    *METHOD_WORDS,
    ("attention.method=scca", "attention.pattern=flow", "attention.chunk_size=7"),
    ("attention.method=scca", "attention.pattern=sda", "attention.dilation=3"),
    ("attention.method=tensorized", "attention.modes=[4]", "attention.local_blocks=3"),
]
# One of each method.
FEW = [WORDS[i] for i in (2, 3, 4, 7, 9, 10)]
# Weights so large that every prefix has its own likeliest token, by far.
INIT = "model.init_std=0.3"


def prompts() -> list[torch.Tensor]:
    """Return prompts of which the longest is shared by context-parallel ranks."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 250, (n,), generator=generator) for n in (67, 3, 20)]


def continued(rank: int, world_size: int, mesh: str, words: list[tuple[str, ...]]) -> dict:
    """Return all continuations of a batch, by the method's words."""
    meshes, found = Meshes(), {}
    for each in words:
        on_mesh = [f"parallel.{size}" for size in mesh.split()]
        [model] = chunks_of(meshes.trainer(small(INIT, *on_mesh, *each)))
        # A small piece makes calls of a few tokens, and sharded calls of the least size.
        texts = generate_batch(model, prompts(), Generation(NEW, piece=1 if mesh else 4096))
        found[" ".join(each)] = [text.tolist() for text in texts]
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[int]]]:
    """Return what one process gives, all prompts at once, read whole."""
    return run_ranks(partial(continued, mesh="", words=WORDS), 1)[0]


def one_by_one(rank: int, world_size: int) -> dict[str, list[list[int]]]:
    meshes, found = Meshes(), {}
    for each in WORDS:
        [model] = chunks_of(meshes.trainer(small(INIT, *each)))
        found[" ".join(each)] = [
            generate_batch(model, [prompt], Generation(NEW, piece=17))[0].tolist()
            for prompt in prompts()
        ]
    return found


def test_a_batch_gives_what_its_prompts_give_alone(alone: dict) -> None:
    assert run_ranks(one_by_one, 1)[0] == alone
    for words, texts in alone.items():
        assert [len(text) - len(prompt) for text, prompt in zip(texts, prompts(), strict=True)] == [
            NEW
        ] * 3, words
        assert len({tuple(text[-NEW:]) for text in texts}) == 3, words


@pytest.mark.parametrize(
    "mesh",
    ["cp_size=2", "pp_size=2", pytest.param("tp_size=2", marks=pytest.mark.exhaustive)],
)
def test_every_mesh_continues_alike(mesh: str, alone: dict) -> None:
    for of_rank in run_ranks(partial(continued, mesh=mesh, words=FEW), 2):
        assert of_rank == {" ".join(words): alone[" ".join(words)] for words in FEW}


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["cp_size=2", "pp_size=2"])
def test_the_other_options_continue_alike(mesh: str, alone: dict) -> None:
    rest = [words for words in WORDS if words not in FEW]
    for of_rank in run_ranks(partial(continued, mesh=mesh, words=rest), 2):
        assert of_rank.items() <= alone.items()


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["cp_size=2 pp_size=2", "cp_size=2 tp_size=2", "cp_size=4"])
def test_four_ranks_continue_alike(mesh: str, alone: dict) -> None:
    for of_rank in run_ranks(partial(continued, mesh=mesh, words=FEW), 4):
        assert of_rank.items() <= alone.items()


def sampled(rank: int, world_size: int) -> list[list[list[int]]]:
    mesh = [] if world_size == 1 else [f"parallel.pp_size={world_size}"]
    [model] = chunks_of(Meshes().trainer(small(INIT, *mesh)))
    found = []
    for sampling in (Sampling(8.0, seed=1), Sampling(8.0, top_k=1), Sampling(8.0, top_p=1e-9)):
        texts = generate_batch(model, prompts(), Generation(NEW, sampling))
        found.append([text.tolist() for text in texts])
    first = generate_batch(model, prompts()[:1], Generation(NEW, Sampling(8.0, seed=1)))
    assert first[0].tolist() == found[0][0], "the first text does not depend on the others"
    stops = frozenset(found[1][0][-4:-3])
    stopped = generate_batch(model, prompts(), Generation(NEW, stops=stops))
    return [*found, [text.tolist() for text in stopped]]


def test_sampling_and_stops_are_each_texts_own(alone: dict) -> None:
    one = run_ranks(sampled, 1)[0]
    sampled_texts, most_likely, also, stopped = one
    greedy = alone[" ".join(METHOD_WORDS[0])]
    assert most_likely == also != sampled_texts
    for text, whole in zip(stopped, most_likely, strict=True):
        assert text == whole[: len(text)]
    assert len(stopped[0]) < len(most_likely[0]), "the first text ends early"
    assert any(len(a) == len(b) for a, b in zip(stopped, most_likely, strict=True)), greedy
    for of_rank in run_ranks(sampled, 2):
        assert of_rank == one
