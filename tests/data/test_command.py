"""`lcdist tokenize` from words to a folder, and what it says was left out."""

from pathlib import Path

import pytest

from lcdist.commands.main import main
from lcdist.data.meta import read_meta


def test_words_reach_the_settings_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"body": "one"}\n{broken\n{"body": "two"}\n')
    (tmp_path / "text" / "b.png").touch()
    words = ["tokenize", str(tmp_path / "text"), str(tmp_path / "out"), "--tokenizer", "bytes"]
    words += ["--field", "body", "--valid-fraction", "0", "--add-bos", "--workers", "1"]
    assert main(words) == 2
    assert "a.jsonl, line 2, byte 17: not JSON" in capsys.readouterr().err
    assert main([*words, "--on-error", "skip"]) == 0
    said = capsys.readouterr().out
    assert "10 tokens for train, vocabulary of 258" in said and "1 .png" in said
    assert "skipped 1 unreadable documents" in said and "a.jsonl, line 2: not JSON" in said
    meta = read_meta(tmp_path / "out")
    assert meta.settings["field"] == "body" and meta.settings["add_bos"] is True
