"""The tutorials run as a reader runs them: every cell, in order, in a real kernel and a new folder; only shorter."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs/tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SHORTER = {
    r"\bepochs=\d+": "epochs=1",
    r"\bsamples_per_epoch=\d+": "samples_per_epoch=8",
    r"\bsample_batch_size=\d+": "sample_batch_size=8",
    r"\bupdates_per_epoch=\d+": "updates_per_epoch=1",
    r"\bmax_completion_length=\d+": "max_completion_length=12",
    r"\bmax_new_tokens=\d+": "max_new_tokens=6",
    r"\bper_prompt=\d+": "per_prompt=1",
    r'"steps": \d+': '"steps": 2',
    r'\bpairs="emoji_style"': 'pairs={"source": "emoji_style", "max_pairs": 16}',
    r"\[:24\]": "[:4]",
    r'"every": \d+': '"every": 1, "samples": 4',
}
# The time of a tutorial is images with 20 steps and guidance.
FIRST = """
import torch
from diffusion_align.pipelines import ImageAlignmentPipeline
torch.set_num_threads(1)
draw = ImageAlignmentPipeline.__call__
ImageAlignmentPipeline.__call__ = lambda self, *a, **k: draw(self, *a, **{"steps": 2, "guidance_scale": 1.0} | k)
"""


def test_there_are_three():
    assert {path.stem for path in NOTEBOOKS} == {"reward_fine_tuning", "preferences", "text"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 5
    for cell in cells:
        for long, short in SHORTER.items():
            cell.source = re.sub(long, short, cell.source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)  # raises with the cell's traceback
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert path.stem == "text" or "text/html" in shown or "image/png" in shown, "a notebook shows images"
    assert [p for p in (tmp_path / "runs").iterdir() if (p / "report.html").is_file()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_run(path):
    """Outputs of every code cell that has any, in the order of one run from a fresh kernel, and no error among them."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum(bool(cell.outputs) for cell in cells) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (FOLDER / target).is_file(), target
