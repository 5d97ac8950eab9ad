"""Tables of the profiled steps for the report."""

from typing import Any

from lcdist.report.html import Table
from lcdist.report.run_facts import RunFolder
from lcdist.rundir.profile import (
    KERNEL_HEAD,
    MEMORY_HEAD,
    PROFILE_FOLDER,
    kernel_cells,
    memory_cells,
    profile_name,
    profile_title,
)

MOST_ROWS = 30
MOST_PLACES = 10


def profile_sections(run: RunFolder) -> list[dict[str, Any]]:
    """Return title, folder and both tables of every profile of the run, in order."""
    sections = []
    for stage in run.stages:
        for profile in stage.profiles:
            title = profile_title(profile)
            name = profile_name(profile.first, profile.last, profile.rank)
            stage_folder = f"{stage.name}/" if len(run.stages) > 1 else ""
            sections.append(
                {
                    "stage": stage.name if len(run.stages) > 1 else "",
                    "title": title[0].upper() + title[1:],
                    "folder": f"{stage_folder}{PROFILE_FOLDER}/{name}",
                    "on_gpu": profile.device == "cuda",
                    "kernels": Table(KERNEL_HEAD, kernel_cells(profile, MOST_ROWS)),
                    "peak": f"{profile.peak_bytes / 2**20:,.1f} MiB",
                    "memory": Table(MEMORY_HEAD, memory_cells(profile, MOST_PLACES)),
                }
            )
    return sections
