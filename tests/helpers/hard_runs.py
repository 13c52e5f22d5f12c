"""A run of seconds in which all that a checkpoint holds matters, and what of two such runs must be equal."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

# Every part of the state matters to these numbers: histories are short, the rate changes each step, EMA is kept, and
# `noisy` draws from the three global random states.
HARD_RUN = {
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
SIZED = {"height": 8, "width": 24, "negative_prompt": "dark", "sampler": {"steps": 3, "guidance_scale": 2.0}}
"""Of a model for images of 16 pixels."""
NOISY = """
import random
import numpy
import torch
from diffusion_align.rewards.image.jpeg import jpeg_sizes

def noisy(images, prompts, metadata):
    noise = torch.rand(len(images)) + torch.from_numpy(numpy.random.rand(len(images))).float() + random.random()
    return noise - jpeg_sizes(images)
"""
# Of text: one and several rejected completions.
PREFERENCES = [
    {"prompt": "the cat", "chosen": " sat", "rejected": [" ran off", " is"]},
    {"prompt": "a dog", "chosen": " is here.", "rejected": [" no"]},
    {"prompt": "one", "chosen": " two", "rejected": [" 3", " 4 and more", "?"]},
    {"prompt": "who", "chosen": "?", "rejected": [" is it"]},
    {"prompt": "x + 1", "chosen": " = 2", "rejected": [" = 123"]},
]


def labels_of(preferences):
    """The chosen and the first rejected completion of each row, labelled."""
    labels = []
    for row in preferences:
        labels.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        labels.append({"prompt": row["prompt"], "completion": row["rejected"][0], "label": False})
    return labels


def rows_of(folder):
    """Rows of metrics.jsonl without what a clock says."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def newest(folder):
    return sorted((Path(folder) / "checkpoints").glob("step_*"))[-1]


def assert_same_run(folder, other):
    """Two run folders hold the same rows, samples, weights, averages and optimizer state, bit for bit."""
    assert_same_checkpoints(folder, other)
    _assert_same_weights(Path(folder) / "final", Path(other) / "final")
    mine, theirs = ({p.name: p.read_bytes() for p in (Path(f) / "samples").glob("*")} for f in (folder, other))
    assert mine == theirs


def assert_same_checkpoints(folder, other):
    """The rows of two runs, and what their newest checkpoints hold."""
    assert rows_of(folder) == rows_of(other)
    mine, theirs = newest(folder), newest(other)
    assert mine.name == theirs.name
    _assert_same_weights(mine, theirs)
    a, b = (_flat(torch.load(path / "tensors.pt", weights_only=True)) for path in (mine, theirs))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def _assert_same_weights(folder, other):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors")) != []
    for name in names:
        a, b = (load_file(path / name) for path in (folder, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def _flat(value, name=""):
    """Path -> leaf of nested mappings and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in _flat(inner, f"{name}/{key}").items()}
    return {name: value}
