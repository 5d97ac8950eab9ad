"""Declare fields of the configuration's dataclasses, with the bounds that the loader checks."""

from dataclasses import field
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """The largest legal value of a number: it is far beyond any run, or a machine cannot count it.

    Attributes:
        most: The value.
        unit: What is counted, such as "tokens".
        reason: Why there cannot be more.
    """

    most: float
    unit: str
    reason: str


_MODELS = "no published model is near it"
_CLUSTERS = "no cluster has so many"
_MEANING = "beyond it training has no meaning"

SEQLEN = Limit(2**30, "tokens", "borders of documents are 32-bit numbers")
TOKENS = Limit(2**50, "tokens", "no text is so long")
VOCABULARY = Limit(2**24, "tokens", _MODELS)
LAYERS = Limit(1024, "layers", _MODELS)
FEATURES = Limit(2**20, "features", _MODELS)
HEADS = Limit(4096, "heads", _MODELS)
RANKS = Limit(2**17, "ranks", _CLUSTERS)
TP_RANKS = Limit(256, "ranks", "tensor parallelism stays inside a group of fast links")
PP_RANKS = Limit(1024, "ranks", "a stage needs a layer")
CP_RANKS = Limit(4096, "ranks", "each rank exchanges with all others")
DILATION = Limit(2**16, "tokens", "a head would see almost nothing")
SAMPLES = Limit(2**24, "samples", _CLUSTERS)
DEPTHS = Limit(1000, "depths", "a map of them could not be read")
PERCENT = Limit(100.0, "percent", "a score is no better than all right")
STEPS = Limit(10**9, "steps", "at ten a second it takes three years")
CHECKPOINTS = Limit(10**6, "checkpoints", "no file system holds so many")
SEED = Limit(2**63 - 1, "(a 63-bit number)", "torch and Megatron derive 64-bit seeds from it")
SECONDS = Limit(7 * 86400, "seconds, a week", "a stuck run holds its devices for that time")
ELEMENTS = Limit(2**36, "elements", "no device holds so many")
RATE = Limit(10.0, "", _MEANING)
SMALL = Limit(1.0, "", _MEANING)
NORM = Limit(1e9, "", "it is the norm of all gradients together")
BINS = Limit(4096, "bins", "no figure shows more")
NATS = Limit(1e3, "nats", "no token is so unlikely")
FACTOR = Limit(1e6, "times", _MEANING)
ROPE_BASE = Limit(1e15, "", "angles are fp32 numbers")
POWER = Limit(1e3, "", "weights are fp32 numbers")
WEIGHT = Limit(1e9, "", "it is a share of the sum of all weights")
TFLOPS = Limit(1e6, "TFLOP/s", "no device is so fast")


def at_least(low: float, default: Any, limit: Limit | None = None) -> Any:
    """Declare a field with a default that must be at least `low`, and at most the limit."""
    return field(default=default, metadata={"min": low, "limit": limit})


def above(low: float, default: Any, limit: Limit | None = None) -> Any:
    """Declare a field with a default that must be greater than `low`, and at most the limit."""
    return field(default=default, metadata={"above": low, "limit": limit})


def required(low: float | None = None, limit: Limit | None = None) -> Any:
    """Declare a field without a default, with optional bounds."""
    return field(metadata={"min": low, "limit": limit})


def folder() -> Any:
    """Declare the path of a folder that a run makes, without a default."""
    return field(metadata={"folder": True})
