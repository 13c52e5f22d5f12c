"""Run the tutorials in docs/tutorials from a fresh kernel and keep what the cells show.

    python scripts/run_tutorials.py

Each runs in a new folder, so nothing of an earlier run is found.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer
from nbclient import NotebookClient
from PIL import Image

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
                for output in cell.outputs:
                    _shrink(output.get("data", {}))
        nbformat.write(notebook, path)
        print(f"ran {path.name}", flush=True)


def _shrink(data: dict[str, Any]) -> None:
    """Images with 256 colours, a fifth of the bytes, and without the text that stands for them."""
    for kind in {"image/png", "text/html"} & data.keys():
        data[kind] = re.sub(r"iVBORw0KGgo[A-Za-z0-9+/=\n]+", lambda match: _few_colours(match.group()), data[kind])
        data.pop("text/plain", None)


def _few_colours(encoded: str) -> str:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        image.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


if __name__ == "__main__":
    typer.run(main)
