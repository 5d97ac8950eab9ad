"""`lcdist init`: write a configuration for a model, a length and a number of GPUs.

    lcdist init extend models/llama --length 131072 --gpus 16 > my.toml

The mesh follows from the plan.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from lcdist.attention import METHODS
from lcdist.config.source import Source
from lcdist.convert.huggingface.config import CONFIG, read_config
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan.recipe import RECIPES, Recipe
from lcdist.rundir.paths import CHECKPOINTS
from lcdist.rundir.source import find_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, the model, the length and the GPUs."""
    what = "; ".join(f"{name}: {text}" for name, text in RECIPES.items())
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE", help=what)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="import, run or Hugging Face folder"
    )
    parser.add_argument(
        "--length", type=int, help="tokens of a sample (default: four times the model's own)"
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    parser.add_argument(
        "--hardware",
        choices=sorted(GPU_SPECS),
        default="h100",
        metavar="GPU",
        help=f"one of {', '.join(sorted(GPU_SPECS))}",
    )
    parser.add_argument("--method", default="full", help="attention method")
    parser.add_argument("--data", default="data/long", help="token folder")


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration."""
    for name in ("length", "gpus"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    method = METHODS.get(arguments.method)
    if method is None:
        known = ", ".join(sorted(METHODS))
        raise ValueError(f"--method {arguments.method}: must be one of {known}")
    has_landmarks = "landmarks" in method.supports
    source, folder, before = _open(arguments.model, has_landmarks)
    tokenizer = arguments.model if (arguments.model / CONFIG).is_file() else "HF_FOLDER"
    before += (f"lcdist tokenize TEXT {arguments.data} --tokenizer {tokenizer}",)
    recipe = Recipe(
        kind=arguments.recipe,
        method=arguments.method,
        source=source,
        folder=folder,
        length=arguments.length or 4 * source.seqlen,
        gpus=arguments.gpus,
        hardware=GPU_SPECS[arguments.hardware],
        data=arguments.data,
        before=("Before it starts:", *(f"  {line}" for line in before)),
    )
    print(recipe.fit(), end="")
    return 0


def _open(model: Path, has_landmarks: bool) -> tuple[Source, str, tuple[str, ...]]:
    """Return the model, the import to start from, and the command that makes it, if needed."""
    # An import has a copy of the original's config.json, too.
    if (model / CONFIG).is_file() and not (model / CHECKPOINTS).is_dir():
        hf = read_config(model)
        name = model.resolve().name
        source = Source(name, hf.model, hf.seqlen)
        if has_landmarks:
            source = replace(source, model=replace(hf.model, vocab_size=hf.model.vocab_size + 1))
        more = " --extra-tokens 1" if has_landmarks else ""
        return source, f"models/{name}", (f"lcdist convert import {model} models/{name}{more}",)
    source = find_source(str(model), "")
    if source is None:
        raise ValueError(
            f"{model}: neither a checkpoint nor a Hugging Face folder; name one, or make one with "
            f"'lcdist convert import HF_FOLDER {model}'"
        )
    row = (
        "it has one token more than its tokenizer, the landmark ('convert import --extra-tokens 1')"
    )
    before = (f"see that {model} was imported for landmarks: {row}",) if has_landmarks else ()
    return replace(source, name=model.resolve().name), str(model), before
