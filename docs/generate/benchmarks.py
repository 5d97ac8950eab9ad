"""Make tables of the measured rows: each with its machine, date and commit."""

import re
from collections.abc import Iterable, Sequence

from docs.generate.rows import (
    LIBRARY,
    PRESETS,
    RESULTS,
    Preset,
    Row,
    crossover,
    read,
    run_of,
    timed,
)
from docs.generate.tables import code, markdown_table

SHORT, LONG = 32768, 131072
UNMEASURED = "unmeasured"
RUN = ("gpu", "date", "commit", "torch", "triton")
# What rows of one measurement on a CPU have in common.
CPU_RUN = ("device", "date", "commit", "torch")


def gpu_summary() -> str:
    """Return the latest times of each method at two lengths, and what they were measured on."""
    rows = [("torch's own (cuDNN)", *_cells(LIBRARY))]
    rows += [(preset.label, *_cells(preset)) for preset in PRESETS]
    head = ["method"]
    for length in (SHORT, LONG):
        head += [f"{length // 1024}k {way}" for way in ("forward", "backward")]
    used = [row for preset in (LIBRARY, *PRESETS) for row in timed(preset).values()]
    shapes = dict.fromkeys(
        f"{row['nheads']} query heads and {row['nheads_kv']} key heads of {row['head_dim']}, "
        f"{row['dtype']}"
        for row in used
    )
    return f"{run_of(used)}. {'; '.join(shapes)}.\n\n{markdown_table(head, rows)}"


def _cells(preset: Preset) -> list[str]:
    """Return milliseconds and TFLOP/s of both passes at both lengths."""
    rows = timed(preset)
    cells = []
    for length in (SHORT, LONG):
        row = rows.get(length)
        for way in ("fwd", "bwd"):
            cells.append(UNMEASURED if row is None else _time(row, way))
    return cells


def _time(row: Row, way: str) -> str:
    milliseconds, rate = float(row[f"{way}_ms"]), float(row[f"{way}_tflops"])
    return f"{significant(milliseconds)} ms ({rate:.0f})"


def significant(value: float) -> str:
    """Return a number with three digits, or more before the point."""
    return f"{value:#.3g}".removesuffix(".") if value < 1000 else f"{value:,.0f}"


def crossovers() -> str:
    """Return each method's share of the fastest dense library's time, and where it is faster."""
    return crossover.table(RESULTS)


def gpu_runs() -> str:
    """Return all rows of GPUs: a table for each machine, date and commit, the newest first."""
    rows = [row for name in crossover.METHODS for row in read(f"{name}.csv")]
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[key] for key in RUN), []).append(row)
    newest = sorted(runs, key=lambda run: run[RUN.index("date")], reverse=True)
    return "\n\n".join(_gpu_run(runs[run]) for run in newest)


def _gpu_run(rows: Sequence[Row]) -> str:
    first = rows[0]
    head = ("contender", "tokens", "head_dim", "forward, ms", "backward, ms", "TFLOP/s", "peak MiB")
    head += ("error", "note")
    cells = [
        (
            code(row["contender"]),
            f"{int(row['seqlen']):,}",
            row["head_dim"],
            row["fwd_ms"] or UNMEASURED,
            row["bwd_ms"] or UNMEASURED,
            f"{row['fwd_tflops']} / {row['bwd_tflops']}" if row["fwd_tflops"] else "",
            row["peak_mib"],
            row["error"],
            row["note"],
        )
        for row in rows
    ]
    title = f"### {first['gpu']}, {first['date']}, commit {first['commit']}\n\n"
    return title + f"{run_of([first])}.\n\n" + markdown_table(head, cells, numbers=range(1, 8))


def training_on_a_gpu() -> str:
    """Return the tokens a second of a training step, from the text that the run wrote."""
    text = (RESULTS / "training_1b_16k.txt").read_text(encoding="utf-8")
    above, _, below = text.partition("\n\n")
    found = re.findall(r"^(\w+) +(\d+) tokens/s +([\d.]+) ms a step +([\d.]+) GiB$", below, re.M)
    rows = [(code(name), f"{int(rate):,}", ms, gib) for name, rate, ms, gib in found]
    table = markdown_table(("method", "tokens/s", "ms a step", "peak GiB"), rows, (1, 2, 3))
    return f"{' '.join(above.split())}\n\n{table}"


def methods_on_a_cpu() -> str:
    """Return each method's time as a multiple of torch's own full attention, by length."""
    rows = _latest(read("methods.csv"), ("contender", "seqlen", "processes"))
    cells = {(row["contender"], row["processes"], int(row["seqlen"])): row for row in rows}
    lengths = sorted({length for _, _, length in cells})
    ways = [(processes, length) for processes in ("1", "2") for length in lengths]
    head = ["contender"]
    head += [f"{n // 1024}k" + (", cp 2" if processes == "2" else "") for processes, n in ways]
    table = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        found = [cells.get((name, *way)) for way in ways]
        last = cells.get((name, "1", lengths[-1]))
        ratios = [f"{float(row['over_torch']):.2f}" if row else "" for row in found]
        extra = f"{float(last['extra_mib']):,.0f}" if last else ""
        table.append((code(name), *ratios, extra))
    head.append(f"extra MiB at {lengths[-1] // 1024}k")
    shape = f"{rows[0]['nheads']} heads of {rows[0]['head_dim']}, {rows[0]['dtype']}"
    return f"{_machines(rows)}. {shape}.\n\n" + markdown_table(head, table, range(1, len(head)))


def cpu_rows(name: str, group: Sequence[str], columns: Sequence[str]) -> str:
    """Return columns of the latest rows of a file of results.

    Args:
        name: The file.
        group: Columns whose values tell rows of one measurement apart.
        columns: Columns to show.
    """
    rows = _latest(read(name), group)
    head = [column.replace("_", " ") for column in columns]
    numbers = [i for i, column in enumerate(columns) if _is_number(rows[0][column])]
    table = markdown_table(head, [[row[column] for column in columns] for row in rows], numbers)
    return f"{_machines(rows)}.\n\n{table}"


def training_on_a_cpu() -> str:
    """Return the speed of a training step beside a plain PyTorch loop."""
    columns = ("contender", "seqlen", "step_ms", "tokens_per_second", "against_plain")
    return cpu_rows("training.csv", ("contender", "seqlen"), (*columns, "peak_mib_a_rank"))


def loss_on_a_cpu() -> str:
    """Return time and memory of the loss by chunks."""
    columns = ("contender", "tokens", "vocabulary", "cpu_ms", "over_megatron", "extra_mib")
    return cpu_rows("loss.csv", ("contender",), columns)


def mlp_on_a_cpu() -> str:
    """Return time and memory of an MLP by tiles."""
    columns = ("contender", "tokens", "hidden_size", "ffn_hidden_size", "cpu_ms", "over_whole")
    return cpu_rows("memory.csv", ("contender",), (*columns, "extra_mib"))


def startup_on_a_cpu() -> str:
    """Return the CPU time of commands that do nothing but start."""
    return cpu_rows("startup.csv", ("command",), ("command", "cpu_s"))


def saves_on_a_cpu() -> str:
    """Return the time of saves and of the parts of a resumption."""
    return cpu_rows("save.csv", ("part", "name"), ("part", "name", "seconds", "megabytes", "ratio"))


def _latest(rows: Sequence[Row], group: Sequence[str]) -> list[Row]:
    """Return the last of the rows that measured the same thing, in their order."""
    return list({tuple(row[key] for key in group): row for row in rows}.values())


def _machines(rows: Iterable[Row]) -> str:
    """Return machine, date and commit of rows, each once."""
    found = dict.fromkeys(
        ", ".join(
            f"commit {row[key]}"
            if key == "commit"
            else f"torch {row[key]}"
            if key == "torch"
            else row[key]
            for key in CPU_RUN
            if row.get(key)
        )
        for row in rows
    )
    return "; ".join(found)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[\d.]*", cell) is not None
