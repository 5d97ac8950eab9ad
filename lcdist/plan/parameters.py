"""Count parameters: of the model, of those trained, and of each pipeline stage's rank."""

from dataclasses import dataclass
from math import prod

from lcdist.config.lora_sizes import adapter_tensors
from lcdist.plan.shape import RunShape


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, in elements."""

    shape: RunShape

    @property
    def total(self) -> int:
        """Parameters of the whole model, adapters and padding of the vocabulary included."""
        model = self.shape.config.model
        tables = 1 if model.tied_embeddings else 2
        outside = (tables * self.shape.padded_vocab_size + 1) * model.hidden_size
        extras = sum(map(self.layer_extras, range(model.num_layers)))
        layer = self.layer + self.layer_adapters(1)
        return outside + model.num_layers * layer + extras

    @property
    def trained(self) -> int:
        """Trained parameters of the whole model; fewer than `total` with LoRA."""
        model, lora = self.shape.config.model, self.shape.config.lora
        if not lora.rank:
            return self.total
        tables = lora.embeddings + (lora.head and not model.tied_embeddings)
        norms = lora.norms * (2 * model.num_layers + 1)
        extras = sum(map(self.layer_extras, range(model.num_layers)))
        outside = (tables * self.shape.padded_vocab_size + norms) * model.hidden_size
        return outside + model.num_layers * self.layer_adapters(1) + extras

    @property
    def layer(self) -> int:
        """Parameters of one layer, without adapters and its attention method's own parameters."""
        model, shape = self.shape.config.model, self.shape
        width = shape.head_dim * (2 * model.nheads + 2 * shape.nheads_kv)
        whole = self.layer_norms + self.layer_biases
        return model.hidden_size * (width + 3 * model.ffn_hidden_size) + whole

    @property
    def layer_norms(self) -> int:
        """Elements of one layer's norms, which every tensor-parallel rank has."""
        model = self.shape.config.model
        return 2 * model.hidden_size + (2 * self.shape.head_dim if model.qk_norm else 0)

    @property
    def layer_biases(self) -> int:
        """Elements of one layer's query, key and value biases; 0 without `model.qkv_bias`."""
        model, shape = self.shape.config.model, self.shape
        return shape.head_dim * (model.nheads + 2 * shape.nheads_kv) if model.qkv_bias else 0

    def layer_extras(self, layer: int) -> int:
        """Return the parameters that the attention method of layer number `layer` adds."""
        chosen = self.shape.layers[layer]
        sizes = chosen.method.parameters(chosen.options, self.shape.config.model.nheads).values()
        return sum(prod(size) for size in sizes)

    def layer_adapters(self, tp_size: int) -> int:
        """Return the parameters of one layer's adapters on a rank of `tp_size`."""
        return sum(adapter_tensors(self.shape.config, tp_size).values())

    @property
    def stages(self) -> tuple[int, int]:
        """Parameters of one rank on the (first, last) pipeline stage; a single stage is both."""
        tp_size = self.shape.config.parallel.tp_size
        norms = self.layer_norms
        layer = (self.layer - norms) // tp_size + norms + self.layer_adapters(tp_size)
        return self._on_stages(layer, embeddings=True, head=True, norms=True)

    @property
    def trained_stages(self) -> tuple[int, int]:
        """Parameters of `stages` that are trained, and so have a gradient."""
        model, lora = self.shape.config.model, self.shape.config.lora
        if not lora.rank:
            return self.stages
        layer = self.layer_adapters(self.shape.config.parallel.tp_size)
        layer += lora.norms * 2 * model.hidden_size
        return self._on_stages(layer, lora.embeddings, lora.head, lora.norms)

    @property
    def largest_trained(self) -> int:
        """Elements of the largest trained tensor on a rank."""
        config = self.shape.config
        model, lora, tp_size = config.model, config.lora, config.parallel.tp_size
        rows = self.shape.padded_vocab_size
        if not lora.rank:
            rows = max(rows, 2 * model.ffn_hidden_size)
        elif not (lora.embeddings or lora.head):
            return max(adapter_tensors(config, tp_size).values())
        return rows // tp_size * model.hidden_size

    def _on_stages(self, layer: int, embeddings: bool, head: bool, norms: bool) -> tuple[int, int]:
        """Sum parameters over the (first, last) stage.

        Args:
            layer: Parameters to count a layer; its attention method's own are added.
            embeddings: Whether to count the embedding.
            head: Whether to count the output layer.
            norms: Whether to count the last norm.
        """
        model, parallel = self.shape.config.model, self.shape.config.parallel
        stages = self.shape.stage_layers
        first, last = (
            sum(layer + self.layer_extras(number) // parallel.tp_size for number in stage)
            for stage in (stages[0], stages[-1])
        )
        table = self.shape.padded_vocab_size // parallel.tp_size * model.hidden_size
        # With tied embeddings the output layer is a copy of the embedding on the last stage.
        output = embeddings if model.tied_embeddings else head
        last += norms * model.hidden_size
        if parallel.pp_size == 1:
            whole = last + (embeddings + (output and not model.tied_embeddings)) * table
            return whole, whole
        return first + embeddings * table, last + output * table
