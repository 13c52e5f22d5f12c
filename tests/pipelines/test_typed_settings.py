"""Settings as editors and type checkers see them: generated from the classes, current, and refusing what is none."""

import subprocess
import sys
import typing
from pathlib import Path

import pytest
from typed_settings import OUTPUT, generated

from diffusion_align.methods import SHIPPED, method_of
from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline, settings

CALLS = """
from diffusion_align import ImageAlignmentPipeline, TextAlignmentPipeline
from diffusion_align.diffusion.ddpo import DDPOTrainer
image, text = ImageAlignmentPipeline.from_pretrained("emoji-sd"), TextAlignmentPipeline.from_pretrained("tiny-lm")
image.align(output_dir="x", reward=lambda images, prompts, metadata: images, prompts=lambda: "a", sampler={"steps": 3})
image.align("ddpo", output_dir="x", reward=["ocr", {"name": "aesthetic"}], prompts=["a"], learning_rate=1, lora=None)
image.align("diffusion_dpo", output_dir="x", pairs={"source": "emoji_style", "max_pairs": 3}, trackers=("wandb",))
image.align(DDPOTrainer, output_dir="x", anything=1)
text.align("kto", output_dir="x", dataset="x.jsonl", lora={"rank": 4}, adam_betas=[0.9, 0.99])
text.align("grpo", output_dir="x", prompts="x.txt", reward="length", num_iterations=2)
"""
WRONG = {
    'image.align("ddpo", output_dir="x", learning_rat=1e-3)': "call-overload",
    'image.align(output_dir="x", sampler={"step": 3})': "call-overload",
    'text.align("ppo", output_dir="x", pairs="emoji_style")': "call-overload",
    'text.align("ddpo", output_dir="x")': "call-overload",
    'image.align(output_dir="x", epochs="3")': "call-overload",
}


def test_the_module_is_current():
    pytest.importorskip("ruff")
    assert OUTPUT.read_text(encoding="utf-8") == generated(), "run: python scripts/typed_settings.py"


def test_every_shipped_method_has_an_overload():
    for pipeline, kind in ((ImageAlignmentPipeline, "image"), (TextAlignmentPipeline, "text")):
        typed = {one.__annotations__["method"].removeprefix("typed.") for one in typing.get_overloads(pipeline.align)}
        names = {name for name in SHIPPED if method_of(name).model_kind == kind}
        known = {name for one in typed - {"type[Trainer[Any]]"} for name in typing.get_args(getattr(settings, one))}
        assert known == names


@pytest.mark.slow  # half a minute without a cache of mypy's
def test_mypy_takes_what_is_right_and_refuses_the_rest(tmp_path):
    file = tmp_path / "calls.py"
    file.write_text(CALLS + "".join(f"{call}\n" for call in WRONG), encoding="utf-8")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(file)]
    said = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8").stdout
    first = CALLS.count("\n") + 1
    errors = [line for line in said.splitlines() if ": error:" in line]
    found = [(int(line.split(":")[1]) - first, line.rpartition("[")[2].rstrip("]")) for line in errors]
    assert found == list(enumerate(WRONG.values())), said
