"""What notebooks show: one display of progress, the report of a run, its metrics."""

import html
import re

import pytest

from diffusion_align.pipelines import ImageAlignmentPipeline

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

ALIGN = """
from diffusion_align import ImageAlignmentPipeline
pipe = ImageAlignmentPipeline.from_pretrained({model!r}, device="cpu")
print("loaded")
"""
TRAIN = """
pipe.align(reward="jpeg_compressibility", prompts=lambda: "a cat", output_dir={folder!r}, epochs=30,
           samples_per_epoch=2, sample_batch_size=2, updates_per_epoch=1, sampler={{"steps": 2}},
           num_threads=1, grid_every=0)
"""


@pytest.fixture
def executed(tiny_sd, tmp_path):
    """The outputs of each cell of a notebook in which a run is trained."""
    folder = tmp_path / "run"
    cells = [ALIGN.format(model=str(tiny_sd)), TRAIN.format(folder=str(folder)), "pipe.report()", "pipe.metrics[-1]"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells], folder


def test_a_run_in_a_notebook(executed):
    (_, trained, report, metrics), folder = executed
    assert len(trained) <= 3
    *bars, shown = trained
    assert ["30/30" in one.data["text/plain"] for one in bars if one.output_type == "display_data"] == [True]
    page = html.escape((folder / "report.html").read_text(encoding="utf-8"))
    assert page in shown.data["text/html"]
    assert re.match("<pre>ImageAlignmentPipeline", shown.data["text/html"])
    assert page in report[0].data["text/html"]
    assert "'epoch': 30" in metrics[0].data["text/plain"]


def test_without_a_run_there_is_nothing_to_show(tiny_sd):
    pipe = ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu")
    assert pipe._repr_html_() is None
    assert pipe.metrics == []
