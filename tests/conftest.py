"""What every test gets: one torch thread, a fixed seed, NaN in every tensor nobody has written."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.unwritten import nan_in_empty

# Before any operator runs: more threads than the two cores of a small machine only wait.
torch.set_num_threads(1)

# A test's result must not hang on how busy the machine is.
settings.register_profile("lcdist", deadline=None)
settings.load_profile("lcdist")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers in a test whether it runs alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unwritten_shows() -> Iterator[None]:
    """An element that a kernel forgets to write is NaN, not whatever was there before."""
    with nan_in_empty():
        yield
