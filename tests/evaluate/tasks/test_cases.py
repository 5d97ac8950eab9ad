"""Cases of all tasks: as RULER's released program makes them, full, alike on every machine."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcdist.data.tokenizers.byte_tokenizer import ByteTokenizer
from lcdist.data.tokenizers.files import TextTokenizer, open_tokenizer
from lcdist.data.tokenizers.sentencepiece_bpe import train_tokenizer
from lcdist.evaluate.tasks import niah
from lcdist.evaluate.tasks.case import Case, Question, Room, TooShortError, fullest
from lcdist.evaluate.tasks.cells import lengths_that_fit
from lcdist.evaluate.tasks.counting import counts_by_rank, zeta
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.formats import PlainFormat, open_format
from lcdist.evaluate.tasks.haystack import Essay, essay, inserted
from lcdist.evaluate.tasks.needle import depths, needle_case
from lcdist.evaluate.tasks.passkey import passkey_case
from lcdist.evaluate.tasks.ruler import RULER, RulerTask
from lcdist.evaluate.tasks.words import KEYS, NOUNS, PAIRS, PLAIN, key_name, pair
from tests.data.conversations import PLAIN as TEMPLATE
from tests.data.conversations import chat_folder
from tests.evaluate.tasks.facts import facts_of, words_and_lines

RELEASED = json.loads(Path(__file__).with_name("released.json").read_text())["prompts"]
TEXT = essay(
    " ".join(f"This is sentence number {n}, and is it not long enough? Yes." for n in range(900))
)


class WordsAndLines:
    """The format of the released prompts' stand-in tokenizer; keeps what it was asked last."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def tokens(self, question: Question) -> list[int]:
        self.asked.append(question)
        return [0] * len(words_and_lines(question.text + question.prefix))

    def question(self, case: Case) -> Question:
        """Return the question that the prompt of a case was made of."""
        return next(q for q in reversed(self.asked) if len(self.tokens(q)) == len(case.prompt))


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", list(RULER))
def test_prompts_equal_the_released_ones_but_for_what_is_drawn(name: str, length: int) -> None:
    released = dict(RELEASED[name][str(length)])
    rain = essay("Rain. " * 5000)
    for number in range(3):
        asked = WordsAndLines()
        case = RULER[name].case(asked, length, 7, number, rain)
        question = asked.question(case)
        ours = facts_of(question.text, question.prefix, question.references)
        ours["length"] = case.length
        if name == "fwe":
            check_zipf(released.pop("coded words", None), ours.pop("coded words"))
            # The released program takes away a 32nd where it has too much.
            assert released.pop("length", 0) <= ours.pop("length") <= length
        assert ours == released


def check_zipf(released: list[int] | None, ours: list[int]) -> None:
    """Check that both lists count words of the same distribution."""
    for counts in (ours, *([] if released is None else [released])):
        sizes = range(sum(counts), 2 * sum(counts))
        assert any(counts_by_rank(size, len(counts), 2.0) == counts for size in sizes)


def test_cases_do_not_depend_on_machine_and_version() -> None:
    asked = WordsAndLines()
    drawn = hashlib.sha256()
    for name, task in RULER.items():
        question = asked.question(task.case(asked, 1024, 5, 2, TEXT))
        drawn.update(f"{name} {question}".encode())
    passkey_case(asked, 512, 5, 2)
    needle_case(asked, 512, 0.5, 5, 2, TEXT)
    drawn.update(repr(asked.asked[-8:]).encode())
    assert drawn.hexdigest()[:16] == "8f4e8f7ee604208b"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Return a sentencepiece tokenizer of a few hundred pieces."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    draw = Draws("text")
    texts = [" ".join(draw.choice(PLAIN) for _ in range(200)) + ". 123." for _ in range(40)]
    file.write_bytes(train_tokenizer(iter(texts), 600))
    return open_tokenizer(file)


def bytes_with_bos() -> TextTokenizer:
    return ByteTokenizer(add_bos=True)


Make = Callable[[PlainFormat, int, int, int], Case]


def on_text(task: RulerTask) -> Make:
    return lambda form, length, seed, number: task.case(form, length, seed, number, TEXT)


MAKES: dict[str, Make] = {
    "passkey": passkey_case,
    "needle": lambda form, length, seed, n: needle_case(form, length, 0.3, seed, n, TEXT),
    "needle without text": lambda form, length, seed, n: needle_case(form, length, 0.3, seed, n),
    **{name: on_text(task) for name, task in RULER.items()},
}
# Tokens of the largest unit of a haystack, with bytes: what may stay empty.
UNITS = {"cwe": 90, "vt": 93, "niah_multikey_3": 120, "needle without text": 93, "passkey": 25}


@pytest.mark.parametrize("name", list(MAKES))
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_cases_fill_the_length_and_no_more(name: str, kind: str, trained: TextTokenizer) -> None:
    tokenizer = bytes_with_bos() if kind == "bytes" else trained
    form = PlainFormat(tokenizer)
    for length in (7000, 9001):
        case = MAKES[name](form, length, 3, 0)
        assert length - UNITS.get(name, 93) <= case.length <= length
        again, other = MAKES[name](form, length, 3, 0), MAKES[name](form, length, 3, 1)
        assert again == case and other.prompt != case.prompt
        assert MAKES[name](form, length, 4, 0).prompt != case.prompt
        text = tokenizer.decode(list(case.prompt))
        asked = name in ("vt", "cwe", "fwe") or any(r in text for r in case.references)
        assert asked and len(set(case.references)) == len(case.references)
        assert (case.prompt[0] == tokenizer.bos_id) == tokenizer.add_bos


def test_what_does_not_fit_is_said_with_what_it_takes() -> None:
    form = PlainFormat(ByteTokenizer())
    for make in MAKES.values():
        with pytest.raises(TooShortError) as caught:
            make(form, 150, 0, 0)
        # Another length draws other words.
        assert make(form, caught.value.needed + 99, 0, 0).length > caught.value.needed - 99


def test_the_needle_stands_where_it_is_asked_for() -> None:
    form = PlainFormat(ByteTokenizer())
    for text in (TEXT, None, essay("x = f(y) " * 500)):
        for depth in depths(5):
            case = needle_case(form, 8000, depth, 1, 0, text)
            assert case.depth == pytest.approx(depth, abs=0.02)
            prompt = bytes(case.prompt).decode()
            before, after = prompt.split(f" is: {case.references[0]}.")
            begin, end = prompt.index("\n"), prompt.rindex("\n")
            place = (before.rindex("One of the") - begin) / (end - begin)
            assert place == pytest.approx(depth, abs=0.03) and after
    assert depths(1) == [0.5] and depths(3) == [0, 0.5, 1]


def test_passkeys_have_five_digits_at_any_depth() -> None:
    form = PlainFormat(ByteTokenizer())
    cases = [passkey_case(form, 2000, 0, n) for n in range(60)]
    found = sorted(case.depth or 0 for case in cases)
    assert found[0] < 0.1 and found[-1] > 0.9 and 0.35 < sum(found) / 60 < 0.65
    assert all(len(case.references[0]) == 5 and case.references[0].isdigit() for case in cases)
    assert all(bytes(c.prompt).decode().count(c.references[0]) == 2 for c in cases)
    assert all(bytes(c.prompt).endswith(b"What is the pass key? The pass key is") for c in cases)


def test_only_one_needle_has_the_key_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few keys that others are drawn twice.
    monkeypatch.setattr(niah, "KEYS", 30)
    form = PlainFormat(ByteTokenizer())
    for number in range(3):
        case = RULER["niah_multikey_2"].case(form, 20000, 0, number, None)
        prompt = bytes(case.prompt).decode()
        key = prompt.split("What is the special magic number for ")[1].split(" ")[0]
        assert prompt.count(f"for {key} is: ") == 1


def test_variables_are_those_of_the_chain() -> None:
    case = RULER["vt"].case(PlainFormat(ByteTokenizer()), 6000, 0, 0, None)
    question = bytes(case.prompt).decode().rpartition("Memorize and track")[2]
    assigned = [line.strip() for line in question.splitlines() if line.startswith("VAR ")]
    names = [line.split(" ")[1] for line in assigned]
    value = question.split("assigned the value ")[1].split(" ")[0]
    chain = [f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:], strict=False)]
    assert assigned == [f"VAR {names[0]} = {value}", *chain] and tuple(names) == case.references


def test_the_most_frequent_words_are_the_answer() -> None:
    form = PlainFormat(ByteTokenizer())
    # The shortest lists, in which ranks occur equally often, and a long one.
    for length in (*range(540, 760, 5), 5000):
        case = RULER["fwe"].case(form, length, 0, 0, None)
        text = bytes(case.prompt).decode().partition("coded words. ")[2].partition("\n")[0]
        (_, _), *ranked = Counter(text.split(" ")).most_common(5)
        assert tuple(word for word, _ in ranked[:3]) == case.references
        assert len(ranked) == 3 or ranked[2][1] > ranked[3][1]


def test_a_list_longer_than_the_words_there_are_is_of_pairs() -> None:
    form = PlainFormat(ByteTokenizer())
    case = RULER["cwe"].case(form, 120_000, 0, 0, None)
    counts = Counter(bytes(case.prompt).decode().rpartition("Below is")[2].split())
    assert {counts[word] for word in case.references} == {30}
    assert all(first in NOUNS for word in case.references for first in word.split("-"))


def test_text_without_sentences_and_text_without_spaces_hide_needles_too() -> None:
    form = PlainFormat(ByteTokenizer())
    for text in ("x = f(y) " * 500, "長" * 4000, "one."):
        for name in ("niah_multivalue", "niah_single_3"):
            case = RULER[name].case(form, 4000, 0, 0, essay(text))
            prompt = bytes(case.prompt).decode()
            assert 3800 < case.length <= 4000
            assert all(prompt.count(reference) == 1 for reference in case.references)


def test_a_haystack_begins_again_where_it_ends_and_leaves_out_what_is_refused() -> None:
    words = essay("A b.  C\n<end> d? e", refused=["<end>"])
    assert words == Essay(("A ", "b. ", "C ", "d? ", "e "))
    assert words.sentences(3, 6, 1) == ["d?", "e A b.", "C d?"]
    assert words.sentences(0, 2, 2) == ["A", "b."]
    assert inserted(["a.", "b."], ["N.", "M."], [0, 2]) == "N. a. b. M."
    with pytest.raises(ValueError, match="no word"):
        essay(" \n")


def test_draws_are_fair_and_their_own() -> None:
    draws = Draws(1, "a")
    counts = Counter(draws.below(3) for _ in range(9000))
    assert set(counts) == {0, 1, 2} and max(counts.values()) < 3200
    assert sorted(Draws(2).sample(50, 50)) == list(range(50))
    pairs = Counter(tuple(Draws("pair", n).sample(3, 2)) for n in range(3000))
    assert len(pairs) == 6 and max(pairs.values()) < 600
    orders = Counter()
    for n in range(3000):
        values = [0, 1, 2]
        Draws("order", n).shuffle(values)
        orders[tuple(values)] += 1
    assert len(orders) == 6 and max(orders.values()) < 600
    # A number is not its text, and a part is no other key.
    assert len({Draws(*key).below(2**60) for key in ((1, "1"), ("1", 1), (11,), ("11",))}) == 4


def test_words_are_different() -> None:
    assert len(set(PLAIN)) == len(PLAIN) > 1400
    assert len({key_name(n) for n in range(KEYS)}) == KEYS
    assert len({pair(n) for n in range(PAIRS)}) == PAIRS


def test_zeta() -> None:
    assert zeta(2.0) == pytest.approx(1.6449340668482264, abs=1e-12)
    assert zeta(3.0) == pytest.approx(1.2020569031595942, abs=1e-12)
    assert zeta(1.5) == pytest.approx(2.6123753486854883, abs=1e-10)


def test_the_fullest_haystack_is_found_where_units_differ() -> None:
    def build(size: int) -> Question:
        return Question("x" * (7 * size + size // 3 * 11), "", ())

    class Characters:
        def tokens(self, question: Question) -> list[int]:
            return [0] * len(question.text)

    for room in range(0, 900, 13):
        size, question, case = fullest(build, Characters(), Room(room, 0), least=0)
        assert len(question.text) == len(case.prompt) <= room
        assert len(build(size + 2).text) > room
    assert fullest(build, Characters(), Room(900, 0), least=1, most=5)[0] == 5


def test_a_chat_prompt_is_a_turn_and_the_beginning_of_an_answer(tmp_path: Path) -> None:
    chat_folder(tmp_path, TEMPLATE)
    tokenizer = open_tokenizer(tmp_path)
    form = open_format(tokenizer, "chat", [tmp_path / "nowhere", tmp_path])
    question = Question("What?", " The", ("x",))
    expected = "<|begin|>user\nWhat?<|end|>\n<|begin|>assistant\n The"
    begin, end = 256, 257
    tokens = form.tokens(question)
    assert [t for t in tokens if t > 255] == [begin, end, begin] and tokens[0] == begin
    assert form.decode(tokens) == expected.replace("<|begin|>", "").replace("<|end|>", "")
    assert set(form.stops) == {end}
    assert form.decode([*tokenizer.encode("ok"), 10**6]) == "ok"
    plain = open_format(tokenizer, "text", [tmp_path])
    assert plain.tokens(question) == tokenizer.encode("What? The")


@pytest.mark.parametrize("kind", ["bytes", "no template", "not a template"])
def test_a_chat_prompt_needs_a_template(tmp_path: Path, kind: str) -> None:
    chat_folder(tmp_path, {"not a template": "{% for %}"}.get(kind))
    tokenizer: Any = ByteTokenizer() if kind == "bytes" else open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="evaluate.prompt = 'chat': .*evaluate.prompt = 'text'"):
        open_format(tokenizer, "chat", [tmp_path / "nowhere", tmp_path])


@pytest.mark.parametrize("name", list(RULER))
def test_where_a_length_fits_all_its_cases_do(name: str) -> None:
    form = PlainFormat(ByteTokenizer())

    def cases(length: int) -> Callable[[int], Case]:
        return lambda number: RULER[name].case(form, length, 3, number, TEXT)

    with pytest.raises(TooShortError) as caught:
        cases(1)(0)
    shortest = caught.value.needed
    # Around what the first case takes, others take more.
    asked = [*range(shortest - 4, shortest + 60, 4), *range(5900, 6200, 20), 8192]
    fit, too_short = lengths_that_fit(asked, 25, cases)
    assert fit and too_short and sorted([*fit, *(e["length"] for e in too_short)]) == asked
    for length in fit:
        for number in range(25):
            assert cases(length)(number).length <= length
