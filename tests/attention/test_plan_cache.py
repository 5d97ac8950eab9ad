"""Cache of plans: hits, the byte bound, and tensors that training may use after evaluation."""

import torch

from lcdist.attention.context import LayoutKey
from lcdist.attention.scca.shift import make_window_plan
from lcdist_kernels.full import TORCH_IMPL
from lcdist_kernels.plans import PlanCache, tensor_bytes
from lcdist_kernels.scca import Rule


def test_equal_keys_share_a_plan() -> None:
    rules = (Rule("chunk", 8), Rule("chunk", 8, 4))
    key = LayoutKey("zigzag", 64, 2, 1)
    plan = make_window_plan(rules, 2, key, (0, 30, 64), TORCH_IMPL)
    assert make_window_plan(tuple(rules), 2, key._replace(), (0, 30, 64), TORCH_IMPL) is plan
    assert make_window_plan(rules, 2, key, None, TORCH_IMPL) is not plan
    assert make_window_plan(rules, 2, key._replace(rank=0), (0, 30, 64), TORCH_IMPL) is not plan


def test_least_recently_used_plans_are_dropped_above_the_byte_bound() -> None:
    cache, made = PlanCache(max_bytes=16), []

    def find(key: str, size: int = 1) -> torch.Tensor:
        def make() -> torch.Tensor:
            made.append(key)
            return torch.zeros(size, dtype=torch.int64)

        return cache.find(key, make)

    find("a"), find("b"), find("a"), find("c")
    find("a"), find("b")
    assert made == ["a", "b", "c", "b"]
    # A plan above the bound is kept alone.
    find("large", 5), find("large", 5), find("a")
    assert made[4:] == ["large", "a"]


def test_bytes_count_shared_storage_once() -> None:
    x = torch.zeros(10, dtype=torch.int64)
    assert tensor_bytes([x, {"view": (x[:3], "text", None)}, x.clone()]) == 160


def test_plan_made_in_inference_mode_serves_training() -> None:
    cache = PlanCache(max_bytes=100)
    with torch.inference_mode():
        plan = cache.find("key", lambda: torch.zeros(1))
    assert not plan.is_inference()
