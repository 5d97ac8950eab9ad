"""Overlap on a GPU that is not there: messages travel while kernels run, in every method."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in.test_stand_in import MAPS, exhaustive, library, needs_the_device, run

__all__ = ["library"]
pytestmark = needs_the_device

# Of each method: messages that are waited for without a kernel since they were posted, forward and
# backward. A ring's last gradient comes home after the last block. Heads that are all dilated or
# tensorized have nothing to compute before units arrive and after the last of them are sent back.
# With top_k, landmarks, counts of requested blocks and the requests are small messages; the next
# step needs each of them.
BARE = {
    "full": (0, 1),
    "full-5": (0, 1),
    "coca": (0, 1),
    "coca-strict": (0, 1),
    "scca-fixed-7": (0, 0),
    "scca-flow-5": (0, 0),
    "scca-sda-3-1": (2, 2),
    "scca-sda_key-4": (0, 1),
    "scca-longmixed-11": (1, 2),
    "tensorized-(5,)": (2, 2),
    "tensorized-(3,2)-1-global-kv": (2, 0),
    "landmark-4": (0, 1),
    "landmark-3-2-1": (3, 0),
    "lssar": (0, 1),
    "lssar-False": (0, 1),
}
TO_COPY = "aten._to_copy.default"


def bare_waits(events: list[str]) -> int:
    """Count the messages that are waited for without a kernel since they were posted.

    Fails unless every message is posted once and waited for once.
    """
    kinds = [event.split()[0] for event in events]
    posts = [event.split()[1] for event in events if event.startswith("post")]
    assert kinds.count("wait") == len(posts) == len(set(posts))
    bare = 0
    for number in posts:
        start, stop = events.index(f"post {number}"), events.index(f"wait {number}")
        assert start < stop
        bare += all(kind in ("post", "wait", *MAPS) for kind in kinds[start:stop])
    return bare


def assert_few_operations(lines: dict[str, Any]) -> None:
    """Assert how many torch operations a warm call makes on the device, of four visits."""
    full, lssar, sda = lines["full"], lines["lssar"], lines["scca-sda-3-1"]
    # Two exchanges of units copy what they send and what they return, never queries for a kernel.
    assert Counter(sda["forward operations"])["aten.clone.default"] == 4
    assert Counter(sda["backward operations"])["aten.clone.default"] == 4
    # Blocks are merged by a kernel: torch only copies.
    assert Counter(full["forward operations"]) == {"aten.stack.default": 1, TO_COPY: 1}
    # Kernels add to dq: torch copies it, and what travels, and adds what came from other ranks.
    of_a_lap = {"aten.stack.default": 4, "aten.add_.Tensor": 3}
    assert Counter(full["backward operations"]) == of_a_lap | {TO_COPY: 3}
    # Directions come from one kernel each way. Left are sums over visits and statistics of rows;
    # with torch's directions they were over 110.
    assert lssar["forward"].count("_lssar_directions_kernel") == 1
    assert lssar["backward"].count("_lssar_directions_bwd_kernel") == 1
    assert not any("rotate" in event for event in (*lssar["forward"], *lssar["backward"]))
    assert len(lssar["forward operations"]) == 50
    assert Counter(lssar["backward operations"]) == of_a_lap | {TO_COPY: 2, "aten.add_.Tensor": 6}


@pytest.mark.parametrize("rank", [1, exhaustive(0)])
def test_messages_travel_while_kernels_run(library: Path, rank: int) -> None:
    lines = [json.loads(line) for line in run(library, "overlap", str(rank))]
    passes = ("forward", "backward")
    found = {x["of"]: tuple(bare_waits(x[name]) for name in passes) for x in lines}
    assert found == BARE
    assert_selected_blocks_travel_during_own_attention(lines)
    # A warm call makes no table again, on any rank, and nothing waits for the device.
    assert {x["of"]: x["on the host"] for x in lines} == dict.fromkeys(found, [])
    assert {x["of"]: x["waits"] for x in lines} == dict.fromkeys(found, {})
    assert_few_operations({x["of"]: x for x in lines})
    # In full: a hop is posted before its block's kernels and waited for after them, and so is the
    # hop of the gradient of the block before.
    full = next(x for x in lines if x["of"] == "full")
    assert full["forward"].count("_merge_kernel") == 3
    block = ["_full_bwd_dq_kernel", "_full_bwd_dkv_kernel"]
    assert [x for x in full["forward"] if x not in MAPS] == [
        *("post 1", "_full_fwd_kernel", "wait 1"),
        *("post 2", "_full_fwd_kernel", "wait 2"),
        *("post 3", "_full_fwd_kernel", "wait 3", "_full_fwd_kernel"),
    ]
    assert [x for x in full["backward"] if x not in MAPS] == [
        *("post 4", *block, "post 5", "wait 4"),
        *("post 6", *block, "wait 5", "post 7", "wait 6"),
        *("post 8", *block, "wait 7", "post 9", "wait 8"),
        *(*block, "wait 9", "post 10", "wait 10"),
    ]


def assert_selected_blocks_travel_during_own_attention(lines: list[dict[str, Any]]) -> None:
    """Assert what top_k alone does, and clear its line of it.

    The sizes of its messages are in the data, so the host reads the choice and the number of blocks
    that each rank requests, and sends what it computed of them in one copy.
    """
    line = next(x for x in lines if x["of"] == "landmark-3-2-1")
    assert set(line["waits"]) == {"gather.py: choose", "gather.py: _exchange_requests"}
    # Of two warm calls. 64 entries are read, and numbers of 4 ranks, in each of 4 calls.
    assert line["on the host"] == ["aten._to_copy.default"] * 2
    assert sorted(line["waits"].values()) == [4 * 4, 4 * 64]
    assert line["forward"].count("_merge_kernel") == 1
    own = "_full_fwd_kernel", "_full_bwd_dq_kernel", "_full_bwd_dkv_kernel"
    assert [x for x in line["forward"] if x not in MAPS] == [
        *("post 1", "wait 1", "_top_k_costs_kernel", "_least_kernel"),
        *("post 2", "wait 2", "post 3", "wait 3"),
        *("post 4", own[0], "wait 4", "_sparse_fwd_kernel"),
    ]
    assert [x for x in line["backward"] if x not in MAPS] == [
        *("_sparse_bwd_dq_kernel", "_sparse_bwd_dkv_kernel", "post 5", *own[1:], "wait 5"),
    ]
    line["waits"], line["on the host"] = {}, []
