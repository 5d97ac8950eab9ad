"""A CUDA device that is not there: tensors on it have a shape, a dtype and a place, but no data.

What a run on a GPU would do is done without one, kernels and messages left out: a tensor on the
wrong device, a grid that CUDA refuses and a wait for the device show on a CPU. Tensors on the CPU
are real. To be installed before anything of lcdist or megatron is imported, in a process started
with `device.cpp`'s library in LD_PRELOAD.
"""

import contextlib
import os
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

TORCH = Path(torch.__file__).parent
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
OURS = ("/lcdist/", "/lcdist_kernels/", "/megatron/")


def compiled(folder: Path) -> Path:
    """Compile `device.cpp` in `folder` and return the library."""
    library, source = folder / "device.so", Path(__file__).parent / "device.cpp"
    words = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{TORCH}/include", str(source)]
    words += ["-o", str(library), f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    return library


class _Fake(FakeTensorMode):
    """One for all threads: autograd has its own for a device."""

    _here = threading.local()

    @property
    def in_kernel_invocation(self) -> bool:
        return getattr(self._here, "inside", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, inside: bool) -> None:
        self._here.inside = inside


class _Inert:
    """Stands for streams, events and works under way."""

    cuda_stream = 0
    device = "cuda"

    def __init__(self, *args: Any, **words: Any) -> None: ...

    def __enter__(self) -> "_Inert":
        return self

    def __exit__(self, *args: Any) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **words: None

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Message(_Inert):
    """A message under way."""

    def __init__(self, events: list[str], number: int) -> None:
        self._events, self._number = events, number

    def wait(self, *args: Any) -> None:
        """Note the first wait."""
        waited = f"wait {self._number}"
        if waited not in self._events:
            self._events.append(waited)


class StandIn(TorchDispatchMode):
    """Within, tensors can be made on the device; counts launches, and waits by who asks for them.

    A number that the host reads from the device is 1.

    variants: what Triton would have compiled, kernel by kernel.
    events: what was done in order: the kernels' names, and "post N" and "wait N" of message N, the
        first wait alone.
    messages: numbers of messages by the function of torch.distributed that posts them.
    listener: called with every kernel and its arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = _Fake(allow_non_fake_inputs=True)
        self.launches: Counter[str] = Counter()
        self.variants: set[tuple[Any, ...]] = set()
        self.waits: Counter[str] = Counter()
        self.events: list[str] = []
        self.messages: Counter[str] = Counter()
        self.listener: Callable[[Any, dict[str, Any]], None] | None = None
        self.posted = 0

    def post(self, name: str) -> "_Message":
        """Note a message of the function `name`, and return what is to be waited for."""
        self.posted += 1
        self.messages[name] += 1
        self.events.append(f"post {self.posted}")
        return _Message(self.events, self.posted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.waits[_who()] += 1
            return 1.0 if args[0].is_floating_point() else 1
        where = kwargs.get("device")
        if where is None or torch.device(where).type != "cuda":
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._without_data, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def _without_data(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x.detach())

    def launch(self, kernel: Any, *args: Any, grid: Any, **words: Any) -> None:
        """Stand in for a launch: check that tensors are on the device and CUDA accepts the grid."""
        name = kernel.fn.__name__
        values = dict(zip(kernel.arg_names, args, strict=False)) | words
        for key, value in values.items():
            if isinstance(value, Tensor):
                assert value.is_cuda, f"{name}: {key} is on {value.device}"
        blocks = grid(values) if callable(grid) else grid
        fits = all(0 < n <= most for n, most in zip(blocks, MOST_BLOCKS, strict=False))
        assert fits, f"{name}: no grid of {blocks}"
        self.launches[name] += 1
        options = {key: value for key, value in words.items() if key not in kernel.arg_names}
        self.variants.add((name, *_variant(kernel, values), *sorted(options.items())))
        self.events.append(name)
        if self.listener is not None:
            self.listener(kernel, values)


def _variant(kernel: Any, values: dict[str, Any]) -> Iterator[Any]:
    """Yield what Triton compiles a kernel for: constants, dtypes, and which sizes are divisible."""
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or isinstance(value, float | bool):
            yield value if parameter.is_constexpr or value is None else type(value)
        elif isinstance(value, int):
            yield 1 if value == 1 else (value % 16 == 0, -(2**31) <= value < 2**31)
        else:
            descriptor = getattr(value, "base", None) is not None and not isinstance(value, Tensor)
            tensor = value.base if descriptor else value
            yield tensor.dtype, tuple(value.block_shape) if descriptor else ()


def _who() -> str:
    stack = [f for f in traceback.extract_stack() if any(part in f.filename for part in OURS)]
    return f"{Path(stack[-1].filename).name}: {stack[-1].name}" if stack else "elsewhere"


def leave() -> None:
    """End the process with success: torch cannot end autograd's thread for the device."""
    sys.stdout.flush()
    os._exit(0)


def install(rank: int, world_size: int) -> StandIn:
    """Make torch, Triton and torch.distributed of this process accept the device."""
    stand_in = StandIn()
    for name, value in _cuda().items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.Tensor.pin_memory = lambda x, *args: x
    torch.nn.Module.to = _to

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **words: Any) -> None:
        stand_in.launch(kernel, *args, grid=grid, **words)

    triton.JITFunction.run = launch
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    for name, value in _messages(stand_in).items():
        for module in (dist, distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, value)
    return stand_in


def _cuda() -> dict[str, Any]:
    def saying(answer: Any) -> Any:
        # One function each: torch keeps a table of those it knows.
        return lambda *args, **words: answer

    facts = SimpleNamespace(name="NVIDIA H200", total_memory=141 << 30, major=9, minor=0)
    facts.multi_processor_count = 132
    said = {
        "is_available": saying(True),
        "device_count": saying(1),
        "get_device_capability": saying((9, 0)),
        "get_device_name": saying(facts.name),
        "get_device_properties": saying(facts),
        "mem_get_info": saying((facts.total_memory, facts.total_memory)),
        "is_current_stream_capturing": saying(False),
        "get_rng_state": lambda *args, **words: torch.get_rng_state(),
        "default_generators": (_Inert(),),
        "stream": lambda *args: contextlib.nullcontext(),
        "device": lambda *args: contextlib.nullcontext(),
    }
    streams = ("Stream", "Event", "current_stream", "default_stream")
    silent = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init")
    silent += ("manual_seed", "manual_seed_all", "set_rng_state", "_lazy_call")
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "current_device")
    said |= dict.fromkeys(streams, _Inert) | {name: saying(None) for name in silent}
    return said | {name: saying(0) for name in memory}


def _messages(stand_in: StandIn) -> dict[str, Any]:
    """Nothing travels; what would be received stays as it is."""

    def post(name: str, *args: Any, async_op: bool = False, **words: Any) -> Any:
        message = stand_in.post(name)
        return message if async_op else message.wait()

    def exchange(messages: list[Any]) -> list[_Message]:
        """Post some messages as one."""
        return [stand_in.post("batch_isend_irecv")] * len(messages)

    def everyone(answers: list[Any], mine: Any, group: Any = None) -> None:
        answers[:] = [mine] * len(answers)

    names = ("all_reduce", "broadcast", "reduce", "barrier", "all_gather", "reduce_scatter")
    names += ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    names += ("all_gather_single", "reduce_scatter_single", "broadcast_object_list")
    said: dict[str, Any] = {name: partial(post, name) for name in names}
    said |= dict.fromkeys(("isend", "irecv"), lambda *args, **words: _Inert())
    return said | {
        "all_gather_object": everyone,
        "batch_isend_irecv": exchange,
        "_coalescing_manager": lambda *args, **words: _Inert(),
        "_check_op": lambda op: None,
    }


def _to(module: torch.nn.Module, device: Any) -> torch.nn.Module:
    """`Module.to`, which cannot exchange a tensor for one without data."""
    for part in module.modules():
        for key, x in list(part._parameters.items()):
            if x is not None and not isinstance(x, FakeTensor):
                moved = torch.nn.Parameter(x.detach().to(device), x.requires_grad)
                moved.__dict__.update(x.__dict__)
                part._parameters[key] = moved
        for key, x in list(part._buffers.items()):
            if x is not None and not isinstance(x, FakeTensor):
                part._buffers[key] = x.to(device)
    return module
