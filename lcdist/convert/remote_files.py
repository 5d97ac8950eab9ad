"""Read and load the model code that exports carry: the files in `remote_code/`.

The files are package data and no part of the import graph. transformers imports the copies in
the exported folder (`trust_remote_code=True`), without lcdist.
"""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent / "remote_code"
MODELING_FILE, ATTENTION_FILE = "modeling_lcdist.py", "attention_lcdist.py"
ROTARY_FILE = "rotary_lcdist.py"


def read_remote_files() -> dict[str, str]:
    """Return the text of each file of model code, by file name."""
    names = (MODELING_FILE, ATTENTION_FILE, ROTARY_FILE)
    return {name: (FOLDER / name).read_text(encoding="utf-8") for name in names}


def load_remote_attention() -> ModuleType:
    """Load `attention_lcdist.py`; every call returns the same module."""
    return _load(ATTENTION_FILE)


def load_remote_rotary() -> ModuleType:
    """Load `rotary_lcdist.py`; every call returns the same module."""
    return _load(ROTARY_FILE)


@cache
def _load(name: str) -> ModuleType:
    path = FOLDER / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
