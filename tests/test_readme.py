"""Documents agree with the code: table, commands, links, and the example of a new method."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from lcdist.attention import METHODS
from lcdist.attention.registry import BUILT_IN
from lcdist.attention.table import method_table
from lcdist.commands.main import parse_words
from lcdist.plan import make_plan, smallest_world
from lcdist.rundir.source import load_run

ROOT = Path(__file__).parent.parent
# Tutorials have tests of their own, which run what they say.
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "tutorials" not in path.parts
)
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "LOG.md", "CHANGELOG.md", *PAGES)
MOST_LINES = 200


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)


COMMANDS = [
    line
    for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", *PAGES)
    for block in blocks(name, "sh")
    for line in block.splitlines()
]


def test_the_table_of_methods_is_the_registrys() -> None:
    assert method_table(BUILT_IN) in read("README.md")
    assert {method.name for method in BUILT_IN} <= METHODS.keys()


def test_methods_that_are_not_there_are_not_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| \[arXiv", read("README.md"), re.MULTILINE)
    assert rows == [method.name for method in BUILT_IN]


def check_lcdist(words: list[str]) -> None:
    arguments = parse_words(words)
    if hasattr(arguments, "config"):
        asked = getattr(arguments, "world_size", None)
        for stage in load_run(ROOT / arguments.config, arguments.overrides):
            make_plan(stage.config, smallest_world(stage.config) if asked is None else asked)


@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)))
def test_a_command_can_be_given(command: str) -> None:
    program, *words = shlex.split(command)
    name = program.removeprefix(".venv/bin/")
    if name == "make":
        targets = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
        assert words and [word for word in words if "=" not in word and word not in targets] == []
    elif name == "python" and words[0] == "-m":
        assert find_spec(words[1]) is not None
    elif name == "python":
        script = words.index("launch/train.py")
        assert words[:script] == ["launch/run.py", "--nproc-per-node", words[script - 1]]
        check_lcdist(["train", *words[script + 1 :]])
    elif name == "cp":
        copied, _, *then = words
        assert (ROOT / copied).is_file() and then == ["&&", "source", words[1]]
    elif name == "sbatch":
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script).is_file()
    else:
        assert name == "lcdist", f"no test knows the program of {command!r}"
        check_lcdist(words)


def test_the_two_commands_come_first_and_the_readme_is_short() -> None:
    assert COMMANDS[:2] == ["make extend", "make test"]
    assert len(read("README.md").splitlines()) < MOST_LINES


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_every_file_named_is_there(name: str) -> None:
    text, folder = read(name), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (folder / link).exists()]
    quoted = re.findall(r"`((?:lcdist|kernels|launch|configs|tests)/[\w./-]+)`", text)
    missing += [path for path in quoted if not (ROOT / path).exists()]
    assert not missing


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    tree = re.sub(r"\(planned:[^)]*\)", "", blocks("docs/architecture.md", "")[1])
    here = {path.name for path in (ROOT / "lcdist").rglob("*.py")}
    here |= {path.name for path in (ROOT / "kernels").rglob("*.py")}
    here |= {path.name for path in (ROOT / "launch").glob("*.py")}
    named = set(re.findall(r"\b(\w+\.py)\b", tree)) - {"kernel.py"}
    assert named <= here, named - here
    rooms = {p.name for p in (ROOT / "lcdist").iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.name for p in (ROOT / "lcdist").glob("*.py") if not p.name.startswith("__")}
    drawn = blocks("docs/architecture.md", "")[0] + tree
    assert [room for room in sorted(rooms) if room not in drawn] == []


def test_the_reading_order_is_short() -> None:
    steps = re.findall(r"^\d+\. \[(\S+)\]", read("docs/architecture.md"), re.MULTILINE)
    lines = sum(len(read(path).splitlines()) for path in steps)
    assert len(steps) == 10 and lines < 1500, lines
