"""Generation says what full forward passes say, token by token, on one rank and on two."""

import pytest
import torch
from torch import Tensor

from lcdist.inference.generate import generate
from lcdist.inference.sampling import Sampling
from lcdist.layout import ContextLayout
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of
from tests.model.small import Meshes, small

NEW = 12
PROMPT = torch.tensor([17, 4, 249, 0, 17, 4, 99])
# Weights so large that every prefix has its own likeliest token, by far.
VARIANTS = ("model.init_std=0.3", "model.nheads_kv=1"), ("model.init_std=0.3",)
# Prompt and answer cross the borders of blocks; sizes are small enough to have some.
METHOD_PROMPT, METHOD_NEW = torch.tensor([17, 4, 248, 0, 17, 4, 99, 5, 6]), 14
METHOD_WORDS = [
    ("attention.method=full", "model.qk_norm=true"),
    ("attention.method=coca", "model.qk_norm=true"),
    ("attention.method=coca",),
    ("attention.method=lssar",),
    ("attention.method=scca", "attention.chunk_size=7"),
    ("attention.method=scca", "attention.pattern=longmixed", "attention.chunk_size=7"),
    ("attention.method=tensorized", "attention.modes=[5]"),
    ("attention.method=tensorized", "attention.modes=[3,2]", "attention.local_blocks=1"),
    ("attention.method=landmark", "attention.block_size=4"),
    (
        "attention.method=landmark",
        "attention.block_size=4",
        "attention.top_k=2",
        "attention.select_tokens=1",
    ),
    ("attention.layers=coca@1 tensorized@2 lssar@-1", "attention.tensorized.modes=[5]"),
    ("attention.method=landmark", "attention.block_size=4", "attention.layers=full@::2"),
    # Rotations that change as the text grows past the eleventh token.
    ('model.rope={scaling="dynamic",factor=4,original_seqlen=11}',),
    ("attention.method=coca", 'model.rope={scaling="dynamic",factor=4,original_seqlen=11}'),
    (
        "attention.method=tensorized",
        "attention.modes=[5]",
        'model.rope={scaling="dynamic",factor=4,original_seqlen=11}',
    ),
    (
        "attention.method=landmark",
        "attention.block_size=4",
        'model.rope={scaling="dynamic",factor=4,original_seqlen=11}',
    ),
    (
        'model.rope={scaling="longrope",factor=4,original_seqlen=11,short_factors=[1,1,1,2,1,1,1,1],'
        "long_factors=[1,2,4,1,9,3,3,3]}",
    ),
]


def greedy_by_full_passes(model: CausalLM, prompt: Tensor, count: int) -> Tensor:
    """Every token from a pass over all tokens before it, without a cache.

    The pass is padded to what attention on blocks needs; landmarks are put in.
    """
    tokens, slots = prompt, model.document_layout
    with torch.no_grad():
        for _ in range(count):
            row = slots.num_slots(len(tokens))
            padded = -(-row // slots.step) * slots.step
            laid = slots.place(tokens, 0, padded, len(tokens)).clamp(min=0)
            layout = ContextLayout("contiguous", padded, 1)
            how = SequenceParams(layout=layout, seqlen=row)
            logits = model(laid[None], None, None, packed_seq_params=how)
            whole = model.gather_logits(logits[:, row - 1])
            if slots.landmark is not None:
                whole[:, slots.landmark] = -torch.inf
            tokens = torch.cat([tokens, whole.argmax(-1)])
    return tokens


def generated(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    meshes, found = Meshes(), []
    for variant in VARIANTS:
        trainer = meshes.trainer(small(f"parallel.tp_size={world_size}", *variant))
        [model] = chunks_of(trainer)
        found.append(
            {
                "greedy": generate(model, PROMPT, NEW),
                "passes": greedy_by_full_passes(model, PROMPT, NEW),
                "sampled": generate(model, PROMPT, NEW, Sampling(8.0, 1)),
                "sampled again": generate(model, PROMPT, NEW, Sampling(8.0, 1)),
                "another seed": generate(model, PROMPT, NEW, Sampling(8.0, 2)),
                "one token": generate(model, PROMPT[:1], 3),
                "nothing new": generate(model, PROMPT, 0),
            }
        )
        stop = found[-1]["greedy"][len(PROMPT) + 4]
        found[-1]["stopped"] = generate(model, PROMPT, NEW, stop=int(stop))
        found[-1]["stop"] = stop
    return found


def generated_by_methods(rank: int, world_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    meshes, found = Meshes(), {}
    for words in METHOD_WORDS:
        trainer = meshes.trainer(small(f"parallel.tp_size={world_size}", *VARIANTS[1], *words))
        [model] = chunks_of(trainer)
        passes = greedy_by_full_passes(model, METHOD_PROMPT, METHOD_NEW)
        found[" ".join(words)] = (generate(model, METHOD_PROMPT, METHOD_NEW), passes)
    return found


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_every_method_generates_what_its_full_passes_say(world_size: int) -> None:
    for of_rank in run_ranks(generated_by_methods, world_size):
        for words, (cached, passes) in of_rank.items():
            assert cached.tolist() == passes.tolist(), words
            assert len(set(cached.tolist())) > 3, words


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    return run_ranks(generated, 1)[0]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_greedy_is_the_argmax_of_full_passes(alone: list[dict[str, Tensor]], variant: int) -> None:
    found = alone[variant]
    assert torch.equal(found["greedy"], found["passes"])
    assert len(found["greedy"]) == len(PROMPT) + NEW
    assert torch.equal(found["greedy"][: len(PROMPT)], PROMPT)
    assert len(set(found["greedy"].tolist())) > 5, "a model that repeats itself shows nothing"
    assert torch.equal(found["nothing new"], PROMPT)
    assert len(found["one token"]) == 4


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_sampling_follows_its_seed_and_skips_padding(
    alone: list[dict[str, Tensor]], variant: int
) -> None:
    found = alone[variant]
    assert torch.equal(found["sampled"], found["sampled again"])
    assert not torch.equal(found["sampled"], found["another seed"])
    assert max(int(tokens.max()) for tokens in found.values()) < 250


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_stops_after_the_stop_token(alone: list[dict[str, Tensor]], variant: int) -> None:
    found = alone[variant]
    new = found["greedy"][len(PROMPT) :].tolist()
    first = new.index(int(found["stop"]))
    assert first < NEW - 1
    assert found["stopped"].tolist() == [*PROMPT.tolist(), *new[: first + 1]]


@pytest.mark.exhaustive
def test_two_tensor_parallel_ranks_say_the_same(alone: list[dict[str, Tensor]]) -> None:
    for of_rank in run_ranks(generated, 2):
        for found, expected in zip(of_rank, alone, strict=True):
            for name in expected:
                assert torch.equal(found[name], expected[name]), name


def refusals(rank: int, world_size: int) -> list[str]:
    meshes, messages = Meshes(), []
    trainer = meshes.trainer(small("parallel.tp_size=2", "parallel.sequence_parallel=true"))
    for prompt in (PROMPT, PROMPT[:0]):
        with pytest.raises(ValueError) as caught:
            generate(chunks_of(trainer)[0], prompt, 1)
        messages.append(str(caught.value))
    return messages


def test_what_it_cannot_do_is_refused() -> None:
    for sequence, empty in run_ranks(refusals, 2):
        assert "parallel.sequence_parallel = true" in sequence
        assert empty == "the prompt has no token"
