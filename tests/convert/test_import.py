"""An imported checkpoint gives transformers' logits on every mesh."""

from pathlib import Path

import pytest
import torch

from lcdist.checkpoint.read import saved_config
from lcdist.config import ConfigError
from lcdist.rundir.source import load_run
from lcdist.train.resume import open_fitting
from tests.convert.hf import FAMILIES, import_all, logits_of, make_model, save, tokens
from tests.convert.ours import logits_on
from tests.distributed import run_ranks
from tests.tolerance import assert_matches

MESHES = {
    2: [
        (),
        ("tp_size=2",),
        ("tp_size=2", "sequence_parallel=true"),
        ("pp_size=2",),
        ("pp_size=2", "vp_size=2"),
        ("cp_size=2",),
    ],
    4: [
        ("tp_size=2", "pp_size=2", "sequence_parallel=true"),
        ("tp_size=2", "cp_size=2"),
        ("pp_size=2", "cp_size=2"),
        ("tp_size=4",),
    ],
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Import each family, from one file or from shards; return (folder, transformers' logits)."""
    folder = tmp_path_factory.mktemp("models")
    jobs, expected = [], {}
    for number, family in enumerate(FAMILIES):
        source = folder / f"hf-{family}"
        model = save_and_keep(family, source, "50GB" if number % 2 else "60KB")
        expected[family] = (folder / family, logits_of(model, tokens()))
        jobs.append((source, folder / family, ()))
    # CheckpointTensors in bf16, trained in fp32.
    source = save(make_model("qwen2", seed=1).to(torch.bfloat16), folder / "hf-bf16")
    expected["bf16"] = (folder / "bf16", logits_of(source, tokens()))
    jobs.append((source, folder / "bf16", ()))
    run_ranks(import_all, 1, jobs)
    return expected


def save_and_keep(family: str, source: Path, shards: str) -> object:
    model = make_model(family)
    save(model, source, shards)
    return model


@pytest.mark.parametrize(
    ("world_size", "every"),
    [
        (2, False),
        pytest.param(4, True, marks=pytest.mark.exhaustive),
    ],
)
def test_logits_match_transformers(world_size: int, every: bool, imported: dict) -> None:
    """Cover TP, PP, interleaved PP, CP, SP, DP and mixtures, with fewer key heads than TP ranks.

    By default each mesh and each family has a turn.
    """
    meshes, families = MESHES[world_size], list(imported)
    turns = max(len(meshes), len(families))
    cases = [(meshes[n % len(meshes)], families[n % len(families)]) for n in range(turns)]
    if every:
        cases = [(mesh, family) for mesh in meshes for family in families]
    jobs = [(imported[family][0], mesh, tokens()) for mesh, family in cases]
    found = run_ranks(logits_on, world_size, jobs, timeout=240)[0]
    for (mesh, family), ours in zip(cases, found, strict=True):
        try:
            assert_matches(ours, imported[family][1], 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{family} on {mesh}") from error


def test_a_run_takes_its_settings_from_the_import(imported: dict, tmp_path: Path) -> None:
    for family in FAMILIES:
        folder = imported[family][0]
        file = tmp_path / "run.toml"
        file.write_text(
            f'[model]\nfrom = "{folder}"\n[train]\nseqlen = 64\nsteps = 2\n'
            f'[data]\nsource = "synthetic"\n[log]\nfolder = "{tmp_path / family}"\n',
            encoding="utf-8",
        )
        [stage] = load_run(file)
        checkpoint = open_fitting(folder, stage.config)
        assert stage.config.model == saved_config(checkpoint).model
        assert stage.config.checkpoint.load == str(folder)
        if stage.config.model.rope.base != 10000.0:
            with pytest.raises(ConfigError, match=r"model\.rope\.base = 10000\.0: .* has "):
                load_run(file, ["model.rope.base=10000.0"])


def test_a_hugging_face_folder_has_to_be_imported_first(imported: dict, tmp_path: Path) -> None:
    source = imported["llama2"][0].parent / "hf-llama2"
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\nfrom = "{source}"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="import it first, with 'lcdist convert import"):
        load_run(file)
