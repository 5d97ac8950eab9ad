"""Operations and bytes of a training step by place, on a device that is not there.

    python -m tests.stand_in.moved RANK WORLD_SIZE "CONFIG [SECTION.KEY=VALUE ...]" ...

Prints a line of JSON for each configuration: the second step's work on the device. Weights have no
values, so that models of any size can be counted.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.stand_in.cuda import OURS, install, leave

STAND_IN = install(*map(int, sys.argv[1:3]))

from lcdist.config import load  # noqa: E402
from lcdist.distributed.mesh import Mesh, build_mesh  # noqa: E402
from lcdist.hardware.peak import Peak  # noqa: E402
from lcdist.model import build  # noqa: E402
from lcdist.plan import make_plan  # noqa: E402
from lcdist.train.build import build_trainer, open_dataset  # noqa: E402
from lcdist.train.trainer import Trainer  # noqa: E402

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = ("full", "scca", "coca", "landmark", "lssar", "tensorized")
# Operations that write a tensor without reading it.
FILLS = ("copy_", "zero_", "fill_", "normal_", "uniform_")
# Words in names of operations that move nothing.
IDLE = ("empty", "detach", "_unsafe_view")
# Arguments that a kernel reads and writes.
IN_PLACE = {"_swiglu_bwd_kernel": ("gate_up",), "_grad_kernel": ("logits",)}
# The optimizer's kernel gets addresses: it reads gradient, master and moments, and writes master,
# moments and a bf16 weight.
BYTES_A_PARAMETER = 30


@dataclass
class Work:
    """Work of one kind: numbers of launches and bytes, by (place, operation)."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)

    def rows(self) -> list[tuple[str, str, int, int]]:
        """Return (place, operation, launches, bytes), the most bytes first."""
        keys = sorted(self.launches, key=lambda key: -self.moved[key])
        return [(*key, self.launches[key], self.moved[key]) for key in keys]


class Moved(TorchDispatchMode):
    """Collects a step's work in three kinds: "product", "attention" and "other".

    Bytes are those of every tensor read, and of every tensor written, once an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = {kind: Work() for kind in ("product", "attention", "other")}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        idle = func.namespace != "aten" or func.is_view or any(word in name for word in IDLE)
        if not idle and _on_device(args, kwargs, result):
            kind = "product" if name in PRODUCTS else "other"
            if "attention" in name:
                kind = "attention"
            self._note(kind, name, _bytes(func, args, kwargs, result))
        return result

    def launched(self, kernel: Any, values: dict[str, Any]) -> None:
        """Note a launch of a Triton kernel."""
        name, rooms = kernel.fn.__name__, kernel.fn.__module__.split(".")
        kind = "attention" if len(rooms) > 1 and rooms[1] in ATTENTION else "other"
        tensors = {key: x for key, x in values.items() if isinstance(x, Tensor)}
        # An argument that a launch does not use takes the place of another one.
        distinct = {(x.untyped_storage()._cdata, x.storage_offset()): x for x in tensors.values()}
        moved = sum(_size(x) for x in distinct.values())
        moved += sum(_size(tensors[key]) for key in IN_PLACE.get(name, ()))
        if values.get("AGAIN"):
            moved += _size(tensors["dz"])
        if name == "_adamw_kernel":
            moved += BYTES_A_PARAMETER * len(values["pieces"]) * values["PIECE"]
        self._note(kind, name, moved)

    def _note(self, kind: str, name: str, moved: int) -> None:
        key = _place(), name
        self.work[kind].launches[key] += 1
        self.work[kind].moved[key] += moved


def _on_device(*given: Any) -> bool:
    return any(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in tree_leaves(given))


def _size(x: Tensor) -> int:
    """Return the bytes of x; a value that is repeated by a stride of 0 counts once."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * torch.Size(sizes).numel()


def _bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = func._schema.name.split("::")[-1]
    written, read = [], []
    for number, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name, args[number] if number < len(args) else None)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.numel()]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors if is_written else []
        read += [] if is_written and (argument.is_out or name in FILLS) else tensors
    known = {id(x) for x in written}
    written += [x for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in known]
    return sum(map(_size, written)) + sum(map(_size, read))


def _place() -> str:
    """Return the innermost of our functions that is at work, or autograd's node."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in OURS) and "/tests/" not in path:
            return f"{Path(path).name}: {frame.f_code.co_qualname}"
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return node.name() if node is not None else "elsewhere"


def count(words: str) -> dict[str, Any]:
    """Return the work of a configuration's second step."""
    path, *overrides = words.split()
    config = load(path, overrides)
    plan = make_plan(config, int(sys.argv[2]))
    mesh = build_mesh(config.parallel, config.train.seed)
    with patch.object(build, "init_weights", lambda *args: None):
        trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "not measured"))
    work = second_step(trainer, mesh)
    return {
        "of": words,
        "waits": dict(STAND_IN.waits),
        "messages": dict(STAND_IN.messages),
        **{kind: of_kind.rows() for kind, of_kind in work.items()},
    }


def second_step(trainer: Trainer, mesh: Mesh) -> dict[str, Work]:
    """Take two steps; return the work of the second, for which STAND_IN counts too."""
    work: dict[str, Work] = {}
    for _ in range(2):
        STAND_IN.launches.clear()
        STAND_IN.waits.clear()
        STAND_IN.messages.clear()
        STAND_IN.listener = None
        moved = Moved()
        with moved:
            STAND_IN.listener = moved.launched
            batches = [batch.to(mesh.device) for batch in trainer.loader.next_step()]
            trainer.engine.forward_backward(batches)
            trainer.engine.step(1e-3)
        work = moved.work
    STAND_IN.listener = None
    return work


def main() -> None:
    """Print all lines."""
    with STAND_IN:
        for words in sys.argv[3:]:
            print(json.dumps(count(words)), flush=True)
    leave()


if __name__ == "__main__":
    main()
