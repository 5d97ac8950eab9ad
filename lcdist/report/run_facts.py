"""Read and check a run folder, and extract the facts that do not depend on the clock.

A folder is one run (metrics.jsonl, run.json, config.toml), or it has several runs as stages in
sequence. It may also have results over all stages (evaluation.json, sample.txt), and the source and
exports of the model (conversion.json).
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.config.load import read_table
from lcdist.report.evaluation_file import AGAIN as MAKE_AGAIN
from lcdist.report.evaluation_file import OF_JOB, Evaluation, evaluations_of, is_of_job
from lcdist.report.formatting import finite
from lcdist.rundir.header import REMOVE, read_header
from lcdist.rundir.profile import Profile, read_profiles
from lcdist.rundir.records import StepRecord, read_records
from lcdist.utils.json_file import check_types, read_json, read_object
from lcdist.utils.progress import Progress, silent

FIRST_STAGES = ("pretrain", "extend")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run.

    Attributes:
        name: folder name of the stage; "train" for a single run.
        seqlen: training length in tokens.
        records: one record per step.
        header: contents of run.json.
        config: text of the resolved configuration.
        profiles: tables of profiled steps.
    """

    name: str
    seqlen: int
    records: tuple[StepRecord, ...]
    header: Mapping[str, Any]
    config: str
    profiles: tuple[Profile, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens trained on in this stage."""
        return sum(record.tokens for record in self.records)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Contents of a run folder: stages in order; evaluation, sample, conversion if present.

    evaluation: perplexity before and after, of `lcdist extend`.
    evaluations: all that evaluation.json holds, whoever wrote it.
    """

    name: str
    stages: tuple[Stage, ...]
    evaluation: Mapping[str, Any] | None
    sample: str | None
    conversion: Mapping[str, Any] | None = None
    evaluations: tuple[Evaluation, ...] = ()


def read_run_folder(folder: Path, progress: Progress = silent) -> RunFolder:
    """Read the files of a run that a report uses.

    Args:
        folder: of the run.
        progress: called with the bytes that are read of each file of metrics.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has invalid contents; the message names file and line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "metrics.jsonl").exists():
        stages = [_read_stage(folder, "train", progress)]
    else:
        order = {name: index for index, name in enumerate(FIRST_STAGES)}
        names = sorted(
            (path.parent.name for path in folder.glob("*/metrics.jsonl")),
            key=lambda name: (order.get(name, len(order)), name),
        )
        stages = [_read_stage(folder / name, name, progress) for name in names]
    if not stages:
        raise FileNotFoundError(
            f"{folder}: no metrics.jsonl in it or in {' or '.join(FIRST_STAGES)}; "
            f"give the folder of a run (log.folder), or of a job of 'lcdist extend'"
        )
    evaluation, evaluations = _read_evaluation(folder / "evaluation.json")
    sample, conversion = folder / "sample.txt", folder / "conversion.json"
    return RunFolder(
        name=folder.resolve().name,
        stages=tuple(stages),
        evaluation=evaluation,
        sample=_read_text(sample) if sample.exists() else None,
        conversion=_read_conversion(conversion) if conversion.exists() else None,
        evaluations=evaluations,
    )


def report_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a report that no clock, machine or interruption changes, as plain data.

    A run that was killed and resumed has the same facts as one that was not. Numbers that are
    not finite are None.

    Raises:
        FileNotFoundError, ValueError: as `read_run_folder`.
    """
    return facts_of(read_run_folder(folder))


def facts_of(run: RunFolder) -> dict[str, Any]:
    """Return `report_facts` of a folder that was already read."""
    return {
        "tokens": sum(stage.tokens for stage in run.stages),
        "headline": _headline(run),
        "stages": [_stage_facts(stage) for stage in run.stages],
        "evaluation": None if run.evaluation is None else dict(run.evaluation),
        "sample": run.sample,
        "conversion": None if run.conversion is None else dict(run.conversion),
    }


def _stage_facts(stage: Stage) -> dict[str, Any]:
    records, last = stage.records, stage.records[-1]
    verbs = sorted({verb for record in records for verb in record.exchange_bytes})
    # One step is noisy: average the last tenth of the steps, at most ten.
    last_losses = [r.loss for r in records[-max(1, min(10, len(records) // 10)) :]]
    return {
        "name": stage.name,
        "seqlen": stage.seqlen,
        "plan": stage.header["plan"],
        "steps": last.step,
        "samples": last.samples,
        "tokens": stage.tokens,
        "first_loss": finite(records[0].loss),
        "last_loss": finite(statistics.fmean(last_losses)),
        "step": [record.step for record in records],
        "loss": [finite(record.loss) for record in records],
        "grad_norm": [finite(record.grad_norm) for record in records],
        "lr": [finite(record.lr) for record in records],
        "exchange_bytes": {
            verb: statistics.fmean(record.exchange_bytes.get(verb, 0) for record in records)
            for verb in verbs
        },
    }


def _headline(run: RunFolder) -> dict[str, Any] | None:
    """Return perplexity before and after training at one length.

    The length is that of the last stage, or the longest one evaluated.
    """
    if run.evaluation is None:
        return None
    lengths = run.evaluation["lengths"]
    trained = run.stages[-1].seqlen
    length = trained if trained in lengths else max(lengths)
    index = lengths.index(length)
    before, after = (run.evaluation[key][index] for key in ("before", "after"))
    return {"length": length, "before": before, "after": after}


def _read_stage(folder: Path, name: str, progress: Progress) -> Stage:
    records = read_records(folder / "metrics.jsonl", progress)
    if not records:
        raise ValueError(f"{folder / 'metrics.jsonl'}:1: no step is recorded yet")
    header = read_header(folder / "run.json")
    _check_header(header, str(folder / "run.json"))
    config = _read_text(folder / "config.toml")
    train = read_table(folder / "config.toml").get("train")
    seqlen = train.get("seqlen") if isinstance(train, dict) else None
    if type(seqlen) is not int:
        raise ValueError(f"{folder / 'config.toml'}: key train.seqlen is missing")
    return Stage(
        name=name,
        seqlen=seqlen,
        records=tuple(records),
        header=header,
        config=config,
        profiles=tuple(read_profiles(folder)),
    )


def _check_header(header: dict[str, Any], where: str) -> None:
    """Raise ValueError unless what a report shows of a run.json has its types."""
    types: dict[str, Any] = {
        "plan": dict,
        "device": str,
        "versions": dict[str, str],
        "world_size": int,
    }
    # Earlier versions wrote no peak.
    check_types({"peak": None} | header, types | {"peak": dict | None}, where, REMOVE)
    if header.get("peak"):
        check_types(header["peak"], {"flops": float, "source": str}, f"{where}: peak", REMOVE)


def _read_conversion(path: Path) -> dict[str, Any]:
    """Read conversion.json. Raises ValueError that names the file and the error."""
    types = {"source": str, "seqlen": int, "rotation": list[str], "trained": str}
    table = read_object(path, types, MAKE_AGAIN)
    if len(table["rotation"]) != 2:
        raise ValueError(
            f"{path}: rotation has {len(table['rotation'])} entries, not 2; {MAKE_AGAIN}"
        )
    return table


def _read_evaluation(
    path: Path,
) -> tuple[dict[str, Any] | None, tuple[Evaluation, ...]]:
    """Read evaluation.json: the one of `lcdist extend`, if it is, and all that the file holds.

    Raises:
        ValueError: the file is damaged; the message names it and the error.
    """
    if not path.exists():
        return None, ()
    table = read_json(path, MAKE_AGAIN)
    evaluations = tuple(evaluations_of(table, str(path)))
    if not is_of_job(table):
        return None, evaluations
    return {key: table[key] for key in OF_JOB}, evaluations


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
