"""The constraints and the container recipe for GPU machines agree with the project."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "slurm" / "constraints-gpu.txt"
RECIPE = (ROOT / "slurm" / "Containerfile").read_text()


def pinned() -> dict[str, str]:
    """Return the version of each constrained package."""
    found = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def instructions() -> list[tuple[str, str]]:
    """Return each instruction of the recipe on one line, with the line above it."""
    lines = RECIPE.replace("\\\n", " ").splitlines()
    above = zip(["", *lines], lines, strict=False)
    return [(before, line) for before, line in above if line and not line.startswith("#")]


def test_constraints_are_within_the_projects_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    versions, checked = pinned(), set()
    for text in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        wanted = Requirement(text)
        version = versions.get(canonicalize_name(wanted.name))
        if version is not None:
            assert version in wanted.specifier, f"{CONSTRAINTS.name}: {version} is not {text}"
            checked.add(wanted.name)
    assert checked == {"torch", "triton", "megatron-core", "deepspeed"}
    assert "apex" not in versions and "://" not in CONSTRAINTS.read_text()


def test_the_recipe_uses_them_and_files_that_exist() -> None:
    for before, line in instructions():
        assert before.startswith("# NOT BUILT."), f"say whether this was built: {line}"
        word, *rest = line.split()
        for source in rest[:-1] if word == "COPY" else ():
            assert (ROOT / source).exists(), source
        for install in re.findall(r"pip install (?!--upgrade pip).*?(?=&&|;|$)", line):
            assert "--constraint slurm/constraints-gpu.txt" in install or "/opt/apex" in install
    [commit] = re.findall(r"APEX_COMMIT=(\w{40})", RECIPE)
    assert commit in CONSTRAINTS.read_text()
    site = (ROOT / "slurm" / "site.sh.example").read_text()
    images = set(re.findall(r"/shared/lcdist\.\w+", site))
    assert len(images) == 2 and images == set(re.findall(r"/shared/lcdist\.\w+", RECIPE))
