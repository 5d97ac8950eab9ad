"""`lcdist completion`: print a script that completes commands, options and configuration keys.

    source <(lcdist completion bash)

All words are in the script, so that no Python runs when Tab is pressed.
"""

import argparse
import dataclasses
import shlex
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from lcdist.config import rope
from lcdist.config.methods import OPTIONS
from lcdist.config.schema import Config

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Words:
    """List the words that can follow a command.

    Attributes:
        command: Words of the command, such as "convert import".
        help: What it does.
        options: With their help.
        choices: Legal values of arguments, all in one list.
        has_overrides: Whether `section.key=value` may follow.
    """

    command: str
    help: str
    options: dict[str, str]
    choices: list[str]
    has_overrides: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    parsers = arguments.load_parsers()
    found = [words for parser, text in parsers for words in words_of(parser, parser.prog, text)]
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](found), end="")
    return 0


def words_of(parser: argparse.ArgumentParser, command: str, text: str) -> list[Words]:
    """Return what can follow a command, and each of its subcommands.

    Args:
        parser: Of the command.
        command: Its words.
        text: Its help.
    """
    options, choices, more = dict[str, str](), list[str](), list[Words]()
    names = {action.dest for action in parser._actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {each.dest: each.help or "" for each in action._choices_actions}
            choices += action.choices
            for name, sub in action.choices.items():
                more += words_of(sub, f"{command} {name}", helps.get(name, ""))
            continue
        # Options that take one of several words have them in the same list.
        choices += [str(choice) for choice in action.choices or ()]
        options |= {name: action.help or "" for name in action.option_strings if "--" in name}
    return [Words(command, text, options, choices, "overrides" in names), *more]


def config_keys() -> list[str]:
    """Return every `section.key` of a configuration, those of all methods and rotations too."""
    keys = []
    for section, hint in typing.get_type_hints(Config).items():
        keys += [f"{section}.{name}" for name in _names(hint)]
    for options in OPTIONS.values():
        keys += [f"attention.{name}" for name in _names(options)]
    for kind in typing.get_args(rope.Rope):
        keys += [f"model.rope.{name}" for name in _names(kind)]
    extra = ["model.from", "model.rope.extend"]
    return [*dict.fromkeys(key for key in [*keys, *extra] if key != "model.rope")]


def _names(table: type) -> list[str]:
    return [f.name for f in dataclasses.fields(table) if not f.metadata.get("flattened")]


def _lines(found: Sequence[Words]) -> dict[str, list[str]]:
    return {words.command: [*words.choices, *words.options] for words in found}


def _with_overrides(found: Sequence[Words]) -> str:
    return "|".join(f'"{words.command}"' for words in found if words.has_overrides)


def bash(found: Sequence[Words]) -> str:
    """Return the script for bash."""
    cases = "".join(
        f'    "{command}") words="{" ".join(follow)}";;\n'
        for command, follow in _lines(found).items()
    )
    commands = " ".join(words.command for words in found if " " not in words.command)
    keys = " ".join(f"{key}=" for key in config_keys())
    return f"""# Completion of lcdist for bash.
_lcdist() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} words=
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$current"))
    return
  fi
  if [[ $command == convert ]] && ((COMP_CWORD > 2)); then command+=" ${{COMP_WORDS[2]}}"; fi
  case $command in
{cases}  esac
  case $command in
    {_with_overrides(found)}) words+=" {keys}";;
  esac
  COMPREPLY=($(compgen -W "$words --help" -- "$current"))
  if [[ ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
  if [[ $current != -* ]]; then COMPREPLY+=($(compgen -f -- "$current")); fi
}}
complete -o filenames -F _lcdist lcdist
"""


def zsh(found: Sequence[Words]) -> str:
    """Return the script for zsh."""
    cases = "".join(
        f'    "{command}") follow=({" ".join(follow)});;\n'
        for command, follow in _lines(found).items()
    )
    commands = " ".join(_described(w.command, w.help, ":") for w in found if " " not in w.command)
    keys = " ".join(f"{key}=" for key in config_keys())
    return f"""#compdef lcdist
# Completion of lcdist for zsh.
_lcdist() {{
  local -a commands follow keys
  local command=$words[2]
  commands=({commands})
  if ((CURRENT == 2)); then
    _describe command commands
    return
  fi
  if [[ $command == convert ]] && ((CURRENT > 3)); then command+=" $words[3]"; fi
  case $command in
{cases}  esac
  case $command in
    {_with_overrides(found)}) keys=({keys});;
  esac
  compadd -- $follow --help
  compadd -S '' -- $keys
  _files
}}
compdef _lcdist lcdist
"""


def _described(word: str, text: str, mark: str) -> str:
    """Return a word and its description, quoted for zsh."""
    return shlex.quote(f"{word}{mark}{text.replace(mark, '')}")


def _quoted_for_fish(text: str) -> str:
    """Return a text in quotes, inside which fish reads backslashes before quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def fish(found: Sequence[Words]) -> str:
    """Return the script for fish."""
    lines = ["# Completion of lcdist for fish."]
    begin = "complete -c lcdist"
    for words in found:
        command, *sub = words.command.split()
        if not sub:
            told = _quoted_for_fish(words.help)
            lines.append(f"{begin} -n __fish_use_subcommand -f -a {command} -d {told}")
        here = f"__fish_seen_subcommand_from {sub[0] if sub else command}"
        if words.choices:
            lines.append(f"{begin} -n '{here}' -a '{' '.join(words.choices)}'")
        for option, told in words.options.items():
            described = _quoted_for_fish(told.replace("%%", "%"))
            lines.append(f"{begin} -n '{here}' -l {option.lstrip('-')} -d {described}")
        if words.has_overrides:
            keys = " ".join(f"{key}=" for key in config_keys())
            lines.append(f"{begin} -n '{here}' -a '{keys}'")
    return "\n".join(lines) + "\n"
