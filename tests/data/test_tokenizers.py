"""Hugging Face and byte tokenizers: tokens at the ends of documents, and token folders."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lcdist.data.datasets.split import TokenSplit
from lcdist.data.meta import Meta, check_vocabulary
from lcdist.data.prepare.corpus import Source
from lcdist.data.prepare.prepare import Prepared, prepare
from lcdist.data.tokenizers.byte_tokenizer import ByteTokenizer
from lcdist.data.tokenizers.files import bos_prefix, open_tokenizer
from lcdist.data.tokenizers.huggingface import HuggingFaceTokenizer, SpecialTokens
from lcdist.data.tokenizers.sentencepiece_bpe import SentencePieceTokenizer
from tests.data.test_prepare import change

TEXT = "alpha <|end|> beta é\n\t= 3"


def make(folder: Path, template: bool = False, **config: object) -> Path:
    """Write a byte-level tokenizer.json with 256 bytes and three special tokens.

    template: whether its template adds bos. config: contents of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|begin|>", "<|end|>", "<|pad|>")]
    )
    if template:
        model.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 256)]
        )
    # Truncation and padding in the file must have no effect.
    model.enable_truncation(5)
    model.enable_padding(length=64, pad_id=258, pad_token="<|pad|>")
    model.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_special_tokens_are_read_from_files_beside_it(tmp_path: Path) -> None:
    plain = make(tmp_path / "a", eos_token="<|end|>")
    opened = HuggingFaceTokenizer(plain)
    assert (opened.eos_id, opened.bos_id, opened.vocab_size) == (257, None, 259)
    assert not opened.add_bos and bos_prefix(opened) == []
    table = make(tmp_path / "b", True, eos_token={"content": "<|end|>"}, bos_token="<|begin|>")
    opened = HuggingFaceTokenizer(table)
    # Its template adds bos, so documents begin with bos unless add_bos says otherwise.
    assert (opened.eos_id, opened.bos_id, bos_prefix(opened)) == (257, 256, [256])
    assert not HuggingFaceTokenizer(table, SpecialTokens(add_bos=False)).add_bos
    (tmp_path / "b" / "tokenizer_config.json").unlink()
    names = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|pad|>"}
    (tmp_path / "b" / "special_tokens_map.json").write_text(json.dumps(names))
    assert HuggingFaceTokenizer(table).eos_id == 258
    requested = HuggingFaceTokenizer(
        table, SpecialTokens(eos="<|end|>", bos="<|pad|>", add_bos=True)
    )
    assert (requested.eos_id, bos_prefix(requested)) == (257, [258])
    assert requested.fingerprint != HuggingFaceTokenizer(table).fingerprint


def test_decoding_returns_the_text_and_text_makes_no_special_token(tmp_path: Path) -> None:
    opened = HuggingFaceTokenizer(make(tmp_path, True, eos_token="<|end|>", bos_token="<|begin|>"))
    tokens = opened.encode(TEXT)
    assert len(tokens) == len(TEXT.encode()) and max(tokens) < 256
    assert opened.decode(tokens) == TEXT == opened.decode([256, *tokens, 257])
    with pytest.raises(ValueError, match=r"token 259: .*0\.\.258"):
        opened.decode([259])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        opened.encode("a\ud800")


def test_a_tokenizer_without_eos_raises(tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=r"which token ends a text.*--eos-token.*<\|begin\|>"):
        HuggingFaceTokenizer(path)
    with pytest.raises(ValueError, match=r"eos token '</s>' is not in its vocabulary"):
        HuggingFaceTokenizer(path, SpecialTokens(eos="</s>"))
    with pytest.raises(ValueError, match="which token begins a text.*--bos-token"):
        HuggingFaceTokenizer(path, SpecialTokens(eos="<|end|>", add_bos=True))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json:1: not JSON"):
        HuggingFaceTokenizer(path)
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(ValueError, match=r"junk\.json: not a tokenizer\.json"):
        HuggingFaceTokenizer(tmp_path / "junk.json")
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        open_tokenizer(tmp_path / "nowhere.json")


def test_byte_tokens_are_bytes() -> None:
    opened = ByteTokenizer()
    tokens = opened.encode(TEXT)
    assert tokens == list(TEXT.encode()) and opened.decode([257, *tokens, 256]) == TEXT
    assert opened.decode([0xC3]) == "\ufffd" and opened.vocab_size == 258
    with pytest.raises(ValueError, match=r"token 258: .*0\.\.257"):
        opened.decode([258])


@pytest.mark.parametrize(
    ("kind", "workers"), [("huggingface", 2), ("bytes", 1), ("bytes", 2), ("sentencepiece", 1)]
)
def test_a_token_folder_opens_as_its_own_tokenizer(
    kind: str, workers: int, corpus: Path, prepared: Prepared, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("lcdist.data.prepare.shards.SHARD_BYTES", 4000)
    made_with = {
        "huggingface": make(tmp_path / "hf", True, bos_token="<|begin|>", eos_token="<|end|>"),
        "bytes": "bytes",
        "sentencepiece": prepared.folder / "tokenizer.model",
    }[kind]
    # Only bytes need add_bos: the Hugging Face tokenizer has it from its template.
    specials = SpecialTokens(add_bos=True if kind == "bytes" else None)
    settings = change(vocab_size=None, workers=workers, special_tokens=specials)
    made = prepare(Source(corpus), tmp_path / "out", settings, made_with)
    opened = open_tokenizer(made.folder)
    assert opened.kind == made.meta.kind == kind
    assert opened.fingerprint == made.meta.fingerprint and opened.eos_id == made.meta.eos_id
    assert opened.add_bos == (kind != "sentencepiece")
    split = TokenSplit(made.folder, "train")
    first = split.document(0).tolist()
    assert first[-1] == opened.eos_id
    assert first[: len(bos_prefix(opened))] == bos_prefix(opened)
    texts = {path.read_bytes().decode() for path in corpus.rglob("*.txt")}
    for number in range(3):
        body = split.document(number).tolist()[len(bos_prefix(opened)) : -1]
        assert opened.decode(body) in texts and opened.encode(opened.decode(body)) == body


def test_options_that_do_not_apply_raise(corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    model = prepared.folder / "tokenizer.model"
    for path in ("bytes", model):
        with pytest.raises(ValueError, match="--eos-token apply to a tokenizer.json only"):
            open_tokenizer(path, SpecialTokens(eos="x"))
    with pytest.raises(ValueError, match="has no piece that begins a text"):
        open_tokenizer(model, SpecialTokens(add_bos=True))
    with pytest.raises(ValueError, match="need a given tokenizer"):
        prepare(
            Source(corpus), tmp_path / "out", change(special_tokens=SpecialTokens(add_bos=True))
        )
    with pytest.raises(ValueError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        open_tokenizer(corpus)
    assert isinstance(open_tokenizer(prepared.folder), SentencePieceTokenizer)


def test_published_models_may_have_a_larger_vocabulary() -> None:
    def meta(kind: str) -> Meta:
        return Meta(1, "", 300, 0, "", {}, {}, {}, {}, 0, [], {}, kind)

    check_vocabulary(meta("huggingface"), 320)
    for kind, vocab_size, reserved in (
        ("huggingface", 299, 0),
        ("huggingface", 300, 1),
        ("bytes", 320, 0),
        ("sentencepiece", 320, 0),
    ):
        with pytest.raises(ValueError, match=f"set model.vocab_size = {300 + reserved}"):
            check_vocabulary(meta(kind), vocab_size, reserved)
    with pytest.raises(ValueError, match="one more token; .* = 301, .* with --extra-tokens 1$"):
        check_vocabulary(meta("sentencepiece"), 300, reserved=True)
