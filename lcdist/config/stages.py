"""Load a configuration with stages: successive runs, each starting from the previous weights.

A `[[stages]]` table has a `name` and, in the usual sections, the keys that differ from the rest of
the file. Stage number i, from 1, has the run folder `<log.folder>/<i>-<name>`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcdist.config.build import ConfigError, build
from lcdist.config.load import parse, read_table
from lcdist.config.overrides import merge_overrides
from lcdist.config.schema import Config
from lcdist.config.source import FindSource, Source, fill_model, find_in_table
from lcdist.config.values import shown

KEY = "stages"
MOST_STAGES = 100
# Keys that select a kind of table. Such a table replaces the common one: another kind's keys would
# not fit.
TAGS = ("scaling", "method")
# A stage's folder and starting weights follow from its number.
FIXED = (("log", "folder"), ("checkpoint", "load"))


@dataclass(frozen=True)
class Stage:
    """One run of a configuration; `name` is empty in a file without stages."""

    name: str
    config: Config


def load_stages(
    path: str | Path, overrides: Sequence[str] = (), find: FindSource | None = None
) -> tuple[Stage, ...]:
    """Load the stages of the TOML file `path`; a file without stages is one stage.

    Args:
        path: The file.
        overrides: `section.key=value` for every stage, `stages.NAME.section.key=value` for one.
        find: Opens the checkpoint that the first stage starts from, to take settings of the model
            from it. None: what is written holds.

    Raises:
        ConfigError: With every mistake, and the name of its stage.
    """
    table = read_table(path)
    tables = table.pop(KEY, None)
    own, common = _split_overrides(overrides)
    if tables is None:
        if own:
            raise ConfigError([f"override {shown(own[0][1])}: {path} has no stages"])
        return (Stage("", _Chain(find).parse(table, overrides)),)
    names = _names(tables)
    unknown = [text for name, text, _ in own if name not in names]
    if unknown:
        raise ConfigError(
            f"override {shown(text)}: the stages are {', '.join(names)}" for text in unknown
        )
    stages: list[Stage] = []
    errors: list[str] = []
    chain = _Chain(find)
    for name, stage_table in zip(names, tables, strict=True):
        sections = {key: value for key, value in stage_table.items() if key != "name"}
        errors_before = len(errors)
        errors += [
            f"stage '{name}': {section}.{key} follows from the stage's number; set it outside "
            f"[[{KEY}]]"
            for section, key in FIXED
            if key in _table_or_empty(sections.get(section))
        ]
        words = [*common, *(word for stage, _, word in own if stage == name)]
        try:
            config = chain.parse(_merge(table, sections), words, name)
        except ConfigError as error:
            errors += [f"stage '{name}': {line}" for line in error.errors]
        if len(errors) == errors_before:
            stages.append(Stage(name, config))
    if errors:
        # A mistake outside the stages is found once in each.
        raise ConfigError(dict.fromkeys(errors))
    return _chain(stages)


def parse_with_source(table: Mapping[str, Any], source: Source) -> Config:
    """Return the configuration of one run that starts from a known model.

    Args:
        table: The configuration.
        source: What its `model.from` names, which need not exist.

    Raises:
        ConfigError: With every mistake.
    """
    return _Chain(lambda folder, run_folder: source).parse(table, ())


class _Chain:
    """Parse one stage after another: each takes settings of the model from the one before."""

    def __init__(self, find: FindSource | None) -> None:
        self._find = find
        self._root: Source | None = None
        self._before: Source | None = None

    def parse(self, table: Mapping[str, Any], overrides: Sequence[str], name: str = "") -> Config:
        """Return the configuration of a stage; raise ConfigError with every mistake."""
        if self._find is None:
            return parse(table, overrides)
        errors: list[str] = []
        merged = merge_overrides(table, overrides, errors)
        source = find_in_table(merged, self._first_only(self._find, name))
        if self._before is None:
            self._root = source
        fill_model(merged, self._before or source, self._root, errors)
        config = build(Config, merged, "", errors)
        if errors:
            raise ConfigError(errors)
        self._before = Source(f"stage {name!r}", config.model, config.train.seqlen)
        return config

    def _first_only(self, find: FindSource, name: str) -> FindSource:
        """Return `find` for the first stage, with its folder; others start from the one before."""

        def found(folder: str, run_folder: str) -> Source | None:
            if self._before is not None:
                return self._before
            return find(folder, f"{run_folder}/1-{name}" if name and run_folder else run_folder)

        return found


def _chain(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Set each stage's folder, and from the second on the checkpoint to start from."""
    chained: list[Stage] = []
    for number, stage in enumerate(stages, 1):
        config = stage.config
        folder = str(Path(config.log.folder) / f"{number}-{stage.name}")
        config = replace(config, log=replace(config.log, folder=folder))
        if chained:
            checkpoint = replace(config.checkpoint, load=chained[-1].config.log.folder)
            # The checkpoint contains the adapters.
            lora = replace(config.lora, load="")
            config = replace(config, checkpoint=checkpoint, lora=lora)
        chained.append(Stage(stage.name, config))
    return tuple(chained)


def _names(tables: Any) -> list[str]:
    is_valid = isinstance(tables, list) and all(isinstance(each, Mapping) for each in tables)
    if not tables or not is_valid:
        raise ConfigError(
            [f"{KEY} = {shown(tables)}: expected tables, each written below [[{KEY}]]"]
        )
    if len(tables) > MOST_STAGES:
        raise ConfigError([f"[[{KEY}]]: {len(tables)} stages; at most {MOST_STAGES} are legal"])
    names = [table.get("name") for table in tables]
    wrong = [
        f"{KEY}[{number}].name = {shown(name)}: expected letters, digits, '.', '_' and '-', "
        "different for each stage"
        for number, name in enumerate(names)
        if not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        or names.count(name) > 1
    ]
    if wrong:
        raise ConfigError(wrong)
    return names


def _split_overrides(overrides: Sequence[str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Separate overrides for one stage from those for all.

    Returns:
        (stage, whole override, override within the stage) of those for one stage; and the others.
    """
    own, common = [], []
    for text in overrides:
        found = re.match(rf"\s*{KEY}\.(.+?)\.(?=[a-z_]+\.[^=]*=)(.*)", text, re.DOTALL)
        if found:
            own.append((found[1], text, found[2]))
        else:
            common.append(text)
    return own, common


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and not _has_tag(value):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _has_tag(table: Mapping[str, Any]) -> bool:
    return any(tag in table for tag in TAGS)


def _table_or_empty(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
