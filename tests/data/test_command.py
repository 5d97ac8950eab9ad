"""`lcdist tokenize`: options reach the settings, and the output lists what was left out."""

from pathlib import Path

import pytest

from lcdist.commands.main import main
from lcdist.data.meta import read_meta


def test_options_reach_the_settings_and_skipped_files_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"body": "one"}\n{broken\n{"body": "two"}\n')
    (tmp_path / "text" / "b.png").touch()
    options = ["tokenize", str(tmp_path / "text"), str(tmp_path / "out"), "--tokenizer", "bytes"]
    options += ["--field", "body", "--valid-fraction", "0", "--add-bos", "--workers", "1"]
    assert main(options) == 2
    assert "a.jsonl, line 2, byte 17: not JSON" in capsys.readouterr().err
    assert main([*options, "--on-error", "skip"]) == 0
    output = capsys.readouterr().out
    assert "10 tokens for train, vocabulary of 258" in output and "1 x suffix .png" in output
    assert "skipped 1 unreadable documents" in output and "a.jsonl, line 2: not JSON" in output
    meta = read_meta(tmp_path / "out")
    assert meta.settings["field"] == "body" and meta.settings["add_bos"] is True
