"""One function on every mesh: loss, gradients and initial weights equal those of one process."""

from itertools import product

import pytest

from tests.model.cases import Case, assert_same_gradients, results, shows_weights, tiers


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


def cases(rows_of_mesh: tuple[int, ...], documents: tuple[str, ...]) -> list[Case]:
    """Return every mesh with some rows of features, then batches in which some ranks are empty.

    rows_of_mesh: offsets of a mesh's rows. Offsets 0 and 8 are opposites.
    documents: data.documents of the batches with empty ranks, in turn.
    """
    features, found = rows(), []
    for number, (world_size, mesh) in enumerate(meshes()):
        for offset in rows_of_mesh:
            # Interleaving wants as many micro-batches as stages on each of two dp ranks.
            samples = 8 if "parallel.vp_size=2" in mesh else 4
            row = features[(number + offset) % 16]
            found.append(Case(world_size, mesh, *row, samples=samples))
    tp, pp, cp = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
    sp, contiguous = "parallel.sequence_parallel=true", ("parallel.layout=contiguous",)
    # 30 tokens of 96: the second cp rank holds padding alone. Holes: every other sample has no
    # loss, which is all samples of the second dp rank.
    padded = [(2, (cp,), 30, False), (4, (tp, cp, sp), 30, False), (4, (cp,), 30, True)]
    masked = [(2, (), None, True), (4, (pp,), None, True)]
    for number, (world_size, mesh, text, holes) in enumerate([*padded, *masked]):
        for kind in documents[number % 2 :: 2] or documents:
            shape = (f"data.documents={kind}", "train.seqlen=96")
            how = contiguous if text else ()
            found.append(Case(world_size, mesh, shape, how, text=text, holes=holes))
    # The padding of the layout is no part of the length that the rotation depends on.
    grown = 'model.rope={scaling="dynamic",factor=4,original_seqlen=16}'
    for kind in documents:
        shape = (f"data.documents={kind}", "train.seqlen=71", grown)
        found.append(Case(4, (cp, pp), shape))
    return found


DEFAULT = cases((0,), ("join", "pack"))
EXHAUSTIVE = cases((8,), ("pack", "join"))
CASES = tiers(DEFAULT, EXHAUSTIVE)


@pytest.mark.parametrize(("tier", "case"), CASES)
def test_gradients_equal_those_of_one_process(tier: tuple[Case, ...], case: Case) -> None:
    assert_same_gradients(results(tier, case.world_size)[case], results(tier, 1)[case.reference])


@pytest.mark.parametrize(("tier", "case"), [p for p in CASES if shows_weights(p.values[1])])
def test_initial_weights_are_the_same_bits(tier: tuple[Case, ...], case: Case) -> None:
    [(_, _, expected, _)] = results(tier, 1)[case.reference]
    assert results(tier, case.world_size)[case][0][2] == expected
