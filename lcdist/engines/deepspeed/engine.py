"""The training engine over DeepSpeed: ZeRO and offload, without pipeline stages."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcdist.data.loader import Batch
from lcdist.distributed.mesh import Mesh
from lcdist.engines.deepspeed.setup import copy_weights_to_masters, start
from lcdist.engines.deepspeed.state import WholeTensors, local_shape
from lcdist.engines.engine import NoTargetError, PendingLoss, RefusedStepError
from lcdist.engines.forward import MegatronForward
from lcdist.engines.loss import loss_sum
from lcdist.engines.moments import assign_owners, entries_by_parameter, owned, sharded_moments
from lcdist.engines.parameters import trained_parameters
from lcdist.engines.state import load_model_state, load_whole_tensors, model_state
from lcdist.exchange import Stopwatch
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams
from lcdist.plan import Plan


class DeepSpeedEngine(MegatronForward):
    """A `TrainEngine` whose gradients and optimizer state DeepSpeed holds.

    The loss rule is that of the other engine: the sum over the tokens of all ranks, divided once by
    their number, which is known before the first backward pass.
    """

    def __init__(self, plan: Plan, mesh: Mesh, chunks: Sequence[CausalLM]) -> None:
        super().__init__(mesh, chunks)
        [chunk] = self.chunks
        self.plan, self.stage = plan, plan.config.deepspeed.stage
        self.trained = trained_parameters(self.chunks, plan.config.lora.lr_ratio)
        # ZeRO-3 leaves parameters without a shape, so what describes them is taken before.
        state = model_state(self.chunks)
        self._entries = entries_by_parameter(state)
        self._keys = {id(entry.data): key for key, entry in state["chunk0"].items()}
        self._watch: Stopwatch | None = None
        self._log = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        self._loss = PendingLoss(partial(self._global_mean, self._log))
        self.engine = start(plan, mesh, chunk, self.trained)
        self.whole = WholeTensors(
            self.engine, [one.parameter for one in self.trained], mesh.dp_cp_group, mesh.device
        )

    def forward_backward(
        self, batches: Sequence[Batch], while_waiting: Callable[[], None] | None = None
    ) -> PendingLoss:
        """Compute the gradients of the global mean loss; as `TrainEngine` says."""
        self._watch = Stopwatch(self.mesh.device.type == "cuda")
        group, count = self.mesh.dp_cp_group, len(batches)
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().float()
        if group.size() > 1:
            dist.all_reduce(tokens, group=group)
        # DeepSpeed divides by the number of micro-batches and of data-parallel ranks.
        scale = group.size() * count / tokens.clamp(min=1)
        entries = []
        for number, batch in enumerate(batches):
            total, _, entry = loss_sum(self._losses(batch), batch.loss_mask)
            entries.append(entry)
            self.engine.backward(total * scale)
            if number < count - 1:
                self.engine.step()
        self._watch.stop()
        if while_waiting is not None:
            while_waiting()
        self._log = self._log_entry(entries)
        self._loss = PendingLoss(partial(self._global_mean, self._log))
        return self._loss

    def _losses(self, batch: Batch) -> Tensor:
        plan = self.plan
        sequence = SequenceParams(
            layout=plan.layout, seqlen=plan.config.train.seqlen, cu_seqlens=batch.cu_seqlens
        )
        return self.engine(
            batch.tokens, None, None, labels=batch.labels, packed_seq_params=sequence
        )

    @property
    def seconds_before_reduction(self) -> float:
        """Seconds of the last forward and backward; DeepSpeed reduces gradients within them."""
        return self._watch.seconds if self._watch is not None else 0.0

    def step(self, lr: float) -> float:
        """Update the weights; return the gradient norm before clipping; as `TrainEngine` says."""
        loss = self._loss.value
        if not loss.tokens:
            raise NoTargetError
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        if not math.isfinite(loss.mean):
            raise RefusedStepError(f"loss is {loss.mean}")
        norm = self._clip() if not self.stage else self._step_and_norm()
        if not math.isfinite(norm):
            raise RefusedStepError(f"gradient norm is {norm}; the loss is {loss.mean}")
        if not self.stage:
            self.engine.step()
        return norm

    def _step_and_norm(self) -> float:
        """Let ZeRO update the weights; return the gradient norm, not finite if it refused."""
        # The optimizer of bf16 weights and stage 1 updates them with whatever gradients there are.
        whole = getattr(self.engine.optimizer, "fp32_groups_gradients_flat", None)
        if whole is not None:
            # `isfinite` would make copies of all gradients; a norm makes none.
            largest = [torch.linalg.vector_norm(x, math.inf) for x in whole]
            finite = torch.stack(largest).isfinite().all().float()
            if dist.get_world_size() > 1:
                dist.all_reduce(finite, dist.ReduceOp.MIN)
            if not finite:
                return math.nan
        self.engine.step()
        refused = getattr(self.engine.optimizer, "overflow", False)
        return math.inf if refused else float(self.engine.get_global_grad_norm())

    def _clip(self) -> float:
        """Return the norm of all gradients, and scale them to `optim.clip_norm` at most."""
        gradients = [one.parameter.grad for one in self.trained]
        counted = [
            self.mesh.tp_rank == 0 or vars(one.parameter).get("tensor_model_parallel", False)
            for one in self.trained
        ]
        norms = [
            gradient.double().square().sum() * counts
            for gradient, counts in zip(gradients, counted, strict=True)
            if gradient is not None
        ]
        squares = torch.stack(norms).sum()
        if self.mesh.tp_size > 1:
            dist.all_reduce(squares, group=self.mesh.tp_group)
        norm, limit = math.sqrt(squares.item()), self.plan.config.optim.clip_norm
        if limit and limit < norm < math.inf:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(limit / (norm + 1e-6))
        return norm

    def gradient(self, name: str) -> Tensor:
        """Return this rank's part of a gradient in fp32, by the parameter's whole-model name."""
        return self.whole.gradient({one.name: one.parameter for one in self.trained}[name])

    def load_adapter(self, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        """Replace the weights that `tensors` names, by their whole-model names."""
        load_whole_tensors(self.chunks, tensors, self.mesh.tp_rank, self.whole.opened)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Copy the weights into the fp32 masters."""
        if self.stage:
            copy_weights_to_masters(self.engine)

    def state_dict(self, weights_only: bool = False) -> dict[str, Any]:
        """Return the sharded weights, and the sharded optimizer state unless `weights_only`."""
        state: dict[str, Any] = {"model": self._model_state()}
        if not weights_only:
            states = self.whole.read_states()
            state["optimizer"] = sharded_moments(self.whole.mine, states, self._entries)
        return state

    def load_state(self, loaded: dict[str, Any], steps_taken: int = 0) -> None:
        """Take over loaded weights; without optimizer state, masters follow the weights."""
        if self.stage < 3:
            load_model_state(self.chunks, loaded["model"])
        else:
            self._load_partitioned(loaded["model"])
        self.weights_changed()
        if "optimizer" in loaded:
            optimizer = loaded["optimizer"]
            states = [optimizer[str(number)] for number in range(len(self.whole.mine))]
            self.whole.write_states(states, steps_taken)

    # --- ZeRO-3 -----------------------------------------------------------------------------------

    def _model_state(self) -> dict[str, Any]:
        """Return the sharded weights; under ZeRO-3 each of them on its owner alone."""
        if self.stage < 3:
            return model_state(self.chunks)
        found = {}
        for parameter, owner in self._all_owners():
            weight = self.whole.weight(parameter)
            if owner == self.mesh.dp_cp_group.rank():
                data = weight.cpu().requires_grad_(parameter.requires_grad)
                entry = owned(self._entries[id(parameter)], data)
                found[self._keys[id(parameter)]] = entry
        return {"chunk0": found}

    def _load_partitioned(self, loaded: dict[str, Any]) -> None:
        """Take over the weights that each owner has loaded."""
        mine = loaded["chunk0"]
        for parameter, owner in self._all_owners():
            weight = mine.get(self._keys[id(parameter)])
            whole = self.whole.from_owner(weight, local_shape(parameter), parameter.dtype, owner)
            with torch.no_grad(), self.whole.opened(parameter):
                parameter.copy_(whole)

    def _all_owners(self) -> list[tuple[nn.Parameter, int]]:
        """Return every parameter, frozen ones too, and the rank of the group that saves it."""
        parameters = list(self.chunks[0].parameters())
        sizes = [local_shape(p).numel() for p in parameters]
        owners = assign_owners(sizes, self.mesh.dp_cp_group.size())
        return list(zip(parameters, owners, strict=True))
