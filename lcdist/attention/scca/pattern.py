"""Assign a rule to each head of a model, by SCCA's options; check them (arXiv:2312.07305).

A pattern counts in units: key heads if the model has at least four, else query heads. Unit g of U,
with w = chunk_size and r = dilation, has:

    fixed      shift 0 below unit max(1, U // 2), `shift` (w // 2) from there on
    s2         the same units, shifted by half a chunk on queries and keys alike
    flow       shift of g + stagger chunks
    sda(_key)  every r-th distance (key), from (g + stagger) mod r
    longmixed  `fixed` units, then sda of dilation 2, then of 4, each numbered from 0

Heads are numbered over the whole model, so tensor parallelism does not change the function.
"""

import dataclasses
from fractions import Fraction
from itertools import pairwise

from lcdist.attention.shape import HeadSlice
from lcdist.config.schema import SccaOptions
from lcdist_kernels.scca import Rule

PATTERNS = ("fixed", "flow", "sda", "sda_key", "longmixed", "s2")
FEWEST_UNITS = 4
SHIFTED = ("fixed", "longmixed")
WRAPPED = ("fixed", "flow", "longmixed")
STAGGERED = ("flow", "sda", "sda_key")


def check_options(options: SccaOptions) -> None:
    """Raise ValueError, naming the field, if options conflict with each other on any model."""
    pattern = options.pattern
    if pattern not in PATTERNS:
        raise ValueError(f"pattern = {pattern!r}: must be one of {', '.join(PATTERNS)}")
    for field, least in (("chunk_size", 1), ("dilation", 1), ("shift", 0), ("stagger", 0)):
        value = getattr(options, field)
        if value is not None and value < least:
            raise ValueError(f"{field} = {value}: must be at least {least}")
    if options.wrap not in (None, "mask", "fold"):
        raise ValueError(f"wrap = {options.wrap!r}: must be mask or fold")
    _check_fields_used(options)
    if wrap_of(options) == "fold" and pattern in SHIFTED and _shift(options) % options.chunk_size:
        raise ValueError(
            f"wrap = 'fold' moves by whole chunks: shift = {_shift(options)} is not a multiple of "
            f"chunk_size = {options.chunk_size}; set shift to one, or wrap = 'mask'"
        )
    if pattern == "longmixed":
        given = options.fractions
        if len(given) != 3 or min(given) < 0 or abs(sum(given) - 1) > 1e-6:
            raise ValueError(
                f"fractions = {tuple(given)}: longmixed takes three that are at least 0 and sum "
                "to 1, for fixed, dilation 2 and dilation 4"
            )


def _check_fields_used(options: SccaOptions) -> None:
    for field, given, patterns in (
        ("shift", options.shift is not None, SHIFTED),
        ("wrap", options.wrap is not None, WRAPPED),
        ("stagger", options.stagger > 0, STAGGERED),
    ):
        if given and options.pattern not in patterns:
            raise ValueError(
                f"{field} = {getattr(options, field)!r} has no meaning for pattern = "
                f"{options.pattern!r}, only for {', '.join(patterns)}: leave it out"
            )
    if options.stagger and options.pattern == "flow" and wrap_of(options) == "mask":
        raise ValueError(
            f"stagger = {options.stagger} under pattern = 'flow' with wrap = 'mask' leaves no unit "
            "with shift 0: set stagger = 0, or wrap = 'fold'"
        )


def wrap_of(options: SccaOptions) -> str:
    """Return how the first chunks wrap: "mask" or "fold"; default fold for flow, else mask."""
    return options.wrap or ("fold" if options.pattern == "flow" else "mask")


def _shift(options: SccaOptions) -> int:
    return options.chunk_size // 2 if options.shift is None else options.shift


def num_units(nheads: int, nheads_kv: int) -> int:
    """Return the number of units of a pattern in a model with these heads."""
    return nheads_kv if nheads_kv >= FEWEST_UNITS else nheads


def model_rules(options: SccaOptions, nheads: int, nheads_kv: int) -> tuple[Rule, ...]:
    """Return the rule of every query head of the model.

    Raise ValueError as `check_options`, and if longmixed has fewer than four units.
    """
    check_options(options)
    units = num_units(nheads, nheads_kv)
    if options.pattern == "longmixed":
        if units < FEWEST_UNITS:
            raise ValueError(
                f"pattern = 'longmixed' needs at least {FEWEST_UNITS} query heads, the model has "
                f"nheads = {nheads}: use more heads or another pattern"
            )
        fixed, sparse, sparser = longmixed_units(options, units)
        by_unit = [*_fixed(options, fixed), *_dilated("pair", 2, 0, sparse)]
        by_unit += _dilated("pair", 4, 0, sparser)
    elif options.pattern in ("fixed", "s2"):
        by_unit = _fixed(options, units)
    elif options.pattern == "flow":
        kind, w = "fold" if wrap_of(options) == "fold" else "chunk", options.chunk_size
        by_unit = [Rule(kind, w, (g + options.stagger) * w) for g in range(units)]
    else:
        kind = "pair" if options.pattern == "sda" else "key"
        by_unit = _dilated(kind, options.dilation, options.stagger, units)
    # A plan that refuses fewer heads than key heads comes here first.
    heads_per_unit = max(1, nheads // units)
    return tuple(by_unit[head // heads_per_unit] for head in range(nheads))


def _fixed(options: SccaOptions, units: int) -> list[Rule]:
    w = options.chunk_size
    if options.pattern == "s2":
        shifted = Rule("split", w, w // 2)
    else:
        shifted = Rule("fold" if wrap_of(options) == "fold" else "chunk", w, _shift(options))
    # At least one unit has shift 0, also if there is only one.
    local = min(units, max(1, units // 2))
    return [Rule("chunk", w)] * local + [shifted] * (units - local)


def _dilated(kind: str, dilation: int, first: int, units: int) -> list[Rule]:
    return [Rule(kind, dilation, (first + g) % dilation) for g in range(units)]


def longmixed_units(options: SccaOptions, units: int) -> tuple[int, int, int]:
    """Split `units` by `fractions`, rounded by largest remainder; ties go to the earlier part."""
    exact = [Fraction(f).limit_denominator(10**6) * units for f in options.fractions]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(3), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: units - sum(shares)]:
        shares[i] += 1
    return shares[0], shares[1], shares[2]


def held_rules(options: SccaOptions, heads: HeadSlice, held: int) -> tuple[Rule, ...]:
    """Return the rules of the `held` query heads of a tensor. Raise as `model_rules`."""
    rules = model_rules(options, heads.nheads, heads.nheads_kv)
    return rules[heads.first : heads.first + held]


def check_documents(
    options: SccaOptions,
    heads: HeadSlice,
    seqlen: int,
    documents: tuple[int, ...] | None = None,
) -> None:
    """For flow with wrap = "mask", raise ValueError if a document has fewer chunks than units.

    The document's later units would see nothing in it. Empty documents and the padding after the
    last border do not count.

    documents: document borders; None: the whole sequence is one document.
    """
    if options.pattern != "flow" or wrap_of(options) != "mask":
        return
    units = num_units(heads.nheads, heads.nheads_kv)
    borders = (0, seqlen) if documents is None else documents
    for number, (start, stop) in enumerate(pairwise(borders)):
        chunks = -(-(stop - start) // options.chunk_size)
        if 0 < chunks < units:
            raise ValueError(
                f"wrap = 'mask' under pattern = 'flow': unit {chunks} of {units} is shifted by "
                f"{chunks} chunks, but document {number} of {stop - start} tokens has only "
                f"{chunks} of chunk_size = {options.chunk_size}; use wrap = 'fold', a smaller "
                "chunk_size or longer documents"
            )


def for_layer(options: SccaOptions, layer: int, nheads: int, nheads_kv: int) -> SccaOptions:
    """Return the options of a layer: under flow with fold, sda and sda_key, stagger differs.

    Each layer continues where the units of the previous one stopped.
    """
    masked = options.pattern == "flow" and wrap_of(options) == "mask"
    if options.pattern not in STAGGERED or masked:
        return options
    first = layer * num_units(nheads, nheads_kv)
    return dataclasses.replace(options, stagger=options.stagger + first)
