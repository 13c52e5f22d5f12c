"""Whole runs with the settings that save memory end with the weights of runs without them, bit for bit (on a CPU), and
are resumed with or without them."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hard_runs import newest
from tests.helpers.tiny_runs import IMAGE_RUN, TINY

PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    {"prompt": "a dog", "chosen": "s", "rejected": "t"},
]
OF_TEXT = {name: value for name, value in TINY.items() if name != "sampler"} | {"max_completion_length": 6}
ONLINE = OF_TEXT | {"prompts": ["the cat", "a dog"], "reward": {"name": "length", "target": 4}}
RUNS = {
    "ddpo": IMAGE_RUN | {"kl_coef": 0.1, "sampler": {"steps": 3, "guidance_scale": 2.0}},
    "diffusion_dpo": IMAGE_RUN | {"method": "diffusion_dpo", "beta": 0.1, "group_size": 2},
    "grpo": ONLINE | {"method": "grpo", "group_size": 2, "kl_coef": 0.1},
    "ppo": ONLINE | {"method": "ppo"},
    "dpo": OF_TEXT | {"method": "dpo", "dataset": PAIRS, "beta": 0.1},
    "reward_model": OF_TEXT | {"method": "reward_model", "dataset": PAIRS},
}
SAVING = {"gradient_checkpointing": True}


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
@pytest.mark.parametrize("method", RUNS)
def test_no_bit_changes_and_a_run_is_resumed_without_them(method, lora, run_here, request, tmp_path, capfd):
    images = RUNS[method].get("model") == "emoji-sd"
    model = "emoji-sd" if images else str(request.getfixturevalue("tiny_language_model"))
    settings = RUNS[method] | {"model": model, "lora": lora, "learning_rate": 1e-3}

    def train(name, **changes):
        run_here(settings | {"output_dir": str(tmp_path / name)} | changes)
        return load_file(newest(tmp_path / name) / "trained.safetensors")

    plain, saving = train("plain", epochs=2), train("saving", epochs=2, **SAVING)
    train("stopped", epochs=1, **SAVING)
    capfd.readouterr()
    resumed = train("stopped", epochs=2, resume=True)
    assert "results may differ" not in capfd.readouterr().err
    for other in (saving, resumed):
        assert plain.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in plain.items())
