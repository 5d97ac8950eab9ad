"""Plot TFLOP/s and milliseconds over length from the CSVs, one picture for each method.

    python kernels/bench/plot.py [FOLDER]

<FOLDER>/<method>.png shows only the latest rows, those of one GPU, date and commit: a line for each
contender, a row of panels for each head_dim. Rows without a time are left out.
"""

import sys
from pathlib import Path

import matplotlib
from goals import METHODS, Row, latest, read
from harness import RESULTS
from matplotlib import pyplot
from matplotlib.axes import Axes

PANELS = [
    ("fwd_tflops", "forward, TFLOP/s"),
    ("bwd_tflops", "backward, TFLOP/s"),
    ("fwd_ms", "forward, ms"),
    ("bwd_ms", "backward, ms"),
]
OURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
RIVALS = ("#000000", "#7f7f7f", "#8c564b", "#9467bd", "#bcbd22", "#17becf", "#aec7e8", "#c49c94")


def draw(method: str, rows: list[Row], file: Path) -> None:
    """Draw all panels of one method. rows: as `latest` returns them, at least one."""
    head_dims = sorted({int(row["head_dim"]) for row in rows})
    names = list(dict.fromkeys(row["contender"] for row in rows))
    names.sort(key=lambda name: not name.startswith("lcdist"))
    styles = styles_of(names)
    width, height = 4.6 * len(PANELS), 3.6 * len(head_dims) + 1.6
    figure, axes = pyplot.subplots(
        len(head_dims), len(PANELS), squeeze=False, figsize=(width, height), layout="constrained"
    )
    for line, head_dim in zip(axes, head_dims, strict=True):
        own = [row for row in rows if int(row["head_dim"]) == head_dim]
        for panel, (column, title) in zip(line, PANELS, strict=True):
            for name in names:
                points = sorted(
                    (int(row["seqlen"]), float(row[column]))
                    for row in own
                    if row["contender"] == name and row[column]
                )
                if points:
                    panel.plot(*zip(*points, strict=True), label=name, **styles[name])
            dress(panel, column, f"{title}, d {head_dim}", {int(row["seqlen"]) for row in own})
    one = rows[-1]
    heads = f"{one['nheads']}:{one['nheads_kv']} heads, {one['dtype']}"
    figure.suptitle(
        f"{method} attention: {one['gpu']}, {one['date']}, commit {one['commit']}\n"
        f"{heads}, torch {one['torch']}, triton {one['triton']}; "
        "TFLOP/s over the scores that the operator touches",
        fontsize=13,
    )
    handles = {
        label: handle
        for panel in axes.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [name for name in names if name in handles]
    figure.legend(
        [handles[name] for name in shown], shown, loc="outside lower center", ncols=4, fontsize=11
    )
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def styles_of(names: list[str]) -> dict[str, dict]:
    """Return line styles: ours solid, rivals dashed, with the colour of the same computation.

    names: ours first.
    """
    styles: dict[str, dict] = {}
    ours = [name for name in names if name.startswith("lcdist")]
    others = [name for name in names if name not in ours]
    for name in names:
        own = name in ours
        twin = styles.get(f"lcdist {name.partition(' ')[2]}")
        colours, number = (OURS, ours.index(name)) if own else (RIVALS, others.index(name))
        styles[name] = {
            "color": twin["color"] if twin else colours[number % len(colours)],
            "linestyle": "-" if own else "--",
            "marker": "o" if own else "s",
            "linewidth": 2.2 if own else 1.4,
            "markersize": 5 if own else 4,
        }
    return styles


def dress(panel: Axes, column: str, title: str, seqlens: set[int]) -> None:
    """Label the axes: lengths in k, rates from 0, times by powers of ten."""
    panel.set_title(title, fontsize=11)
    panel.set_xscale("log", base=2)
    ticks = sorted(seqlens)
    labels = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks]
    panel.set_xticks(ticks, labels)
    panel.minorticks_off()
    panel.set_xlabel("tokens")
    if column.endswith("_ms"):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.grid(True, alpha=0.3)


def main() -> int:
    """Draw a picture for every CSV that has a timed row."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    matplotlib.use("agg")
    for method in METHODS:
        if rows := latest(read(folder / f"{method}.csv")):
            draw(method, rows, folder / f"{method}.png")
            print(folder / f"{method}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
