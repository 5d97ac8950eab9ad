"""Which attention method each layer uses, and what the methods of all layers ask of the run.

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
from lcdist.config.load import build_options
from lcdist.config.schema import OPTIONS, Config, RawOptions
from lcdist.layout import ContextLayout, pieces_needed
from lcdist.layout.documents import DocumentLayout


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention: a method, and its options as that layer has them."""

    method: AttentionMethod
    options: Any


def resolve_layers(config: Config, errors: list[str]) -> tuple[LayerAttention, ...]:
    """The attention of every layer, in order; empty where `errors` were added."""
    before = len(errors)
    attention, num_layers = config.attention, config.model.num_layers
    chosen = _chosen(attention.layers, num_layers, errors)
    given = {**attention.others, attention.method: attention.options}
    if attention.method in attention.others:
        errors.append(
            f"[attention.{attention.method}] is a table of its own, but attention.method = "
            f"'{attention.method}': write its options beside method"
        )
    for name in attention.others:
        if name not in chosen.values() and name != attention.method:
            errors.append(
                f"[attention.{name}] has options of a method that attention.layers = "
                f"'{attention.layers}' gives to no layer; name its layers there or remove the table"
            )
    typed = {}
    for name in dict.fromkeys([attention.method, *chosen.values()]):
        typed[name] = _typed(name, given.get(name), config, errors)
    if len(errors) > before:
        return ()
    nheads, nheads_kv = config.model.nheads, config.model.nheads_kv or config.model.nheads
    found = []
    for layer in range(num_layers):
        method, options = typed[chosen.get(layer, attention.method)]
        options = method.for_layer(options, layer, nheads, nheads_kv)
        found.append(LayerAttention(method, options))
    return tuple(found)


def common_layouts(layers: Sequence[LayerAttention]) -> tuple[str, ...]:
    """The kinds of layout that every layer accepts."""
    kinds = layers[0].method.layouts_for(layers[0].options)
    accepted = [set(layer.method.layouts_for(layer.options)) for layer in layers]
    return tuple(kind for kind in kinds if all(kind in kinds_ for kinds_ in accepted))


def common_multiple(layers: Sequence[LayerAttention], cp_size: int, kind: str) -> int:
    """What the length of a sequence must be a multiple of for every layer."""
    return lcm(*(layer.method.multiple_of(layer.options, cp_size, kind) for layer in layers))


def resolve_layout(
    config: Config, layers: tuple[LayerAttention, ...], errors: list[str]
) -> ContextLayout | None:
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
        # Zigzag gives every rank the same share of a causal mask.
        kind = "zigzag" if "zigzag" in legal else legal[0]
    if kind not in legal:
        errors.append(
            f"parallel.layout = '{kind}': attention.method = {names} takes {', '.join(legal)}"
        )
        return None
    own = common_multiple(layers, parallel.cp_size, kind)
    step = lcm(
        own,
        pieces_needed(kind, parallel.cp_size),
        # Sequence parallelism cuts each rank's tokens once more.
        parallel.cp_size * (parallel.tp_size if parallel.sequence_parallel else 1),
    )
    padded = -(-config.train.seqlen // step) * step
    if padded > 2 * config.train.seqlen and own > pieces_needed(kind, parallel.cp_size):
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
    """The layers as a trained model is read, for `[evaluate] attention`.

    "method": as trained. "auto" and "dense": full attention in the place of every method whose
    weights are a dense model's; the plan has refused "dense" for the others.
    """
    if attention == "method":
        return tuple(layers)
    full = LayerAttention(METHODS["full"], OPTIONS["full"]())
    return tuple(full if "dense" in layer.method.supports else layer for layer in layers)


def document_layout_for(layers: Sequence[LayerAttention], vocab_size: int) -> DocumentLayout:
    """How the loader lays documents out for these layers.

    The landmark, where a layer needs one, is the last token of the vocabulary. Raises ValueError
    where two layers want landmarks in different places.
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


def _typed(name: str, options: Any, config: Config, errors: list[str]) -> Any:
    if name not in METHODS:
        where = "method" if name == config.attention.method else "layers"
        errors.append(f"attention.{where} = '{name}': must be one of {', '.join(METHODS)}")
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


def _chosen(words: str, num_layers: int, errors: list[str]) -> dict[int, str]:
    chosen: dict[int, str] = {}
    for word in words.split():
        name, at, which = word.partition("@")
        numbers = _numbers(which, num_layers) if at and name else None
        if not numbers:
            errors.append(
                f"attention.layers: '{word}' names none of the {num_layers} layers; write "
                "method@numbers or slices from 0, with commas, such as full@3::4 or coca@0,-1"
            )
        for number in numbers or []:
            if number in chosen:
                errors.append(
                    f"attention.layers = '{words}': layer {number} is named twice; name it once"
                )
            chosen[number] = name
    return chosen


def _numbers(which: str, num_layers: int) -> list[int] | None:
    """The layers that a list of numbers and slices names; None where it is not one."""
    found: list[int] = []
    for item in which.split(","):
        try:
            parts = [int(part) if part else None for part in item.split(":")]
        except ValueError:
            return None
        if len(parts) == 1 and parts[0] is not None:
            if not -num_layers <= parts[0] < num_layers:
                return None
            found.append(parts[0] % num_layers)
        elif 2 <= len(parts) <= 3 and (len(parts) == 2 or parts[2] != 0):
            picked = range(num_layers)[slice(*parts)]
            if not picked:
                return None
            found += picked
        else:
            return None
    return found
