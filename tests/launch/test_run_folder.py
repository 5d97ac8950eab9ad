"""`lcdist run-folder`: the run folder of a batch job, and mistakes before any launcher starts."""

from pathlib import Path

import pytest

from lcdist.commands.main import main

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "debug" / "full.toml")


def test_run_folder_prints_the_folder_of_the_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run-folder", "2", "4", CONFIG, f"log.folder={tmp_path}/run"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run"
    stages = tmp_path / "stages.toml"
    table = '\n[[stages]]\nname = "short"\n[[stages]]\nname = "long"\n'
    stages.write_text(Path(CONFIG).read_text() + table)
    assert main(["run-folder", "2", "4", str(stages), f"log.folder={tmp_path}/run"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "unknown key 'train.step'; did you mean 'train.steps'?"),
        (
            "parallel.cp_size=4",
            "1 x 1 x 4 = 4 ranks, or a multiple of it",
        ),
    ],
)
def test_run_folder_reports_mistakes(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run-folder", "2", "1", CONFIG, override]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("configuration error: ")
    assert message in printed.err
