"""The tolerances: what they accept, and that NaN never passes."""

import pytest
import torch

from tests.tolerance import assert_as_good_as_eager, assert_matches


def test_same_maths_is_ten_digits_of_float64():
    x = torch.ones(4, dtype=torch.float64)
    assert_matches(x * (1 + 9e-11), x)
    with pytest.raises(AssertionError, match="relative error 1.1e-10 > 1e-10"):
        assert_matches(x * (1 + 1.1e-10), x)
    with pytest.raises(AssertionError, match="give a tolerance below float64"):
        assert_matches(x.float(), x)


def test_nan_and_infinity_never_pass():
    x = torch.ones(4)
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1] = bad
        for actual, reference in ((y, x), (x, y), (y, y)):
            with pytest.raises(AssertionError, match="relative error"):
                assert_matches(actual, reference, 1e9)


def test_another_shape_never_passes():
    with pytest.raises(AssertionError, match=r"\(1,\) != \(4,\)"):
        assert_matches(torch.ones(1), torch.ones(4), 1.0)


def test_a_kernel_may_be_twice_as_wrong_as_eager():
    reference = torch.ones(4)
    assert_as_good_as_eager(reference * 1.0019, reference * 1.001, reference)
    with pytest.raises(AssertionError, match="more than twice"):
        assert_as_good_as_eager(reference * 1.0021, reference * 1.001, reference)
