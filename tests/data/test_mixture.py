"""Mixtures: exact shares and factors, samples by number, and the coverage report."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lcdist.config import ConfigError, parse
from lcdist.config.schema import DataConfig, MixtureSource
from lcdist.data.datasets.build import build_dataset, coverage_lines, held_out_folder
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.mixture import Mixture, round_tokens
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.layout import ContextLayout
from lcdist.layout.documents import PADDING, DocumentLayout
from lcdist.plan import make_plan
from tests.data.folders import token_folder
from tests.test_config import table

# The tokens of folder i start at 10,000 i.
LENGTHS = {"books": [300, 41, 7, 500], "code": [9] * 70, "web": [33, 120, 64, 5, 200] * 2}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        name: token_folder(tmp_path / name, lengths, 10_000 * i)
        for i, (name, lengths) in enumerate(LENGTHS.items())
    }


def config(folders: dict[str, Path], *weights: float, **values) -> DataConfig:
    mixture = {
        name: MixtureSource(path=str(path), weight=weight)
        for (name, path), weight in zip(folders.items(), weights, strict=True)
    }
    return DataConfig(mixture=mixture, **values)


def mixture_of(data: DataConfig, seqlen: int = 20, seed: int = 3) -> Mixture:
    made = build_dataset(data, seqlen, seed, DocumentLayout())
    assert isinstance(made, Mixture)
    return made


def source_of(tokens: torch.Tensor) -> int:
    sources = set((tokens[tokens != PADDING] // 10_000).tolist())
    assert len(sources) == 1
    return sources.pop()


@pytest.mark.parametrize(
    ("weights", "cycle", "counts"),
    [
        ((0.7, 0.2, 0.1), 10, [7, 2, 1]),
        ((1, 1, 1), 3, [1, 1, 1]),
        ((3, 1.5, 0.5), 10, [6, 3, 1]),
        ((0.3334, 0.3333, 0.3333), 10_000, [3334, 3333, 3333]),
    ],
)
def test_shares_are_exact_over_a_cycle_and_close_everywhere(
    folders: dict[str, Path], weights: tuple[float, ...], cycle: int, counts: list[int]
) -> None:
    mixed = mixture_of(config(folders, *weights))
    assert mixed.cycle == cycle
    owners = np.array([mixed.locate(i)[0] for i in range(2 * cycle)])
    assert np.bincount(owners[:cycle]).tolist() == counts
    assert np.bincount(owners).tolist() == [2 * count for count in counts]
    running = np.stack([np.cumsum(owners == number) for number in range(3)], axis=1)
    wanted = np.outer(np.arange(1, 2 * cycle + 1), np.array(counts) / cycle)
    assert np.abs(running - wanted).max() < 1.5
    for n in (0, 1, cycle - 1, cycle, cycle + 1):
        assert list(mixed.samples_by_source(n).values()) == [
            int((owners[:n] == s).sum()) for s in range(3)
        ]


def test_every_source_keeps_its_order_without_gaps(folders: dict[str, Path]) -> None:
    mixed, alone = mixture_of(config(folders, 0.5, 0.3, 0.2)), {}
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for i in range(230):
        number, inner = mixed.locate(i)
        drawn[number].append(inner)
        tokens = mixed.sample(i).tokens
        assert source_of(tokens) == number
        alone[number, inner] = tokens
        assert torch.equal(mixed.cu_seqlens(i), mixed.sample(i).cu_seqlens)
    assert all(found == list(range(len(found))) for found in drawn.values())
    # Another source, or another weight, does not change the order of a source.
    names = ("code", "books")
    two = mixture_of(config({name: folders[name] for name in names}, 1.0, 9.0))
    for i in range(60):
        number, inner = two.locate(i)
        # In reverse order: source 0 is source 1 of the first mixture.
        assert torch.equal(two.sample(i).tokens, alone[1 - number, inner])
    first = mixture_of(config(folders, 0.5, 0.3, 0.2), seed=4)
    assert any(not torch.equal(first.sample(i).tokens, mixed.sample(i).tokens) for i in range(9))


def test_shares_of_packed_rows_count_tokens(tmp_path: Path) -> None:
    # Documents of 11 tokens leave 9 of 20 for padding; those of 20 leave none.
    padded = token_folder(tmp_path / "padded", [11] * 40)
    full = token_folder(tmp_path / "full", [20] * 40, 10_000)
    data = config({"padded": padded, "full": full}, 1, 1, documents="pack", packing="best_fit")
    mixed = mixture_of(data)
    assert mixed.cycle == 31 and mixed.samples_by_source(31) == {"padded": 20, "full": 11}
    tokens = Counter(
        int(token) // 10_000
        for i in range(31)
        for token in mixed.sample(i).tokens[:-1]
        if token != PADDING
    )
    assert tokens == {0: 220, 1: 220}


def spec(dp_rank: int, dp_size: int, batch: int) -> LoaderSpec:
    return LoaderSpec(ContextLayout("contiguous", 20, 1), dp_rank, dp_size, 0, 2, batch)


def test_any_mesh_draws_the_same_samples(folders: dict[str, Path]) -> None:
    data = config(folders, 0.5, 0.3, 0.2, long_from=(100,), long_factor=(2.5,))
    whole = Loader(mixture_of(data), spec(0, 1, 12))
    steps = [torch.cat([batch.tokens for batch in whole.next_step()]) for _ in range(5)]
    for dp_size in (2, 3):
        ranks = [Loader(mixture_of(data), spec(rank, dp_size, 12)) for rank in range(dp_size)]
        for rank in ranks:
            rank.load_state_dict({"seed": 3, "sample": 24})
        for step in steps[2:]:
            parts = [[batch.tokens for batch in rank.next_step()] for rank in ranks]
            joined = [batch for micro in zip(*parts, strict=True) for batch in micro]
            assert torch.equal(torch.cat(joined), step)


@pytest.mark.parametrize(
    ("bounds", "factors", "copies"),
    [
        ((), (), (1,)),
        ((100,), (5.0,), (1, 5)),
        ((50, 200), (2.5, 4.0), (2, 5, 8)),
        ((50,), (0.25,), (4, 1)),
        ((50,), (1.0,), (1, 1)),
    ],
)
def test_long_documents_are_drawn_by_their_factor(
    folders: dict[str, Path], bounds: tuple, factors: tuple, copies: tuple
) -> None:
    long = LongDocuments(bounds, factors)
    assert long.copies_by_band == copies
    data = TokenDataset(folders["web"], "train", 20, 3, long_documents=long)
    rounds = 20
    tokens = torch.cat([data.sample(i).tokens[:-1] for i in range(rounds * data.round_slots // 20)])
    counts = torch.bincount(tokens - 20_000)
    expected = [
        rounds * copies[sum(length >= bound for bound in bounds)]
        for length in LENGTHS["web"]
        for _ in range(length)
    ]
    assert counts.tolist() == expected


def test_a_factor_of_one_equals_the_plain_dataset(folders: dict[str, Path]) -> None:
    plain = TokenDataset(folders["web"], "train", 20, 3)
    one = TokenDataset(folders["web"], "train", 20, 3, long_documents=LongDocuments((50,), (1.0,)))
    for i in range(200):
        assert torch.equal(plain.sample(i).tokens, one.sample(i).tokens)
        assert torch.equal(plain.cu_seqlens(i), plain.sample(i).cu_seqlens)
    alone = build_dataset(DataConfig(path=str(folders["web"])), 20, 3, DocumentLayout())
    assert torch.equal(alone.sample(7).tokens, plain.sample(7).tokens)


def test_coverage_lines_equal_what_is_read(folders: dict[str, Path]) -> None:
    data = config(folders, 0.5, 0.3, 0.2, long_from=(100,), long_factor=(3.0,))
    lines = coverage_lines(mixture_of(data), 100)
    stored = {name: sum(lengths) for name, lengths in LENGTHS.items()}
    assert lines[0].startswith("books: 50.00% of the tokens; 1,000 tokens read of 848, each ")
    books = 48 + 3 * 800
    times = 50 * 20 / books
    assert lines[0].endswith(f"each {times:.2f} times")
    assert lines[1] == (
        f"books: documents from 100 tokens: {800 / 848:.2%} of the tokens stored, "
        f"{2400 / books:.2%} of those drawn, each {3 * times:.2f} times"
    )
    assert lines[2] == f"code: 30.00% of the tokens; 600 tokens read of {stored['code']}, " + (
        f"each {600 / 630:.2f} times"
    )
    one = build_dataset(DataConfig(path=str(folders["code"])), 20, 3, DocumentLayout())
    assert coverage_lines(one, 63) == [
        "data: 100.00% of the tokens; 1,260 tokens read of 630, each 2.00 times"
    ]
    assert round_tokens(mixture_of(data).sources["books"]) == books
    packed = DataConfig(path=str(folders["books"]), documents="pack", packing="best_fit")
    lines = coverage_lines(build_dataset(packed, 20, 3, DocumentLayout()), 10)
    assert lines[1] == "data: 43 rows, 1.40% padding; 3 documents are longer than a row and cut"


def test_conflicting_folders_raise(folders: dict[str, Path], tmp_path: Path) -> None:
    other = token_folder(tmp_path / "other", [30], fingerprint="another")
    with pytest.raises(
        ValueError, match=r"data\.mixture\.web\.path = .* another tokenizer .*books"
    ):
        build_dataset(config({**folders, "web": other}, 1, 1, 1), 20, 3, DocumentLayout())
    with pytest.raises(ValueError, match=r"data\.mixture\.web\.weight is less than one part in"):
        build_dataset(config(folders, 1, 0.77777777, 1e-7), 20, 3, DocumentLayout())


def test_the_held_out_folder_is_path_or_the_first_source(folders: dict[str, Path]) -> None:
    assert held_out_folder(config(folders, 1, 1, 1)) == folders["books"]
    assert held_out_folder(config(folders, 1, 1, 1, path="other")) == Path("other")
    assert TokenSplit(held_out_folder(config(folders, 1, 1, 1)), "valid").num_tokens == 300
    with pytest.raises(ValueError, match="'synthetic' has no valid split"):
        held_out_folder(DataConfig(source="synthetic"))


CONFLICTS = {
    "data.source=synthetic data.long_from=[9] data.long_factor=[2]": [
        "data.long_from has no meaning with data.source = 'synthetic'; leave it out, or read "
        "folders with data.source = 'tokens'",
        "data.long_factor has no meaning with data.source = 'synthetic'; leave it out, or read "
        "folders with data.source = 'tokens'",
    ],
    "data.source=synthetic data.mixture.a.path=x": [
        "data.mixture has no meaning with data.source = 'synthetic'; leave it out, or read folders "
        "with data.source = 'tokens'"
    ],
    "data.source=synthetic data.documents=pack data.packing=best_fit": [
        "data.packing = 'best_fit' is for data.source = 'tokens'; use 'cut'"
    ],
    "data.path=x data.packing=best_fit": [
        "data.packing = 'best_fit' keeps documents whole, and data.documents = 'join' has "
        "no documents; set data.documents = 'pack', or data.packing = 'cut'"
    ],
    "data.path=x data.balance=true": [
        "data.balance = true: with data.documents = 'join' all samples cost the same; set "
        "data.documents = 'pack', or data.balance = false"
    ],
    "data.mixture.a.path=x data.mixture.b.path=./x": [
        "data.mixture.b.path = './x' is also data.mixture.a.path; leave one out and give the "
        "other the sum of their weights"
    ],
    "data.mixture.a.path=": [
        "data.mixture.a.path is empty: name a folder made by 'lcdist tokenize'"
    ],
    "data.path=x data.long_from=[9,20] data.long_factor=[2]": [
        "data.long_from = [9, 20] and data.long_factor = [2.0]: every length needs a factor"
    ],
    "data.path=x data.long_from=[20,9] data.long_factor=[2,3]": [
        "data.long_from = [20, 9]: lengths must increase"
    ],
    "data.path=x data.long_from=[20] data.long_factor=[2.37]": [
        "data.long_factor = [2.37]: in whole numbers they are 100, 237; use factors that are whole "
        "after multiplication with one number up to 20, such as 2.5 or 1.2"
    ],
}


@pytest.mark.parametrize("words", list(CONFLICTS))
def test_conflicting_settings_raise(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(parse(table(), words.split()), 1)
    assert list(caught.value.errors) == CONFLICTS[words]


def test_a_mixture_is_planned_from_overrides() -> None:
    words = ["data.mixture.a.path=x", "data.mixture.b={path = 'y', weight = 2}"]
    plan = make_plan(parse(table(), [*words, "data.long_from=[9]", "data.long_factor=[2.5]"]), 1)
    assert dict(plan.config.data.mixture) == {
        "a": MixtureSource(path="x"),
        "b": MixtureSource(path="y", weight=2.0),
    }
