"""A very small run on the embedded model, the forking command line, and what of two runs must be equal."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

# Every part of the state matters to these numbers: histories are short, the rate changes each step, EMA is kept, and
# `noisy` draws from the three global random states.
SETTINGS = {
    "method": "ddpo",
    "model": "emoji-sd",
    "reward": "jpeg_compressibility",
    "prompts": ["a red apple", "a cat", "a dog"],
    "output_dir": "run",
    "epochs": 5,
    "samples_per_epoch": 4,
    "sample_batch_size": 2,
    "micro_batch_size": 4,
    "updates_per_epoch": 2,
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "sampler": {"steps": 3, "guidance_scale": 1.0},
    "lora": {"rank": 2},
    "history_size": 4,
    "history_min_count": 2,
    "checkpoint_every": 1,
    "grid_every": 0,
    "num_threads": 1,
}
NOISY = """
import random
import numpy
import torch
from diffusion_align.rewards.image.jpeg import jpeg_sizes

def noisy(images, prompts, metadata):
    noise = torch.rand(len(images)) + torch.from_numpy(numpy.random.rand(len(images))).float() + random.random()
    return noise - jpeg_sizes(images)
"""


@pytest.fixture
def settings(tmp_path):
    """Write ``SETTINGS`` with changes to tiny.yaml in the scratch folder, with ``noisy.py`` beside it."""
    (tmp_path / "noisy.py").write_text(NOISY)

    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(SETTINGS | changes))
        return path

    return write


def rows(folder):
    """Rows of metrics.jsonl without what a clock says."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def flat(value, name=""):
    """Path -> leaf of nested mappings and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: value}


def newest(folder):
    return sorted((Path(folder) / "checkpoints").glob("step_*"))[-1]


@pytest.fixture
def assert_same_run():
    """A function: two run folders hold the same rows, weights, averages and optimizer state, bit for bit."""

    def check(folder, other):
        assert rows(folder) == rows(other)
        mine, theirs = newest(folder), newest(other)
        assert mine.name == theirs.name
        for name in ("trained", "ema"):
            a, b = (load_file(path / f"{name}.safetensors") for path in (mine, theirs))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), name
        a, b = (flat(torch.load(path / "tensors.pt", weights_only=True)) for path in (mine, theirs))
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key
        a, b = (load_file(Path(f) / "final" / "pytorch_lora_weights.safetensors") for f in (folder, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), "final"

    return check


@pytest.fixture
def read_rows():
    return rows
