"""Measured rates of GPUs, and the measured training steps that estimates are compared with.

The rates are of one NVIDIA H100 80GB HBM3, 2026-11-27, commit f3bbd83, torch 2.11.0+cu130:
attention from the rows of `kernels/bench/results/*.csv` at 32,768 tokens (`full` by cuDNN, which a
step uses); products with weights, narrow heads and passes over memory from `profile_1b_16k.txt`
there, a profile of the first of `STEPS`. The other steps had no part in the rates; those of the
second commit were measured on 2026-11-28.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcdist.config import parse
from lcdist.config.schema import Config
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan.plan import make_plan
from lcdist.plan.time import AttentionRow, Rates, step_seconds

H100_SOURCE = "measured on one at commit f3bbd83"
H100 = Rates(
    products=684e12,
    attention=(
        AttentionRow("full", {}, 13.9, 40.5),
        AttentionRow("coca", {}, 18.2, 59.3),
        AttentionRow("scca", {"pattern": "fixed", "chunk_size": 2048}, 2.07, 6.69),
        AttentionRow("scca", {"pattern": "flow", "chunk_size": 2048}, 25.6, 22.5),
        AttentionRow("scca", {"pattern": "sda", "dilation": 4}, 15.3, 46.1),
        AttentionRow("scca", {"pattern": "longmixed", "chunk_size": 2048}, 5.39, 26.6),
        AttentionRow("tensorized", {"modes": (512,)}, 6.76, 15.1),
        AttentionRow("landmark", {"block_size": 64}, 20.3, 112.0),
        AttentionRow("lssar", {}, 48.1, 99.7),
        AttentionRow("lssar", {"reweight": False}, 25.9, 81.6),
    ),
    narrow=0.76,
    moved=3.0e12,
)


@dataclass(frozen=True)
class MeasuredStep:
    """Hold a training step that was measured.

    Attributes:
        what: In words.
        device: The GPU, and the commit.
        settings: Sections of the configuration that differ from the 1B model's.
        milliseconds: Of a step.
    """

    what: str
    device: str
    settings: Mapping[str, Mapping[str, Any]]
    milliseconds: float

    @property
    def estimate(self) -> float:
        """Milliseconds that the rates give."""
        seconds = step_seconds(make_plan(_config(self.settings), 1, GPU_SPECS["h100"]), H100)
        assert seconds is not None, "every method of a row has a rate"
        return 1e3 * seconds

    @property
    def error(self) -> float:
        """Estimate over measurement, less one."""
        return self.estimate / self.milliseconds - 1


_EIGHT = {
    "model": {
        **{"num_layers": 8, "hidden_size": 4096, "ffn_hidden_size": 14336, "head_dim": 128},
        "tied_embeddings": False,
    },
    "train": {"seqlen": 32768, "recompute": "full", "offload": "host", "mlp": "tiled"},
    "attention": {"method": "scca", "chunk_size": 8192},
    "lora": {"rank": 8},
}
_FIRST, _SECOND = "H100, f3bbd83", "H200, dd06768"
_SCCA = {"attention": {"method": "scca", "chunk_size": 4096}}
_TENSORIZED = {"attention": {"method": "tensorized", "modes": [512]}}
_LANDMARK = {"attention": {"method": "landmark", "block_size": 64}}
_LSSAR = {"attention": {"method": "lssar"}}
# Llama-3.2-1B's shape at 16,384 tokens, but for the row of LoRA: 8 layers of Llama-3-8B's shape.
# The kernels of the second commit are newer than the rates.
STEPS = (
    MeasuredStep("full", _FIRST, {}, 502),
    MeasuredStep("scca", _FIRST, _SCCA, 439),
    MeasuredStep("tensorized", _FIRST, _TENSORIZED, 463),
    MeasuredStep("landmark", _FIRST, _LANDMARK, 732),
    MeasuredStep("lssar", _FIRST, _LSSAR, 829),
    MeasuredStep("scca, LoRA, 8 wide layers, 32k", _FIRST, _EIGHT, 32_768 / 27.4),
    MeasuredStep("full", _SECOND, {}, 477.9),
    MeasuredStep("scca", _SECOND, _SCCA, 408.1),
    MeasuredStep("landmark", _SECOND, _LANDMARK, 572.1),
    MeasuredStep("tensorized", _SECOND, _TENSORIZED, 400.9),
)


def _config(settings: Mapping[str, Mapping[str, Any]]) -> Config:
    table: dict[str, dict[str, Any]] = {
        "model": {
            **{"vocab_size": 128_256, "num_layers": 16, "hidden_size": 2048, "nheads": 32},
            **{"nheads_kv": 8, "ffn_hidden_size": 8192, "tied_embeddings": True},
        },
        "train": {
            **{"seqlen": 16_384, "steps": 1, "loss": "chunked", "recompute": "none"},
            **{"offload": "none", "mlp": "whole"},
        },
        "data": {"source": "synthetic"},
        "log": {"folder": "unused"},
    }
    for section, values in settings.items():
        table[section] = {**table.get(section, {}), **values}
    return parse(table)
