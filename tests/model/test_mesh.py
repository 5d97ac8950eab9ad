"""One function on every mesh: loss, gradients and initial weights equal those of one process."""

from itertools import product

import pytest

from tests.model.cases import Case, assert_same_gradients, results, shows_weights


def meshes() -> list[tuple[int, tuple[str, ...]]]:
    """(world size, overrides) of every (tp, pp, cp, dp) in {1, 2}^4 of at most 4 ranks.

    With tp = 2 once more under sequence parallelism, with pp = 2 once more interleaved.
    """
    found = []
    for tp, pp, cp, dp in product((1, 2), repeat=4):
        if tp * pp * cp * dp > 4:
            continue
        sizes = {"tp": tp, "pp": pp, "cp": cp}
        mesh = tuple(f"parallel.{axis}_size=2" for axis, size in sizes.items() if size == 2)
        ways = [mesh]
        if tp == 2:
            ways.append((*mesh, "parallel.sequence_parallel=true"))
        if pp == 2:
            ways.append((*ways[-1], "parallel.vp_size=2"))
        found += [(tp * pp * cp * dp, way) for way in ways]
    return found


def rows() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Eight rows of the orthogonal array of strength 2 for seven features, and their complements.

    Row r and row r + 8 are opposites, so a mesh that takes both meets every feature on and off.
    """
    bits = [(a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c) for a, b, c in product((0, 1), repeat=3)]
    bits += [tuple(1 - bit for bit in row) for row in bits]
    return [(_shape(row[:4]), _how(row[4:])) for row in bits]


def _shape(bits: tuple[int, ...]) -> tuple[str, ...]:
    packed, tied, odd, one_kv = bits
    return (
        f"data.documents={'pack' if packed else 'join'}",
        f"model.tied_embeddings={'true' if tied else 'false'}",
        f"train.seqlen={71 if odd else 96}",
        f"model.nheads_kv={1 if one_kv else 2}",
    )


def _how(bits: tuple[int, ...]) -> tuple[str, ...]:
    recompute, pairs, striped = bits
    return (
        f"train.recompute={'full' if recompute else 'none'}",
        f"train.micro_batch_size={2 if pairs else 1}",
        f"parallel.layout={'striped' if striped else 'auto'}",
    )


def cases() -> list[Case]:
    """Every mesh with two opposite rows of features, then the batches with empty ranks."""
    features, found = rows(), []
    for number, (world_size, mesh) in enumerate(meshes()):
        for row in (number % 8, number % 8 + 8):
            # Interleaving wants as many micro-batches as stages on each of two dp ranks.
            samples = 8 if "parallel.vp_size=2" in mesh else 4
            found.append(Case(world_size, mesh, *features[row], samples=samples))
    tp, pp, cp = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
    sp, contiguous = "parallel.sequence_parallel=true", ("parallel.layout=contiguous",)
    for documents in ("join", "pack"):
        shape = (f"data.documents={documents}", "train.seqlen=96")
        # 30 tokens of 96: the second cp rank holds padding alone.
        found.append(Case(2, (cp,), shape, contiguous, text=30))
        found.append(Case(4, (tp, cp, sp), shape, contiguous, text=30))
        found.append(Case(4, (cp,), shape, contiguous, text=30, holes=True))
        # The padding of the layout is no part of the length that the rotation depends on.
        grown = 'model.rope={scaling="dynamic",factor=4,original_seqlen=16}'
        found.append(Case(4, (cp, pp), (shape[0], "train.seqlen=71", grown)))
        # Every other sample has no loss: all samples of the second dp rank.
        found.append(Case(2, (), shape, holes=True))
        found.append(Case(4, (pp,), shape, holes=True))
    return found


CASES = tuple(cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_one_process(case: Case) -> None:
    assert_same_gradients(results(CASES, case.world_size)[case], results(CASES, 1)[case.reference])


@pytest.mark.parametrize("case", [*filter(shows_weights, CASES)], ids=str)
def test_initial_weights_are_the_same_bits(case: Case) -> None:
    [(_, _, expected, _)] = results(CASES, 1)[case.reference]
    assert results(CASES, case.world_size)[case][0][2] == expected
