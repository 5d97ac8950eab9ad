"""Resolve the attention of every layer, and the layout that all layers accept.

`[attention] layers = "full@3::4 coca@0,-1"` gives layers 3, 7, 11, ... full attention and the first
and the last one CoCA; the others use `method`. Numbers count from 0, negative ones from the end,
slices are Python's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from lcdist.attention import METHODS, AttentionMethod
from lcdist.config import ConfigError
from lcdist.config.build import build_options
from lcdist.config.schema import OPTIONS, Config, RawOptions
from lcdist.layout import ContextLayout, pieces_needed
from lcdist.layout.documents import DocumentLayout


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer: a method and its options for that layer."""

    method: AttentionMethod
    options: Any


def resolve_layers(config: Config, errors: list[str]) -> tuple[LayerAttention, ...]:
    """Return the attention of every layer, in order; empty where `errors` were added."""
    errors_before = len(errors)
    attention, num_layers = config.attention, config.model.num_layers
    named = _parse_layers(attention.layers, num_layers, errors)
    options_of = {**attention.others, attention.method: attention.options}
    if attention.method in attention.others:
        errors.append(
            f"[attention.{attention.method}] is a table, but attention.method = "
            f"'{attention.method}': write its options beside method"
        )
    for name in attention.others:
        if name not in named.values() and name != attention.method:
            errors.append(
                f"[attention.{name}] has options of a method that attention.layers = "
                f"'{attention.layers}' gives to no layer; name its layers there or remove the table"
            )
    methods = {}
    for name in dict.fromkeys([attention.method, *named.values()]):
        methods[name] = _typed_options(name, options_of.get(name), config, errors)
    if len(errors) > errors_before:
        return ()
    nheads, nheads_kv = config.model.nheads, config.model.nheads_kv or config.model.nheads
    layers = []
    for layer in range(num_layers):
        method, options = methods[named.get(layer, attention.method)]
        options = method.for_layer(options, layer, nheads, nheads_kv)
        layers.append(LayerAttention(method, options))
    return tuple(layers)


def common_layouts(layers: Sequence[LayerAttention]) -> tuple[str, ...]:
    """Return the kinds of layout that every layer accepts."""
    kinds = layers[0].method.layouts_for(layers[0].options)
    accepted = [set(layer.method.layouts_for(layer.options)) for layer in layers]
    return tuple(kind for kind in kinds if all(kind in one for one in accepted))


def common_multiple(layers: Sequence[LayerAttention], cp_size: int, kind: str) -> int:
    """Return the number that a sequence's length must be a multiple of for every layer."""
    return lcm(*(layer.method.multiple_of(layer.options, cp_size, kind) for layer in layers))


def resolve_layout(
    config: Config, layers: tuple[LayerAttention, ...], errors: list[str]
) -> ContextLayout | None:
    """Return the layout of the padded sequence; None where `errors` were added."""
    parallel, legal = config.parallel, common_layouts(layers)
    kind = parallel.layout
    names = ", ".join(dict.fromkeys(f"'{layer.method.name}'" for layer in layers))
    if not legal:
        takes = "; ".join(
            f"'{layer.method.name}' takes {', '.join(layer.method.layouts_for(layer.options))}"
            for layer in dict.fromkeys(layers)
        )
        errors.append(f"attention.layers: the layers have no layout in common: {takes}")
        return None
    if kind == "auto":
        # Zigzag gives every rank the same share of the causal mask.
        kind = "zigzag" if "zigzag" in legal else legal[0]
    if kind not in legal:
        errors.append(
            f"parallel.layout = '{kind}': attention.method = {names} takes {', '.join(legal)}"
        )
        return None
    layers_multiple = common_multiple(layers, parallel.cp_size, kind)
    step = lcm(
        layers_multiple,
        pieces_needed(kind, parallel.cp_size),
        # Sequence parallelism divides each rank's tokens again.
        parallel.cp_size * (parallel.tp_size if parallel.sequence_parallel else 1),
    )
    padded = -(-config.train.seqlen // step) * step
    if padded > 2 * config.train.seqlen and layers_multiple > pieces_needed(kind, parallel.cp_size):
        errors.append(
            f"train.seqlen = {config.train.seqlen} would be mostly padding: attention.method = "
            f"{names} on parallel.cp_size = {parallel.cp_size} needs a multiple of {step}; use a "
            "longer seqlen, fewer ranks or smaller blocks"
        )
        return None
    return ContextLayout(kind, padded, parallel.cp_size, multiple_of=step)


def evaluation_layers(
    layers: Sequence[LayerAttention], attention: str
) -> tuple[LayerAttention, ...]:
    """Return the layers to use for evaluation.

    Args:
        layers: The layers as trained.
        attention: `evaluate.attention`. "method" keeps the layers. "auto" and "dense" use full
            attention for every other method whose weights work with it; the plan rejects "dense"
            for methods whose weights do not.
    """
    if attention == "method":
        return tuple(layers)
    full = LayerAttention(METHODS["full"], OPTIONS["full"]())
    return tuple(
        full if "dense" in layer.method.supports and layer.method != full.method else layer
        for layer in layers
    )


def document_layout_for(layers: Sequence[LayerAttention], vocab_size: int) -> DocumentLayout:
    """Return how documents are placed in a row for these layers.

    The landmark, if a layer needs one, is the last token of the vocabulary.

    Raises:
        ValueError: If two layers need landmarks at different places.
    """
    blocks = {layer.options.block_size for layer in layers if "landmarks" in layer.method.supports}
    if len(blocks) > 1:
        raise ValueError(
            f"attention.block_size differs between layers with landmarks: {sorted(blocks)}; "
            "a token is a landmark for all layers or for none: use one block_size"
        )
    multiple = common_multiple(layers, 1, "contiguous")
    if not blocks:
        return DocumentLayout(multiple)
    return DocumentLayout(multiple, block_size=blocks.pop(), landmark=vocab_size - 1)


def _typed_options(name: str, options: Any, config: Config, errors: list[str]) -> Any:
    """Return (method, options as its dataclass); None if there is no method called `name`."""
    if name not in METHODS:
        key = "method" if name == config.attention.method else "layers"
        errors.append(f"attention.{key} = '{name}': must be one of {', '.join(METHODS)}")
        return None
    method = METHODS[name]
    if options is None:
        options = OPTIONS[name]() if name in OPTIONS else RawOptions(table={})
    if isinstance(options, RawOptions):
        try:
            options = build_options(method.options, options)
        except ConfigError as error:
            errors.extend(error.errors)
    return method, options


def _parse_layers(words: str, num_layers: int, errors: list[str]) -> dict[int, str]:
    """Return the method name by layer number that `attention.layers` gives."""
    named: dict[int, str] = {}
    for word in words.split():
        name, at, items = word.partition("@")
        numbers = _layer_numbers(items, num_layers) if at and name else None
        if not numbers:
            errors.append(
                f"attention.layers: '{word}' names none of the {num_layers} layers; write "
                "method@numbers or slices from 0, with commas, such as full@3::4 or coca@0,-1"
            )
        for number in numbers or []:
            if number in named:
                errors.append(
                    f"attention.layers = '{words}': layer {number} is named twice; name it once"
                )
            named[number] = name
    return named


def _layer_numbers(items: str, num_layers: int) -> list[int] | None:
    """Return the layers that numbers and slices such as "0,3::4" name; None if malformed."""
    numbers: list[int] = []
    for item in items.split(","):
        try:
            parts = [int(part) if part else None for part in item.split(":")]
        except ValueError:
            return None
        if len(parts) == 1 and parts[0] is not None:
            if not -num_layers <= parts[0] < num_layers:
                return None
            numbers.append(parts[0] % num_layers)
        elif 2 <= len(parts) <= 3 and (len(parts) == 2 or parts[2] != 0):
            picked = range(num_layers)[slice(*parts)]
            if not picked:
                return None
            numbers += picked
        else:
            return None
    return numbers
