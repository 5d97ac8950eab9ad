"""`lcdist claims` with the quick profile: one method by default, all of them and their tables."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lcdist.claims.jobs import all_jobs
from lcdist.claims.registry import CLAIMS
from lcdist.commands.main import main
from lcdist.distributed.mesh import end_world


def claims(folder: Path, *words: str) -> int:
    return main(
        [
            *("claims", "--profile", "quick", "--runs", str(folder / "runs")),
            *("--output", str(folder / "results"), *words),
        ]
    )


def check_results(folder: Path, readings: set[str]) -> str:
    """Check the files of a quick profile's results; return the page."""
    results = json.loads((folder / "results.json").read_text())
    assert set(results["facts"]) == {"command", "seed", "commit", "machine", "versions", "date"}
    assert set(results["measured"]["readings"]) == readings
    assert {each["word"] for each in results["claims"].values()} == {"not decided"}
    page = (folder / "README.md").read_text()
    for claim in CLAIMS:
        assert f"| `{claim.name}` | " in page and claim.sentence in page
    pictures = sorted(folder.glob("*.svg"))
    assert pictures
    # A committed row: full 297.9 + 917.9 ms, tensorized 16.6 + 36.2 ms.
    assert (
        "| NVIDIA H200, 2026-11-28, dd06768 | `modes=(512,)` | 131,072 | 1,215.8 | 52.8 | 23.0 |"
        in page
    )
    for picture in pictures:
        assert f"({picture.name})" in page
        assert ET.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return page


def test_one_method_is_trained_read_and_laid_beside_its_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert claims(tmp_path, "--only", "full") == 0
    assert "coca-steady: not decided: not measured yet: coca-slack" in capsys.readouterr().out
    page = check_results(tmp_path / "results", {"full", "full-ntk"})
    assert "| reading | 128 | 256 | 512 |" in page
    # Of the 4,096 places some are padding behind a text.
    trained = re.search(r"^\| `full` \| (\d,\d{3}) \|", page, re.MULTILINE)
    assert trained and 3600 < int(trained[1].replace(",", "")) <= 4096
    table = json.loads((tmp_path / "runs" / "read" / "full.json").read_text())
    assert set(table["measured"]) == {"perplexity", "position", "passkey"}
    # Again, nothing is trained, read or written: jobs side by side share the folder.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")}
    assert claims(tmp_path, "--only", "full") == 0
    assert "training" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # A training that was cut before its end goes on from its checkpoint, and readings from units.
    (tmp_path / "runs" / "read" / "full.json").unlink()
    assert claims(tmp_path, "--only", "full", "--no-tables") == 0
    assert json.loads((tmp_path / "runs" / "read" / "full.json").read_text()) == table
    assert claims(tmp_path, "train.steps=9") == 2
    end_world()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path}/runs holds models of other settings or text; name another --runs, or "
        "remove the folder"
    )


def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert claims(tmp_path, "--only", "ful") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --only ful: there is no such job; jobs: full, coca-slack, ")
    assert claims(tmp_path, "--workers", "0") == 2
    assert capsys.readouterr().err == "error: --workers 0: must be 1 or more\n"
    assert claims(tmp_path, "--text", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/none: no such file or folder; give a folder of text or a file\n"
    )
    assert not (tmp_path / "runs" / "job.json").exists()
    assert claims(tmp_path, "--list") == 0
    printed = capsys.readouterr().out
    assert all(f"{claim.name}: " in printed for claim in CLAIMS)


@pytest.mark.exhaustive
def test_every_job_of_the_quick_profile_runs_and_nothing_is_decided(tmp_path: Path) -> None:
    assert claims(tmp_path) == 0
    names = {read.name for job in all_jobs(128) for read in job.reads}
    page = check_results(tmp_path / "results", names)
    assert "not measured yet" not in page and "Nothing was measured" not in page


@pytest.mark.exhaustive
def test_jobs_side_by_side_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "lssa", "--only", "extend-full"]
    assert claims(tmp_path, "--workers", "2", *only) == 0
    printed = capsys.readouterr().out
    assert printed.index("full: done") < printed.index("extend-full: started")
    check_results(
        tmp_path / "results", {"lssa", "lssa-read-p15", "full", "full-ntk", "extend-full"}
    )
