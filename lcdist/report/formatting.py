"""The bricks of the report's page: its style sheet, its tables, and numbers as people read them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

CSS = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", "Liberation Sans", Helvetica, Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Liberation Mono", Menlo, Consolas, monospace;
  --paper: #fcfcfa; --card: #f3f3ef; --ink: #1c1e21; --muted: #5e646c; --grid: #e2e2dc;
  --first: #b4540a; --second: #1f66ad; --third: #2c7d5b; --fourth: #8b8f96;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1f2226; --ink: #e7e8ea; --muted: #a2a8b0; --grid: #31353b;
    --first: #f0a35e; --second: #6fb1ee; --third: #69c09a; --fourth: #737982;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 46rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.6 var(--sans);
}
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.75rem; line-height: 1.3; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
p { margin: 0.75rem 0; }
.lead { font-size: 1.125rem; }
.note, figcaption, .byline { color: var(--muted); font-size: 0.875rem; line-height: 1.5; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.5rem 0; padding: 0; }
.tiles div { flex: 1 1 auto; background: var(--card); border-radius: 0.5rem;
  padding: 0.75rem 1rem; }
.tiles dt { color: var(--muted); font-size: 0.8125rem; line-height: 1.35; }
.tiles dd { margin: 0.25rem 0 0; font-size: 1.375rem; font-weight: 600; line-height: 1.25;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.375rem 0 0.375rem 1rem;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.bar { width: 45%; }
.split { display: flex; height: 0.875rem; border-radius: 0.25rem; overflow: hidden; }
.key { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 0.15em;
  margin: 0 0.35em 0 0; }
.legend span + span { margin-left: 1.25rem; }
pre { background: var(--card); border-radius: 0.5rem; padding: 0.875rem 1rem; margin: 0.75rem 0;
  overflow-x: auto; font: 0.8125rem/1.5 var(--mono); }
pre.prose { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26rem; overflow-y: auto; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; font-weight: 500; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document; `body` is HTML, `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """Headline numbers side by side, each a label and a value."""
    cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells; the first column names the rows."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def conversion(found: Mapping[str, Any]) -> list[str]:
    """Where the model came from, what was changed, and how each conversion compared."""
    before, after = found["rotation"]
    said = {
        "model": f"{found['source']}, made for {found['seqlen']:,} tokens",
        "rotation": f"{before} \N{RIGHTWARDS ARROW} {after}",
        "trained": found["trained"],
        "import": found.get("model"),
        "import, with a row for landmarks": found.get("grown"),
        "export": found.get("exported"),
    }
    rows = [(what, str(value)) for what, value in said.items() if value]
    return ["<h2>Where it came from and went to</h2>", table(("", "what"), rows)]


def figure(svg: str, caption: str) -> str:
    """A figure (an `<svg>` element) over its caption (text)."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def split_bars(parts: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    """For each row, how a whole divides into `parts`: a bar, and the same as percentages."""
    colours = [f"var(--{name})" for name in ("second", "first", "third", "fourth")]
    keys = "".join(
        f'<span><i class="key" style="background:{colour}"></i>{escape(part)}</span>'
        for part, colour in zip(parts, colours, strict=True)
    )
    lines = []
    for name, values in rows.items():
        whole = sum(values)
        shares = [100 * value / whole if whole > 0 else 0.0 for value in values]
        bar = "".join(
            f'<span style="width:{share:.2f}%;background:{colour}"></span>'
            for share, colour in zip(shares, colours, strict=True)
        )
        cells = "".join(f"<td>{share:.1f}%</td>" for share in shares)
        lines.append(
            f'<tr><td>{escape(name)}</td><td class="bar" aria-hidden="true">'
            f'<div class="split">{bar}</div></td>{cells}</tr>'
        )
    head = "".join(f'<th scope="col">{escape(part)}</th>' for part in parts)
    return (
        f'<p class="note legend" aria-hidden="true">{keys}</p><div class="scroll"><table><thead>'
        f'<tr><th scope="col">stage</th><th aria-hidden="true"></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(label: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{escape(label)}</summary><pre>{escape(text)}</pre></details>"


def number(value: float | None) -> str:
    """A number to three figures with thousands marked; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"


def amount(value: float) -> str:
    """A count with a decimal prefix: 4.19 M, 812 k."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes with a binary prefix: 1.5 GiB, 12 KiB."""
    for unit, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.1f} {prefix}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of nested tables, names joined by dots, values as text."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(_plain(entry) for entry in value) or "none"))
        else:
            rows.append((name, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)
