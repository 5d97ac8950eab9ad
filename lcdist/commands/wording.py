"""Say remedies in the words of the command that was typed."""

import re

MAKE, SBATCH = "make", "sbatch"
# Options of `lcdist extend`, and the variables of the Makefile that stand for them.
_VARIABLES = {
    "--data": "DATA",
    "--name": "NAME",
    "--method": "METHOD",
    "--model": "MODEL",
    "--lora": "LORA",
    "--length": "LENGTH",
    "--minutes": "MINUTES",
    "--profile": "PROFILE",
    "--workers": "JOBS",
    "--text": "TEXT",
}
_OPTION = re.compile(rf"({'|'.join(_VARIABLES)})(?:[ =](\S+))?(?=[\s:;,.)']|$)")
_OVERRIDE_HELP = "configuration error: "


# What decides the number of ranks, in the words of `sbatch`.
_RANKS = {"launch/run.py --nproc-per-node": "sbatch --nodes and --gpus-per-node"}


def in_words_of(starter: str, text: str) -> str:
    """Return a message with the words of a starter: `make` has NAME=x for `--name x`."""
    if starter == SBATCH:
        for ours, theirs in _RANKS.items():
            text = text.replace(ours, theirs)
    if starter != MAKE:
        return text
    text = _OPTION.sub(_variable, text)
    if text.startswith(_OVERRIDE_HELP):
        word = "METHOD=..." if "attention.method =" in text else 'WITH="section.key=value"'
        text += f" (with make: {word})"
    return text


def _variable(match: re.Match[str]) -> str:
    return f"{_VARIABLES[match[1]]}={match[2] or ''}"
