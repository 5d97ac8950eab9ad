"""A mistake gets one message, the last thing printed, with thing, value and remedy."""

import pytest

from tests.messages.page import INTRODUCTION, PAGE, Answer, processes, sections, text_of

PREFIXES = ("error: ", "configuration error: ")
FEWEST = 40


def assert_told(command: str, answer: Answer) -> None:
    assert answer.status == 2, (command, answer)
    assert answer.lines, command
    assert not any("Traceback" in line for line in answer.lines), (command, answer)
    assert answer.lines[-1].startswith(PREFIXES), (command, answer)


def test_page_has_what_the_commands_print() -> None:
    """If a message was changed on purpose: python -m tests.messages.page."""
    page, count = PAGE.read_text(encoding="utf-8"), 0
    assert page.startswith(INTRODUCTION)
    for heading, answers in sections():
        count += len(answers)
        for command, answer in answers:
            assert_told(command, answer)
            assert len(answer.lines) <= 2
        assert text_of(heading, answers) in page
    assert count >= FEWEST


@pytest.mark.exhaustive
def test_messages_of_processes_are_last() -> None:
    answers = processes()
    torchrun = dict(answers).pop(next(each for each, _ in answers if "torchrun" in each))
    # torch's own report follows; the message stands once before it.
    told = [line for line in torchrun.lines if line.startswith(PREFIXES)]
    assert len(told) == 1 and torchrun.lines[0] == told[0] and torchrun.status != 0
    for command, answer in answers:
        if answer is torchrun:
            continue
        if "slurm" in command:
            assert answer.status == 2 and "sbatch" in answer.lines[-1]
        elif command.startswith("make"):
            # make adds its own line.
            assert answer.lines[-2].startswith("error: LORA=-1: must be 0 or more")
        else:
            assert_told(command, answer)
            assert len(answer.lines) == 1, answer
    assert text_of("How it was started", answers) in PAGE.read_text(encoding="utf-8")
