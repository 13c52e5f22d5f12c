"""Run the tutorials in docs/tutorials from a fresh kernel and keep what the cells show.

    python scripts/run_tutorials.py

Each runs in a new folder, so nothing of an earlier run is found.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"


def main(only: Annotated[list[str] | None, typer.Option(help="names of tutorials; all when not given")] = None) -> None:
    """Run, then write the notebooks with their outputs."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if only and path.stem not in only:
            continue
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
            if cell.cell_type == "code":  # progress bars and remarks of libraries
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)
        print(f"ran {path.name}", flush=True)


if __name__ == "__main__":
    typer.run(main)
