"""Jobs of claims: their text and their plans, without training."""

import json
from pathlib import Path

import pytest

from lcdist.claims.jobs import POWERS, all_jobs
from lcdist.claims.profiles import PROFILES
from lcdist.claims.text import MADE, REAL, TextSettings, made_sample, real_documents, write_text
from lcdist.commands.claims_jobs import Place, flops
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.plan import make_plan

ROOT = Path(__file__).parents[2]
SETTINGS = TextSettings("", 60_000, 100, 3, 6, 400)


def place_of(folder: Path, name: str) -> Place:
    file = ROOT / "configs" / "claims" / f"{name}.toml"
    place = Place(folder, file, (), PROFILES[name], {})
    jobs = {job.name: job for job in all_jobs(place.config.train.seqlen)}
    return Place(folder, file, (), PROFILES[name], jobs)


@pytest.mark.parametrize("name", PROFILES)
def test_all_jobs_of_a_profile_can_be_planned_and_take_the_same_tokens(
    tmp_path: Path, name: str
) -> None:
    place = place_of(tmp_path, name)
    tokens = dict[str, int]()
    for job in place.jobs.values():
        configs = [stage.config for stage in place.stages(job)]
        assert len(configs) == max(1, len(job.powers))
        for config in configs:
            plan = make_plan(config, 1)
            assert plan.shape.seqlen == config.train.seqlen, job.name
            assert config.model.vocab_size - plan.shape.text_vocab_size in (0, 1)
            assert plan.shape.text_vocab_size == place.profile.text.vocab_size
        tokens[job.name] = sum(
            config.train.steps * config.train.global_batch_size * config.train.seqlen
            for config in configs
        )
    trained = {tokens[job.name] for job in place.jobs.values() if not job.start}
    equal = {n for j, n in tokens.items() if place.jobs[j].start and not place.jobs[j].equal_flops}
    assert len(trained) == len(equal) == 1


def test_equal_work_is_equal_and_powers_grow_in_stages(tmp_path: Path) -> None:
    place = place_of(tmp_path, "cpu")
    [s2] = place.stages(place.jobs["extend-s2"])
    for job in place.jobs.values():
        if job.equal_flops:
            [own] = place.stages(job)
            # As near as whole steps allow.
            assert flops(own.config) == pytest.approx(flops(s2.config), rel=0.5 / 140)
    stages = place.stages(place.jobs["lssar-growing"])
    assert [stage.config.attention.options.power for stage in stages] == list(POWERS)
    assert [stage.config.optim.schedule for stage in stages] == [*["constant"] * 3, "cosine"]
    assert len({stage.config.train.seed for stage in stages}) == len(POWERS)
    same = place.stages(place.jobs["lssar-staged"])
    assert [stage.config.attention.options.power for stage in same] == [15.0] * len(POWERS)
    assert [stage.config.optim for stage in same] == [stage.config.optim for stage in stages]


def test_text_is_half_real_and_the_same_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        lines = [f"line {number * n} of a text about {n} things.\n" for n in range(30)]
        (source / f"{number}.txt").write_text("".join(lines))
    settings = TextSettings(**{**vars(SETTINGS), "source": str(source)})
    for folder in ("one", "two"):
        write_text(tmp_path / folder, settings)
    for name in (REAL, MADE):
        files = [tmp_path / folder / name / "train.bin" for folder in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = open_tokenizer(tmp_path / "one" / MADE)
    split = TokenSplit(tmp_path / "one" / MADE, "train")
    texts = [tokenizer.decode(split.document(n).tolist()) for n in range(split.num_documents)]
    assert any("What is the pass key? The pass key is " in text for text in texts)
    assert sum(len(text) for text in real_documents(str(source), 5000)) <= 5000
    # Finished text is kept; text of other settings is refused.
    write_text(tmp_path / "one", settings)
    other = TextSettings(**{**vars(settings), "seed": 1})
    with pytest.raises(ValueError, match="holds text of other settings"):
        write_text(tmp_path / "one", other)


def test_made_samples_can_be_answered_from_their_own_text() -> None:
    for number in range(20):
        sample = made_sample(SETTINGS, number)
        assert sample == made_sample(SETTINGS, number)
        lines = sample.splitlines()
        if number % 5 in (2, 4):
            [line] = set(lines)
            words = line.split()
            assert len(set(words)) == len(words) and 3 <= len(lines) <= 6
        else:
            key = sample.rpartition("The pass key is ")[2].strip().removesuffix(".")
            assert len(key) == 5 and sample.count(key) == 3 * sample.count("What is the pass key?")
    assert len({made_sample(SETTINGS, n) for n in range(20)}) == 20
    assert json.dumps(made_sample(SETTINGS, 0)) != json.dumps(
        made_sample(TextSettings(**{**vars(SETTINGS), "seed": 1}), 0)
    )
