"""Conversations: rendered by a chat template, answers marked beside the tokens, and handed on."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lcdist.commands.main import main
from lcdist.config.schema import DataConfig, MixtureSource
from lcdist.data.datasets.aligned import AlignedDataset
from lcdist.data.datasets.build import build_dataset
from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.data.meta import read_meta
from lcdist.data.prepare.conversations import ChatTemplate
from lcdist.data.prepare.readers import RecordError
from lcdist.data.tokenizers.chat import ChatTokenizer, read_chat_template
from lcdist.data.tokenizers.huggingface import HuggingFaceTokenizer
from lcdist.evaluate.text import held_out_text
from lcdist.layout import ContextLayout
from lcdist.layout.documents import DocumentLayout
from tests.data.conversations import (
    END,
    MARKED,
    PLAIN,
    answered,
    chat_folder,
    conversations,
    tokenized,
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé?\n"},
    {"role": "assistant", "content": " answer one\n"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "😀 two"},
]
# Templates without marks; what their authors would mark.
TRIMMED = PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}\n")
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|end|>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
ANSWER = {
    PLAIN: "{{ m.content }}<|end|>",
    TRIMMED: "{{ m.content | trim }}\n<|end|>",
    LLAMA_2: " {{ m.content }}<|end|>",
}


def with_marks(template: str) -> str:
    """Return the template with marks around answers; those end before white space."""
    if template == MARKED:
        return template
    answer = ANSWER[template]
    marked = f"{{% generation %}}{answer}{{% endgeneration %}}"
    if template == LLAMA_2:
        return template.replace(answer, marked)
    # Jinja drops a line end behind a tag.
    chosen = f"{{% if m.role == 'assistant' %}}{marked}{{% else %}}{answer}{{% endif %}}"
    return template.replace(answer + "\n", chosen + "{{ '\\n' }}")


def encode(template: str, messages: Any, folder: Path) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which of them are answers."""
    chat = ChatTokenizer(HuggingFaceTokenizer(chat_folder(folder, template)))
    text, answers = ChatTemplate(template, chat.names, chat.specials).read({"messages": messages})
    return chat.encode(text, answers)


@pytest.mark.parametrize("template", [MARKED, *ANSWER])
def test_tokens_and_answers_are_those_of_transformers(template: str, tmp_path: Path) -> None:
    tokens, inside = encode(template, TALK, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|begin|>", eos_token="<|end|>"
    )
    words = {"return_dict": True, "return_assistant_tokens_mask": True}
    known = theirs.apply_chat_template(TALK, chat_template=with_marks(template), **words)
    assert tokens == theirs.apply_chat_template(TALK, chat_template=template)["input_ids"]
    assert tokens == known["input_ids"]
    assert [int(one) for one in inside] == known["assistant_masks"]
    assert 0 < sum(inside) < len(inside)


def test_what_ends_a_conversation(tmp_path: Path) -> None:
    # No token ends an answer: the one that is added does, and is learned.
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}\n{% endif %}"
    bare += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokens, inside = encode(bare, TALK[1:3], tmp_path / "bare")
    learned = len(TALK[2]["content"]) + 1
    assert tokens[-1] == END and inside == [False] * (len(tokens) - learned) + [True] * learned
    # Another token ends it: one more closes the document, and is not learned.
    other = MARKED.replace("<|end|>", "<|pad|>")
    tokens, inside = encode(other, TALK, tmp_path / "other")
    assert tokens[-1] == END and not inside[-1]
    # A user has the last word.
    tokens, inside = encode(bare, [*TALK[1:], TALK[1]], tmp_path / "user")
    assert tokens[-1] == END and not inside[-1]


@pytest.mark.parametrize(
    "template",
    [
        PLAIN + "{% if not add_generation_prompt %}<|pad|>{% endif %}",
        PLAIN.replace("{% if add_generation_prompt %}", "{% if 1 %}"),
    ],
    ids=["closed", "always with a prompt"],
)
@pytest.mark.parametrize("count", [3, 5])
def test_what_follows_a_turn_is_no_part_of_it(template: str, count: int) -> None:
    chat = ChatTemplate(template, {}, ["<|begin|>", "<|end|>", "<|pad|>"])
    text, answers = chat.read({"messages": TALK[:count]})
    wanted = [" answer one\n<|end|>", "😀 two<|end|>"]
    assert [text[start:stop] for start, stop in answers] == wanted[: count // 2]


def test_both_spellings_and_tools(tmp_path: Path) -> None:
    chat = ChatTemplate(PLAIN, {}, ["<|end|>"])
    spelled = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]
    plain = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]
    assert chat.read({"conversations": spelled}) == chat.read({"messages": plain})
    assert (
        ChatTemplate(PLAIN, {}, [], "talk").read({"talk": plain})[0]
        == chat.read({"messages": plain})[0]
    )
    # Where a conversation is closed, a token inside a call could pass for the end of the turn.
    with pytest.raises(RecordError, match="or does not end it"):
        ChatTemplate(
            PLAIN + "{% if not add_generation_prompt %}x{% endif %}", {}, ["<|end|>"]
        ).read({"messages": [plain[0], {**plain[1], "tool_calls": [1]}]})
    tools = ChatTemplate("{{ tools | tojson }}" + MARKED, {}, [])
    called = [plain[0], {"role": "assistant", "content": None, "tool_calls": [{"é": 1}]}]
    text, [(start, stop)] = tools.read({"messages": called, "tools": [{"é": 2}]})
    assert text.startswith('[{"é": 2}]') and text[start:stop] == "None<|end|>"


REFUSED = {
    "another key": ({"text": "a"}, 'no list of messages under "messages" or "conversations"; it'),
    "no messages": ({"messages": []}, "no list of messages"),
    "text": ({"messages": ["a"]}, "message 1: not an object with a role"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1: its role is not text"),
    "parts": ({"messages": [{"role": "user", "content": [1]}]}, "message 1: its content is not"),
    "who": ({"messages": [{"from": "me", "value": "a"}]}, "\"from\" is 'me'; it may be human, gpt"),
    "no answer": ({"messages": TALK[:2]}, "without a message of the assistant"),
    "a token": (
        {"messages": [{"role": "user", "content": "a<|end|>"}, TALK[2]]},
        "message 1: its content has the text of the token '<|end|>'",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_conversation_is_named(case: str) -> None:
    record, said = REFUSED[case]
    with pytest.raises(RecordError) as caught:
        ChatTemplate(PLAIN, {}, ["<|end|>"]).read(record)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # The last user message changes how earlier ones are written.
        ("{{ messages | length }}" + PLAIN, "message 3: the chat template renders what comes"),
        # It drops the beginning of an answer once a question follows.
        (PLAIN.replace("m.content }}", "m.content if loop.last else 'short' }}"), "in another way"),
        (BARE + "{% if not add_generation_prompt %} bye{% endif %}", "or does not end it"),
        (PLAIN.replace("{% if add_generation_prompt %}", "{% if 0 %}"), "writes more than the an"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it (roles must alternate)"),
        ("{{ strftime_now('%Y') }}" + PLAIN, "refuses it ('strftime_now' is undefined)"),
        ("{{ ''.__class__.__mro__ }}" + PLAIN, "refuses it (access to attribute '__class__'"),
        (MARKED.replace("assistant", "model"), "in which the chat template marks no answer"),
    ],
)
def test_templates_that_do_not_say_where_answers_are(template: str, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        ChatTemplate(template, {}, ["<|end|>"]).read({"messages": TALK})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_where_the_template_is_found(tmp_path: Path) -> None:
    chat_folder(tmp_path, "in a file")
    assert read_chat_template(tmp_path) == "in a file"
    assert read_chat_template(tmp_path / "tokenizer.json") == "in a file"
    (tmp_path / "chat_template.jinja").unlink()
    for stored in ("in the table", [{"name": "default", "template": "in the table"}]):
        config = {"eos_token": "<|end|>", "chat_template": stored}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert read_chat_template(tmp_path) == "in the table"
    (tmp_path / "mine").write_text("mine")
    assert read_chat_template(tmp_path, tmp_path / "mine") == "mine"


def lines(folder: Path, records: Sequence[Any]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with gzip.open(folder / "a.jsonl.gz", "wt") as packed:
        packed.write(text)
    (folder / "b.jsonl").write_text(text)
    return folder


def test_the_command_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, tokenizer = lines(tmp_path / "text", [{"messages": TALK}]), tmp_path / "model"
    chat_folder(tokenizer, PLAIN)

    def refused(*more: str, place: Path = source) -> str:
        words = ["tokenize", str(place), str(tmp_path / "out"), "--valid-fraction", "0", *more]
        assert main([*words, "--workers", "1"]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    own = ("--tokenizer", str(tokenizer))
    assert "conversations need --conversations" in refused(*own)
    assert "add --conversations" in refused(*own, "--chat-template", "x")
    assert "name a model's folder with --tokenizer" in refused("--conversations")
    bare = chat_folder(tmp_path / "bare", None)
    said = refused("--conversations", "--tokenizer", str(bare))
    assert "it has no chat template" in said and "--chat-template FILE" in said
    (tmp_path / "broken").write_text("a\n{% if %}")
    said = refused("--conversations", *own, "--chat-template", str(tmp_path / "broken"))
    assert "the chat template is not Jinja: line 2: " in said
    template = ("--chat-template", str(tokenizer / "chat_template.jinja"))
    said = refused("--conversations", "--tokenizer", "bytes", *template)
    assert "a bytes tokenizer has no tokens for turns" in said
    assert "--add-bos: the chat template says" in refused("--conversations", *own, "--add-bos")
    lines(tmp_path / "bad", [{"messages": TALK}, {"text": "a"}])
    said = refused("--conversations", *own, place=tmp_path / "bad")
    assert "a.jsonl.gz, line 2, byte" in said and 'no list of messages under "messages"' in said
    (tmp_path / "a.txt").write_text("text")
    said = refused("--conversations", *own, place=tmp_path / "a.txt")
    assert "a.txt: --conversations reads .jsonl, .jsonl.gz, .jsonl.zst" in said


def test_a_folder_of_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines(tmp_path / "text", [{"messages": talk} for talk in conversations(20)])
    folders = []
    for workers in (1, 2):
        folder = tmp_path / f"out{workers}"
        tokenized(source, folder, chat_folder(tmp_path / "model", MARKED), workers=workers)
        folders.append(folder)
    assert "tokens of answers: " in capsys.readouterr().out
    one, two = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert one == two and one["chat_template.jinja"] == MARKED.encode()
    meta = read_meta(folders[0])
    assert meta.targets is not None and meta.sha256 is not None
    assert {"train.targets", "valid.targets"} <= {*meta.files} & {*meta.sha256}
    for split in ("train", "valid"):
        opened = TokenSplit(folders[0], split)
        assert opened.targets is not None
        stored = torch.from_numpy(opened.targets.astype(bool))
        assert torch.equal(stored, answered(opened.window(0, opened.num_tokens)))
        assert meta.targets[split] == int(stored.sum())
    # The same again is nothing to do; another template makes other tokens.
    tokenized(source, folders[0], tmp_path / "model")
    assert "already complete" in capsys.readouterr().out
    chat_folder(tmp_path / "model", PLAIN)
    words = ["--conversations", "--tokenizer", str(tmp_path / "model"), "--workers", "1"]
    assert main(["tokenize", str(source), str(folders[0]), *words]) == 2
    # Damage is seen at rest, when the folder is opened, and where a byte is read.
    mask = folders[1] / "train.targets"
    mask.write_bytes(b"\x02" + mask.read_bytes()[1:])
    assert main(["check", str(folders[1])]) == 2
    assert "file train.targets has sha256" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train.targets: byte 0 is 2, and may be 0 or 1"):
        data = TokenDataset(folders[1], "train", 64, seed=0)
        _ = [data.sample(i) for i in range(int(data.samples_per_round) + 1)]
    mask.write_bytes(mask.read_bytes()[1:])
    with pytest.raises(ValueError, match="train.targets: has"):
        TokenSplit(folders[1], "train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of conversations in which answers are lower case."""
    place = tmp_path_factory.mktemp("conversations")
    source = lines(place / "text", [{"messages": talk} for talk in conversations(30)])
    return tokenized(source, place / "tokens", chat_folder(place / "model", MARKED))


MARK = 300
LANDMARKS = DocumentLayout(multiple=4, block_size=4, landmark=MARK)


@pytest.mark.parametrize("documents", ["join", "pack", "best_fit"])
@pytest.mark.parametrize("slots", [DocumentLayout(), LANDMARKS])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_labels_that_count_are_answers(
    folder: Path, documents: str, slots: DocumentLayout, cp_size: int
) -> None:
    seqlen = 48
    layout = ContextLayout("zigzag", seqlen, cp_size)
    joined = documents == "join"
    kind = PackedDataset if documents == "best_fit" else TokenDataset
    inner = slots if not joined else None
    data: Any = kind(folder, "train", slots.num_text_slots(seqlen) if joined else seqlen, 3, inner)
    if joined and not slots.plain:
        data = AlignedDataset(data, slots, seqlen)
    pack: Any = "join" if joined else "pack"
    specs = [LoaderSpec(layout, 0, 1, r, 2, 2, pack, slots) for r in range(cp_size)]
    loaders = [Loader(data, spec) for spec in specs]
    counted = 0
    for _ in range(8):
        shards = [loader.next_step()[0] for loader in loaders]
        names = ("tokens", "labels", "loss_mask")
        tokens, labels, mask = (
            layout.unshard([getattr(shard, name) for shard in shards], 1) for name in names
        )
        for row in range(2):
            # The token before each label, where a landmark may stand between the two.
            known = tokens[row][tokens[row] != MARK]
            wanted = answered(torch.cat([known, labels[row, -1:]]))[1:]
            at = (tokens[row] != MARK).nonzero().flatten()
            found = mask[row, at].bool()
            assert not (found & ~wanted).any() and not mask[row, tokens[row] == MARK].any()
            missed = wanted & ~found
            # At the end of a document no label counts; padding repeats the token 0.
            assert not missed.any() or not joined
            counted += int(found.sum())
    assert counted > 100


def test_answers_alone_are_evaluated(folder: Path) -> None:
    split = TokenSplit(folder, "valid")
    longest = int(split.document_lengths.max())
    for length in (longest // 3, longest + 1):
        text = held_out_text(split, length, 2 * length)
        assert text.joined == (length > longest)
        assert torch.equal(~text.unscored, answered(text.tokens))
        everything = held_out_text(split, length, 2 * length, answers_only=False)
        assert int((~everything.unscored).sum()) > int((~text.unscored).sum())
    starts = [int(start) for start in split.document_starts]
    assert len(starts) > 1
    with pytest.raises(ValueError, match="none of the valid split's first 1 tokens is part of an"):
        held_out_text(split, 1, 1)


def test_all_targets_and_mixtures(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("plain text " * 200)
    plain = tmp_path / "plain"
    words = ["--tokenizer", str(folder), "--valid-fraction", "0", "--workers", "1"]
    assert main(["tokenize", str(tmp_path / "text"), str(plain), *words]) == 0
    sources = {"talk": MixtureSource(path=str(folder)), "text": MixtureSource(path=str(plain))}
    mixed = build_dataset(DataConfig(mixture=sources), 32, 0, DocumentLayout())
    kinds = [mixed.sample(i).is_target for i in range(20)]
    assert {None} < {None if kind is None else "answers" for kind in kinds}
    everything = DataConfig(mixture=sources, targets="all")
    assert all(
        build_dataset(everything, 32, 0, DocumentLayout()).sample(i).is_target is None
        for i in range(20)
    )
