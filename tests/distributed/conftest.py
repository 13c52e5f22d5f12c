"""Two real processes over gloo, with what torchrun would give them, and a run small enough for a test."""

import pytest
import yaml

SETTINGS = {
    "method": "ddpo",
    "reward": "jpeg_compressibility",
    "prompts": ["a red apple", "a cat", "a dog", "a blue car"],
    "epochs": 1,
    "samples_per_epoch": 8,
    "sample_batch_size": 2,
    "micro_batch_size": 4,
    "updates_per_epoch": 1,
    "learning_rate": 1e-3,
    "sampler": {"steps": 3, "guidance_scale": 2.0},
    "lora": {"rank": 2},
    "grid_every": 0,
    "num_threads": 1,
}


@pytest.fixture
def settings(tmp_path, tiny_sd):
    """Write ``SETTINGS`` with changes to tiny.yaml in the scratch folder."""

    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"model": str(tiny_sd)} | SETTINGS | changes))
        return path

    return write
