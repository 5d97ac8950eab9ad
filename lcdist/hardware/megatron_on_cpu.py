"""Run Megatron-core on a host without CUDA: a shim, installed by importing this module.

Megatron-core names CUDA in many places ("There is no CPU-only path in Megatron Core": its
maintainers in NVIDIA-NeMo/Speech issue 14244). With CUDA this module does nothing. Without it, for
`megatron.core` and its submodules only:

1. every module gets a proxy of `torch` in which device "cuda" is the CPU, and streams, events and
   synchronisation do nothing; the real `torch` is unchanged for all other modules;
2. Megatron is imported with `torch.compile` as the identity, so that nothing is compiled;
3. the CUDA random-number tracker is replaced by one on the CPU's generator.

`Tensor.cuda()` becomes the identity, which tied embeddings across pipeline stages need. Import this
module before the first import of megatron. Tested with megatron-core 0.16.1 and 0.19.2.
"""

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import Any

import torch

from lcdist.hardware.device import has_cuda

CPU = torch.device("cpu")
_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "as_tensor", "eye"),
    *("linspace", "empty_like", "zeros_like", "ones_like", "full_like"),
)
# By module, what Megatron-core 0.19 logs about parts that it plans to replace.
_NOTICES = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "transformer.transformer_layer": "Rewrapping ModuleSpec",
    "dist_checkpointing.strategies.torch": "async save is deprecated",
    "dist_checkpointing.strategies.common": "load_common is deprecated",
}


class _Inert:
    """Replacement of streams, events and profiler ranges: accept all calls, do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_Inert":
        return self

    def __exit__(self, *args: Any) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Proxy(types.ModuleType):
    """A copy of a module with some names replaced."""

    def __init__(self, real: Any, **overrides: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(vars(real), **overrides, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int or (isinstance(device, str) and device.startswith("cuda"))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _torch_without_cuda() -> _Proxy:
    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    rng = {"get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state}
    cuda = _Proxy(
        torch.cuda,
        current_device=lambda: CPU,
        is_available=lambda: False,
        synchronize=nothing,
        empty_cache=nothing,
        set_device=nothing,
        Stream=_Inert,
        Event=_Inert,
        nvtx=_Inert(),
        stream=lambda stream=None: contextlib.nullcontext(),
        current_stream=_Inert,
        default_stream=_Inert,
        manual_seed=torch.manual_seed,
        random=_Proxy(torch.cuda.random, **rng),
        memory_allocated=zero,
        max_memory_allocated=zero,
        memory_reserved=zero,
        is_current_stream_capturing=lambda: False,
        **rng,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _Proxy(torch, cuda=cuda, **factories)


class _Finder:
    """Import hook that gives the proxy to Megatron's modules."""

    def __init__(self, proxy: _Proxy) -> None:
        self.proxy = proxy

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("megatron.core"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                if vars(module).get("torch") is torch:
                    vars(module)["torch"] = self.proxy

            vars(spec.loader)["exec_module"] = exec_module
        return spec


def _use_cpu_generator(random: Any) -> None:
    class CpuRngTracker(random.CudaRNGStatesTracker):
        """Megatron's named random states, on the CPU's generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise RuntimeError(f"random state {name!r} or its seed {seed} already exists")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.CudaRNGStatesTracker = CpuRngTracker
    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _silence() -> None:
    """Drop warnings about what we do on purpose, with CUDA and without."""
    # Megatron warns that Transformer Engine and Apex are missing; neither is needed.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Its checkpoints use ShardedTensor, which torch has deprecated.
    warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)
    warnings.filterwarnings("ignore", ".*(reduce_scatter|all_gather_into)_tensor", FutureWarning)
    for module, notice in _NOTICES.items():
        logging.getLogger(f"megatron.core.{module}").addFilter(
            lambda record, notice=notice: notice not in record.getMessage()
        )


def _install() -> None:
    _silence()
    if has_cuda():
        return
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise ImportError("import lcdist.hardware.megatron_on_cpu before megatron")
    sys.meta_path.insert(0, _Finder(_torch_without_cuda()))  # type: ignore[arg-type]
    compile_ = torch.compile
    identity: Any = lambda fn=None, **kwargs: fn if fn is not None else (lambda inner: inner)  # noqa: E731
    torch.compile = identity
    try:
        importlib.import_module("megatron.core.models.gpt")
    finally:
        torch.compile = compile_
    _use_cpu_generator(importlib.import_module("megatron.core.tensor_parallel.random"))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


_install()
