"""Run `extend.ipynb` and keep what it shows, without what differs from run to run.

    python docs/run_notebook.py

It runs in a temporary folder and is written back. nbclient and ipykernel belong to the extra `dev`.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "extend.ipynb"
SECONDS = 600
ROOT = Path(__file__).parent.parent


def read_notebook(file: Path = NOTEBOOK) -> Any:
    """Return a notebook as nbformat's object."""
    return nbformat.read(file, as_version=4)


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in a folder; outputs replace those that the notebook had.

    Raises:
        CellExecutionError: A cell ended in an error.
    """
    programs, paths = Path(sys.executable).parent, (ROOT, ROOT / "kernels")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        # IPython would write its history into the user's home.
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=place)
    client.execute(env=environment)
    clean(notebook)


def clean(notebook: Any) -> None:
    """Remove times, versions and standard error, and join what one cell printed in pieces."""
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        kept: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            kept.append(output)
        cell.outputs = kept


def main() -> None:
    """Run the notebook and write it back."""
    notebook = read_notebook()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
