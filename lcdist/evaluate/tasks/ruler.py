"""RULER's synthetic tasks by name (arXiv:2404.06654, NVIDIA/RULER, scripts/synthetic.yaml).

The two tasks of questions about documents need downloaded data sets, and are left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lcdist.evaluate.tasks.case import Case, PromptFormat
from lcdist.evaluate.tasks.counting import (
    COMMON_NEW_TOKENS,
    FREQUENT_NEW_TOKENS,
    common_words_case,
    frequent_words_case,
)
from lcdist.evaluate.tasks.haystack import Essay
from lcdist.evaluate.tasks.niah import MAX_NEW_TOKENS, Needles, needles_case
from lcdist.evaluate.tasks.variables import MAX_NEW_TOKENS as VARIABLES_NEW_TOKENS
from lcdist.evaluate.tasks.variables import variables_case


@dataclass(frozen=True)
class RulerTask:
    """A task.

    Attributes:
        needs_text: whether it hides needles in the user's text.
        max_new_tokens: room for an answer.
        case: makes a case from prompt format, length, seed, number and the user's text.
    """

    needs_text: bool
    max_new_tokens: int
    case: Callable[[PromptFormat, int, int, int, Essay | None], Case]


def _needles(task: Needles) -> RulerTask:
    def case(
        prompt_format: PromptFormat, length: int, seed: int, number: int, text: Essay | None
    ) -> Case:
        return needles_case(task, prompt_format, length, seed, number, text)

    return RulerTask(task.haystack == "essay", MAX_NEW_TOKENS, case)


def _without_text(
    max_new_tokens: int, make: Callable[[PromptFormat, int, int, int], Case]
) -> RulerTask:
    return RulerTask(False, max_new_tokens, lambda form, *numbers: make(form, *numbers[:3]))


NEEDLES = (
    Needles("niah_single_1", "noise"),
    Needles("niah_single_2", "essay"),
    Needles("niah_single_3", "essay", value_kind="uuids"),
    Needles("niah_multikey_1", "essay", keys=4),
    Needles("niah_multikey_2", "needles"),
    Needles("niah_multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
    Needles("niah_multivalue", "essay", values=4),
    Needles("niah_multiquery", "essay", keys=4, queries=4),
)
RULER: Mapping[str, RulerTask] = {
    **{task.name: _needles(task) for task in NEEDLES},
    "vt": _without_text(VARIABLES_NEW_TOKENS, variables_case),
    "cwe": _without_text(COMMON_NEW_TOKENS, common_words_case),
    "fwe": _without_text(FREQUENT_NEW_TOKENS, frequent_words_case),
}
