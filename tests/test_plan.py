"""The plan: conflicts are reported together, and estimates agree with real runs."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdist.attention import METHODS, HeadSlice, Shape
from lcdist.commands.main import main
from lcdist.config import ConfigError, load
from lcdist.config.schema import CocaOptions
from lcdist.distributed.mesh import build_mesh
from lcdist.exchange import traffic
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.hardware.peak import Peak
from lcdist.model.build import build_model
from lcdist.model.output_loss import VocabShard, output_losses
from lcdist.model.sequence import SequenceParams
from lcdist.plan import Plan, make_plan, plan_rows, smallest_world
from lcdist.train.build import build_trainer, open_dataset
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, optimizer_of
from tests.live import LiveTensors

DEBUG = Path(__file__).parent.parent / "configs" / "debug" / "full.toml"


def plan_of(*overrides: str, world_size: int | None = None) -> Plan:
    config = load(DEBUG, overrides)
    return make_plan(config, smallest_world(config) if world_size is None else world_size)


def errors_of(*overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_of(*overrides, world_size=world_size)
    return list(caught.value.errors)


# --- conflicts ----------------------------------------------------------------------------------

CONFLICTS = {
    "attention.impl=fa4 data.documents=pack":
        "attention.impl = 'fa4': a library takes bf16 and no packed documents, here are "
        "data.documents = 'pack', train.dtype = 'auto'; use impl 'auto' or 'triton'",
    "attention.impl=cudnn train.dtype=fp32":
        "attention.impl = 'cudnn': a library takes bf16 and no packed documents, here are "
        "data.documents = 'join', train.dtype = 'fp32'; use impl 'auto' or 'triton'",
    "attention.impl=fa3 attention.method=scca":
        "attention.impl = 'fa3': attention.method = 'scca' has auto, triton, torch, reference",
    "model.nheads=5 model.nheads_kv=5":
        "model.hidden_size = 64 is not a multiple of model.nheads = 5; change one of them "
        "or set model.head_dim",
    "model.head_dim=7":
        "head_dim = 7: rotary embedding needs an even number from 4",
    "model.nheads=32":
        "head_dim = 2: rotary embedding needs an even number from 4",
    "model.nheads_kv=3":
        "model.nheads = 4 is not a multiple of model.nheads_kv = 3",
    "model.ffn_hidden_size=177 parallel.tp_size=2":
        "model.ffn_hidden_size = 177 is not a multiple of parallel.tp_size = 2; set it to one of "
        "1, 3, 59",
    "model.nheads=6 model.nheads_kv=2 model.head_dim=8 parallel.tp_size=4":
        "model.nheads = 6 is not a multiple of parallel.tp_size = 4; set it to one of 1, 2, 3, 6",
    "model.nheads=12 model.nheads_kv=6 model.head_dim=8 parallel.tp_size=4":
        "model.nheads_kv = 6 and parallel.tp_size = 4: one must be a multiple of the "
        "other",
    "parallel.pp_size=3":
        "model.num_layers = 4 is not a multiple of parallel.pp_size x vp_size = 3 x 1 = 3; "
        "choose a product of 1, 2, 4",
    "parallel.vp_size=2":
        "parallel.vp_size = 2 interleaves pipeline stages and needs parallel.pp_size > 1; "
        "set vp_size = 1",
    "parallel.vp_size=2 parallel.pp_size=2 train.global_batch_size=3":
        "3 micro-batches a step: with parallel.vp_size > 1 they must be a multiple of "
        "parallel.pp_size = 2; raise train.global_batch_size",
    "parallel.sequence_parallel=true":
        "parallel.sequence_parallel = true needs parallel.tp_size > 1; set it to false",
    "train.micro_batch_size=3":
        "train.global_batch_size = 4 is not a multiple of train.micro_batch_size x "
        "data-parallel size = 3 x 1 = 3; set it "
        "to 3 or 6",
    "model.rope.scaling=llama3 model.rope.low_freq_factor=4":
        "model.rope.low_freq_factor = 4.0 must be less than model.rope.high_freq_factor = 4.0",
    "model.rope.scaling=yarn model.rope.original_seqlen=9 model.rope.beta_slow=40":
        "model.rope.beta_slow = 40.0 must be less than model.rope.beta_fast = 32.0",
    "train.loss=whole train.loss_chunk=5":
        "train.loss_chunk = 5 has no meaning with train.loss = 'whole'; set it to 0 or use "
        "'chunked'",
    "train.profile=2:3":
        "train.profile = '2:3': must be a step or a range of increasing steps, such as '5' or "
        "'5-7', from 1 to 20; leave it empty to profile none",
    "train.profile=0":
        "train.profile = 0: must be a step or a range of increasing steps, such as '5' or "
        "'5-7', from 1 to 20; leave it empty to profile none",
    "train.profile=20-21":
        "train.profile = '20-21' is beyond train.steps = 20; choose from 1 to 20, or raise "
        "train.steps",
    "train.profile=20 train.profile_rank=1":
        "train.profile_rank = 1: a world of size 1 has no such rank; choose from 0",
    "train.profile_rank=1":
        "train.profile_rank = 1 has no meaning with train.profile = ''; set the steps to profile, "
        "or leave the key out",
    "optim.min_lr=1":
        "optim.min_lr = 1.0 is greater than optim.lr = 0.003",
    "optim.beta2=1":
        "optim.beta1 = 0.9, optim.beta2 = 1.0: must be less than 1",
    "optim.warmup_steps=21":
        "optim.warmup_steps + decay_steps = 21 + 0 is more than train.steps = 20; lower them, "
        "or raise train.steps",
    "optim.schedule=wsd optim.decay_steps=17":
        "optim.warmup_steps + decay_steps = 4 + 17 is more than train.steps = 20; lower them, "
        "or raise train.steps",
    "optim.schedule=wsd":
        "optim.schedule = 'wsd' needs optim.decay_steps > 0",
    "optim.decay_steps=2":
        "optim.decay_steps = 2 has no meaning with optim.schedule = 'cosine'; set it to 0 "
        "or use 'wsd'",
    "data.source=tokens":
        "data.path is empty: name a folder made by 'lcdist tokenize', or set data.source "
        "= 'synthetic'",
    "data.path=here":
        "data.path = 'here' has no meaning with data.source = 'synthetic'",
    "evaluate.lengths=[]":
        "evaluate.lengths = []: name at least one length, such as [4096]",
    "attention.method=fool":
        "attention.method = 'fool': must be one of " + ", ".join(METHODS),
    "attention.layers=full@4":
        "attention.layers: 'full@4' names none of the 4 layers; write method@numbers or slices "
        "from 0, with commas, such as full@3::4 or coca@0,-1",
    "attention.layers=full@0::0":
        "attention.layers: 'full@0::0' names none of the 4 layers; write method@numbers or slices "
        "from 0, with commas, such as full@3::4 or coca@0,-1",
    "attention.layers=full":
        "attention.layers: 'full' names none of the 4 layers; write method@numbers or slices "
        "from 0, with commas, such as full@3::4 or coca@0,-1",
    "attention.layers='coca@1:3 lssar@-2'":
        "attention.layers = 'coca@1:3 lssar@-2': layer 2 is named twice; name it once",
    "attention.layers=fool@0":
        "attention.layers = 'fool': must be one of " + ", ".join(METHODS),
    "attention.coca.variant=strict":
        "[attention.coca] has options of a method that attention.layers = '' gives to no layer; "
        "name its layers there or remove the table",
    "attention.full={}":
        "[attention.full] is a table, but attention.method = 'full': write its options "
        "beside method",
    "attention.method=landmark attention.top_k=2 parallel.cp_size=2":
        "train.seqlen = 256 would be mostly padding: attention.method = 'landmark' on "
        "parallel.cp_size = 2 needs a multiple of 8192; use a longer seqlen, fewer ranks or "
        "smaller blocks",
    "attention.method=landmark attention.top_k=2 parallel.layout=zigzag":
        "parallel.layout = 'zigzag': attention.method = 'landmark' takes contiguous",
    "attention.layers='landmark@0 tensorized@1' attention.landmark.block_size=20 "
    "attention.tensorized.modes=[24] data.documents=pack":
        "train.seqlen = 256: with data.documents = 'pack' this attention needs a multiple of 120; "
        "the next is 360",
    "attention.method=coca evaluate.attention=dense":
        "evaluate.attention = 'dense': attention.method = 'coca' trains weights that do not work "
        "with full attention; use 'method' or 'auto'",
}  # fmt: skip


@pytest.mark.parametrize("overrides", CONFLICTS)
def test_conflict_is_reported(overrides: str) -> None:
    words = shlex.split(overrides)
    world = smallest_world(load(DEBUG, words))
    assert errors_of(*words, world_size=world) == [CONFLICTS[overrides]]


@pytest.mark.parametrize("world_size", [0, -2, 1, 3])
def test_world_size_that_is_no_multiple_of_the_mesh_is_rejected(world_size: int) -> None:
    mesh = "parallel.tp_size x pp_size x cp_size = 1 x 1 x 2 = 2"
    assert errors_of("parallel.cp_size=2", world_size=world_size) == [
        f"world size {world_size} is not a multiple of {mesh}; start 2 processes or a multiple "
        "(launch/run.py --nproc-per-node)"
    ]


def test_data_parallel_size_must_divide_the_batch() -> None:
    (error,) = errors_of(world_size=3)
    assert error.endswith(
        "train.micro_batch_size x data-parallel size = 1 x 3 = 3; set it to 3 or 6"
    )


def test_all_conflicts_are_reported_together() -> None:
    conflicts = [
        "model.nheads_kv=3",
        "train.micro_batch_size=3",
        "optim.min_lr=1",
        "data.path=here",
    ]
    conflicts += ["optim.schedule=wsd", "attention.method=fool"]
    assert set(errors_of(*conflicts)) == {CONFLICTS[override] for override in conflicts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExternalOptions:
    block: int = 6


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a method of another package: one layout, blocks, no packed documents."""
    method = dataclasses.replace(
        METHODS["full"],
        name="external",
        options=ExternalOptions,
        layouts_for=lambda options: ("contiguous",),
        multiple_of=lambda options, cp_size, kind="contiguous": options.block * cp_size,
        supports=frozenset({"gqa"}),
        impls=("auto", "reference"),
    )
    monkeypatch.setitem(METHODS, "external", method)


@pytest.mark.usefixtures("external")
def test_external_method_gives_its_layouts_and_options() -> None:
    method = "attention.method=external"
    assert errors_of(method, "parallel.layout=zigzag", "data.documents=pack") == [
        "data.documents = 'pack': attention.method = 'external' cannot pack documents",
        "parallel.layout = 'zigzag': attention.method = 'external' takes contiguous",
    ]
    (error,) = errors_of(method, "attention.impl=triton")
    assert error == ("attention.impl = 'triton': attention.method = 'external' has auto, reference")
    (error,) = errors_of(method, "attention.blok=5")
    assert error == "unknown key 'attention.blok'; did you mean 'attention.block'?"
    plan = plan_of(method, "attention.block=5", "parallel.cp_size=3")
    assert (plan.layout.kind, plan.shape.seqlen, plan.layers[0].options) == (
        "contiguous",
        270,
        ExternalOptions(block=5),
    )


def test_layers_may_differ() -> None:
    plan = plan_of(
        "attention.layers=coca@1:3 lssar@-1", "attention.coca.variant=strict", "parallel.cp_size=2"
    )
    names = [layer.method.name for layer in plan.layers]
    assert names == ["full", "coca", "coca", "lssar"]
    assert plan.layers[1].options == CocaOptions(variant="strict")
    assert plan.shape.attention_name == "1 x full, 2 x coca, 1 x lssar"
    alone = {name: plan_of(f"attention.method={name}", "parallel.cp_size=2") for name in set(names)}
    wanted = sum(alone[name].compute.attention_flops_per_token / 4 for name in names)
    assert plan.compute.attention_flops_per_token == wanted
    assert plan.traffic.exchange_bytes_per_step * 4 == sum(
        alone[name].traffic.exchange_bytes_per_step for name in names
    )
    with_coca = max(p.traffic.exchange_bytes[0] for p in alone.values())
    assert plan.traffic.exchange_bytes[0] == with_coca
    staged = plan_of(
        "attention.layers=coca@::2", "parallel.cp_size=2", "parallel.pp_size=2", world_size=4
    )
    assert staged.shape.stage_layers == ((0, 1), (2, 3))
    turns = plan_of("parallel.pp_size=2", "parallel.vp_size=2", "train.global_batch_size=4")
    assert turns.shape.stage_layers == ((0, 2), (1, 3))


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "seqlen", "kind"),
    [
        ("train.seqlen=250", 250, "zigzag"),
        ("train.seqlen=250 parallel.cp_size=2", 252, "zigzag"),
        ("train.seqlen=250 parallel.cp_size=2 parallel.layout=striped", 250, "striped"),
        ("train.seqlen=1 parallel.cp_size=3", 6, "zigzag"),
        ("train.seqlen=253 parallel.tp_size=2 parallel.sequence_parallel=true", 254, "zigzag"),
        (
            "train.seqlen=250 parallel.cp_size=3 parallel.tp_size=4 model.nheads_kv=1 "
            "parallel.sequence_parallel=true",
            252,
            "zigzag",
        ),
    ],
)
def test_sample_is_padded_to_a_multiple_for_the_mesh(
    overrides: str, seqlen: int, kind: str
) -> None:
    plan = plan_of(*overrides.split())
    assert (plan.shape.seqlen, plan.layout.kind) == (seqlen, kind)
    assert plan.layout.local_seqlen * plan.layout.cp_size == seqlen


def test_data_parallel_size_is_the_rest_of_the_world() -> None:
    mesh = ("parallel.tp_size=2", "parallel.cp_size=2", "parallel.pp_size=2")
    assert smallest_world(load(DEBUG, mesh)) == 8
    plan = plan_of(*mesh, world_size=16)
    assert (plan.dp_size, plan.shape.num_micro_batches) == (2, 2)


def test_vocabulary_is_padded_for_every_tp_size() -> None:
    sizes = {"model.vocab_size=257": 384, "model.vocab_size=256": 256}
    assert {words: plan_of(words).shape.padded_vocab_size for words in sizes} == sizes
    odd = ("model.nheads=6", "model.nheads_kv=3", "model.head_dim=8", "model.ffn_hidden_size=177")
    assert plan_of("parallel.tp_size=3", *odd).shape.padded_vocab_size == 384


# --- operations and bytes, by hand ----------------------------------------------------------------

BY_HAND = (
    *("model.vocab_size=100", "model.num_layers=3", "model.hidden_size=8", "model.nheads=2"),
    *("model.nheads_kv=1", "model.head_dim=6", "model.ffn_hidden_size=10", "train.seqlen=4"),
)


def test_parameters_and_operations_by_hand() -> None:
    plan = plan_of(*BY_HAND)
    # q: 8 x 12, k and v: 8 x 6 each, projection: 12 x 8, gate and up: 8 x 10 each, down: 10 x 8.
    products = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 2 * 8 * 10 + 10 * 8
    assert plan.parameters.layer == products + 2 * 8
    # Embedding and output of 128 rows, the last norm.
    assert plan.parameters.total == 3 * (products + 16) + 2 * 128 * 8 + 8
    assert plan_of(*BY_HAND, "model.tied_embeddings=true").parameters.total == (
        3 * (products + 16) + 128 * 8 + 8
    )
    # Four queries see 1 + 2 + 3 + 4 keys: q k and p v, 2 heads, 6 wide, 2 operations each.
    causal = 3 * (2 * 2 * 6 * 2) * (1 + 2 + 3 + 4) / 4
    square = 3 * (2 * 2 * 6 * 2) * 4
    linear = 2 * (3 * products + 128 * 8)
    assert plan.compute.flops_per_token == 3 * (linear + causal)
    assert plan.compute.flops_per_token_square == 3 * (linear + square)


def test_exchange_bytes_by_hand() -> None:
    mesh = ("parallel.cp_size=2", "train.micro_batch_size=2", "train.global_batch_size=6")
    plan = plan_of(*BY_HAND, *mesh)
    # k and v of 2 samples, 2 local tokens, 1 head, 6 wide, fp32, to one other rank ...
    block = 2 * 2 * 2 * 1 * 6 * 4
    # ... and again in backward with their gradients, which need a second hop to return.
    assert plan.traffic.exchange_bytes == (block, block + 2 * block)
    assert plan.traffic.exchange_bytes_per_step == 3 * 3 * (block + 3 * block)
    recomputing = plan_of(*BY_HAND, *mesh, "train.recompute=full")
    assert recomputing.traffic.exchange_bytes_per_step == 3 * 3 * (2 * block + 3 * block)
    assert plan_of(*BY_HAND).traffic.exchange_bytes == (0, 0)


def test_attention_shape_of_a_rank_has_its_share_of_the_heads() -> None:
    plan = plan_of("parallel.tp_size=4", "model.nheads_kv=2", "train.seqlen=64")
    heads = HeadSlice(first=3, nheads=4, first_kv=1, nheads_kv=2)
    assert plan.shape.attention_shape(3, tp_rank=3) == Shape(
        3, 1, 1, 16, itemsize=4, seqlen=64, heads=heads
    )
    assert plan.shape.attention_shape(1) == Shape(1, 4, 2, 16, itemsize=4, seqlen=64)
    assert plan_of("train.dtype=bf16").shape.itemsize == 2


# --- against real models --------------------------------------------------------------------------

# A sequence and heads that no other size equals.
ODD = ("model.head_dim=24", "train.seqlen=120", "model.vocab_size=300", "model.num_layers=4")
TIED = "model.tied_embeddings=true"
TP, PP, CP = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
SEQUENCE, TWO = "parallel.sequence_parallel=true", "train.micro_batch_size=2"
NORMS = "model.qk_norm=true"
MODELS = {
    1: [(), (TIED,), ("train.dtype=bf16",), (NORMS,)],
    2: [
        *[(TP,), (TP, "model.nheads_kv=1"), (PP,), (PP, TIED), (PP, "parallel.vp_size=2"), (CP,)],
        (TP, NORMS),
        # One tensor that is more than half of all.
        (TIED, "model.vocab_size=8000"),
    ],
}


def parameters_and_moments(
    rank: int, world_size: int, cases: list[tuple[str, ...]]
) -> list[tuple[Any, ...]]:
    """Return (parameters on this rank, elements of its optimizer's moments) for each case."""
    results = []
    for overrides in cases:
        plan = plan_of(*ODD, *overrides, world_size=world_size)
        mesh = build_mesh(plan.config.parallel, 0)
        trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "config"))
        parameters = sum(p.numel() for chunk in chunks_of(trainer) for p in chunk.parameters())
        moments = sum(master.numel() for master in optimizer_of(trainer).masters)
        results.append((parameters, moments))
    return results


@pytest.mark.parametrize("world_size", MODELS)
def test_parameters_and_states_equal_those_of_real_models(world_size: int) -> None:
    ranks = run_ranks(parameters_and_moments, world_size, MODELS[world_size])
    for overrides, *measured in zip(MODELS[world_size], *ranks, strict=True):
        plan = plan_of(*ODD, *overrides, world_size=world_size)
        first, last = plan.parameters.stages
        assert (measured[0][0], measured[-1][0]) == (first, last), overrides
        if world_size == 1:
            assert measured[0] == (plan.parameters.total, plan.parameters.total), overrides
        # Weights, fp32 gradients, two fp32 moments and, beside bf16 weights, an fp32 master.
        masters = 12 if plan.dtype == "bf16" else 8
        most = max(p * (plan.shape.itemsize + 4) + moments * masters for p, moments in measured)
        assert plan.memory.state_bytes == pytest.approx(most, rel=0.02), overrides


def saved_activations(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[int]:
    """Return the bytes that a forward pass saves for backward on this rank, for each case."""
    results = []
    for overrides in cases:
        plan = plan_of(*ODD, *overrides)
        mesh = build_mesh(plan.config.parallel, 0)
        (model,) = build_model(plan, mesh.device)
        own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        saved: dict[int, Any] = {}

        def keep(x: torch.Tensor, own: set[int] = own, saved: dict[int, Any] = saved) -> Any:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage
            return x

        shape = (plan.config.train.micro_batch_size, plan.layout.local_seqlen)
        tokens = torch.zeros(shape, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            sequence = SequenceParams(layout=plan.layout)
            losses = model(tokens, None, None, labels=tokens, packed_seq_params=sequence)
        results.append(sum(storage.nbytes() for storage in saved.values()))
        losses.sum().backward()
    return results


MESHES = {
    1: [(), (TWO,), (NORMS,)],
    2: [(CP,), (CP, TWO), (TP,), (TP, SEQUENCE), (TP, TWO), (TP, NORMS), (CP, NORMS)],
}


@pytest.mark.parametrize("world_size", MESHES)
def test_activations_equal_what_autograd_saves(world_size: int) -> None:
    ranks = run_ranks(saved_activations, world_size, MESHES[world_size])
    for overrides, *measured in zip(MESHES[world_size], *ranks, strict=True):
        plan = plan_of(*ODD, *overrides)
        assert plan.memory.activation_bytes == pytest.approx(max(measured), rel=0.02), overrides


def test_full_recompute_saves_inputs_and_recomputes_one_layer() -> None:
    recompute, single = "train.recompute=full", "model.num_layers=1"
    ((outside, all_layers, one_layer),) = run_ranks(
        saved_activations, 1, [(recompute,), (), (single,)]
    )
    layer = (all_layers - one_layer) / 3
    assert plan_of(*ODD, recompute).memory.activation_bytes == pytest.approx(
        outside + layer, rel=0.02
    )


def test_pipelining_saves_activations_of_micro_batches_in_flight() -> None:
    one, two = plan_of(*ODD), plan_of(*ODD, PP)
    four = plan_of(*ODD, "parallel.pp_size=4")
    # Logits, 4 + 8 bytes a token of the loss, and two hidden states.
    logits = (4 * 384 + 12 + 2 * 4 * 64) * 120
    layer = (one.memory.activation_bytes - logits) // 4
    # First stage: as many micro-batches as there are stages. Last stage: one, and the logits.
    assert two.memory.activation_bytes == max(2 * 2 * layer, 2 * layer + logits)
    assert four.memory.activation_bytes == max(4 * 1 * layer, layer + logits)
    # Two chunks of one layer a stage: 2 (pp - 1) + (vp - 1) pp + 1 = 5 passes before the first
    # backward on the first stage.
    chunks = plan_of(*ODD, PP, "parallel.vp_size=2")
    assert chunks.memory.activation_bytes == max(5 * layer, 3 * layer + logits)
    single = plan_of(*ODD, PP, "train.micro_batch_size=4")
    assert single.memory.activation_bytes == 4 * max(2 * layer, 2 * layer + logits)


CHUNKED = ("train.loss=chunked", "train.loss_chunk=50")


@pytest.mark.parametrize("world_size", MESHES)
def test_chunked_loss_saves_no_logits(world_size: int) -> None:
    cases = [(*overrides, *CHUNKED) for overrides in MESHES[world_size]]
    ranks = run_ranks(saved_activations, world_size, cases)
    for overrides, *measured in zip(cases, *ranks, strict=True):
        plan = plan_of(*ODD, *overrides)
        # The logits of 50 tokens are a temporary buffer of backward.
        buffers = 50 * 4 * 384 // plan.config.parallel.tp_size
        assert plan.memory.activation_bytes - buffers == pytest.approx(max(measured), rel=0.02), (
            overrides
        )


def peak_of_loss(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[int]:
    """Return the peak bytes of computing the loss and its gradients, for each case."""
    results = []
    for overrides in cases:
        plan = plan_of(*ODD, *overrides)
        group = build_mesh(plan.config.parallel, 0).tp_group
        rows, width = plan.shape.padded_vocab_size // group.size(), plan.config.model.hidden_size
        dtype = torch.bfloat16 if plan.dtype == "bf16" else torch.float32
        hidden = torch.randn(plan.shape.local_tokens, 1, width).to(dtype).requires_grad_()
        weight = torch.randn(rows, width).to(dtype)
        targets = torch.zeros(plan.shape.local_tokens, 1, dtype=torch.int64)
        chunk = plan.memory.loss_chunk(plan.shape.local_tokens)
        assert chunk is not None
        shard = VocabShard(0, rows, group if group.size() > 1 else None)
        with LiveTensors() as live:
            output_losses(hidden, weight, targets, shard, chunk).sum().backward()
        # The gradient of the hidden states is counted with the activations.
        results.append(live.peak - hidden.nbytes)
    return results


def test_buffers_of_a_chunked_loss_equal_a_real_ones() -> None:
    wide = ("model.vocab_size=60000", "train.loss=chunked", "train.loss_chunk=50")
    cases = [wide, (*wide, "train.dtype=bf16"), (*wide, "train.loss_chunk=1000")]
    for cases_of_size in (cases, [(*case, TP) for case in cases]):
        ranks = run_ranks(peak_of_loss, 2 if TP in cases_of_size[0] else 1, cases_of_size)
        for overrides, *measured in zip(cases_of_size, *ranks, strict=True):
            assert sum(plan_of(*ODD, *overrides).memory.loss_bytes) == pytest.approx(
                max(measured), rel=0.05
            )


def test_logits_are_kept_up_to_4_gib_a_rank() -> None:
    savings_off = ("train.recompute=none", "train.mlp=whole")
    sizes = ("model.vocab_size=32768", "train.seqlen=32768", *savings_off)
    kept = plan_of(*sizes)
    assert kept.memory.loss_chunk(kept.shape.local_tokens) is None
    # Beside logits in fp32, 4 + 8 bytes a token.
    assert kept.memory.loss_bytes == (32768 * (32768 * 4 + 12), 0)
    assert dict(plan_rows(kept))["loss"] == "logits kept for backward, 4.000 GiB a rank"
    two = plan_of(*sizes, TWO)
    assert two.memory.loss_chunk(two.shape.local_tokens) == 4096
    assert two.memory.loss_bytes == (65536 * 12, 4096 * 32768 * 4)
    assert dict(plan_rows(two))["loss"] == (
        "logits of 4,096 tokens at a time, 0.501 GiB a rank; whole they take 8.000 GiB"
    )
    whole = plan_of(*sizes, TWO, "train.loss=whole")
    assert two.memory.activation_bytes - whole.memory.activation_bytes == (
        sum(two.memory.loss_bytes) - sum(whole.memory.loss_bytes)
    )
    # Halved by context parallelism, tensor parallelism, and bf16.
    assert plan_of(*sizes, TWO, CP).memory.loss_chunk(32768) is None
    for half in (TP, "train.dtype=bf16"):
        assert plan_of(*sizes, half).memory.loss_chunk(65536) is None
        assert plan_of(*sizes, half).memory.loss_chunk(65537) == 4096
    # As many as fit 1 GiB up to 4,096, at least those that fit 128 MiB, never fewer than 1,024 of
    # many, never more than there are.
    for vocab, chunk in ((2**17, 2048), (2**20, 1024), (256, 2**17)):
        wide = plan_of(f"model.vocab_size={vocab}", "train.loss=chunked")
        assert wide.memory.loss_chunk(10**6) == chunk
    assert plan_of("train.loss=chunked").memory.loss_chunk(256) == 256
    assert plan_of("train.loss_chunk=10").memory.loss_chunk(256) is None
    assert plan_of("train.loss=chunked", "train.loss_chunk=10").memory.loss_chunk(256) == 10


STEPS = [
    (CP,),
    (CP, TWO, "model.nheads_kv=4"),
    (CP, "train.recompute=full"),
    (CP, "data.documents=pack", "train.seqlen=63"),
    (CP, "parallel.layout=striped", "train.dtype=bf16"),
]


def sent_bytes(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[int]:
    """Return the bytes that this rank's attention sends in one step, for each case."""
    results = []
    for overrides in cases:
        plan = plan_of(*ODD, "model.num_layers=2", *overrides, world_size=world_size)
        mesh = build_mesh(plan.config.parallel, 0)
        trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "config"))
        with traffic() as t:
            trainer.engine.forward_backward(trainer.loader.next_step())
        results.append(t.total)
    return results


def test_bytes_of_a_step_equal_what_a_step_sends() -> None:
    for overrides, *measured in zip(STEPS, *run_ranks(sent_bytes, 2, STEPS), strict=True):
        plan = plan_of(*ODD, "model.num_layers=2", *overrides)
        assert measured == [plan.traffic.exchange_bytes_per_step] * 2, overrides
        assert measured[0] > 0


# --- for other hardware ---------------------------------------------------------------------------


def test_planning_for_a_gpu_does_not_ask_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise AssertionError("the plan asked torch for CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    config = load(DEBUG, ["train.seqlen=16385"])
    plan = make_plan(config, 1, GPU_SPECS["h100"])
    assert (plan.dtype, plan.hardware.memory_bytes) == ("bf16", 80 * 2**30)
    assert plan.memory.recompute == "none" and not plan.memory.offloads
    assert dict(plan_rows(plan))["memory"].endswith("of 80.0 GiB on each NVIDIA H100")
    with pytest.raises(AssertionError, match="asked torch"):
        make_plan(config, 1)


# --- on the command line --------------------------------------------------------------------------


def test_plan_command_defaults_to_the_smallest_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEBUG), CP, "parallel.tp_size=2"]) == 0
    assert "4 = dp 1 x pp 1 x cp 2 x tp 2" in capsys.readouterr().out


def test_plan_command_uses_the_given_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEBUG), "--world-size", "2", "train.seqlen=99"]) == 0
    shown = capsys.readouterr().out
    assert "2 = dp 2 x pp 1 x cp 1 x tp 1" in shown and "99 tokens a rank" in shown


def test_plan_command_uses_the_given_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEBUG), "--hardware", "h200"]) == 0
    shown = capsys.readouterr().out
    assert "in bf16" in shown and "of 141.0 GiB on each NVIDIA H200" in shown
    assert main(["plan", str(DEBUG), "--hardware", "h300"]) == 2
    error = capsys.readouterr().err
    assert "h300" in error and all(name in error for name in GPU_SPECS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(DEBUG), "--world-size", "0"], "world size 0 is not a multiple"),
        ([str(DEBUG), "train.stepz=1"], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (
            ["no/such.toml", "--world-size", "4"],
            "no/such.toml: No such file or directory; the folder no does not exist",
        ),
        (
            [str(DEBUG.parent / "ful.toml")],
            f"; give one of {DEBUG.parent / 'full.toml'}",
        ),
        ([str(DEBUG.parent)], "Is a directory"),
    ],
)
def test_plan_command_exits_with_status_2_on_a_mistake(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    shown = capsys.readouterr()
    assert (
        shown.out == "" and shown.err.startswith("configuration error: ") and message in shown.err
    )


@pytest.mark.parametrize("late", [["--wrld-size", "2"], ["train.steps=2", "-x"]])
def test_misspelt_option_is_not_an_override(late: list[str]) -> None:
    assert main(["plan", str(DEBUG), *late]) == 2
