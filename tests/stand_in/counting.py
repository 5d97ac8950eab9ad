"""Count torch operations of a block: on the device, on large CPU tensors, and copies between."""

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 1024


class Counting(TorchDispatchMode):
    """Counts torch operations: on the device, with their bytes, on large CPU tensors, and copies.

    Operations that only make a view or memory without values are no work for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device_operations: list[str] = []
        self.device_bytes = 0
        self.cpu_operations: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in (args, result))
        there, here = (
            [x for x in given if isinstance(x, FakeTensor) is on] for on in (True, False)
        )
        name = str(func)
        idle = func.namespace != "aten" or func.is_view or "empty" in name or "detach" in name
        if here and any(isinstance(x, FakeTensor) for x in (*there, *made)):
            self.copies.append(name)
        elif not idle and any(
            x.numel() > LARGE and not isinstance(x, FakeTensor) for x in (*given, *made)
        ):
            self.cpu_operations.append(name)
        if any(isinstance(x, FakeTensor) for x in (*there, *made)) and not idle:
            self.device_operations.append(name)
            self.device_bytes += sum(x.numel() * x.element_size() for x in (*there, *made))
        return result
