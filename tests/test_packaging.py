"""The distribution: a wheel of two packages that works alone, without traces of a machine.

The same sources make the same bytes, and what the index shows of them can be rendered.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from lcdist import __version__
from lcdist.attention.registry import BUILT_IN
from tests.chaos.tiny_run import write_settings

ROOT = Path(__file__).parent.parent


SKIPPED = {"__pycache__", "build", "dist", "runs"}


def our_files() -> list[Path]:
    """Return files that are tracked or new; in a source distribution, those that no run made."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [Path(name) for name in done.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [n for n in names if not any(p in SKIPPED or p[0] == "." for p in n.parts)]
        names = [n for n in names if not any(p.endswith(".egg-info") for p in n.parts)]
    return sorted(ROOT / name for name in names if (ROOT / name).is_file())


def run(*words: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env or None, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path) -> Path:
    """Copy our files to `source`, and build the source distribution and the wheel made from it."""
    for path in our_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    run("-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and return a folder with the source distribution and the wheel made from it."""
    return build(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist"))


def test_the_same_sources_make_the_same_bytes(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = build(tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("again"))
    names = sorted(path.name for path in built.iterdir())
    assert len(names) == 2 and names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (built / name).read_bytes() == (again / name).read_bytes(), name


def test_what_an_index_shows_can_be_rendered(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    shown = run("-m", "twine", "--no-color", "check", "--strict", *files, cwd=built)
    assert shown.count("PASSED") == 2


def test_one_version_and_what_repeats_it() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^\]]+)\](?: - ([\d-]+))?$", changes, re.MULTILINE)
    newest = next((name, date) for name, date in headings if name != "Unreleased")
    assert newest == (__version__, str(citation["date-released"]))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"version = \{(.+)\}", readme) == [__version__.partition(".dev")[0]]
    cited = {paper["url"].rpartition("/")[2] for paper in citation["references"]}
    assert cited == {method.paper for method in BUILT_IN if method.name != "full"}


def test_the_wheel_holds_two_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {name.split("/")[0] for name in names} == {"lcdist", "lcdist_kernels", info}
    assert {"lcdist/py.typed", "lcdist_kernels/py.typed"} <= set(names)
    templates = (ROOT / "lcdist" / "report" / "templates").iterdir()
    assert {f"lcdist/report/templates/{path.name}" for path in templates} <= set(names)
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)
    modules = {
        str(path.relative_to(ROOT / base))
        for base in (".", "kernels")
        for path in our_files()
        if path.suffix == ".py"
        and path.is_relative_to(ROOT / base)
        and path.relative_to(ROOT / base).parts[0] in ("lcdist", "lcdist_kernels")
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_source_distribution_holds_what_the_wheel_leaves_out(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    ours = {str(path.relative_to(ROOT)) for path in our_files()}
    missing = {name for name in ours - held if not Path(name).name.startswith(".")}
    assert not missing, f"the source distribution lacks {sorted(missing)}"


def test_the_wheel_works_where_there_is_nothing_else(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    place, empty = tmp_path / "place", tmp_path / "empty"
    empty.mkdir()
    words = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheel))
    run("-m", "pip", *words, cwd=empty)
    program = (
        "import lcdist.commands.main, lcdist_kernels\n"
        "print(lcdist.__file__, lcdist_kernels.__file__)\n"
        "lcdist.commands.main.main(['methods'])"
    )
    shown = run("-c", program, cwd=empty, PYTHONPATH=str(place)).splitlines()
    assert shown[0] == f"{place}/lcdist/__init__.py {place}/lcdist_kernels/__init__.py"
    assert any("`full`" in line for line in shown)


@pytest.mark.exhaustive
def test_wheel_in_a_fresh_environment_plans_a_run(built: Path, tmp_path: Path) -> None:
    """Install the wheel with its declared dependencies alone, and plan a file of the user's."""
    (wheel,) = built.glob("*.whl")
    venv, folder = tmp_path / "venv", tmp_path / "user"
    folder.mkdir()
    shutil.copyfile(ROOT / "configs" / "debug" / "full.toml", folder / "mine.toml")
    run("-m", "venv", str(venv), cwd=folder)
    programs = venv / "bin"

    def in_venv(*words: str) -> str:
        done = subprocess.run(
            [str(programs / words[0]), *words[1:]],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Compiling all modules of all dependencies would take most of the time.
    in_venv("pip", "install", "--quiet", "--no-compile", str(wheel))
    assert re.search(r"\d+\.\d+", in_venv("lcdist", "--version"))
    assert "parameters" in in_venv("lcdist", "plan", "mine.toml", "parallel.cp_size=2")
    assert "`landmark`" in in_venv("lcdist", "methods")
    # The example of the long description, on a tiny model of bytes.
    text = folder / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"word {number} " * 400, encoding="utf-8")
    in_venv("lcdist", "tokenize", "text", "data", "--tokenizer", "bytes", "--valid-fraction", "0.5")
    settings = write_settings(folder / "run.toml", folder / "data", folder / "runs/first", steps=2)
    in_venv("lcdist", "train", str(settings))
    metadata = zipfile.ZipFile(wheel).read(
        f"{wheel.name[: -len('-py3-none-any.whl')]}.dist-info/METADATA"
    )
    (example,) = re.findall(r"^```python\n(.*?)^```", metadata.decode("utf-8"), re.M | re.S)
    assert "class Reader:" in in_venv("python", "-c", example)


def test_kernels_and_launch_are_no_packages() -> None:
    """Check that `kernels` is no package: it would hide another package of that name."""
    assert not [name for name in ("kernels", "launch") if (ROOT / name / "__init__.py").exists()]
    assert not [path for path in (ROOT / "kernels").iterdir() if path.suffix == ".py"]


def test_no_program_has_the_name_of_a_standard_module() -> None:
    """Check program names: a program's folder comes first on the path and would hide the module."""
    programs = [*(ROOT / "launch").glob("*.py"), *(ROOT / "kernels" / "bench").glob("*.py")]
    taken = [path.name for path in programs if path.stem in sys.stdlib_module_names]
    assert programs and not taken


# Home folders, mounts and work folders; hosts and options of package indexes.
MACHINE = re.compile(
    r"(?<![\w.$}*-])/(?:home|root|Users|mnt|work|data|scratch|farm|workspace)/\w"
    r"|--(?:extra-)?index-url|--find-links"
    r"|https?://[^\s)]*(?:pypi|pythonhosted|artifactory|nexus|/simple\b|/whl\b)"
)


def test_no_file_names_a_machine_or_a_package_index() -> None:
    wrong = []
    for path in our_files():
        content = path.read_bytes()
        if b"\0" in content or path == Path(__file__):
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            if MACHINE.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    ["cd /home/ann/x", "path = '/mnt/disk'", "pip install --index-url x", "https://x.org/simple/"],
)
def test_a_machine_is_recognised(line: str) -> None:
    assert MACHINE.search(line)


def test_no_file_is_large() -> None:
    large = [str(p.relative_to(ROOT)) for p in our_files() if p.stat().st_size > 500_000]
    assert not large, f"over 500 kB: {large}"
