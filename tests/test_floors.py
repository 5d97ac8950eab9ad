"""The floors of the house: no import points up, and none is hidden.

Imports are read from the syntax tree of every file, so one inside a function counts like any
other. The floors, lowest first; rooms on one floor do not import each other.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from lcdist.commands.main import COMMANDS

ROOT = Path(__file__).parent.parent
FLOORS = (
    {
        "lcdist",
        "lcdist.config",
        "lcdist.exchange",
        "lcdist.hardware",
        "lcdist.layout",
        "lcdist.utils",
        "lcdist_kernels",
    },
    {"lcdist.attention", "lcdist.data", "lcdist.distributed", "lcdist.rundir"},
    {"lcdist.plan", "lcdist.report"},
    {"lcdist.model"},
    {"lcdist.checkpoint", "lcdist.engines", "lcdist.inference"},
    {"lcdist.convert", "lcdist.evaluate", "lcdist.train", "lcdist.verify"},
    {"lcdist.claims"},
    {"lcdist.commands"},
)
# Within attention/, lowest first; the folders of methods stand between these and the registry.
ATTENTION_LOW = (
    *("shape", "context", "cache", "facts", "shared", "interface", "table"),
    *("common", "method"),  # deprecated import paths
)
ATTENTION_HIGH = ("registry", "__init__")
MEETS_MEGATRON = (
    "lcdist.checkpoint",
    "lcdist.convert",
    "lcdist.distributed.mesh",
    "lcdist.engines",
    "lcdist.model",
)
READS_MEGATRON = "lcdist.data.datasets.split"
# The shim itself: it imports Megatron with torch.compile put aside, which takes a function.
SHIM = "lcdist.hardware.megatron_on_cpu"
WAITS_FOR_DEVICE = "lcdist.hardware.device"
# May read the environment: the launcher and its ranks at the door, one debugging switch.
READS_ENVIRONMENT = {
    *("lcdist.commands.main", "lcdist.distributed.mesh", "lcdist.exchange.debug"),
    "lcdist.commands.launcher",
    "lcdist.hardware.deepspeed_on_cpu",
    "lcdist.hardware.determinism",  # sets what cuBLAS reads
}


@dataclass(frozen=True)
class Import:
    """One import of one module. hidden: not at the top level of its file."""

    module: str
    line: int
    hidden: bool


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Shipped with exported models, where they import each other; lcdist never imports them.
REMOTE_CODE = ROOT / "lcdist" / "convert" / "remote_code"
LIBRARY = sorted(p for p in (ROOT / "lcdist").rglob("*.py") if p.parent != REMOTE_CODE)
KERNELS = sorted((ROOT / "kernels" / "lcdist_kernels").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "launch").glob("*.py"), *(ROOT / "kernels" / "bench").glob("*.py")])
TABLE = "lcdist.commands.main"
OURS = {module_name(path): path for path in (*LIBRARY, *KERNELS)}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> list[Import]:
    found = list(_imports(tree_of(path), path))
    if path == OURS[TABLE]:
        # Each entry of the table is an import, and the only kind that is made by name.
        found += [Import(command.module, 1, False) for command in COMMANDS]
    return found


def _imports(tree: ast.Module, path: Path) -> Iterator[Import]:
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        hidden = id(node) not in top
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, hidden) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if whole in OURS else base, node.lineno, hidden)
        elif isinstance(node, ast.Call) and _called(node).endswith(("import_module", "__import__")):
            for word in node.args:
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    yield Import(word.value, node.lineno, True)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def is_ours(module: str) -> bool:
    return is_in(module, "lcdist") or is_in(module, "lcdist_kernels")


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "lcdist_kernels":
        return "lcdist_kernels"
    # `python -m lcdist` is the same door as the command.
    return "lcdist.commands" if parts[1:] == ["__main__"] else ".".join(parts[:2])


def floor_of(module: str) -> int:
    room = room_of(module)
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room} has no floor: give it one in {__file__}"
    return found[0]


def where(path: Path, found: Import) -> str:
    return f"{path.relative_to(ROOT)}:{found.line}: imports {found.module}"


def every_import() -> list[tuple[str, Path, Import]]:
    return [(name, path, found) for name, path in OURS.items() for found in imports_of(path)]


def test_no_import_points_up_or_sideways() -> None:
    wrong = []
    for name, path, found in every_import():
        if not is_ours(found.module) or room_of(name) == room_of(found.module):
            continue
        if floor_of(found.module) >= floor_of(name):
            wrong.append(where(path, found))
    assert not wrong, "\n".join(wrong)


def test_own_imports_stand_at_the_top_of_a_file() -> None:
    wrong = [
        where(path, found)
        for name, path, found in every_import()
        if found.hidden
        and (is_ours(found.module) or is_in(found.module, "megatron"))
        and not (name == SHIM and is_in(found.module, "megatron"))
    ]
    assert not wrong, "\n".join(wrong)


def attention_place(module: str) -> tuple[int, str]:
    """Return the level of a module inside attention/, and the folder or file that it belongs to."""
    part = module.removeprefix("lcdist.attention").removeprefix(".").split(".")[0] or "__init__"
    if part in ATTENTION_LOW:
        return ATTENTION_LOW.index(part), part
    methods = len(ATTENTION_LOW)
    if part in ATTENTION_HIGH:
        return methods + 1 + ATTENTION_HIGH.index(part), part
    return methods, part


def test_methods_do_not_know_each_other() -> None:
    wrong = []
    for name, path, found in every_import():
        if not (is_in(name, "lcdist.attention") and is_in(found.module, "lcdist.attention")):
            continue
        (here, own), (there, other) = attention_place(name), attention_place(found.module)
        if own != other and there >= here:
            wrong.append(where(path, found))
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {
        name: {found.module for found in imports_of(path) if found.module in OURS}
        for name, path in OURS.items()
    }
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in finished:
            for other in sorted(arrows[name]):
                visit(other, (*path, name))
            finished.add(name)

    for name in arrows:
        visit(name, ())


def test_kernels_stand_alone() -> None:
    wrong = [
        where(path, found)
        for path in KERNELS
        for found in imports_of(path)
        if is_in(found.module, "lcdist")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_rooms_that_meet_megatron_import_it_and_behind_the_host() -> None:
    wrong = []
    for name, path in OURS.items():
        megatron = [found for found in imports_of(path) if is_in(found.module, "megatron")]
        if not megatron or name == SHIM:
            continue
        if name != READS_MEGATRON and not any(is_in(name, room) for room in MEETS_MEGATRON):
            wrong.append(where(path, megatron[0]))
        hosts = [
            found.line
            for found in imports_of(path)
            if found.module == "lcdist.hardware.megatron_on_cpu"
        ]
        if not hosts or hosts[0] > megatron[0].line:
            wrong.append(f"{where(path, megatron[0])} before lcdist.hardware.megatron_on_cpu")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "refused"),
    [
        ("lcdist.layout", "torch.distributed"),
        ("lcdist.config", "torch"),
        ("lcdist.config", "numpy"),
        ("lcdist.hardware.gpu_specs", "torch"),
        ("lcdist.exchange", "lcdist.attention"),
        ("lcdist.exchange", "lcdist.layout"),
        ("lcdist.attention", "torch.distributed"),
    ],
)
def test_a_room_does_without(room: str, refused: str) -> None:
    wrong = [
        where(path, found)
        for name, path, found in every_import()
        if is_in(name, room) and is_in(found.module, refused)
    ]
    used = [
        f"{path.relative_to(ROOT)}:{node.lineno}: uses {refused}"
        for name, path in OURS.items()
        if is_in(name, room)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == refused
    ]
    assert not wrong + used, "\n".join(wrong + used)


def test_layout_and_exchange_load_nothing_above_them() -> None:
    program = (
        "import sys, lcdist.layout, lcdist.config, lcdist.exchange\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('lcdist', 'megatron')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = ast.literal_eval(done.stdout)
    assert all(floor_of(module) == 0 for module in loaded), loaded


def test_plan_loads_no_megatron() -> None:
    program = "import sys, lcdist.plan\nprint('megatron' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_nothing_imports_what_is_started() -> None:
    wrong = [
        where(path, found)
        for _, path, found in every_import()
        if found.module.split(".")[0] in ("launch", "bench", "tests", "configs", "slurm")
    ]
    assert not wrong, "\n".join(wrong)


# --- sizes, and ways out that are closed ----------------------------------------------------------


def limits(path: Path) -> tuple[int, int]:
    """Lines a file and a function may have."""
    return (600, 150) if path.is_relative_to(ROOT / "kernels") else (300, 60)


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS, *PROGRAMS], ids=lambda p: p.name)
def test_files_and_functions_are_short(path: Path) -> None:
    file_limit, function_limit = limits(path)
    name, lines = path.relative_to(ROOT), len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= file_limit, f"{name} has {lines} lines, {file_limit} are allowed"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= function_limit, f"{name}:{node.lineno}: {node.name}: {length} lines"


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS, *PROGRAMS], ids=lambda p: p.name)
def test_a_file_begins_with_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), path.relative_to(ROOT)


def test_a_docstring_begins_with_no_question_word() -> None:
    """Check that a verb comes first: a question word leaves open what is done."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    words = ("Whether", "Which", "What", "How", "Where", "When", "Why", "Who")
    wrong = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in (*LIBRARY, *KERNELS, *PROGRAMS, *(ROOT / "docs").rglob("*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
        if text.split()[0] in words
    ]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_at_the_door_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for name, path in OURS.items()
        if name not in READS_ENVIRONMENT
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]
    assert not wrong, "\n".join(wrong)


def is_passed_on(handler: ast.ExceptHandler) -> bool:
    """Return whether what was caught is raised again, or kept for someone who will."""
    return any(
        isinstance(node, ast.Raise) or (isinstance(node, ast.Name) and node.id == handler.name)
        for node in ast.walk(handler)
    )


def test_no_exception_is_swallowed_whole() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in OURS.values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not is_passed_on(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_command_is_a_module_with_two_functions() -> None:
    for command in COMMANDS:
        names = {
            node.name
            for node in tree_of(OURS[command.module]).body
            if isinstance(node, ast.FunctionDef)
        }
        assert {"add_arguments", "run"} <= names, command


# They look for packages that may not be installed.
LIBRARIES = ("lcdist_kernels.full.library", "lcdist_kernels.extensions")


def test_only_the_table_of_commands_imports_our_modules_by_name() -> None:
    """Elsewhere by name: attention methods of other packages, and third parties."""
    allowed = {TABLE, "lcdist.train.metrics", SHIM, *LIBRARIES}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for name, path in OURS.items()
        if name not in allowed
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and _called(node).endswith(("import_module", "__import__"))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_wait_for_device_waits_for_the_gpu_and_nothing_makes_a_block_pointer() -> None:
    """`wait_for_device` is for measurements: `lcdist smoke` reads the clock around collectives."""
    refused = ("tl.make_block_ptr", "torch.cuda.synchronize")
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for name, path in OURS.items()
        if name != WAITS_FOR_DEVICE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in refused
    ]
    assert not wrong, "\n".join(wrong)
