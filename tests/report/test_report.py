"""The report: its facts, its page without external resources, and its errors."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lcdist.report.sections import report_facts, write_report
from lcdist.rundir.header import RunHeader, record_start
from lcdist.rundir.records import StepRecord, StepTime

SAMPLE = 'print("a < b") & <script>alert(1)</script>'
EVALUATION = {
    "lengths": [512, 1024, 4096, 8192],
    "before": [18.25, None, 1830.0, math.inf],
    "after": [17.5, 14.5, 12.375, 15.5],
    "attention": "method",
    "tokens": 65536,
    "before_label": "before",
    "after_label": "after <extension>",
}


def make_stage(folder: Path, seqlen: int, steps: int, clock: random.Random, resumed_at: int = 0):
    """Write a run folder; losses depend on the step alone, times and memory on `clock`."""
    folder.mkdir(parents=True)
    header = RunHeader(
        plan={"mesh": {"cp_size": 2, "tp_size": 1}, "layout": "zigzag", "parameters": 3_412_992},
        device="a <device>",
        peak=None,
        world_size=2,
        versions={"torch": "2.13.0"},
    )
    record_start(folder, header, 0, "new run")
    if resumed_at:
        record_start(folder, header, resumed_at, "resumed")
    lines = []
    for step in range(1, steps + 1):
        seconds = clock.uniform(0.5, 1.5)
        record = StepRecord(
            step=step,
            samples=2 * step,
            tokens=2 * seqlen,
            loss=math.nan if step == 3 else 2 + 6 / step,
            grad_norm=1 / step,
            lr=1e-3 * step / steps,
            tokens_per_second=2 * seqlen / seconds,
            mfu_full=None,
            mfu_causal=None,
            memory_bytes=clock.randrange(10**8, 10**9),
            exchange_bytes={"ring": 3 * 2**20},
            time=StepTime(
                step=seconds, data=0.01, forward_backward=0.8 * seconds, optimizer=0.05 * seconds
            ),
            wall=clock.uniform(1e9, 2e9),
        )
        lines.append(record.to_json() + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.toml").write_text(f"[train]\nseqlen = {seqlen}  # <b>\n")


@pytest.fixture(scope="module")
def pristine_job(tmp_path_factory) -> Path:
    """Write a run of two stages, of which the second was resumed, and its report."""
    folder = tmp_path_factory.mktemp("job") / "a & b"
    clock = random.Random(5)
    make_stage(folder / "pretrain", 512, 40, clock)
    make_stage(folder / "extend", 4096, 10, clock, resumed_at=6)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "sample.txt").write_text(SAMPLE)
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def main_job(pristine_job, tmp_path) -> Path:
    """Return a copy of `pristine_job` without a report, which a test may change."""
    folder = tmp_path / "a & b"
    shutil.copytree(pristine_job, folder, ignore=shutil.ignore_patterns("report.html"))
    return folder


@pytest.fixture(scope="module")
def page(pristine_job) -> str:
    return (pristine_job / "report.html").read_text()


class Resources(HTMLParser):
    """Collect all tags, ids and the addresses that a browser would load by itself."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.unnamed = 0
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag == "svg":
            self.unnamed += not given.get("aria-label") or given.get("role") != "img"


def test_facts_equal_the_files(main_job):
    facts = report_facts(main_job)
    assert facts["tokens"] == 40 * 2 * 512 + 10 * 2 * 4096
    assert facts["headline"] == {"length": 4096, "before": 1830.0, "after": 12.375}
    assert [stage["name"] for stage in facts["stages"]] == ["pretrain", "extend"]
    extend = facts["stages"][1]
    assert (extend["seqlen"], extend["steps"], extend["samples"]) == (4096, 10, 20)
    assert extend["loss"][:3] == [8.0, 5.0, None] and extend["last_loss"] == 2.6
    assert extend["exchange_bytes"] == {"ring": 3 * 2**20}
    assert facts["sample"] == SAMPLE
    json.dumps(facts, allow_nan=False)


def test_a_resumed_run_has_the_same_facts(main_job, tmp_path):
    other = tmp_path / "other"
    clock = random.Random(6)
    make_stage(other / "pretrain", 512, 40, clock, resumed_at=11)
    make_stage(other / "extend", 4096, 10, clock)
    shutil.copy(main_job / "evaluation.json", other)
    shutil.copy(main_job / "sample.txt", other)
    assert report_facts(other) == report_facts(main_job)


def test_the_page_shows_headline_and_resumes(page):
    assert "from <b>1,830</b> (before) to <b>12.4</b> (after &lt;extension&gt;)" in page
    assert "extend after step 6" in page
    assert "attention = method" in page
    for words in ("tokens per second", "Peak memory", "Learning rate", "3.0 MiB", "mesh.cp size"):
        assert words in page


def test_the_page_has_no_external_resources(page):
    found = Resources(page)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert all(address.startswith("#") for address in found.addresses)
    assert not {"script", "link", "iframe", "object", "img"} & set(found.tags)


def test_figures_have_alternative_text_and_unique_ids(page):
    found = Resources(page)
    assert found.tags.count("svg") == 6 and found.unnamed == 0
    assert len(set(found.ids)) == len(found.ids)
    assert {address[1:] for address in found.addresses} <= set(found.ids)


def test_text_from_files_is_escaped(page):
    assert "<title>a &amp; b:" in page and "a &lt;device&gt;" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "# &lt;b&gt;" in page
    assert "<script" not in page and "<device>" not in page and "<extension>" not in page


def test_the_same_folder_gives_the_same_page(main_job, page, tmp_path):
    assert write_report(main_job, tmp_path / "again.html").read_text() == page


def test_a_single_run_has_a_report(tmp_path):
    folder = tmp_path / "one"
    make_stage(folder, 512, 1, random.Random(1))
    text = write_report(folder).read_text()
    facts = report_facts(folder)
    assert facts["headline"] is None and facts["evaluation"] is None and facts["sample"] is None
    assert "has not been evaluated" in text and "trained at 512 tokens" in text


def test_a_diverged_run_has_a_report(tmp_path):
    folder = tmp_path / "one"
    make_stage(folder, 512, 30, random.Random(1))
    path = folder / "metrics.jsonl"
    path.write_text(re.sub(r'"(loss|grad_norm)": [^,]+', r'"\1": null', path.read_text()))
    assert report_facts(folder)["stages"][0]["last_loss"] is None
    text = write_report(folder).read_text()
    assert "from – to –" in text and not re.search(r"\bnan\b", text)


def test_the_headline_uses_the_longest_length_if_the_trained_one_is_missing(main_job):
    table = EVALUATION | {"lengths": [512, 1024, 2048, 8192]}
    (main_job / "evaluation.json").write_text(json.dumps(table))
    assert report_facts(main_job)["headline"] == {"length": 8192, "before": None, "after": 15.5}
    assert "from <b>–</b>" in write_report(main_job).read_text()


def break_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().split("\n")
    lines[number - 1] = text
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "line", "text", "message"),
    [
        ("extend/metrics.jsonl", 4, "{", r"extend/metrics\.jsonl:4: not a record of a step"),
        ("extend/run.json", 2, "oops", r"extend/run\.json:2: not JSON"),
        ("extend/config.toml", 2, "seqlen = ", r"extend/config\.toml: not TOML .*line 2"),
        ("extend/config.toml", 2, "", r"extend/config\.toml: key train\.seqlen is missing"),
        ("evaluation.json", 1, "{\n\n,", r"evaluation\.json:3: not JSON"),
        ("evaluation.json", 1, "{}", r"evaluation\.json: key 'lengths' is missing"),
        (
            "evaluation.json",
            1,
            json.dumps(EVALUATION | {"after": [1.0]}),
            r"evaluation\.json: after has 1 entries for 4 lengths",
        ),
        (
            "evaluation.json",
            1,
            json.dumps(EVALUATION | {"before": ["1", 2, 3, 4]}),
            r"evaluation\.json: before = .*: expected a list of a number or null",
        ),
    ],
)
def test_an_invalid_file_raises_and_nothing_is_written(main_job, name, line, text, message):
    break_line(main_job / name, line, text)
    with pytest.raises(ValueError, match=message):
        write_report(main_job)
    assert not (main_job / "report.html").exists()


@pytest.mark.parametrize("name", ["extend/run.json", "pretrain/config.toml"])
def test_a_missing_file_raises(main_job, name):
    (main_job / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        write_report(main_job)


def test_a_folder_without_a_run_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)


def test_a_run_without_a_step_raises(main_job):
    (main_job / "extend" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"extend/metrics\.jsonl:1: no step"):
        write_report(main_job)


def test_importing_the_report_loads_no_heavy_library():
    program = (
        "import sys, lcdist.report.sections\n"
        "print([m for m in ('torch', 'megatron', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_conversion_is_listed(main_job):
    conversion = {
        "source": "model <x>",
        "seqlen": 4096,
        "rotation": ["none", "yarn"],
        "trained": "all weights",
        "exported": "logits differ by 1e-6",
    }
    (main_job / "conversion.json").write_text(json.dumps(conversion))
    text = write_report(main_job).read_text()
    assert "The model <b>model &lt;x&gt;</b> was pretrained at 512 tokens" in text
    assert "made for 4,096 tokens" in text and "logits differ by 1e-6" in text
