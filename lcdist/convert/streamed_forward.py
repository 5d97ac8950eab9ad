"""A stored model run layer by layer: the training model's own layer, with one layer's weights.

The other side of the comparison that ends every conversion. The layer, with its fused projections
and its rotation, is the one that `lcdist.model.build` makes; its weights are read from a checkpoint
one layer after another, so that a model larger than the memory runs. In float64; layers of one
method share one.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.tensors import Stored
from lcdist.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    ParallelConfig,
    TrainConfig,
)
from lcdist.convert.huggingface.names import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix
from lcdist.convert.reference_forward import by_rows
from lcdist.distributed.mesh import build_mesh, world_size
from lcdist.layout import ContextLayout
from lcdist.model.build import build_model
from lcdist.model.sequence import SequenceParams
from lcdist.plan import make_plan
from lcdist.plan.resolve import LayerAttention


def check_alone() -> None:
    """Raise ValueError where the launcher has started several processes."""
    if world_size() > 1:
        raise ValueError(
            f"a conversion is the work of one process, not of {world_size()}: start it without "
            "torchrun"
        )


def our_logits(
    config: Config, stored: Stored, tokens: Tensor, layers: Sequence[LayerAttention]
) -> Tensor:
    """tokens int64 `[s]` to logits float64 `[s, vocab_size]`; a world of one has been started.

    layers: how each attends. Landmarks are among the tokens.
    """
    mesh = build_mesh(ParallelConfig(), config.train.seed)
    made = {one: _one_layer(config, len(tokens), one, mesh.device) for one in set(layers)}
    x = torch.empty(len(tokens), config.model.hidden_size, dtype=torch.float64)
    for place in tokens.argsort().tolist():  # from top to bottom, as pieces are kept
        x[place] = stored.rows(EMBEDDING, int(tokens[place]), int(tokens[place]) + 1)[0]
    layout = ContextLayout("contiguous", len(tokens), cp_size=1)
    sequence = SequenceParams(layout=layout)
    x = x[:, None].to(mesh.device)  # [s, b, h]
    with torch.no_grad():
        for number in range(config.model.num_layers):
            layer = made[layers[number]]
            _fill(layer, stored, layer_prefix(number))
            x, _ = layer(hidden_states=x, attention_mask=None, packed_seq_params=sequence)
    scale = stored.rows(FINAL_NORM).double()
    x = F.rms_norm(x[:, 0].cpu(), scale.shape, scale, config.model.norm_eps)
    head = EMBEDDING if config.model.tied_embeddings else OUTPUT
    return by_rows(x, lambda a, b: stored.rows(head, a, b), config.model.vocab_size)


def _one_layer(
    config: Config, seqlen: int, attention: LayerAttention, device: torch.device
) -> nn.Module:
    """The training model's layer in float64, its weights not those of any model yet."""
    # The smallest vocabulary: embedding and output are read row by row, beside the layer.
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
        # Not `double()`: that would hold both for a moment.
        shape, parameter.data = parameter.shape, torch.empty(0, device=device)
        parameter.data = torch.empty(shape, dtype=torch.float64, device=device)
    return layer.eval()


def _fill(layer: nn.Module, stored: Stored, prefix: str) -> None:
    for name, parameter in layer.named_parameters():
        for first, stop in stored.pieces(prefix + name, len(parameter)):
            parameter[first:stop].copy_(stored.rows(prefix + name, first, stop))
