"""Which methods' weights a plain LLaMA reads, and what an export says of how they were trained.

The seam for the others: a method whose weights are not a plain LLaMA's needs files of code beside
its weights, an `auto_map` that names them, and what it learnt beside the projections.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from lcdist.config.schema import Config, RawOptions
from lcdist.layer_methods import layer_methods

# scca's patterns are a way to train: its weights are read with full attention.
PLAIN = ("full", "scca")


@dataclass(frozen=True)
class Modelling:
    """What an export has beside plain weights and their config.

    files: text by file name. keys: of config.json, `auto_map` among them. tensors: the name in the
    checkpoint of what is exported beside the table of names, by its name in the export.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)


def modelling(config: Config) -> Modelling:
    """What the methods of `config` need on the other side.

    Raises ValueError naming those that cannot be exported yet.
    """
    errors: list[str] = []
    layers = layer_methods(config, errors)
    if errors:
        raise ValueError("\n".join(errors))
    names = dict.fromkeys(layer.method.name for layer in layers)
    odd = [name for name in names if name not in PLAIN]
    if odd:
        raise ValueError(
            f"attention.method = '{odd[0]}': its weights are not a plain LLaMA's, and cannot be "
            f"exported yet; {', '.join(PLAIN)} can"
        )
    return Modelling()


def about(config: Config, step: int) -> dict[str, Any]:
    """The block "lcdist" of a config.json: how the weights were trained, as plain data."""
    attention, rope = config.attention, config.model.rope
    others = {name: _plain(options) for name, options in attention.others.items()}
    layers = {"layers": attention.layers, "others": others} if attention.layers else {}
    return {
        "version": metadata.version("lcdist"),
        "method": attention.method,
        "options": _plain(attention.options),
        **layers,
        "rope": _plain(rope),
        "seqlen": config.train.seqlen,
        "step": step,
    }


def _plain(options: Any) -> dict[str, Any]:
    return dict(options.table) if isinstance(options, RawOptions) else dataclasses.asdict(options)
