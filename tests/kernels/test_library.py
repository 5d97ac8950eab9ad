"""cuDNN and FlashAttention as operators of whole and causal blocks, with torch in their places."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.layout import ContextLayout
from lcdist_kernels import coca_attention, full_attention
from lcdist_kernels.common import log_choice
from lcdist_kernels.full import FORCED, TORCH_IMPL, TRITON_IMPL, library, select_block_impl
from lcdist_kernels.full.library_block import Cut, LibraryBlock, cut_of
from lcdist_kernels.full.library_choice import (
    RANKING,
    choose_library,
    force_library,
    refusal,
)
from lcdist_kernels.full.op import FullFunction
from lcdist_kernels.full.self_test import self_test
from lcdist_kernels.tile_ranges import band_of
from tests.attention.body import make, on_virtual_ranks, whole
from tests.kernels.helpers import HERE, assert_close, in_nan
from tests.kernels.library_stand_ins import Call, StandIns, libraries
from tests.kernels.test_full import borders, inputs, with_grads
from tests.kernels.test_full_triton import eager, truth_of
from tests.tolerance import assert_as_good_as_eager, assert_matches

NAMES = ("cudnn", "fa2", "fa3", "fa4")
DOUBLE = (torch.float64,)
cpu_only = pytest.mark.skipif(
    HERE.type == "cuda", reason="the stand-ins for libraries take CPU tensors"
)


@pytest.fixture(autouse=True)
def clear_log() -> Iterator[None]:
    log_choice.cache_clear()
    yield
    log_choice.cache_clear()


def like(dtype: torch.dtype = torch.bfloat16, head_dim: int = 16) -> Tensor:
    return torch.empty(1, 1, 1, head_dim, dtype=dtype)


def chosen(x: Tensor) -> str | None:
    found = choose_library(x, "test")
    return found and found.title


@pytest.mark.parametrize("capability", sorted(RANKING))
def test_the_fastest_that_is_there_is_taken(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcdist_kernels.full.library_choice.self_test", lambda *like: None)
    ranked = list(RANKING[capability])
    while ranked:
        with libraries(monkeypatch, *ranked, capability=capability):
            # torch has operators for the others, with an implementation or without.
            monkeypatch.setitem(RANKING, capability, tuple(ranked))
            assert chosen(like()) == library.LIBRARIES[ranked[0]].title
        del ranked[0]


def test_the_choice_is_made_once_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with libraries(monkeypatch, "fa3") as made, caplog.at_level("INFO", "lcdist_kernels"):
        for _ in range(2):
            assert chosen(like()) == "FlashAttention-3"
        assert len(made["fa3"].forward) == 2, "the two blocks of one self-test"
        assert chosen(like(torch.float16)) and len(made["fa3"].forward) == 4
        assert chosen(like(torch.float16, 24)) and len(made["fa3"].forward) == 6
        # torch's own operators have no CPU implementation here: they fail, and it is said.
        words = [record.getMessage() for record in caplog.records]
        assert sum("test: FlashAttention-3 for whole and causal" in line for line in words) == 1
        assert sum("cuDNN through torch is passed over: " in line for line in words) == 3
        assert not any("FlashAttention-4" in line for line in words), "missing, and not asked for"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda *r: (r[0], r[1] * 1.4427) if len(r) == 2 else r, "its lse is off by 0.4"),
        (lambda *r: (r[0] * 1.1, r[1]) if len(r) == 2 else r, "its out is off by"),
        (lambda *r: (r[0].mul(torch.nan), *r[1:]) if len(r) == 3 else r, "its dq is off by nan"),
        (lambda *r: (r[0], r[2], r[1]) if len(r) == 3 else r, "its dk is off by"),
        (lambda *r: (*r[:2], r[2] + 0.01) if len(r) == 3 else r, "its dv is off by"),
        (lambda *r: 1 / 0, "it raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_library_that_is_wrong_is_passed_over_or_refused(
    wrong: Any, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with libraries(monkeypatch, "cudnn", "fa4") as made, caplog.at_level("INFO", "lcdist_kernels"):
        made["cudnn"].wrong = wrong
        assert chosen(like()) == "FlashAttention-4"
        assert f"fails its self-test (bfloat16, head_dim 16): {says}" in caplog.text
        with pytest.raises(ValueError, match="impl = 'cudnn': cuDNN .* self-test") as refused:
            force_library("cudnn", like())
        assert says in str(refused.value) and "\n" not in str(refused.value)


def test_the_gradients_of_an_own_lse_fail_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(StandIns):
        """Recomputes lse in the backward, as a library would that keeps none."""

        def bwd(self, dout, q, k, v, out, lse, causal, scale):  # noqa: ANN001
            _, own = self.fwd(q, k, v, causal, scale)
            return super().bwd(dout, q, k, v, out, own, causal, scale)

    with libraries(monkeypatch, "cudnn") as made:
        made["cudnn"].__class__ = Own
        assert chosen(like()) is None


REFUSED = {
    "on a CPU": (0, like(), "cuDNN through torch runs on CUDA, the tensors are on cpu"),
    "float32": (9, like(torch.float32), "takes bf16 and fp16, the tensors are torch.float32"),
    "head_dim": (9, like(head_dim=20), "takes head_dim up to 256, a multiple of 8, not 20"),
    "wide": (9, like(head_dim=264), "takes head_dim up to 256, a multiple of 8, not 264"),
    "old": (7, like(), "is for compute capability 8 to 99, this is 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_library_does_not_take(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, x, says = REFUSED[case]
    with libraries(monkeypatch, "cudnn", capability=capability) as made:
        with pytest.raises(ValueError, match=says):
            force_library("cudnn", x)
        assert chosen(x) is None
        assert not made["cudnn"].forward


def test_a_forced_library_that_is_missing_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with libraries(monkeypatch):
        for name, module, package in (
            ("fa3", "flash_attn_interface", "flash_attn_3"),
            ("fa4", "flash_attn", "flash-attn-4"),
        ):
            says = f"^impl = '{name}': the module {module} is not installed; install {package}; "
            with pytest.raises(ValueError, match=says + "or use impl = 'auto' or 'triton'$"):
                full_attention(*inputs(20, dtype=torch.bfloat16), impl=name)
        with pytest.raises(ValueError, match="fa3': FlashAttention-3 is for .* 9 to 9, this is 10"):
            monkeypatch.setattr("lcdist_kernels.full.library_choice.capability_of", lambda x: 10)
            full_attention(*inputs(20, dtype=torch.bfloat16), impl="fa3")


def test_sums_in_a_fixed_order_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with libraries(monkeypatch, "cudnn", "fa3"):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert chosen(like()) is None
        with pytest.raises(ValueError, match="deterministic algorithms are asked for"):
            force_library("cudnn", like())
        assert force_library("fa3", like()).title == "FlashAttention-3"


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "newer"), [("cudnn", True), ("fa3", True), ("fa3", False), ("fa4", True)]
)
def test_a_forced_library_computes_full_attention(
    name: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with libraries(monkeypatch, name, newer=newer, capability=9) as made:
        qkv = inputs(70, (4, 2), 24, torch.float16)
        dout = torch.randn_like(qkv[0])
        force_library(name, qkv[0])
        made[name].forward.clear()
        made[name].backward.clear()
        got = with_grads(full_attention(*qkv, impl=name), qkv, dout)
        # As many key heads as there are: nothing was expanded.
        assert made[name].forward == made[name].backward == [Call(70, 70, 2, True)]
        for a, e, r in zip(got, eager(qkv, dout), truth_of(qkv, dout), strict=True):
            assert a.dtype == torch.float16
            assert_as_good_as_eager(a, e, r)


@pytest.mark.parametrize("name", NAMES)
def test_any_strides_and_any_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with libraries(monkeypatch, *RANKING[9], dtypes=DOUBLE):
        monkeypatch.setitem(RANKING, 9, (name,))
        strided = [in_nan(x.detach()).requires_grad_() for x in inputs(41)]
        dout = in_nan(torch.randn(strided[0].shape, dtype=torch.float64))
        for scale in (None, -0.4):
            got = with_grads(attention(strided, scale), strided, dout)
            for actual, truth in zip(
                got, truth_of(strided, dout, softmax_scale=scale), strict=True
            ):
                assert_matches(actual, truth)


def attention(qkv: list[Tensor], scale: float | None) -> Tensor:
    """Return full attention by what "auto" chooses on a GPU: on a CPU it is torch's own."""
    implementation = select_block_impl("auto", qkv[0], "test")
    assert implementation not in (TORCH_IMPL, TRITON_IMPL)
    index = torch.arange(qkv[0].shape[1])
    scale = qkv[0].shape[3] ** -0.5 if scale is None else scale
    return FullFunction.apply(*qkv, index, torch.zeros_like(index), scale, implementation)


# --- blocks and rings -----------------------------------------------------------------------------


def band(layout: ContextLayout, rank: int, owner: int) -> Any:
    q_idx, k_idx = layout.positions(rank), layout.positions(owner)
    return band_of(q_idx, torch.zeros_like(q_idx), k_idx)


def test_blocks_of_a_ring_are_whole_or_causal() -> None:
    """Counted by hand, 3 ranks of 64 tokens."""
    own, whole, none = Cut(0, 64, True), Cut(0, 64, False), None
    half, late = Cut(0, 32, False), Cut(32, 64, False)
    behind = Cut(1, 63, True)
    expected = {
        "contiguous": [[own, none, none], [whole, own, none], [whole, whole, own]],
        "zigzag": [[own, late, late], [half, own, late], [half, half, own]],
        "striped": [[own, behind, behind], [own, own, behind], [own, own, own]],
    }
    for kind, table in expected.items():
        layout = ContextLayout(kind, 192, 3)
        assert [[cut_of(band(layout, r, o)) for o in range(3)] for r in range(3)] == table, kind


def test_other_blocks_are_no_work_for_a_library() -> None:
    idx = torch.arange(64)
    zeros = torch.zeros_like(idx)
    documents = 40 * (idx >= 40)
    assert cut_of(band_of(idx, documents, idx)) is None, "packed documents"
    assert cut_of(band_of(idx + 64, documents, idx)) is None, "a border in the keys"
    assert cut_of(band_of(idx, zeros, idx.flip(0))) is None, "not in order"
    assert cut_of(band_of(idx, zeros, idx // 2)) is None, "two keys a row"
    assert cut_of(band_of(idx[:15], zeros[:15], idx[:15])) is None, "too short"
    assert cut_of(band_of(idx, zeros, idx[:15])) is None, "too few keys"
    assert cut_of(band_of(idx, zeros, idx)) == Cut(0, 64, True)


RINGS = [("contiguous", 3), ("zigzag", 2), ("zigzag", 4), ("striped", 3)]


@pytest.mark.parametrize(("kind", "cp_size"), RINGS)
@pytest.mark.parametrize("name", ["cudnn", pytest.param("fa4", marks=pytest.mark.exhaustive)])
def test_a_ring_of_full_attention_by_a_library(
    kind: str, cp_size: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with libraries(monkeypatch, name, dtypes=DOUBLE) as made:
        problem = make("full", kind, cp_size, at_least=40 * cp_size)
        layout = problem.layout
        force_library(name, problem.qkv[0])
        made[name].forward.clear()
        made[name].backward.clear()
        got, _ = on_virtual_ranks(problem, name)
        for actual, reference in zip(got, whole(problem), strict=True):
            assert_matches(actual, reference)
        pairs = [(r, o) for r in range(cp_size) for o in range(cp_size)]
        cuts = [cut for pair in pairs if (cut := cut_of(band(layout, *pair)))]
        local = layout.local_seqlen
        expected = Counter(Call(local - cut.first, cut.keys, 2, cut.causal) for cut in cuts)
        assert Counter(made[name].forward) == Counter(made[name].backward) == expected


def assert_ring_is_as_good_as_eager(kind: str, seqlen: int, head_dim: int) -> None:
    """Run a ring of four ranks by cuDNN, or what stands for it, in bf16 without rotation."""
    qkv = [x.detach().to(HERE) for x in inputs(seqlen, (4, 2), head_dim, torch.bfloat16)]
    scale = head_dim**-0.5
    problem = make("full", kind, 4, at_least=seqlen, dtype=torch.bfloat16)
    problem.qkv, problem.dout, problem.inv_freq = qkv, torch.randn_like(qkv[0]), None
    problem.softmax_scale = scale
    got, _ = on_virtual_ranks(problem, "cudnn")
    leaves = [x.requires_grad_() for x in qkv]
    truth = truth_of(leaves, problem.dout, softmax_scale=scale)
    for a, e, r in zip(got, eager(leaves, problem.dout), truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert_as_good_as_eager(a, e, r)


@cpu_only
def test_a_ring_in_half_precision_is_as_good_as_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: Counter[torch.dtype | None] = Counter()
    plain = LibraryBlock.bwd

    def noted(block: LibraryBlock, *given: Any, dq_sum: Tensor | None) -> tuple[Tensor, ...]:
        sums[dq_sum if dq_sum is None else dq_sum.dtype] += 1
        return plain(block, *given, dq_sum=dq_sum)

    monkeypatch.setattr(LibraryBlock, "bwd", noted)
    with libraries(monkeypatch, "cudnn"):
        assert_ring_is_as_good_as_eager("zigzag", 256, 16)
    # A library's dq is in bf16, the sum over blocks is not.
    assert sums == {None: 4, torch.float32: 12}


def wide_problem(problem: Any) -> Any:
    problem.qkv = [x.detach().double() for x in problem.qkv]
    problem.dout = problem.dout.double()
    return problem


@cpu_only
@pytest.mark.parametrize("method", ["full", pytest.param("coca", marks=pytest.mark.exhaustive)])
def test_packed_documents_of_a_ring_are_ours_and_refused_if_a_library_is_forced(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with libraries(monkeypatch, "cudnn", dtypes=(torch.float32,)) as made:
        problem = make(method, "zigzag", 2, packed=True, at_least=20, dtype=torch.float32)
        force_library("cudnn", problem.qkv[0])
        made["cudnn"].forward.clear()
        got, _ = on_virtual_ranks(problem, "auto")
        assert_close(got, whole(wide_problem(problem)))
        assert not made["cudnn"].forward
        problem = make(method, "zigzag", 2, packed=True, at_least=20, dtype=torch.float32)
        with pytest.raises(ValueError, match="impl = 'cudnn': .* of packed documents or too short"):
            on_virtual_ranks(problem, "cudnn")


@cpu_only
@pytest.mark.parametrize(
    "kind", ["zigzag", pytest.param("contiguous", marks=pytest.mark.exhaustive)]
)
def test_a_ring_of_coca_by_a_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with libraries(monkeypatch, "cudnn", dtypes=(torch.float32,)) as made:
        problem = make("coca", kind, 2, at_least=64, dtype=torch.float32)
        force_library("cudnn", problem.qkv[0])
        made["cudnn"].forward.clear()
        got, _ = on_virtual_ranks(problem, "auto")
        calls = Counter(made["cudnn"].forward)
        assert_close(got, whole(wide_problem(problem)))
        assert calls[Call(32, 32, 2, True)] == 2 and calls.total() == 3 + (kind == "zigzag")


@cpu_only
def test_coca_on_one_process_by_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with libraries(monkeypatch, "cudnn") as made:
        qtv = inputs(70, (4, 2), 16, torch.float16)
        coca_attention(*qtv, impl="auto").sum().backward()
        assert made["cudnn"].forward[-1] == made["cudnn"].backward[-1] == Call(70, 70, 2, True)
        count = len(made["cudnn"].forward)
        coca_attention(*qtv, cu_seqlens=borders(70), impl="auto")
        assert len(made["cudnn"].forward) == count


def test_triton_and_torch_are_never_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with libraries(monkeypatch, "cudnn") as made:
        assert select_block_impl("triton", like(), "test") is TRITON_IMPL
        assert select_block_impl("torch", like(), "test") is TORCH_IMPL
        assert select_block_impl("auto", like(), "test", packed=True) is TORCH_IMPL
        assert not made["cudnn"].forward
    for name in FORCED:
        with pytest.raises(ValueError, match="not available for this method: scca attention has"):
            from_scca(name)


def from_scca(name: str) -> None:
    problem = make("scca", "contiguous", 1)
    on_virtual_ranks(problem, name)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_libraries_of_a_gpu_pass_their_self_test(dtype: torch.dtype, head_dim: int) -> None:
    x = like(dtype, head_dim).to(HERE)
    here = {name: library.find_library(name) for name in NAMES if refusal(name, x) is None}
    found = {name: each for name, each in here.items() if isinstance(each, library.Library)}
    assert "cudnn" in found
    wrong = {name: self_test(each, HERE, dtype, head_dim) for name, each in found.items()}
    assert not any(wrong.values()), wrong


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "seqlen"), [("zigzag", 2048), ("contiguous", 1000)])
def test_a_ring_of_blocks_by_cudnn_on_a_gpu(kind: str, seqlen: int) -> None:
    assert_ring_is_as_good_as_eager(kind, seqlen, 128)
