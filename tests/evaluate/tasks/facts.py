"""What two generators of RULER's tasks have in common: a prompt without what was drawn at random.

`released.json` has the facts of prompts that the released program made (NVIDIA/RULER at c3f5e3b,
July 2026, seed 42, the first sample of each), with a stand-in tokenizer that counts words and line
ends, and with "Rain. Rain. Rain." as its essay; and the scores that it gave to predictions.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# In this order: an earlier pattern may contain what a later one looks for.
DRAWN = (
    (UUID, "<uuid>"),
    (r"\b\d{7}\b", "<number>"),
    (r"\bfor [^<\s]\S* (is:|mentioned)", r"for <words> \1"),
    (r"\bfor (\S+, )+and \S+ mentioned", "for <keys> mentioned"),
    (r"\bVAR [A-Z]{5}\b", "VAR <five letters>"),
    (r"\bVAR [A-Z]{3}\b", "VAR <three letters>"),
    (r"\b\d{5}\b", "<value>"),
    (r"they are: ( [A-Z]{3}\b)+", "they are:  <three letters>"),
)
TEN = 10
CODED = "frequently appeared coded words. "


def words_and_lines(text: str) -> list[str]:
    """Return the tokens of the stand-in tokenizer."""
    return re.findall(r"\S+|\n", text)


def facts_of(text: str, prefix: str, references: Sequence[str]) -> dict[str, Any]:
    """Return what does not depend on chance.

    Args:
        text: prompt without the beginning of the answer.
        prefix: beginning of the answer.
        references: expected answers.
    """
    coded = Counter(text.partition(CODED)[2].partition("\n")[0].split())
    if CODED in text:
        text = f"{text.partition(CODED)[0]}{CODED}<words>\n{text.partition(chr(10))[2]}"
    # In an essay sentences stand where elsewhere lines do.
    text = re.sub(r"(?:\b\d+\. [^\s.]+ ?){10,}", _word_list, text)
    lines = Counter(_line(line) for line in re.split(r"\n|(?<=\.) ", text))
    return {
        "prefix": _line(prefix),
        "references": len(references),
        "lines": dict(sorted(lines.items())),
        "coded words": sorted(coded.values(), reverse=True),
    }


def _line(line: str) -> str:
    for pattern, name in DRAWN:
        line = re.sub(pattern, name, line)
    return line


def _word_list(found: re.Match[str]) -> str:
    words = re.findall(r"\d+\. (\S+)", found.group())
    if len(words) == TEN:
        return "<ten words>"
    times = sorted(Counter(Counter(words).values()).items())
    return f"<{', '.join(f'{count} words {often} times' for often, count in times)}>"
