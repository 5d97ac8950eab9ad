"""A user's mistake, or a damaged file, ends in one `error:` line that names it: never a traceback.

Each case changes a copy of one short run, or makes a mistake in a command, and calls `main`.
"""

import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcdist.commands.main import main
from lcdist.config import dump
from tests.model.small import small

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with text, tokens, a configuration and a run of two steps."""
    home = tmp_path_factory.mktemp("home")
    text = home / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text("some words to read, and more of them. " * 20)
    words = ["tokenize", str(text), str(home / "data"), "--tokenizer", "bytes", "--workers", "1"]
    assert main([*words, "--valid-fraction", "0.3"]) == 0
    settings = ["model.vocab_size=258", "data.source=tokens", "data.path=data"]
    settings += ["model.num_layers=1", "train.seqlen=32", "train.steps=2", "optim.warmup_steps=0"]
    settings += ["evaluate.lengths=[16]", "evaluate.tokens=32", "train.global_batch_size=1"]
    (home / "run.toml").write_text(dump(small(*settings, "log.folder=run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "run.toml"]) == 0
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """Return a copy of the run, and make it the current folder: paths in it are relative."""
    copy = tmp_path / "home"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    return copy


class NoRoom:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "NoRoom":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def full_disk(patch: Patch, name: str) -> None:
    """Let nothing be written to files whose path ends in `name`."""
    real: Callable = open

    def opened(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = real(path, mode, *more, **options)
        return NoRoom(file) if str(path).endswith(name) and set(mode) & set("wax+") else file

    patch.setattr("builtins.open", opened)
    patch.setattr("io.open", opened)


def refuse(patch: Patch, owner: Any, name: str, part: str, number: int) -> None:
    """Let a function of paths fail for paths that contain `part`; root may do everything else."""
    real = getattr(owner, name)

    def called(path: Any, *more: Any, **options: Any) -> Any:
        if part in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **options)

    patch.setattr(owner, name, called)


def put(path: Path, content: Any) -> None:
    """Write text, bytes, or a value as JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def zero(path: Path) -> None:
    """Leave zeros in a file, as a power cut does."""
    path.write_bytes(bytes(path.stat().st_size))


def edited(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text())
    put(path, table | changes)


DEEP = "[" * 100000
HUGE = 10**400


def step(home: Path) -> Path:
    return home / "run" / "checkpoints" / "step_00000002"


def dangling(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("nowhere"))


def in_place_of(path: Path, content: str = "a file") -> None:
    """Put a file where a folder is, or a folder where a file is."""
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text(content)
    else:
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)


def record_with(home: Path, **changes: Any) -> None:
    file = home / "run" / "metrics.jsonl"
    line = json.loads(file.read_text().splitlines()[-1])
    put(file, json.dumps(line | changes) + "\n")


Prepare = Callable[[Path, Patch], object]


def nothing(home: Path, patch: Patch) -> None:
    pass


# Command, what is done before, and what the last line must contain. {} is the folder of the case.
CASES: dict[str, tuple[str, Prepare, str]] = {}


def case(name: str, command: str, prepare: Prepare, message: str) -> None:
    assert name not in CASES
    CASES[name] = (command, prepare, message)


TRAIN = "train {}/run.toml train.steps=3"
RESTART = "train {}/run.toml log.folder={}/new"
STATUS, REPORT = "status {}/run", "report {}/run"
EVALUATE = "evaluate {}/run"
GENERATE = "generate {}/run --prompt some --max-new-tokens 2"
TOKENIZE = "tokenize {}/text {}/out --tokenizer bytes --workers 1"

# --- configuration and plan -----------------------------------------------------------------------
case("no file", "plan {}/nowhere.toml", nothing, "nowhere.toml: No such file")
case("a folder", "plan {}/run", nothing, "Is a directory")
case(
    "deep toml", "plan {}/a.toml", lambda h, p: put(h / "a.toml", f"a = {DEEP}"), "nested too deep"
)
case("large toml", "plan {}/a.toml", lambda h, p: put(h / "a.toml", "#" * 2**21), "more than 1,048")
case("no lengths", "plan {}/run.toml evaluate.lengths=[]", nothing, "evaluate.lengths = []: name")
case(
    "huge world",
    "plan {}/run.toml --world-size 1" + "0" * 30,
    nothing,
    "world size 1000000000.*at most 131,072",
)
case("no world", "plan {}/run.toml --world-size 0", nothing, "world size 0")
case(
    "many nodes",
    "run-folder 1" + "0" * 30 + " -1 {}/run.toml",
    nothing,
    "nodes and ranks on a node",
)
case("no nodes", "run-folder 0 8 {}/run.toml", nothing, "run-folder 0 8: nodes")
# --- run folder -----------------------------------------------------------------------------------
case("run is a file", TRAIN, lambda h, p: in_place_of(h / "run"), "log.folder = '.*run'.*file")
case("run dangles", TRAIN, lambda h, p: dangling(h / "run"), "log.folder = '.*run'.*link")
case("under a file", RESTART.replace("new", "run.toml/a"), nothing, "log.folder = .*directory")
case("empty folder", "train {}/run.toml log.folder=", nothing, "log.folder = '': name a folder")
case("root folder", "train {}/run.toml log.folder=/", nothing, "log.folder = '/': is the root")
case("long name", RESTART + "x" * 300, nothing, "log.folder = .* 303 bytes")
case(
    "read-only folder",
    RESTART,
    lambda h, p: refuse(p, os, "mkdir", "/new", errno.EROFS),
    "log.folder = '.*new'.*Read-only file system",
)
case(
    "forbidden folder",
    TRAIN,
    lambda h, p: refuse(p, io, "open", "run/.config.toml.part", errno.EACCES),
    "config.toml.*: Permission denied",
)
case("latest is bytes", TRAIN, lambda h, p: put(step(h).parent / "latest", b"\xff\0"), "latest")
case("latest is zeros", TRAIN, lambda h, p: zero(step(h).parent / "latest"), "latest")
case("latest is empty", TRAIN, lambda h, p: put(step(h).parent / "latest", ""), "latest")
case("latest is long", TRAIN, lambda h, p: put(step(h).parent / "latest", "x" * 999), "latest")
case("config of another", TRAIN, lambda h, p: put(h / "run" / "config.toml", "\0"), "config.toml")
case("no room, metrics", TRAIN, lambda h, p: full_disk(p, "metrics.jsonl"), "metrics.jsonl: No sp")
case("no room, latest", TRAIN, lambda h, p: full_disk(p, ".latest.part"), "latest: No space left")
case("no room, manifest", TRAIN, lambda h, p: full_disk(p, "lcdist.json.part"), "lcdist.json: No s")
case("no room, metadata", TRAIN, lambda h, p: full_disk(p, "metadata.tmp"), "step_0+3.*No space")
case("no room, pieces", TRAIN, lambda h, p: full_disk(p, ".distcp"), "step_0+3.*No space")
case("no room, status", TRAIN, lambda h, p: full_disk(p, ".status.json.part"), "status.json: No sp")
case("no room, header", TRAIN, lambda h, p: full_disk(p, ".run.json.part"), "run.json: No space")
# --- JSON that is read back -----------------------------------------------------------------------
for text in ("[]", "null", "{}", DEEP, "\0\0", "\xff"):
    shown = text[:8].encode().hex()
    for name in ("status.json", "run.json"):
        case(
            f"status, {name} {shown}",
            STATUS,
            lambda h, p, name=name, text=text: put(h / "run" / name, text.encode("latin-1")),
            f"run/{name}",
        )
    if text not in ("[]", DEEP):
        continue
    case(
        f"manifest {shown}",
        EVALUATE,
        lambda h, p, text=text: put(step(h) / "lcdist.json", text.encode("latin-1")),
        "lcdist.json",
    )
    case(
        f"meta {shown}",
        EVALUATE,
        lambda h, p, text=text: put(h / "data" / "meta.json", text.encode("latin-1")),
        "meta.json",
    )
for key, value in {
    "status": 3,
    "step": "two",
    "reason": {},
}.items():
    case(
        f"status {key}",
        STATUS,
        lambda h, p, key=key, value=value: edited(h / "run" / "status.json", **{key: value}),
        f"status.json: {key} = ",
    )
case(
    "status huge step",
    STATUS,
    lambda h, p: (h / "run" / "metrics.jsonl").unlink() or edited(h / "run/status.json", step=HUGE),
    "status.json: step = ",
)
for name, starts in {
    "a number": 3,
    "numbers": [3],
    "empty": [{}],
    "a time": [{"step": 0, "time": 7, "first_step_seconds": "x"}],
    "began": [{"step": 0, "time": "now", "began": "then"}],
    "seconds": [{"step": 0, "time": "now", "lost_seconds": "x", "lost_steps": 3}],
    "huge": [{"step": 0, "time": "now", "lost_seconds": 1e400, "lost_steps": 3}],
}.items():
    for command in (STATUS, REPORT) if name == "a time" else (STATUS,):
        case(
            f"{command[:6]} starts {name}",
            command,
            lambda h, p, starts=starts: edited(h / "run" / "run.json", starts=starts),
            "run.json",
        )
for name, changes in {
    "plan": {"plan": 3},
    "versions": {"versions": [1]},
    "peak": {"peak": {"flops": "fast"}},
    "peaks": {"peak": 4},
}.items():
    case(
        f"report {name}",
        REPORT,
        lambda h, p, changes=changes: edited(h / "run" / "run.json", **changes),
        "run.json",
    )
for name, changes in {
    "step": {"step": HUGE},
    "step text": {"step": "x"},
    "time": {"time": 3},
    "seconds": {"time": {"step": 1e400, "data": 0, "forward_backward": 0, "optimizer": 0}},
    "wall": {"wall": "x"},
    "huge wall": {"wall": HUGE},
    "tokens": {"tokens": HUGE},
    "ranks": {"ranks": [1]},
    "bytes": {"exchange_bytes": {"ring": "x"}},
    "memory": {"memory_bytes": -HUGE},
    "loss": {"loss": "x"},
}.items():
    for command in (REPORT,) if name in ("tokens", "memory") else (STATUS,):
        case(
            f"{command[:6]} line {name}",
            command,
            lambda h, p, changes=changes: record_with(h, **changes),
            "metrics.jsonl:1: not a record of a step",
        )
case(
    "metrics deep",
    STATUS,
    lambda h, p: put(h / "run/metrics.jsonl", DEEP + "\n"),
    "metrics.jsonl:1",
)
for name, value in {
    "a list": [],
    "null": None,
    "lengths": {"lengths": [None], "before": [1], "after": [1]},
    "texts": {"lengths": ["x"], "before": ["x"], "after": ["x"]},
    "huge": {"lengths": [16], "before": [HUGE], "after": [1]},
    "tokens": {"lengths": [16], "before": [2], "after": [1], "tokens": "many"},
    "deep": DEEP,
}.items():
    labels = {"attention": "full", "tokens": 1, "before_label": "a", "after_label": "b"}
    content = labels | value if isinstance(value, dict) else value
    case(
        f"evaluation {name}",
        REPORT,
        lambda h, p, content=content: put(h / "run" / "evaluation.json", content),
        "evaluation.json",
    )
for name, content in {
    "a list": [],
    "null": None,
    "types": {"source": 1, "seqlen": "x", "rotation": 3, "trained": None},
    "deep": DEEP,
}.items():
    case(
        f"conversion {name}",
        REPORT,
        lambda h, p, content=content: put(h / "run" / "conversion.json", content),
        "conversion.json",
    )
case("config of a run", REPORT, lambda h, p: put(h / "run/config.toml", "train = 3"), "config.toml")
case("deep config", REPORT, lambda h, p: put(h / "run/config.toml", f"a = {DEEP}"), "config.toml")
case(
    "sample", REPORT, lambda h, p: put(h / "run" / "sample.txt", b"\xff"), "sample.txt:1: not UTF-8"
)
for key, value in {"config": 3, "files": [1], "step": "x", "format": None, "loader": 7}.items():
    case(
        f"manifest {key}",
        TRAIN,
        lambda h, p, key=key, value=value: edited(step(h) / "lcdist.json", **{key: value}),
        "lcdist.json|step_00000002",
    )
case(
    "manifest toml",
    EVALUATE,
    lambda h, p: edited(step(h) / "lcdist.json", config="a = ["),
    "lcdist.json",
)
for key, value in {"tokens": 3, "files": [], "vocab_size": "x"}.items():
    case(
        f"meta {key}",
        TRAIN,
        lambda h, p, key=key, value=value: edited(h / "data" / "meta.json", **{key: value}),
        f"meta.json: {key} = ",
    )
# --- checkpoints ----------------------------------------------------------------------------------
for name in (".metadata", "common.pt", "__0_0.distcp"):
    for command in (EVALUATE, TRAIN):
        case(
            f"{command[:6]} zeros in {name}",
            command,
            lambda h, p, name=name: zero(step(h) / name),
            re.escape(name),
        )
case("no checkpoint", "evaluate {}/data", nothing, "holds no checkpoint")
case("a file as one", "evaluate {}/run.toml", nothing, "run.toml")
case("piece is a folder", EVALUATE, lambda h, p: in_place_of(step(h) / "__0_0.distcp"), "__0_0")
# --- evaluate and generate ------------------------------------------------------------------------
case("evaluate none", EVALUATE + " evaluate.lengths=[]", nothing, "evaluate.lengths = []: name")
case("long windows", EVALUATE + " evaluate.lengths=[9999999]", nothing, "evaluate.lengths")
case("output in a file", EVALUATE + " --output {}/run.toml/a", nothing, "run.toml/a: Not a direct")
case("output is a folder", GENERATE + " --output {}/run", nothing, "run: Is a directory")
for value in ("nan", "-1", "inf", "1e-320"):
    case(f"temperature {value}", f"{GENERATE} --temperature={value}", nothing, "--temperature")
case("seed", f"{GENERATE} --seed 1" + "0" * 27, nothing, "--seed")
case("negative seed", f"{GENERATE} --seed -99999999999999999999", nothing, "--seed")
case("few tokens", GENERATE.replace("tokens 2", "tokens -2"), nothing, "--max-new-tokens")
case(
    "many tokens", GENERATE.replace("tokens 2", "tokens 1" + "0" * 15), nothing, "--max-new-tokens"
)
case("not UTF-8", GENERATE.replace("some", "\udcff"), nothing, "--prompt")
# --- tokenize -------------------------------------------------------------------------------------
case("no text", TOKENIZE.replace("text", "nowhere"), nothing, "nowhere: no such file or folder")
case("out in a file", TOKENIZE.replace("out", "run.toml/a"), nothing, "run.toml")
case("out is a file", TOKENIZE.replace("{}/out", "{}/run.toml"), nothing, "run.toml")
case("long out", TOKENIZE.replace("out", "x" * 300), nothing, "File name too long")
case(
    "no room, tokens", TOKENIZE, lambda h, p: full_disk(p, "train.bin"), "train.bin: No space left"
)
case("no room, meta", TOKENIZE, lambda h, p: full_disk(p, "meta.json"), "meta.json: No space left")
case(
    "unreadable text",
    TOKENIZE,
    lambda h, p: refuse(p, sys.modules["builtins"], "open", "0.txt", errno.EACCES),
    "0.txt: Permission denied",
)
case("nan", f"{TOKENIZE} --valid-fraction nan", nothing, "valid_fraction = nan")
case("huge cut", f"{TOKENIZE} --document-bytes 1" + "0" * 30, nothing, "document_bytes = 1")
case("many workers", TOKENIZE.replace("workers 1", "workers -1"), nothing, "workers = -1")
case(
    "huge vocabulary",
    "tokenize {}/text {}/out --workers 1 --vocab-size 1" + "0" * 30,
    nothing,
    "vocab_size = 1000",
)
case(
    "many pieces",
    "tokenize {}/text {}/out --workers 1 --vocab-size 99999999",
    nothing,
    "vocab.size",
)
case("no tokenizer", TOKENIZE.replace("bytes", "{}/run.toml"), nothing, "run.toml")
case(
    "deep tokenizer",
    TOKENIZE.replace("bytes", "{}/a.json"),
    lambda h, p: put(h / "a.json", DEEP),
    "a.json",
)
# --- convert --------------------------------------------------------------------------------------
IMPORT = "convert import {}/hf {}/out"
for name, content in {"deep": DEEP, "a list": [], "bytes": b"\xff", "zeros": bytes(9)}.items():
    case(
        f"config.json {name}",
        IMPORT,
        lambda h, p, content=content: (h / "hf").mkdir() or put(h / "hf" / "config.json", content),
        "config.json",
    )
case("export in a file", "convert export {}/run {}/run.toml/a", nothing, "run.toml")
case("export long", "convert export {}/run {}/" + "x" * 300, nothing, "File name too long")
case(
    "export no room",
    "convert export {}/run {}/out",
    lambda h, p: full_disk(p, ".safetensors"),
    "No space left",
)
case("shard size", "convert export {}/run {}/out --shard-size nan", nothing, "shard-size")


def last_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command; return its exit status and the last line on standard error."""
    capsys.readouterr()
    status = main(words)
    lines = capsys.readouterr().err.rstrip("\n").splitlines()
    return status, lines[-1] if lines else ""


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_one_line(
    name: str, home: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, prepare, message = CASES[name]
    prepare(home, monkeypatch)
    words = [word.replace("{}", str(home)) for word in command.split(" ")]
    status, line = last_line(words, capsys)
    monkeypatch.undo()
    assert status == 2, (status, line)
    assert re.match(r"error: |configuration error: ", line), line
    assert re.search(message.replace("[]", r"\[\]"), line), line


def test_names_that_look_like_markup_are_shown_as_they_are(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A closing tag without a beginning, a tag, an emoji.
    folder = tmp_path / "[/][red]:smile:"
    folder.parent.mkdir(exist_ok=True)
    (home / "run").rename(folder)
    (home / "run.toml").rename(folder / "own.toml")
    capsys.readouterr()
    for words in (
        ["status", str(folder)],
        ["plan", f"{folder}/own.toml", f"log.folder={folder}"],
        ["evaluate", str(folder)],
    ):
        assert main(words) == 0
        shown = capsys.readouterr().out.replace("\n", "")
        assert folder.name in re.sub(r"\s", "", shown), words
