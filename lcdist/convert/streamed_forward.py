"""Forward pass of a checkpoint, layer by layer, with the training model's own layer in float64.

Every conversion compares it with `lcdist.convert.reference_forward`. `lcdist.model.build` builds
one layer per attention method, with fused projections and rotation. The weights of each layer are
read into it in turn, so that a model larger than memory runs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.tensors import CheckpointTensors
from lcdist.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    ParallelConfig,
    TrainConfig,
)
from lcdist.convert.huggingface.names import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix
from lcdist.convert.reference_forward import matmul_by_rows
from lcdist.distributed.mesh import build_mesh, world_size
from lcdist.layout import ContextLayout
from lcdist.model.build import build_model
from lcdist.model.sequence import SequenceParams
from lcdist.plan import make_plan
from lcdist.plan.resolve import LayerAttention


def check_single_process() -> None:
    """Raise ValueError if the launcher has started several processes."""
    if world_size() > 1:
        raise ValueError(
            f"a conversion runs in one process, and {world_size()} were started: start it without "
            "torchrun"
        )


def streamed_logits(
    config: Config, tensors: CheckpointTensors, tokens: Tensor, layers: Sequence[LayerAttention]
) -> Tensor:
    """Compute logits float64 `[s, vocab_size]`; a world of one process must have been started.

    Args:
        config: the checkpoint's configuration.
        tensors: its weights.
        tokens: int64 `[s]`, landmarks included.
        layers: attention of each layer.
    """
    mesh = build_mesh(ParallelConfig(), config.train.seed)
    built = {one: _build_layer(config, len(tokens), one, mesh.device) for one in set(layers)}
    x = torch.empty(len(tokens), config.model.hidden_size, dtype=torch.float64)
    for index in tokens.argsort().tolist():  # in order of rows, so that each piece is read once
        x[index] = tensors.rows(EMBEDDING, int(tokens[index]), int(tokens[index]) + 1)[0]
    layout = ContextLayout("contiguous", len(tokens), cp_size=1)
    sequence = SequenceParams(layout=layout)
    x = x[:, None].to(mesh.device)  # [s, b, h]
    with torch.no_grad():
        for number in range(config.model.num_layers):
            layer = built[layers[number]]
            _load_layer(layer, tensors, layer_prefix(number))
            x, _ = layer(hidden_states=x, attention_mask=None, packed_seq_params=sequence)
    scale = tensors.rows(FINAL_NORM).double()
    x = F.rms_norm(x[:, 0].cpu(), scale.shape, scale, config.model.norm_eps)
    head = EMBEDDING if config.model.tied_embeddings else OUTPUT
    return matmul_by_rows(x, lambda a, b: tensors.rows(head, a, b), config.model.vocab_size)


def _build_layer(
    config: Config, seqlen: int, attention: LayerAttention, device: torch.device
) -> nn.Module:
    """Build the training model's layer in float64, with uninitialized weights."""
    # The smallest vocabulary: embedding and output layer are read row by row elsewhere.
    model = replace(config.model, num_layers=1, vocab_size=3)
    method = attention.method.name
    train = TrainConfig(seqlen=seqlen, steps=1, dtype="fp32", recompute="none")
    one = Config(
        model=model,
        attention=AttentionConfig(method=method, impl="torch", options=attention.options),
        train=replace(train, mlp="whole", offload="none"),
        data=DataConfig(source="synthetic"),
        log=config.log,
    )
    [chunk] = build_model(make_plan(one, 1), device)
    layer: nn.Module = chunk.decoder.layers[0]  # type: ignore[union-attr,index,assignment]
    for parameter in layer.parameters():
        # Not `double()`, which would hold both copies for a moment.
        shape, parameter.data = parameter.shape, torch.empty(0, device=device)
        parameter.data = torch.empty(shape, dtype=torch.float64, device=device)
    return layer.eval()


def _load_layer(layer: nn.Module, tensors: CheckpointTensors, prefix: str) -> None:
    for name, parameter in layer.named_parameters():
        for first, stop in tensors.pieces(prefix + name, len(parameter)):
            parameter[first:stop].copy_(tensors.rows(prefix + name, first, stop))
