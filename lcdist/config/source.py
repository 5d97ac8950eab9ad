"""Take settings of the model from the checkpoint that a run starts from.

`model.from = FOLDER` names the checkpoint, for its settings and its weights; so does
`checkpoint.load`. Keys of `[model]` that are not written get the checkpoint's values; a written one
that differs is a mistake, except for how far the rotation is scaled.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from lcdist.config.build import REPLACED, ConfigError
from lcdist.config.rope import RopePlain, RopeYarn
from lcdist.config.rope_extend import base_of, extend_rope, with_factor
from lcdist.config.schema import ModelConfig
from lcdist.config.values import shown

[FROM], [EXTEND] = REPLACED["model"], REPLACED["model.rope"]
# A rule's factor says how far it is scaled; LongRoPE's others are searched for each length.
_SCALE = {"factor", "short_factors", "long_factors", "attention_factor"}


@dataclass(frozen=True)
class Source:
    """Hold the settings of a checkpoint that a run starts from.

    Attributes:
        name: The checkpoint, for messages.
        model: Its `[model]`.
        seqlen: Context that it was trained for, in tokens.
        is_own: Whether it is the run itself, started before: its settings hold as they are.
    """

    name: str
    model: ModelConfig
    seqlen: int
    is_own: bool = False


# Returns the source in a folder; None if there is no checkpoint. The second argument is the run's
# own folder, which may be read instead.
FindSource = Callable[[str, str], Source | None]


def find_in_table(table: dict[str, Any], find: FindSource) -> Source | None:
    """Return the source that a configuration names, and set `checkpoint.load` from `model.from`.

    Args:
        table: The configuration; `model.from` is taken out.
        find: Opens a folder.

    Raises:
        ConfigError: If the source is needed and missing.
    """
    model = table.setdefault("model", {})
    checkpoint = table.setdefault("checkpoint", {})
    if not isinstance(model, dict) or not isinstance(checkpoint, dict):
        return None
    key, folder = "checkpoint.load", checkpoint.get("load", "")
    if FROM in model:
        key, named = f"model.{FROM}", model.pop(FROM)
        if not isinstance(named, str) or not named:
            raise ConfigError([f"{key} = {shown(named)}: expected the folder of a checkpoint"])
        if folder not in ("", named):
            raise ConfigError(
                [f"{key} = {named!r} and checkpoint.load = {shown(folder)}: leave one of them out"]
            )
        checkpoint.setdefault("load", named)
        folder = named
    if not isinstance(folder, str) or not folder:
        return None
    log = table.get("log")
    own = log.get("folder", "") if isinstance(log, Mapping) else ""
    source = find(folder, own if isinstance(own, str) else "")
    if source is None and (key != "checkpoint.load" or not _is_whole(model)):
        raise ConfigError(
            [
                f"{key} = {folder!r}: there is no checkpoint to take the model's settings from; "
                f"make one with 'lcdist convert import HF_FOLDER {folder}', or write all of [model]"
            ]
        )
    return source


def _is_whole(model: Mapping[str, Any]) -> bool:
    """Return whether every key without a default is written."""
    needed = (f.name for f in fields(ModelConfig) if f.default is f.default_factory is MISSING)
    return all(name in model for name in needed)


def fill_model(
    table: dict[str, Any], source: Source | None, root: Source | None, errors: list[str]
) -> None:
    """Complete `[model]` from a source.

    Args:
        table: The configuration, which is changed.
        source: What the run starts from, or the stage before; None: nothing is known.
        root: What the first of several stages starts from: `model.rope.extend` extends it.
        errors: Gets a line for every written key that differs.
    """
    model = table.get("model")
    if not isinstance(model, dict):
        return
    rope = model.get("rope", {})
    if isinstance(rope, dict) and EXTEND in rope:
        model["rope"] = _extended(dict(rope), source, root, errors)
    elif source is not None and isinstance(rope, dict):
        model["rope"] = _filled_rope(rope, source, errors)
    if source is not None:
        _fill(model, source, errors)


def _fill(model: dict[str, Any], source: Source, errors: list[str]) -> None:
    """Fill the keys besides the rotation."""
    theirs = source.model
    # 0 stands for what follows from other keys.
    same = {"nheads_kv": theirs.nheads, "head_dim": theirs.hidden_size // theirs.nheads}
    for key in (f.name for f in fields(ModelConfig) if f.name not in ("rope", "init_std")):
        value = getattr(theirs, key)
        if key not in model:
            model[key] = value
        elif not source.is_own and (model[key] or same.get(key)) != (value or same.get(key)):
            error = _differs(f"model.{key}", model[key], value, source)
            if key == "vocab_size" and isinstance(model[key], int) and model[key] > value:
                error += f", or import the model again with --extra-tokens {model[key] - value}"
            errors.append(error)


def _differs(key: str, written: Any, theirs: Any, source: Source) -> str:
    return f"{key} = {shown(written)}: {source.name} has {shown(theirs)}; leave the key out"


def _extended(
    rope: dict[str, Any], source: Source | None, root: Source | None, errors: list[str]
) -> dict[str, Any]:
    """Return the rotation that `model.rope.extend` makes of the source's."""
    word = rope.pop(EXTEND)
    begin = f"model.rope.{EXTEND} = {shown(word)}"
    if rope:
        errors.append(
            f"{begin}: it works out the whole rotation; leave model.rope.{next(iter(rope))} out"
        )
        return {}
    try:
        if source is not None and source.is_own:
            return rope_table(source.model.rope)
        root = root or source
        if root is not None:
            return rope_table(extend_rope(root.model.rope, root.seqlen, word))
        base = base_of(word)
        if base is not None:
            return rope_table(RopePlain(base=base))
    except ValueError as error:
        errors.append(f"{begin}: {error}")
        return {}
    errors.append(
        f"{begin}: it extends the rotation of the model that the run starts from, which is not "
        "known here; set model.from to a folder of 'lcdist convert import'"
    )
    return {}


def _filled_rope(rope: dict[str, Any], source: Source, errors: list[str]) -> dict[str, Any]:
    """Return the written rotation with the source's values of what is not written."""
    model = source.model.rope
    # An attention factor by formula follows the factor that is written.
    theirs = rope_table(with_factor(model, model.factor) if isinstance(model, RopeYarn) else model)
    kind = rope.get("scaling", theirs["scaling"])
    if source.is_own:
        return {**theirs, **rope} if kind == theirs["scaling"] else rope
    if kind != theirs["scaling"]:
        if theirs["scaling"] not in ("none", "longrope"):
            errors.append(_differs("model.rope.scaling", kind, theirs["scaling"], source))
            return rope
        theirs = {"base": theirs["base"]}
        filled = {**theirs, **rope}
        if kind in ("yarn", "llama3", "dynamic", "longrope"):
            filled.setdefault("original_seqlen", source.seqlen)
    else:
        rescaled = any(rope[key] != theirs.get(key) for key in _SCALE & rope.keys())
        if kind == "longrope" and rescaled:
            theirs.pop("attention_factor", None)
        filled = {**theirs, **rope}
    for key in (rope.keys() & theirs.keys()) - _SCALE - {"scaling"}:
        if rope[key] != theirs[key]:
            error = _differs(f"model.rope.{key}", rope[key], theirs[key], source)
            if key == "base" and isinstance(rope[key], int | float):
                error += f", or change it by model.rope.{EXTEND} = 'base:{rope[key]:g}'"
            errors.append(error)
    return filled


def rope_table(rope: Any) -> dict[str, Any]:
    """Return a rotation as a table of TOML."""
    values = {key: value for key, value in asdict(rope).items() if value is not None}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
