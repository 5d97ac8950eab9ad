"""Fixtures and settings of every test: one torch thread, a fixed seed, NaN in unwritten tensors.

Without a GPU, Triton kernels run in its interpreter, and tests marked `gpu` are skipped.
"""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.interpreter import interpret_without_gpu
from tests.unwritten import nan_in_empty

# Before any test imports a kernel: the decorators depend on it.
interpret_without_gpu()

# Before any operator runs: on two cores, more threads only wait for each other.
torch.set_num_threads(1)


def pytest_configure() -> None:
    """Turn off hypothesis's deadline: a result must not depend on how busy the machine is."""
    # A GPU machine without network may have only pytest; the kernel tests need no more.
    if find_spec("hypothesis"):
        settings = import_module("hypothesis").settings
        settings.register_profile("lcdist", deadline=None)
        settings.load_profile("lcdist")


# Files that take minutes, and whose tests a single process runs one after another.
LONGEST = (
    *("tests/golden/test_curves", "tests/launch/", "tests/test_packaging", "tests/attention/"),
    "tests/stand_in/",
)

# Rooms whose tests build models, most of them on several ranks, and files and tests that start
# programs or interpret the longest kernels. The fast tier interprets full attention's kernels and
# the short ones.
ROOMS = ("checkpoint", "convert", "engines", "evaluate", "golden", "inference", "launch", "model")
SLOW = (
    *(f"tests/{room}/" for room in (*ROOMS, "stand_in", "train")),
    "tests/attention/test_external_methods",
    "tests/attention/test_methods.py::test_error_in_bf16_does_not_grow",
    "tests/attention/test_methods.py::test_processes_equal_reference",
    "tests/exchange/test_virtual.py::test_64_ranks_exchange_blocks_and_gradients",
    *(f"tests/kernels/test_{name}_triton" for name in ("coca", "landmark", "lssar")),
    *(f"tests/kernels/test_{name}_triton" for name in ("scca", "tensorized")),
    "tests/kernels/test_descriptors",
    "tests/kernels/test_landmark.py::test_blocks_smaller_and_larger_than_a_tile",
    "tests/kernels/test_landmark_top_k",
    "tests/kernels/test_machine_code",
    "tests/kernels/test_part_work",
    "tests/test_bench",
    "tests/test_gpu_check",
    "tests/test_packaging",
    "tests/test_plan.py::test_parameters_and_states_equal_those_of_real_models",
    "tests/test_stages.py::test_stages_are_runs_one_after_another",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are; mark slow files; begin with long files.

    So no test process is left with a long file at the end, while the others have nothing to do.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    found = torch.cuda.device_count()
    for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
        reason = f"needs {needed} CUDA device{'s' * (needed > 1)}, {found} found"
        for item in items:
            if item.get_closest_marker(marker) and found < needed:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed torch, so that a test sees the same random numbers alone and after other tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where transformers copies model code, one for all tests of this process.

    It must be one folder, because Python looks nowhere else after the first import from it. It must
    not be the user's.
    """
    folder = tmp_path_factory.mktemp("modules")
    vars(import_module("transformers.dynamic_module_utils"))["HF_MODULES_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def unwritten_shows() -> Iterator[None]:
    """Make every element that a kernel forgets to write NaN."""
    with nan_in_empty():
        yield
