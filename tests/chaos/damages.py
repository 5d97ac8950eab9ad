"""Damage the files of a run folder and of its tokens, and start the run again."""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lcdist.commands.main import main
from lcdist.rundir.paths import METRICS_FILE
from tests.chaos.stdio import output_to
from tests.chaos.tally import REFUSED, Tally, told
from tests.chaos.tiny_run import OTHER_LOSSES, STEPS, Start, difference, write_data, write_settings

MEANING = (
    "the run goes on from a whole checkpoint to the right tensors and losses, bit for bit (lost "
    "records of losses are told), or ends with `error:` lines that name the file; `status`, "
    "`report` and `check` end without a traceback"
)


def flipped(file: Path, chance: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncated(file: Path, chance: random.Random) -> None:
    """Cut the file anywhere; nothing may be left."""
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def removed(file: Path, chance: random.Random) -> None:
    """Remove the file."""
    file.unlink()


def zeroed(file: Path, chance: random.Random) -> None:
    """Zero the file from anywhere to its end, as after a power cut; its size stays."""
    content = file.read_bytes()
    kept = chance.randrange(len(content)) if chance.random() < 0.5 else 0
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


def foreign(file: Path, chance: random.Random) -> None:
    """Replace the content by something else that a reader may take for its own."""
    others = (b"[]", b"{}", b"null", b"7\n", b"\xff\xfe", b"[" * 5000, b'{"a": ' * 5000, b"")
    file.write_bytes(chance.choice(others))


DAMAGES: Mapping[str, Callable[[Path, random.Random], None]] = {
    "a flipped bit": flipped,
    "truncated": truncated,
    "removed": removed,
    "zeros": zeroed,
    "foreign content": foreign,
}
# Files by kind, as patterns in the folder that holds run and tokens. NEWEST is the last checkpoint.
NEWEST = "run/checkpoints/step_00000006"
FILES = {
    "tensors of the newest checkpoint": f"{NEWEST}/*.distcp",
    "small files of the newest checkpoint": f"{NEWEST}/[!l]*[!p]",
    "manifest of the newest checkpoint": f"{NEWEST}/lcdist.json",
    "`latest`": "run/checkpoints/latest",
    "`status.json`": "run/status.json",
    "`run.json`": "run/run.json",
    "`metrics.jsonl`": "run/metrics.jsonl",
    "`config.toml`": "run/config.toml",
    "tokens (`.bin`)": "source/data/*.bin",
    "index of tokens (`.idx`)": "source/data/*.idx",
    "`meta.json` of tokens": "source/data/meta.json",
    "tokenizer beside tokens": "source/data/tokenizer*",
}


@dataclass(frozen=True)
class Scene:
    """A run that is stopped after step 6 of 8, and how it would end.

    Attributes:
        folder: where every damaged copy is put: paths stand in its files.
        kept: the untouched copy.
        expected: folder of the undisturbed run.
    """

    folder: Path
    kept: Path
    expected: Path

    @property
    def words(self) -> list[str]:
        """Arguments of the start after the damage."""
        return ["train", str(self.folder / "settings.toml")]


def make_scene(home: Path) -> Scene:
    """Train the run to step 6, and another one without a stop."""
    scene = Scene(home / "scene", home / "kept", home / "expected")
    data = write_data(scene.folder / "source")
    settings = write_settings(scene.folder / "settings.toml", data, scene.folder / "run")
    run, words = scene.folder / "run", ["train", str(settings)]
    with output_to(home / "made.log"):
        statuses = [
            main([*words, f"log.folder={scene.expected}"]),
            main([*words, f"train.steps={STEPS - 2}"]),
        ]
    assert statuses == [0, 0], (home / "made.log").read_text()
    assert (scene.folder / NEWEST).is_dir() and run.is_dir()
    shutil.copytree(scene.folder, scene.kept)
    return scene


def try_damages(
    home: Path, times: int, chance: random.Random, most: int | None = None
) -> list[Tally]:
    """Damage every file in every way, `times` times each, and start the run after each damage.

    Args:
        home: empty folder.
        times: of every damage of every file.
        chance: draws bits and places.
        most: only so many damages, drawn from all; None: all of them.

    Returns:
        A tally for each kind of file.
    """
    scene = make_scene(home)
    tallies = {what: Tally(f"damaged {what}", MEANING) for what in FILES}
    jobs = [
        (what, file.relative_to(scene.kept), damage)
        for what, pattern in FILES.items()
        for file in sorted(scene.kept.glob(pattern))
        for damage in DAMAGES
    ] * times
    assert {what for what, _, _ in jobs} == set(FILES), "every kind of file is there"
    for what, file, damage in jobs if most is None else chance.sample(jobs, most):
        problem = _try_damage(scene, file, damage, chance)
        tallies[what].add(told(problem, f"{file}, {damage}"))
    return [tally for tally in tallies.values() if tally.tried]


def _try_damage(scene: Scene, file: Path, damage: str, chance: random.Random) -> str | None:
    """Damage a file of a fresh copy; return what went wrong, None for nothing."""
    shutil.rmtree(scene.folder)
    shutil.copytree(scene.kept, scene.folder)
    DAMAGES[damage](scene.folder / file, chance)
    run, printed = scene.folder / "run", scene.folder.parent / "printed"
    # A report takes seconds, and reads what is in the run folder itself.
    reported = ("report",) if file.parent == Path("run") else ()
    for command in ("status", "check", *reported):
        with output_to(printed):
            try:
                main([command, str(run)])
            except Exception as error:
                return f"lcdist {command}: {type(error).__name__}: {error}"
    start = Start(scene.words, printed)
    status = start.end()
    text = printed.read_text(errors="replace")
    if status == 0:
        problem = difference(run, scene.expected)
        # Lost records cannot be made again: the run goes on and says so.
        told = file.name == METRICS_FILE and f"{METRICS_FILE} " in text
        return None if problem == OTHER_LOSSES and told else problem
    lines = [line for line in text.splitlines() if "error: " in line]
    names = (file.name, file.parent.name if file.parent.name.startswith("step_") else file.name)
    if "Traceback" in text or status != 2 or not lines:
        return f"exit status {status}: {' '.join(text.split())[-300:]}"
    if not any(name in line for line in lines for name in names):
        return f"the file is not named: {lines}"
    return REFUSED
