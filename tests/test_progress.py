"""What commands show while they work, on terminals and in files."""

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.logging import RichHandler

from lcdist.commands.main import set_up_logging
from lcdist.data.tokenizers.byte_tokenizer import ByteTokenizer
from lcdist.inference.sampling import Sampling
from lcdist.inference.text_stream import TextStream
from lcdist.utils.progress import (
    BYTES,
    TOKENS,
    console_of_log,
    count_text,
    counter,
    progress_console,
    short_number,
    show_progress,
    silent,
)

CLOCK = "lcdist.utils.progress.time.monotonic"


def console(file: io.StringIO, terminal: bool) -> Console:
    return Console(file=file, force_terminal=terminal, width=80, soft_wrap=True, highlight=False)


def test_a_file_gets_a_line_of_a_long_stage_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = [100.0], io.StringIO()
    monkeypatch.setattr(CLOCK, lambda: now[0])
    with show_progress(TOKENS, console(file, False)) as progress:
        count = counter("perplexity", 40_000, progress)
        for _ in range(40):
            now[0] += 0.4
            count(1000)
        done = counter("reading", 1, progress)
        now[0] += 100
        done(1)
    assert file.getvalue().splitlines() == [
        "perplexity  62 %  25.0k of 40.0k tokens  2.5k tokens/s  0:06 left",
        "reading  100 %  1 of 1 token  0.01 tokens/s  0:00 left",
    ]
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    file = io.StringIO()
    with show_progress(BYTES, console(file, True)) as progress:
        counter("wri[ting]", 2_500_000, progress)(1_250_000)
        counter("comparing", 10, progress)(10)
    shown = file.getvalue()
    assert "\x1b" in shown and "comparing" in shown and "100 %  10 B of 10 B" in shown


def test_a_bar_and_messages_share_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message stands in a line of its own, above the bar."""
    file, root = io.StringIO(), logging.getLogger()
    handler = RichHandler(console=console(file, True), show_path=False, show_level=False)
    monkeypatch.setattr(root, "handlers", [handler])
    assert console_of_log(Console()) is handler.console
    with show_progress(TOKENS, progress_console()) as progress:
        progress("reading", 1, 10)
        logging.getLogger("lcdist").warning("a message")
        progress("reading", 10, 10)
    lines = file.getvalue().split("\n")
    (line,) = (line for line in lines if "a message" in line)
    assert "tokens" not in line.rpartition("\x1b[2K")[2]


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(TOKENS, progress_console(), is_shown=False, seconds=0) as progress:
        assert progress is silent
        progress("x", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_amounts_are_read_easily() -> None:
    numbers = (0.25, 1, 2.5, 99, 0.0, 123.4, 1234, 56_789, 1_234_567)
    shown = ["0.25", "1", "2.5", "99", "0", "123", "1.2k", "56.8k", "1.23M"]
    assert [short_number(number) for number in numbers] == shown
    assert [count_text(n, BYTES) for n in (0, 999, 1500, 2e6, 1.5e9, 2e12)] == [
        "0 B", "999 B", "1.5 kB", "2 MB", "1.5 GB", "2,000 GB",
    ]  # fmt: skip
    assert count_text(1, TOKENS) == "1 token" and count_text(2, TOKENS) == "2 tokens"


def test_messages_in_a_file_are_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, text = logging.getLogger(), "x" * 300
    monkeypatch.setattr(root, "handlers", [])
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        set_up_logging(True)
        logging.getLogger("lcdist.train").info(text)
    assert (tmp_path / "log").read_text()[8:] == f" {text}\n"


def test_text_is_streamed_in_whole_characters() -> None:
    tokenizer, pieces = ByteTokenizer(), list[str]()
    whole = "straße 中文 🎉 end"
    tokens = tokenizer.encode(whole)
    stream = TextStream(tokenizer, tokens[:6], pieces.append)
    for token in tokens[6:]:
        stream.add(token)
    # Bytes of no character come when they are seen to be none, at the latest at the end.
    for token in (0xE4, 0xB8):
        stream.add(token)
    assert "".join(pieces) == whole and all(pieces)
    stream.end()
    assert "".join(pieces) == tokenizer.decode([*tokens, 0xE4, 0xB8])
    assert len(pieces) > 10


def test_sampling_is_told() -> None:
    assert str(Sampling()) == "always the most likely token"
    assert str(Sampling(0.8, 3)) == "temperature 0.8, seed 3, from the whole vocabulary"
