"""`lcdist claims`: train small models, and lay what papers claim beside what they measure.

    lcdist claims [--profile cpu|gpu|quick] [--text FOLDER] [--workers NUMBER] [--only JOB ...]

Each job trains one model, or adapts one, and reads it in several ways. Finished jobs are skipped
and interrupted ones go on, so the same command can always be repeated. Models and readings are in
runs/claims/PROFILE, tables and plots in claims/PROFILE; those of the quick profile, which decides
nothing, are beside its models.
"""

import argparse
import json
import shlex
from collections import Counter
from pathlib import Path

from lcdist.claims.jobs import all_jobs, jobs_named
from lcdist.claims.profiles import PROFILES, Profile
from lcdist.claims.registry import CLAIMS
from lcdist.claims.results import TEXT, facts, read_measured
from lcdist.claims.tables import write_results
from lcdist.claims.text import STDLIB, write_text
from lcdist.claims.timings import tensorized_times
from lcdist.commands.claims_jobs import Place, console, run_job, run_side_by_side
from lcdist.commands.extend_steps import ROOT
from lcdist.config import dump
from lcdist.utils.atomic import write_file
from lcdist.utils.json_file import read_json

QUICK = "quick"
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the profile, the text, the jobs and where results go."""
    parser.add_argument(
        "--profile", default="cpu", choices=list(PROFILES), help="how large the models are"
    )
    parser.add_argument("--text", default=STDLIB, help="folder or file of real text")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="JOB",
        help="run this job, after the one that it starts from; again for more (default: all jobs)",
    )
    parser.add_argument("--workers", type=int, default=1, help="jobs to run at a time")
    parser.add_argument(
        "--runs", default="", help="folder of models (default: runs/claims/PROFILE)"
    )
    parser.add_argument("--output", default="", help="folder of tables (default: claims/PROFILE)")
    parser.add_argument(
        "--no-tables", action="store_true", help="run jobs, and leave the tables to a later command"
    )
    parser.add_argument(
        "--configs",
        default=str(ROOT / "configs" / "claims"),
        help="folder with PROFILE.toml",
    )
    parser.add_argument(
        "--list", action="store_true", dest="is_list", help="list claims and jobs, and run nothing"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="override a setting of PROFILE.toml for all trainings",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run what is not finished, and write the tables.

    Returns:
        0, or 1 if a job failed.
    """
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: must be 1 or more")
    place = _place(arguments)
    jobs = jobs_named(list(place.jobs.values()), arguments.only)
    if arguments.is_list:
        _list(jobs)
        return 0
    _open_folder(place)
    failed: list[str] = []
    if arguments.workers == 1:
        for job in jobs:
            run_job(job, place)
    else:
        environment = arguments.environment
        failed = run_side_by_side(jobs, arguments.workers, _words(arguments), place, environment)
    if not arguments.no_tables:
        _write_tables(arguments, place)
    if failed:
        console.print(f"not finished: {', '.join(failed)}; run the same command again to continue")
    return FAILED if failed else 0


def _place(arguments: argparse.Namespace) -> Place:
    """Return where the jobs run, with the text that was asked for."""
    known = PROFILES[arguments.profile]
    text = {**vars(known.text), "source": arguments.text}
    profile = Profile(known.name, type(known.text)(**text), known.adapting, known.decides)
    folder = Path(arguments.runs or f"runs/claims/{profile.name}")
    file, overrides = Path(arguments.configs, f"{profile.name}.toml"), tuple(arguments.overrides)
    place = Place(folder, file, overrides, profile, {})
    jobs = {job.name: job for job in all_jobs(place.config.train.seqlen)}
    return Place(folder, file, overrides, profile, jobs)


def _open_folder(place: Place) -> None:
    """Write the text and job.json; raise ValueError if the folder holds models of other settings.

    Text that cannot be read leaves no job behind: another one may be given for the same folder.
    """
    file = place.folder / "job.json"
    job = {"config": dump(place.config), "text": vars(place.profile.text)}
    job |= {"adapting": list(place.profile.adapting)}
    if file.exists():
        if read_json(file, "remove the folder") != job:
            raise ValueError(
                f"{place.folder} holds models of other settings or text; name another --runs, or "
                "remove the folder"
            )
        if (place.folder / TEXT).exists():
            # Jobs side by side open the folder at the same time: only the first writes.
            return
    write_text(place.folder / TEXT, place.profile.text)
    write_file(file, json.dumps(job, indent=1) + "\n")


def _words(arguments: argparse.Namespace) -> list[str]:
    """Return the command that was given, without the jobs and their number at a time."""
    words = ["claims", "--profile", arguments.profile]
    if arguments.text != STDLIB:
        words += ["--text", arguments.text]
    if arguments.runs:
        words += ["--runs", arguments.runs]
    if Path(arguments.configs) != ROOT / "configs" / "claims":
        words += ["--configs", arguments.configs]
    return [*words, *arguments.overrides]


def _write_tables(arguments: argparse.Namespace, place: Place) -> None:
    default = (
        place.folder / "results" if place.profile.name == QUICK else f"claims/{arguments.profile}"
    )
    folder = Path(arguments.output or default)
    config = place.config
    measured = read_measured(place.folder, place.profile, config, list(place.jobs.values()))
    command = shlex.join(["lcdist", *_words(arguments)])
    known = facts(command, config.train.seed, ROOT)
    timings = tensorized_times(ROOT / "kernels" / "bench" / "results")
    verdicts = write_results(folder, CLAIMS, measured, known, timings)
    for claim in CLAIMS:
        verdict = verdicts[claim.name]
        console.print(f"{claim.name}: {verdict.word}: {verdict.why}", soft_wrap=True)
    counts = Counter(verdict.word for verdict in verdicts.values())
    console.print(", ".join(f"{count} {word}" for word, count in counts.items()))
    console.print(f"tables and plots: {folder}/README.md")


def _list(jobs: list) -> None:
    """Print jobs with their readings, and claims with the readings that they need."""
    for job in jobs:
        console.print(f"{job.name}: {', '.join(read.name for read in job.reads)}", soft_wrap=True)
    for claim in CLAIMS:
        console.print(f"{claim.name}: {claim.sentence}", soft_wrap=True)
