"""Recognize GGUF, the format of llama.cpp, which is not read here."""

from pathlib import Path

SUFFIX, MAGIC = ".gguf", b"GGUF"


def refuse_gguf(source: Path) -> None:
    """Raise ValueError, with the way to a folder of safetensors, if `source` is a GGUF file.

    Args:
        source: a file, or a folder, which is refused if its only weights are in GGUF files.
    """
    if source.is_dir():
        files = sorted(source.glob(f"*{SUFFIX}"))
        if not files or any(source.glob("*.safetensors")):
            return
        what, first = f"{source} has its weights in GGUF ({files[0].name})", files[0]
    elif source.is_file() and (source.suffix == SUFFIX or _has_magic(source)):
        what, first = f"{source} is a GGUF file", source
    else:
        return
    raise ValueError(
        f"{what}, and lcdist reads a folder of safetensors: download the model that it was made "
        "from (hf download OWNER/NAME --local-dir FOLDER), or let transformers restore what "
        "quantization left of it (pip install gguf accelerate, then in Python AutoTokenizer and "
        f"AutoModelForCausalLM.from_pretrained({str(first.parent)!r}, gguf_file={first.name!r}), "
        "each with .save_pretrained(FOLDER); since transformers 5.20 or so the model with "
        "quantization_config=GgufConfig(dequantize=True), too)"
    )


def _has_magic(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
