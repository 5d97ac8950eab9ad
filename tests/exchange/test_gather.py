"""gather by blocks: output order, errors, and gradients that are reproducible to the bit."""

import pytest
import torch

from lcdist.exchange import VirtualGroup, gather


def test_gather_blocks_by_hand():
    requests = {0: [3, 0, 3], 1: [], 2: [5, 1]}

    def run(rank):
        r = rank.rank()
        x = torch.arange(4 * r, 4 * r + 4).float()[None].requires_grad_()
        out = gather(x, rank, blocks=requests[r], block_size=2).wait()
        (out * (r + 1)).sum().backward()
        return out.tolist(), x.grad.tolist()

    results = VirtualGroup(3).run(run)
    assert results[0] == ([[6, 7, 0, 1, 6, 7]], [[1, 1, 3, 3]])
    assert results[1] == ([[]], [[0, 0, 2, 2]])
    assert results[2] == ([[10, 11, 2, 3]], [[0, 0, 3, 3]])


def test_gradients_of_repeated_blocks_are_reproducible():
    def run(rank):
        g = torch.Generator().manual_seed(rank.rank())
        x = torch.randn(1, 8, 64, generator=g).requires_grad_()
        blocks = torch.randint(16, (40,), generator=g)
        out = gather(x, rank, blocks=blocks, block_size=2).wait()
        (out * torch.randn(out.shape, generator=g)).sum().backward()
        return x.grad

    first, again = VirtualGroup(4).run(run), VirtualGroup(4).run(run)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"blocks": [1, 0], "block_size": 1}])
def test_bfloat16_gradients_are_summed_in_float32(arguments):
    def run(rank):
        x = torch.ones(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
        # 256 + 1 is not a bfloat16.
        out = gather(x, rank, **arguments).wait()[:, :2] * (256.0, 1.0, 1.0)[rank.rank()]
        out.sum().backward()
        return x.grad.flatten().tolist()

    assert VirtualGroup(3).run(run) == [[258.0, 258.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("arguments", [{}, {"blocks": [1, 0], "block_size": 1}])
def test_gradients_are_summed_in_rank_order(arguments):
    def run(rank):
        x = torch.ones(1, 2, 1, requires_grad=True)
        # (1 + 2^25) - 2^25 is 0 in float32; in the opposite order it is 1.
        out = gather(x, rank, **arguments).wait()[:, :2] * (1.0, 2.0**25, -(2.0**25))[rank.rank()]
        out.sum().backward()
        return x.grad.flatten().tolist()

    assert VirtualGroup(3).run(run)[0] == [0.0, 0.0]


def test_gather_errors_name_the_block():
    x = torch.ones(1, 6)
    with pytest.raises(ValueError, match="block 3 requested, but there are 3"):
        gather(x, None, blocks=[0, 3], block_size=2)
    with pytest.raises(ValueError, match="block -1 requested"):
        gather(x, None, blocks=[-1], block_size=2)
    with pytest.raises(ValueError, match="block_size = 4 must divide the shard's 6"):
        gather(x, None, blocks=[0], block_size=4)
    with pytest.raises(ValueError, match="block_size = None"):
        gather(x, None, blocks=[0])


def test_wide_blocks_return_unrounded_gradients():
    def run(rank):
        x = torch.ones(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
        out = gather(x, rank, blocks=[0], block_size=1, wide=True).wait()
        # Each gradient has more bits than bfloat16; their sum, 512, is exact.
        out.backward(torch.full_like(out, (255.25, 256.75)[rank.rank()]))
        return out.dtype, x.grad.dtype, x.grad.flatten().tolist()

    wide, narrow = torch.float32, torch.bfloat16
    assert VirtualGroup(2).run(run)[0] == (wide, narrow, [512.0, 0.0])
