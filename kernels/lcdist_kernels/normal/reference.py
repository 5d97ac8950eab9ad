"""Normal numbers by Philox in torch: the reference of the kernel, and the path without kernels.

Philox4x32-10 (Salmon et al., 2011) maps a key, the seed, and a counter, the number of an element,
to random bits. Two of its four words become a normal number by Box and Muller's transform. Every
step is that of `triton.language.randn`.
"""

import math

import torch
from torch import Tensor

KEYS = (0x9E3779B9, 0xBB67AE85)
FACTORS = (0xD2511F53, 0xCD9E8D57)
ROUNDS = 10
WORD = 2**32 - 1
# The greatest factor that keeps 2^31 - 1, rounded to fp32, below 1.
TO_UNIT = 4.6566127342e-10
LEAST_UNIT = 1e-7


def normal_reference(index: Tensor, seed: int) -> Tensor:
    """Return the standard normal numbers of elements `index`, fp32.

    Args:
        index: numbers of elements from 0, int64.
        seed: from 0 to 2^63 - 1.
    """
    first, second = philox(index, seed)
    radius = torch.sqrt(-2.0 * torch.log(_unit(first).clamp_min(LEAST_UNIT)))
    return radius * torch.cos(2.0 * math.pi * _unit(second))


def philox(index: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the first two words of Philox4x32-10, int64 from 0 to 2^32 - 1."""
    low, high = seed & WORD, seed >> 32
    c0, c1 = index & WORD, index >> 32
    c2 = c3 = torch.zeros_like(index)
    for _ in range(ROUNDS):
        (high_0, low_0), (high_2, low_2) = _product(c0, FACTORS[0]), _product(c2, FACTORS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ low, low_2, high_0 ^ c3 ^ high, low_0
        low, high = (low + KEYS[0]) & WORD, (high + KEYS[1]) & WORD
    return c0, c1


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product of two words, which int64 cannot hold."""
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & WORD


def _unit(word: Tensor) -> Tensor:
    """Return a word as a number in [0, 1), fp32: of its complement if it is negative as int32."""
    return torch.where(word >= 2**31, WORD - word, word).to(torch.float32) * TO_UNIT
