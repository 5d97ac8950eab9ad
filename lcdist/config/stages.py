"""A configuration of stages: several runs, one after the other, each from the weights of the last.

`[[stages]]` tables have a `name` and what differs from the rest of the file, in the same sections.
Stage number i, from 1, has the run folder `<log.folder>/<i>-<name>` and starts from the one before.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcdist.config.load import ConfigError, parse, read_table
from lcdist.config.schema import Config

KEY = "stages"
# A table that chooses one of several kinds has nothing in common with another kind's.
TAGS = ("scaling", "method")
# Where a stage lies and what it starts from follow from its place.
FIXED = (("log", "folder"), ("checkpoint", "load"))


@dataclass(frozen=True)
class Stage:
    """One of the runs of a configuration; name: empty where it has no stages."""

    name: str
    config: Config


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of the TOML file `path`; a file without any is one.

    overrides: `section.key=value` for every stage, `stages.NAME.section.key=value` for one. Raises
    ConfigError with every mistake, naming the stage.
    """
    table = read_table(path)
    tables = table.pop(KEY, None)
    own, common = _of_stages(overrides)
    if tables is None:
        if own:
            raise ConfigError([f"override {own[0][1]!r}: {path} has no stages"])
        return (Stage("", parse(table, overrides)),)
    names = _names(tables)
    unknown = [text for name, text, _ in own if name not in names]
    if unknown:
        raise ConfigError(
            f"override {text!r}: the stages are {', '.join(names)}" for text in unknown
        )
    stages: list[Stage] = []
    errors: list[str] = []
    for name, of_stage in zip(names, tables, strict=True):
        different = {key: value for key, value in of_stage.items() if key != "name"}
        before = len(errors)
        errors += [
            f"stage '{name}': {section}.{key} is made from the stage's place; set it outside "
            f"[[{KEY}]]"
            for section, key in FIXED
            if key in _table(different.get(section))
        ]
        words = [*common, *(word for stage, _, word in own if stage == name)]
        try:
            config = parse(_merged(table, different), words)
        except ConfigError as error:
            errors += [f"stage '{name}': {line}" for line in error.errors]
        if len(errors) == before:
            stages.append(Stage(name, config))
    if errors:
        # What is wrong outside the stages is wrong in each.
        raise ConfigError(dict.fromkeys(errors))
    return _chained(stages)


def _chained(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Each in a folder of its own, and from the second on with the weights of the one before."""
    chained: list[Stage] = []
    for number, stage in enumerate(stages, 1):
        config = stage.config
        folder = str(Path(config.log.folder) / f"{number}-{stage.name}")
        config = replace(config, log=replace(config.log, folder=folder))
        if chained:
            begins = replace(config.checkpoint, load=chained[-1].config.log.folder)
            # Adapters come along with the weights.
            lora = replace(config.lora, load="")
            config = replace(config, checkpoint=begins, lora=lora)
        chained.append(Stage(stage.name, config))
    return tuple(chained)


def _names(tables: Any) -> list[str]:
    are_tables = isinstance(tables, list) and all(isinstance(each, Mapping) for each in tables)
    if not tables or not are_tables:
        raise ConfigError([f"{KEY} = {tables!r}: expected tables, each written below [[{KEY}]]"])
    names = [table.get("name") for table in tables]
    wrong = [
        f"{KEY}[{number}].name = {name!r}: expected letters, digits, '.', '_' and '-', "
        "another for each stage"
        for number, name in enumerate(names)
        if not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        or names.count(name) > 1
    ]
    if wrong:
        raise ConfigError(wrong)
    return names


def _of_stages(overrides: Sequence[str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(stage, the override, what it is in the stage) of those for one stage, and the rest."""
    own, common = [], []
    for text in overrides:
        found = re.match(rf"\s*{KEY}\.(.+?)\.(?=[a-z_]+\.[^=]*=)(.*)", text, re.DOTALL)
        if found:
            own.append((found[1], text, found[2]))
        else:
            common.append(text)
    return own, common


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and not _chooses(value):
            value = _merged(below, value)
        merged[key] = value
    return merged


def _chooses(table: Mapping[str, Any]) -> bool:
    return any(tag in table for tag in TAGS)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
