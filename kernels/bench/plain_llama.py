"""A LLaMA-shaped model in plain PyTorch, as a baseline for lcdist.

It uses torch's own attention, norms and linears, without parallelism. Its weights come from an
lcdist model, so that both can be checked to compute the same loss before either is timed.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcdist.config.schema import ModelConfig
from lcdist_kernels import Rotary


class PlainLayer(nn.Module):
    """Pre-norm attention and SwiGLU. qkv is laid out as in Megatron, key head by key head."""

    def __init__(self, hidden: int, nheads: int, nheads_kv: int, ffn: int) -> None:
        super().__init__()
        self.nheads, self.nheads_kv, self.head_dim = nheads, nheads_kv, hidden // nheads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)
        self.qkv = nn.Linear(hidden, (nheads + 2 * nheads_kv) * self.head_dim, bias=False)
        self.proj = nn.Linear(hidden, hidden, bias=False)
        self.fc1, self.fc2 = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, False)

    def forward(self, x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
        """Apply the layer to x `[b, s, hidden]`; the output has the same shape."""
        batch, seqlen, _ = x.shape
        group = self.nheads // self.nheads_kv
        qkv = self.qkv(self.norm1(x)).view(batch, seqlen, self.nheads_kv, group + 2, self.head_dim)
        q = qkv[..., :group, :].reshape(batch, seqlen, self.nheads, self.head_dim)
        q, k = rotary.rotate(q, positions), rotary.rotate(qkv[..., group, :], positions)
        q, k, v = (t.transpose(1, 2) for t in (q, k, qkv[..., group + 1, :]))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        x = x + self.proj(out.transpose(1, 2).reshape(batch, seqlen, -1))
        gate, up = self.fc1(self.norm2(x)).chunk(2, dim=-1)
        return x + self.fc2(F.silu(gate) * up)


class PlainLlama(nn.Module):
    """Embedding, layers, norm and output layer; `forward` returns the mean loss."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], rotary: Rotary) -> None:
        """Copy the weights of an lcdist model on one rank, by their names in the whole model."""
        super().__init__()
        shape = (config.hidden_size, config.nheads, config.nheads_kv or config.nheads)
        self.rotary, self.vocab_size = rotary, config.vocab_size
        rows, width = weights["embedding.word_embeddings.weight"].shape
        self.embedding = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(
            PlainLayer(*shape, config.ffn_hidden_size) for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, 1e-5)
        self.output = nn.Linear(width, rows, bias=False)
        self._take(weights)

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Tensor]) -> None:
        self.embedding.weight.copy_(weights["embedding.word_embeddings.weight"])
        self.norm.weight.copy_(weights["decoder.final_layernorm.weight"])
        self.output.weight.copy_(weights["output_layer.weight"])
        names = {
            "norm1": "input_layernorm",
            "qkv": "self_attention.linear_qkv",
            "proj": "self_attention.linear_proj",
            "norm2": "pre_mlp_layernorm",
            "fc1": "mlp.linear_fc1",
            "fc2": "mlp.linear_fc2",
        }
        for i, layer in enumerate(self.layers):
            for ours, theirs in names.items():
                source = weights[f"decoder.layers.{i}.{theirs}.weight"]
                getattr(layer, ours).weight.copy_(source)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss in nats a token; tokens, labels: `[b, s]`."""
        positions = torch.arange(tokens.shape[1])
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary, positions)
        logits = self.output(self.norm(x))[..., : self.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
