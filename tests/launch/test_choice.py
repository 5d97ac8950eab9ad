"""Length, mesh and steps that `lcdist extend --model` chooses, from given speeds and memory."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lcdist.commands import extend, extend_choice, extend_own_model, extend_times
from lcdist.commands.extend_choice import Asked, Choice, Chooser, Speed, duration, ways
from lcdist.commands.extend_probe import probed_plans
from lcdist.commands.main import main
from lcdist.commands.probe import time_steps
from lcdist.config import load
from lcdist.config.schema import Config
from lcdist.data.tokenizers.sentencepiece_bpe import train_tokenizer
from lcdist.plan import Plan, make_plan
from lcdist.plan.time import step_work
from tests.convert.hf import FAMILIES, make_model, save
from tests.launch.conftest import TINY
from tests.launch.test_own_model import SENTENCE

GIB = 2**30
OWN = 64


def config_at(length: int, more: Sequence[str] = ()) -> Config:
    lengths = [f"train.seqlen={length}", f"evaluate.lengths=[{OWN},{length}]"]
    lengths += ["parallel.cp_size=2", "optim.warmup_steps=2"]
    return load(TINY / "extend.toml", [*lengths, *more])


def chooser(asked: Asked, speed: Speed, given: Sequence[str] = ()) -> Chooser:
    def at(length: int, more: Sequence[str]) -> Config:
        return config_at(length, [*more, *given])

    return Chooser(at, 2, OWN, asked, lambda length, words: speed)


def speed_for(length: int, seconds: float) -> Speed:
    """Return the speed at which a step of a length takes so many seconds."""
    return Speed(step_work(make_plan(config_at(length), 2)).flops / seconds)


@dataclass(frozen=True)
class Steady(Speed):
    """A speed at which every step takes the same time."""

    seconds: float = 0.0

    def step(self, plan: Plan) -> float:
        """Return the seconds of a step."""
        return self.seconds


def steady(seconds: float) -> Speed:
    return Steady(1e12, seconds=seconds)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extend_choice, "host_memory", lambda: GIB)


def settings_of(choice: Choice) -> dict[str, str]:
    return dict(word.split("=", 1) for word in choice.settings)


def test_a_speed_follows_from_the_step_that_shows_most() -> None:
    rows = [(1e9, 1.5, 0.5), (2e9, 2.0, 0.25), (4e9, 3.0, 0.5)]
    assert Speed.of_steps(rows) == Speed(4e9 / 3, 0.25)
    # Something else held up the longer one, or there is only one.
    assert Speed.of_steps([(1e9, 1.0, 0.1), (2e9, 4.0, 0.1)]) == Speed(1e9, 0.1)
    assert Speed.of_steps([(2e9, 2.0, 0.1)]) == Speed(1e9, 0.1)
    plan = make_plan(config_at(256), 2)
    assert Speed(1e9, 3.0).step(plan) == 3.0 + Speed(1e9).step(plan)


@pytest.mark.usefixtures("memory")
def test_as_many_steps_as_fit_at_four_times_the_length() -> None:
    choice = chooser(Asked(None, 1.0), speed_for(4 * OWN, 0.5)).choose()
    assert choice is not None and choice.length == 4 * OWN
    spent = choice.steps * choice.step_seconds + choice.evaluation_seconds
    assert 60 - choice.step_seconds < spent <= 60
    settings = settings_of(choice)
    assert settings["train.steps"] == str(choice.steps)
    # Warmup and checkpoints keep their share.
    assert settings["optim.warmup_steps"] == str(choice.steps // 2)
    assert settings["checkpoint.every"] == str(-(-choice.steps // 4))
    [line] = choice.said
    assert line.startswith("256 tokens, 4 times the model's own 64: ")
    assert "more steps do not fit 1 minutes" in line


@pytest.mark.usefixtures("memory")
def test_no_more_steps_than_are_of_use() -> None:
    choice = chooser(Asked(None, 10.0), speed_for(4 * OWN, 0.001)).choose()
    assert choice is not None and choice.steps == 1000
    assert "do not fit" not in choice.said[0]


@pytest.mark.usefixtures("memory")
def test_two_times_where_four_are_too_slow() -> None:
    # Five steps of 256 tokens take more than a minute, and five of 128 less.
    choice = chooser(Asked(None, 1.0), speed_for(4 * OWN, 15.0)).choose()
    assert choice is not None and choice.length == 2 * OWN and choice.steps >= 5
    assert re.match(
        r"256 tokens: a step takes about 15 s, .*fewer than 5 steps fit", choice.said[0]
    )
    assert choice.said[1].startswith("128 tokens, 2 times")


@pytest.mark.usefixtures("memory")
def test_what_the_user_gives_is_kept() -> None:
    asked = Asked(96, 1.0, frozenset({"train.steps", "evaluate.tokens", "optim.warmup_steps"}))
    choice = chooser(asked, speed_for(96, 30.0), ["train.steps=4"]).choose()
    assert choice is not None and (choice.length, choice.steps, choice.settings) == (96, 4, [])
    assert choice.said[-1].endswith("beyond 1 minutes")
    # A shorter length is tried only where none was given.
    asked = replace(asked, length=None)
    choice = chooser(asked, speed_for(4 * OWN, 20.0), ["train.steps=4"]).choose()
    assert choice is not None and choice.length == 2 * OWN
    assert "train.steps = 4 do not fit" in choice.said[0]


@pytest.mark.usefixtures("memory")
def test_minutes_that_the_refusal_names_are_enough() -> None:
    speed = speed_for(2 * OWN, 100.0)
    refused = chooser(Asked(None, 1.0), speed)
    assert refused.choose() is None and len(refused.reasons) == 2
    rows = extend_times.length_rows([128, 256, 512], refused)
    assert [row.length for row in rows] == [128, 256, 512]
    assert all(row.gpus == 1 and row.step_there and row.steps == 1000 for row in rows)
    assert [row.step_here for row in rows] == sorted(row.step_here or 0 for row in rows)
    line = extend_times.refusal(refused.reasons, rows)
    assert "\n" not in line and line.startswith("nothing was done, as nothing fits: 128 tokens: ")
    found = re.search(r"--length (\d+) --minutes (\d+)", line)
    assert found is not None
    choice = chooser(Asked(int(found[1]), float(found[2])), speed).choose()
    assert choice is not None and choice.steps >= 5
    commands = extend_times.commands_elsewhere(rows, "make extend MODEL=llama", "LENGTH=")
    assert commands[1] == "  make extend MODEL=llama LENGTH=128    (one H100)"


def test_less_memory_is_tried_before_a_shorter_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_of(*words: str) -> int:
        return 2 * make_plan(config_at(4 * OWN, words), 2).memory.device_bytes

    plain, split = bytes_of(), bytes_of("parallel.tp_size=2", "parallel.cp_size=1")
    again = bytes_of(*extend_choice.LESS_MEMORY)
    speed = speed_for(4 * OWN, 0.5)

    def chosen(usable: int, *given: str) -> Choice | None:
        monkeypatch.setattr(extend_choice, "host_memory", lambda: usable / 0.92 + 64)
        return chooser(Asked(None, 1.0, frozenset(given)), speed).choose()

    assert split < plain and again < plain
    roomy = chosen(plain)
    assert roomy is not None and "parallel.tp_size" not in settings_of(roomy)
    tight = chosen(max(split, again))
    assert tight is not None and tight.length == 4 * OWN
    assert {"parallel.tp_size", "train.recompute"} & settings_of(tight).keys()
    kept = chosen(again, "parallel.tp_size")
    assert kept is not None and kept.length == 4 * OWN
    assert settings_of(kept)["train.recompute"] == "full"
    assert "parallel.tp_size" not in settings_of(kept)
    assert chosen(1000) is None
    refused = chooser(Asked(None, 1.0), speed)
    assert refused.choose() is None and refused.speed is None
    assert all("GiB are needed here" in reason for reason in refused.reasons)
    [row] = extend_times.length_rows([128], refused)
    assert row.step_here is None and row.lack
    assert extend_times.refusal(refused.reasons, [row]).endswith("memory, or a smaller model")


def test_ways_to_need_less_memory() -> None:
    tp = ["parallel.tp_size=2", "parallel.cp_size=1", "parallel.sequence_parallel=true"]
    again = list(extend_choice.LESS_MEMORY)
    assert list(ways(2, False, frozenset())) == [tp, again, [*tp, *again]]
    assert list(ways(2, True, frozenset())) == [tp]
    assert list(ways(2, False, frozenset({"parallel.cp_size", "train.mlp"}))) == [
        [again[0], again[2]]
    ]


def test_probes_end_when_they_would_take_long() -> None:
    configs = [config_at(length) for length in (128, 256, 512, 1024)]
    tried = list[int]()

    def seconds_of(factor: float, update: float = 0.0) -> list[tuple[int, float, float]]:
        tried.clear()

        def timed(config: Config) -> tuple[float, float]:
            tried.append(config.train.seqlen)
            return factor * config.train.seqlen, update

        return time_steps(configs, timed)

    assert [row[0] for row in seconds_of(1e-6)] == tried == [128, 256, 512, 1024]
    assert [row[0] for row in seconds_of(1e-2)] == tried == [128, 256]
    assert [row[0] for row in seconds_of(1e-6, update=3.0)] == tried == [128, 256]
    assert seconds_of(1.0, 0.5) == [(128, 128.0, 0.5)] and tried == [128]


def test_probes_are_short_and_of_made_up_text(tmp_path: Path) -> None:
    plans = probed_plans(600, config_at, 2, tmp_path)
    assert list(plans) == [128, 256, 512, 600]
    blocks = ["attention.method=landmark", "attention.block_size=200"]
    plans = probed_plans(600, lambda length: config_at(length, blocks), 2, tmp_path)
    assert list(plans) == [512, 600]
    plans = probed_plans(100, config_at, 2, tmp_path)
    assert list(plans) == [100]
    assert plans[100].config.data.source == "synthetic" and not plans[100].config.checkpoint.load


def test_durations_have_a_fitting_unit() -> None:
    found = [duration(s) for s in (0.1234, 5, 42.4, 100, 5000, 80_000, 200_000, 2e6)]
    assert found == [
        "0.12 s",
        "5 s",
        "42 s",
        "1.7 min",
        "83 min",
        "22 hours",
        "2.3 days",
        "23 days",
    ]


def test_the_command_for_another_machine_is_the_one_that_was_typed() -> None:
    given = {"model": "a b", "data": "stdlib", "method": "scca", "lora": 0}
    overrides = ["optim.lr=1e-4", "train.seqlen=8192"]

    def typed(**environment: str) -> tuple[str, str]:
        arguments = argparse.Namespace(**given, overrides=overrides, environment=environment)
        return extend._typed(arguments)

    made = "make extend MODEL='a b' METHOD=scca WITH=optim.lr=1e-4"
    assert typed(LCDIST_STARTER="make") == (made, "LENGTH=")
    assert typed() == ("lcdist extend --model 'a b' --method scca optim.lr=1e-4", "--length ")


def extend_at(
    speed: Speed, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> int:
    monkeypatch.setattr(extend_own_model, "probe_speed", lambda *_: speed)
    given = ["--model", str(model), "--data", str(text), "--configs", str(TINY), "--name", "job"]
    return main(["extend", *given, "log.peak_tflops=1", *words])


@pytest.mark.usefixtures("start")
def test_a_job_that_would_take_too_long_spends_nothing(
    llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert extend_at(steady(61.0), llama, text, monkeypatch, "--minutes", "2") == 2
    out, err = capsys.readouterr()
    assert "Estimates for one H100" in out and "+1%" in out and "-9%" in out
    command = f"lcdist extend --model {llama} --data {text} log.peak_tflops=1 --length 512"
    assert f"  {command}    (one H100)" in out.splitlines()
    [last] = err.splitlines()
    assert last.startswith("error: nothing was done, as nothing fits: 128 tokens: a step takes")
    assert last.endswith("give it longer, --length 128 --minutes 9, or another machine")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("start")
def test_models_of_every_family_may_be_long_already(
    family: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever length a model declares, more is planned: here where no step fits."""
    model = make_model(family, num_hidden_layers=2, vocab_size=320, max_position_embeddings=8192)
    source = save(model, tmp_path / family)
    (source / "tokenizer.model").write_bytes(train_tokenizer([SENTENCE * 40], 320))
    assert extend_at(steady(1e6), source, text, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "32,768 tokens: a step takes" in out and "65,536" in out
    assert f"--model {source} --data {text} log.peak_tflops=1 --length 16384" in out
    assert "nothing fits: 16,384 tokens" in err


@pytest.mark.usefixtures("start")
def test_a_job_trains_the_steps_that_fit(
    llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--minutes", "1", "--length", "160")
    assert extend_at(steady(7.0), llama, text, monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "160 tokens, 2.5 times the model's own 64: 8 steps of about 7 s" in out
    assert "expected were 56 s, a step 7 s" in out
    config = load(tmp_path / "runs/job/extend.toml")
    assert (config.train.seqlen, config.train.steps) == (160, 8)
    assert config.evaluate.lengths == (64, 128, 160)
    # The choice holds for later starts, whatever the machine's speed is then.
    assert extend_at(steady(1.0), llama, text, monkeypatch, *words) == 0
    assert "all was done before" in capsys.readouterr().out
