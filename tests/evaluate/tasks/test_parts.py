"""The parts passkey, needle and ruler, on a model that copies numbers and on one that guesses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lcdist.commands.main import main
from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.evaluate.evaluation import Kept, evaluate_checkpoint
from lcdist.evaluate.tasks import cells
from lcdist.evaluate.tasks.haystack import essay
from lcdist.evaluate.tasks.inputs import held_out_essay
from lcdist.evaluate.tasks.needle import depths, needle_case
from lcdist.evaluate.tasks.passkey import passkey_case
from lcdist.evaluate.tasks.predict import continuations
from lcdist.evaluate.tasks.ruler import RULER
from lcdist.report.evaluation_sections import printed_tables, sections
from tests.distributed import run_ranks
from tests.evaluate.tasks.copier import Listening, words_of, write_model

LENGTHS = (300, 900)
SAMPLES, DEPTHS = 6, 3
STORY = "Rain fell on the old roof. Nobody in the house was awake! "
ASKED = (
    f"evaluate.lengths={list(LENGTHS)}",
    f"evaluate.samples={SAMPLES}",
    f"evaluate.depths={DEPTHS}",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that copies numbers, one with random weights, and a folder of tokens."""
    folder, hear, story = tmp_path_factory.mktemp("copier"), Listening(), essay(STORY)
    for length in LENGTHS:
        for number in range(SAMPLES):
            passkey_case(hear, length, 0, number)
            for name in ("niah_single_1", "niah_single_2"):
                RULER[name].case(hear, length, 0, number, story)
            for depth in depths(DEPTHS):
                needle_case(hear, length, depth, 0, number)
                needle_case(hear, length, depth, 0, number, story)
    words = words_of(hear.texts)
    for name, copies in (("copies", True), ("guesses", False)):
        saved = write_model(folder / "saved" / name, words, copies)
        assert main(["convert", "import", str(saved), str(folder / name)]) == 0
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(STORY * 60)
    tokenize = ["tokenize", str(folder / "text"), str(folder / "tokens"), "--workers", "1"]
    tokenize += ["--tokenizer", str(folder / "saved" / "copies"), "--valid-fraction", "0.5"]
    assert main(tokenize) == 0
    return folder


def measured(model: Path, *words: str) -> dict[str, Any]:
    output = model.parent / "result.json"
    output.unlink(missing_ok=True)
    assert (
        main(["evaluate", str(model), "--output", str(output), "--overwrite", *ASKED, *words]) == 0
    )
    return json.loads(output.read_text())["measured"]


@pytest.fixture(scope="module")
def results(models: Path) -> dict[str, dict[str, Any]]:
    asked = ["evaluate.measure=[passkey,needle,ruler]", "evaluate.ruler_tasks=[niah_single_1,cwe]"]
    return {name: measured(models / name, *asked) for name in ("copies", "guesses")}


def test_what_copies_finds_all_and_what_guesses_nothing(results: dict[str, Any]) -> None:
    for name, right in (("copies", 1.0), ("guesses", 0.0)):
        found = results[name]
        assert found["passkey"]["accuracy"] == [right] * 2
        assert found["passkey"]["cases"] == [SAMPLES] * 2
        low, high = found["passkey"]["interval"][0]
        assert (low < 0.7 and high == 1) if right else (low == 0 and high > 0.3)
        assert found["needle"]["accuracy"] == [[right] * 2] * DEPTHS
        assert found["needle"]["average"] == [right] * 2 and found["needle"]["cases"] == 2
        assert found["needle"]["text"] == "a repeated paragraph"
        assert found["ruler"]["tasks"]["niah_single_1"]["score"] == [100 * right] * 2
    tokens = results["copies"]["passkey"]["tokens"]
    assert all(0.95 * n < found <= n for n, found in zip(LENGTHS, tokens, strict=True))


def test_a_length_too_short_for_a_task_has_no_average(results: dict[str, Any]) -> None:
    ruler = results["copies"]["ruler"]
    assert ruler["tasks"]["cwe"]["score"][0] is None is not ruler["tasks"]["cwe"]["score"][1]
    assert [each["length"] for each in ruler["too_short"]] == [300]
    assert ruler["average"]["score"] == [None, pytest.approx(50, abs=5)]
    assert ruler["effective_length"] is None
    assert ruler["average"]["cases"] == [0, 2 * SAMPLES]


def test_tables_and_maps_show_all_of_it(results: dict[str, Any]) -> None:
    rows = [row for table in printed_tables(results["copies"]) for row in table.rows]
    assert ("300", "100% (61 to 100)", "6") in rows
    assert ("50%", "100%", "100%") in rows
    takes = results["copies"]["ruler"]["too_short"][0]["needed"]
    assert ("cwe", f"takes {takes}", "0%") in rows and ("less than 900",) in rows
    found = {section.name: section for section in sections(results)}
    assert [len(found[name].figures) for name in ("passkey", "needle", "ruler")] == [1, 2, 2]
    assert all(figure.svg.count("<rect") > 5 for each in found.values() for figure in each.figures)
    assert found["passkey"].tables[0].rows[0] == ("300", "100% (61 to 100)", "0% (0 to 39)")
    assert found["ruler"].tables[0].head == ("average", "tasks", "300", "900", "effective length")
    assert found["ruler"].tables[0].rows[0][:3] == ("copies", "2", "–")
    # An evaluation of other lengths beside it, and with other prompts.
    other = {"lengths": [900, 1200], "prompt": "chat"}
    shorter = {"passkey": {**results["guesses"]["passkey"], **other}}
    [section] = [s for s in sections({**results, "b": shorter}) if s.name == "passkey"]
    assert [row[0] for row in section.tables[0].rows] == ["300", "900", "1,200"]
    assert section.tables[0].rows[0][3] == "–" and section.tables[0].head[3] == "b (chat)"


def test_needles_are_hidden_in_held_out_text(models: Path) -> None:
    asked = ["evaluate.measure=[needle,ruler]", "evaluate.ruler_tasks=[niah_single_2]"]
    found = measured(models / "copies", *asked, f"data.path={models / 'tokens'}")
    assert found["needle"]["text"] == "the held-out text"
    assert found["needle"]["average"] == [1.0, 1.0]
    assert found["ruler"]["tasks"]["niah_single_2"]["score"] == [100.0, 100.0]
    assert found["ruler"]["effective_length"] == max(LENGTHS)
    assert found["ruler"]["left_out"] == []


def test_documents_are_joined_without_their_ends(models: Path) -> None:
    tokenizer = open_tokenizer(models / "tokens")
    text = held_out_essay(models / "tokens", tokenizer, 2000)
    assert text is not None
    words = "".join(text.words).split()
    assert len(words) > 1000 and "eos" not in "".join(words)
    short = held_out_essay(models / "tokens", tokenizer, 30, refused=["roof"])
    assert short is not None and "roof" not in "".join(short.words) and len(short.words) < 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluate.measure=[passkey]", "evaluate.lengths=[20,40]"],
            "evaluate.lengths = [20, 40]: with this tokenizer the shortest case of passkey takes",
        ),
        (
            ["evaluate.measure=[ruler]", "evaluate.ruler_tasks=[vt,niah_multivalue]"],
            "evaluate.ruler_tasks names 'niah_multivalue', which hides needles in held-out text",
        ),
        (
            ["evaluate.measure=[passkey]", "evaluate.prompt=chat"],
            "evaluate.prompt = 'chat': tokenizer",
        ),
        (
            ["evaluate.measure=[needle]", "evaluate.effective_score=101"],
            "evaluate.effective_score = 101.0: must be at most 100 percent",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["evaluate", str(models / "copies"), *ASKED, *words]) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert message in line


def test_left_out_tasks_are_named(models: Path) -> None:
    asked = ["evaluate.measure=[ruler]", "evaluate.samples=1", "evaluate.lengths=[300]"]
    found = measured(models / "copies", *asked)["ruler"]
    assert found["left_out"] == [name for name, task in RULER.items() if task.needs_text]
    assert {*found["tasks"]} == {*RULER} - {*found["left_out"]}
    rows = [row for table in printed_tables({"ruler": found}) for row in table.rows]
    assert ("niah_multivalue", "no text") in rows and ("not measured",) in rows


def test_more_cases_are_measured_beside_those_that_are_kept(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = list[int]()

    def counted(loaded: Any, cases: Any, *rest: Any) -> list[list[int]]:
        prompts.append(len(cases))
        return continuations(loaded, cases, *rest)

    monkeypatch.setattr(cells, "continuations", counted)
    monkeypatch.setattr(cells, "_TOKENS_OF_A_UNIT", 600)
    asked = ["evaluate.measure=[passkey]", "evaluate.lengths=[300]", "--output"]
    words = ["evaluate", str(models / "copies"), *asked, str(models / "more.json")]
    assert main([*words, "evaluate.samples=4"]) == 0 and prompts == [2, 2]
    assert main([*words, "evaluate.samples=6", "evaluate.depths=2"]) == 0 and prompts == [2, 2, 2]
    found = json.loads((models / "more.json").read_text())["measured"]["passkey"]
    assert found["cases"] == [6] and found["accuracy"] == [1.0]


def test_questions_are_turns_of_a_chat(models: Path) -> None:
    template = (
        "{% for m in messages %}roof {{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} house{% endif %}"
    )
    (models / "tokens" / "chat_template.jinja").write_text(template)
    asked = ["evaluate.measure=[passkey]", f"data.path={models / 'tokens'}"]
    found = measured(models / "copies", *asked, "evaluate.prompt=chat")["passkey"]
    plain = measured(models / "copies", *asked)["passkey"]
    assert found["accuracy"] == plain["accuracy"] == [1.0, 1.0]
    # Two tokens are the template's.
    assert found["lengths"] == plain["lengths"] and found["tokens"] != plain["tokens"]


def answers(rank: int, world_size: int, model: Path, *words: str) -> list[dict[str, Any]]:
    """Evaluate on a mesh; what each unit measured."""
    os.environ["WORLD_SIZE"] = str(world_size)
    file = model.parent / f"{model.name}-{'-'.join(words)}.jsonl"
    asked = ["evaluate.measure=[passkey,needle]", "evaluate.samples=3", "evaluate.depths=2"]
    asked += ["evaluate.lengths=[300,900]"]
    evaluate_checkpoint(model, [*asked, *words], kept=Kept(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return [{**line["measured"], "key": line["key"]} for line in lines]


@pytest.mark.parametrize("model", ["copies", "guesses"])
def test_answers_are_the_same_on_every_mesh(models: Path, model: str) -> None:
    [alone] = run_ranks(answers, 1, models / model)
    assert len(alone) == 6 and all(each["answers"] for each in alone)
    for words in (["parallel.cp_size=2"], ["parallel.cp_size=1"]):
        for found in run_ranks(answers, 2, models / model, *words):
            assert found == alone
