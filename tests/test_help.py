"""`lcdist COMMAND --help` and shell completion."""

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from lcdist.commands.completion import SHELLS, config_keys
from lcdist.commands.main import COMMANDS, load_parsers, main
from lcdist.config.schema import Config


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parser and those of its subcommands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [each for sub in action.choices.values() for each in parsers(sub)]
    return found


def test_help_says_what_each_word_is_and_its_default() -> None:
    for parser in [each for top, _ in load_parsers() for each in parsers(top)]:
        # Lines are cut anywhere.
        shown = "".join(parser.format_help().split())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, (parser.prog, action.dest)
            default = action.default
            if action.option_strings and default not in (None, "", False, argparse.SUPPRESS):
                told = f"(default:{default})" in shown or "default:" in action.help
                assert told, (parser.prog, action.dest)


def test_keys_are_those_of_the_schema() -> None:
    keys = config_keys()
    assert len(keys) == len(set(keys)) > 100
    assert {"train.seqlen", "attention.chunk_size", "model.rope.factor", "model.from"} <= {*keys}
    assert {key.partition(".")[0] for key in keys} == set(Config.__dataclass_fields__)


def script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    file = tmp_path / f"lcdist.{shell}"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["lcdist", "ev"], ["evaluate"]),
        (["lcdist", "evaluate", "--bef"], ["--before"]),
        (["lcdist", "train", "train.seql"], ["train.seqlen="]),
        (["lcdist", "plan", "--hardware", "h200"], ["h200", "h200-nvl"]),
        (["lcdist", "convert", "imp"], ["import"]),
        (["lcdist", "convert", "import", "--extra"], ["--extra-tokens"]),
        (["lcdist", "status", "train.seql"], []),
        (["lcdist", "status", "./som"], ["./some-run"]),
    ],
)
def test_bash_completes(
    typed: list[str], found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = script("bash", tmp_path, capsys)
    (tmp_path / "some-run").mkdir()
    words = " ".join(typed)
    call = f"source {file}; COMP_WORDS=({words}) COMP_CWORD={len(typed) - 1}; _lcdist; "
    call += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", call], cwd=tmp_path, text=True, capture_output=True)
    assert (done.stdout.split(), done.stderr) == (found, "")


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@needs("fish")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("lcdist ev", "evaluate\tmeasure what a model does with long text"),
        ("lcdist exte", "extend\textend a model's context, from text to report"),
        ("lcdist train train.seql", "train.seqlen="),
        ("lcdist generate --top-k", "--top-k\tchoose from so many most likely tokens"),
        ("lcdist init h200-n", "h200-nvl"),
    ],
)
def test_fish_completes(
    typed: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = f"source {script('fish', tmp_path, capsys)}; complete -C '{typed}'"
    done = subprocess.run(["fish", "-N", "-c", call], text=True, capture_output=True, timeout=30)
    assert (done.stdout.strip()[: len(found)], done.stderr) == (found, "")


# What zsh offers is told by functions in place of its own, which need a terminal.
ZSH_STUBS = """compdef() { }; _files() { }; compadd() { print -l -- "$@" }
_describe() { print -l -- "${(@P)2}" }
"""


@needs("zsh")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("lcdist ex", "extend:extend a model's context, from text to report"),
        ("lcdist train x", "train.seqlen="),
        ("lcdist convert i", "import"),
        ("lcdist convert import x", "--extra-tokens"),
    ],
)
def test_zsh_completes(
    typed: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = script("zsh", tmp_path, capsys)
    words = f"words=({typed}); CURRENT=${{#words}}"
    call = f"{ZSH_STUBS}\nsource {file}; {words}; _lcdist"
    done = subprocess.run(["zsh", "-f", "-c", call], text=True, capture_output=True, timeout=30)
    assert done.stderr == "" and found in done.stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_have_every_command(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = script(shell, tmp_path, capsys)
    for command in COMMANDS:
        assert command.word in file.read_text()
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(file)], check=True, timeout=30)
